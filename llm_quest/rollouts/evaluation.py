"""How often is a model right on problems that can be checked? Greedy accuracy with its interval, and from several
samples of each problem mean@k and pass@k.

Report both: reinforcement learning raises pass@1, and the model it began from often wins at large k
(arXiv:2504.13837)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_quest.data.problems import Problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.generate import complete
from llm_quest.generation.sampling import Sampling
from llm_quest.generation.until import Completion, Until
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.measures import Interval, mean_at, mean_pass_at, wilson
from llm_quest.rollouts.rewards import verdict
from llm_quest.rollouts.sample import Sample
from llm_quest.rollouts.verifiers import tally

Encode = Callable[[str], list[int]]
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Accuracy:
    """greedy: share right of problems answered greedily, with its 95 % interval. mean: mean@n over n samples at
    `temperature`; passes: pass@k by k. truncated: share of greedy answers cut by the length; tokens: their mean
    length."""

    source: str
    problems: int
    greedy: Interval
    outcomes: dict[str, int]
    truncated: float
    tokens: float
    samples: int
    temperature: float
    mean: float
    passes: dict[int, float]
    examples: tuple[tuple[str, str, str, float], ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        told = [
            f"{self.source}: {self.problems:,} problems, {self.seconds:.1f} s",
            f"greedy accuracy   {self.greedy}   "
            + ", ".join(f"{name} {number:,}" for name, number in self.outcomes.items()),
            f"greedy answers    {self.tokens:.1f} tokens on average, {self.truncated:.1%} cut by the length",
        ]
        if self.samples:
            told.append(f"mean@{self.samples}            {self.mean:.3f}   at temperature {self.temperature:g}")
            told += [f"pass@{k:<13}{share:.3f}" for k, share in self.passes.items()]
        told.append("")
        return [
            *told,
            *(f"  {mark(right)} {prompt}{text}   ({answer})" for prompt, text, answer, right in self.examples),
        ]


def evaluate_problems(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    source: str = "problems",
    samples: int = 0,
    ks: Sequence[int] = (1, 4, 16, 64),
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    encode: Encode | None = None,
) -> Accuracy:
    """samples: of each problem, for mean@k and pass@k (those of `ks` that samples suffice for); 0: greedy only.
    encode: from a problem's prompt to ids; by default the tokenizer's start and the text."""
    if not problems:
        raise UsageError("no problem to evaluate on")
    began = time.perf_counter()
    spelled = encode or (lambda text: [tokenizer.start_id, *tokenizer.encode(text, template=False)])
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "encode": spelled}
    greedy = [group[0] for group in answers(model, tokenizer, problems, Sampling(temperature=0.0), **settings)]  # type: ignore[arg-type]
    drawn = (
        answers(model, tokenizer, problems, Sampling(temperature=temperature), n=samples, **settings) if samples else []  # type: ignore[arg-type]
    )
    judged = [verdict(sample) for sample in greedy]
    groups = [[verdict(sample) for sample in group] for group in drawn]
    outcomes = tally(judged)
    scored = outcomes["right"] + outcomes["wrong"]
    if not scored:
        raise UsageError(f"none of {len(problems)} answers could be scored: look at the gold answers of {source}")
    return Accuracy(
        source=source,
        problems=len(problems),
        greedy=wilson(outcomes["right"], scored),
        outcomes=outcomes,
        truncated=sum(sample.truncated for sample in greedy) / len(greedy),
        tokens=sum(len(sample.tokens) for sample in greedy) / len(greedy),
        samples=samples,
        temperature=temperature,
        mean=mean_at(groups) if samples else math.nan,
        passes={k: mean_pass_at(k, groups) for k in ks if k <= samples},
        examples=tuple((s.problem.prompt, s.text, s.problem.answer, right) for s, right in zip(greedy[:5], judged)),  # noqa: B905
        seconds=time.perf_counter() - began,
    )


def answers(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    encode: Encode,
    max_new_tokens: int,
    n: int = 1,
    seed: int = 0,
) -> list[list[Sample]]:
    """n samples of each problem. The same seed gives the same answers, however many problems there are."""
    until = Until(max_new_tokens=max_new_tokens, eos=tokenizer.eos_ids)
    groups: list[list[Sample]] = []
    at_once = max(1, ROWS_AT_ONCE // n)
    for start in range(0, len(problems), at_once):
        some = problems[start : start + at_once]
        prompts = [encode(problem.prompt) for problem in some]
        done = complete(model, prompts, sampling, until, n=n, seed=seed)
        for number, problem in enumerate(some):
            group = done[number * n : (number + 1) * n]
            groups.append([as_sample(prompts[number], one, problem, tokenizer) for one in group])
    return groups


def as_sample(prompt: Sequence[int], done: Completion, problem: Any, tokenizer: Tokenizer) -> Sample:
    """A completion as what rewards read: its text without the token that ended it."""
    text = tokenizer.decode(done.tokens)
    return Sample(tuple(prompt), tuple(done.tokens), tuple(done.logprobs), done.finished, text, problem)


def mark(right: float) -> str:
    return "?" if math.isnan(right) else "+" if right else "-"
