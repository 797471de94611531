"""The package's operators in C++ (`CPP_FILES`): compiled once per source,
torch version and compiler, on first use, and kept in the cache folder.

Without a working compiler, on another operating system than Linux and macOS, or with LLM_QUEST_NATIVE=0 everything is
computed by the plain forms; a warning has the reason. Nothing is compiled at import. The instruction set is
chosen when the operator is called, so a cache folder may be shared by unlike machines.

Commonly got wrong: a build that failed is not tried again at every call; a compiler's output is not an error message.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.cache_dirs import cache_dir, write_to_cache
from llm_quest.errors import QuestWarning

CPP_FILES = ("quantized_rows.cpp", "query_attention.cpp", "muon_step.cpp", "training_kernels.cpp")
HEADERS = (
    "quantized_tiles.h", "query_tiles.h", "muon_tiles.h", "training_tiles.h", "tiles_by_isa.h", "exponential.h",
    "vectors.h", "tensors.h", "isa.h",
)  # fmt: skip
SOURCES = [Path(__file__).with_name(name) for name in (*CPP_FILES, *HEADERS)]
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-Wall", "-ffp-contract=off")
ISA = {"best": 0, "plain": 1, "avx2": 2, "avx512": 3, "vnni": 4}
"""What the operator's last argument means."""
COMPILE_SECONDS = 300  # of one file, which takes 7 to 21 s of one core; a machine shared by many needs longer
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Library:
    """Whether the operators are loaded. loaded None: not tried yet. warned: of quantized weights without them."""

    loaded: bool | None = None
    reason: str = "not tried yet"
    warned = False


def is_loaded() -> bool:
    """Whether the C++ operators can be called; the first call outside compiled code tries to build them."""
    if Library.loaded is None and not torch.compiler.is_compiling():
        load_library()
    return bool(Library.loaded)


def is_loaded_or_warn() -> bool:
    """As `is_loaded`, for quantized weights, whose plain form is slow: a warning has the reason, once."""
    if not is_loaded() and not Library.warned and not torch.compiler.is_compiling():
        Library.warned = True
        warnings.warn(
            f"quantized weights are computed by their plain form, which is slow: {Library.reason}",
            QuestWarning,
            stacklevel=2,
        )
    return bool(Library.loaded)


def load_library() -> None:
    """Build the operators if they are not in the cache folder, and load them. Never raises: what failed is the reason
    for the plain forms."""
    try:
        torch.ops.load_library(str(build_library()))
        register_shapes()
        Library.loaded, Library.reason = True, ""
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:  # ImportError: no setuptools
        Library.loaded, Library.reason = False, describe_failure(error)


def describe_failure(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):  # its output is bytes, and warnings alone
        return f"the C++ compiler did not end within {error.timeout:g} s"
    output = getattr(error, "stderr", None)
    return (str(output).strip().splitlines() or [str(error)])[0] if output else str(error).splitlines()[0]


def build_library() -> Path:
    """The path of the shared library, in the cache folder or in a temporary one where that cannot be written."""
    name, command, link = build_plan()
    return write_to_cache("native", lambda root: compile_library(root / name, command, link))


def build_plan() -> tuple[str, list[str], list[str]]:
    """The file name of the shared library, the compiler's command and what is linked. RuntimeError where the operators
    are switched off."""
    if os.environ.get("LLM_QUEST_NATIVE", "1") == "0":
        raise RuntimeError("LLM_QUEST_NATIVE=0")
    from torch.utils import cpp_extension  # half a second to import

    command = [cpp_extension.get_cxx_compiler(), *FLAGS, *(f"-I{path}" for path in cpp_extension.include_paths())]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    identity = "\n".join([torch.__version__, *command, *(source.read_text(encoding="utf-8") for source in SOURCES)])
    return f"operators-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so", command, link


def is_built() -> bool:
    """Whether the operators are loaded, or lie in the cache folder. Builds nothing."""
    if Library.loaded is not None:
        return Library.loaded
    try:
        return (cache_dir("native") / build_plan()[0]).is_file()
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError):
        return False


def compile_library(library: Path, command: Sequence[str], link: Sequence[str]) -> Path:
    """Compile a library that is not there, its files side by side. It is written under another name and then renamed,
    so that of two processes that build it neither reads half a file. OSError where its disk is full; CalledProcessError
    of the compiler."""
    if library.exists():
        return library
    if not shutil.which(command[0]):
        raise RuntimeError(f"no C++ compiler was found ({command[0]}); install g++, or set CXX")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        objects = {source: str(Path(folder) / f"{source.stem}.o") for source in SOURCES[: len(CPP_FILES)]}
        run_compilers([[*command, "-c", str(source), "-o", objects[source]] for source in objects])
        run_compilers([[*command, "-shared", *objects.values(), "-o", str(made), *link]])
        made.replace(library)
    return library


def run_compilers(commands: Sequence[Sequence[str]]) -> None:
    """Run the commands of a compiler, at once as many as there are cores. OSError where the disk is full;
    CalledProcessError of the first that fails. None is left running."""
    waiting, running = list(commands), list[Compiler]()
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(Compiler(waiting.pop(0)))
            ended = next_ended(running)
            running.remove(ended)
            ended.check()
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()


class Compiler:
    """A command of the compiler while it runs. What it prints goes to a file, since a full pipe would stop it."""

    def __init__(self, command: Sequence[str]):
        self.printed = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self.printed, env=os.environ | {"LC_ALL": "C"}
        )

    def check(self) -> None:
        """OSError or CalledProcessError of an ended command that failed."""
        self.printed.seek(0)
        printed, failed = self.printed.read(), self.process.returncode
        if failed and (full := [code for code in DISK_FULL if os.strerror(code) in printed]):
            raise OSError(full[0], os.strerror(full[0]))
        if failed:
            raise subprocess.CalledProcessError(failed, self.process.args, stderr=printed)


def next_ended(running: Sequence[Compiler]) -> Compiler:
    """Wait until one of these commands has ended."""
    deadline = time.monotonic() + COMPILE_SECONDS
    while time.monotonic() < deadline:
        for one in running:
            if one.process.poll() is not None:
                return one
        time.sleep(0.02)
    raise subprocess.TimeoutExpired(running[0].process.args, COMPILE_SECONDS)


def register_shapes() -> None:
    """The shape rules of the operators, for compiling and the meta device."""

    @torch.library.register_fake("llm_quest::quantized_rows")
    def _(x: Tensor, q: Tensor, scale: Tensor, levels: Tensor, format: int, isa: int) -> Tensor:
        return x.new_empty(x.shape[0], q.shape[0])

    @torch.library.register_fake("llm_quest::float_rows")
    def _(x: Tensor, weight: Tensor, isa: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake("llm_quest::query_attention")
    def _(q: Tensor, k: Tensor, v: Tensor, mask: Any, sink: Any, scale: float, softcap: float, isa: int) -> Tensor:
        return q.new_empty(*q.shape[:3], v.shape[3])

    torch.library.register_fake("llm_quest::muon_step", lambda *arguments: None)
