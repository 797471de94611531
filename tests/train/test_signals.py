"""What a handler may do while a line is being written."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from llm_quest.train.signals import SignalHandler


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
