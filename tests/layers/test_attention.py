from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm_quest.layers import native
from llm_quest.layers.attention import GroupedQueryAttention, PositionQueryScale, SigmoidOutputGate
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.rotary import NoRotary, RotaryEmbedding
from llm_quest.layers.scaled_dot_product import (
    AttentionFunction,
    ScaledDotProduct,
    explicit_attention,
    fused_attention,
    query_attention,
    single_query_attention,
)
from llm_quest.scope import CausalMask, Scope, SlidingWindow

needs_compiler = pytest.mark.skipif(not native.is_loaded(), reason=f"no C++ operator: {native.Library.reason}")
both = pytest.mark.parametrize("attend", [explicit_attention, fused_attention], ids=["explicit", "fused"])


def by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Row by row, head by head, key by key, in Python."""
    batch, length, heads, _ = q.shape
    out = torch.zeros(batch, length, heads, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                g = h // (heads // k.shape[2])
                weights = [
                    math.exp(q[b, t, h] @ k[b, s, g] * scale) if visible[b, t, s] else 0.0 for s in range(k.shape[1])
                ]
                for s, weight in enumerate(weights):
                    out[b, t, h] += weight / sum(weights) * v[b, s, g]
    return out


def qkv(generator: torch.Generator, heads: int, groups: int, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(2, length, heads, 6), draw(2, keys, groups, 6), draw(2, keys, groups, 5)


@both
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_attention_equals_the_sum_written_out(
    attend: AttentionFunction, heads: int, groups: int, length: int, generator: torch.Generator
):
    q, k, v = qkv(generator, heads, groups, length, keys=5)
    visible = torch.rand(2, length, 5, generator=generator) < 0.6
    visible[:, :, 2] = True
    torch.testing.assert_close(attend(q, k, v, visible, scale=0.4), by_hand(q, k, v, visible, 0.4))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
def test_a_single_query_by_sums_equals_the_sum_written_out(heads: int, groups: int, generator: torch.Generator):
    """Also where every score is far from 0, and in bfloat16 with sums in float32."""
    q, k, v = qkv(generator, heads, groups, 1, keys=5)
    visible = torch.rand(2, 1, 5, generator=generator) < 0.6
    visible[:, :, 2] = True
    for factor in (1, 3000):
        made = single_query_attention(q * factor, k, v, visible[:, None], scale=0.4)
        torch.testing.assert_close(made, by_hand(q, k, v, visible, 0.4) if factor == 1 else
                                   explicit_attention(q * factor, k, v, visible, scale=0.4))  # fmt: skip
    everything = torch.ones_like(visible)
    torch.testing.assert_close(
        single_query_attention(q, k, v, None, scale=0.4), by_hand(q, k, v, everything, 0.4)
    )  # fmt: skip
    half = [part.bfloat16() for part in (q, k, v)]
    exact = single_query_attention(*(part.double() for part in half), visible[:, None], scale=0.4)
    assert torch.equal(single_query_attention(*half, visible[:, None], scale=0.4), exact.bfloat16())


def draw_query(
    heads: int, groups: int, width: int, value_width: int, keys: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of three rows and their mask; keys and values lie head by head, as in a cache."""
    q = torch.randn(3, 1, heads, width, generator=generator)
    k, v = (torch.randn(3, groups, keys, of, generator=generator).transpose(1, 2) for of in (width, value_width))
    visible = torch.rand(3, 1, keys, generator=generator) < 0.6
    visible[:, :, keys // 2] = True
    return q, k, v, visible


@needs_compiler
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_for_one_query_is_the_definition(isa: str, dtype: torch.dtype, generator: torch.Generator):
    """On every instruction set, for widths that fill no vector, with every option of a family."""
    for heads, groups, width, value_width, keys in ((4, 4, 6, 5, 5), (6, 2, 64, 64, 300), (4, 1, 33, 131, 17)):
        q, k, v, visible = draw_query(heads, groups, width, value_width, keys, generator)
        q, k, v = (part.to(dtype) for part in (3 * q, k, v))
        sink = torch.randn(heads, generator=generator)
        for mask in (visible, visible[:1], CausalMask.FULL):
            for choice in ({}, {"sink": sink}, {"softcap": 2.0}, {"sink": sink.to(dtype), "softcap": 0.5}):
                exact = explicit_attention(
                    *(part.double() for part in (q, k, v)),
                    mask.expand(3, 1, keys) if isinstance(mask, Tensor) else mask,
                    scale=0.4,
                    **choice,
                )
                made = query_attention(q, k, v, mask, scale=0.4, isa=isa, **choice)
                assert made.dtype == dtype
                rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
                torch.testing.assert_close(made.double(), exact, rtol=rounding, atol=2e-6 * v.abs().max().item())


@needs_compiler
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_a_query_s_bits_do_not_depend_on_other_rows_nor_on_hidden_keys(isa: str, generator: torch.Generator):
    """What a mask hides is not read: it may be NaN. What a query sees and is not finite stays so in its row."""
    q, k, v, visible = draw_query(6, 2, 40, 24, 50, generator)
    together = query_attention(q, k, v, visible, scale=0.4, isa=isa)
    hidden = (~visible[:, 0])[:, :, None, None]
    nan_k, nan_v = (part.masked_fill(hidden, float("nan")) for part in (k, v))
    assert torch.equal(query_attention(q, nan_k, nan_v, visible, scale=0.4, isa=isa), together)
    for row in range(3):
        of_row = (part[row : row + 1] for part in (q, k, v, visible))
        assert torch.equal(query_attention(*of_row, scale=0.4, isa=isa), together[row : row + 1])
    longer = [torch.cat((part, part), dim=1) for part in (k, v)]
    mask = torch.cat((visible, torch.zeros_like(visible)), dim=2)
    assert torch.equal(query_attention(q, *longer, mask, scale=0.4, isa=isa), together)
    q[1, 0, 3, 2] = float("nan")
    made = query_attention(q, k, v, visible, scale=0.4, isa=isa)
    assert made[1, 0, 3].isnan().all()
    made[1, 0, 3] = together[1, 0, 3]
    assert torch.equal(made, together)


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return fused_attention(q, k, v, visible, scale=0.4)


@needs_compiler
def test_the_operator_for_one_query_is_in_compiled_code_and_not_in_an_exported_program(generator: torch.Generator):
    arguments = draw_query(4, 2, 6, 5, 7, generator)
    compiled = torch.compile(attend_to_cache, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), query_attention(*arguments, scale=0.4))
        torch.testing.assert_close(compiled(*arguments), attend_to_cache(*arguments))

        class Attend(torch.nn.Module):
            def forward(self, *parts: Tensor) -> Tensor:
                return attend_to_cache(*parts)

        exported = torch.export.export(Attend(), arguments).module()
        torch.testing.assert_close(exported(*arguments), attend_to_cache(*arguments))
    assert "query_attention" not in str(exported.graph)
    torch.library.opcheck(
        torch.ops.llm_quest.query_attention,
        (*arguments[:3], arguments[3][:, 0], torch.zeros(4), 0.4, 0.0, 0),
        test_utils=("test_schema", "test_faketensor"),
    )
    on_meta = query_attention(*(part.to("meta") for part in arguments), scale=0.4)
    assert (on_meta.shape, on_meta.dtype, on_meta.device.type) == ((3, 1, 4, 5), torch.float32, "meta")
    two = torch.cat((arguments[0],) * 2, dim=1)
    with pytest.raises(RuntimeError, match="one query a row"):
        torch.ops.llm_quest.query_attention(two, *arguments[1:3], None, None, 0.4, 0.0, 0)


@needs_compiler
def test_the_operator_for_one_query_leaves_the_rest_to_the_plain_forms(monkeypatch, generator: torch.Generator):
    """Eager code, gradients, dropout, several queries, dtypes that it cannot read, and a library that was not built."""
    place, asked = "llm_quest.layers.scaled_dot_product", []
    monkeypatch.setattr(
        f"{place}.query_attention", lambda q, *rest, **how: asked.append(1) or query_attention(q, *rest, **how)
    )
    q, k, v, visible = draw_query(4, 2, 6, 5, 7, generator)
    attend_to_cache(q, k, v, visible)
    monkeypatch.setattr("torch.compiler.is_dynamo_compiling", lambda: True)
    needs_gradient = k.clone().requires_grad_()
    attend_to_cache(q, needs_gradient, v, visible)
    fused_attention(q, k, v, visible, scale=0.4, dropout=0.5)
    attend_to_cache(torch.cat((q, q), dim=1), k, v, torch.cat((visible, visible), dim=1))
    attend_to_cache(*(part.double() for part in (q, k, v)), visible)
    attend_to_cache(*(part.half() for part in (q, k, v)), visible)
    assert not asked
    with torch.no_grad():
        attend_to_cache(q, needs_gradient, v, visible)
    fused_attention(q, k, v, visible, scale=0.4, softcap=2.0, sink=torch.zeros(4))
    assert len(asked) == 2
    monkeypatch.setattr(native.Library, "loaded", False)  # no compiler
    torch.testing.assert_close(attend_to_cache(q, k, v, visible), explicit_attention(q, k, v, visible, scale=0.4))
    assert len(asked) == 2


def test_compiled_code_on_the_host_sums_for_a_single_query_alone(monkeypatch, generator: torch.Generator):
    """Not for several queries, nor with dropout. (Compiling it: `tests/laws/option_grid.py`.)"""
    place, asked = "llm_quest.layers.scaled_dot_product", []
    monkeypatch.setattr(
        f"{place}.single_query_attention",
        lambda q, *rest, **how: asked.append(1) or single_query_attention(q, *rest, **how),
    )
    for compiling, length, dropout, expected in ((0, 1, 0.0, 0), (1, 3, 0.0, 0), (1, 1, 0.5, 0), (1, 1, 0.0, 1)):
        monkeypatch.setattr("torch.compiler.is_dynamo_compiling", lambda compiling=compiling: bool(compiling))
        q, k, v = qkv(generator, 4, 2, length, keys=5)
        visible = torch.rand(2, length, 5, generator=generator) < 0.6
        visible[:, :, 2] = True
        made = fused_attention(q, k, v, visible, scale=0.4, dropout=dropout)
        assert len(asked) == expected
    torch.testing.assert_close(made, by_hand(q, k, v, visible, 0.4))


@both
def test_plain_markers_mean_what_their_masks_say(attend: AttentionFunction, generator: torch.Generator):
    q, k, v = qkv(generator, 4, 2, 5, keys=5)
    causal = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, CausalMask.CAUSAL, scale=0.4), attend(q, k, v, causal, scale=0.4))
    everything = torch.ones_like(causal)
    torch.testing.assert_close(attend(q, k, v, CausalMask.FULL, scale=0.4), attend(q, k, v, everything, scale=0.4))


@both
@pytest.mark.parametrize("sink", [False, True])
def test_a_band_means_what_its_mask_says_also_across_its_blocks(
    attend: AttentionFunction, sink: bool, generator: torch.Generator
):
    q, k, v = qkv(generator, 4, 2, 150, keys=150)
    drain = torch.randn(4, generator=generator, dtype=q.dtype) if sink else None
    for window in (1, 3, 64, 70):
        seen = torch.ones(2, 150, 150, dtype=torch.bool).tril().triu(1 - window)
        expected = explicit_attention(q, k, v, seen, scale=0.4, sink=drain)
        torch.testing.assert_close(attend(q, k, v, SlidingWindow(window), scale=0.4, sink=drain), expected)


@both
def test_a_single_query_against_a_longer_cache_sees_every_key(attend: AttentionFunction, generator: torch.Generator):
    """`is_causal=True` would be upper-left aligned: the query would see key 0 alone."""
    q, k, v = qkv(generator, 4, 2, 1, keys=7)
    seen = torch.ones(2, 1, 7, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, CausalMask.FULL, scale=0.4), by_hand(q, k, v, seen, 0.4))


@pytest.mark.parametrize("length", [1, 5])
def test_a_sink_takes_weight_and_brings_nothing(length: int, generator: torch.Generator):
    """softmax([scores, sink]) without the sink's column is the plain output times sigmoid(logsumexp(scores) - sink)."""
    q, k, v = qkv(generator, 4, 2, length, keys=5)
    sink = torch.randn(4, generator=generator, dtype=torch.float64)
    visible = torch.ones(2, length, 5, dtype=torch.bool).tril(5 - length)
    scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(2, dim=2)) * 0.4
    total = scores.masked_fill(~visible[:, :, None], float("-inf")).logsumexp(-1)
    expected = by_hand(q, k, v, visible, 0.4) * (total - sink).sigmoid()[..., None]
    for attend in (explicit_attention, fused_attention):
        torch.testing.assert_close(attend(q, k, v, visible, scale=0.4, sink=sink), expected)


@both
def test_a_cap_bounds_the_scores_before_the_mask(attend: AttentionFunction, generator: torch.Generator):
    q, k, v = qkv(generator, 4, 2, 5, keys=5)
    visible = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    out = attend(q * 100, k, v, visible, scale=1.0, softcap=0.5)
    torch.testing.assert_close(out[:, 0], v[:, 0].repeat_interleave(2, dim=1))
    one_hot = torch.eye(5, dtype=v.dtype)[None, :, None].expand(2, 5, 2, 5)
    weights = attend(q * 1e6, k, one_hot, visible, scale=1.0, softcap=0.5)[:, 4]
    assert (weights.amax(-1) / weights.amin(-1)).max() < 2.72, "scores of at most 0.5 leave weights within a factor e"


def test_query_heads_share_the_key_of_their_group_in_order():
    """4 heads on 2 keys: heads 0, 1 read key 0 and heads 2, 3 read key 1 (not 0, 1, 0, 1)."""
    q = torch.ones(1, 1, 4, 2)
    k = torch.zeros(1, 1, 2, 2)
    v = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1)
    for attend in (explicit_attention, fused_attention):
        assert attend(q, k, v, CausalMask.FULL, scale=1.0).flatten().tolist() == [10, 10, 20, 20]
    longer = [part.expand(-1, 2, -1, -1) for part in (q, k, v)]
    for attend in (explicit_attention, fused_attention):
        assert attend(*longer, CausalMask.FULL, scale=1.0)[0, 1].flatten().tolist() == [10, 10, 20, 20]


def test_explicit_softmax_is_worked_out_in_float32_for_half_types(generator: torch.Generator):
    """With one-hot values the output is the weights: each rounded once, from a float32 softmax of the scores."""
    q, k = (torch.randn(1, 40, 1, 8, generator=generator).bfloat16() for _ in range(2))
    one_hot = torch.eye(40, dtype=torch.bfloat16)[None, :, None]
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    expected = scores.float().softmax(-1).bfloat16()[0, 0]
    assert torch.equal(explicit_attention(q, k, one_hot, CausalMask.FULL, scale=1.0)[0, :, 0], expected)
    powers = scores.exp()
    assert not torch.equal((powers / powers.sum(-1, keepdim=True))[0, 0], expected), "bfloat16 throughout must differ"


def mixer(heads: int, groups: int, gated: bool = False, **options: object) -> GroupedQueryAttention:
    layer = GroupedQueryAttention(
        12,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=4,
        rotary=RotaryEmbedding(4, 100.0),
        bias=True,
        **options,
    )
    if gated:
        layer.qkv = PackedLinear(12, q=heads * 8, k=groups * 4, v=groups * 4, bias=True)
        layer.output_gate = SigmoidOutputGate()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.5
            )
    return layer.double()


def logits_of(layer: GroupedQueryAttention, x: Tensor) -> Tensor:
    """(B,T,H,T) scaled scores, caught where attention is called."""
    caught = []

    def catch(attend: ScaledDotProduct, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        q, k = inputs[:2]
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        caught.append(torch.einsum("bthd,bshd->bths", q, k) * attend.scale)

    handle = layer.attend.register_forward_hook(catch)
    layer(x, Scope.unpadded(x[..., 0]))
    handle.remove()
    return caught[0]


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (6, 3), (4, 1)])
def test_rescaling_multiplies_each_heads_logits_and_leaves_the_values(
    heads: int, groups: int, generator: torch.Generator
):
    layer = mixer(heads, groups)
    x = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    before, values = logits_of(layer, x), layer.qkv(x)[2].clone()
    gamma = torch.linspace(0.25, 1.0, heads, dtype=torch.float64)
    layer.rescale_logits_(gamma)
    torch.testing.assert_close(logits_of(layer, x), before * gamma[:, None])
    assert torch.equal(layer.qkv(x)[2], values)


def test_rescaling_one_head_leaves_its_neighbors_bit_by_bit(generator: torch.Generator):
    layer = mixer(6, 3)
    x = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    before = logits_of(layer, x)
    layer.rescale_logits_(torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 1.0]))
    after = logits_of(layer, x)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(after[:, :, others], before[:, :, others])
    torch.testing.assert_close(after[:, :, 1], before[:, :, 1] * 0.5)


def test_values_are_not_rotated_and_keys_are(generator: torch.Generator):
    """With one query at position 3 seeing itself alone, the output is its value, wherever it stands."""
    layer = mixer(2, 2)
    x = torch.randn(1, 1, 12, generator=generator, dtype=torch.float64)
    here, there = (layer(x, Scope(torch.tensor([[position]]))) for position in (3, 40))
    torch.testing.assert_close(here, there)
    torch.testing.assert_close(here, layer.out(layer.qkv(x)[2]))


def test_dropout_acts_in_training_only(generator: torch.Generator):
    layer = mixer(2, 2, attend=ScaledDotProduct(0.5, dropout=0.5))
    x = torch.randn(1, 6, 12, generator=generator, dtype=torch.float64)
    scope = Scope.unpadded(x[..., 0])
    assert not torch.equal(layer.train()(x, scope), layer(x, scope))
    assert torch.equal(layer.eval()(x, scope), layer(x, scope))


@pytest.mark.parametrize("kind", ["causal", "window", "all", "padded"])
@pytest.mark.parametrize("wanted", [1, 3])
def test_the_first_positions_alone_are_answered_as_among_all(kind: str, wanted: int, generator: torch.Generator):
    layer = mixer(6, 2, gated=True, sliding_window=2 if kind == "window" else None)
    x = torch.randn(2, 5, 12, generator=generator).double()
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, -1, 2, 3]])
    scope = Scope(positions, bidirectional=True) if kind == "padded" else Scope.unpadded(x, bidirectional=kind == "all")
    torch.testing.assert_close(layer(x, scope, wanted), layer(x, scope)[:, :wanted], atol=1e-6, rtol=0)


def test_heads_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key/value heads evenly"):
        GroupedQueryAttention(12, num_attention_heads=6, num_key_value_heads=4, head_dim=2, rotary=NoRotary())


def test_queries_grow_with_every_period_of_the_original_length():
    """Original length 4: positions 0 to 3 keep their size, 4 to 7 grow by 1 + beta ln 2, 8 by 1 + beta ln 3; padding
    stays."""
    positions = torch.tensor([[-1, 0, 3, 4, 7, 8]])
    grown = PositionQueryScale(0.5, 4)(torch.ones(1, 6, 1, 2, dtype=torch.float64), Scope(positions))[0, :, 0, 0]
    expected = [1, 1, 1, 1 + math.log(2) / 2, 1 + math.log(2) / 2, 1 + math.log(3) / 2]
    torch.testing.assert_close(grown, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_ring_that_is_filled_by_its_first_pass_can_be_written_while_gradients_are_recorded():
    """A slice write and then a write by index into the same slots, both of numbers that need a gradient."""
    attention = GroupedQueryAttention(
        8, num_attention_heads=2, num_key_value_heads=1, head_dim=4, rotary=NoRotary(), sliding_window=4
    )
    x, cache, outputs = torch.randn(1, 6, 8), Cache([attention.new_cache(1, 12)], 1, 12), []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        piece = x[:, start:stop]
        scope = Scope.unpadded(torch.zeros(1, stop - start), cache=cache, start=start).for_layer(0)
        outputs.append(attention(piece, scope))
    whole = attention(x, Scope.unpadded(torch.zeros(1, 6)))
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-5, atol=1e-6)
