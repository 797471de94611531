"""What one system has and another lacks is tried, never assumed: a law over the syntax tree, and each call refused."""

from __future__ import annotations

import ast
import errno
import functools
import importlib
import io
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quest import atomic_dirs, child_process, files, tensor_files
from llm_quest.cli.output import require_extra
from llm_quest.data import image_datasets, template_sandbox, tokens
from llm_quest.data.problems import Problem
from llm_quest.data.row_files import iter_parquet
from llm_quest.data.sources import DataSource, iter_hub_rows
from llm_quest.data.template_sandbox import render_prompt
from llm_quest.errors import DataError, MissingError
from llm_quest.hub import gguf
from llm_quest.hub import mmap as hub_mmap
from llm_quest.hub.load_save import load, save
from llm_quest.hub.verify import import_transformers
from llm_quest.machine import compiler, hardware, probe
from llm_quest.models.build import build
from llm_quest.rollouts.verifier_process import verify_with_math_verify
from llm_quest.train.signals import available_signals
from llm_quest.train.trackers import TRACKERS
from tests.data.test_template_sandbox import CHATML, DOUBLING, HELLO
from tests.sources import package_files, parse_file

PACKAGE = Path(__file__).parents[2] / "llm_quest"
MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "msvcrt", "winreg", "_winapi"}
"""Modules that a system may lack."""
NAMES = {
    name: set(words.split())
    for name, words in {
        "os": """
            F_LOCK F_TEST F_TLOCK F_ULOCK NGROUPS_MAX NODEV O_BINARY O_CLOEXEC O_DIRECT O_DIRECTORY O_NOFOLLOW
            O_NOFOLLOW_ANY O_NONBLOCK O_PATH O_SYNC O_TMPFILE POSIX_FADV_DONTNEED POSIX_FADV_NOREUSE
            POSIX_FADV_NORMAL POSIX_FADV_RANDOM POSIX_FADV_SEQUENTIAL POSIX_FADV_WILLNEED WCONTINUED WCOREDUMP
            WEXITED WEXITSTATUS WIFCONTINUED WIFEXITED WIFSIGNALED WIFSTOPPED WNOHANG WNOWAIT WSTOPPED WSTOPSIG
            WTERMSIG WUNTRACED add_dll_directory chflags chown chroot confstr confstr_names copy_file_range ctermid
            environb eventfd eventfd_read eventfd_write fchdir fchmod fchown fdatasync fork forkpty fpathconf
            fstatvfs fwalk get_blocking get_handle_inheritable getegid getenvb geteuid getgid getgrouplist getgroups
            getloadavg getpgid getpgrp getpriority getrandom getresgid getresuid getsid getuid getxattr grantpt
            initgroups killpg lchflags lchmod lchown listdrives listmounts listvolumes listxattr lockf login_tty
            major makedev memfd_create minor mkfifo mknod nice openpty pathconf pathconf_names pidfd_open pipe2
            plock posix_fadvise posix_fallocate posix_openpt posix_spawn posix_spawnp pread preadv ptsname pwrite
            pwritev readv register_at_fork removexattr sched_get_priority_max sched_get_priority_min
            sched_getaffinity sched_getparam sched_getscheduler sched_param sched_rr_get_interval sched_setaffinity
            sched_setparam sched_setscheduler sched_yield sendfile set_blocking set_handle_inheritable setegid
            seteuid setgid setgroups setns setpgid setpgrp setpriority setregid setresgid setresuid setreuid setsid
            setuid setxattr spawnlp spawnlpe spawnvp spawnvpe splice startfile statvfs statx statx_result
            struct_rusage sync sysconf sysconf_names tcgetpgrp tcsetpgrp timerfd_create timerfd_gettime
            timerfd_gettime_ns timerfd_settime timerfd_settime_ns ttyname uname unlockpt unshare wait wait3 wait4
            waitid waitid_result writev
        """,
        "signal": """
            CTRL_BREAK_EVENT CTRL_C_EVENT ITIMER_PROF ITIMER_REAL ITIMER_VIRTUAL ItimerError SIGALRM SIGBREAK SIGBUS
            SIGCHLD SIGCLD SIGCONT SIGEMT SIGHUP SIGINFO SIGIO SIGIOT SIGKILL SIGPIPE SIGPOLL SIGPROF SIGPWR SIGQUIT
            SIGRTMAX SIGRTMIN SIGSTKFLT SIGSTOP SIGSYS SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2
            SIGVTALRM SIGWINCH SIGXCPU SIGXFSZ SIG_BLOCK SIG_SETMASK SIG_UNBLOCK Sigmasks alarm getitimer pause
            pidfd_send_signal pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait
            sigwaitinfo struct_siginfo
        """,
        "mmap": """
            MADV_HUGEPAGE MADV_RANDOM MADV_REMOVE MADV_SEQUENTIAL MADV_WILLNEED MAP_ANON MAP_ANONYMOUS MAP_POPULATE
            MAP_PRIVATE MAP_SHARED MAP_STACK PROT_EXEC PROT_READ PROT_WRITE madvise resize
        """,
        "time": """
            CLOCK_BOOTTIME CLOCK_MONOTONIC CLOCK_MONOTONIC_RAW CLOCK_MONOTONIC_RAW_APPROX CLOCK_PROCESS_CPUTIME_ID
            CLOCK_REALTIME CLOCK_THREAD_CPUTIME_ID clock_getres clock_gettime clock_gettime_ns clock_settime
            clock_settime_ns pthread_getcpuclockid tzset
        """,
        "faulthandler": """
            register unregister
        """,
        "select": """
            PIPE_BUF devpoll epoll kevent kqueue poll
        """,
    }.items()
}
"""Attributes that a system may lack: those behind `sys.platform` in typeshed, without flags of Linux alone."""
NAMED_SYSTEMS = {
    "machine/compiler.py": "the compiler that torch.compile calls there is torch's choice by name",
    "machine/hardware.py": "the unit of ru_maxrss is another on macOS, and no call tells it",
}
"""Files that may ask for the system's name, and why."""


@functools.cache
def sources() -> list[tuple[str, ast.Module]]:
    return [(str(path.relative_to(PACKAGE)), parse_file(path)) for path in package_files(PACKAGE)]


def guards(node: ast.AST, wanted: str) -> bool:
    """Whether a statement catches that something is missing. wanted: the error."""
    if isinstance(node, ast.Try):
        caught = {
            one.id
            for handler in node.handlers
            if handler.type
            for one in ast.walk(handler.type)
            if isinstance(one, ast.Name)
        }
    elif isinstance(node, ast.With):
        calls = [item.context_expr for item in node.items if "suppress" in ast.unparse(item.context_expr)]
        caught = {one.id for call in calls for one in ast.walk(call) if isinstance(one, ast.Name)}
    else:
        return False
    return bool(caught & {wanted, "Exception"})


def uses_without_guard(tree: ast.Module) -> list[str]:
    """Uses of what a system may lack outside a guard."""
    found: list[str] = []

    def visit(node: ast.AST, errors: frozenset[str]) -> None:
        if isinstance(node, ast.Try | ast.With):
            inside = errors | {one for one in ("AttributeError", "ImportError") if guards(node, one)}
            for child in node.body:
                visit(child, inside)
            for child in ast.iter_child_nodes(node):
                if child not in node.body:
                    visit(child, errors)
            return
        if isinstance(node, ast.Import) and "ImportError" not in errors:
            found.extend(f"{node.lineno}: import {one.name}" for one in node.names if one.name in MODULES)
        if isinstance(node, ast.ImportFrom) and "ImportError" not in errors:
            module, names = node.module or "", {one.name for one in node.names}
            missing = names if module in MODULES else NAMES.get(module, set()) & names
            found.extend(f"{node.lineno}: from {module} import {name}" for name in missing)
        is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_attribute and node.attr in NAMES.get(node.value.id, ()) and "AttributeError" not in errors:
            found.append(f"{node.lineno}: {node.value.id}.{node.attr}")
        for child in ast.iter_child_nodes(node):
            visit(child, errors)

    visit(tree, frozenset())
    return found


def test_what_a_system_may_lack_is_used_inside_a_guard():
    assert {path: uses for path, tree in sources() if (uses := uses_without_guard(tree))} == {}


def test_no_file_asks_for_the_systems_name():
    asking = {
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("sys.platform", "os.name", "platform.system")
        and not is_reported(tree, node)
    }
    assert asking == set(NAMED_SYSTEMS)


def is_reported(tree: ast.Module, node: ast.AST) -> bool:
    """Whether the name is written down, as in `quest doctor`, and nothing is decided by it."""
    return not any(
        node in ast.walk(test)
        for decision in ast.walk(tree)
        for test in ([decision] if isinstance(decision, ast.Compare) else [])
    )


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import os\nos.killpg(1, 2)", ["2: os.killpg"]),
        ("import resource", ["1: import resource"]),
        ("from os import fork", ["1: from os import fork"]),
        ("import os\ntry:\n    os.fork()\nexcept OSError:\n    os.fork()", ["3: os.fork", "5: os.fork"]),
        ("import os\ntry:\n    os.fork()\nexcept (AttributeError, OSError):\n    pass", []),
        ("import contextlib, os\nwith contextlib.suppress(AttributeError):\n    os.fork()", []),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
    ],
)
def test_the_law_sees_what_it_must(source: str, uses: list[str]):
    assert uses_without_guard(ast.parse(source)) == uses


REFUSING = """
import resource
allowed = resource.setrlimit
def refuse(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    allowed(kind, limits)
resource.setrlimit = refuse
"""


def test_a_template_is_rendered_and_an_attack_ends_where_the_address_space_cannot_be_limited(monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(template_sandbox, "WORKER_COMMAND", REFUSING + template_sandbox.WORKER_COMMAND)
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 20)  # on a slow machine they end before the memory
    assert render_prompt(CHATML, HELLO).startswith("<|im_start|>user\nhello")
    with pytest.raises(DataError, match="MemoryError: more than its share of memory"):
        render_prompt(DOUBLING, HELLO)


def test_a_template_is_rendered_and_an_endless_one_ends_where_there_are_no_limits(monkeypatch):
    """As on Windows."""
    missing = "import sys, psutil\nsys.modules['resource'] = None\n"
    monkeypatch.setattr(template_sandbox, "WORKER_COMMAND", missing + template_sandbox.WORKER_COMMAND)
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 20)
    assert render_prompt(CHATML, HELLO).startswith("<|im_start|>user\nhello")
    with pytest.raises(DataError, match="MemoryError: more than its share of memory"):
        render_prompt(DOUBLING, HELLO)
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 0)
    monkeypatch.setattr(template_sandbox, "WAIT_SECONDS", 1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="did not end within 1 s"):
        render_prompt(endless, HELLO)


@pytest.mark.parametrize("number", files.NO_FSYNC)
def test_a_folder_that_cannot_be_synced_is_passed_over(number: int, tmp_path: Path, monkeypatch):
    def refuse(handle: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    files.fsync_path(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_device_that_fails_is_an_error(number: int, tmp_path: Path, monkeypatch):
    def fail(handle: int) -> None:
        raise OSError(number, "failed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="failed"):
        files.fsync_path(tmp_path)


@pytest.mark.parametrize("refusals", [0, 2, 99])
def test_a_file_that_a_reader_has_open_is_replaced_a_little_later(refusals: int, tmp_path: Path, monkeypatch):
    """As on Windows."""
    calls, replace = [], os.replace

    def refuse(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) <= refusals:
            raise PermissionError(errno.EACCES, "in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if refusals == 99:
        with pytest.raises(PermissionError):
            files.atomic_write_text(tmp_path / "a", "new")
        assert list(tmp_path.iterdir()) == []
        return
    files.atomic_write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_memory_without_large_pages_is_memory(error: type[Exception], monkeypatch):
    def refuse(*given: object, **more: object) -> None:
        raise error("no such pages")

    monkeypatch.setattr(mmap, "mmap", refuse)
    made = tensor_files.empty_huge_pages((2048, 1024), device="cpu", dtype=torch.float32)
    assert made.shape == (2048, 1024)


def test_numbers_of_a_file_that_cannot_be_mapped_are_read(tmp_path: Path, monkeypatch):
    def refuse(*given: object, **more: object) -> None:
        raise OSError(errno.ENODEV, "no such device")

    folder = save(build("llama3.2-tiny", seed=1), tmp_path / "model")
    before = [parameter.clone() for parameter in load(folder).parameters()]
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "ids")
    monkeypatch.setattr(mmap, "mmap", refuse)
    for known in (True, False):
        monkeypatch.setattr("llm_quest.hub.mmap.can_replace_mapped_files", lambda known=known: known)
        read = load(folder).parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, read, strict=True))
    assert tokens.map_numbers(tmp_path / "ids", "uint16").tolist() == list(range(9))


@pytest.mark.parametrize("call", ["mmap.mmap", "os.replace"])
def test_a_system_that_refuses_to_rename_over_a_mapped_file_is_found_out(call: str, monkeypatch):
    def refuse(*given: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "in use")

    assert hub_mmap.can_replace_mapped_files.__wrapped__()
    monkeypatch.setattr(call, refuse)
    assert not hub_mmap.can_replace_mapped_files.__wrapped__()


def test_a_compiler_that_hangs_is_ended_where_groups_cannot_be_killed(tmp_path: Path, monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(os, "killpg")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    compiler.kill_with_children(process)
    assert process.returncode is not None


def give_huge_pages(tmp_path: Path) -> None:
    assert tensor_files.empty_huge_pages((2048, 1024), device="cpu", dtype=torch.float32).shape == (2048, 1024)


def end_a_compiler(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    compiler.kill_with_children(process)
    assert process.returncode is not None


def count_cores_and_memory(tmp_path: Path) -> None:
    assert hardware.affinity() == (os.cpu_count() or 1)
    assert (hardware.peak_memory_bytes() or 1) > 0


def count_preemptions(tmp_path: Path) -> None:
    assert probe.count_preemptions() == 0


def exchange_two_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    atomic_dirs.exchange_names(tmp_path / "a", tmp_path / "b")
    assert [one.name for one in (tmp_path / "a").iterdir()] == ["b"]


def ask_for_a_death_signal(tmp_path: Path) -> None:
    child_process.end_with_parent(os.getppid())  # a thread looks


def reserve_room(tmp_path: Path) -> None:
    with (tmp_path / "file").open("xb") as file:
        gguf.reserve(file, 4096)
        assert file.write(b"x") == 1


GOES_ON = {
    "hub/gguf.py": (gguf, reserve_room),
    "tensor_files.py": (tensor_files, give_huge_pages), "machine/compiler.py": (compiler, end_a_compiler),
    "machine/hardware.py": (hardware, count_cores_and_memory), "machine/probe.py": (probe, count_preemptions),
    "atomic_dirs.py": (atomic_dirs, exchange_two_folders), "child_process.py": (child_process, ask_for_a_death_signal),
}  # fmt: skip
"""File -> its module, and what goes on without the calls that a system may lack. data/template_sandbox.py makes them in
a process of its own (two tests above)."""


@functools.cache
def calls_that_may_lack() -> dict[str, set[str]]:
    """File -> "module.name" of what it uses and a system may lack or refuse, as the syntax tree has it."""
    found: dict[str, set[str]] = {}
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = node.value.id, node.attr
                if module in MODULES or name in NAMES.get(module, ()) or (module, name) == ("ctypes", "CDLL"):
                    found.setdefault(path, set()).add(f"{module}.{name}")
    return found


class Lacking:
    """A module in which some names are missing, or are calls that fail."""

    def __init__(self, real: Any, names: set[str], error: type[Exception]):
        self.real, self.names, self.error, self.asked = real, names, error, set[str]()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if name not in self.names:
            return value
        self.asked.add(f"{self.real.__name__}.{name}")
        if self.error is AttributeError:
            raise AttributeError(f"this system has no {name}")
        return self.refuse if callable(value) else value

    def refuse(self, *given: object, **more: object) -> None:
        raise OSError(errno.EPERM, "refused")


def test_every_file_that_makes_such_a_call_is_known():
    assert calls_that_may_lack().keys() - {"data/template_sandbox.py"} == GOES_ON.keys()


@pytest.mark.parametrize("error", [AttributeError, OSError])
@pytest.mark.parametrize("path", GOES_ON)
def test_a_feature_goes_on_where_its_call_is_missing_or_refused(
    path: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The call is made, and fails."""
    module, feature = GOES_ON[path]
    calls = calls_that_may_lack()[path]
    proxies = []
    for name in {call.split(".")[0] for call in calls}:
        names = {call.split(".")[1] for call in calls if call.startswith(f"{name}.")} | {"mmap"}
        lacking = Lacking(importlib.import_module(name), names, error)
        proxies.append(lacking)
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lacking)
        else:  # imported where it is used
            monkeypatch.setitem(sys.modules, name, lacking)
    feature(tmp_path)
    assert set().union(*(lacking.asked for lacking in proxies)) & (calls | {"mmap.mmap"})


def test_all_cores_are_counted_where_the_system_names_none(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert hardware.affinity() == (os.cpu_count() or 1)


def test_signals_that_a_system_lacks_are_left_out():
    assert available_signals("SIGINT", "SIGNONE") == available_signals("SIGINT")


EXTRAS: dict[str, Callable[[], object]] = {
    "pyarrow": lambda: next(iter_parquet(io.BytesIO(), Path("a.parquet"))),
    "datasets": lambda: next(iter_hub_rows(DataSource("hf:some/rows"))),
    "sklearn": image_datasets.load_sklearn_digits,
    "math_verify": lambda: verify_with_math_verify(Problem("", "1", "", ""), "1"),
    "transformers": import_transformers,
    "lm_eval": lambda: require_extra("harness", "lm_eval"),
    "starlette": lambda: require_extra("serve", "starlette", "uvicorn", "llguidance"),
    "uvicorn": lambda: require_extra("serve", "uvicorn"),
    "llguidance": lambda: require_extra("serve", "llguidance"),
    "wandb": TRACKERS["wandb"],
    "trackio": TRACKERS["trackio"],
    "tensorboard": TRACKERS["tensorboard"],
}
"""Package of an extra -> what needs it."""
BEHIND_REQUIRE_EXTRA = {"serve", "lm_eval_harness.py"}
"""Where such packages are imported as usual: a command has asked for them before."""


@pytest.mark.parametrize("package", EXTRAS)
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise TypeError('Descriptors cannot be created directly')", r"cannot be imported \(TypeError: Descriptors"),
        ("import no_such_package", "cannot be imported .*No module named .no_such_package"),
        (None, "is not installed"),
    ],
    ids=["broken", "lacks", "missing"],
)
def test_an_extra_that_is_missing_or_cannot_be_imported_is_one_message(
    package: str, code: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two packages that do not go together raise what they like when they are imported."""
    for name in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    if code is None:
        monkeypatch.setitem(sys.modules, package, None)  # Python says ModuleNotFoundError then
    else:
        (tmp_path / f"{package}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingError, match=f"{package} (is installed and )?{said}.*pip install"):
        EXTRAS[package]()


def test_a_package_of_an_extra_is_imported_by_import_extra():
    known = {*EXTRAS, "torch.utils.tensorboard"}
    lines = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    ours = "".join(line for line in lines.splitlines() if not line.startswith(("test ", "bench ", "book ", "dev ")))
    listed = {name.replace("-", "_") for name in re.findall(r'"([a-z\-]+)', ours.partition("[")[0])}
    assert {one.replace("scikit_learn", "sklearn") for one in listed} <= known
    for file in sorted(PACKAGE.rglob("*.py")):
        if BEHIND_REQUIRE_EXTRA & set(file.parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found = known & {part for name in names for part in (name, name.partition(".")[0])}
            assert not found, f"{file}:{node.lineno}: import_extra imports {', '.join(found)}"
