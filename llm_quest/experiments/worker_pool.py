"""Runs arms in parallel, each in a process with one thread that is used again, so that torch is imported once."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from llm_quest.errors import BusyError, DataError, GuardStop, MissingError, QuestError, ResourceError, UsageError
from llm_quest.experiments.code_tree import CodeTree

WORKER = Path(__file__).with_name("worker.py")
START = "import runpy, sys; runpy.run_path(sys.argv[1])['main']()"
"""Our worker on the package of a tree, which need not have one."""
ERRORS = {error.__name__: error for error in (UsageError, DataError, MissingError, ResourceError, GuardStop)}


class Worker:
    """A process that runs the code of one tree."""

    def __init__(self, tree: CodeTree, threads: int):
        self.tree = tree
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        environment = {**os.environ, "PYTHONPATH": str(tree.root), "OMP_NUM_THREADS": str(threads)}
        environment.pop("RANK", None)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env=environment, text=True, start_new_session=True,
        )  # fmt: skip

    def start(self) -> None:
        """Wait until it has imported its package. UsageError where that is another one."""
        package, tree = self.read_answer().get("package"), self.tree
        if package is not None and Path(package).resolve() != (tree.root / "llm_quest").resolve():
            self.close()
            raise UsageError(f"{tree.root} was asked for and {package} is imported: uninstall that llm_quest")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. A mistake of the user's is raised here as it was there."""
        assert self.process.stdin is not None, "it is a pipe"
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        answer = self.read_answer()
        if "error" in answer:
            raise ERRORS.get(answer["kind"], QuestError)(answer["error"])
        return answer

    def read_answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None, "it is a pipe"
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            tail = self.errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            code = self.process.wait()
            raise ResourceError(
                f"a process that runs {self.tree.root} ended (exit code {code}): {tail or 'no message'}\n"
                "finished runs are kept: the same command goes on"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, also in the middle of a run."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()


class WorkerPool:
    """At most `jobs` requests at once; processes are started when they are first needed and used again."""

    make_worker = Worker

    def __init__(self, jobs: int, threads: int = 1):
        self.jobs, self.threads = jobs, threads
        self.executor = concurrent.futures.ThreadPoolExecutor(jobs)
        self.lock = threading.Lock()
        self.closed = False
        self.idle: list[Worker] = []
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.closed = True
            workers = list(self.workers)
        for worker in workers:  # those that are still importing their package too
            worker.close()
        self.executor.shutdown(wait=True)

    def submit(self, tree: CodeTree, request: dict[str, Any]) -> concurrent.futures.Future[dict[str, Any]]:
        return self.executor.submit(self.ask, tree, request)

    def ask(self, tree: CodeTree, request: dict[str, Any]) -> dict[str, Any]:
        worker = self.take_worker(tree)
        answer = worker.ask(request)
        with self.lock:
            self.idle.append(worker)
        return answer

    def take_worker(self, tree: CodeTree) -> Worker:
        """An idle process of this code, or a new one, in place of an idle one of other code. UsageError where
        the code has been edited since it was hashed."""
        with self.lock:
            own = next((one for one in self.idle if one.tree.hash == tree.hash), None)
            other = self.idle[0] if own is None and self.idle and len(self.workers) >= 2 * self.jobs else None
            for one in (own, other):
                if one is not None:
                    self.idle.remove(one)
        if own is not None:
            return own
        if other is not None:
            other.close()
            self.workers.remove(other)
        tree.require_unchanged()
        with self.lock:
            if self.closed:
                raise ResourceError("the workers were closed")
            worker = self.make_worker(tree, self.threads)
            self.workers.append(worker)
        worker.start()
        return worker


@contextmanager
def exclusive_pool(folder: Path, jobs: int, busy: str) -> Iterator[WorkerPool]:
    """The workers of an experiment that only one process runs at a time. busy: what else runs, and the remedy, for the
    BusyError where the folder is in use."""
    lock = FileLock(folder / "experiment.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{folder} is in use: {busy}") from None
    try:
        with WorkerPool(jobs) as pool:
            yield pool
    finally:
        lock.release()
