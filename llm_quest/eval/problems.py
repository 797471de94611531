"""Accuracy on problems that a program can check: greedy accuracy with its confidence interval, and mean@k and pass@k
from several samples of each problem.

Report both: reinforcement learning raises pass@1, and the model it started from is often ahead at large k
(arXiv:2504.13837)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_quest.contracts import Reward
from llm_quest.data.problems import SPLIT_NAMES, Problem, SplitName, draw_problem, parse_task
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.eval.selection import best_of_at_k, majority_at_k, selection_sizes
from llm_quest.eval.self_refinement import RefineRound, SelfRefinement
from llm_quest.eval.statistics import ConfidenceInterval, mean_at_k, mean_pass_at_k, wilson_confidence_interval
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import StoppingCriteria, end_token_ids
from llm_quest.hub.gsm8k import is_gsm8k, load_gsm8k
from llm_quest.models.decoder import Decoder
from llm_quest.progress import track
from llm_quest.rollouts.rewards import score_correctness
from llm_quest.rollouts.sampler import PolicyPrompt, Sample, completion_to_sample
from llm_quest.rollouts.verifiers import canonical_answer, count_outcomes

EncodePrompt = Callable[[Problem], list[int]]
PROBLEM_EVAL_BATCH_SIZE = 256


@dataclass(frozen=True)
class ProblemAccuracy:
    """The result of `evaluate_problems`. greedy_accuracy: share of greedy answers that are right, with its 95 %
    interval. mean_at_k: over all samples, drawn at `temperature`. pass_at_k: by k. truncated: share of greedy answers
    cut at the length limit. mean_tokens: mean length of the greedy answers."""

    source: str
    num_problems: int
    greedy_accuracy: ConfidenceInterval
    outcomes: dict[str, int]
    truncated: float
    mean_tokens: float
    num_samples: int
    temperature: float
    mean_at_k: float
    pass_at_k: dict[int, float]
    majority_at_k: dict[int, float]
    best_of_at_k: dict[int, float]
    refined: tuple[RefineRound, ...]
    examples: tuple[tuple[str, str, str, float], ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        lines = [
            f"{self.source}: {self.num_problems:,} problems, {self.seconds:.1f} s",
            f"greedy accuracy   {self.greedy_accuracy}   "
            + ", ".join(f"{name} {number:,}" for name, number in self.outcomes.items()),
            f"greedy answers    {self.mean_tokens:.1f} tokens on average, {self.truncated:.1%} cut by the length",
        ]
        if self.num_samples:
            lines.append(
                f"mean@{self.num_samples}            {self.mean_at_k:.3f}   at temperature {self.temperature:g}"
            )
            lines += [f"pass@{k:<13}{share:.3f}" for k, share in self.pass_at_k.items()]
            lines += [f"maj@{k:<14}{share:.3f}   the majority's answer" for k, share in self.majority_at_k.items()]
            lines += [
                f"best-of-{k:<10}{share:.3f}   the reward model's choice" for k, share in self.best_of_at_k.items()
            ]
        lines += [one.line(number) for number, one in enumerate(self.refined, start=1)]
        lines.append("")
        return [
            *lines,
            *(
                f"  {correctness_mark(right)} {prompt}{text}   ({answer})"
                for prompt, text, answer, right in self.examples
            ),
        ]


def sample_answer(sample: Sample) -> Hashable | None:
    """The answer of a sample, for which it votes; None for a sample that was cut off by the length, or in another
    form."""
    return None if sample.truncated else canonical_answer(sample.problem, sample.text)


@dataclass(frozen=True)
class Selection:
    """How one of several samples is chosen. vote, best_of: among up to how many, 0: not at all. reward: what best-of
    goes by. Samples that cannot be scored are left out, and so are problems with too few others."""

    vote: int = 0
    best_of: int = 0
    reward: Reward | None = None

    def majorities(self, drawn: Sequence[Sequence[Sample]], scores: Sequence[Sequence[float]]) -> dict[int, float]:
        """k -> accuracy of the majority's answer among k samples."""
        votes = [
            [(sample_answer(sample), score) for sample, score in zip(*group, strict=True) if not math.isnan(score)]
            for group in zip(drawn, scores, strict=True)
        ]
        return {k: mean_over_problems(majority_at_k, k, votes) for k in selection_sizes(self.vote)}

    def best_of_rewards(self, drawn: Sequence[Sequence[Sample]], scores: Sequence[Sequence[float]]) -> dict[int, float]:
        """k -> accuracy of the best rewarded among k samples."""
        if self.reward is None:
            return {}
        scored = []
        for group, right in track(list(zip(drawn, scores, strict=True)), "scoring samples, problem"):
            rewards = self.reward(group)
            scored.append(
                [(value, worth) for value, worth in zip(rewards, right, strict=True) if not math.isnan(worth)]
            )
        return {k: mean_over_problems(best_of_at_k, k, scored) for k in selection_sizes(self.best_of)}


@dataclass(frozen=True)
class ProblemEvalOptions:
    """Which problems to evaluate on, and how. task: a name, with options after a colon
    (countdown:count=4,largest=9), gsm8k (from the hub), or a file in GSM8K's format. num_samples: samples of each
    problem for pass@k; 0: greedy answers only. vote, best_of: up to how many samples are chosen from."""

    task: str
    split: str = "test"
    num_problems: int = 200
    num_samples: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    vote: int = 0
    best_of: int = 0


def evaluate_task(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    options: ProblemEvalOptions,
    *,
    encode_prompt: EncodePrompt | None = None,
    reward: Reward | None = None,
    refinement: SelfRefinement | None = None,
) -> ProblemAccuracy:
    """`evaluate_problems` on the problems that `load_eval_problems` returns for these options."""
    return evaluate_problems(
        model,
        tokenizer,
        problems,
        source=options.task,
        num_samples=max(options.num_samples, options.vote, options.best_of),
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        encode_prompt=encode_prompt,
        selection=Selection(options.vote, options.best_of, reward),
        refinement=refinement,
    )


def load_eval_problems(options: ProblemEvalOptions) -> Sequence[Problem]:
    """The first problems of GSM8K, or of a task. UsageError for a name that is not known."""
    if options.split not in SPLIT_NAMES:
        raise UsageError(f"no split is called {options.split!r}; known: {', '.join(SPLIT_NAMES)}")
    if is_gsm8k(options.task):
        return load_gsm8k(options.task, options.split)[: options.num_problems]
    part: SplitName = options.split  # type: ignore[assignment]
    task = parse_task(options.task)
    return [draw_problem(task, part, index, options.seed) for index in range(options.num_problems)]


def evaluate_problems(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    source: str = "problems",
    num_samples: int = 0,
    ks: Sequence[int] = (1, 4, 16, 64),
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    encode_prompt: EncodePrompt | None = None,
    selection: Selection = Selection(),
    refinement: SelfRefinement | None = None,
) -> ProblemAccuracy:
    """Answer each problem greedily and, with num_samples, by sampling. pass@k is reported for those of `ks` that do not
    exceed num_samples. encode_prompt: from a problem to the ids of its prompt; by default the start token and its
    text."""
    if not problems:
        raise UsageError("no problem to evaluate on")
    began = time.perf_counter()
    encoder = encode_prompt or (
        lambda problem: [tokenizer.start_token_id, *tokenizer.encode(problem.prompt, add_special_tokens=False)]
    )
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}

    def answer_greedily(some: Sequence[Problem], prompts: Sequence[list[int]]) -> list[Sample]:
        draw = SamplingParams(temperature=0.0)
        return [group[0] for group in sample_problems(model, tokenizer, some, prompts, draw, **settings)]

    prompts = [encoder(problem) for problem in problems]
    greedy = answer_greedily(problems, prompts)
    sampling_params = SamplingParams(temperature=temperature)
    drawn = (
        sample_problems(model, tokenizer, problems, prompts, sampling_params, n=num_samples, **settings)
        if num_samples
        else []
    )
    refined = refinement.refine(greedy, answer_greedily) if refinement else ()
    return measure_accuracy(
        greedy, drawn, source=source, ks=ks, temperature=temperature, seconds=time.perf_counter() - began,
        selection=selection, refined=refined,
    )  # fmt: skip


def measure_accuracy(
    greedy: Sequence[Sample],
    drawn: Sequence[Sequence[Sample]] = (),
    *,
    source: str = "problems",
    ks: Sequence[int] = (1, 4, 16, 64),
    temperature: float = 1.0,
    seconds: float = math.nan,
    selection: Selection = Selection(),
    refined: Sequence[RefineRound] = (),
) -> ProblemAccuracy:
    """The accuracy of answers that were drawn: a greedy one of each problem, and as many samples of each."""
    num_samples = len(drawn[0]) if drawn else 0
    scores = [score_correctness(sample) for sample in greedy]
    groups = [[score_correctness(sample) for sample in group] for group in drawn]
    outcomes = count_outcomes(scores)
    scored = outcomes["right"] + outcomes["wrong"]
    if not scored:
        raise UsageError(f"none of {len(greedy)} answers could be scored: check the gold answers of {source}")
    return ProblemAccuracy(
        source=source,
        num_problems=len(greedy),
        greedy_accuracy=wilson_confidence_interval(outcomes["right"], scored),
        outcomes=outcomes,
        truncated=sum(sample.truncated for sample in greedy) / len(greedy),
        mean_tokens=sum(len(sample.completion_ids) for sample in greedy) / len(greedy),
        num_samples=num_samples,
        temperature=temperature,
        mean_at_k=mean_at_k(groups) if num_samples else math.nan,
        pass_at_k={k: mean_pass_at_k(k, groups) for k in ks if k <= num_samples},
        majority_at_k=selection.majorities(drawn, groups),
        best_of_at_k=selection.best_of_rewards(drawn, groups),
        refined=tuple(refined),
        examples=tuple((s.problem.prompt, s.text, s.problem.answer, right) for s, right in zip(greedy[:5], scores)),  # noqa: B905
        seconds=seconds,
    )


def mean_over_problems(estimate: Callable[[int, Any], float], k: int, groups: Sequence[Sequence[Any]]) -> float:
    """The mean of an estimate over the problems that have k samples."""
    estimates = [estimate(k, group) for group in groups if len(group) >= k]
    return sum(estimates) / len(estimates) if estimates else math.nan


def sample_answers(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    sampling_params: SamplingParams,
    *,
    encode_prompt: EncodePrompt,
    max_new_tokens: int,
    n: int = 1,
    seed: int = 0,
) -> list[list[Sample]]:
    """Draw n samples of each problem. A problem's samples depend on the seed and not on the other problems."""
    prompts = [encode_prompt(problem) for problem in problems]
    return sample_problems(
        model, tokenizer, problems, prompts, sampling_params, max_new_tokens=max_new_tokens, n=n, seed=seed
    )


def sample_problems(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    sampling_params: SamplingParams,
    *,
    max_new_tokens: int,
    n: int = 1,
    seed: int = 0,
) -> list[list[Sample]]:
    """Draw n completions of each prompt, as samples of its problem."""
    ends = end_token_ids(model, tokenizer)
    stopping_criteria = StoppingCriteria(max_new_tokens=max_new_tokens, eos_token_ids=ends)
    groups: list[list[Sample]] = []
    prompts_per_batch = max(1, PROBLEM_EVAL_BATCH_SIZE // n)
    for start in track(range(0, len(problems), prompts_per_batch), "answering problems, batch"):
        some, read = problems[start : start + prompts_per_batch], prompts[start : start + prompts_per_batch]
        done = generate_completions(model, read, sampling_params, stopping_criteria, n=n, seed=seed)
        for number, problem in enumerate(some):
            prompt = PolicyPrompt(tuple(read[number]), problem)
            group = done[number * n : (number + 1) * n]
            groups.append([completion_to_sample(prompt, one, tokenizer, ends) for one in group])
    return groups


def correctness_mark(right: float) -> str:
    return "?" if math.isnan(right) else "+" if right else "-"
