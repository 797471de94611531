"""DyT equals x-transformers' module bit by bit; its LLaMA form is what the paper lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.layers.block import SingleBlock
from llm_quest.layers.norm import DynamicTanh, LayerNorm, RMSNorm, ZeroCenteredRMSNorm
from llm_quest.models.build import build
from llm_quest.techniques.dynamic_tanh import DyT
from tests.later import Later
from tests.laws.subjects import TINY

x_transformers = Later("x_transformers.x_transformers")


def random_pair(width: int, generator: torch.Generator) -> tuple[DynamicTanh, Any]:
    ours, theirs = DynamicTanh(width, 0.5, bias=True), x_transformers.DynamicTanh(width, init_alpha=0.5)
    with torch.no_grad():
        for mine, other in ((ours.alpha, theirs.pre_tanh_scale), (ours.weight, theirs.gamma), (ours.bias, theirs.beta)):
            mine.copy_(torch.randn(mine.shape, generator=generator))
            other.copy_(mine)
    return ours, theirs


def test_it_equals_x_transformers_bit_by_bit(generator: torch.Generator):
    ours, theirs = random_pair(20, generator)
    x = 3 * torch.randn(4, 7, 20, generator=generator)
    assert torch.equal(ours(x), theirs(x))
    assert ours.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_limits_by_hand():
    norm = DynamicTanh(3, 1e-4, bias=False)
    norm.weight.data.fill_(1e4)
    x = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(norm(x), x, atol=1e-5, rtol=0)
    norm.weight.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(norm(1e7 * x), torch.tensor([1.0, -2.0, 3.0]))
    y = DynamicTanh(3, 0.7, bias=True)(x)
    torch.testing.assert_close(DynamicTanh(3, 0.7, bias=True)(x.flip(0)), y.flip(0))


@pytest.mark.parametrize("page", TINY)
def test_every_norm_of_the_stream_is_replaced_and_none_within_a_layer(page: str):
    before, model = build(page), DyT()(build(page))
    norms = [path for path, m in before.named_modules() if isinstance(m, RMSNorm | ZeroCenteredRMSNorm | LayerNorm)]
    replaced = [path for path, module in model.named_modules() if isinstance(module, DynamicTanh)]
    branches = (".mixer_norm", ".feed_forward_norm")
    assert replaced == [path for path in norms if ".layer." not in path or path.endswith(branches)]
    assert {path.split(".")[-1] for path in norms if path not in replaced} <= {"q_norm", "k_norm", "kv_norm", "norm"}
    per_block = 1 if isinstance(model.blocks[0], SingleBlock) else 2
    assert len(replaced) >= per_block * len(model.blocks) + 1
    assert all(m.alpha.item() == 0.5 for m in model.modules() if isinstance(m, DynamicTanh))


def test_the_llama_form():
    model = DyT(form="llama")(build("llama3.2-tiny"))
    starts = {path: module.alpha.item() for path, module in model.named_modules() if isinstance(module, DynamicTanh)}
    assert {path for path, start in starts.items() if start == 1.0} == set(starts), "48 wide: 1.0 and 1.0"
    assert all(module.bias is None for module in model.modules() if isinstance(module, DynamicTanh))
    assert model.embed.scale.item() == pytest.approx(48**0.5)
    assert model.head.weight is not model.embed.token.weight
    assert torch.equal(model.head.weight, model.embed.token.weight)


def test_alphas_of_the_papers_table():
    llama = DyT(form="llama")
    assert [llama.initial_alphas(width) for width in (1024, 2048, 4096, 5120, 8192)] == [
        (1.0, 1.0),
        (1.0, 0.5),
        (0.8, 0.2),
        (0.6, 0.15),
        (0.2, 0.05),
    ]
    assert DyT().initial_alphas(4096) == (0.5, 0.5)
    assert DyT(alpha=0.3).initial_alphas(64) == (0.3, 0.3)
    assert DyT(form="llama", attention_alpha=0.9).initial_alphas(4096) == (0.9, 0.2)
    model = DyT(alpha=0.2, attention_alpha=0.8)(build("gpt2-tiny"))
    assert model.blocks[0].mixer.norm.alpha.item() == pytest.approx(0.8)
    assert model.blocks[0].feed_forward.norm.alpha.item() == model.norm.alpha.item() == pytest.approx(0.2)


def test_a_scaled_embedding_is_not_scaled_twice():
    model = DyT(form="llama")(build("gemma3-tiny"))
    assert model.embed.scale.item() == pytest.approx(1.0, abs=1e-6)


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="known: plain, llama"):
        DyT(form="gpt")
    with pytest.raises(UsageError, match="above 0"):
        DyT(alpha=0.0)
