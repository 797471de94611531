"""Carries events from the engine's thread to the tasks of the event loop that answer: at most one wake-up for a step,
and of an answer that is not streamed one for each of its requests.

Waking a task for every token of every request costs more than a small model's pass, and takes Python's lock from it. So
the more streams are open, the more tokens each takes with one write:

    32 streams, steps of 27 ms     told    t t t t t      a pause of 32 x 1.5 ms = 48 ms is two steps long
                                   woken   x . x . x"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from llm_quest.serve.requests import Event, GenerationRequest, PromptRead, RequestFailed

Result = TypeVar("Result")
PAUSE_SECONDS = 0.0015
"""Between two writes of a stream, for each stream that writes: a write costs about a tenth of it."""


def ends_request(request: GenerationRequest, event: Event) -> bool:
    """Whether a choice of the request, or all of it, ends with this event."""
    if isinstance(event, PromptRead):
        return request.read_prompt_only
    return isinstance(event, RequestFailed) or event.finish_reason is not None


class Mailbox:
    """The events of the requests of one answer. is_stream: whether its task is woken while a text grows, or only where
    something ends. woken_at: the last time, by time.monotonic."""

    def __init__(self, *, is_stream: bool):
        self.is_stream, self.is_ready, self.woken_at = is_stream, False, float("-inf")
        self.events: deque[tuple[GenerationRequest, Event]] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def add(self, request: GenerationRequest, events: Sequence[Event]) -> bool:
        """In the engine's thread: keep the events of a step; whether a choice, or all of the request, ends here."""
        ends = False
        for event in events:
            self.events.append((request, event))
            ends = ends or ends_request(request, event)
        return ends

    def wake(self) -> None:
        """In the loop's thread: let the task read."""
        self.is_ready = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def read(self, seconds: float) -> list[tuple[GenerationRequest, Event]]:
        """What has come since the last time; after so many seconds perhaps nothing."""
        if not self.is_ready:
            loop = asyncio.get_running_loop()
            self.waiter, timer = loop.create_future(), loop.call_later(seconds, self.wake)
            try:
                await self.waiter
            finally:
                timer.cancel()
        self.is_ready = False
        return [self.events.popleft() for _ in range(len(self.events))]


class Outbox:
    """The mailboxes of all answers, by the numbers of their requests. told: those with events of this step, and whether
    something ends there."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.mailboxes: dict[int, Mailbox] = {}
        self.told: dict[Mailbox, bool] = {}

    def deliver(self, request: GenerationRequest, events: Sequence[Event]) -> None:
        """In the engine's thread: put the events of a step into their mailbox."""
        mailbox = self.mailboxes.get(request.number)
        if mailbox is not None:
            self.told[mailbox] = mailbox.add(request, events) or self.told.get(mailbox, False)

    def flush(self) -> None:
        """In the engine's thread, behind a step: wake the tasks that have something to do. A stream that is not woken
        is told its next token with the next step, and its last one wakes it."""
        pending, self.told, now = self.told, {}, time.monotonic()
        pause = PAUSE_SECONDS * sum(mailbox.is_stream for mailbox in pending)
        ready = [one for one, ends in pending.items() if ends or (one.is_stream and now - one.woken_at >= pause)]
        for mailbox in ready:
            mailbox.woken_at = now
        if ready and self.loop is not None:
            try:
                self.loop.call_soon_threadsafe(wake_all, ready)
            except RuntimeError:  # the loop has ended; so have those who wait
                return


def wake_all(mailboxes: Iterable[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.wake()


async def unless_ended(work: Coroutine[Any, Any, Result], end: Coroutine[Any, Any, None]) -> Result | None:
    """The result of the work; None where the other ends first, which cancels the work."""
    task, other = asyncio.ensure_future(work), asyncio.ensure_future(end)
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        other.cancel()
