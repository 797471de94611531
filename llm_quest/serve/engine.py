"""The engine's thread: steps the running batches of all models, and hands out what each step made."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.serve.batch import RunningBatch
from llm_quest.serve.requests import GenerationRequest

IDLE_SECONDS = 0.5


class QueueFull(Exception):
    """The queue of requests is full."""


class ServingEngine:
    """Runs requests until `stop`. batches: one for each model name. max_waiting: requests that may wait for a slot.
    after_step: called once behind every step, in the engine's thread."""

    def __init__(
        self,
        batches: Mapping[str, RunningBatch],
        *,
        max_waiting: int,
        log: LogFn,
        after_step: Callable[[], None] = lambda: None,
    ):
        self.batches, self.max_waiting, self.log, self.after_step = batches, max_waiting, log, after_step
        self.arrived: list[tuple[str, GenerationRequest]] = []
        self.jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.wake = threading.Condition()
        self.running = False
        self.thread = threading.Thread(target=self.run, name="quest serve engine", daemon=True)

    def start(self) -> None:
        self.running = True
        self.thread.start()

    def stop(self) -> None:
        """End after the step that is running."""
        with self.wake:
            self.running = False
            self.wake.notify()
        self.thread.join()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive() and self.running

    @property
    def num_waiting(self) -> int:
        return len(self.arrived) + len(self.jobs) + sum(len(batch.waiting) for batch in self.batches.values())

    def submit(self, model_name: str, request: GenerationRequest) -> None:
        """Queue a request. QueueFull where too many wait."""
        with self.wake:
            if self.num_waiting >= self.max_waiting:
                raise QueueFull
            self.arrived.append((model_name, request))
            self.wake.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Free the request's slots at the beginning of the next step."""
        with self.wake:
            request.cancelled = True
            self.wake.notify()

    def call(self, job: Callable[[], Any]) -> Future[Any]:
        """Run a function of the models in the engine's thread, between two steps."""
        future: Future[Any] = Future()
        with self.wake:
            self.jobs.append((job, future))
            self.wake.notify()
        return future

    def run(self) -> None:
        """The thread: step while there is work, wait otherwise."""
        while self.running:
            with self.wake:
                if not (self.arrived or self.jobs or any(batch.has_work for batch in self.batches.values())):
                    self.wake.wait(IDLE_SECONDS)
                for name, request in self.arrived:
                    self.batches[name].waiting.append(request)
                self.arrived.clear()
            self.step()
            if self.jobs:
                resolve_future(*self.jobs.popleft())

    def step(self) -> None:
        """One step of every model that has work."""
        for name, batch in self.batches.items():
            if not batch.has_work:
                continue
            try:
                events = batch.step()
            except Exception as error:
                self.log(f"{name}: a step failed, and its requests with it\n{traceback.format_exc().strip()}")
                events = batch.fail_all(f"the server could not compute this: {type(error).__name__}")
            for request, request_events in events.items():
                request.deliver(request, request_events)
        self.after_step()


def resolve_future(job: Callable[[], Any], future: Future[Any]) -> None:
    """Set the result of a job, or the exception that it raised."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
