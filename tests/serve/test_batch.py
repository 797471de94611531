"""Continuous batching: a request writes the same text alone and in any company, however its prompt was read; slots are
freed; a step's error ends its requests and nothing else."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest

from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.layers import kv_cache
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.serve import cache_rows
from llm_quest.serve.batch import BatchLimits, RunningBatch
from llm_quest.serve.engine import QueueFull, ServingEngine
from llm_quest.serve.metrics import ServerMetrics
from llm_quest.serve.requests import Event, GenerationRequest, PromptRead, RequestFailed, TokenMade
from tests.generation.test_generate import TINY, enlarge_weights

PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(top_p=0.9, temperature=0.8),
    SamplingParams(repetition_penalty=1.2),
    SamplingParams(min_p=0.05, frequency_penalty=0.4, presence_penalty=0.2),
    SamplingParams(top_k=7, logit_bias=((3, 2.0), (5, float("-inf")))),
)
LIMITS = BatchLimits(slots=4, max_model_len=64, prefill_tokens=24, idle_prefill_tokens=40, prefix_bytes=2**24)


class Recorder:
    """Collects what requests are told."""

    def __init__(self) -> None:
        self.events: dict[int, list[Event]] = defaultdict(list)

    def deliver(self, request: GenerationRequest, events: Sequence[Event]) -> None:
        self.events[request.number] += events

    def tokens(self, request: GenerationRequest, choice: int = 0) -> list[int]:
        made = self.events[request.number]
        return [one.token for one in made if isinstance(one, TokenMade) and one.choice == choice]

    def num_cached(self, request: GenerationRequest) -> int:
        return next(one.cached for one in self.events[request.number] if isinstance(one, PromptRead))


def step(batch: RunningBatch) -> None:
    for request, events in batch.step().items():
        request.deliver(request, events)


def run(batch: RunningBatch, arrivals: dict[int, list[GenerationRequest]]) -> None:
    """Steps until everything has ended; arrivals: step -> requests."""
    at = 0
    while batch.has_work or at <= max(arrivals):
        batch.waiting.extend(arrivals.get(at, []))
        step(batch)
        at += 1
        assert at < 1000


def make_request(recorder: Recorder, prompt: Sequence[int], number: int = 0, **options) -> GenerationRequest:
    options.setdefault("sampling_params", PARAMS[number % len(PARAMS)])
    options.setdefault("stopping_criteria", StoppingCriteria(max_new_tokens=5 + number % 7))
    return GenerationRequest(list(prompt), deliver=recorder.deliver, seed=number, **options)


def requests_of(recorder: Recorder) -> list[GenerationRequest]:
    """Short and long prompts, some that begin alike, several choices, all ways to sample."""
    rng = random.Random(0)
    opening = [rng.randrange(60) for _ in range(30)]
    prompts = [[rng.randrange(60) for _ in range(length)] for length in (1, 5, 33, 6, 50, 3)]
    prompts += [[*opening, 7], [*opening, 9, 9], [*opening, 7, 1, 2]]
    return [make_request(recorder, p, number, n=1 + (number == 5)) for number, p in enumerate(prompts)]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch) -> None:
    """Memory grows several times in these short texts."""
    monkeypatch.setattr(cache_rows, "MIN_RESERVED", 4)


@pytest.fixture(params=TINY)
def model(request) -> Decoder:
    return enlarge_weights(build(request.param, seed=1, dtype="float64"))


@pytest.fixture
def llama() -> Decoder:
    return enlarge_weights(build("llama3.2-tiny", seed=1, dtype="float64"))


def test_a_request_writes_the_same_text_in_any_company(model):
    recorder, batch = Recorder(), RunningBatch(model, LIMITS, ServerMetrics())
    requests = requests_of(recorder)
    run(batch, {0: requests[:2], 2: requests[2:5], 4: requests[5:8], 30: requests[8:]})
    for request in requests:
        alone = generate_completions(
            model, [request.prompt], request.sampling_params, request.stopping_criteria, n=request.n, seed=request.seed
        )
        assert [recorder.tokens(request, choice) for choice in range(request.n)] == [one.tokens for one in alone]
    assert batch.slots.lengths == []
    assert batch.metrics.finished == {"length": len(requests)}


def test_a_prompt_that_begins_like_another_is_computed_from_there(llama):
    recorder, batch = Recorder(), RunningBatch(llama, LIMITS, ServerMetrics())
    opening = list(range(30))
    first, running, third = (make_request(recorder, [*opening, *end]) for end in ([40], [41], [42, 43]))
    run(batch, {0: [first], 1: [running], 20: [third]})
    assert [recorder.num_cached(one) for one in (first, running, third)] == [0, 30, 30]
    assert batch.prefixes.hits == 60
    assert batch.prefixes.queries == 31 + 31 + 32


def test_memory_is_that_of_the_longest_text_not_of_the_capacity(llama, monkeypatch):
    reserved, allocate = [], kv_cache.allocate_slots
    monkeypatch.setattr(kv_cache, "allocate_slots", lambda like, slots: reserved.append(slots) or allocate(like, slots))
    recorder, batch = Recorder(), RunningBatch(llama, LIMITS, ServerMetrics())
    until = StoppingCriteria(max_new_tokens=3)
    fresh, alike = (make_request(recorder, [*range(18), n], stopping_criteria=until) for n in (30, 31))
    run(batch, {0: [fresh], 9: [alike]})
    assert recorder.num_cached(alike) == 18
    assert set(reserved) == {20}, "the prompt's own length and the slot of padding"
    assert {buffer.shape[1] for buffer in batch.slots.buffers.values()} == {39}, "19, doubled for 21"


def test_a_recurrent_state_is_used_again_from_the_end_of_its_prompt():
    model = enlarge_weights(build("qwen3-next-tiny", seed=1, dtype="float64"))
    recorder, batch = Recorder(), RunningBatch(model, LIMITS, ServerMetrics())
    first = make_request(recorder, list(range(20)))
    run(batch, {0: [first]})
    answer = recorder.tokens(first)
    turn = make_request(recorder, [*first.prompt, *answer, 7, 8])
    other = make_request(recorder, [*first.prompt[:18], 7, 8])
    run(batch, {0: [turn, other]})
    assert recorder.num_cached(turn) >= 20
    assert recorder.num_cached(other) == 0


def test_the_memory_of_finished_texts_has_a_bound(llama):
    one_row = RunningBatch(llama, LIMITS, ServerMetrics())
    recorder = Recorder()
    run(one_row, {0: [make_request(recorder, list(range(30)))]})
    size = one_row.prefixes.nbytes
    batch = RunningBatch(llama, replace(LIMITS, prefix_bytes=2 * size), ServerMetrics())
    run(batch, {3 * n: [make_request(recorder, [n, *range(30)])] for n in range(6)})
    assert 0 < batch.prefixes.nbytes <= 2 * size
    assert batch.prefixes.nbytes == sum(row.nbytes() for row in batch.prefixes.rows.values())


def test_a_request_that_is_cancelled_frees_its_slots_with_the_next_step(llama):
    recorder, batch = Recorder(), RunningBatch(llama, LIMITS, ServerMetrics())
    endless = StoppingCriteria(max_new_tokens=50)
    first, second = (make_request(recorder, [n, 2], stopping_criteria=endless, n=2) for n in (1, 2))
    waiting = make_request(recorder, [9, 9], 3)
    batch.waiting.extend([first, second, waiting])
    for _ in range(3):
        step(batch)
    assert (batch.num_running, len(batch.waiting), len(batch.slots.lengths)) == (2, 1, 4)
    first.cancelled = True
    step(batch)
    assert first not in {row.request for row in batch.rows}
    assert waiting in {row.request for row in batch.rows}
    told = len(recorder.events[first.number])
    second.deadline = 0.0
    step(batch)
    assert isinstance(recorder.events[second.number][-1], RequestFailed)
    run(batch, {0: []})
    assert len(recorder.events[first.number]) == told
    assert len(recorder.tokens(waiting)) == 8


def count_started(model: Decoder, *, running: int, waiting: Sequence[int]) -> int:
    """How many of the waiting prompts (of these lengths) a step reads while others run."""
    recorder, batch = Recorder(), RunningBatch(model, LIMITS, ServerMetrics())
    endless = StoppingCriteria(max_new_tokens=30)
    batch.waiting.extend(make_request(recorder, [n, 2], n, stopping_criteria=endless) for n in range(running))
    step(batch)
    fresh = [make_request(recorder, [50 - n] * length, n) for n, length in enumerate(waiting)]
    batch.waiting.extend(fresh)
    step(batch)
    return sum(bool(recorder.events[one.number]) for one in fresh)


def test_a_step_reads_more_prompts_the_more_can_start_for_each_text_that_runs(llama):
    assert count_started(llama, running=1, waiting=[13, 13, 13]) == 3, "39 tokens of at most 40 in a step"
    assert count_started(llama, running=2, waiting=[13, 13, 13]) == 1, "two slots are free for two texts that run"
    assert count_started(llama, running=1, waiting=[39]) == 0, "one long prompt is read in parts of 24"
    assert count_started(llama, running=0, waiting=[13, 13, 13]) == 3


def test_a_token_is_told_before_the_pass_behind_it(llama):
    recorder, batch = Recorder(), RunningBatch(llama, LIMITS, ServerMetrics())
    request, passes = make_request(recorder, [1, 2, 3]), []
    batch.waiting.append(request)
    handle = llama.register_forward_hook(lambda *_: passes.append("decode"))
    try:
        for count in (1, 2, 3):
            step(batch)
            assert (len(recorder.tokens(request)), len(passes)) == (count, count - 1)
    finally:
        handle.remove()


def test_logits_that_are_not_finite_end_their_request_alone(llama, monkeypatch):
    recorder, batch = Recorder(), RunningBatch(llama, LIMITS, ServerMetrics())
    fine, broken = make_request(recorder, [1, 2, 3], 1), make_request(recorder, [4, 5], 2)
    batch.waiting.extend([fine, broken])
    step(batch)
    place, decode = next(number for number, row in enumerate(batch.rows) if row.request is broken), batch.slots.decode

    def decode_with_damage(*given):
        logits = decode(*given).clone()
        logits[place] = float("nan")
        return logits

    with monkeypatch.context() as once:
        once.setattr(batch.slots, "decode", decode_with_damage)
        step(batch)
    run(batch, {0: []})
    assert isinstance(recorder.events[broken.number][-1], RequestFailed)
    alone = generate_completions(llama, [fine.prompt], fine.sampling_params, fine.stopping_criteria, seed=fine.seed)
    assert recorder.tokens(fine) == alone[0].tokens


def test_a_step_that_fails_ends_its_requests_and_the_next_one_is_answered(llama, monkeypatch):
    recorder, batch = Recorder(), RunningBatch(llama, LIMITS, ServerMetrics())
    engine = ServingEngine({"tiny": batch}, max_waiting=9, log=(lines := []).append)
    lost = make_request(recorder, [1, 2], stopping_criteria=StoppingCriteria(max_new_tokens=9))
    batch.waiting.append(lost)
    engine.step()
    monkeypatch.setattr(batch.slots, "decode", lambda *given: 1 / 0)
    engine.step()
    assert isinstance(recorder.events[lost.number][-1], RequestFailed)
    assert "ZeroDivisionError" in lines[0]
    following = make_request(recorder, [1, 2])
    run(batch, {0: [following]})
    assert len(recorder.tokens(following)) == 5


def test_the_queue_has_a_bound(llama):
    recorder = Recorder()
    engine = ServingEngine({"tiny": RunningBatch(llama, LIMITS, ServerMetrics())}, max_waiting=2, log=print)
    for _ in range(2):
        engine.submit("tiny", make_request(recorder, [1]))
    with pytest.raises(QueueFull):
        engine.submit("tiny", make_request(recorder, [1]))
