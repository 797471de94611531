"""Control tokens of a template and the same words typed by somebody, kept apart in one text.

Commonly got wrong: (1) what a user typed is read as a control token: `<|im_end|>` in a message ends it. (2) To prevent
that, the text is cut at its control tokens and the parts are encoded alone, and each gets the space with which some
tokenizers begin a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import tokenizers

from llm_quest.data.encode_pieces import encode_pieces
from llm_quest.data.tokenizer import Tokenizer

ESCAPE_MARK = "\ufdd0"  # noncharacters: they stand in no text
BOUNDARY_MARK = "\ufdd1"
MAX_KEPT_TEXTS, MAX_KEPT_CHARACTERS = 256, 20_000


class ControlTokenEncoder:
    """Encodes texts in which some words that spell control tokens are escaped: `escape(text)` puts a mark behind their
    first character, `encode(text)` reads them as text and all others as control tokens, in one pass over the text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.control_tokens = tokenizer, tokenizer.special_tokens
        words = "|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True)))
        self.kept: dict[str, list[int]] = {}
        self.pattern = re.compile(f"(?:{words})(?!{ESCAPE_MARK})" if words else r"(?!)")

    def escape(self, text: str) -> str:
        """The text with every control token in it escaped."""
        plain = text.replace(ESCAPE_MARK, "").replace(BOUNDARY_MARK, "")
        return self.pattern.sub(lambda match: match.group()[0] + ESCAPE_MARK + match.group()[1:], plain)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Nothing is added around it."""
        if ESCAPE_MARK not in text:
            return self.tokenizer.encode(text, allow_special_tokens=True, add_special_tokens=False)
        bounded = self.pattern.sub(lambda match: boundary_name(match.group()), text).replace(ESCAPE_MARK, "")
        ids = self.boundary_backend.encode(bounded, add_special_tokens=False).ids
        return [self.boundary_ids.get(token, token) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        return self.tokenizer.decode(ids, keep_special_tokens=True)

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """The ids of consecutive pieces of one text: see `data/encode_pieces.py`. A piece is read from one control
        token to the next, so that texts which begin alike, as those of a conversation do, share what was encoded."""
        parts = [(number, part) for number, piece in enumerate(pieces) for part in self.split_after_controls(piece)]
        encoded = encode_pieces([part for _, part in parts], self.encode_again, self.decode, self.last_control_token)
        found: list[list[int]] = [[] for _ in pieces]
        for (number, _), ids in zip(parts, encoded, strict=True):
            found[number] += ids
        return found

    def split_after_controls(self, text: str) -> Iterator[str]:
        """The text in parts, each but the last ending with a control token."""
        at = 0
        for match in self.pattern.finditer(text):
            yield text[at : (at := match.end())]
        if at < len(text):
            yield text[at:]

    def encode_again(self, text: str) -> list[int]:
        """As `encode`, kept for a while where the text is short."""
        if len(text) > MAX_KEPT_CHARACTERS:
            return self.encode(text)
        if text not in self.kept:
            if len(self.kept) >= MAX_KEPT_TEXTS:
                self.kept.pop(next(iter(self.kept)))
            self.kept[text] = self.encode(text)
        return self.kept[text]

    def last_control_token(self, text: str) -> str:
        """The control token with which a text ends, or ""."""
        return next((control for control in self.control_tokens if text.endswith(control)), "")

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
