"""Runs the model for generation: one prefill, then one token per row and step, with preallocated caches.

Nothing here decides when a sequence ends. The host waits for one small read per step.

Commonly got wrong: prompts that were read in groups of like length get their logits back in the order of the prompts;
each row's next token stands at its own position, not at the longest row's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.generation.compiled import CompiledDecodeStep, DecodedTokens, round_up_capacity
from llm_quest.generation.logits_processor import LogitsProcessor
from llm_quest.generation.sampling import SamplingParams, token_presence_mask
from llm_quest.generation.stopping import GeneratedSequence
from llm_quest.layers.kv_cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

P = ParamSpec("P")
T = TypeVar("T")

MAX_PADDING = 128
"""A pass costs at least as much as so many tokens of padding (it reads all weights, and starts every kernel)."""


class SampledToken(NamedTuple):
    """A sampled token of the row with this number."""

    row: int
    token: int
    logprob: float


def inference_only(method: Callable[Concatenate[BatchDecoder, P], T]) -> Callable[Concatenate[BatchDecoder, P], T]:
    """Run a method without gradients, in inference mode. Under autocast with `no_grad`: inference mode would cast all
    weights anew in every step, and no_grad keeps them (1,024 to 4,096, 64 rows: 2.8 ms against 1.0)."""

    @wraps(method)
    def wrapper(self: BatchDecoder, *arguments: P.args, **options: P.kwargs) -> T:
        autocast = torch.is_autocast_enabled(self.uniforms.device.type)
        with torch.no_grad() if autocast else torch.inference_mode():
            return method(self, *arguments, **options)

    return wrapper


class BatchDecoder:
    """The model's state for the rows being generated: cache, last tokens and positions.

    `row_numbers` maps a place in the batch to its row. Eagerly, rows that end leave the batch. The shapes of a compiled
    step are constant: there they stay, and what they read and sample is padding.

    uniforms: (R, steps), the random numbers of every row."""

    def __init__(
        self,
        model: Decoder,
        sampling_params: SamplingParams,
        logits_processor: LogitsProcessor,
        uniforms: Float[Tensor, "R steps"],
        *,
        compile: bool = False,
    ):
        self.model = model
        self.sampling_params, self.logits_processor = sampling_params, logits_processor
        self.uniforms = uniforms
        self.compiled_step = CompiledDecodeStep(model) if compile else None
        self.row_numbers = list(range(uniforms.shape[0]))

    @inference_only
    def prefill_windows(self, windows: Sequence[Sequence[int]], *, capacity: int) -> None:
        """Prefill a window for every place in the batch; where places are n times as many as windows, n consecutive
        ones share one."""
        n = len(self.row_numbers) // len(windows)
        self.num_active = len(self.row_numbers)
        if self.compiled_step is not None:
            self.compiled_step.restart()
        self.lengths = [len(window) for window in windows for _ in range(n)]
        capacity = round_up_capacity(capacity) if self.compiled_step else capacity
        self.decoded: DecodedTokens | None = None
        self.cache, self.logits = prefill(self.model, windows, capacity, self.uniforms.device)
        if n > 1:
            self.cache.batch_repeat_interleave(n)
            self.logits = self.logits.repeat_interleave(n, dim=0)
        self.positions = torch.tensor(self.lengths, device=self.uniforms.device)[:, None] - 1

    def set_histories(self, sequences: Sequence[GeneratedSequence]) -> None:
        """Set the texts that penalties apply to: the whole text of each row, including what a sliding window has
        dropped."""
        self.sequences, histories = list(sequences), [row.token_ids for row in sequences]
        penalized = self.sampling_params.repetition_penalty != 1
        self.seen_tokens_mask = (
            token_presence_mask(histories, self.logits.shape[-1], self.uniforms.device) if penalized else None
        )

    @inference_only
    def sample_tokens(self, step: int) -> list[SampledToken]:
        """Sample token number `step` of every place, on the host."""
        if self.decoded and self.sampling_params.is_greedy and not self.logits_processor.changes_logits:
            self.tokens, host = self.decoded.tokens, self.decoded.host
        else:
            self.tokens, host = self.sample_from_logits(step)
        sampled = [
            SampledToken(row, int(token), logprob)
            for row, token, logprob in zip(self.row_numbers, *host.tolist(), strict=True)
        ]
        if any(math.isnan(each.logprob) for each in sampled):
            raise ValueError("the model's logits are not finite, so no token can be drawn: look for NaN in its weights")
        return sampled

    def sample_from_logits(self, step: int) -> tuple[Int[Tensor, " R"], Float[Tensor, "2 R"]]:
        """The tokens, and for one read of the host tokens and log-probabilities (token ids below 2^24 are exact)."""
        logits, offsets = (
            self.logits_processor.add_bias(self.logits),
            self.logits_processor.history_offsets(self.sequences),
        )
        tokens, logprobs = self.sampling_params.sample(logits, self.uniforms[:, step], self.seen_tokens_mask, offsets)
        if self.seen_tokens_mask is not None:
            self.seen_tokens_mask.scatter_(1, tokens[:, None], True)
        return tokens, torch.stack((tokens.float(), logprobs))

    @inference_only
    def decode_one_token(self) -> None:
        """Feed every row the token it sampled last."""
        if self.compiled_step is not None:
            self.decoded = self.compiled_step(self.model, self.tokens, self.positions, self.cache)
            self.logits, self.positions = self.decoded.logits, self.decoded.positions
        else:
            self.positions = self.positions + 1
            self.lengths = [length + 1 for length in self.lengths]
            reach = max(self.lengths)
            scope = Scope(self.positions, cache=self.cache, max_seq_len=reach, unpadded=reach == min(self.lengths))
            self.logits = self.model(self.tokens[:, None], scope)[:, -1]

    @inference_only
    def continue_places(self, places: Sequence[int], tokens: Sequence[int], most_places: int) -> None:
        """Continue with these places of the batch, each perhaps several times, and feed each its next token. Compiled,
        the batch has most_places places; those that are left read padding."""
        padding: list[int] = []
        if self.compiled_step is not None:
            padding = [0] * (most_places - len(places))
            self.compiled_step.restart()
        index = torch.tensor([*places, *padding], device=self.positions.device)
        self.cache.batch_select_indices(index)
        self.lengths, self.positions = [self.lengths[place] for place in places], self.positions[index]
        self.positions[len(places) :] = -1
        self.tokens = torch.tensor([*tokens, *padding], device=self.positions.device)
        self.decode_one_token()

    @inference_only
    def keep_rows(self, rows: Collection[int]) -> None:
        """Continue with these rows only."""
        if len(rows) == self.num_active:
            return
        self.num_active = len(rows)
        if self.compiled_step is not None:
            left = torch.tensor([row not in rows for row in self.row_numbers], device=self.positions.device)
            self.positions = self.positions.masked_fill(left[:, None], -1)
            return
        kept_places = [seat for seat, row in enumerate(self.row_numbers) if row in rows]
        self.row_numbers = [self.row_numbers[seat] for seat in kept_places]
        self.lengths = [self.lengths[seat] for seat in kept_places]
        self.sequences = [self.sequences[seat] for seat in kept_places]
        index = torch.tensor(kept_places, device=self.positions.device)
        self.cache.batch_select_indices(index)
        self.tokens, self.positions, self.uniforms = self.tokens[index], self.positions[index], self.uniforms[index]
        self.seen_tokens_mask = None if self.seen_tokens_mask is None else self.seen_tokens_mask[index]


def prefill(
    model: Decoder, windows: Sequence[Sequence[int]], capacity: int, device: torch.device
) -> tuple[Cache, Float[Tensor, "B V"]]:
    """Read all windows, those of like length in one pass. Returns the cache and the logits after each one's last
    token, computed there alone."""
    caches, logits, order = [], [], []
    for rows in group_by_length([len(window) for window in windows]):
        caches.append(model.new_cache(len(rows), capacity))
        logits.append(prefill_group(model, windows, rows, caches[-1], device))
        order += rows
    places = sorted(range(len(order)), key=order.__getitem__)
    if len(caches) > 1:
        caches[0].batch_concat(caches[1:], places)
    return caches[0], torch.cat(logits)[torch.tensor(places, device=device)]


def prefill_group(
    model: Decoder, windows: Sequence[Sequence[int]], rows: Sequence[int], cache: Cache, device: torch.device
) -> Float[Tensor, "B V"]:
    """Read these rows of the windows in one pass; the logits after each one's last token."""
    num_prompts, windows = len(windows), [windows[row] for row in rows]
    tokens, positions = pad_left(windows)
    tokens = tokens.to(device)
    if len({len(window) for window in windows}) == 1:
        scope = Scope.unpadded(tokens, cache=cache)
    else:
        scope = Scope(positions.to(device), cache=cache, max_seq_len=tokens.shape[1])
    return model.head(model.hidden_states(tokens, scope.with_rows(rows, num_prompts))[:, -1])


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """The rows in groups, longest first, each with at most MAX_PADDING tokens of padding in all. Rows of nearly the
    same length are one group, in their own order."""
    groups: list[list[int]] = []
    padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padding += lengths[groups[-1][0]] - lengths[row] if groups else 0
        if groups and padding <= MAX_PADDING:
            groups[-1].append(row)
        else:
            groups.append([row])
            padding = 0
    return [sorted(group) for group in groups]


def pad_left(windows: Sequence[Sequence[int]], width: int = 0) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Tokens and positions, on the host, at least `width` columns. Padding on the left, so that every row's last token
    is in the last column."""
    length = max(width, *(len(window) for window in windows))
    tokens = [[0] * (length - len(window)) + list(window) for window in windows]
    positions = [[-1] * (length - len(window)) + list(range(len(window))) for window in windows]
    return torch.tensor(tokens), torch.tensor(positions)


def pad_right(
    token_rows: Sequence[Sequence[int]], starts: Sequence[int], width: int, device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Tokens and positions of each row from its start on, padding on the right."""
    tokens, positions = [], []
    for start, part in zip(starts, token_rows, strict=True):
        padding = width - len(part)
        tokens.append([*part, *[0] * padding])
        positions.append([*range(start, start + len(part)), *[-1] * padding])
    return torch.tensor(tokens).to(device), torch.tensor(positions).to(device)


def continuation_scope(
    token_rows: Sequence[Sequence[int]], starts: Sequence[int], positions: Int[Tensor, "B T"], cache: Cache
) -> Scope:
    """The scope of a pass that appends to the cache each row's tokens (perhaps none) from its start on."""
    reach = max(start + len(part) for start, part in zip(starts, token_rows, strict=True) if part)
    same_shape = len({(start, len(part)) for start, part in zip(starts, token_rows, strict=True)}) == 1
    return Scope(positions, cache=cache, max_seq_len=reach, unpadded=same_shape)
