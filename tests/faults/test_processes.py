"""Several processes of one run: told to stop they stop together, whoever is told, and no child outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_quest.cli.output import run_with_exit_code
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.sharded_checkpoint import consolidate_checkpoint
from tests.faults.kills import drop_times
from tests.faults.torchrun_kills import find_orphans, kill_one, message_of
from tests.forked import processes
from tests.recipes.two import join, start_agent
from tests.train.small import Rule, digest, go, objective

STEPS, SLOW_STEP = 6, 3


@dataclass
class Slow:
    """On one process a step takes a minute, but for a run that finds the file SLOW. place: where in the step; of the
    passes it is the second, in which gradients are sent."""

    place: str
    rank: int
    marker: Path
    step: int = 0
    passes: int = 0

    def wait_at(self, place: str) -> None:
        if self.step == SLOW_STEP and place == self.place and not self.marker.exists():
            self.marker.touch()
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.01)

    def feed(self, parallel: DistributedContext) -> Rule:
        """The rows of this process."""
        rule = SlowRule(micro=2, share=parallel.data_shard)
        rule.slow = self
        return rule

    def watch_passes(self, block: nn.Module) -> None:
        """Wait in the midst of a pass forward, or of one back."""

        def forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.passes += 1
            if self.passes % 2 == 0:
                self.wait_at("forward")
                output.register_hook(lambda grad: self.wait_at("backward"))

        block.register_forward_hook(forward)


@dataclass
class SlowEvaluation:
    """A number that takes both processes; one of them may take a minute for it."""

    slow: Slow
    name: str = "eval"
    interval: int = 2

    def evaluate(self, model: Any, step: int) -> dict[str, float]:
        self.slow.wait_at("evaluation")
        weight = model.embed.weight.detach()
        total = (weight.full_tensor() if isinstance(weight, DTensor) else weight).sum()
        dist.all_reduce(total)
        return {"weight": float(total)}


class SlowRule(Rule):
    slow: Slow

    def batches(self, step: int) -> Sequence[Any]:
        self.slow.step = step if self.share.rank == self.slow.rank else 0
        self.slow.wait_at("batch")
        return super().batches(step)


def train(folder: str, parallel: DistributedContext, place: str, slow_rank: int) -> int:
    """A run, as the engine runs it; its exit code."""
    with RunDir(folder, is_main_process=parallel.is_main_process) as run:
        made = objective(dropout=0.1)
        parallel.parallelize(made, list(made.model.blocks))
        slow = Slow(place, slow_rank, Path(f"{folder}.slow"))
        slow.watch_passes(made.model.blocks[1])
        seen: dict[str, Any] = {"feed": slow.feed(parallel), "probes": [SlowEvaluation(slow)]}
        return go(STEPS, run, made=made, parallel=parallel, save_steps=0, **seen).exit_code


def child(rank: int, port: int, *options: Any) -> None:
    join(rank, port)
    run_child(*options)


def run_child(folder: str, strategy: str, place: str, slow_rank: int) -> None:
    """One of two processes of a run; where none is slow, of another one from the beginning too."""
    os.dup2(os.open(f"{folder}.stderr-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    from llm_quest.train import failures, signals

    signals.PATIENCE_SECONDS, failures.WATCH_SECONDS = 0.3, 0.1
    failures.LEADER_SECONDS = failures.STORE_SECONDS = 2.0

    def command() -> int:
        parallel = DistributedContext.from_environment("cpu", strategy)
        with parallel.share_failures():
            code = train(folder, parallel, place, slow_rank)
            if not place:
                train(f"{folder}-straight", parallel, place, slow_rank)
        parallel.destroy_process_group()
        return code

    sys.exit(run_with_exit_code(command))


def start(folder: Path, strategy: str, place: str = "", slow_rank: int = 0) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        processes.Process(target=child, args=(rank, port, str(folder), strategy, place, slow_rank)) for rank in range(2)
    ]
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
    limit = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < limit, f"{file.name} never came"
        time.sleep(0.01)


def state_of(folder: Path, step: int) -> tuple[str, Any, list[Any]]:
    """A hash of weights and optimizer, the random states, and the rows of metrics."""
    checkpoint = folder / f"checkpoints/step-{step:08d}"
    consolidate_checkpoint(checkpoint)
    rows = [drop_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/weight" in row] == [2, 4, 6]
    return digest(checkpoint), json.loads((checkpoint / "state.json").read_text())["rng"], rows


@pytest.mark.parametrize(
    ("strategy", "place", "slow", "told"),
    [
        ("ddp", "backward", 1, (0,)),
        ("ddp", "evaluation", 1, (0,)),
        ("fsdp", "batch", 0, (0, 1)),
        ("fsdp", "forward", 1, (0,)),
    ],
)
def test_a_long_step_of_two_processes_is_given_up_together(
    strategy: str, place: str, slow: int, told: Sequence[int], tmp_path: Path
) -> None:
    """One takes a minute for a batch, a pass or an evaluation, the other waits for it in a collective. The resumed run
    has the straight bits and rows."""
    folder = tmp_path / "run"
    both = start(folder, strategy, place, slow)
    wait_for(Path(f"{folder}.slow"))
    begin = time.monotonic()
    for rank in told:
        os.kill(both[rank].pid or 0, signal.SIGTERM)
    assert end(both, 20.0) == [143, 143], [Path(f"{folder}.stderr-{rank}").read_text()[-2000:] for rank in range(2)]
    assert time.monotonic() - begin < 15, "on a busy machine; a second on an idle one"
    done = SLOW_STEP + (place == "evaluation")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert end(start(folder, strategy)) == [0, 0]
    assert state_of(folder, STEPS) == state_of(Path(f"{folder}-straight"), STEPS)


def test_a_killed_worker_of_torchrun_leaves_nothing_behind_and_is_told(tmp_path: Path) -> None:
    """One message says why the others end, and the resumed run has the straight bits. (`python -m tests.faults kills
    --torchrun`: the same of recipes, at random moments; there torchrun's agent is killed too.)"""
    folder, pids = tmp_path / "run", tmp_path / "pids"
    agent = start_agent(pids, run_child, str(folder), "ddp", "batch", 0)
    wait_for(Path(f"{folder}.slow"))
    assert find_orphans(kill_one(agent.pid or 0, "rank 1", pids), seconds=40) == []
    told = [message_of(Path(f"{folder}.stderr-{rank}")) for rank in range(2)]
    assert [len(lines) for lines in told] == [1, 0], told
    assert "was killed" in told[0][0]
    agent.join(40)
    assert agent.exitcode
    assert end(start(folder, "ddp")) == [0, 0]
    assert state_of(folder, STEPS) == state_of(Path(f"{folder}-straight"), STEPS)
