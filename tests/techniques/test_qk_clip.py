"""QK-Clip: after the clip the largest logit is tau, for every way that heads, keys and biases are arranged; what need
not move does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec
from llm_quest.data.batch import TokenBatch
from llm_quest.errors import UsageError
from llm_quest.layers.attention import GroupedQueryAttention, SigmoidOutputGate
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.scaled_dot_product import ScaledDotProduct, explicit_attention
from llm_quest.models.build import build
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import CausalMask, MaskSpec, Scope, SlidingWindow
from llm_quest.techniques.qk_clip import MaxLogitMeter, QKClip, max_attention_logits

TAU = 0.5


class One(nn.Module):
    """A model that is one mixer, so that what it reads does not change when it is clipped."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.spec = ModelSpec("one", None)
        self.mixer = mixer


def make_gqa(heads: int, groups: int, dtype: torch.dtype, **more) -> nn.Module:
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 8,
        "rotary": RotaryEmbedding(8, 10_000.0),
    }
    return GroupedQueryAttention(24, **(sizes | more)).to(dtype)


def make_gated(heads: int, groups: int, dtype: torch.dtype) -> nn.Module:
    mixer = make_gqa(heads, groups, dtype, bias=True)
    mixer.qkv = PackedLinear(24, q=heads * 16, k=groups * 8, v=groups * 8, bias=True).to(dtype)
    mixer.output_gate = SigmoidOutputGate()
    return mixer


def narrow_values(heads: int, groups: int, dtype: torch.dtype, **more) -> nn.Module:
    mixer = make_gqa(heads, groups, dtype, **more)
    mixer.qkv = PackedLinear(24, q=heads * 8, k=groups * 8, v=groups * 5).to(dtype)
    mixer.out = nn.Linear(heads * 5, 24, bias=False).to(dtype)
    return mixer


def latent(q_rank: int | None, dtype: torch.dtype) -> nn.Module:
    sizes = {
        "num_attention_heads": 4,
        "q_lora_rank": q_rank,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    }
    return MultiHeadLatentAttention(
        24, **sizes, rotary=RotaryEmbedding(4, 10_000.0), attend=ScaledDotProduct(0.3), bias=True
    ).to(dtype)


MIXERS = {
    "MHA": lambda dtype: make_gqa(4, 4, dtype),
    "MHA with biases": lambda dtype: make_gqa(4, 4, dtype, bias=True),
    "GQA, gated, biases": lambda dtype: make_gated(6, 2, dtype),
    "MQA, window": lambda dtype: narrow_values(4, 1, dtype, sliding_window=3),
    "MLA": lambda dtype: latent(10, dtype),
    "MLA without q_rank": lambda dtype: latent(None, dtype),
}
everybody = pytest.mark.parametrize("name", MIXERS)


def mixer_and_input(name: str, dtype: torch.dtype = torch.float64) -> tuple[One, Tensor]:
    """The mixer with all tensors random (the last head's queries small) and what it reads."""
    generator = torch.Generator().manual_seed(0)
    mixer = MIXERS[name](dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        q = (
            mixer.qkv.weight[mixer.qkv.row_slice("q")]
            if isinstance(mixer, GroupedQueryAttention)
            else mixer.q_up.weight
        )
        q[-q.shape[0] // mixer.num_attention_heads :] *= 1e-3
        if isinstance(mixer, GroupedQueryAttention) and mixer.qkv.bias is not None:
            q = mixer.qkv.bias[mixer.qkv.row_slice("q")]
            q[-q.shape[0] // mixer.num_attention_heads :] *= 1e-3
    return One(mixer.train()), torch.randn(2, 70, 24, generator=generator, dtype=dtype)


def take_max_logits(model: One, x: Tensor) -> Tensor:
    """S of a training pass, taken away."""
    model.mixer(x, Scope.unpadded(x[..., 0]))
    return model.mixer.attend.max_logits.take()


def max_logits_after_clip(model: One, x: Tensor, clip: QKClip) -> Tensor:
    model.mixer(x, Scope.unpadded(x[..., 0]))
    clip.on_step_end(model, 1)
    return take_max_logits(model, x)


@everybody
@pytest.mark.parametrize("clip", [QKClip(TAU), QKClip(TAU, heads="layer"), QKClip(TAU, magnitude=True)], ids=str)
def test_after_the_clip_the_largest_logit_is_tau(name: str, clip: QKClip):
    model, x = mixer_and_input(name)
    clip(model)
    before = take_max_logits(model, x)
    assert before.max() > 2 * TAU
    after = max_logits_after_clip(model, x, clip)
    assert after.max() <= TAU * (1 + 1e-6)
    if clip.heads == "each":
        torch.testing.assert_close(after, before.clamp(max=TAU), rtol=1e-9, atol=0)
    else:
        torch.testing.assert_close(after, before * (TAU / before.max()), rtol=1e-9, atol=0)
    torch.testing.assert_close(max_logits_after_clip(model, x, clip), after, rtol=1e-9, atol=0)


@everybody
def test_in_float32_the_bound_holds_to_one_in_a_million(name: str):
    model, x = mixer_and_input(name, torch.float32)
    clip = QKClip(TAU)
    clip(model)
    assert max_logits_after_clip(model, x, clip).max() <= TAU * (1 + 1e-6)


@pytest.mark.parametrize("shared", ["query", "group", "both"])
def test_the_three_ways_to_share_a_key(shared: str):
    model, x = mixer_and_input("GQA, gated, biases")
    clip = QKClip(TAU, key_share=shared)
    clip(model)
    before = take_max_logits(model, x)
    after = max_logits_after_clip(model, x, clip)
    own = before.clamp(max=TAU)
    groups = (before * (TAU / before.view(2, 3).amax(1).clamp(min=TAU)).repeat_interleave(3)).clamp(max=TAU)
    torch.testing.assert_close(after, groups if shared == "group" else own, rtol=1e-9, atol=0)


@everybody
def test_heads_below_tau_and_all_values_stay_bit_by_bit(name: str):
    model, x = mixer_and_input(name)
    clip = QKClip(TAU)
    clip(model)
    heads: list[Tensor] = []
    model.mixer.attend.register_forward_hook(lambda attend, inputs, output: heads.append(output))
    before = take_max_logits(model, x)
    max_logits_after_clip(model, x, clip)
    stays = (before <= TAU).nonzero()[:, 0].tolist()
    assert stays == [model.mixer.num_attention_heads - 1]
    assert torch.equal(heads[-1][:, :, stays], heads[0][:, :, stays])
    assert not torch.equal(heads[-1][:, :, 0], heads[0][:, :, 0])
    assert torch.equal(heads[-1][:, 0], heads[0][:, 0]), "the first token sees its own value alone, whatever the logits"


def test_a_gate_made_beside_the_query_stays():
    model, x = mixer_and_input("GQA, gated, biases")
    clip = QKClip(TAU)
    clip(model)
    qkv, heads = model.mixer.qkv, model.mixer.num_attention_heads
    before = [part[qkv.row_slice("q")].unflatten(0, (heads, 2, -1)).clone() for part in (qkv.weight, qkv.bias)]
    max_logits_after_clip(model, x, clip)
    for part, old in zip((qkv.weight, qkv.bias), before, strict=True):
        now = part[qkv.row_slice("q")].unflatten(0, (heads, 2, -1))
        assert torch.equal(now[:, 1], old[:, 1])
        assert not torch.equal(now[:, 0], old[:, 0])


def test_mlas_shared_rotary_key_stays():
    model, x = mixer_and_input("MLA")
    clip = QKClip(TAU)
    clip(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    max_logits_after_clip(model, x, clip)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ["mixer.q_up.weight", "mixer.kv_up.weight"]


def by_definition(q: Tensor, k: Tensor, attention_mask: MaskSpec, scope: Scope) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    seen = scope.build_mask(
        scope.position_ids, scope.segment_ids, 5 if isinstance(attention_mask, SlidingWindow) else None
    )
    seen = torch.ones_like(seen) if attention_mask is CausalMask.FULL else seen
    real = (scope.position_ids >= 0)[:, None, :, None]
    return scores.masked_fill(~(seen[:, None] & real), float("-inf")).amax(dim=(0, 2, 3))


@pytest.mark.parametrize("kind", ["causal", "band", "all", "padding and documents"])
def test_only_visible_keys_of_real_queries_count(kind: str, generator):
    q = torch.randn(3, 150, 4, 6, generator=generator, dtype=torch.float64)
    k = torch.randn(3, 150, 2, 6, generator=generator, dtype=torch.float64)
    scope = Scope.unpadded(q[:, :, 0, 0])
    k[0, 124] = 9 * q[0, 128, ::2]  # the farthest key that the first query of a block of 128 sees through a window of 5
    visible = {"causal": CausalMask.CAUSAL, "band": SlidingWindow(5), "all": CausalMask.FULL}.get(kind)
    if visible is None:
        places = torch.arange(150).expand(3, -1).clone()
        places[0, :9] = -1
        k[0, :9] *= 50  # the padding's keys and queries are large
        q[0, :9] *= 50
        scope = Scope(places, segment_ids=torch.arange(150).expand(3, -1) // 40)
        visible = scope.attention_mask()
    torch.testing.assert_close(max_attention_logits(q, k, visible, scope, False), by_definition(q, k, visible, scope))


def test_negative_logits_clip_nothing_and_bring_no_nan():
    S = torch.tensor([-3.0, 0.0, 50.0, 400.0, float("-inf"), float("nan")])
    assert QKClip().gamma(S).tolist() == [1.0, 1.0, 1.0, 0.25, 1.0, 1.0]


def test_measured_in_training_only_in_both_forms_and_over_micro_batches():
    model = build("gpt2-tiny").double()
    QKClip()(model)
    watches = [block.mixer.layer.attend.max_logits for block in model.blocks]
    tokens = [torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    model(tokens[0])
    assert all(watch.max_logits is None for watch in watches)
    model.train()
    alone = []
    for part in tokens:
        model(part)
        alone.append([watch.take() for watch in watches])
    for part in tokens:
        model(part)
    both = [watch.take() for watch in watches]
    for i, seen in enumerate(both):
        assert torch.equal(seen, torch.maximum(alone[0][i], alone[1][i]))
    for block in model.blocks:
        block.mixer.layer.attend.implementation = explicit_attention
    model(tokens[0])
    for i, watch in enumerate(watches):
        torch.testing.assert_close(watch.take(), alone[0][i])


def test_the_largest_logit_goes_to_the_log_and_gradients_are_untouched():
    plain, model = build("llama3.2-tiny").train(), build("llama3.2-tiny").train()
    clip = QKClip(tau=1e-3)
    clip(model)
    tokens = torch.randint(97, (2, 9))
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:])
    for one_of_two in (plain, model):
        NextTokenLoss(one_of_two)(batch).total.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    told = clip.on_step_end(model, 1)
    assert told is not None
    assert float(told["max_logit"]) > 1e-3
    assert clip.on_step_end(model, 2) is None, "nothing was measured since"


@pytest.mark.parametrize("name", ["qwen3-tiny", "gemma3-tiny", "qwen3-next-tiny"])
def test_under_q_and_k_norm_it_is_refused_with_the_reason(name: str):
    with pytest.raises(UsageError, match="queries are normalized after projection; remove the technique"):
        QKClip()(build(name))


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="tau is 0"):
        QKClip(tau=0)
    with pytest.raises(UsageError, match="known: query, group, both"):
        QKClip(key_share="mean")
    with pytest.raises(UsageError, match="known: each, layer"):
        QKClip(heads="all")
    with pytest.raises(ValueError, match="applied once"):
        QKClip()(QKClip(tau=3)(build("gpt2-tiny")))
    model = build("gpt2-tiny")
    model.blocks[0].mixer.layer.qkv = nn.Sequential(model.blocks[0].mixer.layer.qkv)
    with pytest.raises(UsageError, match="merge the adapter first"):
        QKClip()(model)
    with pytest.raises(UsageError, match="this model has none"):
        QKClip()(One(RMSNorm(4, 1e-6)))


def test_a_watch_is_no_parameter():
    model = build("gpt2-tiny")
    names = list(model.state_dict())
    assert list(QKClip()(model).state_dict()) == names
    assert sum(isinstance(module, MaxLogitMeter) for module in model.modules()) == 2
