"""One decode step as one compiled graph: every shape constant, every position a tensor, the cache seen at full
length.

Compiling costs 5 to 30 seconds per model, batch size and (rounded) capacity, so it pays for rollouts and serving, not
for one short answer. Later calls of the same shapes find the step again, as long as the model lives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llm_quest.layers.cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

Step = Callable[[Decoder, Tensor, Tensor, Cache], Tensor]

STEPS: WeakKeyDictionary[Decoder, Step] = WeakKeyDictionary()
SHAPES_PER_MODEL = 64
BUCKET = 64


def compiled_step(model: Decoder) -> Step:
    """The model's compiled step. It takes the model as an argument, so that the table here keeps no model alive."""
    if model not in STEPS:
        STEPS[model] = torch.compile(decode_step, fullgraph=True, dynamic=False, **own_count())  # type: ignore[call-overload]
    return STEPS[model]


def own_count() -> dict[str, int | bool]:
    """Count each model's shapes apart, where this torch can (2.13); before, all models share one count of eight."""
    wanted: dict[str, int | bool] = {"isolate_recompiles": True, "recompile_limit": SHAPES_PER_MODEL}
    known = inspect.signature(torch.compile).parameters
    return {name: value for name, value in wanted.items() if name in known}


def decode_step(model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits (R,V) of the token after `tokens` (R,1), which stand at `positions` (R,1); -1: the row has left."""
    return model(tokens, Scope(positions, cache=cache))[:, -1]


def rounded_up(capacity: int) -> int:
    """To the next multiple of BUCKET: calls of nearly the same length share one compiled step."""
    return -(-capacity // BUCKET) * BUCKET
