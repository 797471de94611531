"""What a handler may do while a line is being written, and how a command ends outside of the training loop."""

from __future__ import annotations

import ast
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llm_quest
from llm_quest.train.signals import SignalHandler

PACKAGE = Path(llm_quest.__file__).parent


class Interrupted(io.RawIOBase):
    """A terminal at which somebody presses Ctrl-C in the middle of a line."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        signal.raise_signal(signal.SIGINT)
        return len(bytes(data))  # type: ignore[call-overload, no-any-return]


def test_ctrl_c_in_the_middle_of_a_line_only_takes_a_note(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal = io.TextIOWrapper(io.BufferedWriter(Interrupted()), write_through=True)
    with SignalHandler() as signals:
        monkeypatch.setattr(sys, "stderr", terminal)
        sys.stderr.write("step 2/150\n")
        sys.stderr.flush()
    assert signals.stop_signal == signal.SIGINT
    monkeypatch.undo()
    assert "SIGINT: this step is finished and saved" in capfd.readouterr().err


COMMAND = """
import hashlib, signal, sys, threading, time
from llm_quest.cli import main
from llm_quest.train import signals

signals.PATIENCE_SECONDS = PATIENCE
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores

def work():
    threading.Timer(0.3, print, ("ready",), {"flush": True}).start()  # the main thread is inside by then
    try:
        WORK
    finally:
        print("cleaned up", flush=True)

main.app.command("work")(work)
sys.argv = ["quest", "work"]
main.main()
"""
IN_PYTHON = "time.sleep(60)"
IN_C = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"
"""A call without end that frees the interpreter and does not look at signals, as a package in C or Rust."""
IN_A_THREAD = "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"
SHIELDED = """
        try:
            time.sleep(60)
        finally:
            time.sleep(60)
"""
CONVERSATION = """
        said = ""
        while True:
            try:
                print(said, end="", flush=True)  # in here, so that the next signal finds the handler below
                time.sleep(60)
            except KeyboardInterrupt as stop:
                signals.continue_after_interrupt(stop)
                said = "answer cut\\n"
"""


class Command:
    """A command of `quest` that does this work. It has begun."""

    def __init__(self, work: str, patience: float = 0.3):
        text = COMMAND.replace("WORK", work.strip()).replace("PATIENCE\n", f"{patience}\n")
        self.process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it said on both streams."""
        said, told = self.process.communicate(timeout=30)  # the work takes a minute
        return self.process.returncode, said, told


@pytest.mark.parametrize(
    ("work", "number", "is_clean"),
    [(IN_PYTHON, signal.SIGHUP, True), (IN_A_THREAD, signal.SIGTERM, True), (IN_C, signal.SIGINT, False)],
)
def test_a_command_ends_by_a_signal_wherever_it_is(work: str, number: signal.Signals, is_clean: bool) -> None:
    """It cleans up where the main thread is in Python, and does not wait for what goes on."""
    command = Command(work)
    command.process.send_signal(number)
    code, said, told = command.end()
    assert code == 128 + number
    assert (said, told) == (("cleaned up\n", "quest: interrupted\n") if is_clean else ("", ""))


def test_a_second_signal_ends_a_command_at_once() -> None:
    command = Command(SHIELDED, patience=60)
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    command.process.send_signal(signal.SIGINT)
    assert command.end()[0] in (130, 143)


def test_a_conversation_goes_on_after_ctrl_c_and_ends_by_other_signals() -> None:
    command = Command(CONVERSATION)
    assert command.process.stdout is not None
    for _ in range(2):
        command.process.send_signal(signal.SIGINT)
        assert command.process.stdout.readline() == "answer cut\n"
    time.sleep(0.5)  # longer than the patience of the first signal
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == (143, "cleaned up\n", "quest: interrupted\n")


TAKES_SIGNALS = {
    "cli/output.py": "the end of a command",
    "rollouts/worker_process.py": "a process that its parent kills",
}


def test_nothing_takes_a_signal_for_an_error_of_its_own() -> None:
    """Whatever catches KeyboardInterrupt raises it again, or something that ends the command."""
    seen = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        text = file.read_text(encoding="utf-8")
        if "BaseException" not in text and "KeyboardInterrupt" not in text and "except:" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Try):
                for handler in node.handlers:
                    caught = "BaseException" if handler.type is None else ast.unparse(handler.type)
                    if "BaseException" in caught or "KeyboardInterrupt" in caught:
                        seen.add(name)
                        body = ast.unparse(ast.Module(handler.body, []))
                        ends = "raise" in body or "continue_after_interrupt(" in body
                        assert ends or name in TAKES_SIGNALS, f"{file}:{handler.lineno}"
                        break  # the first one has it
    assert seen >= {*TAKES_SIGNALS, "files.py", "train/failures.py", "cli/chat_session.py"}
