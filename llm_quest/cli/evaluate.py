"""`quest eval MODEL`: what a run measures on its held-out data, bits per byte on a text, accuracy on problems, or
lm-eval tasks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from llm_quest.cli.chat import load_text_model
from llm_quest.contracts import LogFn
from llm_quest.data.corpus import load_corpus
from llm_quest.errors import MissingError
from llm_quest.eval.perplexity import PerplexityReport, evaluate_documents
from llm_quest.eval.problems import ProblemAccuracy, ProblemEvalOptions, evaluate_task, load_eval_problems
from llm_quest.recipes.held_out import HeldOutReport, evaluate_run


def evaluate_held_out(name_or_path: str, *, device: str, dtype: str, threads: int, log: LogFn) -> HeldOutReport:
    """What a run measures on the data that it held out, in the run's own precision, threads and device where the
    options say nothing."""
    given = {"device": device, "precision": dtype, "threads": threads or "auto"}
    return evaluate_run(name_or_path, [f"{key}={value}" for key, value in given.items() if value != "auto"], log=log)


def evaluate_text(
    name_or_path: str, source: str, *, max_tokens: int | None, device: str, dtype: str, log: LogFn
) -> PerplexityReport:
    """Bits per byte on a source."""
    corpus = load_corpus(source)
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    return evaluate_documents(model, tokenizer, corpus.documents, source=corpus.name, max_tokens=max_tokens, log=log)


def evaluate_problem_task(
    name_or_path: str, options: ProblemEvalOptions, *, device: str, dtype: str, log: LogFn
) -> ProblemAccuracy:
    """Greedy accuracy, mean@k and pass@k on a task."""
    problems = load_eval_problems(options)  # a mistake in its name is reported before the model is loaded
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    samples = f" and {options.num_samples} samples" if options.num_samples else ""
    log(f"{options.task}: {len(problems):,} problems, greedy{samples}")
    return evaluate_task(model, tokenizer, problems, options)


def evaluate_with_lm_eval(
    name_or_path: str, tasks: Sequence[str], *, limit: int | None, seed: int, device: str, dtype: str, log: LogFn
) -> Any:
    """The tasks of EleutherAI's harness. MissingError without its package."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingError("lm_eval is not installed: pip install 'llm-quest[harness]'")
    from llm_quest.eval.lm_eval_harness import run_lm_eval

    return run_lm_eval(*load_text_model(name_or_path, device, dtype, log), tasks, limit=limit, seed=seed)
