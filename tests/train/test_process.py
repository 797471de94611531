"""What only a process of its own can show: being killed, being asked to stop, being one of two."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from llm_quest.contracts import Loss
from llm_quest.errors import BusyError
from llm_quest.train.run_dir import RunDir
from llm_quest.train.signals import SignalHandler
from tests.forked import processes
from tests.recipes.two import start_agent, together
from tests.train.small import Losses, Rule, digest, go, main, objective

ROOT = Path(__file__).parents[2]


def child(words: list[str]) -> None:
    sys.exit(main(words))


def start(folder: Path, *options: str) -> multiprocessing.process.BaseProcess:
    """`small.main` in a process of its own, forked from one that has torch and has not used it."""
    process = processes.Process(target=child, args=([str(folder), *options],))
    process.start()
    return process


def end(process: multiprocessing.process.BaseProcess) -> int:
    """Its exit code, or minus the signal that ended it."""
    process.join(timeout=60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_for_step(folder: Path, step: int, name: str = "metrics.jsonl") -> None:
    """Wait for the first line at or after a step."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        text = (folder / name).read_text() if (folder / name).exists() else ""
        if any(
            json.loads(line).get("step", -1) >= step for line in text.splitlines(keepends=True) if line.endswith("\n")
        ):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_killed_at_random_moments_and_resumed_the_run_ends_with_the_same_bits(tmp_path):
    straight, chance = tmp_path / "straight", random.Random(0)
    assert end(start(straight)) == 0
    broken, kills, reached = tmp_path / "broken", 0, 0
    for _ in range(5):
        process = start(broken, "--pause", "0.01")
        wait_for_step(broken, min(reached + 2, 36))
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        kills += end(process) == -signal.SIGKILL
        reached = max((row["step"] for row in rows(broken)), default=0)
    assert kills >= 3, "the kills came too late to test anything"
    assert end(start(broken)) == 0
    assert digest(broken / "checkpoints/step-00000040") == digest(straight / "checkpoints/step-00000040")
    assert [row["step"] for row in rows(broken)] == list(range(1, 41))
    assert [row["loss"] for row in rows(broken)] == [row["loss"] for row in rows(straight)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_ends_with_its_code(tmp_path, number, code):
    process = start(tmp_path / "run", "--pause", "0.02", "--save-steps", "0")
    wait_for_step(tmp_path / "run", 2)
    os.kill(process.pid, number)
    assert end(process) == code
    last = rows(tmp_path / "run")[-1]["step"]
    assert 2 <= last < 40
    assert (tmp_path / f"run/checkpoints/step-{last:08d}/MANIFEST.json").exists()


def test_a_second_signal_ends_at_once_and_the_checkpoint_before_it_stands(tmp_path):
    process = start(tmp_path / "run", "--pause", "1", "--save-steps", "1")
    wait_for_step(tmp_path / "run", 1, "events.jsonl")
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    assert end(process) == 143
    assert time.monotonic() - asked < 0.7
    done = rows(tmp_path / "run")[-1]["step"]
    assert done < 4
    with RunDir(tmp_path / "run") as run:
        assert go(5, run, feed=Rule(micro=2)).step == 5


def enter(folder, said) -> None:
    try:
        with RunDir(folder):
            said.put("")
    except BusyError as error:
        said.put(str(error))


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    said = processes.SimpleQueue()
    with RunDir(tmp_path / "run"):
        processes.Process(target=enter, args=(tmp_path / "run", said)).start()
        assert f"is in use by process {os.getpid()} on " in said.get()
    processes.Process(target=enter, args=(tmp_path / "run", said)).start()
    assert said.get() == ""


def test_sigusr1_saves_and_goes_on(tmp_path):
    class Asking(Rule):
        def batches(self, step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().batches(step)

    before = signal.getsignal(signal.SIGUSR1)
    with RunDir(tmp_path / "run") as run:
        assert go(6, run, feed=Asking(), save_total_limit=0).step == 6
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
    assert signal.getsignal(signal.SIGUSR1) == before


class Slow(Rule):
    """Step 3 goes on for a minute after somebody has pressed Ctrl-C in it, and draws random numbers meanwhile."""

    rewound = 0

    def batches(self, step):
        if step == 3 and not self.rewound:
            random.random()
            torch.rand(3)
            os.kill(os.getpid(), signal.SIGINT)
            until_given_up = time.monotonic() + 60
            while time.monotonic() < until_given_up:
                time.sleep(0.01)
        return super().batches(step)

    def rewind(self):
        self.rewound += 1


def test_a_long_step_is_given_up_and_the_resumed_run_has_the_straight_runs_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_quest.train.signals.PATIENCE_SECONDS", 0.2)
    with RunDir(tmp_path / "straight") as run:
        straight = go(6, run)
    slow = Slow()
    with RunDir(tmp_path / "run") as run:
        begin = time.monotonic()
        given_up = go(6, run, feed=slow)
        assert time.monotonic() - begin < 20
    assert (given_up.step, given_up.status, given_up.exit_code, slow.rewound) == (3, "interrupted", 130, 1)
    assert given_up.checkpoint_path.endswith("step-00000003")
    with RunDir(tmp_path / "run") as run:
        again = go(6, run)
    assert digest(again.checkpoint_path) == digest(straight.checkpoint_path)


def test_a_long_evaluation_is_given_up_too(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_quest.train.signals.PATIENCE_SECONDS", 0.2)

    class Endless:
        name, interval = "eval", 2

        def evaluate(self, model, step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                until_given_up = time.monotonic() + 60
                while time.monotonic() < until_given_up:
                    time.sleep(0.01)
            return {"loss": 1.0}

    with RunDir(tmp_path / "run") as run:
        given_up = go(6, run, probes=[Endless()])
    assert (given_up.step, given_up.status, given_up.exit_code) == (2, "interrupted", 143)
    assert given_up.checkpoint_path.endswith("step-00000002")


class Heavy(nn.Module):
    """Products whose way back is one call of C++, of some tenths of a second."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.eye(512) for _ in range(16)])

    def forward(self, x):
        self.first = x = x @ self.weights[0]
        self.first.retain_grad()  # which C++ writes
        for weight in self.weights[1:]:
            x = x @ weight
        return x


class ToldAtTheEnd(nn.Module):
    """A signal comes when the pass forward is done."""

    def __init__(self):
        super().__init__()
        self.model = Heavy()

    def forward(self, batch):
        total = self.model(torch.ones(512, 512)).sum()
        os.kill(os.getpid(), signal.SIGTERM)
        return Loss(total, torch.tensor(1.0), {})


def test_a_long_backward_pass_is_given_up_too(monkeypatch):
    monkeypatch.setattr("llm_quest.train.signals.PATIENCE_SECONDS", 0.01)
    made = ToldAtTheEnd()
    result = go(2, made=made)
    assert (result.step, result.status, result.exit_code) == (0, "interrupted", 143)
    assert made.model.first.grad is None, "the pass went on to its end"


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.stop_signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_is_saved_by_time_too(tmp_path):
    with RunDir(tmp_path / "run") as run:
        go(12, run, feed=Rule(pause=0.05), save_seconds=0.2, save_total_limit=0)
        steps = sorted(int(path.name[5:]) for path in run.checkpoints.iterdir())
    assert steps[-1] == 12
    assert 2 <= len(steps) < 7
    with RunDir(tmp_path / "never") as run:
        go(12, run, feed=Rule(pause=0.05), save_total_limit=0)
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000012"]


def torchrun(folder: Path, *options: str) -> None:
    agent = start_agent(Path(f"{folder}-pids"), child, [str(folder), *options])
    assert end(agent) == 0


def fork_processes(folder: Path, *options: str) -> None:
    """What torchrun starts, without importing torch three times."""
    together(child, [str(folder), *options])


@pytest.mark.parametrize(
    ("start_two", "engine", "optimizer", "close"),
    [(torchrun, "ddp", "adamw", 1e-4), (fork_processes, "fsdp", "muon", 5e-2)],
)
def test_two_processes_see_the_data_of_one_and_have_its_losses(tmp_path, start_two, engine, optimizer, close):
    """Twelve steps on two, then on to 16 on one: the checkpoint knows nothing of how many wrote it."""
    made, show = objective(dropout=0.0), Losses()
    go(16, made=made, feed=Rule(micro=2), show=show, optimizer=optimizer)
    start_two(tmp_path / "run", "--steps", "12", "--engine", engine, "--optimizer", optimizer)
    with RunDir(tmp_path / "run") as run:
        events = Losses()
        go(16, run, made=objective(seed=5, dropout=0.0), feed=Rule(micro=2), show=events, optimizer=optimizer)
    assert any("processes was 2 and is 1" in text for text in events.events)
    pair = rows(tmp_path / "run")
    assert [row["tokens"] for row in pair] == show["tokens"]
    assert [row["num_targets"] for row in pair] == show["num_targets"]
    assert [row["loss"] for row in pair][:3] == pytest.approx(show["loss"][:3], rel=1e-5)
    assert [row["loss"] for row in pair] == pytest.approx(show["loss"], rel=close), "Muon's bfloat16 amplifies rounding"
    assert [row["accuracy"] for row in pair][:3] == show["accuracy"][:3]
    assert [row["grad_norm"] for row in pair][:2] == pytest.approx(show["grad_norm"][:2], rel=1e-4)
