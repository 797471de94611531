"""`quest eval MODEL_FILE --task RECORD_NAME`: how often a model is right on problems that a program can check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_quest.cli.chat import load_model_and_tokenizer
from llm_quest.data.problems import SPLIT_NAMES, Problem, SplitName, draw_problem, parse_task
from llm_quest.errors import UsageError
from llm_quest.eval.problems import ProblemAccuracy, evaluate_problems
from llm_quest.hub.gsm8k import is_gsm8k, load_gsm8k

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class ProblemEvalOptions:
    """task: a name, with options after a colon (countdown:count=4,largest=9), gsm8k (the hub's), or a file of it.
    part: of the problems; number: how many; samples: of each, for pass@k."""

    task: str
    split: str = "test"
    num_problems: int = 200
    num_samples: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0


def evaluate_on_problems(
    name_or_path: str, exam: ProblemEvalOptions, *, device: str, dtype: str, log: LogFn
) -> ProblemAccuracy:
    """The model's answers, judged."""
    problems = load_eval_problems(exam)
    model, tokenizer = load_model_and_tokenizer(name_or_path, device, dtype, log)
    log(
        f"{exam.task}: {len(problems):,} problems, greedy"
        + (f" and {exam.num_samples} samples" if exam.num_samples else "")
    )
    return evaluate_problems(
        model,
        tokenizer,
        problems,
        source=exam.task,
        num_samples=exam.num_samples,
        temperature=exam.temperature,
        max_new_tokens=exam.max_new_tokens,
        seed=exam.seed,
    )


def load_eval_problems(exam: ProblemEvalOptions) -> Sequence[Problem]:
    """GSM8K's first problems, or a task's."""
    if exam.split not in SPLIT_NAMES:
        raise UsageError(f"no part is called {exam.split!r}; known: {', '.join(SPLIT_NAMES)}")
    if is_gsm8k(exam.task):
        return load_gsm8k(exam.task, exam.split)[: exam.num_problems]
    part: SplitName = exam.split  # type: ignore[assignment]
    made = parse_task(exam.task)
    return [draw_problem(made, part, index, exam.seed) for index in range(exam.num_problems)]
