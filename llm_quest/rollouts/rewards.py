"""Reward functions: each maps the samples of one prompt to a number each, NaN for a sample that cannot be scored.

`CorrectnessReward` is the verifier's outcome. `RandomReward` and `FormatReward` are controls: some models improve under
any reward (arXiv:2506.10947), so that a rising curve alone proves nothing. `SafeReward` wraps a reward function that
may fail. `compute_step_rewards` gives the last token and the reward of each step of an answer whose steps a program can
check (process supervision)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llm_quest.contracts import Reward
from llm_quest.data.problems.problem import make_rng
from llm_quest.errors import UsageError
from llm_quest.generation.detokenizer import StreamingTokenizer
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.verifiers import UNSCORABLE, is_well_formed, verify_answer, verify_steps


@dataclass(frozen=True)
class CorrectnessReward:
    """1 for a right answer, 0 for a wrong one, NaN where the verifier cannot say. An answer cut off by the length is
    wrong, whatever it looks like: 12 of 123."""

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [score_correctness(sample) for sample in group]


def score_correctness(sample: Sample) -> float:
    """Right, wrong or unscorable."""
    verdict = verify_answer(sample.problem, sample.text)
    return verdict if sample.finish_reason != "length" or math.isnan(verdict) else 0.0


@dataclass(frozen=True)
class EnvironmentReward:
    """The sum of an episode's rewards from its environment; NaN where that failed."""

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [sample.episode_reward for sample in group]


@dataclass(frozen=True)
class FormatReward:
    """1 for anything in the form of an answer: a control."""

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [
            float(sample.finish_reason != "length" and is_well_formed(sample.problem, sample.text)) for sample in group
        ]


@dataclass(frozen=True)
class RandomReward:
    """1 with probability `share`, else 0, by a generator of the seed and the sample's ids: a control that does not
    depend on whether the answer is right."""

    seed: int = 0
    share: float = 0.5

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        tosses = (
            make_rng("random reward", self.seed, number, s.prompt_ids, s.completion_ids)
            for number, s in enumerate(group)
        )
        return [float(toss.random() < self.share) for toss in tosses]


@dataclass
class SafeReward:
    """A reward that may fail: an exception inside it makes the group's rewards NaN and is counted, and the first
    message is kept. UsageError for a wrong number of values, and for values that are no numbers."""

    reward_fn: Reward
    name: str = "reward"
    num_failures: int = 0
    first_error: str = field(default="")

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        try:
            given = list(self.reward_fn(group))
        except Exception as error:  # whatever somebody else's code raises: counted and reported
            self.num_failures += 1
            self.first_error = self.first_error or f"{type(error).__name__}: {error}"
            return [UNSCORABLE] * len(group)
        if len(given) != len(group):
            raise UsageError(f"{self.name} returned {len(given)} values for a group of {len(group)}: give one each")
        try:
            values = [UNSCORABLE if value is None else float(value) for value in given]
        except (TypeError, ValueError):
            raise UsageError(f"{self.name} returned {given!r}: give numbers, NaN for what can't be scored") from None
        return [value if math.isfinite(value) else UNSCORABLE for value in values]


def compute_step_rewards(tokenizer: StreamingTokenizer, sample: Sample) -> list[tuple[int, float]]:
    """(index of the step's last token, 1 or 0). The last step ends at the end-of-text token, so that ending is
    rewarded too; an answer that the budget cut has no last step that is right."""
    ends = token_end_offsets(tokenizer, sample)
    step_rewards = []
    steps = verify_steps(sample.problem, sample.text)
    for number, (place, worth) in enumerate(steps):
        last = number == len(steps) - 1
        at = len(sample.completion_ids) - 1 if last else next(i for i, end in enumerate(ends) if end >= place)
        step_rewards.append((at, 0.0 if last and sample.truncated else worth))
    return step_rewards or [(len(sample.completion_ids) - 1, 0.0)]


def token_end_offsets(tokenizer: StreamingTokenizer, sample: Sample) -> list[int]:
    """The length of the text in characters after each token."""
    stream, length, ends = tokenizer.decode_stream(sample.prompt_ids), 0, []
    for token in sample.completion_ids:
        length += len(stream.feed(token))
        ends.append(length)
    return ends
