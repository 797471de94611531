"""How the model is driven: one prefill, then one token per row and step, with everything kept in preallocated caches.

Nothing here knows when a text ends. One small read per step is all that the host waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.generation.compiled import compiled, decode_step, rounded_up
from llm_quest.generation.sampling import Sampling, seen_tokens
from llm_quest.layers.cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

P = ParamSpec("P")
T = TypeVar("T")


class Drawn(NamedTuple):
    """A token of the row with this number."""

    row: int
    token: int
    logprob: float


def unlearned(method: Callable[Concatenate[Decoding, P], T]) -> Callable[Concatenate[Decoding, P], T]:
    """Nothing is learned from what happens here: inference mode. Not so under autocast, where that mode makes the casts
    of all weights anew in every step, and no_grad keeps them (1,024 to 4,096, 64 rows: 2.8 ms against 1.0)."""

    @wraps(method)
    def quiet(self: Decoding, *arguments: P.args, **options: P.kwargs) -> T:
        autocast = torch.is_autocast_enabled(self.uniforms.device.type)
        with torch.no_grad() if autocast else torch.inference_mode():
            return method(self, *arguments, **options)

    return quiet


class Decoding:
    """The model's side of the rows being written: their cache, last tokens and places.

    `seats` says which row sits at which place of the batch. Eagerly, rows that leave give up their seat. The compiled
    step's shapes are constant: there they stay seated, and what they read and draw is padding.

    uniforms: (R, steps), the random numbers of every row."""

    def __init__(
        self, model: Decoder, sampling: Sampling, uniforms: Float[Tensor, "R steps"], *, compile: bool = False
    ):
        self.model = model
        self.sampling = sampling
        self.uniforms = uniforms
        self.step = compiled(decode_step, model) if compile else None
        self.seats = list(range(uniforms.shape[0]))

    @unlearned
    def fill(self, windows: Sequence[Sequence[int]], *, capacity: int) -> None:
        """Prefill a window for every seat; where seats are n times as many as windows, n side by side share one."""
        n = len(self.seats) // len(windows)
        self.active = len(self.seats)
        self.lengths = [len(window) for window in windows for _ in range(n)]
        self.cache = self.model.new_cache(len(windows), rounded_up(capacity) if self.step else capacity)
        self.logits = prefill(self.model, windows, self.cache, self.uniforms.device)
        if n > 1:
            self.cache.repeat(n)
            self.logits = self.logits.repeat_interleave(n, dim=0)
        self.positions = torch.tensor(self.lengths, device=self.uniforms.device)[:, None] - 1

    def remember(self, histories: Sequence[Sequence[int]]) -> None:
        """What the repetition penalty falls on, per seat: the whole text, also what a sliding window has left
        behind."""
        penalized = self.sampling.repetition_penalty != 1
        self.seen = seen_tokens(histories, self.logits.shape[-1], self.uniforms.device) if penalized else None

    @unlearned
    def draw(self, at: int) -> list[Drawn]:
        """Every seat's token number `at`, on the host."""
        self.tokens, logprobs = self.sampling.draw(self.logits, self.uniforms[:, at], self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens[:, None], True)
        host = torch.stack((self.tokens.float(), logprobs)).tolist()  # one read; token ids below 2^24 are exact
        drawn = [Drawn(row, int(token), logprob) for row, token, logprob in zip(self.seats, *host, strict=True)]
        if any(math.isnan(each.logprob) for each in drawn):
            raise ValueError("the model's logits are not finite, so no token can be drawn: look for NaN in its weights")
        return drawn

    @unlearned
    def feed(self) -> None:
        """Every row reads the token it drew last."""
        if self.step is not None:
            self.positions = torch.where(self.positions < 0, -1, self.positions + 1)
            self.logits = self.step(self.model, self.tokens[:, None], self.positions, self.cache)
        else:
            self.positions = self.positions + 1
            self.lengths = [length + 1 for length in self.lengths]
            reach = max(self.lengths)
            scope = Scope(self.positions, cache=self.cache, reach=reach, plain=reach == min(self.lengths))
            self.logits = self.model(self.tokens[:, None], scope)[:, -1]

    @unlearned
    def keep(self, rows: Collection[int]) -> None:
        """Only these rows go on."""
        if len(rows) == self.active:
            return
        self.active = len(rows)
        if self.step is not None:
            left = torch.tensor([row not in rows for row in self.seats], device=self.positions.device)
            self.positions = self.positions.masked_fill(left[:, None], -1)
            return
        stay = [seat for seat, row in enumerate(self.seats) if row in rows]
        self.seats, self.lengths = [self.seats[seat] for seat in stay], [self.lengths[seat] for seat in stay]
        index = torch.tensor(stay, device=self.positions.device)
        self.cache.keep(index)
        self.tokens, self.positions, self.uniforms = self.tokens[index], self.positions[index], self.uniforms[index]
        self.seen = None if self.seen is None else self.seen[index]


def prefill(
    model: Decoder, windows: Sequence[Sequence[int]], cache: Cache, device: torch.device
) -> Float[Tensor, "B V"]:
    """Read all windows in one pass and return the logits after each one's last token, computed there alone."""
    tokens, positions = left_padded(windows)
    tokens = tokens.to(device)
    if len({len(window) for window in windows}) == 1:
        scope = Scope.plain(tokens, cache=cache)
    else:
        scope = Scope(positions.to(device), cache=cache, reach=tokens.shape[1])
    return model.head(model.hidden(tokens, scope)[:, -1])


def left_padded(windows: Sequence[Sequence[int]], width: int = 0) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Tokens and positions, on the host, at least `width` columns. On the left, so that every row's last token stands
    in the last column."""
    length = max(width, *(len(window) for window in windows))
    tokens = [[0] * (length - len(window)) + list(window) for window in windows]
    positions = [[-1] * (length - len(window)) + list(range(len(window))) for window in windows]
    return torch.tensor(tokens), torch.tensor(positions)


def right_padded(
    fed: Sequence[Sequence[int]], starts: Sequence[int], width: int, device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Tokens and positions of each row's tokens from its place on, padding at the end."""
    tokens, positions = [], []
    for start, part in zip(starts, fed, strict=True):
        padding = width - len(part)
        tokens.append([*part, *[0] * padding])
        positions.append([*range(start, start + len(part)), *[-1] * padding])
    return torch.tensor(tokens).to(device), torch.tensor(positions).to(device)


def going_on(fed: Sequence[Sequence[int]], starts: Sequence[int], positions: Int[Tensor, "B T"], cache: Cache) -> Scope:
    """The scope of a pass that reads each row's tokens (perhaps none) from its place on."""
    reach = max(start + len(part) for start, part in zip(starts, fed, strict=True) if part)
    alike = len({(start, len(part)) for start, part in zip(starts, fed, strict=True)}) == 1
    return Scope(positions, cache=cache, reach=reach, plain=alike)
