"""A verifier that may hang, in a process that can be killed. For heavy checkers (math-verify); our own are bounded and
run in place.

Commonly got wrong: `signal.alarm` works in the main thread alone, and in others every answer silently becomes wrong; a
thread that hangs is never reclaimed; a time-out is not a wrong answer."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from llm_quest.data.problems.problem import Problem
from llm_quest.errors import MissingError
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.verifiers import UNSCORABLE

CheckFunction = Callable[[Problem, str], float]
START_TIMEOUT_SECONDS = 60.0


class VerifierProcess:
    """`VerifierProcess(check)(problem, text)`: what check returns; NaN if it raises, dies or takes longer than
    `seconds`, after which the process is killed and the next call starts another. check must be a module's function (it
    is pickled by name)."""

    def __init__(self, verifier: CheckFunction, *, timeout_seconds: float = 2.0):
        self.verifier, self.timeout_seconds = verifier, timeout_seconds
        self.num_failures = 0
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, problem: Problem, text: str) -> float:
        pipe = self._start_process()
        try:
            pipe.send((problem, text))
            if pipe.poll(self.timeout_seconds):
                answer = pipe.recv()
                if answer is not None:
                    return float(answer)
                self.num_failures += 1
                return UNSCORABLE
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        self.close()
        self.num_failures += 1
        return UNSCORABLE

    def _start_process(self) -> Connection:
        if self._process is None or not self._process.is_alive():
            self.close()
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=serve_verifier, args=(theirs, self.verifier), daemon=True)
            self._process.start()
            theirs.close()
            if not self._pipe.poll(START_TIMEOUT_SECONDS) or self._pipe.recv() != "ready":
                raise RuntimeError("the verifier's process did not start")
        assert self._pipe is not None
        return self._pipe

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> VerifierProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve_verifier(pipe: Connection, verifier: CheckFunction) -> None:
    """The process's life: answer until the pipe closes."""
    pipe.send("ready")
    while True:
        try:
            problem, text = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(float(verifier(problem, text)))
        except Exception:  # the caller counts it: None is "could not score"
            pipe.send(None)


def verify_with_math_verify(problem: Problem, text: str) -> float:
    """Hugging Face's math-verify (`pip install llm-quest[math]`): LaTeX and expressions, verify(gold, answer) in that
    order, for it is not symmetric. Unscorable where the gold cannot be read. Run it in a Worker, which can be killed:
    its own time-out is off, for it needs the main thread."""
    try:
        from math_verify import parse
        from math_verify import verify as equal
    except ImportError:
        raise MissingError("math-verify is not installed: pip install 'llm-quest[math]'") from None
    gold = parse(f"${problem.answer}$", parsing_timeout=0)
    if not gold:
        return UNSCORABLE
    return float(equal(gold, parse(text, parsing_timeout=0), timeout_seconds=0))


class MathVerifyReward:
    """1 for an answer that math-verify finds equal to the problem's, 0 for another, NaN where it cannot say. An answer
    that the budget cut is wrong."""

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingError("math-verify is not installed: pip install 'llm-quest[math]'")
        self.verify = VerifierProcess(verify_with_math_verify)

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [0.0 if sample.truncated else self.verify(sample.problem, sample.text) for sample in group]
