"""A verifier that may hang, in a process that can be killed. For heavy checkers (math-verify); our own are bounded and
run in place.

Commonly got wrong: `signal.alarm` works in the main thread alone, and in others every answer silently becomes wrong; a
thread that hangs is never reclaimed; a time-out is not a wrong answer."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from llm_quest.data.problems.problem import Problem
from llm_quest.errors import MissingError
from llm_quest.rollouts.verifiers import UNSCORABLE

Check = Callable[[Problem, str], float]
STARTING = 60.0


class Worker:
    """`Worker(check)(problem, text)`: what check returns; NaN if it raises, dies or takes longer than `seconds`, after
    which the process is killed and the next call starts another. check must be a module's function (it is pickled by
    name)."""

    def __init__(self, check: Check, *, seconds: float = 2.0):
        self.check, self.seconds = check, seconds
        self.failures = 0
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, problem: Problem, text: str) -> float:
        pipe = self._ready()
        try:
            pipe.send((problem, text))
            if pipe.poll(self.seconds):
                answer = pipe.recv()
                if answer is not None:
                    return float(answer)
                self.failures += 1
                return UNSCORABLE
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        self.close()
        self.failures += 1
        return UNSCORABLE

    def _ready(self) -> Connection:
        if self._process is None or not self._process.is_alive():
            self.close()
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=serve, args=(theirs, self.check), daemon=True)
            self._process.start()
            theirs.close()
            if not self._pipe.poll(STARTING) or self._pipe.recv() != "ready":
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

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(pipe: Connection, check: Check) -> None:
    """The process's life: answer until the pipe closes."""
    pipe.send("ready")
    while True:
        try:
            problem, text = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(float(check(problem, text)))
        except Exception:  # the caller counts it: None is "could not score"
            pipe.send(None)


def math_verify(problem: Problem, text: str) -> float:
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
