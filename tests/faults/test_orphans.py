"""No child outlives its parent, however the parent ends and whatever the child is doing."""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import llm_quest
from llm_quest import child_process
from llm_quest.child_process import end_with_parent
from llm_quest.data.template_sandbox import render_prompt
from llm_quest.rollouts.worker_process import WorkerProcess
from tests.sources import nodes_of

PACKAGE = Path(llm_quest.__file__).parent
processes = multiprocessing.get_context("spawn")
STARTS_PROCESSES = {
    "rollouts/worker_process.py": "calls end_with_parent",
    "data/template_sandbox.py": "calls end_with_parent",
    "experiments/worker_pool.py": "watches its stdin, which ends with the parent (experiments/worker.py)",
    "experiments/code_tree.py": "git in a copy of this package: it ends by itself",
    "machine/compiler.py": "a compiler with five lines: it ends by itself",
    "layers/native.py": "compilers with one file each, which end by themselves and are killed where one fails",
    "hub/wllama.py": "npm pack, which is given a time: it ends by itself",
    "cli/doctor.py": "git in this package's own checkout: it ends by itself",
}


def make_handler(file: str) -> Callable[[Any], Any]:
    """A reward that never answers: a regular expression holds the interpreter, so that no thread of it runs."""

    def answer(request: str) -> Any:
        Path(file).write_text(str(os.getpid()))
        if request == "in C":
            return bool(re.fullmatch("(a+)+b", "a" * 60))
        while True:
            time.sleep(0.1)

    return answer


def run_worker(file: str, request: str, in_thread: bool) -> None:
    def work() -> None:
        WorkerProcess(make_handler, file).call(request, 1000.0)

    if in_thread:
        threading.Thread(target=work, daemon=True).start()
        time.sleep(1000)
    work()


def render_forever(file: str) -> None:
    from llm_quest.data import template_sandbox

    template_sandbox.CPU_SECONDS = 1000
    note = f"import os; open({file!r}, 'w').write(str(os.getpid())); "
    template_sandbox.WORKER_COMMAND = note + template_sandbox.WORKER_COMMAND
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template_sandbox.render_prompt(endless, [{"role": "user", "content": "x"}])


CHILDREN: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "a worker in a call of C": (run_worker, ("in C", False)),
    "a worker that a thread started": (run_worker, ("in Python", True)),
    "a chat template without end": (render_forever, ()),
}


def number_in(file: Path) -> int:
    limit = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < limit, "the child never began"
        time.sleep(0.02)
    return int(file.read_text())


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_ends_when_its_parent_is_killed(name: str, tmp_path: Path) -> None:
    target, arguments = CHILDREN[name]
    parent = processes.Process(target=target, args=(str(tmp_path / "pid"), *arguments))
    parent.start()
    child = number_in(tmp_path / "pid")
    time.sleep(0.3)  # it is in its endless work
    assert is_running(child)
    parent.kill()
    parent.join()
    limit = time.monotonic() + 10
    while is_running(child) and time.monotonic() < limit:
        time.sleep(0.02)
    alive = is_running(child)
    if alive:
        os.kill(child, 9)
    assert not alive, "it outlived its parent"


def make_environment_reader() -> Callable[[Any], Any]:
    return os.environ.get


def test_a_child_runs_no_file_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's folder, in which a command is given, has modules of the names that a child begins with."""
    for name in ("multiprocessing", "pickle", "random", "socket", "json", "llm_quest"):
        (tmp_path / f"{name}.py").write_text("open('it ran', 'w').close()\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with WorkerProcess(make_environment_reader) as worker:
        assert worker.call("PYTHONSAFEPATH", 30.0) is None, "what a reward starts would be another Python"
    assert "PYTHONSAFEPATH" not in os.environ
    assert render_prompt("{{ messages[0].content }}", [{"role": "user", "content": "hi"}]) == "hi"
    assert not (tmp_path / "it ran").exists()


def test_every_python_that_is_started_looks_for_no_module_in_the_working_folder() -> None:
    """`-P`, a folder of its own, or PYTHONSAFEPATH."""
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "sys.executable" in text or "get_context(" in text:
            assert re.search(r'"-P"|without_working_folder\(\)|cwd=Path\(__file__\)', text), file


def test_where_there_is_no_death_signal_a_thread_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(child_process, "_request_death_signal", lambda: False)
    monkeypatch.setattr(child_process, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", ended.append)
    end_with_parent(os.getppid())
    assert any(thread.name == "parent" for thread in threading.enumerate())
    assert ended == []
    monkeypatch.setattr(os, "getppid", lambda: 1)  # the parent is gone, and another process took this one over
    limit = time.monotonic() + 10
    while not ended and time.monotonic() < limit:
        time.sleep(0.01)
    assert ended[0] == 1


def test_every_module_that_starts_a_process_says_how_it_ends() -> None:
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "subprocess" in text or "multiprocessing" in text:
            calls = [node.func for node in nodes_of(file) if isinstance(node, ast.Call)]
            names = {ast.unparse(call).rpartition(".")[2] if isinstance(call, ast.Attribute) else "" for call in calls}
            if names & {"run", "Popen", "Process", "get_context", "check_output", "call"}:
                name = str(file.relative_to(PACKAGE))
                found.add(name)
                assert ("end_with_parent" in text) == ("end_with_parent" in STARTS_PROCESSES.get(name, "")), name
    assert found == set(STARTS_PROCESSES)
