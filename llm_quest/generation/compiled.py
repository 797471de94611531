"""Decoding as compiled graphs: every shape is constant, every position a tensor, and the cache is read at full length.

Compiling costs 5 to 30 seconds per model, batch size, number of columns and (rounded) capacity, so it pays for rollouts
and serving, not for one short answer. Later calls of the same shapes reuse the graph for as long as the model exists.

Commonly got wrong: capacities are rounded up, or each length is a graph of its own; the narrowest compiled width that
holds the columns is taken; rows that ended stay in the batch as padding, since a smaller batch is another graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llm_quest.generation.sampling import most_probable
from llm_quest.layers import native
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.recurrent_cache import RecurrentStateCache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope

F = TypeVar("F", bound=Callable[..., Any])

COMPILED_FUNCTIONS: WeakKeyDictionary[Decoder, dict[Callable[..., Any], Callable[..., Any]]] = WeakKeyDictionary()
MAX_SHAPES_PER_MODEL = 64
CAPACITY_MULTIPLE = 64
COMPILED_WIDTHS = (1, 3, 5, 9, 17)
"""A pass that checks guesses has one of these numbers of columns; those without a token are padding."""


def compile_for_model(function: F, model: Decoder) -> F:
    """Compile `function` for this model. It takes the model as its first argument, so that the table of compiled
    functions keeps no model alive."""
    if next(model.parameters()).device.type == "cpu":
        native.is_loaded()  # compiled code has the operators in C++ where they were built before
    functions = COMPILED_FUNCTIONS.setdefault(model, {})
    if function not in functions:
        functions[function] = torch.compile(function, fullgraph=True, dynamic=False, **compile_options())  # type: ignore[call-overload]
    return functions[function]  # type: ignore[return-value]


def compile_options() -> dict[str, Any]:
    """Options of torch.compile: no checks of sizes and places between the kernels, a tenth of a small model's step; and
    where this torch has them (2.13), the shapes of each model are counted apart. Before, all models share one limit of
    eight."""
    wanted = {"isolate_recompiles": True, "recompile_limit": MAX_SHAPES_PER_MODEL}
    known = inspect.signature(torch.compile).parameters
    checks = dict.fromkeys(("size_asserts", "alignment_asserts", "scalar_asserts"), False)
    return {"options": checks | vector_options()} | {name: value for name, value in wanted.items() if name in known}


def vector_options() -> dict[str, Any]:
    """Inductor's option for the width of this processor's vectors in bits, as part of the name under which generated
    code is kept. Without it inductor (torch 2.13) takes code for vectors of 8 numbers from a cache that another
    processor filled (a shared home, ATEN_CPU_CAPABILITY), compiles it for vectors of 16, and writes beyond its
    buffers."""
    from torch._inductor import config

    width = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())
    return {"cpp.simdlen": width} if width and config.cpp.simdlen is None else {}


def decode_step(model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits (R,V) of the token after `tokens` (R,1) at `positions` (R,1); -1: the row has ended."""
    return model(tokens, Scope(positions, cache=cache))[:, -1]


class DecodedTokens(NamedTuple):
    """A compiled step's logits (R,V), the positions (R,1) it read at, and the most probable tokens (R,) with their
    log-probabilities, also together (2,R), as the host reads them (token ids below 2^24 are exact in float32)."""

    logits: Tensor
    positions: Tensor
    tokens: Tensor
    host: Tensor


def next_decode_step(model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache) -> DecodedTokens:
    """`decode_step` of `tokens` (R,) behind `positions` (R,1), with the greedy choice after it: as operators of their
    own, choice and positions take a tenth of a small model's step."""
    positions = torch.where(positions < 0, -1, positions + 1)
    logits = decode_step(model, tokens[:, None], positions, cache)
    chosen, logprobs = most_probable(logits.float())
    return DecodedTokens(logits, positions, chosen, torch.stack((chosen.float(), logprobs)))


def without_guards(function: F, *arguments: Any) -> F | None:
    """What torch.compile made of `function` for such arguments, as a function that checks no guards, which are a
    quarter of a small model's step. None where it cannot be found (a torch without this interface), or no guards hold
    for these arguments."""
    try:
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    except ImportError:
        return None
    code = function.__code__
    named = dict(zip(code.co_varnames, arguments, strict=False))
    for entry in _debug_get_cache_entry_list(code):
        if entry.guard_manager.check(named):
            return FunctionType(entry.code, function.__globals__)  # type: ignore[return-value]
    return None


class CompiledDecodeStep:
    """`next_decode_step`, compiled for one model. The first step of a text checks all guards; the others of that text
    check none, since model, shapes and cache are the same, except where the cache keeps a history, which may grow."""

    def __init__(self, model: Decoder):
        self.checked: Callable[..., DecodedTokens] = compile_for_model(next_decode_step, model)
        self.restart()

    def restart(self) -> None:
        """Check the guards in the next step: another text, or another cache."""
        self.steps, self.step = 0, self.checked

    def __call__(self, model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache) -> DecodedTokens:
        arguments = (model, tokens, positions, cache)
        if self.steps == 1 and not keeps_history(cache):
            self.step = without_guards(next_decode_step, *arguments) or self.checked
        self.steps += 1
        return self.step(*arguments)


def verify_step(model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Hidden states (R,W,D) and logits (R,W,V) after each of several tokens; position -1: padding."""
    hidden = model.hidden_states(tokens, Scope(positions, cache=cache))
    return hidden, model.head(hidden)


def keeps_history(cache: Cache) -> bool:
    """Whether the cache holds recurrent layers, whose history grows with every pass. Another length would be another
    graph, so such a cache is rewound after each pass, even to where it is."""
    return any(isinstance(layer, RecurrentStateCache) for layer in cache.layers)


def round_up_capacity(capacity: int) -> int:
    """Round up to a multiple of CAPACITY_MULTIPLE, so that calls of nearly the same length share one compiled step."""
    return -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


def choose_width(columns: int, widths: Sequence[int] = COMPILED_WIDTHS) -> int | None:
    """The narrowest compiled pass that takes so many columns; None if there is none."""
    return next((width for width in widths if width >= columns), None)
