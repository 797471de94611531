"""Text generation: from prompts to completions. `sampling` draws tokens, `stopping` ends a sequence, `detokenizer`
turns tokens into text without splitting a character or a stop string, `decoding` runs the model with its caches,
`generate` ties them together; `speculative/` drafts several tokens and checks them in one pass."""
