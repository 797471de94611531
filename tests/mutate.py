"""Break the code on purpose, once per known trap, and name the tests that notice.

`python -m tests.mutate [--stale] [--write] [--minutes M] [WORD ...]` copies the tree once. For each chosen mutation it
sees that its tests pass on the copy, makes the mistake there, runs the tests until two have failed, takes the mistake
back and prints a row for docs/mutations.md. WORD chooses mutations whose title or file contains it. --stale: only those
whose quoted code or tests have changed since --write noted them in docs/mutations.json, those without a row first.
--minutes: begin none after so many. A survivor ends the command with 1.

Each judgment runs in a child that was forked from a process that has torch and transformers and none of our code.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch  # noqa: F401  (so that the children have it)
import transformers  # noqa: F401

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
TABLES, NOTED = ROOT / "docs" / "mutations.md", ROOT / "docs" / "mutations.json"


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    words, noted = options.words, read_noted()
    chosen = [one for one in MUTATIONS if not words or any(word in f"{one.title} {one.file}" for word in words)]
    if options.stale:
        text = TABLES.read_text(encoding="utf-8")
        chosen = [one for one in chosen if noted.get(one.title) != fingerprint(one)]
        chosen.sort(key=lambda one: f"| {one.title} |" in text)
    copy, until, green, survived, done = copy_tree(), time.monotonic() + 60 * options.minutes, set[str](), 0, 0
    print("| mistake | in | caught by |\n| --- | --- | --- |", flush=True)
    try:
        for one in chosen:
            if time.monotonic() > until:
                break
            if one.tests not in green and (failed := failures(copy, one.tests)):
                print(f"red before any mistake: {', '.join(failed)} ({one.tests})")
                return 2
            green.add(one.tests)
            caught = failures_with(copy, one)
            done, survived = done + 1, survived + (not caught)
            row = row_of(one, caught)
            print(row, flush=True)
            if options.write and caught:
                write_row(one, row)
    finally:
        shutil.rmtree(copy)
    print(f"{done} of {len(chosen)} tried, {survived} survived")
    return 1 if survived else 0


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--minutes", type=float, default=1e6)
    return parser.parse_args(arguments)


def row_of(one: Mutation, caught: Sequence[str]) -> str:
    told = ", ".join(f"`{name}`" for name in caught) or "**survives**"
    return f"| {one.title} | `{one.file}` | {told} |"


def read_noted() -> dict[str, str]:
    """Title -> fingerprint of the mutation when it was last caught."""
    return dict(json.loads(NOTED.read_text(encoding="utf-8"))) if NOTED.exists() else {}


def write_row(one: Mutation, row: str) -> None:
    """The row in docs/mutations.md, in place of the one of this title or at the end, and its fingerprint."""
    text = TABLES.read_text(encoding="utf-8")
    old = re.search(rf"^\| {re.escape(one.title)} \|.*$", text, re.MULTILINE)
    TABLES.write_text(text.replace(old[0], row, 1) if old else f"{text.rstrip()}\n{row}\n", encoding="utf-8")
    noted = read_noted() | {one.title: fingerprint(one)}
    NOTED.write_text(json.dumps(noted, indent=0, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(one: Mutation) -> str:
    """A hash of the mistake, of the definition in which it is made, and of its tests, all without their imports."""
    files = [ROOT / name for name in one.tests.partition(" -k ")[0].split()]
    tests = [file for each in files for file in (sorted(each.rglob("*.py")) if each.is_dir() else [each])]
    parts = [*one, definition_of(one), *(without_imports(file) for file in tests)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def definition_of(one: Mutation) -> str:
    """The function or class at the top of the file that holds the quoted code; a quotation across several: all."""
    text = (ROOT / "llm_quest" / one.file).read_text(encoding="utf-8")
    if not one.file.endswith(".py"):
        return text
    parts = [ast.get_source_segment(text, node) or "" for node in ast.parse(text).body]
    return next((part for part in parts if one.right.strip() in part), text)


@functools.cache
def without_imports(file: Path) -> str:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return "\n".join(ast.unparse(node) for node in body if not isinstance(node, ast.Import | ast.ImportFrom))


def copy_tree() -> Path:
    """What git knows of this tree, as it lies here now."""
    copy = Path(tempfile.mkdtemp(prefix="mutate-"))
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def failures_with(copy: Path, mutation: Mutation) -> list[str]:
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
            out.write(run_tests(copy, tests))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert text, f"no test was run: {tests}"
    found = re.findall(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", text, re.MULTILINE)
    assert found or " passed" in text, text[-2000:]
    return list(dict.fromkeys(found))


def run_tests(copy: Path, tests: str) -> str:
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
