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

from collections.abc import Callable, Iterator, Sequence

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]

CONTEXTS = ("\n", ".", ":", ")", "a", "1")
"""Texts tried in turn as what precedes a piece; the first that no token joins to it is taken."""


def encode_pieces(
    pieces: Sequence[str], encode: Encode, decode: Decode, restart: Callable[[str], str] = lambda text: ""
) -> list[list[int]]:
    """The ids of consecutive pieces of one text, a list for each.

    encode, decode: of whole texts, without anything added around them. restart: the control token with which a text
    ends, or "". Nothing before a control token changes the ids after it, so with `restart` every piece is read a
    bounded number of times."""
    found: list[list[int]] = []
    prefix, prefix_ids = "", list[int]()
    for piece in pieces:
        ids = encode_behind(prefix, prefix_ids, piece, encode, decode)
        found.append(ids)
        prefix, prefix_ids = prefix + piece, prefix_ids + ids
        if control := restart(prefix):
            prefix, prefix_ids = control, encode(control)
    return found


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
