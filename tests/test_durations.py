"""The command that tells which tests cost the most."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import durations
from tests.durations import Spent


def use_processor(seconds: float) -> None:
    until = durations.processor_seconds() + seconds
    while durations.processor_seconds() < until:
        pass


def test_a_tests_seconds_are_summed_by_package_file_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(durations.FOLDER, str(tmp_path))

    class Item:
        nodeid = "tests/a/test_b.py::test_c[x::y/z]"

    for _ in range(2):
        running = durations.pytest_runtest_protocol(Item())  # type: ignore[arg-type]
        next(running)
        use_processor(0.05)
        with pytest.raises(StopIteration):
            running.send("done")
    durations.append(Spent("tests/a/test_d.py::test_e", 1.0))
    durations.append(Spent("", 2.0))
    parts = durations.read_parts(tmp_path)
    spent = durations.sum_by(parts[:2], "function")["tests/a/test_b.py::test_c"]
    assert 0.1 - 1e-6 <= spent < 0.4  # differences of ticks of 0.01 s: each is rounded
    assert set(durations.sum_by(parts[:3], "file")) == {"tests/a/test_b.py", "tests/a/test_d.py"}
    lines = durations.report_lines(parts)
    assert lines[0] == "1 s of processor time in 3 tests"
    assert lines[1] == "collected in 2 s of processor time"
    assert lines[lines.index("by package:") + 1].endswith("s  tests/a")
