"""Decoding in pieces: what one more token adds to the text that the ids before it give.

The text of ids is no concatenation of the texts of single ids. A Llama-2-style decoder removes the space that begins a
text, WordPiece joins with spaces, a character may be spread over several ids, and a run of byte tokens is read as a
whole. Each decoder here therefore decodes the new ids behind some of the earlier ones and returns the difference.

Commonly got wrong: a completion is decoded without its prompt, and the first word of "Once upon a" + " time" loses its
space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT_CHARACTER = "\ufffd"


class TextDecoder(Protocol):
    """The part of a tokenizer that decoding in pieces needs. special_token_ids: those that `decode` leaves out unless
    they are kept. byte_token_ids: those that stand for single bytes and are decoded by runs."""

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    @property
    def byte_token_ids(self) -> frozenset[int]: ...

    def decode(self, ids: Sequence[int], *, keep_special_tokens: bool = False) -> str: ...


class DecodeStream:
    """Streaming decoder: `feed(token) -> str` returns the text that has become certain, `flush() -> str` the rest.
    Their concatenation is what `decode` returns for all ids at once, without the part that the prompt gives.

    prompt_ids: the ids before the stream. A character whose bytes are spread over tokens is held back until complete,
    and a run of byte tokens (`<0xE2>`) until a token of another kind follows: one wrong byte changes its whole text."""

    def __init__(self, tokenizer: TextDecoder, prompt_ids: Sequence[int] = (), *, keep_special_tokens: bool = False):
        self.tokenizer = tokenizer
        self.keep_special_tokens = keep_special_tokens
        self.skipped_ids = frozenset[int]() if keep_special_tokens else tokenizer.special_token_ids
        self.context_ids = decoding_context(tokenizer, prompt_ids, self.skipped_ids)
        self.pending_ids: list[int] = []

    def feed(self, token: int) -> str:
        if int(token) in self.skipped_ids:
            return ""
        self.pending_ids.append(int(token))
        if int(token) in self.tokenizer.byte_token_ids:
            return ""
        text = self.pending_text()
        if not text or text.endswith(REPLACEMENT_CHARACTER):
            return ""
        self.context_ids, self.pending_ids = self.pending_ids, []
        return text

    def flush(self) -> str:
        """The text held back, U+FFFD for characters that were never completed. The stream goes on behind it."""
        text = self.pending_text()
        self.context_ids, self.pending_ids = self.pending_ids or self.context_ids, []
        return text

    def pending_text(self) -> str:
        return text_behind(self.tokenizer, self.context_ids, self.pending_ids, self.keep_special_tokens)


def decode_continuation(
    tokenizer: TextDecoder, prompt_ids: Sequence[int], ids: Sequence[int], *, keep_special_tokens: bool = False
) -> str:
    """The text that ids add to their prompt's: decode(prompt_ids + ids) = decode(prompt_ids) + this."""
    skipped = frozenset[int]() if keep_special_tokens else tokenizer.special_token_ids
    return text_behind(tokenizer, decoding_context(tokenizer, prompt_ids, skipped), ids, keep_special_tokens)


def text_behind(tokenizer: TextDecoder, context: Sequence[int], ids: Sequence[int], keep_special_tokens: bool) -> str:
    """What ids add to the text of the context. Where they change that text itself (a context that ends within a
    character), the text of the ids alone."""
    before = tokenizer.decode(context, keep_special_tokens=keep_special_tokens)
    whole = tokenizer.decode([*context, *ids], keep_special_tokens=keep_special_tokens)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(ids, keep_special_tokens=keep_special_tokens)


def decoding_context(tokenizer: TextDecoder, ids: Sequence[int], skipped_ids: frozenset[int]) -> list[int]:
    """The shortest end of ids behind which any other ids add the same text as behind all of them: it begins with a
    token of whole characters that is decoded (no control token, no byte of a run)."""
    for start in range(len(ids) - 1, -1, -1):
        token = int(ids[start])
        if token in skipped_ids or token in tokenizer.byte_token_ids:
            continue
        text = tokenizer.decode([token], keep_special_tokens=True)
        if text.strip() and REPLACEMENT_CHARACTER not in text:
            return [int(token) for token in ids[start:]]
    return [int(token) for token in ids]
