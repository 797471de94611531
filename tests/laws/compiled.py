"""Run by test_compiled.py in a process of its own: `python -m tests.laws.compiled BACKEND RECORD_NAME...` prints each
name that holds.

Without the shape-checking import hook, which would be traced too."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llm_quest.generation.compiled import vector_options
from llm_quest.layers import native
from llm_quest.layers.delta_net import GatedDeltaNet
from llm_quest.layers.kv_cache import Cache
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from tests.laws.subjects import EVERYBODY, keep_block_kinds_, own, random_tokens

Case = tuple[torch.Tensor, torch.Tensor | None]
"""Positions and segments (B,T)."""
ATOL = 2e-5
WIDE = 1e-7
"""Of a DeltaNet's generated code, which is judged in float64; what is left is one rounding of float32's cosines.

In float32 no number says whether it is right. A head of the DeltaNet whose query meets no key it holds gives an o near
0, and the norm after it divides o, rounding and all, by rms(o): at step 60 of qwen3-next-tiny rms(o) is 0.004 in block
1, what comes in 9e-7 off goes out 5.6e-5 off, and eager logits end 1.2e-4 from the exact ones, compiled ones 0.7e-4."""
LENGTHS = (9, 6)
ROWS = torch.arange(2)[:, None]
SCOPE_READ_ALIKE = (
    *("llama3.2-tiny", "mistral-tiny", "olmo2-tiny", "deepseek-v2-tiny"),
    *("helium-tiny", "phi3-tiny", "stablelm-tiny", "granite-tiny", "glm4-tiny", "seed-oss-tiny", "gemma1-tiny"),
    *("mixtral-tiny", "qwen2-moe-tiny", "qwen3-moe-tiny", "latent experts", "windows 5, all, 3, 5", "window 4"),
    *("llama, untied, biases, YaRN", "llama, one key/value head, 4 x 24 != 48, NTK"),
)
"""Models all of whose layers that read the scope are found in the others (test_compiled.py compares them): of these
only the decode step is traced, because masks of whole rows are read by those layers alone."""


def main(backend: str, *names: str) -> None:
    """One broken model does not hide the others: each is judged, then all complaints are raised together."""
    torch.set_num_threads(1)
    native.is_loaded()  # compiled code takes the operators in C++ of a library that was built before
    complaints = []
    for name in names:
        try:
            judge(backend, name)
            print(name, flush=True)
        except Exception as error:
            complaints.append(f"{name}: {type(error).__name__}: {str(error)[:600]}")
    if complaints:
        sys.exit("\n\n".join(complaints))


def judge(backend: str, name: str) -> None:
    torch.compiler.reset()
    model = keep_block_kinds_(own(name, torch.float32)).requires_grad_(False)
    if backend == "inductor" and any(isinstance(module, GatedDeltaNet) for module in model.modules()):
        decode(model.double(), backend, WIDE)
        return
    decode(model, backend, ATOL)
    # Generating code takes seconds a graph: only the step that decoding lives on.
    if backend != "inductor" and name not in SCOPE_READ_ALIKE:
        check_whole_rows(model, backend, apart=EVERYBODY.index(name) % 4 == 1)


def scope_readers(model: Decoder) -> set[str]:
    """The kinds of the model's layers that read positions, masks or caches: their classes, parts and parameters, and
    their options, of which numbers and objects say their type alone."""

    def describe(module: nn.Module) -> list[Any]:
        options = [(key, value) for key, value in vars(module).items() if not key.startswith("_")]
        plain = {key: value if isinstance(value, bool | str) else type(value).__name__ for key, value in options}
        return [
            type(module).__name__,
            sorted(plain.items()),
            [name for name, _ in module.named_parameters(recurse=False)],
        ]

    readers = [
        module for module in model.modules()
        if "scope" in inspect.signature(type(module).forward).parameters
        and type(module).__module__.rsplit(".", 1)[-1] not in ("decoder", "block", "feed_forward", "moe", "experts")
    ]  # fmt: skip
    return {str([(name, *describe(part)) for name, part in reader.named_modules()]) for reader in readers}


def compile_whole(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """One graph of fixed shapes; generated code is kept apart by the processor's vectors."""
    options = vector_options() if backend == "inductor" else None
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=False, options=options)


def check_whole_rows(model: Decoder, backend: str, *, apart: bool) -> None:
    """Rows, and packed documents with padding before and between them, are one graph, and the eager logits. apart:
    padding alone and documents alone too. (One graph for all: a quarter of tracing one is its parameters.)"""

    def logits(tokens: torch.Tensor, cases: list[Case]) -> list[torch.Tensor]:
        others = [model(tokens, Scope(positions, segment_ids=segments)) for positions, segments in cases]
        return [model(tokens), *others]

    tokens = random_tokens(model, 2, 17)
    both = torch.tensor([[-1, -1, *range(9), *range(6)], [*range(9), -1, -1, *range(6)]])
    padded = torch.tensor([[-1, -1, *range(15)], [*range(17)]])
    packed, segments = torch.tensor([[*range(9), *range(8)]] * 2), torch.tensor([[0] * 9 + [1] * 8] * 2)
    both_segments = torch.tensor([[5, 5, *[0] * 9, *[1] * 6], [*[0] * 9, 7, 7, *[1] * 6]])
    cases: list[Case] = [(both, both_segments), *([(padded, None), (packed, segments)] if apart else [])]
    compiled, eager = compile_whole(logits, backend)(tokens, cases), logits(tokens, cases)
    read = [torch.ones_like(both, dtype=torch.bool), *(positions >= 0 for positions, _ in cases)]
    for ours, expected, here in zip(compiled, eager, read, strict=True):
        torch.testing.assert_close(ours[here], expected[here], atol=ATOL, rtol=0)


def decode(model: Decoder, backend: str, atol: float) -> None:
    """A ragged prefill in eager mode, then 64 compiled steps: one graph, never compiled again, the eager logits. A
    model with a short context starts again with another cache: still the one graph."""
    room = min(9 + 64, model.config.max_position_embeddings)
    tokens = random_tokens(model, 2, room)

    def step(tokens: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        return model(tokens, Scope(positions, cache=cache))

    compiled, expected = compile_whole(step, backend), eager_logits(model, tokens, step)
    torch._dynamo.utils.counters.clear()
    for i in range(64):
        offset = i % (room - 9)
        if offset == 0:
            cache = prefill_left_padded(model, tokens, room)
        positions = torch.tensor(LENGTHS)[:, None] + offset
        logits = compiled(tokens.gather(1, positions), positions, cache)
        torch.testing.assert_close(logits, expected[ROWS, positions], atol=atol, rtol=0)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, f"64 decode steps made {graphs} graphs"


def eager_logits(model: Decoder, tokens: torch.Tensor, step: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Logits (B,T,V) of whole rows, or, of a recurrent model, of a step for each token behind the prefill: in float32
    its chunks differ from its steps by half of ATOL, other models by a fifth and less."""
    if not any(isinstance(module, GatedDeltaNet) for module in model.modules()):
        return model(tokens)
    room = tokens.shape[1]
    cache, logits = prefill_left_padded(model, tokens, room), model(tokens)
    for offset in range(room - 9):
        positions = torch.tensor(LENGTHS)[:, None] + offset
        logits[ROWS, positions] = step(tokens.gather(1, positions), positions, cache)
    return logits


def prefill_left_padded(model: Decoder, tokens: torch.Tensor, room: int) -> Cache:
    """A cache that holds the first LENGTHS tokens of each row, from a left-padded pass."""
    cache = model.new_cache(2, room)
    positions = torch.stack([torch.arange(length - 9, length).clamp(min=-1) for length in LENGTHS])
    prompt = tokens.gather(1, positions.clamp(min=0))
    model(prompt, Scope(positions, cache=cache))
    return cache


if __name__ == "__main__":
    main(*sys.argv[1:])
