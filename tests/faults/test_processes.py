"""Several processes of one run: told to stop they stop together, whoever is told, and no child outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llm_quest.cli.output import run_with_exit_code
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from tests.recipes.two import join, processes
from tests.train.small import Rule, digest, go, objective

STEPS, SLOW_STEP = 6, 3


class SlowOnce(Rule):
    """On one process the rows of a step come after a minute, but for a run that finds the file SLOW."""

    slow_rank, marker = 0, Path()

    def batches(self, step: int) -> Sequence[Any]:
        if step == SLOW_STEP and self.share.rank == self.slow_rank and not self.marker.exists():
            self.marker.touch()
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.01)
        return super().batches(step)


def child(rank: int, port: int, folder: str, slow_rank: int) -> None:
    """One of two processes of a run, as the engine runs it."""
    join(rank, port)
    os.dup2(os.open(f"{folder}.stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    from llm_quest.train import failures, signals

    signals.PATIENCE_SECONDS, failures.WATCH_SECONDS = 0.3, 0.1

    def command() -> int:
        parallel = DistributedContext.from_environment("cpu", "ddp")
        with parallel.share_failures(), RunDir(folder, is_main_process=parallel.is_main_process) as run:
            made = parallel.parallelize(objective(dropout=0.1))
            feed = SlowOnce(micro=2, share=parallel.data_shard)
            feed.slow_rank, feed.marker = slow_rank, Path(f"{folder}.slow")
            code = go(STEPS, run, made=made, feed=feed, parallel=parallel, save_every=0).exit_code  # type: ignore[arg-type]
        parallel.destroy_process_group()
        return code

    sys.exit(run_with_exit_code(command))


def start(folder: Path, slow_rank: int) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [processes.Process(target=child, args=(rank, port, str(folder), slow_rank)) for rank in range(2)]
    for process in both:
        process.start()
    return both


def end(both: Sequence[BaseProcess], seconds: float = 60.0) -> list[int | None]:
    limit = time.monotonic() + seconds
    for process in both:
        process.join(max(0.0, limit - time.monotonic()))
    codes = [process.exitcode for process in both]
    for process in both:
        process.kill()
    return codes


def wait_for(file: Path) -> None:
    limit = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < limit, f"{file.name} never came"
        time.sleep(0.01)


def state_of(folder: Path, step: int) -> tuple[str, Any]:
    checkpoint = folder / f"checkpoints/step-{step:08d}"
    return digest(checkpoint), json.loads((checkpoint / "state.json").read_text())["rng"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("two") / "straight"
    Path(f"{folder}.slow").touch()
    assert end(start(folder, 0)) == [0, 0]
    return state_of(folder, STEPS)


@pytest.mark.parametrize(("slow", "told"), [(0, (0, 1)), (1, (0,))])
def test_a_long_step_of_two_processes_is_given_up_together(
    slow: int, told: Sequence[int], straight: tuple[str, Any], tmp_path: Path
) -> None:
    """One makes a batch for a minute, the other waits for it in a collective. The resumed run has the straight bits."""
    folder = tmp_path / "run"
    both = start(folder, slow)
    wait_for(Path(f"{folder}.slow"))
    begin = time.monotonic()
    for rank in told:
        os.kill(both[rank].pid or 0, signal.SIGTERM)
    assert end(both, 20.0) == [143, 143], [Path(f"{folder}.stderr-{rank}").read_text()[-2000:] for rank in range(2)]
    assert time.monotonic() - begin < 15
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{SLOW_STEP:08d}"]
    assert end(start(folder, slow)) == [0, 0]
    assert state_of(folder, STEPS) == straight
