"""A training run whose disk fails at one of its calls ends with a message, or goes on; resumed on a disk that is well,
it ends with the bits of the straight run."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from llm_quest.train.run_dir import RunDir
from tests.faults.failing_files import failing_files
from tests.faults.writers import FileFault, message_fault
from tests.train.small import digest, go

STEPS = 7


def train_small(folder: Path) -> None:
    """The small training, saved every second step in the training's own thread, so that calls have an order."""
    with RunDir(folder / "run", config="seed: 0\n") as run:
        go(STEPS, run, save_steps=2, save_total_limit=2, async_save=False)


def run_bits(folder: Path) -> tuple[str, list[Any]]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return digest(folder / f"run/checkpoints/step-{STEPS:08d}"), [json.loads(line)["loss"] for line in lines]


@cache
def straight_bits() -> tuple[str, list[Any]]:
    with tempfile.TemporaryDirectory() as name:
        train_small(Path(name))
        return run_bits(Path(name))


@cache
def count_training_calls() -> int:
    """How many calls of a run may fail."""
    with tempfile.TemporaryDirectory() as name, failing_files(Path(name), "EROFS", 10**9) as state:
        train_small(Path(name))
    return state.calls


def check_training(kind: str, calls: Iterable[int]) -> list[FileFault]:
    """The faults of runs whose n-th call fails, for these n until none fails."""
    faults = []
    for number in calls:
        with tempfile.TemporaryDirectory() as name:
            failed, what = fail_training(Path(name), kind, number)
        if not failed:
            break
        faults += [FileFault("training", kind, number, what)] if what else []
    return faults


def fail_training(folder: Path, kind: str, number: int) -> tuple[bool, str]:
    """Whether a call failed, and what was wrong afterwards."""
    if kind == "kill":
        failed, what = kill_training(folder, number), ""
    else:
        with failing_files(folder, kind, number) as state:
            what = train_with_message(folder)
        failed = bool(state.failures)
    try:
        train_small(folder)
    except Exception as error:
        return failed, what or f"the resumed run raises {type(error).__name__}: {error}"
    return failed, what or ("" if run_bits(folder) == straight_bits() else "the resumed run has other bits")


def train_with_message(folder: Path) -> str:
    try:
        train_small(folder)
    except Exception as error:
        return message_fault(error)
    return ""


def kill_training(folder: Path, number: int) -> bool:
    """Train in a process that is killed at its n-th call."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.faults.training"])
    process = processes.Process(target=train_until_killed, args=(str(folder), number))
    process.start()
    process.join(60)
    return process.exitcode == -9


def train_until_killed(folder: str, number: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    with failing_files(Path(folder), "kill", number):
        train_small(Path(folder))
