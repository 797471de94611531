"""A position of a text as a prompt, and the answer to it as a reward (RPT, arXiv:2506.08007).

      document   <s> a 3 b * 2 :  6 </s>        place 7
      prompt     <s> [prefix] a 3 b * 2 : [suffix]              suffix: "<think>", or another opening of reasoning

The text keeps its ids and is never encoded again. A place whose continuation cannot be written as text is left out: the
end of a document, and a token that begins in the middle of a character. The reward is prefix matching:

      true tokens  " caf"  C3  A9  " is"        boundaries 4 5 6 9 (bytes)
      right        " caf"  " café"  " café is"
      wrong        "caf"   " ca"    " café i"  ""

An answer is right if it continues the true text, to the byte, and ends at the end of a true token: one token or
several. Nothing is stripped (a space is a prediction like any other), and an empty answer is wrong: 0 is no
boundary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import numpy as np
from pydantic import Field

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import token_bytes
from llm_quest.errors import UsageError
from llm_quest.recipes.config_schema import PositiveInt
from llm_quest.recipes.schema import StrictModel
from llm_quest.rollouts.sampler import PolicyPrompt, Sample

THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER_PATTERN = re.compile(r"<think>(.*?)</think><answer>(.*)</answer>", re.DOTALL)
DOCUMENT_END, INSIDE_CHARACTER = "the document ends there", "it begins inside a character"


class PromptConfig(StrictModel):
    """The text before and after a document's part in a prompt; control tokens may be written out (a chat template's).
    The answer must have the form <think>...</think><answer>...</answer>, of which `suffix` may be the beginning."""

    prefix: str = Field(default="", description="text before the document's part")
    suffix: str = Field(default=THINK_OPEN, description="text after the document's part, where reasoning begins")
    max_target_tokens: PositiveInt = Field(default=8, description="true tokens that an answer may predict")

    @property
    def opening_tag(self) -> str:
        return THINK_OPEN if self.suffix.endswith(THINK_OPEN) else ""


@dataclass(frozen=True)
class Position:
    """A token to predict: tokens[place] of a document, from tokens[:place]."""

    document: int
    place: int
    entropy: float


@dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of next-token reasoning. prefix_ids, suffix_ids: ids around the text so far.
    max_target_tokens: true tokens that an answer may predict. token_bytes_by_id: the bytes of every id that occurs.
    start_token_id: the token every document begins with."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    max_target_tokens: int
    token_bytes_by_id: Mapping[int, bytes]
    start_token_id: int

    def build_prompt(self, ids: Sequence[int], place: int) -> PolicyPrompt:
        """Build the prompt of a place in a document, whose first token is its start token."""
        prompt = (self.start_token_id, *self.prefix_ids, *map(int, ids[1:place]), *self.suffix_ids)
        return PolicyPrompt(prompt, Continuation("", self.true_continuation(ids, place)))

    def true_continuation(self, ids: Sequence[int], place: int) -> tuple[bytes, ...]:
        return tuple(self.token_bytes_by_id[int(each)] for each in ids[place : place + self.max_target_tokens])

    def skip_reason(self, ids: Sequence[int], place: int) -> str:
        """The reason why no text is a right answer at this place; empty if some is."""
        truth = self.true_continuation(ids, place)
        if not truth or not truth[0]:
            return DOCUMENT_END
        text = b"".join(truth)
        return "" if any(is_utf8(text[:end]) for end in token_boundaries(truth)) else INSIDE_CHARACTER

    def filter_positions(
        self, documents: Sequence[Sequence[int]], positions: Sequence[Position]
    ) -> tuple[list[Position], Counter[str]]:
        """The positions that can be answered, and how many of the others there are, by reason."""
        reasons = [(position, self.skip_reason(documents[position.document], position.place)) for position in positions]
        return [one for one, why in reasons if not why], Counter(why for _, why in reasons if why)

    @property
    def num_instruction_tokens(self) -> int:
        """Tokens of a prompt that are not the document's."""
        return len(self.prefix_ids) + len(self.suffix_ids)


def make_prompt_builder(
    tokenizer: Tokenizer, documents: Sequence[Sequence[int]], *, prefix: str, suffix: str, max_target_tokens: int
) -> PromptBuilder:
    """Make a `PromptBuilder`. prefix, suffix: as text; control tokens may be written out in them (a chat
    template's)."""
    parts = [np.asarray(ids, np.int64) for ids in documents]
    known = np.unique(np.concatenate(parts)).tolist() if parts else []
    prefix_ids = tokenizer.encode(prefix, allow_special_tokens=True, add_special_tokens=False)
    suffix_ids = tokenizer.encode_continuation(suffix, allow_special_tokens=True)
    pieces = dict(zip(known, token_bytes(tokenizer, known), strict=True))
    return PromptBuilder(tuple(prefix_ids), tuple(suffix_ids), max_target_tokens, pieces, tokenizer.start_token_id)


def max_document_length(
    max_context: int, max_new_tokens: int, prompt_builder: PromptBuilder, length: int | None
) -> int:
    """The maximum length of a document, its start token included, that leaves room for a completion at every place;
    `length` if that is given. UsageError if there is no room."""
    room = max_context - max_new_tokens - prompt_builder.num_instruction_tokens
    if room < 2 or (length is not None and length > room):
        wanted = "any text" if length is None or room < 2 else f"texts of {length} tokens"
        raise UsageError(
            f"the model's context of {max_context} has no room for {wanted}: {max_new_tokens} new tokens and "
            f"{prompt_builder.num_instruction_tokens} of the instruction leave "
            f"{max(room, 0)}; lower max_new_tokens or data.max_document_tokens"
        )
    return room if length is None else length


def split_documents(documents: Sequence[Sequence[int]], max_length: int, start: int) -> list[list[int]]:
    """Split documents into parts of at most `max_length` tokens, each after a start token."""
    pieces: list[list[int]] = []
    for ids in documents:
        body = [int(each) for each in ids[1:]]
        pieces += [[start, *body[at : at + max_length - 1]] for at in range(0, len(body), max_length - 1)]
    return pieces


def is_utf8(text: bytes) -> bool:
    """Whether these bytes are valid UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True)
class Continuation:
    """The problem of a place: the text so far, and the bytes of each true token that follows."""

    prompt: str
    target_tokens: tuple[bytes, ...]


def token_boundaries(target_tokens: Sequence[bytes]) -> set[int]:
    """The ends of true tokens, in bytes from the first one. Tokens after a control token belong to another document."""
    return set(accumulate(len(token) for token in takewhile(bool, target_tokens)))


def prefix_match(predicted: bytes, target_tokens: Sequence[bytes]) -> float:
    """1.0 if the prediction is a prefix of the true text that ends with a token, else 0.0."""
    text = b"".join(takewhile(bool, target_tokens))
    return float(text.startswith(predicted) and len(predicted) in token_boundaries(target_tokens))


def extract_tagged_answer(text: str) -> str | None:
    """The exact text of the one <answer>; None without a <think> before it, with text around them, or with tags
    inside."""
    match = ANSWER_PATTERN.fullmatch(text)
    if match is None or any(tag in part for part in match.groups() for tag in ("<think>", "<answer>", "</")):
        return None
    return match[2]


@dataclass(frozen=True)
class PrefixMatchReward:
    """The reward of a group whose problem is a `Continuation`. A truncated completion is wrong. opening: the part of
    the answer's form that the prompt ends with."""

    opening: str = ""

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [self.score(sample) for sample in group]

    def score(self, sample: Sample) -> float:
        answer = self.extract_prediction(sample)
        return 0.0 if answer is None else prefix_match(answer.encode(), sample.problem.target_tokens)

    def extract_prediction(self, sample: Sample) -> str | None:
        """The prediction of a sample; None if it has none in the right form."""
        return None if sample.truncated else extract_tagged_answer(self.opening + sample.text)


@dataclass(frozen=True)
class AnswerFormatReward(PrefixMatchReward):
    """A control: 1 for any prediction in the right form."""

    def score(self, sample: Sample) -> float:
        return float(self.extract_prediction(sample) is not None)
