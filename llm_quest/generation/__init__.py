"""Second floor: from prompts to texts. `sampling_params` says what is drawn, `until` when a row ends, `text` how tokens
become text without splitting a character or a stop string, `decoding` how the model is driven, `generate` ties them
together.
"""
