"""Parity in float64, the law that counts: every text family equals transformers within 1e-11 where both sides compute
wholly in float64 (tests/float64.py). In float32 a DeltaNet hybrid on random weights shows 1e-4 to 3e-3 of rounding,
under which a wrong constant hides; here nothing hides."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from llm_quest.hub.float64 import computing_in_float64
from llm_quest.hub.load_save import load, save
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from tests.family_oracles import ORACLES
from tests.models.test_parity import CASES
from tests.oracles import save_published

ALL: dict[str, Callable[[], Any]] = CASES | ORACLES
LENGTH, PADDING = 70, 9  # over one chunk of the DeltaNet, fourteen windows of five
BOUND = 1e-11
"""Of logits of order 1 and of gradients; 1e-13 is the most that was seen, for every family."""


@functools.cache
def pair(name: str) -> tuple[Decoder, Any]:
    """Ours, loaded from the folder that theirs wrote; and theirs: every weight and constant in float64."""
    with computing_in_float64(), tempfile.TemporaryDirectory() as folder:
        theirs = ALL[name]().double()
        return load(save_published(theirs, folder), dtype="float64"), theirs


def tokens() -> Tensor:
    return torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def whole_ragged_rows(ours: Decoder, theirs: Any) -> tuple[Tensor, Tensor]:
    """The second row padded on the left; theirs reads each alone (LongRoPE: it chooses one list for a whole batch)."""
    ids, positions = tokens(), torch.arange(LENGTH).repeat(2, 1)
    positions[1] = (positions[1] - PADDING).clamp(min=-1)
    rows = [
        theirs(row[places >= 0][None], use_cache=False).logits[0] for row, places in zip(ids, positions, strict=True)
    ]
    return ours(ids, Scope(positions))[positions >= 0], torch.cat(rows)


@torch.no_grad()
def logits_in_chunks(ours: Decoder, theirs: Any) -> tuple[Tensor, Tensor]:
    cache, outs, start = ours.new_cache(2, LENGTH), [], 0
    for piece in tokens().split((9, 1, 1, 3, 31, 1, 24), dim=1):
        outs.append(ours(piece, Scope.unpadded(piece, cache=cache, start=start)))
        start += piece.shape[1]
    return torch.cat(outs, 1), theirs(tokens(), use_cache=False).logits


@torch.no_grad()
def packed_documents(ours: Decoder, theirs: Any) -> tuple[Tensor, Tensor]:
    """Documents packed into rows, the second row ending in padding; theirs reads each alone."""
    ids, spans = tokens(), {0: ((0, 31), (31, LENGTH)), 1: ((0, 3), (3, 50), (50, LENGTH - 8))}
    positions, segments = torch.full_like(ids, -1), torch.zeros_like(ids)
    alone = []
    for row, documents in spans.items():
        for number, (start, stop) in enumerate(documents):
            positions[row, start:stop], segments[row, start:stop] = torch.arange(stop - start), number
            alone.append(theirs(ids[row, start:stop][None], use_cache=False).logits[0])
    return ours(ids, Scope(positions, segment_ids=segments))[positions >= 0], torch.cat(alone)


def gradients(ours: Decoder, theirs: Any) -> tuple[Tensor, Tensor]:
    """Of a cross-entropy, for every weight, matched by published names: both save a model whose weights they are."""
    with tempfile.TemporaryDirectory() as folder, gradients_for_weights(ours), gradients_for_weights(theirs):
        got = load_file(save(ours, f"{folder}/ours") / "model.safetensors")
        expected = load_file(save_published(theirs, f"{folder}/theirs") / "model.safetensors")
    assert got.keys() == expected.keys()
    return tuple(torch.cat([tensors[name].flatten() for name in got]) for tensors in (got, expected))


@contextmanager
def gradients_for_weights(model: Any) -> Iterator[None]:
    """Inside, every learned weight is its gradient, zero where no token chose it (an expert). A router's bias, which
    has none, stays."""
    output = model(tokens())
    logits = output if isinstance(output, Tensor) else output.logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter.data for parameter in learned]
    for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned, allow_unused=True), strict=True):
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    yield
    for parameter, weight in zip(learned, weights, strict=True):
        parameter.data = weight


@pytest.mark.parametrize("compare", [whole_ragged_rows, logits_in_chunks, packed_documents, gradients])
@pytest.mark.parametrize("name", ALL)
def test_a_family_equals_transformers_in_float64(name, compare):
    """No family needs a bound of its own: constants that a float32 model keeps rounded (Gemma's embedding scale, YaRN's
    factors) are computed in float64 too, on both sides."""
    with computing_in_float64():
        got, expected = compare(*pair(name))
    assert got.dtype == expected.dtype == torch.float64
    difference = float((got - expected).abs().max())
    assert difference <= BOUND, name
