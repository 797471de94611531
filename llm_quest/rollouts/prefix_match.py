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

from llm_quest.rollouts.sample import Sample

ANSWERED = re.compile(r"<think>(.*?)</think><answer>(.*)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Continuation:
    """What is asked: the text so far, and the bytes of each true token that follows (`data.token_bytes`)."""

    prompt: str
    truth: tuple[bytes, ...]


def boundaries(truth: Sequence[bytes]) -> set[int]:
    """Where a true token ends, in bytes from the first one on. What follows a control token is another document."""
    return set(accumulate(len(token) for token in takewhile(bool, truth)))


def prefix_match(predicted: bytes, truth: Sequence[bytes]) -> float:
    """1 or 0."""
    text = b"".join(takewhile(bool, truth))
    return float(text.startswith(predicted) and len(predicted) in boundaries(truth))


def answer_of(text: str) -> str | None:
    """What stands in the one <answer>, to the letter; None without thinking first, with anything around, or with tags
    inside."""
    found = ANSWERED.fullmatch(text)
    if found is None or any(tag in part for part in found.groups() for tag in ("<think>", "<answer>", "</")):
        return None
    return found[2]


@dataclass(frozen=True)
class PrefixMatch:
    """The reward of a group whose problem is a `Continuation`. Cut off by the length is wrong, as everywhere. opening:
    what of the answer's form the prompt has begun already, and nothing else of the prompt is ever read."""

    opening: str = ""

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [self.of(sample) for sample in group]

    def of(self, sample: Sample) -> float:
        answer = self.said(sample)
        return 0.0 if answer is None else prefix_match(answer.encode(), sample.problem.truth)

    def said(self, sample: Sample) -> str | None:
        """The prediction; None where there is none to be read."""
        return None if sample.truncated else answer_of(self.opening + sample.text)


@dataclass(frozen=True)
class Answered(PrefixMatch):
    """1 for any prediction in the right form: a control."""

    def of(self, sample: Sample) -> float:
        return float(self.said(sample) is not None)
