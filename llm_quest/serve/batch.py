"""Continuous batching: requests join a running batch when a slot is free, and leave it when they end.

A step:

    drop who left -> one pass for the tokens of the last step -> read prompts (at most a budget of tokens while others
        wait) -> sample a token for every row -> rows that ended leave

The pass comes first, so that a token is told as soon as it is drawn.

A request's tokens do not depend on its company: its random numbers follow from its seed, its prompt and the number of
the choice, as in `generate`. (The last bits of a float32 product depend on the number of rows; log-probabilities agree
to 1e-5, and tokens unless two are equally probable to that precision.)"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.errors import QuestError
from llm_quest.generation.decoding import group_by_length, prefill_group
from llm_quest.layers.kv_cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.serve.cache_rows import CacheRow, SlotCache, read_row
from llm_quest.serve.images import ImageReader
from llm_quest.serve.metrics import ServerMetrics
from llm_quest.serve.prefix_cache import LazyPrefix, PrefixCache
from llm_quest.serve.requests import (
    Event,
    GenerationRequest,
    PromptRead,
    RequestFailed,
    RunningRow,
    TokenLogprob,
    TokenMade,
    start_rows,
)

NOT_FINITE = "the model's logits are not finite, so no token can be drawn"


@dataclass(frozen=True)
class BatchLimits:
    """Limits of the running batch. slots: how many texts are generated at the same time. max_model_len: prompt and text
    together. prefill_tokens: prompt tokens of a step while others generate; idle_prefill_tokens: while none does.
    prefix_bytes: memory of finished rows that are kept for prompts that begin like them."""

    slots: int = 16
    max_model_len: int = 2048
    prefill_tokens: int = 512
    idle_prefill_tokens: int = 2048
    prefix_bytes: int = 256 * 2**20


@dataclass(eq=False)
class PromptReader:
    """A prompt that is being read: `position` of its tokens are in the cache. cached: how many were known."""

    request: GenerationRequest
    cache: Cache
    position: int
    cached: int
    logprobs: list[TokenLogprob]


class RunningBatch:
    """The running requests of one model. Only the engine's thread calls its methods. image_reader: of a model that
    reads images; the rest of it sees a decoder."""

    def __init__(
        self, model: Decoder, limits: BatchLimits, metrics: ServerMetrics, image_reader: ImageReader | None = None
    ):
        self.model, self.limits, self.metrics, self.image_reader = model, limits, metrics, image_reader
        self.device = next(model.parameters()).device
        self.vocab_size = int(model.config.vocab_size)
        self.slots = SlotCache(model, limits.slots, limits.max_model_len)
        self.prefixes = PrefixCache(limits.prefix_bytes)
        self.waiting: deque[GenerationRequest] = deque()
        self.reader: PromptReader | None = None
        self.rows: list[RunningRow] = []
        self.logits = torch.zeros(0, self.vocab_size, device=self.device)
        self.events: dict[GenerationRequest, list[Event]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.waiting or self.reader)

    @property
    def num_running(self) -> int:
        """Requests that have left the queue."""
        return len({row.request.number for row in self.rows}) + (self.reader is not None)

    def step(self) -> dict[GenerationRequest, list[Event]]:
        """One step of every request; the events of it."""
        self.events = {}
        with torch.inference_mode():
            self.drop_ended()
            if self.rows:
                self.logits = self.slots.decode([row.token for row in self.rows], self.device)
            self.read_prompts()
            if self.rows:
                self.sample_tokens()
        return self.events

    def tell(self, request: GenerationRequest, event: Event) -> None:
        self.events.setdefault(request, []).append(event)

    # --- who leaves

    def drop_ended(self) -> None:
        """Free what belongs to requests that were cancelled or whose time is over."""
        now = time.monotonic()
        late = RequestFailed(504, "the request took longer than this server allows", "timeout")
        for request in {row.request for row in self.rows} | set(self.waiting) | self.read_request:
            if request.cancelled or now > request.deadline:
                self.end_request(request, None if request.cancelled else late)

    @property
    def read_request(self) -> set[GenerationRequest]:
        return {self.reader.request} if self.reader else set()

    def end_request(self, request: GenerationRequest, failure: RequestFailed | None) -> None:
        """Remove a request wherever it is. failure: what it is told."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.read_request:
            self.reader = None
        for number in reversed(range(len(self.rows))):
            if self.rows[number].request is request:
                self.remove_row(number)
        if failure is not None:
            self.tell(request, failure)
        self.metrics.count_end(request, "error" if failure else "abort")

    def remove_row(self, number: int) -> None:
        order = self.slots.leave(number)
        self.rows = [self.rows[old] for old in order]
        self.logits = self.logits[torch.tensor(order, dtype=torch.long, device=self.device)]

    def fail_all(self, message: str) -> dict[GenerationRequest, list[Event]]:
        """End every request after an error of the step, and begin with empty caches."""
        self.events = {}
        for request in {row.request for row in self.rows} | set(self.waiting) | self.read_request:
            self.end_request(request, RequestFailed(500, message))
        self.slots = SlotCache(self.model, self.limits.slots, self.limits.max_model_len)
        self.prefixes = PrefixCache(self.limits.prefix_bytes)
        self.rows, self.reader, self.logits = [], None, self.logits[:0]
        return self.events

    # --- prompts

    def read_prompts(self) -> None:
        """Read prompts, the oldest first: fresh ones of a step together, long or known ones alone and in parts. One
        with images is read whole, for the tokens of an image may see each other."""
        budget = self.prefill_budget
        budget -= self.read_part(budget)
        fresh: list[GenerationRequest] = []
        while self.reader is None and budget > 0 and self.waiting and self.has_slots(fresh):
            request = self.waiting.popleft()
            alone = request.prompt_logprobs or len(request.images) > 0
            cache, start = (None, 0) if alone else self.find_prefix(request)
            if cache is None and not alone and len(request.prompt) <= budget:
                fresh.append(request)
                budget -= len(request.prompt)
            else:
                cache = cache or self.new_cache(1, len(request.prompt))
                self.reader = PromptReader(request, cache, start, start, [])
                budget -= self.read_part(budget)
        self.read_fresh(fresh)

    @property
    def prefill_budget(self) -> int:
        """How many prompt tokens this step reads. A long pass is more efficient, but the running texts wait for it: it
        grows with the number of requests that can start for each running text."""
        if not self.rows:
            return self.limits.idle_prefill_tokens
        starting = min(len(self.waiting), self.limits.slots - len(self.rows))
        share = max(1, starting // len(self.rows))
        return min(self.limits.prefill_tokens * share, self.limits.idle_prefill_tokens)

    def has_slots(self, fresh: Sequence[GenerationRequest]) -> bool:
        """Whether there are slots for the next request."""
        return len(self.rows) + sum(one.n for one in fresh) + self.waiting[0].n <= self.limits.slots

    def find_prefix(self, request: GenerationRequest) -> tuple[Cache | None, int]:
        running: list[LazyPrefix] = [
            (row.sequence.token_ids, lambda number=number: self.slots.row(number))  # type: ignore[misc]
            for number, row in enumerate(self.rows)
            if not row.request.images
        ]
        return self.prefixes.find(self.model, request.prompt, running, self.limits.max_model_len)

    def new_cache(self, rows: int, length: int) -> Cache:
        """A cache in which prompts of at most this length are read. Its capacity is that of all: LongRoPE reads it."""
        cache = self.model.new_cache(rows, self.limits.max_model_len)
        cache.reserve(length)
        return cache

    def read_fresh(self, requests: Sequence[GenerationRequest]) -> None:
        """Read whole prompts, those of like length in one pass."""
        windows = [request.prompt for request in requests]
        for group in group_by_length([len(window) for window in windows]) if requests else ():
            cache = self.new_cache(len(group), max(len(windows[row]) for row in group))
            logits = prefill_group(self.model, windows, group, cache, self.device)
            lengths = [len(windows[row]) for row in group]
            cache.snapshot(lengths)
            for place, row in enumerate(group):
                self.join(requests[row], read_row(cache, place, lengths[place]), logits[place], PromptRead(0))

    def read_part(self, budget: int) -> int:
        """Read the next part of the prompt that is read alone; returns its number of tokens."""
        if (reader := self.reader) is None or budget <= 0:
            return 0
        prompt, start = reader.request.prompt, reader.position
        images = reader.request.images
        part = prompt if images else prompt[start : start + budget]
        ids = torch.tensor([part], device=self.device)
        model = self.image_reader.prompt_model(images) if self.image_reader and images else self.model
        hidden = model.hidden_states(ids, Scope.unpadded(ids, cache=reader.cache, start=start))
        reader.position = start + len(part)
        if reader.request.prompt_logprobs:
            self.score_part(reader, start, self.model.head(hidden)[0])
        if reader.position == len(prompt):
            self.reader = None
            reader.cache.snapshot([len(prompt)])
            row = read_row(reader.cache, 0, len(prompt))
            heard = PromptRead(reader.cached, tuple(reader.logprobs))
            self.join(reader.request, row, self.model.head(hidden[:, -1])[0], heard)
        return len(part)

    def score_part(self, reader: PromptReader, start: int, logits: Float[Tensor, "T V"]) -> None:
        """The log-probabilities of the tokens after each one of this part."""
        if start == 0:
            reader.logprobs.append(TokenLogprob(reader.request.prompt[0], None))
        following = reader.request.prompt[start + 1 : start + 1 + len(logits)]
        top = reader.request.top_logprobs or 0
        reader.logprobs += token_logprobs(logits[: len(following)], following, [top] * len(following))

    def join(self, request: GenerationRequest, row: CacheRow, logits: Float[Tensor, " V"], heard: PromptRead) -> None:
        """A slot for each choice of a request whose prompt was read."""
        self.metrics.count_prompt(request, heard.cached)
        self.tell(request, heard)
        if request.read_prompt_only:
            self.prefixes.store(request.prompt, row)
            self.metrics.count_end(request, "length")
            return
        try:
            rows = start_rows(request, self.vocab_size, self.limits.max_model_len, self.device)
        except QuestError as error:
            self.end_request(request, RequestFailed(400, str(error)))
            return
        request.num_unfinished = len(rows)
        for one in rows:
            self.slots.join(row)
            self.rows.append(one)
        self.logits = torch.cat((self.logits, logits.expand(len(rows), -1)))

    # --- tokens

    def sample_tokens(self) -> None:
        """Draw a token for every row and tell it; rows that end with it leave."""
        self.draw()
        logprobs = self.find_logprobs()
        broken = {row.request for row in self.rows if row.token < 0}
        for number in reversed(range(len(self.rows))):
            row = self.rows[number]
            if row.request not in broken and self.append(row, logprobs.get(number)):
                if not row.request.images:  # the placeholders of another image are the same tokens
                    self.prefixes.store(row.sequence.token_ids, self.slots.row(number))
                self.remove_row(number)
        for request in broken:
            self.end_request(request, RequestFailed(500, NOT_FINITE))

    def find_logprobs(self) -> dict[int, TokenLogprob]:
        """The log-probabilities of the drawn tokens, by the number of the row, where they were asked for."""
        wanted = [number for number, row in enumerate(self.rows) if row.request.top_logprobs is not None]
        if not wanted:
            return {}
        counts = [self.rows[number].request.top_logprobs or 0 for number in wanted]
        logprobs = token_logprobs(self.logits[wanted], [self.rows[number].token for number in wanted], counts)
        return dict(zip(wanted, logprobs, strict=True))

    def append(self, row: RunningRow, logprob: TokenLogprob | None) -> bool:
        """Append its token to a row and tell it; whether the row ends with it."""
        appended, request = row.append(), row.request
        self.tell(request, TokenMade(row.choice, row.token, appended.text, appended.finish_reason, logprob))
        self.metrics.count_token(request)
        if appended.finish_reason is None:
            return False
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            self.metrics.count_end(request, "length" if appended.finish_reason == "length" else "stop")
        return True

    def draw(self) -> None:
        """Set the next token of every row; -1 where its logits are not finite. Rows whose sampling parameters are equal
        are drawn together."""
        groups: dict[object, list[int]] = {}
        for number, row in enumerate(self.rows):
            groups.setdefault(row.request.sampling_params if row.is_plain else row, []).append(number)
        for numbers in groups.values():
            rows = [self.rows[number] for number in numbers]
            logits, params = (
                self.logits if len(rows) == len(self.rows) else self.logits[numbers],
                rows[0].sampling_params,
            )
            uniforms = torch.tensor([row.uniform for row in rows], device=self.device)
            first, params = rows[0], rows[0].sampling_params
            tokens, logprobs = params.sample(first.add_bias(logits), uniforms, first.seen, first.offsets())
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.token = -1 if math.isnan(logprob) else token


def token_logprobs(logits: Float[Tensor, "R V"], tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """The log-probability of a token for each row, and its `counts` most probable ones."""
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).clamp(min=0)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(max(counts), logits.shape[-1]), dim=-1)
    ids, values = top.indices.tolist(), top.values.tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, (token, logprob, count) in enumerate(zip(tokens, own, counts, strict=True))
    ]
