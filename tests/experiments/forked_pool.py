"""Workers that are forked from a process that has torch: an edited package then starts in a second of CPU, not in four.

`python forked_pool.py FD` is that process; it imports nothing of the package, because each fork has another one."""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_quest.experiments.code_tree import CodeTree

THIRD_PARTY = (
    "torch", "torch.utils.checkpoint", "torch.distributed.tensor", "numpy", "pydantic", "yaml", "tokenizers", "jinja2",
    "safetensors.torch", "filelock", "xxhash", "psutil", "jaxtyping", "asyncio", "http.client", "multiprocessing",
)  # fmt: skip


def serve(file: int) -> None:
    """Fork a worker for each message: its package's folder and its worker's file, with stdin, stdout and stderr."""
    for name in THIRD_PARTY:
        with suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=file) as channel:
        while True:
            message, files, _, _ = socket.recv_fds(channel, 1 << 16, 3)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                root, worker = message.decode().split("\0")
                for number, one in enumerate(files):
                    os.dup2(one, number)
                sys.path.insert(0, root)
                runpy.run_path(worker)["main"]()
                os._exit(0)
            channel.sendall(str(pid).encode())
            for one in files:
                os.close(one)


def make_forked_pool(jobs: int) -> Any:
    """A WorkerPool of such workers."""
    from llm_quest.experiments.code_tree import own_code
    from llm_quest.experiments.worker_pool import WORKER, Worker, WorkerPool

    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", __file__, str(theirs.fileno())]
    server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()

    class Child:
        """What a Worker needs of its process."""

        def __init__(self, root: Path, errors: Any):
            requests, answers = os.pipe(), os.pipe()
            socket.send_fds(mine, [f"{root}\0{WORKER}".encode()], [requests[0], answers[1], errors.fileno()])
            self.pid = int(mine.recv(64))
            os.close(requests[0])
            os.close(answers[1])
            self.stdin, self.stdout = os.fdopen(requests[1], "w"), os.fdopen(answers[0])

        def kill(self) -> None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

        def wait(self) -> int:
            return 0

    class ForkedWorker(Worker):
        def __init__(self, tree: CodeTree, threads: int):
            self.tree, self.errors = tree, tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
            self.process: Any = Child(tree.root, self.errors)

    class ForkedPool(WorkerPool):
        make_worker = ForkedWorker

        def forget_other_code(self) -> None:
            """End the workers of edited packages."""
            own = own_code().hash
            for worker in [one for one in self.idle if one.tree.hash != own]:
                worker.close()
                self.idle.remove(worker)
                self.workers.remove(worker)

        def __exit__(self, *given: Any) -> None:
            super().__exit__(*given)
            mine.close()
            server.wait()

    return ForkedPool(jobs)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
