"""`quest eval MODEL --task NAME`: how often a model is right on problems that a program can check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_quest.cli.talk import opened
from llm_quest.data.problems import PARTS, Part, Problem, draw, spelled
from llm_quest.errors import UsageError
from llm_quest.hub.gsm8k import gsm8k, is_gsm8k
from llm_quest.rollouts.evaluation import Accuracy, evaluate_problems

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exam:
    """task: a name, with options after a colon (countdown:count=4,largest=9), gsm8k (the hub's), or a file of it.
    part: of the problems; number: how many; samples: of each, for pass@k."""

    task: str
    part: str = "test"
    number: int = 200
    samples: int = 0
    temperature: float = 1.0
    tokens: int = 64
    seed: int = 0


def examine(where: str, exam: Exam, *, device: str, dtype: str, say: Say) -> Accuracy:
    """The model's answers, judged."""
    problems = chosen(exam)
    model, tokenizer = opened(where, device, dtype, say)
    say(f"{exam.task}: {len(problems):,} problems, greedy" + (f" and {exam.samples} samples" if exam.samples else ""))
    return evaluate_problems(
        model,
        tokenizer,
        problems,
        source=exam.task,
        samples=exam.samples,
        temperature=exam.temperature,
        max_new_tokens=exam.tokens,
        seed=exam.seed,
    )


def chosen(exam: Exam) -> Sequence[Problem]:
    """GSM8K's first problems, or a task's."""
    if exam.part not in PARTS:
        raise UsageError(f"no part is called {exam.part!r}; known: {', '.join(PARTS)}")
    if is_gsm8k(exam.task):
        return gsm8k(exam.task, exam.part)[: exam.number]
    part: Part = exam.part  # type: ignore[assignment]
    made = spelled(exam.task)
    return [draw(made, part, index, exam.seed) for index in range(exam.number)]
