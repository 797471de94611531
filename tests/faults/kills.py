"""Kill a training with SIGKILL, resume it until it is done, and compare it with the straight run, bit by bit.

`python -m tests.faults kills --recipe grpo --count 20` (`--processes 2`: two that train together, of which one is
killed and the other has to end by itself). Weights, optimizer, random states, progress and every number of
metrics.jsonl but the measured times have to be equal.

The killed process runs the recipe; it is forked from a warm one, so that a run takes seconds. Moments: a random time;
a random call that writes a file (most of them inside the writing of a checkpoint); a random token of a rollout; and
twice in a row, the second time while it resumes."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llm_quest.cli.output import run_with_exit_code
from llm_quest.train.checkpoint import list_checkpoints
from tests.faults.failing_files import failing_files
from tests.recipes.every_recipe import prepare, run_tiny

SETTINGS: dict[str, Sequence[str]] = {
    name: (f"max_steps={steps}", "save_steps=2", "save_total_limit=2", *more)
    for name, steps, more in (
        ("pretrain", 8, ()),
        ("sft", 10, ()),
        ("dpo", 8, ()),
        ("reward", 8, ()),
        ("grpo", 6, ("max_new_tokens=12",)),
        ("rpt", 4, ()),
    )
}
"""What is trained, of tests/recipes/every_recipe.py, for longer than there."""
ROLLOUTS = ("grpo", "rpt")
IMPORTED_BY_TRAINING = ("torch._dynamo", "torch.distributed.checkpoint", "matplotlib.figure")
"""By the first step, a checkpoint and the report: seconds, in every process that is killed or resumes."""
NEVER = 10**9
HANG_SECONDS = 120.0
PEER_SECONDS = 20.0
"""How long a process may live on when another one of its run was killed."""

processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Plan:
    """When a process dies: at its n-th call that changes a file, or its n-th forward pass inside a rollout. after:
    seconds until the parent kills it."""

    files: int = NEVER
    tokens: int = NEVER
    after: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What the straight run took, and a number for each of its results."""

    seconds: float
    files: int
    tokens: int
    result: dict[str, str]


@contextmanager
def die_at_token(number: int) -> Iterator[list[int]]:
    """SIGKILL at the n-th forward pass of a model without gradients while a step's batch is made: a rollout's. Yields
    how many there were."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    from llm_quest.models.decoder import Decoder
    from llm_quest.progress import PHASES

    seen = [0]

    def count(module: Any, given: Any) -> None:
        if isinstance(module, Decoder) and not torch.is_grad_enabled():
            seen[0] += any(phase.name == "reading the batch" for phase in PHASES)
            if seen[0] > number:
                os.kill(os.getpid(), signal.SIGKILL)

    handle = register_module_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def train_child(recipe: str, here: str, out: str, plan: Plan, rank: int, port: int) -> None:
    """One process of a run, which dies by its plan. Counts of a run that ends are in OUT.counts."""
    import torch

    torch.set_num_threads(1)
    os.environ["LLM_QUEST_CACHE"] = f"{here}/cache"
    if port:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    begin = time.monotonic()
    with failing_files(Path(out), "kill", plan.files) as files, die_at_token(plan.tokens) as tokens:
        code = run_with_exit_code(lambda: run_tiny(recipe, Path(here), Path(out), *SETTINGS[recipe]))
    if code:
        sys.exit(code)
    counts = {"seconds": time.monotonic() - begin, "files": files.calls, "tokens": tokens[0]}
    if rank == 0:
        Path(f"{out}.counts").write_text(json.dumps(counts))


def start(recipe: str, here: Path, out: Path, plans: Sequence[Plan]) -> list[BaseProcess]:
    """The processes of a run, one for each plan."""
    port = 0
    if len(plans) > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    started = [
        processes.Process(target=train_child, args=(recipe, str(here), str(out), plan, rank, port))
        for rank, plan in enumerate(plans)
    ]
    for process in started:
        process.start()
    for process, plan in zip(started, plans, strict=True):
        if plan.after:
            process.join(plan.after)
            process.kill()
    return started


def end(started: Sequence[BaseProcess]) -> list[int | None]:
    """The exit codes. RuntimeError for a process that hangs, or that outlives another one that was killed."""
    waiting, limit = list(started), time.monotonic() + HANG_SECONDS
    while waiting:
        if time.monotonic() > limit:
            for process in started:
                process.kill()
            raise RuntimeError(f"a process goes on ({[process.exitcode for process in started]})")
        waiting[0].join(0.05)
        if any(process.exitcode == -signal.SIGKILL for process in started):
            limit = min(limit, time.monotonic() + PEER_SECONDS)
        waiting = [process for process in waiting if process.is_alive()]
    return [process.exitcode for process in started]


def run_result(out: Path) -> dict[str, str]:
    """A hash for each thing that a resumed run has to have in common with the straight one."""
    last = list_checkpoints(out / "checkpoints")[-1]
    state = json.loads((last / "state.json").read_text())
    values = {name: drop_times(value) for name, value in state.items() if name != "environment"}
    values["metrics"] = [drop_times(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {name: json.dumps(value, sort_keys=True).encode() for name, value in values.items()}
    found |= {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    return {"last": last.name} | {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def last_step(out: Path) -> int:
    """The last step that has a row of metrics."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return max((int(json.loads(line)["step"]) for line in lines if line.endswith("\n")), default=0)


def drop_times(value: Any) -> Any:
    """The value without what a clock measured."""
    if isinstance(value, dict):
        return {key: drop_times(one) for key, one in value.items() if "second" not in key}
    return [drop_times(one) for one in value] if isinstance(value, list) else value


def measure(recipe: str, here: Path, count: int) -> Measured:
    """The straight run, of `count` processes."""
    out = here / f"straight-{recipe}-{count}"
    codes = end(start(recipe, here, out, [Plan()] * count))
    assert codes == [0] * count, f"the straight run ended with {codes}"
    counts = json.loads(Path(f"{out}.counts").read_text())
    return Measured(counts["seconds"], counts["files"], counts["tokens"], run_result(out))


def draw_plan(moment: str, straight: Measured, chance: random.Random) -> Plan:
    """A plan for a moment: time, files or tokens."""
    if moment == "files":
        return Plan(files=chance.randrange(straight.files))
    if moment == "tokens":
        return Plan(tokens=chance.randrange(straight.tokens))
    return Plan(after=chance.uniform(0.02, 0.95) * straight.seconds)


def moments_of(recipe: str, processes: int) -> Iterator[Sequence[str]]:
    """The moments of one kill after another: each a list of those of one run."""
    inside = "tokens" if recipe in ROLLOUTS else "files"
    while True:
        yield from (("time",), ("files",), (inside,), ("time", "files"), ("files", inside))


def kill_once(
    recipe: str, here: Path, out: Path, moments: Sequence[str], straight: Measured, chance: random.Random, count: int
) -> int:
    """Kill a run at these moments, one after the other, and resume it to its end; how often it died."""
    died = 0
    for moment in moments:
        plans, victim = [Plan()] * count, chance.randrange(count) if moment != "files" else 0
        plans[victim] = draw_plan(moment, straight, chance)
        codes = end(start(recipe, here, out, plans))
        died += codes[victim] == -signal.SIGKILL
        if count > 1 and codes[victim] == -signal.SIGKILL:
            well = codes[1 - victim] == 0 and last_step(out) == int(straight.result["last"][5:])
            assert codes[1 - victim] == 5 or well, f"the other process ended with {codes[1 - victim]}"
    codes = end(start(recipe, here, out, [Plan()] * count))
    assert codes == [0] * count, f"the resumed run ended with {codes}"
    return died


def campaign(recipe: str, here: Path, count: int, processes: int, seed: int) -> list[str]:
    """The faults among `count` runs that were killed; one line for each run on stdout."""
    straight, chance = measure(recipe, here, processes), random.Random(f"{recipe} {processes} {seed}")
    shown = f"{straight.seconds:.1f} s, {straight.files} calls that change files, {straight.tokens} passes in rollouts"
    print(f"{recipe}, {processes} process(es): the straight run took {shown}", flush=True)
    faults, done, kills = [], 0, Counter[str]()
    for number, moments in enumerate(moments_of(recipe, processes)):
        if done == count:
            break
        out = here / f"killed-{recipe}-{processes}-{number}"
        try:
            died = kill_once(recipe, here, out, moments, straight, chance, processes)
        except (AssertionError, RuntimeError) as error:
            died, found = 1, {"": str(error)}
        else:
            found = run_result(out)
        if not died:
            shutil.rmtree(out)
            continue
        done += 1
        kills[" and ".join(moments)] += 1
        wrong = [name for name in found.keys() | straight.result if found.get(name) != straight.result.get(name)]
        verdict = f"DIFFERENT: {', '.join(sorted(wrong))} {found.get('', '')}" if wrong else "same"
        print(f"  {number}: killed at {' and '.join(moments)} ({died} times): {verdict}", flush=True)
        if wrong:
            faults.append(f"{recipe} {number}: {verdict}")
        else:
            shutil.rmtree(out)
    same = f"{done - len(faults)} of {done} with the straight run's bits"
    print(f"{recipe}, {processes} process(es): {same} ({dict(kills)})", flush=True)
    return faults


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults kills", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="", help=f"one of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="started by torchrun, whose agent is killed too")
    parser.add_argument(
        "--warm", action="store_true", help="torchrun's agent and workers, in processes that have torch"
    )
    args = parser.parse_args(words)
    if args.torchrun or args.warm:
        from tests.faults import torchrun_kills

        recipes = [args.recipe] if args.recipe else ["pretrain", "grpo"]
        launch = torchrun_kills.start_warm if args.warm else torchrun_kills.start_torchrun
        return torchrun_kills.main(recipes, args.count, args.seed, launch)
    recipes = (f"llm_quest.recipes.{name}" for name in SETTINGS if name != "rpt")
    processes.set_forkserver_preload(["tests.faults.kills", *recipes, *IMPORTED_BY_TRAINING])
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        prepare(here)
        for recipe in [args.recipe] if args.recipe else SETTINGS:
            faults += campaign(recipe, here, args.count, args.processes, args.seed)
    return int(bool(faults))
