"""Held-out reward and accuracy of a policy: every reward that it is trained with, on prompts that it never saw.

Commonly got wrong: the reward of training prompts alone is watched, which rises by memory too; or accuracy alone, while
another reward is what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.data.problems import Problem
from llm_quest.eval.evaluators import save_samples
from llm_quest.eval.problems import ProblemAccuracy, Selection, measure_accuracy
from llm_quest.eval.selection import best_of_at_k
from llm_quest.eval.self_refinement import Complete, RefineRound, SelfRefinement
from llm_quest.generation.sampling import SamplingParams
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.advantages import total_rewards
from llm_quest.rollouts.rewards import score_correctness
from llm_quest.rollouts.sampler import Sample

SampleGroups = list[list[Sample]]
DrawAnswers = Callable[[Decoder, Sequence[Problem], SamplingParams, int, int], SampleGroups]
"""(model, problems, sampling parameters, samples of each, seed) -> a group of samples of each problem."""
ScoreGroups = Callable[[SampleGroups], Tensor]
"""Groups of samples (P,G) -> every reward of each (R,P,G); NaN where one does not apply."""
MAX_SAVED_ANSWERS = 5


@dataclass(frozen=True)
class PolicyScores:
    """Held-out rewards of a policy. rewards: the mean of each, by name, over the answers that it applies to. total:
    their weighted sum. interval: its half width at 95 %. accuracy: None where no problem has an answer. best_rewarded:
    best@n, the accuracy of the sample with the largest reward. totals: of each of the
    answers. refined: the accuracy after each round of self-refinement."""

    rewards: Mapping[str, float]
    total: float
    interval: float
    mean_tokens: float
    truncated: float
    accuracy: ProblemAccuracy | None
    best_rewarded: float | None
    answers: Sequence[Sample] = field(repr=False)
    totals: Sequence[float] = field(repr=False)
    refined: Sequence[RefineRound] = ()

    def line(self) -> str:
        """The scores in one line."""
        share = "" if self.accuracy is None else f"accuracy {self.accuracy.greedy_accuracy}, "
        each = ", ".join(f"{name} {mean:.3f}" for name, mean in self.rewards.items())
        refined = "".join(f", {one.line(number)}" for number, one in enumerate(self.refined, start=1))
        several = f" ({each})" if len(self.rewards) > 1 else ""
        return f"{share}reward {self.total:.3f} ± {self.interval:.3f}{several}{refined}"

    def metrics(self) -> dict[str, float]:
        metrics = {"reward": self.total, "length": self.mean_tokens, "clipped_ratio": self.truncated}
        if len(self.rewards) > 1:
            metrics |= {f"rewards/{name}": mean for name, mean in self.rewards.items()}
        if self.accuracy is not None:
            n, passes = self.accuracy.num_samples, self.accuracy.pass_at_k.items()
            metrics |= {"accuracy": self.accuracy.greedy_accuracy.share} | {f"pass@{k}": share for k, share in passes}
            metrics |= {f"mean@{n}": self.accuracy.mean_at_k} if n else {}
            metrics |= {f"maj@{k}": share for k, share in self.accuracy.majority_at_k.items() if k == n}
            metrics |= {} if self.best_rewarded is None else {f"best@{n}": self.best_rewarded}
        metrics |= {f"refine@{number}": one.accuracy.share for number, one in enumerate(self.refined, start=1)}
        return metrics


@dataclass(frozen=True)
class Refinement:
    """Self-refinement of the greedy answers that can be checked. complete: a model -> what completes prompts."""

    loop: SelfRefinement
    complete: Callable[[Decoder], Complete]


@dataclass
class PolicyEvaluator:
    """Answers the held-out problems greedily, and scores the answers with every reward; with num_samples and answers to
    check by, mean@n, pass@k and maj@n too, and best@n, the best rewarded sample, where correctness is not the whole
    reward. rewards: (name, weight) of each. The first answers go to
    samples/step-00000020.json. whole_model: inside it a sharded model is whole. newest: what the last evaluation of
    this process found. first: what was found before the first step, until its answers are kept. refinement: None for
    none."""

    problems: Sequence[Problem]
    draw: DrawAnswers
    score: ScoreGroups
    rewards: Sequence[tuple[str, float]]
    interval: int
    num_samples: int = 0
    temperature: float = 1.0
    seed: int = 0
    samples_dir: Path | None = None
    whole_model: Callable[[], AbstractContextManager[Any]] = nullcontext
    name: str = "eval"
    newest: PolicyScores | None = None
    first: PolicyScores | None = None
    refinement: Refinement | None = None

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        if self.first is not None:
            self.save_answers(self.first, 0)
            self.first = None
        self.newest = scores = self.scores(model)
        self.save_answers(scores, step)
        return scores.metrics()

    def evaluate_first(self, model: Decoder) -> PolicyScores:
        """The scores before the first step, when there is no run folder yet: the answers are kept with the next."""
        self.first = self.scores(model)
        return self.first

    def save_answers(self, scores: PolicyScores, step: int) -> None:
        """Keep the first answers, each with what it earned, for the report."""
        if self.samples_dir is not None:
            earned = zip(scores.answers, scores.totals, strict=True)
            rows = [answer_record(one, reward) for one, reward in earned]
            save_samples(self.samples_dir, step, rows[:MAX_SAVED_ANSWERS])

    def scores(self, model: Decoder) -> PolicyScores:
        """Every reward, and the accuracy where there are answers."""
        with self.whole_model():
            greedy = self.draw(model, self.problems, SamplingParams(temperature=0.0), 1, self.seed)
            checked = [place for place, problem in enumerate(self.problems) if problem.answer]
            drawn = self.draw_samples(model, checked)
            refined = self.refine(model, [greedy[place][0] for place in checked])
        answers = [group[0] for group in greedy]
        rewards = self.score(greedy)[:, :, 0]
        totals = total_rewards(rewards, [weight for _, weight in self.rewards]).tolist()
        means = rewards.nanmean(dim=1).tolist()
        return PolicyScores(
            {name: mean for (name, _), mean in zip(self.rewards, means, strict=True)},
            *mean_with_interval(totals),
            sum(len(answer.completion_ids) for answer in answers) / len(answers),
            sum(answer.truncated for answer in answers) / len(answers),
            measure_accuracy(
                [answers[place] for place in checked],
                drawn,
                temperature=self.temperature,
                selection=Selection(self.num_samples),
            )
            if checked
            else None,
            self.best_rewarded(drawn),
            answers,
            totals,
            refined,
        )

    def refine(self, model: Decoder, drafts: Sequence[Sample]) -> list[RefineRound]:
        if self.refinement is None or not drafts:
            return []
        return self.refinement.loop.refine(drafts, self.refinement.complete(model))

    def best_rewarded(self, drawn: SampleGroups) -> float | None:
        """best@n: how often the sample with the largest reward, of those that have one, is right. None where
        correctness is the whole reward: it would be pass@n."""
        weights = [weight for _, weight in self.rewards]
        if not drawn or not any(weight for name, weight in self.rewards if name != "correct"):
            return None
        rewards = self.score(drawn)
        groups = [
            list(zip(total_rewards(rewards[:, place], weights).tolist(), map(score_correctness, group), strict=True))
            for place, group in enumerate(drawn)
        ]
        known = [[pair for pair in pairs if not any(map(math.isnan, pair))] for pairs in groups]
        estimates = [best_of_at_k(len(pairs), pairs) for pairs in known if pairs]
        return sum(estimates) / len(estimates) if estimates else math.nan

    def draw_samples(self, model: Decoder, checked: Sequence[int]) -> SampleGroups:
        if not self.num_samples or not checked:
            return []
        sampling = SamplingParams(temperature=self.temperature)
        return self.draw(model, [self.problems[place] for place in checked], sampling, self.num_samples, self.seed)


def mean_with_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the known values and the half width of its 95 % interval; NaN for none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    variance = math.fsum((value - mean) ** 2 for value in known) / max(1, len(known) - 1)
    return mean, 1.96 * math.sqrt(variance / len(known))


def answer_record(sample: Sample, reward: float) -> dict[str, Any]:
    """A sample for the report, with its reward (null where none applied) and the wanted answer where it is known."""
    wanted = {"wanted": sample.problem.answer} if sample.problem.answer else {}
    earned = None if math.isnan(reward) else round(reward, 4)
    return {"prompt": sample.problem.prompt, "text": sample.text, "reward": earned, **wanted}
