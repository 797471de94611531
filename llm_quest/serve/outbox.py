"""Carries events from the engine's thread to the tasks of the event loop that answer: at most one wake-up for a step,
and of an answer that is not streamed one for each of its requests.

Waking a task for every token of every request costs more than a small model's pass, and takes Python's lock from it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from llm_quest.serve.requests import Event, GenerationRequest, PromptRead, RequestFailed


def ends_request(request: GenerationRequest, event: Event) -> bool:
    """Whether a choice of the request, or all of it, ends with this event."""
    if isinstance(event, PromptRead):
        return request.read_prompt_only
    return isinstance(event, RequestFailed) or event.finish_reason is not None


class Mailbox:
    """The events of the requests of one answer. every_step: whether its task is woken by each step (a stream), or only
    where something ends."""

    def __init__(self, *, every_step: bool):
        self.every_step, self.is_ready = every_step, False
        self.events: deque[tuple[GenerationRequest, Event]] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def add(self, request: GenerationRequest, events: Sequence[Event]) -> bool:
        """In the engine's thread: keep the events of a step; whether the task is to be woken."""
        self.events.extend((request, event) for event in events)
        return self.every_step or any(ends_request(request, event) for event in events)

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
    """The mailboxes of all answers, by the numbers of their requests."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.mailboxes: dict[int, Mailbox] = {}
        self.ready: list[Mailbox] = []

    def deliver(self, request: GenerationRequest, events: Sequence[Event]) -> None:
        """In the engine's thread: put the events of a step into their mailbox."""
        mailbox = self.mailboxes.get(request.number)
        if mailbox is not None and mailbox.add(request, events):
            self.ready.append(mailbox)

    def flush(self) -> None:
        """In the engine's thread, behind a step: wake the tasks that have something to read."""
        if self.ready and self.loop is not None:
            ready, self.ready = self.ready, []
            try:
                self.loop.call_soon_threadsafe(wake_all, ready)
            except RuntimeError:  # the loop has ended; so have those who wait
                return


def wake_all(mailboxes: Iterable[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.wake()
