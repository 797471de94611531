"""Events on their way from the engine's thread to the tasks that answer: none is lost, none comes twice, and a task is
woken no more often than it can use."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.models.build import build
from llm_quest.scope import Scope
from llm_quest.serve.app import ENCODER, open_event, to_event
from llm_quest.serve.cache_rows import read_row
from llm_quest.serve.outbox import Mailbox, Outbox
from llm_quest.serve.prefix_cache import MIN_SHARED_TOKENS, PrefixCache
from llm_quest.serve.requests import Event, GenerationRequest, PromptRead, RequestFailed, TokenMade
from llm_quest.serve.server import SWITCH_SECONDS
from tests.generation.test_generate import TINY
from tests.serve.local_server import local_server


def make_request(**options: bool) -> GenerationRequest:
    return GenerationRequest(
        [1], SamplingParams(), StoppingCriteria(max_new_tokens=9), lambda request, events: None, **options
    )


def token(number: int, *, last: bool = False) -> TokenMade:
    return TokenMade(0, number, "", "length" if last else None)


@pytest.mark.parametrize("is_stream", [True, False])
def test_each_event_comes_once_and_in_order_while_another_thread_delivers(is_stream):
    events: list[Event] = [PromptRead(0), *(token(number) for number in range(200)), token(200, last=True)]
    outbox, request, mailbox = Outbox(), make_request(), Mailbox(is_stream=is_stream)
    outbox.mailboxes[request.number] = mailbox

    def run_engine() -> None:
        for event in events:
            outbox.deliver(request, [event])
            outbox.flush()
            time.sleep(0.0002)

    async def read_all() -> list[list[Event]]:
        outbox.loop = asyncio.get_running_loop()
        engine, reads = threading.Thread(target=run_engine), []
        engine.start()
        while sum(map(len, reads)) < len(events):
            reads.append([event for _, event in await mailbox.read(5.0)])
        await asyncio.to_thread(engine.join)
        return reads

    reads = asyncio.run(read_all())
    assert [event for read in reads for event in read] == events
    assert (len(reads) == 1) is not is_stream


@pytest.mark.parametrize(
    ("options", "event"),
    [({}, RequestFailed(500, "broken")), ({"read_prompt_only": True}, PromptRead(0)), ({}, token(1, last=True))],
)
def test_whatever_ends_a_request_wakes_an_answer_that_is_not_streamed(options, event):
    for events in ([token(0), event], [event, token(0)]):
        assert Mailbox(is_stream=False).add(make_request(**options), events)
    assert not Mailbox(is_stream=False).add(make_request(), [PromptRead(0), token(0)])


class WakeCounter:
    """In place of an event loop: counts how often each mailbox is woken."""

    def __init__(self) -> None:
        self.wakes: Counter[Mailbox] = Counter()

    def call_soon_threadsafe(self, wake: Callable, ready: list[Mailbox]) -> None:
        self.wakes.update(ready)


@pytest.mark.parametrize(("streams", "step_seconds", "steps_of_a_write"), [(1, 0.002, 1), (32, 0.027, 2), (32, 0.1, 1)])
def test_the_more_streams_the_more_tokens_a_write_has_but_the_first_and_the_last_one_come_at_once(
    streams, step_seconds, steps_of_a_write, monkeypatch
):
    outbox, now, steps = Outbox(), 0.0, 41
    monkeypatch.setattr("llm_quest.serve.outbox.time.monotonic", lambda: now)
    outbox.loop = counter = WakeCounter()
    mailboxes = {make_request(): Mailbox(is_stream=True) for _ in range(streams)}
    outbox.mailboxes = {request.number: mailbox for request, mailbox in mailboxes.items()}
    for step in range(steps):
        for request in mailboxes:
            outbox.deliver(request, [*([PromptRead(0)] if step == 0 else []), token(step, last=step == steps - 1)])
        outbox.flush()
        now += step_seconds
        woken = all(counter.wakes[mailbox] == 1 + step // steps_of_a_write for mailbox in mailboxes.values())
        assert woken, f"step {step}"
    expected = [PromptRead(0), *(token(step, last=step == steps - 1) for step in range(steps))]
    for mailbox in mailboxes.values():
        assert [event for _, event in mailbox.events] == expected


def test_an_end_wakes_a_stream_within_its_pause():
    outbox, request, mailbox = Outbox(), make_request(), Mailbox(is_stream=True)
    outbox.loop = counter = WakeCounter()
    outbox.mailboxes[request.number] = mailbox
    for event in (token(0), RequestFailed(500, "broken")):
        outbox.deliver(request, [event])
        outbox.flush()
    assert counter.wakes[mailbox] == 2


def test_a_part_of_a_stream_is_the_json_of_its_chunk_whatever_the_model_is_called():
    chunk = {"id": "1", "model": 'a "choices":[] b\\', "choices": [], "usage": None}
    before, after = open_event(chunk)
    part = {"index": 0, "text": 'x "choices":[]\n\ud83d'}
    assert before + ENCODER.encode(part) + after == to_event({**chunk, "choices": [part]})


def test_a_reader_that_waits_in_vain_gets_nothing_after_its_time():
    async def read() -> list:
        return await Mailbox(is_stream=True).read(0.01)

    assert asyncio.run(read()) == []


def test_a_stream_has_no_pings_for_tokens_that_end_within_a_character():
    body = {"prompt": "Once", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
    with local_server(slots=2) as local:
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        local.ask("POST", "/v1/completions", {**body, "stream": False})  # the first token waits for what is built once
        _, text, _ = local.ask("POST", "/v1/completions", body)
    assert "ping" not in text
    assert text.count("data: ") < 60  # some tokens have no text of their own


def test_rows_are_found_by_their_beginning_as_long_as_they_are_kept():
    model = build(TINY[0])
    held, length = model.new_cache(1, 64), MIN_SHARED_TOKENS + 4
    with torch.inference_mode():
        ids = torch.zeros(1, length, dtype=torch.long)
        model(ids, Scope.unpadded(ids, cache=held))
    row = read_row(held, 0, length)
    cache = PrefixCache(5 * row.nbytes())
    for beginning, end in [(1, 3), (1, 4), (1, 5), (1, 4), (2, 3), (2, 4), (2, 5), (2, 4)]:
        cache.store([beginning] * MIN_SHARED_TOKENS + [end] * 4, row)
        assert sorted(key for keys in cache.beginnings.values() for key in keys) == sorted(cache.rows)
        assert all(key[:MIN_SHARED_TOKENS] == begin for begin, keys in cache.beginnings.items() for key in keys)
        assert cache.nbytes == len(cache.rows) * row.nbytes() <= cache.max_bytes
    assert len(cache.rows) == 5
