"""The bench on which policies are taught: a task that a program can check, a small Llama that has learned a little from
a teacher, and then so many steps of one thing or another, all with the same number of rows.

The arms of an experiment begin at the same weights. What they are compared by is asked of problems that no step has
seen: accuracy of greedy answers, the mean of samples, and how often one of eight samples is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llm_quest.contracts import Feed, Probe, Reward
from llm_quest.data.alphabet import character_tokenizer
from llm_quest.data.batch import TokenBatch
from llm_quest.data.demonstrations import DemonstrationFeed, demonstrations
from llm_quest.data.problems import Drawn, Problem, Task, draw
from llm_quest.data.problems.problem import chance
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.layers.rotary import Rotary
from llm_quest.models import llama
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextToken
from llm_quest.objectives.policy_gradient import PolicyGradient
from llm_quest.objectives.surrogates import VARIANTS
from llm_quest.papers.lab import Trace, fresh, remembered
from llm_quest.papers.paper import Measured, Results, Verdict
from llm_quest.rollouts.advantages import ESTIMATORS
from llm_quest.rollouts.evaluation import Accuracy, evaluate_problems
from llm_quest.rollouts.rewards import Correct, FormatOnly, RandomReward, verdict
from llm_quest.rollouts.rollouts import Plan, Rollouts
from llm_quest.rollouts.scoring import Judge, Scoring
from llm_quest.rollouts.steps import step_rewards
from llm_quest.rollouts.writer import Question, Writer
from llm_quest.train.loop import train
from llm_quest.train.optimizers import adamw
from llm_quest.train.schedule import schedule
from llm_quest.train.settings import Settings

HEAD = 16


@dataclass(frozen=True, kw_only=True)
class School:
    """name: of the experiment. lessons, rate: steps of imitation before anything else, 64 rows each, and their learning
    rate. examples: demonstrations that the teacher has, shown again and again; None: never one twice. prompts, group: a
    step's questions and samples of each; every arm learns from as many rows in a step, or asks for as many. steps: of
    every arm. every: steps between two points of the curve. exam: problems asked for one; finals: at the end."""

    name: str
    task: Task
    width: int = 128
    layers: int = 3
    lessons: int
    rate: float = 1e-3
    examples: int | None = None
    prompts: int = 16
    group: int = 8
    new_tokens: int
    steps: int
    every: int = 20
    exam: int = 200
    finals: int = 1000

    @property
    def tokenizer(self) -> Tokenizer:
        return character_tokenizer(self.task.alphabet)

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def config(self) -> llama.Config:
        heads, hidden = max(1, self.width // HEAD), self.width * 8 // 3 // 8 * 8
        vocab = self.tokenizer.vocab_size
        return llama.Config(vocab, self.width, self.layers, heads, heads, HEAD, hidden, 128, Rotary(HEAD, 1e4), True)

    def writer(self) -> Writer:
        return Writer(tokenizer=self.tokenizer, eos=tuple(self.tokenizer.eos_ids), new_tokens=self.new_tokens)

    def demonstrations(self, seed: int, rows: int, *, more: bool = False) -> DemonstrationFeed:
        """What the teacher shows. more: after the lessons, on problems that come next if he has them."""
        first = seed + 1_000 if more and self.examples is None else seed
        return DemonstrationFeed(self.task, self.tokenizer, rows=rows, seed=first, examples=self.examples)

    def question(self, seed: int, index: int) -> Question:
        """Number `index` of the training split."""
        problem = Drawn(self.task)(seed, index)
        return Question((self.tokenizer.start_id, *self.tokenizer.encode(problem.prompt, template=False)), problem)


def beginner(school: School, seed: int) -> Decoder:
    """The model that all arms of this seed begin with."""
    told = (school.task, school.lessons, school.rate, *([school.examples] if school.examples else []))
    lessons = hashlib.sha256(repr(told).encode()).hexdigest()[:8]

    def taught() -> Decoder:
        model = fresh(school.config(), seed)
        run(NextToken(model), school.demonstrations(seed, 64), school.rate, steps=school.lessons, seed=seed, warmup=50)
        return model

    return remembered(f"{school.name}-{lessons}", seed, school.config(), taught)


def by_rewards(
    school: School,
    *,
    rate: float,
    reward: Callable[[int], Reward] = lambda seed: Correct(),
    variant: str = "grpo",
    minibatches: int = 1,
    process: bool = False,
) -> Callable[[int], Measured]:
    """An arm: fresh samples in every rollout, judged, learned from. reward: from the seed. minibatches: optimiser steps
    for each rollout; a step then learns from that part of the rows."""

    def arm(seed: int) -> Measured:
        model, made = beginner(school, seed), VARIANTS[variant]
        scoring = Scoring(
            judges=(Judge("reward", reward(seed)),),
            estimator=ESTIMATORS[made.advantages],
            steps=partial(step_rewards, school.tokenizer) if process else None,
        )
        draws = 4 if variant == "dapo" else 1
        plan = Plan(prompts=school.prompts, group=school.group, minibatches=minibatches, draws=draws, seed=seed)
        feed = Rollouts(model, partial(school.question, seed), school.writer(), scoring, plan)
        horizon = school.new_tokens if made.count == "horizon" else None
        objective = PolicyGradient(model, made.surrogate, count=made.count, horizon=horizon)
        return examined(school, objective, feed, rate, seed, inner=minibatches)

    return arm


def by_teacher(school: School, *, rate: float) -> Callable[[int], Measured]:
    """An arm: more of the same teacher, on problems that come next (or on his few again)."""

    def arm(seed: int) -> Measured:
        feed = school.demonstrations(seed, school.rows, more=True)
        return examined(school, NextToken(beginner(school, seed)), feed, rate, seed)

    return arm


def by_kept(school: School, *, rate: float) -> Callable[[int], Measured]:
    """An arm: rejection fine-tuning. As many samples as reinforcement learning sees, all written by the beginner; those
    that are right are imitated (Yuan et al. 2023, arXiv:2308.01825)."""

    def arm(seed: int) -> Measured:
        return examined(school, NextToken(beginner(school, seed)), KeptFeed(school, seed), rate, seed)

    return arm


@dataclass
class KeptFeed:
    """What the beginner wrote and was right."""

    school: School
    seed: int

    def __post_init__(self) -> None:
        self.author = beginner(self.school, self.seed).eval()

    def at(self, step: int) -> Sequence[TokenBatch]:
        first = step * self.school.prompts
        questions = [self.school.question(self.seed, first + place) for place in range(self.school.prompts)]
        drawn = chance("kept", self.seed, step).getrandbits(62)
        groups = self.school.writer()(self.author, questions, self.school.group, drawn)
        right = [(list(s.prompt), list(s.tokens)) for group in groups for s in group if verdict(s) == 1]
        return [demonstrations(right)] if right else []

    def bookmark(self) -> dict[str, Any]:
        return {}

    def resume(self, bookmark: dict[str, Any]) -> None:
        """There is nothing to go on from."""


@dataclass
class Exam:
    """A probe: greedy accuracy on problems that no step has seen. `finals` asks more of them, and for samples too."""

    school: School
    every: int
    name: str = "exam"
    problems: list[Problem] = field(init=False)

    def __post_init__(self) -> None:
        self.problems = [draw(self.school.task, "test", index) for index in range(self.school.finals)]

    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        return {"accuracy": self.asked(model, self.school.exam, samples=0).greedy.share}

    def asked(self, model: Decoder, problems: int, samples: int) -> Accuracy:
        return evaluate_problems(
            model, self.school.tokenizer, self.problems[:problems], samples=samples, ks=(1, 8),
            max_new_tokens=self.school.new_tokens,
        )  # fmt: skip

    def finals(self, model: Decoder) -> dict[str, float]:
        model.eval()
        greedy = self.asked(model, len(self.problems), samples=0).greedy.share
        drawn = self.asked(model, self.school.exam, samples=8)
        return {"greedy": greedy, "mean@8": drawn.mean, "pass@8": drawn.passes[8]}


def examined(school: School, objective: Any, feed: Feed, rate: float, seed: int, inner: int = 1) -> Measured:
    """The run and what came of it. inner: optimiser steps in a step of the curve."""
    exam = Exam(school, school.every * inner)
    before = exam.measure(objective.model.eval(), 0)["accuracy"]
    rows = run(objective, feed, rate, steps=school.steps * inner, seed=seed, warmup=10 * inner, probes=[exam])
    curve = [(row["step"] / inner, row["exam/accuracy"]) for row in rows if "exam/accuracy" in row]
    return Measured(exam.finals(objective.model), [(0.0, before), *curve])


def no_more(school: School) -> Callable[[int], Measured]:
    """An arm: the beginner as it is."""

    def arm(seed: int) -> Measured:
        return Measured(Exam(school, 0).finals(beginner(school, seed)))

    return arm


def arms(school: School, rate: float) -> dict[str, Callable[[int], Measured]]:
    """Rewards against the controls without which a curve proves nothing; all at one learning rate, with as many steps
    and rows."""
    return {
        "the beginner": no_more(school),
        "GRPO": by_rewards(school, rate=rate),
        "more of the teacher": by_teacher(school, rate=rate),
        "rejection fine-tuning": by_kept(school, rate=rate),
        "random reward": by_rewards(school, rate=rate, reward=RandomReward),
        "format-only reward": by_rewards(school, rate=rate, reward=lambda seed: FormatOnly()),
    }


def ahead(results: Results, number: str, points: float) -> Verdict:
    """Is GRPO that far ahead of more teaching, with zero below the whole interval, and ahead of rewards that know
    nothing? Refuted if it is behind."""
    gain = results.difference("GRPO", "more of the teacher", number)
    more = {arm: results.difference("GRPO", arm, number) for arm in results.arms if arm not in ("GRPO", "the beginner")}
    words = f"GRPO's {number} differs from that of " + ", ".join(f"{arm} by {more[arm]}" for arm in more)
    if gain.negative or not (more["random reward"].positive and more["format-only reward"].positive):
        return Verdict("refuted" if gain.negative else "no effect seen", words)
    return Verdict("confirmed" if gain.positive and gain.mean >= points else "no effect seen", words)


def run(
    objective: Any, feed: Feed, rate: float, *, steps: int, seed: int, warmup: int = 0, probes: Sequence[Probe] = ()
) -> list[Mapping[str, Any]]:
    """AdamW without decay of weights, the rate falling to a tenth; the rows of metrics."""
    trace = Trace()
    optimizer = adamw(objective.model, lr=rate, weight_decay=0.0)
    falling = schedule(steps, warmup=min(warmup, steps), shape="cosine", floor=0.1)
    settings = Settings(steps=steps, log_every=max(1, steps // 20), seed=seed)
    train(objective, feed, optimizer, falling, settings, probes=probes, display=trace)
    return trace.metrics
