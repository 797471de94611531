"""What is shown of a running command: plain lines, or one bar that fits every terminal; and no silence."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm_quest import progress
from llm_quest.cli.output import show_progress
from llm_quest.progress import (
    EtaClock,
    Heartbeat,
    LineLogger,
    NullLogger,
    describe_phases,
    format_metrics,
    phase,
    track,
    wants_color,
)
from llm_quest.recipes.engine import make_logger
from tests.forked import processes
from tests.train.small import go

ROOT = Path(__file__).parents[1]
ROW = {"step": 3, "loss": 2.0, "tokens_per_second": 1234.5, "learning_rate": 1e-3}
SLOW_RUN = """
import time
from llm_quest.cli.output import show_progress
from llm_quest.progress import phase
from llm_quest.recipes.engine import make_logger
row = {"step": 3, "loss": 2.0, "rewards/margin": 0.25, "rewards/accuracy": 0.75, "rewards/chosen": 1.5,
       "rewards/rejected": -1.25, "tokens_per_second": 123456.0, "learning_rate": 1e-3, "eval/accuracy": 0.5}
with show_progress():
    with phase("reading rows"):
        time.sleep(0.6)
    logger = make_logger()
    logger.start(0, 1000)
    with phase("training", 1000, is_run=True) as now:
        now.done = 3
        logger.log_metrics(row)
        logger.log_event("saved: step 3")
        with phase("evaluating", 9):
            time.sleep(1.8)
    logger.close()
print("result")
"""


def test_without_a_terminal_there_is_one_line_per_event(capsys):
    go(4, show=make_logger(), logging_steps=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" rank 0 ")[1].split("  ")[0] for line in lines] == [
        "started: steps 4",
        "step 1/4",
        "step 2/4",
        "step 4/4",
        "finished: step 4",
    ]
    assert all(word in lines[2] for word in ("loss ", " tok/s", "lr ", "ETA 0:00:0"))


def test_an_evaluation_has_a_line_of_its_own(capsys):
    logger = LineLogger()
    logger.start(0, 10)
    logger.log_metrics(ROW | {"eval/accuracy": 0.5, "eval/loss": 1.25})
    first, second = capsys.readouterr().err.splitlines()
    assert "accuracy" not in first
    assert "held out" not in first
    assert second.endswith("step 3/10  held out: accuracy 0.5000  loss 1.2500")


def test_a_line_shows_what_a_method_is_watched_by_and_in_its_units():
    policy = ROW | {"reward": 0.5, "completions/mean_length": 12.25, "entropy": 1.5, "kl": 0.01}
    policy |= {"frac_reward_zero_std": 0.25, "completions/clipped_ratio": 0.5}
    wanted = ["reward 0.500", "length 12.2", "entropy 1.500", "kl 0.0100", "no spread 25%", "cut off 50%"]
    assert format_metrics(policy)[:6] == wanted
    preference = ROW | {"rewards/margin": 0.5, "rewards/accuracy": 0.75, "rewards/chosen": 1.0, "rewards/rejected": 0.5}
    assert {"margin 0.5000", "accuracy 75.0%", "chosen 1.000", "rejected 0.500"} <= set(format_metrics(preference))
    assert "accuracy 25.0%" in format_metrics(ROW | {"accuracy": 0.25})
    assert "1,234 images/s" in format_metrics(ROW, "images")
    assert "1,234 tok/s" in format_metrics(ROW)
    empty = ROW | {"loss": math.nan, "tokens_per_second": 0.0, "reward": 0.25, "empty_steps": 2}
    assert [one for one in format_metrics(empty) if not one.startswith("lr")] == ["reward 0.250", "empty_steps 2"]
    assert "loss nan" in format_metrics(ROW | {"loss": math.nan}), "of a step that was skipped"


def test_no_rate_is_told_before_the_first_step():
    clock = EtaClock(3, 10)
    assert (clock.rate(3), clock.time_left(3)) == ("", "-:--:--")
    assert clock.rate(4).endswith("/s") or clock.rate(4).endswith("/step")
    assert clock.time_left(10) == "0:00:00"


def test_other_ranks_and_the_quiet_see_nothing(capsys, monkeypatch):
    assert isinstance(make_logger(rank=1), NullLogger)
    assert isinstance(make_logger(quiet=True), NullLogger)
    assert isinstance(make_logger(), LineLogger)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.05)
    with show_progress(quiet=True), phase("tokenizing"):
        time.sleep(0.2)
    monkeypatch.setenv("RANK", "1")
    with show_progress(), phase("tokenizing"):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_phases_are_named_from_the_outside_in_and_counted():
    with phase("preparing"):
        steps = [(describe_phases(), item) for item in track("abc", "tokenizing")]
        assert steps[2] == ("preparing, 0 s · tokenizing 2 of 3, 0 s", "c")
        assert describe_phases() == "preparing, 0 s"
    assert describe_phases() == "working"


def test_silence_is_broken_ever_more_rarely_and_by_nothing_else(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.2)
    with Heartbeat(), phase("fitting"):
        for _ in range(8):
            time.sleep(0.05)
            progress.note_output()
        assert capsys.readouterr().err == "", "a command that prints has no other line"
        time.sleep(1.7)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4, lines
    assert all(re.fullmatch(r"\.\.\. fitting, \d s", line) for line in lines)


def run_on_a_terminal(code: str, terminal: str, env: dict[str, str]) -> None:
    """In a process that was forked from one with torch in it: the program, with the terminal as its three streams."""
    os.environ.clear()
    os.environ.update({"TERM": "xterm-256color", **env})
    stream = os.open(terminal, os.O_RDWR)
    for number in range(3):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in enumerate("rww"))  # noqa: SIM115
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


def on_a_terminal(code: str, width: int, env: dict[str, str]) -> str:
    """What a program writes to a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    began = processes.Process(target=run_on_a_terminal, args=(code, os.ttyname(follower), env))
    with STARTING:
        began.start()
    while not select.select([leader], [], [], 0.05)[0] and began.is_alive():
        pass  # until it has opened its end
    os.close(follower)
    seen = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(leader)
    began.join(30)
    assert began.exitcode == 0, seen.decode()
    return seen.decode()


STARTING = threading.Lock()
TERMINALS: dict[str, tuple[int, dict[str, str]]] = {
    **{str(width): (width, {}) for width in (60, 80, 200)},
    "no color": (80, {"NO_COLOR": "1"}),
    "dumb": (80, {"TERM": "dumb"}),
}
"""Columns, and variables of the environment."""


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What the slow run writes to each of them, all at once: it sleeps most of the time."""
    with ThreadPoolExecutor(len(TERMINALS)) as pool:
        runs = {name: pool.submit(on_a_terminal, SLOW_RUN, *given) for name, given in TERMINALS.items()}
        return {name: run.result() for name, run in runs.items()}


def terminal_lines(output: str) -> list[str]:
    """Every line that was drawn, without control sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_bar_fits_the_terminal_and_events_stay_above_it(width: int, outputs: dict[str, str]):
    lines = terminal_lines(outputs[str(width)])
    assert max(map(len, lines)) <= width
    assert any(line.startswith("reading rows, 0 s") for line in lines)
    bars = [line for line in lines if re.match(r"step 3/1000 +[━╸╺ ]+ .*(step/s|s/step)  ETA \d+:\d\d:\d\d$", line)]
    assert bars
    assert all(len(line) > width - 45 or width == 200 for line in bars)
    assert any(line.startswith("loss 2.0000  margin 0.2500") for line in lines)
    assert "step 3/1000  held out: accuracy 0.5000" in lines
    assert "saved: step 3" in lines
    assert any(line.startswith("evaluating 0 of 9, 1 s") for line in lines)
    assert lines[-1] == "result"


def test_no_color_and_dumb_terminals_are_heard(monkeypatch, outputs: dict[str, str]):
    colors = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])[0-9;]*m")
    assert colors.search(outputs["80"])
    assert not colors.search(outputs["no color"])
    assert "\x1b" not in outputs["dumb"]

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal())  # type: ignore[arg-type]
