"""Encoding in pieces: the ids of a text whose parts (prompt and answer, turns of a conversation) have to stay apart.

The ids of a text are no concatenation of the ids of its parts. A Llama-2-style tokenizer puts a space before every text
that it encodes, so an answer encoded alone begins with a token that no generation ever produces after the prompt.

    "<s>[INST] Hi [/INST]" + " Four.</s>"
        at once                ... _[ / INST ]  _Four . </s>
        the answer alone       ... _[ / INST ]  _ _Four . </s>        an extra token is learned

The rule: the ids of the prompt are those of the prompt alone, which generation reads. Where the ids of the whole begin
with them, the answer has the others, so both are the whole encoded at once. Where a token of the whole lies across the
seam, no generation can produce it: the answer then has the ids of its text behind other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]

CONTEXTS = ("\n", ".", ":", ")", "a", "1")
"""Texts tried in turn as what precedes a piece; the first that no token joins to it is taken."""


class Segment(NamedTuple):
    """Consecutive pieces that end where a control token ends. control: the one before them, or ""."""

    control: str
    pieces: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        """The texts whose ids decide those of the pieces: what precedes each, and the piece with it."""
        return [text for text in accumulate((self.control, *self.pieces)) if text]


def encode_pieces(
    pieces: Sequence[str], encode: Encode, decode: Decode, restart: Callable[[str], str] = lambda text: ""
) -> list[list[int]]:
    """The ids of consecutive pieces of one text, a list for each.

    encode, decode: of whole texts, without anything added around them. restart: the control token with which a text
    ends, or "". Nothing before a control token changes the ids after it, so with `restart` every piece is read a
    bounded number of times."""
    segments = split_segments(pieces, restart)
    return [ids for segment in segments for ids in encode_segment(segment, encode, decode)]


def split_segments(pieces: Iterable[str], restart: Callable[[str], str]) -> Iterator[Segment]:
    """The pieces in segments: a segment ends with a piece at whose end the text ends with a control token."""
    control, text, pieces_of_text = "", "", list[str]()
    for piece in pieces:
        pieces_of_text.append(piece)
        text += piece
        if end := restart(text):
            yield Segment(control, tuple(pieces_of_text))
            control, text, pieces_of_text = end, end, []
    if pieces_of_text:
        yield Segment(control, tuple(pieces_of_text))


def encode_segment(segment: Segment, encode: Encode, decode: Decode) -> list[list[int]]:
    """The ids of each piece of a segment."""
    encoded: list[list[int]] = []
    prefix, prefix_ids = segment.control, encode(segment.control) if segment.control else []
    for piece in segment.pieces:
        ids = encode_behind(prefix, prefix_ids, piece, encode, decode)
        encoded.append(ids)
        prefix, prefix_ids = prefix + piece, prefix_ids + ids
    return encoded


def encode_behind(prefix: str, prefix_ids: Sequence[int], piece: str, encode: Encode, decode: Decode) -> list[int]:
    """The ids of a piece behind a text with these ids."""
    if not piece:
        return []
    whole = encode(prefix + piece)
    if whole[: len(prefix_ids)] == list(prefix_ids):
        return whole[len(prefix_ids) :]
    text, candidates = decode(whole), [encode(piece), *encode_alternatives(piece, encode)]
    return next((ids for ids in candidates if decode([*prefix_ids, *ids]) == text), candidates[0])


def encode_alternatives(piece: str, encode: Encode) -> Iterator[list[int]]:
    """A piece's ids behind each context that no token joins to it, then alone."""
    for context in CONTEXTS:
        before, whole = encode(context), encode(context + piece)
        if before and whole[: len(before)] == before:
            yield whole[len(before) :]
    yield encode(piece)


def encode_continuation(piece: str, encode: Encode) -> list[int]:
    """The ids of a text that goes on from another, which is not known: behind the first context that no token joins to
    it."""
    return next(encode_alternatives(piece, encode))
