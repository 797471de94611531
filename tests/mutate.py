"""Break the code on purpose, once per known trap, and name the tests that notice.

`python -m tests.mutate [WORD ...]` copies the tree once, sees the chosen mutations' tests pass on it, then makes each
mistake in the copy, runs its tests until two have failed, takes the mistake back and prints a row for
docs/mutations.md. WORD chooses mutations whose title or file contains it. A survivor ends the command with 1.

Each judgement runs in a child that was forked from a process that has torch and transformers and none of our code.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch  # noqa: F401  (so that the children have it)
import transformers  # noqa: F401

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


def main(words: Sequence[str]) -> int:
    chosen = [one for one in MUTATIONS if not words or any(word in f"{one.title} {one.file}" for word in words)]
    copy = frozen()
    try:
        for tests in sorted({one.tests for one in chosen}):
            if failed := failures(copy, tests):
                print(f"red before any mistake: {', '.join(failed)} ({tests})")
                return 2
        print("| mistake | in | caught by |\n| --- | --- | --- |", flush=True)
        survived = 0
        for one in chosen:
            caught = broken(copy, one)
            survived += not caught
            told = ", ".join(f"`{name}`" for name in caught) or "**survives**"
            print(f"| {one.title} | `{one.file}` | {told} |", flush=True)
        return 1 if survived else 0
    finally:
        shutil.rmtree(copy)


def frozen() -> Path:
    """What git knows of this tree, as it lies here now."""
    copy = Path(tempfile.mkdtemp(prefix="mutate-"))
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def broken(copy: Path, mutation: Mutation) -> list[str]:
    """The tests that fail while the mistake is there."""
    file = copy / "llm_quest" / mutation.file
    right = file.read_text(encoding="utf-8")
    assert right.count(mutation.right) == 1, f"{mutation.title}: {right.count(mutation.right)} places to make it"
    file.write_text(right.replace(mutation.right, mutation.wrong), encoding="utf-8")
    try:
        return failures(copy, mutation.tests)
    finally:
        file.write_text(right, encoding="utf-8")


def failures(copy: Path, tests: str) -> list[str]:
    """Run tests of the copy in a child; the names of the first two that fail."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as out:
            out.write(judged(copy, tests))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert text, f"no test was run: {tests}"
    found = re.findall(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", text, re.MULTILINE)
    assert found or " passed" in text, text[-2000:]
    return list(dict.fromkeys(found))


def judged(copy: Path, tests: str) -> str:
    """Pytest's last lines, on the copy."""
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "llm_quest", "benchmarks")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True
    files, _, words = tests.partition(" -k ")
    options = ["--maxfail=2", "-p", "no:cacheprovider", "-rfE", "--tb=no", f"--rootdir={copy}", "-o", "addopts="]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        pytest.main([*files.split(), *(["-k", words] if words else []), *options])
    return out.getvalue() + " "


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
