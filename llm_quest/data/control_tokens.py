"""Control tokens of a template and the same words typed by somebody, kept apart in one text.

Commonly got wrong: (1) what a user typed is read as a control token: `<|im_end|>` in a message ends it. (2) To prevent
that, the text is cut at its control tokens and the parts are encoded alone, and each gets the space with which some
tokenizers begin a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import tokenizers

from llm_quest.data.encode_pieces import Segment, encode_segment, split_segments
from llm_quest.data.tokenizer import Tokenizer, require_valid_unicode

ESCAPE_MARK = "\ufdd0"  # noncharacters: they stand in no text
BOUNDARY_MARK = "\ufdd1"


class ControlTokenEncoder:
    """Encodes texts in which some words that spell control tokens are escaped: `escape(text)` puts a mark behind their
    first character, `encode(text)` reads them as text and all others as control tokens, in one pass over the text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.control_tokens = tokenizer, tokenizer.special_tokens
        words = "|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True)))
        self.control_endings = tuple(self.control_tokens)
        self.pattern = re.compile(f"(?:{words})(?!{ESCAPE_MARK})" if words else r"(?!)")

    def escape(self, text: str) -> str:
        """The text with every control token in it escaped."""
        plain = text.replace(ESCAPE_MARK, "").replace(BOUNDARY_MARK, "")
        return self.pattern.sub(lambda match: match.group()[0] + ESCAPE_MARK + match.group()[1:], plain)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Nothing is added around it."""
        if ESCAPE_MARK in text:
            return self.encode_escaped([text])[0]
        return self.tokenizer.encode(text, allow_special_tokens=True, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        plain = [text for text in texts if ESCAPE_MARK not in text]
        ids = self.tokenizer.encode_batch(plain, allow_special_tokens=True, add_special_tokens=False)
        ids_of = dict(zip(plain, ids, strict=True))
        if len(plain) < len(texts):
            escaped = [text for text in texts if ESCAPE_MARK in text]
            ids_of |= dict(zip(escaped, self.encode_escaped(escaped), strict=True))
        return [ids_of[text] for text in texts]

    def encode_escaped(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts in which words that spell control tokens are escaped."""
        bounded = [self.pattern.sub(lambda match: boundary_name(match.group()), text) for text in texts]
        encoded = self.boundary_backend.encode_batch_fast(
            [require_valid_unicode(one.replace(ESCAPE_MARK, "")) for one in bounded], add_special_tokens=False
        )
        return [[self.boundary_ids.get(token, token) for token in one.ids] for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        return self.tokenizer.decode(ids, keep_special_tokens=True)

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """The ids of consecutive pieces of one text: see `data/encode_pieces.py`. A piece is read from one control
        token to the next."""
        numbers, segments = self.split(pieces)
        parts = [ids for segment in segments for ids in encode_segment(segment, self.encode, self.decode)]
        encoded: list[list[int]] = [[] for _ in pieces]
        for number, ids in zip(numbers, parts, strict=True):
            encoded[number] += ids
        return encoded

    def encode_texts_in_pieces(self, texts: Sequence[Sequence[str]]) -> Iterator[list[np.ndarray]]:
        """`encode_pieces` of each of these texts, as int32. What they share, as the rows of a conversation do that its
        template rewrites, is encoded once, and all together on all cores."""
        split = [self.split(pieces) for pieces in texts]
        encoded = self.encode_segments(dict.fromkeys(segment for _, segments in split for segment in segments))
        for pieces, (numbers, segments) in zip(texts, split, strict=True):
            parts: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in pieces]
            for number, ids in zip(numbers, chain.from_iterable(encoded[segment] for segment in segments), strict=True):
                parts[number].append(ids)
            yield [np.concatenate(part) for part in parts]

    def encode_segments(self, segments: Iterable[Segment]) -> dict[Segment, list[np.ndarray]]:
        """The ids of each piece of these segments."""
        wanted = list(dict.fromkeys(text for segment in segments for text in segment.texts))
        known = dict(zip(wanted, self.encode_batch(wanted), strict=True))

        def encode(text: str) -> list[int]:
            return known[text] if text in known else self.encode(text)

        return {
            segment: [np.array(ids, np.int32) for ids in encode_segment(segment, encode, self.decode)]
            for segment in segments
        }

    def split(self, pieces: Sequence[str]) -> tuple[list[int], list[Segment]]:
        """The parts of these pieces in segments, and the number of the piece of each part."""
        parts = [(number, part) for number, piece in enumerate(pieces) for part in self.split_after_controls(piece)]
        segments = split_segments((part for _, part in parts), self.last_control_token)
        return [number for number, _ in parts], list(segments)

    def split_after_controls(self, text: str) -> Iterator[str]:
        """The text in parts, each but the last ending with a control token."""
        at = 0
        for match in self.pattern.finditer(text):
            yield text[at : (at := match.end())]
        if at < len(text):
            yield text[at:]

    def last_control_token(self, text: str) -> str:
        """The control token with which a text ends, or ""."""
        if not text.endswith(self.control_endings):
            return ""
        return next(control for control in self.control_tokens if text.endswith(control))

    @cached_property
    def boundary_backend(self) -> tokenizers.Tokenizer:
        """A copy in which control tokens are text, unless they stand between two boundary marks."""
        backend = self.tokenizer.copy_without_controls()
        added = [token for token in backend.get_added_tokens_decoder().values() if token.special]
        backend.add_tokens(
            [
                tokenizers.AddedToken(
                    boundary_name(token.content), single_word=token.single_word, lstrip=token.lstrip,
                    rstrip=token.rstrip, normalized=False, special=False,
                )
                for token in added
            ]
        )  # fmt: skip
        return backend

    @cached_property
    def boundary_ids(self) -> dict[int, int]:
        """The copy's ids of bounded control tokens, and the tokenizer's own."""
        names = {name: self.boundary_backend.token_to_id(boundary_name(name)) for name in self.control_tokens}
        return {number: self.tokenizer.token_to_id(name) for name, number in names.items() if number is not None}


def boundary_name(control_token: str) -> str:
    return BOUNDARY_MARK + control_token + BOUNDARY_MARK
