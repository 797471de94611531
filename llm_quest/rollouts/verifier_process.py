"""Runs a verifier that may hang in a process that can be killed: math-verify. The verifiers of `verifiers.py` are
bounded and run in the trainer's own process."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llm_quest.data.problems.problem import Problem
from llm_quest.errors import MissingError, import_extra, install_command
from llm_quest.rollouts.verifiers import UNSCORABLE
from llm_quest.rollouts.worker_process import WorkerFailure, WorkerProcess, describe_counts

if TYPE_CHECKING:
    from llm_quest.rollouts.sampler import Sample  # which has torch: three seconds to import in the verifier's process

CheckFunction = Callable[[Problem, str], float]


class VerifierProcess:
    """`VerifierProcess(check)(problem, text)`: what check returns; NaN if it raises, dies or takes longer than
    `timeout_seconds`, after which the process is killed and the next call starts another. check must be a module's
    function (it is pickled by name). warm_up: what check reads once before the first answer, so that the time of its
    imports is no answer's."""

    def __init__(
        self, verifier: CheckFunction, *, timeout_seconds: float = 2.0, warm_up: tuple[Problem, str] | None = None
    ):
        self.worker, self.timeout_seconds = WorkerProcess(answer_checks, verifier, warm_up), timeout_seconds
        self.failures: Counter[str] = Counter()

    def __call__(self, problem: Problem, text: str) -> float:
        try:
            return float(self.worker.call((problem, text), self.timeout_seconds))
        except WorkerFailure as failure:
            self.failures[f"{failure.kind} ({failure.message})"] += 1
            return UNSCORABLE

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.worker.close()

    def __enter__(self) -> VerifierProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def answer_checks(verifier: CheckFunction, warm_up: tuple[Problem, str] | None) -> Callable[[Any], float]:
    """The handler of a verifier's process."""
    if warm_up is not None:
        verifier(*warm_up)
    return lambda request: float(verifier(*request))


def verify_with_math_verify(problem: Problem, text: str) -> float:
    """Hugging Face's math-verify (`pip install llm-quest[math]`): LaTeX and expressions, verify(gold, answer) in that
    order, for it is not symmetric. Unscorable where the gold cannot be read. Run it in a process that can be killed:
    its own time-out is off, for it needs the main thread."""
    checker = import_extra("math_verify", install_command("math"))
    gold = checker.parse(f"${problem.answer}$", parsing_timeout=0)
    if not gold:
        return UNSCORABLE
    return float(checker.verify(gold, checker.parse(text, parsing_timeout=0), timeout_seconds=0))


class MathVerifyReward:
    """1 for an answer that math-verify finds equal to the problem's, 0 for another, NaN where it cannot say. An answer
    that the budget cut is wrong."""

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingError(f"math-verify is not installed: {install_command('math')}")
        example = Problem("1/2?", "0.5", "equal", "")
        self.verify = VerifierProcess(verify_with_math_verify, timeout_seconds=5.0, warm_up=(example, r"$\frac{1}{2}$"))

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [0.0 if sample.truncated else self.verify(sample.problem, sample.text) for sample in group]

    def summary(self) -> str:
        return describe_counts(self.verify.failures)
