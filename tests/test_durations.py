"""The command that tells which tests cost the most, and what a worker of the tests tells."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest, durations
from tests.durations import Spent
from tests.forked import run_forked


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


def use_own_processor(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the fork server's seconds stand in /proc")
def test_a_forked_process_is_counted():
    run_forked(use_own_processor, 0.0)  # starts the fork server
    before = durations.processor_seconds()
    run_forked(use_own_processor, 0.3)
    assert durations.processor_seconds() - before >= 0.29


def test_a_worker_tells_one_report_of_a_test_and_those_that_did_not_pass(monkeypatch: pytest.MonkeyPatch):
    option = SimpleNamespace(xmlpath=None, durations=None)
    told: list[str] = []
    item: Any = SimpleNamespace(
        config=SimpleNamespace(workerinput={}, option=option),
        ihook=SimpleNamespace(pytest_runtest_logreport=lambda report: told.append(report.when)),
    )
    for failing, wanted in (("", ["call"]), ("setup", ["setup", "call"]), ("teardown", ["call", "teardown"])):
        reports = [SimpleNamespace(when=when, passed=when != failing) for when in ("setup", "call", "teardown")]
        monkeypatch.setattr(conftest, "runtestprotocol", lambda *given, reports=reports, **options: reports)
        assert conftest.pytest_runtest_protocol(item, None)
        assert told == wanted
        told.clear()
    slowest = SimpleNamespace(workerinput={}, option=SimpleNamespace(xmlpath=None, durations=5))
    assert conftest.pytest_runtest_protocol(SimpleNamespace(config=slowest), None) is None, "all are wanted"
