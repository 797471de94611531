"""A position of a text as a question: what stands before it, and the demand to think first (RPT, arXiv:2506.08007).

      document   <s> a 3 b * 2 :  6 </s>        place 7
      prompt     <s> [before] a 3 b * 2 : [after]                after: "<think>", or whatever makes a model think

The text comes as the ids it has, never encoded anew. A place whose continuation cannot be written as text is not asked
for: the end of a document, and a token that begins in the middle of a character."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm_quest.data.token_bytes import token_bytes
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.rollouts.positions import Position
from llm_quest.rollouts.prefix_match import Continuation, boundaries
from llm_quest.rollouts.writer import Question

END, INSIDE = "the document ends there", "it begins inside a character"


@dataclass(frozen=True)
class Asking:
    """before, after: ids around the text so far. ahead: true tokens that an answer may foretell. pieces: the bytes of
    every id that occurs. start: the token every document begins with."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    ahead: int
    pieces: Mapping[int, bytes]
    start: int

    def question(self, ids: Sequence[int], place: int) -> Question:
        """From a document (its start token first) and a place in it."""
        prompt = (self.start, *self.before, *map(int, ids[1:place]), *self.after)
        return Question(prompt, Continuation("", self.truth(ids, place)))

    def truth(self, ids: Sequence[int], place: int) -> tuple[bytes, ...]:
        return tuple(self.pieces[int(each)] for each in ids[place : place + self.ahead])

    def obstacle(self, ids: Sequence[int], place: int) -> str:
        """Why nothing that can be written is right here; empty if something is."""
        truth = self.truth(ids, place)
        if not truth or not truth[0]:
            return END
        text = b"".join(truth)
        return "" if any(whole(text[:end]) for end in boundaries(truth)) else INSIDE

    def askable(
        self, documents: Sequence[Sequence[int]], found: Sequence[Position]
    ) -> tuple[list[Position], Counter[str]]:
        """Those that can be answered, and how many of the others there are, by reason."""
        told = [(one, self.obstacle(documents[one.document], one.place)) for one in found]
        return [one for one, why in told if not why], Counter(why for _, why in told if why)

    @property
    def around(self) -> int:
        """Tokens of a prompt that are not the document's."""
        return len(self.before) + len(self.after)


def asking_of(
    tokenizer: Tokenizer, documents: Sequence[Sequence[int]], *, before: str, after: str, ahead: int
) -> Asking:
    """before, after: as text; control tokens may be written out in them (a chat template's)."""
    parts = [np.asarray(ids, np.int64) for ids in documents]
    known = np.unique(np.concatenate(parts)).tolist() if parts else []
    spelled = [tuple(tokenizer.encode(text, special=True, template=False)) for text in (before, after)]
    pieces = dict(zip(known, token_bytes(tokenizer, known), strict=True))
    return Asking(spelled[0], spelled[1], ahead, pieces, tokenizer.start_id)


def room_for(context: int, new_tokens: int, asking: Asking, length: int | None) -> int:
    """How long a document may be, its start token included, so that every place in it leaves room to think; `length`
    where that was asked for. UsageError where there is none."""
    room = context - new_tokens - asking.around
    if room < 2 or (length is not None and length > room):
        wanted = "any text" if length is None or room < 2 else f"texts of {length} tokens"
        raise UsageError(
            f"the model's context of {context} has no room for {wanted}: {new_tokens} new tokens and {asking.around} "
            f"of the instruction leave {max(room, 0)}; lower rollout.new_tokens or data.length"
        )
    return room if length is None else length


def cut(documents: Sequence[Sequence[int]], length: int, start: int) -> list[list[int]]:
    """Documents no longer than `length`; what is longer becomes several, each behind the start token."""
    found: list[list[int]] = []
    for ids in documents:
        body = [int(each) for each in ids[1:]]
        found += [[start, *body[at : at + length - 1]] for at in range(0, len(body), length - 1)]
    return found


def whole(text: bytes) -> bool:
    """Are these bytes text?"""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
