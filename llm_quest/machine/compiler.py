"""The C++ compiler of torch.compile: found, and tried on a small program, because a compiler that is there may lack
its standard library, OpenMP or Python's headers."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRIAL_SECONDS = 20.0
"""A compiler that takes longer for the trial's few lines counts as one that does not work."""
TRIAL = """\
#include <Python.h>
#include <cmath>
#include <omp.h>
extern "C" double trial(double x) { return std::sqrt(x); }
"""


@dataclass(frozen=True)
class CompilerTrial:
    """Whether there is a C++ compiler that works. path: None where there is no compiler. problem: why it does not work;
    empty if it does. seconds: that the trial took."""

    path: str | None
    problem: str
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        return not self.problem


def find_cpp_compiler() -> str | None:
    """The path of the compiler that torch.compile calls on the CPU: $CXX, otherwise g++ (clang++ on macOS)."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def missing_compiler_hint() -> str:
    """What to do where `find_cpp_compiler` finds none. torch.compile does not look for clang++ by itself on Linux."""
    named = os.environ.get("CXX")
    if named:
        return f"CXX names {named}, which cannot be found; unset it, or name a compiler"
    return "set CXX=clang++" if shutil.which("clang++") else "install g++, or set CXX"


def try_cpp_compiler(path: str | None = None, timeout: float = TRIAL_SECONDS) -> CompilerTrial:
    """Compile and load a shared library, as torch.compile does with each kernel."""
    path = find_cpp_compiler() if path is None else path
    if path is None:
        return CompilerTrial(None, f"no C++ compiler was found ({missing_compiler_hint()})")
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="llm-quest-compiler-") as folder:
            problem = _compile_trial(path, Path(folder), timeout)
    except OSError as error:
        problem = f"{path} cannot be run: {error.strerror or error}"
    return CompilerTrial(path, problem, time.perf_counter() - began)


def _compile_trial(path: str, folder: Path, timeout: float) -> str:
    """The problem, empty if there is none. The messages go to a file: a pipe would stay open for as long as any process
    that the compiler started lives."""
    source, library, messages = folder / "trial.cpp", folder / "trial.so", folder / "messages"
    source.write_text(TRIAL, encoding="utf-8")
    command = [path, "-shared", "-fPIC", "-O1", "-fopenmp", f"-I{sysconfig.get_path('include')}", str(source)]
    with messages.open("w", encoding="utf-8") as file:
        trial = subprocess.Popen(
            [*command, "-o", str(library)], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = trial.wait(timeout)
        except subprocess.TimeoutExpired:
            kill_with_children(trial)
            return f"{path} did not compile five lines in {timeout:.3g} s"
    if code:
        lines = messages.read_text(encoding="utf-8", errors="replace").splitlines()
        reason = next((line.strip() for line in lines if "error" in line.lower()), "no message")
        return f"{path} fails on five lines ({reason[:200]})"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"{path} makes libraries that cannot be loaded ({str(error)[:200]})"
    return ""


def kill_with_children(process: subprocess.Popen[Any]) -> None:
    """Kill a process that has a session of its own, with all that it started where the system can do that."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # Windows has no such call; a group that has ended is none
        process.kill()
    process.wait()
