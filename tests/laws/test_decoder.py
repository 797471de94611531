"""The promises of `contracts.Decoder`, for every page and variant in `subjects.EVERYBODY`. None is skipped.

In float64, every tensor random: what should be equal is so to 1e-10, and a mistake moves logits by 1e-4 and more."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import llm_quest as quest
from llm_quest.data.batch import TokenBatch
from llm_quest.layers.delta_net import GatedDeltaNet
from llm_quest.layers.scaled_dot_product import ScaledDotProduct, explicit_attention
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import Scope
from tests.laws.subjects import EVERYBODY, PUBLISHED, TINY, fresh, own, random_tokens, shared

everybody = pytest.mark.parametrize("name", EVERYBODY)
EXACT = {"rtol": 0.0, "atol": 1e-10}
CACHED_SHAPE = (3, 23)


def in_chunks(model: Decoder, tokens: Tensor, chunks: Sequence[int], slack: int = 0) -> Tensor:
    """The logits of one sequence fed to a cache in passes of these lengths."""
    cache = model.new_cache(tokens.shape[0], tokens.shape[1], slack)
    parts, start = [], 0
    for length in chunks:
        part = tokens[:, start : start + length]
        parts.append(model(part, Scope.unpadded(part, cache=cache, start=start)))
        start += length
    return torch.cat(parts, dim=1)


def pad_rows(rows: Sequence[Tensor], slots: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Tokens and positions (B, length): row b's tokens in columns slots[b], padding (0, at -1) elsewhere."""
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.full((len(rows), length), -1)
    for b, (row, columns) in enumerate(zip(rows, slots, strict=True)):
        tokens[b, list(columns)] = row
        positions[b, list(columns)] = torch.arange(len(row))
    return tokens, positions


@functools.cache
def rows_and_logits(name: str, more: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of three lengths, and the logits (T, V) of each alone: computed once for all paddings."""
    rows = [random_tokens(shared(name), 1, length + more, seed=length)[0] for length in (5, 11, 8)]
    return rows, [shared(name)(row[None])[0] for row in rows]


def test_every_page_has_a_tiny_preset_so_that_no_page_is_skipped():
    for page in FAMILIES:
        assert any(preset.name in TINY for preset in page.presets), page.name


@everybody
def test_a_later_token_never_changes_earlier_logits(name: str):
    model = shared(name)
    tokens = random_tokens(model, 2, 14)
    logits = model(tokens)
    changed = tokens.repeat(14, 1, 1)
    for t in range(1, 14):
        changed[t, :, t:] = (changed[t, :, t:] + 1) % model.config.vocab_size
    others = model(changed.flatten(0, 1)).unflatten(0, (14, 2))
    for t in range(1, 14):
        torch.testing.assert_close(others[t, :, :t], logits[:, :t], **EXACT)
        moved = (others[t, :, t] - logits[:, t]).abs().max()
        assert moved > 1e-3, "the token itself must matter, or this proves nothing"


@everybody
def test_an_earlier_token_is_seen(name: str):
    model = shared(name)
    tokens = random_tokens(model, 2, 12)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % model.config.vocab_size
    assert (model(changed)[:, 11] - model(tokens)[:, 11]).abs().max() > 1e-4


@everybody
@pytest.mark.parametrize(("chunks", "slack"), [((1,) * 23, 0), ((3, 5, 1, 14), 3)], ids=["token by token", "chunks"])
def test_cached_equals_uncached(name: str, chunks: tuple[int, ...], slack: int):
    model = shared(name)
    tokens = random_tokens(model, *CACHED_SHAPE)
    torch.testing.assert_close(in_chunks(model, tokens, chunks, slack), model(tokens), **EXACT)


@everybody
def test_cached_equals_uncached_in_any_chunks(name: str):
    model = shared(name)
    tokens = random_tokens(model, *CACHED_SHAPE)
    logits = model(tokens)

    @settings(max_examples=8)
    @example(cuts=set(), slack=0)
    @example(cuts={20, 21, 22}, slack=3)
    @given(cuts=st.sets(st.integers(1, 22)), slack=st.integers(0, 6))
    def require_equal_in_chunks(cuts: set[int], slack: int) -> None:
        chunks = [b - a for a, b in pairwise([0, *sorted(cuts), 23])]
        torch.testing.assert_close(in_chunks(model, tokens, chunks, slack), logits, **EXACT)

    require_equal_in_chunks()


PADDINGS = {
    "left": lambda length, total: range(total - length, total),
    "right": lambda length, total: range(length),
    "middle": lambda length, total: [*range(2), *range(total - length + 2, total)],
    "scattered": lambda length, total: sorted(range(total), key=lambda i: (i * 7) % total)[:length],
}


def slots_of(padding: str, rows: Sequence[Tensor], total: int) -> list[list[int]]:
    return [sorted(PADDINGS[padding](len(row), total)) for row in rows]


@everybody
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_anywhere_is_invisible(name: str, padding: str):
    rows, alone = rows_and_logits(name)
    slots = slots_of(padding, rows, 13)
    tokens, positions = pad_rows(rows, slots, 13)
    logits = shared(name)(tokens, Scope(positions))
    for b, expected in enumerate(alone):
        torch.testing.assert_close(logits[b, slots[b]], expected, **EXACT)


@everybody
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_is_invisible_to_a_cache_and_to_what_is_decoded_after_it(name: str, padding: str):
    model = shared(name)
    rows, alone = rows_and_logits(name, more=6)
    prompts = [row[:-6] for row in rows]
    slots = slots_of(padding, prompts, 13)
    tokens, positions = pad_rows(prompts, slots, 13)
    cache = model.new_cache(3, 24)
    logits = model(tokens, Scope(positions, cache=cache))
    for b, expected in enumerate(alone):
        torch.testing.assert_close(logits[b, slots[b]], expected[:-6], **EXACT)
    for step in range(6):
        places = torch.tensor([[len(prompt) + step] for prompt in prompts])
        last = torch.stack([row[len(row) - 6 + step, None] for row in rows])
        logits = model(last, Scope(places, cache=cache))
        for b, expected in enumerate(alone):
            torch.testing.assert_close(logits[b, 0], expected[len(prompts[b]) + step], **EXACT)


@everybody
def test_what_a_padding_token_is_does_not_matter(name: str):
    model = shared(name)
    tokens, positions = pad_rows([random_tokens(model, 1, 6)[0]], [[1, 2, 4, 5, 6, 8]], 9)
    other = torch.where(positions < 0, 7, tokens)
    here = positions[0] >= 0
    torch.testing.assert_close(
        model(other, Scope(positions))[:, here], model(tokens, Scope(positions))[:, here], **EXACT
    )


@everybody
def test_a_row_of_nothing_but_padding_is_finite_and_changes_nobody(name: str):
    model = shared(name)
    rows = [random_tokens(model, 1, 7)[0], torch.zeros(0, dtype=torch.int64)]
    tokens, positions = pad_rows(rows, [range(7), []], 7)
    for cache in (None, model.new_cache(2, 8)):
        logits = model(tokens, Scope(positions, cache=cache))
        torch.testing.assert_close(logits[0], model(rows[0][None])[0], **EXACT)
        assert logits.isfinite().all()


@everybody
def test_a_row_of_a_batch_equals_the_row_alone(name: str):
    model = shared(name)
    tokens = random_tokens(model, 4, 12)
    torch.testing.assert_close(model(tokens), torch.cat([model(row[None]) for row in tokens]), **EXACT)


@everybody
@pytest.mark.parametrize("tail", [0, 2])
def test_packed_documents_equal_the_documents_alone(name: str, tail: int):
    model = shared(name)
    documents = [random_tokens(model, 1, length, seed=length)[0] for length in (7, 1, 9)]
    ends = torch.full((tail,), -1)
    tokens = torch.cat([*documents, torch.zeros(tail, dtype=torch.int64)])[None]
    positions = torch.cat([*(torch.arange(len(d)) for d in documents), ends])[None]
    segments = torch.cat([*(torch.full((len(d),), i) for i, d in enumerate(documents)), ends])[None]
    logits = model(tokens, Scope(positions, segment_ids=segments))[:, :17]
    torch.testing.assert_close(logits, torch.cat([model(d[None]) for d in documents], dim=1), **EXACT)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is learned by gradient: all but a router's balancing bias."""
    return {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}


@everybody
def test_every_parameter_receives_a_gradient(name: str):
    """From the objective, which is what trains: it reaches the lookahead modules too."""
    model = own(name)
    tokens = random_tokens(model, 4, 17)
    NextTokenLoss(model)(TokenBatch(tokens[:, :-1], tokens[:, 1:])).total.backward()
    assert all(
        path.endswith("router.bias")
        for path in dict(model.named_parameters()).keys() - trainable_parameters(model).keys()
    )
    for path, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 1e-8, path


@everybody
def test_every_part_of_a_stacked_projection_receives_a_gradient(name: str):
    model = own(name)
    tokens = random_tokens(model, 4, 16)
    next_token_loss(model(tokens), tokens).backward()
    gradients = {path: parameter.grad for path, parameter in model.named_parameters()}
    for path, sizes in model.row_splits().items():
        if path.startswith("mtp_modules."):
            continue  # not in this loss; the law above reaches them
        for part in gradients[path].split(sizes, dim=-2):
            assert part.abs().max() > 1e-8, path


@everybody
def test_a_fresh_models_loss_is_near_ln_v(name: str):
    model = fresh(name)
    tokens = random_tokens(model, 8, 32)
    loss = next_token_loss(model(tokens), tokens)
    assert abs(loss.item() - math.log(model.config.vocab_size)) < 0.05 * math.log(model.config.vocab_size)


DTYPES = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 0.01, torch.bfloat16: 0.08}


@functools.cache
def tokens_and_logits(name: str) -> tuple[Tensor, Tensor]:
    """Two rows and their logits in float64, for every dtype."""
    tokens = random_tokens(shared(name), 2, 15)
    return tokens, shared(name)(tokens)


def relative(ours: Tensor, exact: Tensor) -> float:
    """Of the median token: a router's choice is discrete, so in low precision a token near a tie may visit another
    expert."""
    return ((ours.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def limit(model: Decoder, dtype: torch.dtype) -> float:
    """A recurrent state sums rounding over the whole text, and chunks sum it in another order than single steps."""
    recurrent = any(isinstance(module, GatedDeltaNet) for module in model.modules())
    return DTYPES[dtype] * (1 if not recurrent else 20 if dtype is torch.float32 else 2.5)


@everybody
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_runs_forward_backward_and_cached(name: str, dtype: torch.dtype):
    model = own(name, dtype)
    tokens, exact = tokens_and_logits(name)
    hidden = model.hidden_states(tokens)
    logits = model.head(hidden)
    assert hidden.dtype is logits.dtype is dtype
    assert relative(logits, exact) < limit(model, dtype)
    with torch.no_grad():
        assert relative(in_chunks(model, tokens, (9, 1, 3, 1, 1)), exact) < limit(model, dtype)
    next_token_loss(logits, tokens).backward()
    assert all(
        parameter.grad.isfinite().all()
        for parameter in trainable_parameters(model).values()
        if parameter.grad is not None
    )


@everybody
def test_bfloat16_autocast_trains_and_keeps_float32_weights(name: str):
    model = own(name, torch.float32)
    tokens, exact = tokens_and_logits(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        cached = in_chunks(model, tokens, (9, 1, 5))
        loss = next_token_loss(logits, tokens)
    loss.backward()
    assert relative(logits, exact) < limit(model, torch.bfloat16)
    assert relative(cached, exact) < limit(model, torch.bfloat16)
    gradients = [p.grad for p in trainable_parameters(model).values() if p.grad is not None]
    assert gradients
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in gradients)


class Checkpointed(nn.Module):
    """A block that forgets its activations and works them out again in the backward pass."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        return checkpoint(self.block, x, scope, use_reentrant=False)


def loss_and_gradients(model: Decoder, tokens: Tensor) -> list[Tensor]:
    torch.manual_seed(3)  # dropout draws from the global generator
    loss = next_token_loss(model(tokens), tokens)
    reached = [
        parameter for path, parameter in trainable_parameters(model).items() if not path.startswith("mtp_modules.")
    ]
    return [loss.detach(), *torch.autograd.grad(loss, reached)]


@everybody
def test_activation_checkpointing_changes_no_value_and_no_gradient(name: str):
    model = own(name)
    tokens = random_tokens(model, 3, 12)
    plain = loss_and_gradients(model, tokens)
    model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    for before, after in zip(plain, loss_and_gradients(model, tokens), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_activation_checkpointing_repeats_the_same_dropout():
    model = build(replace(preset("gpt2-tiny").config, dropout=0.3)).train()
    tokens = random_tokens(model, 3, 12)
    plain = loss_and_gradients(model, tokens)
    model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    for before, after in zip(plain, loss_and_gradients(model, tokens), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not torch.equal(plain[0], loss_and_gradients(model.eval(), tokens)[0]), "dropout must have been on"


@everybody
def test_fused_attention_equals_the_explicit_definition(name: str):
    fused, explicit = shared(name), own(name)
    for mixer in explicit.modules():
        if isinstance(mixer, ScaledDotProduct):
            mixer.implementation = explicit_attention
    tokens = random_tokens(fused, 3, 17)
    torch.testing.assert_close(fused(tokens), explicit(tokens), **EXACT)
    torch.testing.assert_close(fused(tokens), in_chunks(explicit, tokens, (7, 1, 1, 8)), **EXACT)
    ragged, positions = pad_rows([tokens[0, :5], tokens[1, :9]], [[0, 2, 3, 4, 7], range(9)], 9)
    here = positions >= 0
    torch.testing.assert_close(fused(ragged, Scope(positions))[here], explicit(ragged, Scope(positions))[here], **EXACT)


@everybody
def test_the_head_reads_hidden(name: str):
    model = shared(name)
    tokens = random_tokens(model, 2, 6)
    torch.testing.assert_close(model.head(model.hidden_states(tokens)), model(tokens), **EXACT)


@everybody
def test_weights_survive_a_file_bit_by_bit_and_tied_ones_stay_one(name: str):
    model, other = own(name), fresh(name).double()
    bytes_on_disk = save({path: tensor.clone() for path, tensor in model.state_dict().items()})
    other.load_state_dict(load(bytes_on_disk), strict=True)
    tokens = random_tokens(model, 2, 9)
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)
    assert len(list(other.parameters())) == len(list(model.parameters()))


@everybody
def test_a_deep_copy_gives_the_same_logits_and_lives_its_own_life(name: str):
    model = own(name)
    tokens = random_tokens(model, 2, 9)
    before = model(tokens).detach()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(tokens), before, rtol=0, atol=0)
    assert len(list(twin.parameters())) == len(list(model.parameters())), "a tied matrix must stay one parameter"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    assert (twin(tokens) - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", PUBLISHED)
def test_export_then_import_is_the_identity(name: str, tmp_path):
    model = own(name, torch.float32)
    quest.save(model, tmp_path / "model")
    again = quest.load(tmp_path / "model")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for path in ours:
        torch.testing.assert_close(theirs[path], ours[path], rtol=0, atol=0)
    tokens = random_tokens(model, 2, 12)
    torch.testing.assert_close(again(tokens), model(tokens), rtol=0, atol=1e-6)
