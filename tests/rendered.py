"""Conversations that a chat template renders once in a process of the tests, and without starting an interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

RENDERED: dict[str, Any] = {}
"""What templates made of conversations in this process."""

SERVER = """
import ctypes, gc, io, json, os, sys
import jinja2.ext, jinja2.sandbox
from llm_quest.data.template_sandbox import run_worker
gc.freeze()
for line in sys.stdin:
    head, _, jobs = json.loads(line).partition("\\n")
    request = json.dumps(json.loads(head) | {"parent": os.getpid()}) + "\\n" + jobs
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.dup2(writing, 1)
            sys.stdin, sys.stdout = io.StringIO(request), open(1, "w", encoding="utf-8", closefd=False)
            run_worker()
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        said = file.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
"""


class TemplateServer:
    """An interpreter that has Jinja and forks a process for each batch, with the limits of one that is started anew: a
    hundredth of a second in place of a third."""

    def __init__(self) -> None:
        self.lock, self.owner = threading.Lock(), 0

    def run(self, request: str) -> subprocess.CompletedProcess[str]:
        with self.lock:
            if self.owner != os.getpid():  # a forked process has a server of its own
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                self.owner, self.process = (
                    os.getpid(),
                    subprocess.Popen([sys.executable, "-P", "-c", SERVER], text=True, encoding="utf-8", **pipes),
                )
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return subprocess.CompletedProcess((), *json.loads(self.process.stdout.readline()), stderr="")


def render_once() -> None:
    """A chat template is rendered in a process of its own, a third of a second each time: here the same conversations
    are rendered once by the same template under the same limits, in a process that is forked. What fails there is
    rendered as everywhere, and an error is never kept."""
    from llm_quest.data import template_sandbox

    render, command, server = template_sandbox.run_batch, template_sandbox.WORKER_COMMAND, TemplateServer()

    def run_once(settings: Any, jobs: Any) -> Any:
        key = f"{template_sandbox.WORKER_COMMAND} {template_sandbox.CPU_SECONDS} {settings} {jobs}"
        if key not in RENDERED:
            RENDERED[key] = render(settings, jobs)
        return RENDERED[key]

    def run(words: list[str], *, input: str, **options: Any) -> subprocess.CompletedProcess[str]:
        if words[-1] == command and (done := server.run(input)).returncode == 0:
            return done
        return subprocess.run(words, input=input, **options)

    template_sandbox.run_batch = run_once
    template_sandbox.subprocess = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
