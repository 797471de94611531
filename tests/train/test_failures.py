"""One failure ends every process of a run with its exit code, and its message is shown once; waiting has no limit."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm_quest.cli.output import run_with_exit_code
from llm_quest.errors import DataError, ResourceError
from llm_quest.train.parallel import DistributedContext
from tests.recipes.two import both_exit_codes, together


def wait_in_a_collective(parallel: DistributedContext) -> None:
    parallel.all_reduce_(torch.ones(1))


def main_process_fails(parallel: DistributedContext) -> None:
    if parallel.is_main_process:
        raise DataError("line 3 of rows.jsonl is no JSON")
    wait_in_a_collective(parallel)


def main_process_fails_while_preparing(parallel: DistributedContext) -> None:
    if parallel.is_main_process:
        raise DataError("line 3 of rows.jsonl is no JSON")
    parallel.broadcast(None)


def other_process_fails(parallel: DistributedContext) -> None:
    if not parallel.is_main_process:
        raise ResourceError("out of memory in step 4")
    wait_in_a_collective(parallel)


def all_fail_alike(parallel: DistributedContext) -> None:
    raise DataError("no row is left to learn from")


def other_process_is_killed(parallel: DistributedContext) -> None:
    if not parallel.is_main_process:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_in_a_collective(parallel)


def schedules_differ(parallel: DistributedContext) -> None:
    parallel.require_equal_schedules(2 + parallel.rank, step=4)


CASES: dict[Callable[[DistributedContext], None], tuple[list[int], str]] = {
    main_process_fails: ([3, 3], "line 3 of rows.jsonl is no JSON"),
    main_process_fails_while_preparing: ([3, 3], "line 3 of rows.jsonl is no JSON"),
    other_process_fails: ([5, 5], "out of memory in step 4"),
    all_fail_alike: ([3, 3], "no row is left to learn from"),
    other_process_is_killed: ([5, -signal.SIGKILL], "another process of the run ended without a message"),
    schedules_differ: ([1, 1], "different numbers of micro-batches to step 5: [2, 3], by rank"),
}


def child(case: Callable[[DistributedContext], None], folder: str) -> None:
    """The end of a command: its exit code, and its message in a file."""
    os.chdir(folder)
    os.dup2(os.open(f"stderr-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)

    def command() -> int:
        parallel = DistributedContext.from_environment("cpu", "fsdp")
        with parallel.share_failures():
            case(parallel)
        return 0

    sys.exit(run_with_exit_code(command))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_failure_ends_all_with_its_code_and_one_message(case: Any, tmp_path: Path):
    codes, message = CASES[case]
    assert both_exit_codes(child, case, str(tmp_path)) == codes
    shown = "".join(file.read_text() for file in tmp_path.glob("stderr-*"))
    assert shown.count("quest: ") == 1, shown
    assert message in shown
    assert (tmp_path / "crash.txt").exists() == (codes[0] == 1)


def slow_preparation(limit: float) -> None:
    """What the case `leader_prepares_long` did: collectives end after `limit` seconds, and preparing takes longer."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=limit))
    parallel = DistributedContext.from_environment("cpu")
    with parallel.share_failures():
        if parallel.is_main_process:
            time.sleep(2 * limit)
        assert parallel.broadcast(parallel.rank) == 0
    dist.destroy_process_group()


def test_the_main_process_may_prepare_for_longer_than_a_collective_waits():
    together(slow_preparation, 1.0)


def missing_source(folder: str) -> None:
    """`quest train` as torchrun starts it."""
    os.chdir(folder)
    os.dup2(os.open(f"stderr-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
    from llm_quest.cli.main import main

    sys.argv = ["quest", "train", "tiny", "data.source=none.jsonl", "--out", "run"]
    sys.exit(main())


def test_a_missing_file_is_told_once_and_leaves_nothing(tmp_path: Path):
    assert both_exit_codes(missing_source, str(tmp_path)) == [3, 3]
    shown = "".join(file.read_text() for file in tmp_path.glob("stderr-*"))
    assert [line for line in shown.splitlines() if line.startswith("quest:")] == ["quest: none.jsonl does not exist"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stderr-0", "stderr-1"]
