"""How many files a reader has to open to follow a command: a bound, so that it grows by nobody's oversight."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest

from tests.trace_files import ROOT, STRETCHES, FileTrace

AT_MOST = {"quest train tiny, to the first optimizer step": 79, "one GRPO rollout": 32}


@functools.cache
def count_files() -> dict[str, tuple[int, str]]:
    """Stretch -> how many files, and what is printed about it. In a process of its own: here functions are wrapped, to
    check their shapes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.trace_files"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^(\S.*): (\d+) files$", done.stdout, flags=re.MULTILINE)[1:]
    return {name: (int(number), text) for name, number, text in zip(*[iter(parts)] * 3, strict=True)}


@pytest.mark.parametrize("stretch", STRETCHES)
def test_a_reader_who_follows_a_command_opens_no_more_files_than_before(stretch: str):
    number, files = count_files()[stretch]
    assert number == len(files.strip().splitlines())
    assert number <= AT_MOST[stretch], f"{number} files, at most {AT_MOST[stretch]} are allowed:{files}"


def test_a_trace_sees_calls_but_not_what_runs_during_an_import():
    trace = FileTrace()
    code = compile("def f(): pass\nclass C: pass\nf()", str(ROOT / "llm_quest" / "some_file.py"), "exec")
    names: dict[str, object] = {}
    trace.open()
    exec(code, names)
    trace.close()
    assert trace.files == {}
    trace.open()
    names["f"]()  # type: ignore[operator]
    trace.close()
    assert trace.files == {"llm_quest/some_file.py": "f"}
