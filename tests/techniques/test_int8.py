"""Int8 matrices: the rounding by hand, the kernel against the definition, and what refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import llm_quest as quest
from llm_quest.layers.int8 import (
    MAX_KERNEL_ROWS,
    Int8Matrix,
    int8_linear,
    int8_linear_packed,
    int8_linear_reference,
    quantize_rows,
)
from llm_quest.models.build import preset
from llm_quest.scope import Scope
from llm_quest.techniques.int8 import Int8Weights
from llm_quest.techniques.lora import LoRA, merge_adapter
from tests.laws.subjects import TINY, own, random_tokens

every_page = pytest.mark.parametrize("page", TINY)


def test_rounding_by_hand():
    weight = torch.tensor([[127.0, -63.4, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.5, 0.25]])
    q, scale = quantize_rows(weight)
    assert scale[0] == 1.0
    assert q[0].tolist() == [127, -63, 0, 0]
    assert q[1].tolist() == [0, 0, 0, 0]
    assert (q[2].tolist(), scale[2].item()) == ([-127, 64, 32, 16], pytest.approx(2 / 127, rel=2**-8))


def test_no_number_moves_by_more_than_half_a_step_and_no_scale_is_lost_in_bfloat16():
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    q, scale = quantize_rows(weight)
    assert torch.equal(scale.bfloat16().float(), scale)
    inside = (weight / scale[:, None]).abs() <= 127
    error = (q * scale[:, None] - weight).abs() / scale[:, None]
    assert error[inside].max() <= 0.5 + 1e-5
    assert error.max() <= 1.0, "the largest of a row may be a little beyond 127"


@pytest.mark.parametrize("rows", [1, 3, MAX_KERNEL_ROWS])
@pytest.mark.parametrize(("out", "width"), [(5, 32), (16, 96), (100, 64), (33, 768), (1, 32)])
def test_the_kernel_is_the_definition_up_to_bfloat16(rows: int, out: int, width: int):
    generator = torch.Generator().manual_seed(rows)
    q, scale = quantize_rows(torch.randn(out, width, generator=generator) * torch.linspace(0.1, 3, out)[:, None])
    x = torch.randn(rows, width, generator=generator)
    rounded = int8_linear_reference(x.bfloat16().float(), q, scale)
    assert ((int8_linear_packed(x, q, scale) - rounded).abs() <= 2**-8 * rounded.abs() + 1e-4).all(), (
        "no other rounding but these"
    )


def test_few_rows_take_the_kernel_and_proofs_the_definition():
    q, scale = quantize_rows(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(MAX_KERNEL_ROWS + 1, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(int8_linear(x[:MAX_KERNEL_ROWS], q, scale), int8_linear_packed(x[:MAX_KERNEL_ROWS], q, scale))
    assert torch.equal(int8_linear(x, q, scale), int8_linear_reference(x, q, scale))
    narrow, steps = quantize_rows(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(int8_linear(x[:1, :24], narrow, steps), int8_linear_reference(x[:1, :24], narrow, steps)), (
        "and so do odd widths"
    )
    assert torch.equal(
        int8_linear(x[:1].double(), q, scale.double()), int8_linear_reference(x[:1].double(), q, scale.double())
    )


@every_page
def test_the_model_is_the_one_whose_matrices_were_rounded(page: str):
    """In float64: the same logits as the float model with W replaced by scale * q, everywhere."""
    small, plain = Int8Weights()(own(page)), own(page)
    rounded = {path: module.weight for path, module in small.named_modules() if isinstance(module, Int8Matrix)}
    with torch.no_grad():
        for path, weight in rounded.items():
            path = path.removesuffix(".matrix")
            target: Any = plain.get_parameter(
                path if path.endswith(("experts.gate_up", "experts.down")) else f"{path}.weight"
            )
            target.copy_(weight)
    tokens = random_tokens(plain, 2, 9)
    torch.testing.assert_close(small(tokens), plain(tokens), rtol=0, atol=1e-10)
    assert (small(tokens) - own(page)(tokens)).abs().max() > 1e-4


@every_page
def test_it_takes_about_a_quarter_and_nothing_learns(page: str):
    model = quest.build(page)
    matrices = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    before = sum(p.nbytes for p in model.parameters())
    small = Int8Weights()(model)
    assert sum(p.nbytes for p in small.parameters()) < before - matrices // 2
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("page", ["llama3.2-tiny", "gpt2-tiny", "deepseek-v3-tiny", "mixtral-tiny"])
def test_decoding_in_float32_stays_near_the_exact_logits(page: str):
    small, exact = Int8Weights()(own(page, torch.float32)), own(page, torch.float32)
    tokens = random_tokens(small, 1, 12)
    cache, parts = small.new_cache(1, 12), []
    for start in range(12):
        part = tokens[:, start : start + 1]
        parts.append(small(part, Scope.unpadded(part, cache=cache, start=start)))
    decoded, expected = torch.cat(parts, dim=1), exact(tokens)
    assert ((decoded - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.05


def test_a_capped_head_stays_capped_and_a_tied_one_stays_one():
    tied = Int8Weights()(quest.build(replace(preset("llama3.2-tiny").config, tie_word_embeddings=True)))
    assert tied.head.matrix is tied.embed.token.matrix
    gemma = next(name for name in TINY if name.startswith("gemma2"))
    capped, plain = Int8Weights()(own(gemma)), own(gemma)
    assert capped.head.softcap == plain.head.softcap is not None


def test_saved_as_bytes_and_read_in_another_dtype(tmp_path):
    small = Int8Weights()(own("llama3.2-tiny", torch.float32))
    quest.save(small, tmp_path / "small")
    again = quest.load(tmp_path / "small", dtype="bfloat16")
    assert again.blocks[0].mixer.layer.qkv.matrix.q.dtype is torch.int8
    assert again.blocks[0].mixer.norm.weight.dtype is torch.bfloat16
    assert torch.equal(
        again.blocks[0].mixer.layer.qkv.matrix.scale.float(), small.blocks[0].mixer.layer.qkv.matrix.scale
    )
    assert again(random_tokens(again, 1, 5)).dtype is torch.bfloat16


def test_an_adapter_is_merged_first_and_twice_is_refused():
    model = LoRA(rank=2)(own("llama3.2-tiny"))
    with pytest.raises(ValueError, match="merge it first"):
        Int8Weights()(model)
    merge_adapter(model)
    small = Int8Weights()(model)
    with pytest.raises(ValueError, match="already"):
        Int8Weights()(small)
    with pytest.raises(ValueError, match="no matrix of this model"):
        LoRA()(small)
