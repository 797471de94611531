"""Kill one process of a run that torchrun has started, or torchrun's agent; see that nothing is left of it and that the
message names the cause; resume the run and compare it with the straight one, bit by bit.

`python -m tests.faults kills --torchrun --recipe grpo --count 10` starts `torchrun --nproc-per-node 2 -m llm_quest
train`; `--warm` and the suite start the same agent from a process that has torch already."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.cli.output import run_with_exit_code
from llm_quest.errors import MAX_MESSAGE_LINES
from tests.faults.kills import SETTINGS, last_step, run_result
from tests.recipes.every_recipe import COMMON, TEXTS, prepare, run_tiny
from tests.recipes.two import start_agent

VICTIMS = ("rank 0", "rank 1", "agent")
END_SECONDS = 60.0
"""How long the others may go on: torchrun waits 30 seconds for a process that it has told to stop."""


@dataclass(frozen=True)
class Launch:
    """A run that has been started: its agent, which an exit code is waited for from."""

    pid: int
    wait: Callable[[float], int | None]
    stderr: Path
    pids: Path


def start_torchrun(recipe: str, here: Path, out: Path) -> Launch:
    """The command of a user."""
    yaml = here / f"{recipe}.yaml"
    yaml.write_text(f"recipe: {recipe}\n{COMMON}{TEXTS[recipe]}".replace("FOLDER", str(here)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["llm_quest", "train", str(yaml), *SETTINGS[recipe], "--out", str(out)]
    stderr = Path(f"{out}.stderr")
    with stderr.open("wb") as file:
        agent = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, env=os.environ | {"LLM_QUEST_CACHE": f"{here}/cache"}
        )

    def wait(seconds: float) -> int | None:
        try:
            return agent.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return Launch(agent.pid, wait, stderr, Path(f"{out}.pids"))


def start_warm(recipe: str, here: Path, out: Path) -> Launch:
    """The same agent, forked from a process that has torch; so are its workers."""
    pids = Path(f"{out}.pids")
    agent = start_agent(pids, warm_worker, recipe, str(here), str(out))

    def wait(seconds: float) -> int | None:
        agent.join(seconds)
        return agent.exitcode

    return Launch(agent.pid or 0, wait, Path(f"{out}.stderr"), pids)


def warm_worker(recipe: str, here: str, out: str) -> None:
    os.dup2(os.open(f"{out}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ["LLM_QUEST_CACHE"] = f"{here}/cache"
    sys.exit(run_with_exit_code(lambda: run_tiny(recipe, Path(here), Path(out), *SETTINGS[recipe])) or 0)


def parent_of(pid: int) -> int:
    """0 for a process that is gone, or waits for its parent to read its exit code."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)


def descendants(pid: int) -> list[int]:
    """The processes that it has started, and theirs."""
    parents = {int(one.name): parent_of(int(one.name)) for one in Path("/proc").iterdir() if one.name.isdigit()}
    found, latest = [], [pid]
    while latest:
        latest = [child for child, parent in parents.items() if parent in latest]
        found += latest
    return found


def kill_one(agent: int, victim: str, pids: Path) -> list[int]:
    """Kill it, and return the processes that there were. torchrun starts its workers in the order of their ranks; those
    of `start_agent` have files in a folder."""
    workers = [int(file.read_text()) for file in sorted(pids.glob("*"))]
    there = [agent, *workers, *descendants(agent)]
    workers = workers or sorted(pid for pid in there if parent_of(pid) == agent)
    os.kill(agent if victim == "agent" else workers[int(victim[-1])], signal.SIGKILL)
    return there


def wait_for_step(launch: Launch, out: Path, step: int) -> bool:
    """Until the run has done this step; False if it has ended before."""
    while last_step(out) < step or not out.exists():
        if launch.wait(0.02) is not None:
            return False
    return True


def find_orphans(pids: Sequence[int], seconds: float = END_SECONDS) -> list[int]:
    """Those that go on for too long."""
    limit = time.monotonic() + seconds
    while (left := [pid for pid in pids if parent_of(pid)]) and time.monotonic() < limit:
        time.sleep(0.1)
    return left


INTERRUPTED = "quest: interrupted"


def message_of(stderr: Path) -> list[str]:
    """The lines of our message, without torchrun's and those of progress."""
    return [line for line in stderr.read_text(errors="replace").splitlines() if line.startswith("quest: ")]


def finish(start: Callable[..., Launch], recipe: str, here: Path, out: Path) -> dict[str, str]:
    """Run it to its end."""
    launch = start(recipe, here, out)
    code = launch.wait(600)
    assert code == 0, f"it ended with {code}: {launch.stderr.read_text(errors='replace')[-1500:]}"
    return run_result(out)


def kill_and_resume(
    start: Callable[..., Launch], recipe: str, here: Path, out: Path, victim: str, step: int, delay: float
) -> tuple[bool, dict[str, str]]:
    """Whether something was killed, and the results of the resumed run. AssertionError for what is left of the killed
    one, and for its message."""
    launch = start(recipe, here, out)
    if not wait_for_step(launch, out, step):
        return False, finish(start, recipe, here, out)
    time.sleep(delay)
    orphans = find_orphans(kill_one(launch.pid, victim, launch.pids))
    launch.wait(1)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert not orphans, f"{len(orphans)} processes go on"
    told, is_done = message_of(launch.stderr), last_step(out) == run_steps(recipe)
    text = launch.stderr.read_text(errors="replace")
    by_torchrun = "Signal 9 (SIGKILL)" in text  # SIGTERM of the agent ends a worker outside of the loop
    by_us = 1 <= len(told) <= MAX_MESSAGE_LINES and "killed" in told[0]
    assert is_done or by_us or (by_torchrun and told in ([], [INTERRUPTED])), f"{told} is told: {text[-1500:]}"
    launch.stderr.unlink()
    return True, finish(start, recipe, here, out)


def run_steps(recipe: str) -> int:
    return int(SETTINGS[recipe][0].partition("=")[2])


def campaign(recipe: str, here: Path, count: int, seed: int, start: Callable[..., Launch]) -> list[str]:
    """The faults among `count` killed runs; a line for each on stdout."""
    begin = time.monotonic()
    straight = finish(start, recipe, here, here / f"straight-{recipe}")
    print(f"{recipe}, {start.__name__}: the straight run took {time.monotonic() - begin:.0f} s", flush=True)
    chance, faults = random.Random(f"{recipe} {seed}"), []
    for number in range(count):
        victim, step, delay = VICTIMS[number % 3], chance.randrange(run_steps(recipe)), chance.uniform(0, 0.5)
        try:
            out = here / f"{recipe}-{number}"
            killed, found = kill_and_resume(start, recipe, here, out, victim, step, delay)
            wrong = sorted(name for name in straight if found.get(name) != straight[name])
            verdict = f"DIFFERENT: {', '.join(wrong)}" if wrong else "same" if killed else "was done before"
        except AssertionError as error:
            verdict = f"FAILED: {error}"
        print(f"  {number}: {victim} killed in step {step + 1}: {verdict}", flush=True)
        faults += [f"{recipe} {number}: {verdict}"] if verdict not in ("same", "was done before") else []
    print(f"{recipe}, {start.__name__}: {count - len(faults)} of {count} with the straight run's bits", flush=True)
    return faults


def main(recipes: Sequence[str], count: int, seed: int, start: Callable[..., Launch]) -> int:
    faults: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for recipe in recipes:
            faults += campaign(recipe, Path(folder), count, seed, start)
    return int(bool(faults))
