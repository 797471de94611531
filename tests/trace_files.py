"""Which of the package's files a reader has to open to follow a command: those in which a function is called.

    python -m tests.trace_files

prints them, in the order of their first call, for two stretches: `quest train tiny` from its start to the first
optimizer step, and the first rollout of `quest train grpo`. What runs while a module is imported is not counted, nor
are other threads.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llm_quest"
LOOP = "llm_quest/train/loop.py"
GRPO = [
    "warmup.max_steps=2",
    "warmup.target_accuracy=1.0",
    "prompts_per_rollout=2",
    "num_generations=2",
    "max_steps=1",
    "eval_problems=2",
]


class FileTrace:
    """While it is open, notes the package's files in which a function is called, each with the first of them."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.seen: set[CodeType] = set()
        self.importing = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_name == "<module>":
            self.importing += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and not self.importing and code not in self.seen:
            self.seen.add(code)
            file = Path(code.co_filename)
            if code.co_flags & inspect.CO_OPTIMIZED and file.is_relative_to(PACKAGE):  # not a class body
                self.files.setdefault(str(file.relative_to(ROOT)), code.co_qualname)

    def open(self) -> None:
        sys.setprofile(self)

    def close(self) -> None:
        sys.setprofile(None)


@contextlib.contextmanager
def empty_folder() -> Iterator[io.StringIO]:
    """A new folder to run commands in, whose cache is empty too, and what they print."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["LLM_QUEST_CACHE"] = str(Path(folder) / "cache")
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield printed


def quest(*arguments: str) -> int:
    """The command in this process; its exit code."""
    from llm_quest.cli.main import main

    sys.argv = ["quest", *arguments]
    try:
        with mock.patch("os._exit", sys.exit):  # how an interrupted command ends
            main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def files_to_first_step() -> dict[str, str]:
    """File -> its first function, of `quest train tiny` until the optimizer is asked for a step; the run is then
    interrupted, as Ctrl-C does. Steps before the training loop is entered are trials by which the run is planned."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    trace = FileTrace()

    def stop(*_: Any) -> None:
        if LOOP in trace.files and sys.getprofile() is trace:
            trace.close()
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_pre_hook(stop)
    try:
        with empty_folder() as printed:
            trace.open()
            code = quest("train", "tiny", "--quiet", "--out", "run", "--device", "cpu")
    finally:
        trace.close()
        hook.remove()
    assert code == 130, f"interrupted at its first step, the run ended with {code}: {printed.getvalue()}"
    return trace.files


def files_of_a_rollout() -> dict[str, str]:
    """The same of the first rollout of `quest train grpo`: questions, samples, rewards, advantages, rows."""
    from llm_quest.rollouts.rollouts import RolloutLoader

    trace, rollout = FileTrace(), RolloutLoader.batches

    def trace_rollout(rollouts: Any, step: int) -> Any:
        if trace.files:
            return rollout(rollouts, step)
        trace.open()
        try:
            return rollout(rollouts, step)
        finally:
            trace.close()

    RolloutLoader.batches = trace_rollout  # type: ignore[method-assign]
    try:
        with empty_folder():
            code = quest("train", "grpo", *GRPO, "--quiet", "--out", "run", "--device", "cpu")
    finally:
        RolloutLoader.batches = rollout  # type: ignore[method-assign]
    assert code == 0, f"quest train grpo ended with {code}"
    return trace.files


STRETCHES: dict[str, Callable[[], dict[str, str]]] = {
    "quest train tiny, to the first optimizer step": files_to_first_step,
    "one GRPO rollout": files_of_a_rollout,
}


def main() -> None:
    for name, trace in STRETCHES.items():
        files = trace()
        print(f"{name}: {len(files)} files")
        for number, (file, function) in enumerate(files.items(), 1):
            print(f"{number:>5}  {file}  {function}")


if __name__ == "__main__":
    main()
