"""The C++ compiler is tried, never assumed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from llm_quest.machine import compiler
from llm_quest.machine.compiler import find_cpp_compiler, missing_compiler_hint, try_cpp_compiler


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(find_cpp_compiler() is None, reason="needs a C++ compiler")
def test_a_compiler_that_works_is_found_and_loads_what_it_made():
    trial = try_cpp_compiler()
    assert trial.works, trial.problem
    assert trial.path == find_cpp_compiler()
    assert trial.seconds > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'trial.cpp:2: fatal error: cmath: No such file' >&2; exit 1", "fatal error: cmath: No such file"),
        ("exit 1", "no message"),
        ("exit 0", "cannot be loaded"),
    ],
)
def test_one_that_fails_says_why(tmp_path, text, said):
    trial = try_cpp_compiler(script(tmp_path / "cxx", text))
    assert not trial.works
    assert said in trial.problem


def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    """The compiler's own child keeps its output open; nobody waits for it."""
    witness = tmp_path / "child-lived"
    slow = script(tmp_path / "cxx", f"(sleep 2; touch {witness}) & sleep 60")
    began = time.monotonic()
    trial = try_cpp_compiler(slow, timeout=0.2)
    assert time.monotonic() - began < 2
    assert "did not compile five lines in 0.2 s" in trial.problem
    time.sleep(max(0.0, began + 2.3 - time.monotonic()))
    assert not witness.exists()


def test_one_that_may_not_be_run_is_no_crash(tmp_path):
    (tmp_path / "cxx").write_text("text")
    assert "cannot be run" in try_cpp_compiler(str(tmp_path / "cxx")).problem


def test_without_a_compiler_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_cpp_compiler() is None
    assert "install g++" in try_cpp_compiler().problem
    script(tmp_path / "clang++", "exit 0")
    assert missing_compiler_hint() == "set CXX=clang++", "torch.compile does not look for it by itself"
    monkeypatch.setenv("CXX", "clang++")
    assert find_cpp_compiler() == str(tmp_path / "clang++")
    monkeypatch.setenv("CXX", "nowhere++")
    assert "CXX names nowhere++" in try_cpp_compiler().problem


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_searches_where_we_do(monkeypatch):
    from torch._inductor import config

    monkeypatch.delenv("CXX", raising=False)
    found = next(name for name in config.cpp.cxx if name)
    assert shutil.which(found) == compiler.find_cpp_compiler()
