"""Against transformers, every tensor random, through the files that transformers writes and our hub reads: logits to
2e-5, each layer's output, gradients to 1e-5, ragged batches, caches."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import llm_quest as quest
from llm_quest.models.build import family_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.weight_names import ConcatRows, Transposed
from llm_quest.scope import Scope
from tests.laws.test_decoder import in_chunks, pad_rows
from tests.oracles import ATOL, ROPES, RTOL, logits_of, save_published, tiny_gpt2, tiny_llama

CASES: dict[str, Callable[[], Any]] = {
    "gpt2": tiny_gpt2,
    "gpt2, hidden 100, eps 1e-3": lambda: tiny_gpt2(n_inner=100, layer_norm_epsilon=1e-3),
    **{f"llama, {rope}": functools.partial(tiny_llama, rope=rope) for rope in ROPES},
    "llama, untied, biases": lambda: tiny_llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama, one key/value head, eps 1e-2": lambda: tiny_llama(num_key_value_heads=1, rms_norm_eps=1e-2),
    "llama, as many key/value heads": lambda: tiny_llama(num_key_value_heads=4),
}
OLD = ("gpt2", "llama, default", "llama, llama3", "llama, yarn", "llama, linear")
CLOSE = {"atol": ATOL, "rtol": RTOL}


@functools.cache
def pair(name: str, old_spelling: bool = False) -> tuple[Decoder, Any]:
    """Ours, loaded from the folder that theirs wrote; and theirs."""
    theirs = CASES[name]()
    with tempfile.TemporaryDirectory() as folder:
        return quest.load(save_published(theirs, folder, old_spelling=old_spelling)), theirs


def tokens_for(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))


every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("length", [1, 13, 120])
def test_logits_equal(name: str, length: int):
    ours, theirs = pair(name)
    tokens = tokens_for(3, length)
    torch.testing.assert_close(ours(tokens), logits_of(theirs, tokens), **CLOSE)


@pytest.mark.parametrize("name", OLD)
def test_logits_equal_when_the_config_is_spelled_as_it_used_to_be(name: str):
    ours, theirs = pair(name, old_spelling=True)
    tokens = tokens_for(2, 100)
    torch.testing.assert_close(ours(tokens), logits_of(theirs, tokens), **CLOSE)


@every_case
def test_every_layers_output_equals(name: str):
    ours, theirs = pair(name)
    tokens = tokens_for(2, 40)
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda m, i, out: seen.append(out)) for m in (ours.embed, *ours.blocks[:-1], ours.norm)
    ]
    ours(tokens)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True).hidden_states
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@every_case
def test_gradients_equal(name: str):
    ours, theirs = pair(name)
    tokens = tokens_for(3, 24)
    gradients = dict(zip(dict(ours.named_parameters()), grads(ours, ours(tokens), tokens), strict=True))
    theirs_by_name = dict(
        zip(dict(theirs.named_parameters()), grads(theirs, theirs(tokens).logits, tokens), strict=True)
    )
    for path, published in family_of(ours.config).weight_map(ours.config).items():
        match published:
            case ConcatRows(names=names):
                expected = torch.cat([theirs_by_name[part] for part in names])
            case Transposed(name=one):
                expected = theirs_by_name[one].T
            case one:
                expected = theirs_by_name[one]
        torch.testing.assert_close(
            gradients[path], expected, atol=1e-5, rtol=1e-4, msg=lambda text, path=path: f"{path}: {text}"
        )


def grads(model: torch.nn.Module, logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return torch.autograd.grad(loss, list(model.parameters()))


@every_case
def test_a_ragged_left_padded_batch_equals(name: str):
    ours, theirs = pair(name)
    rows = [tokens_for(1, length, seed=length)[0] for length in (3, 9, 6)]
    tokens, positions = pad_rows(rows, [range(9 - len(row), 9) for row in rows], 9)
    here = positions >= 0
    expected = logits_of(theirs, tokens, attention_mask=here.long(), position_ids=positions.clamp(min=0))
    torch.testing.assert_close(ours(tokens, Scope(positions))[here], expected[here], **CLOSE)


@every_case
@pytest.mark.parametrize("chunks", [(100,), (90,) + (1,) * 10, (3, 5, 1, 91)], ids=str)
def test_cached_passes_equal_one_pass_of_theirs(name: str, chunks: tuple[int, ...]):
    ours, theirs = pair(name)
    tokens = tokens_for(2, 100)
    torch.testing.assert_close(in_chunks(ours, tokens, chunks), logits_of(theirs, tokens), **CLOSE)


@every_case
def test_padded_prefill_and_cached_steps_equal_each_row_alone(name: str):
    ours, theirs = pair(name)
    rows = [tokens_for(1, length + 5, seed=length)[0] for length in (3, 9, 6)]
    prompts = [row[:-5] for row in rows]
    tokens, positions = pad_rows(prompts, [range(9 - len(row), 9) for row in prompts], 9)
    cache = ours.new_cache(3, 16)
    logits = [ours(tokens, Scope(positions, cache=cache))[:, -1:]]
    for step in range(5):
        places = torch.tensor([[len(prompt) + step] for prompt in prompts])
        now = torch.stack([row[len(row) - 5 + step, None] for row in rows])
        logits.append(ours(now, Scope(places, cache=cache)))
    for b, row in enumerate(rows):
        torch.testing.assert_close(torch.cat(logits, dim=1)[b], logits_of(theirs, row[None])[0, -6:], **CLOSE)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("llama")])
def test_positions_far_apart_equal(name: str):
    """Scaled and plain frequencies differ little over adjacent positions; over 200 they differ by whole units."""
    ours, theirs = pair(name)
    tokens = tokens_for(2, 12)
    positions = torch.arange(0, 240, 20).expand(2, -1)
    ones = torch.ones_like(tokens)  # without a mask they would take every jump for a new document
    expected = logits_of(theirs, tokens, position_ids=positions, attention_mask=ones)
    torch.testing.assert_close(ours(tokens, Scope(positions)), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama, llama3", "gpt2"])
def test_packed_documents_equal_theirs(name: str):
    ours, theirs = pair(name)
    tokens = tokens_for(1, 16)
    positions = torch.tensor([[*range(6), *range(3), *range(7)]])
    segments = torch.tensor([[0] * 6 + [1] * 3 + [2] * 7])
    expected = logits_of(theirs, tokens, position_ids=positions)
    torch.testing.assert_close(ours(tokens, Scope(positions, segment_ids=segments)), expected, **CLOSE)
