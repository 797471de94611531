"""Prefix matching, the reward of reinforcement pre-training (RPT, arXiv:2506.08007).

      true tokens  " caf"  C3  A9  " is"        boundaries 4 5 6 9 (bytes)
      right        " caf"  " café"  " café is"
      wrong        "caf"   " ca"    " café i"  ""

An answer is right if it is how the true text goes on, to the byte, and ends where a true token ends: one token or
several. Nothing is stripped (a space is a prediction like any other), and saying nothing is wrong: 0 is no boundary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from llm_quest.rollouts.sampler import Sample

ANSWER_PATTERN = re.compile(r"<think>(.*?)</think><answer>(.*)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Continuation:
    """What is asked: the text so far, and the bytes of each true token that follows (`data.token_bytes`)."""

    prompt: str
    target_tokens: tuple[bytes, ...]


def token_boundaries(target_tokens: Sequence[bytes]) -> set[int]:
    """Where a true token ends, in bytes from the first one on. What follows a control token is another document."""
    return set(accumulate(len(token) for token in takewhile(bool, target_tokens)))


def prefix_match(predicted: bytes, target_tokens: Sequence[bytes]) -> float:
    """1 or 0."""
    text = b"".join(takewhile(bool, target_tokens))
    return float(text.startswith(predicted) and len(predicted) in token_boundaries(target_tokens))


def extract_answer(text: str) -> str | None:
    """What stands in the one <answer>, to the letter; None without thinking first, with anything around, or with tags
    inside."""
    found = ANSWER_PATTERN.fullmatch(text)
    if found is None or any(tag in part for part in found.groups() for tag in ("<think>", "<answer>", "</")):
        return None
    return found[2]


@dataclass(frozen=True)
class PrefixMatchReward:
    """The reward of a group whose problem is a `Continuation`. Cut off by the length is wrong, as everywhere. opening:
    what of the answer's form the prompt has begun already, and nothing else of the prompt is ever read."""

    opening: str = ""

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [self.score(sample) for sample in group]

    def score(self, sample: Sample) -> float:
        answer = self.extract_prediction(sample)
        return 0.0 if answer is None else prefix_match(answer.encode(), sample.problem.target_tokens)

    def extract_prediction(self, sample: Sample) -> str | None:
        """The prediction; None where there is none to be read."""
        return None if sample.truncated else extract_answer(self.opening + sample.text)


@dataclass(frozen=True)
class AnswerFormatReward(PrefixMatchReward):
    """1 for any prediction in the right form: a control."""

    def score(self, sample: Sample) -> float:
        return float(self.extract_prediction(sample) is not None)
