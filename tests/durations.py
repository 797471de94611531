"""`python -m tests.durations [PYTEST OPTIONS]`: the processor seconds of every test, its own and those of the processes
that it waited for, by package, file and function; `make test` tells how long the clock ran, which says little on a
machine that does something else too. Without options the whole suite runs, on two workers.

As a plugin (`pytest -p tests.durations`) each process appends to a file of its own in the folder of
LLM_QUEST_DURATIONS. Processes of multiprocessing's fork server are counted where /proc tells what it has used."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FOLDER = "LLM_QUEST_DURATIONS"
WHOLE_SUITE = ("-n", "2", "--dist", "worksteal")
SHOWN = 30


class Spent(NamedTuple):
    """test: its id, or "" for collecting the tests."""

    test: str
    seconds: float


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + fork_server_seconds()


def fork_server_seconds() -> float:
    """Of the fork server and of the processes that it has waited for: it is no child whose seconds os.times() adds.
    0 where /proc is missing or no fork server runs."""
    pid = getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime


def append(spent: Spent) -> None:
    with open(Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(spent) + "\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    before = processor_seconds()
    try:
        return (yield)
    finally:
        append(Spent(item.nodeid, processor_seconds() - before))


def pytest_collection_finish() -> None:
    append(Spent("", processor_seconds()))


def sum_by(parts: Iterable[Spent], group: str) -> Counter[str]:
    """Seconds by "package" (tests/laws), "file" or "function" (over its parameters)."""
    totals: Counter[str] = Counter()
    for test, seconds in parts:
        function = re.sub(r"\[.*", "", test, flags=re.DOTALL)
        file = function.split("::")[0]
        names = {"function": function, "file": file, "package": "/".join(file.split("/")[:2])}
        totals[names[group]] += seconds
    return totals


def report_lines(parts: list[Spent]) -> list[str]:
    tests = [one for one in parts if one.test]
    collecting = [one.seconds for one in parts if not one.test]
    lines = [f"{sum(one.seconds for one in tests):,.0f} s of processor time in {len(tests):,} tests"]
    lines += [f"collected in {seconds:.0f} s of processor time" for seconds in collecting]
    for group in ("package", "file", "function"):
        totals = sum_by(tests, group)
        lines += ["", f"by {group}:"]
        lines += [f"{seconds:8.1f} s  {name}" for name, seconds in totals.most_common(SHOWN)]
    return lines


def read_parts(folder: Path) -> list[Spent]:
    files = sorted(folder.glob("*.jsonl"))
    return [Spent(*json.loads(line)) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def main(*options: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-p", "tests.durations", *(options or WHOLE_SUITE)]
        code = subprocess.call(command, env=os.environ | {FOLDER: folder, "HF_HUB_OFFLINE": "1"})
        print("\n".join(report_lines(read_parts(Path(folder)))))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
