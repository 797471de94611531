"""Processes that are forked from one which has torch and the package as it is written. In the process of the tests
shapes are checked, which torch.compile would trace too, and a new interpreter spends three seconds on imports.

There is one such parent for each worker of the tests: what it has imported is said here, for all who fork from it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        *("tests.forked", "tests.recipes.two", "tests.train.small", "torch.distributed.launcher.api", "torch._dynamo"),
        *("torch.distributed.checkpoint", "matplotlib.figure"),  # of a run's checkpoint and of its report
        *("llm_quest.recipes.pretrain", "llm_quest.recipes.vlm", "llm_quest.recipes.grpo"),
    ]
)


def run_forked(function: Callable[..., Any], *arguments: Any, timeout: float = 900) -> list[str]:
    """The lines that `function(*arguments)` prints in a process of its own, on one thread; it must end well there."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        process = processes.Process(target=call_and_print, args=(*files, function, *arguments))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        stdout, stderr = (Path(file).read_text(errors="replace") if Path(file).exists() else "" for file in files)
    assert process.exitcode == 0, f"exit code {process.exitcode}\n{stdout[-3000:]}{stderr[-3000:]}"
    return stdout.splitlines()


def call_and_print(stdout: str, stderr: str, function: Callable[..., Any], *arguments: Any) -> None:
    import torch

    for number, file in ((1, stdout), (2, stderr)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    torch.set_num_threads(1)
    skip_reports_of_tracing()
    gc.freeze()
    gc.set_threshold(1_000_000, 10, 40)  # tracing makes millions of objects that live as long as the graph
    sys.exit(function(*arguments))


def skip_reports_of_tracing() -> None:
    """For its log torch.compile times the guards of each graph (35 ms) and tokenizes each file that it traces (0.7 s a
    process), to name functions; to each operator it writes the lines of code that led there."""
    from torch._dynamo import guards, symbolic_convert

    guards.profile_guard_manager = lambda *given: 0.0
    symbolic_convert.get_funcname = lambda *given: None
    symbolic_convert.InstructionTranslatorBase.is_co_filename_from_nn_modules = lambda self: True
