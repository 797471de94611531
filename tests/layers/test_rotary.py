from __future__ import annotations

import math

import pytest
import torch

from llm_quest.hub.float64 import computing_in_float64
from llm_quest.layers.kv_cache import Cache
from llm_quest.layers.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NoRotary,
    NTKScaling,
    RopeScaling,
    RotaryEmbedding,
    YaRNScaling,
    apply_rotary_emb,
    default_inv_freq,
    widen_tables,
)
from llm_quest.scope import Scope

SCALINGS: dict[str, RopeScaling | None] = {
    "plain": None,
    "linear": LinearScaling(4.0),
    "ntk": NTKScaling(4.0),
    "llama3": Llama3Scaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": YaRNScaling(8.0, original_max_position_embeddings=64, beta_fast=8.0),
}
every_scaling = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


def rotate_at(rotary: RotaryEmbedding, x: torch.Tensor, position: int) -> torch.Tensor:
    """One head's vector (d,) turned as at this position."""
    return rotary(x[None, None, None], Scope(torch.tensor([[position]])))[0, 0, 0]


@every_scaling
def test_frequencies_are_those_of_the_precision_that_is_computed_in(scaling: RopeScaling | None):
    """Also where the other one was wanted before, with PyTorch's default dtype of either."""

    def frequencies() -> tuple[float, ...]:
        return RotaryEmbedding(8, 3e5, scaling=scaling).inv_freq

    single = frequencies()
    with computing_in_float64():
        double = frequencies()
    assert double != single == frequencies()
    assert double == pytest.approx(single, rel=1e-6)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert frequencies() == single
    finally:
        torch.set_default_dtype(before)


@every_scaling
def test_scores_depend_on_the_distance_only(scaling: RopeScaling | None, generator: torch.Generator):
    rotary = RotaryEmbedding(16, 10000.0, scaling)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    scores = [rotate_at(rotary, q, 7 + shift) @ rotate_at(rotary, k, 3 + shift) for shift in (0, 5, 40)]
    torch.testing.assert_close(scores[1:], [scores[0]] * 2, rtol=0, atol=2e-5)
    assert abs(scores[0] - rotate_at(rotary, q, 8) @ rotate_at(rotary, k, 3)) > 1e-3


@every_scaling
def test_lengths_stay_but_for_the_attention_factor_and_position_0_turns_nothing(
    scaling: RopeScaling | None, generator: torch.Generator
):
    x = torch.randn(16, generator=generator)
    factor = scaling.attention_factor if scaling else 1.0
    torch.testing.assert_close(rotate_at(RotaryEmbedding(16, 10000.0, scaling), x, 37).norm(), x.norm() * factor)
    torch.testing.assert_close(rotate_at(RotaryEmbedding(16, 10000.0, scaling), x, 0), x * factor)


@pytest.mark.parametrize(
    "scaling", [LinearScaling(1.0), NTKScaling(1.0), Llama3Scaling(1.0, 1.0, 4.0, 64), YaRNScaling(1.0, 64)], ids=str
)
def test_a_factor_of_one_is_plain_rope(scaling: RopeScaling):
    assert_relatively_close(scaling.inv_freq(16, 10000.0), default_inv_freq(16, 10000.0))
    assert scaling.attention_factor == 1.0


def test_a_pair_by_hand():
    """d = 2: one pair, frequency 1: position p turns (1, 0) by p radians."""
    expected = torch.tensor([math.cos(3), math.sin(3)])
    torch.testing.assert_close(rotate_at(RotaryEmbedding(2, 10000.0), torch.tensor([1.0, 0.0]), 3), expected)


def test_pairs_are_halves_not_neighbors():
    """d = 4, theta 16: frequencies 1 and 1/4; the pairs are (0, 2) and (1, 3)."""
    turned = rotate_at(RotaryEmbedding(4, 16.0), torch.tensor([1.0, 1.0, 0.0, 0.0]), 2)
    torch.testing.assert_close(turned, torch.tensor([math.cos(2), math.cos(0.5), math.sin(2), math.sin(0.5)]))


def test_half_split_equals_the_interleaved_form_of_a_reordered_vector(generator: torch.Generator):
    width, position = 8, 11
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    x = torch.randn(width, generator=generator)
    angles = position * default_inv_freq(width, 10000.0)
    even, odd = x[order][0::2], x[order][1::2]
    interleaved = torch.stack(
        (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()), -1
    ).flatten()
    torch.testing.assert_close(rotate_at(RotaryEmbedding(width, 10000.0), x, position)[order], interleaved)


def test_interleaved_weights_turn_neighbors_and_give_the_same_products(generator: torch.Generator):
    q, k = torch.randn(2, 8, generator=generator)
    neighbors = RotaryEmbedding(8, 10000.0, interleaved=True)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    torch.testing.assert_close(rotate_at(neighbors, q, 9), rotate_at(RotaryEmbedding(8, 10000.0), q[order], 9))
    torch.testing.assert_close(rotate_at(neighbors, q, 9) @ rotate_at(neighbors, k, 9), q @ k)


def test_only_the_first_numbers_of_a_head_turn_when_the_rotary_width_is_smaller(generator: torch.Generator):
    x = torch.randn(10, generator=generator)
    turned = rotate_at(RotaryEmbedding(4, 100.0), x, 5)
    torch.testing.assert_close(turned[:4], rotate_at(RotaryEmbedding(4, 100.0), x[:4], 5))
    assert torch.equal(turned[4:], x[4:])


def test_ntk_divides_the_lowest_frequency_by_exactly_the_factor_and_leaves_the_highest():
    plain, stretched = default_inv_freq(32, 10000.0), NTKScaling(8.0).inv_freq(32, 10000.0)
    assert stretched[0] == plain[0] == 1
    assert_relatively_close(stretched[-1], plain[-1] / 8)


def test_linear_divides_every_frequency():
    assert_relatively_close(LinearScaling(8.0).inv_freq(32, 1e4), default_inv_freq(32, 1e4) / 8)


def assert_relatively_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Relatively: the slow frequencies are smaller than any absolute tolerance."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def vector(frequencies: torch.Tensor, expected: dict[int, float]) -> None:
    for index, value in expected.items():
        assert frequencies[index].item() == pytest.approx(value, rel=2e-5), index


def test_llama_3_2_gives_the_published_frequencies():
    frequencies = Llama3Scaling(
        32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ).inv_freq(64, 500_000.0)
    expected = {0: 1.0, 14: 0.00321145, 15: 0.00129055, 16: 0.000429557, 17: 9.70829e-5, 18: 1.94616e-5, 31: 9.41831e-8}
    vector(frequencies, expected)


def test_yarn_gives_deepseek_v3s_frequencies():
    yarn = YaRNScaling(40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    expected = {0: 1.0, 9: 0.0749894, 10: 0.0562341, 16: 0.0055, 23: 3.3338e-5, 24: 2.5e-5, 31: 3.3338e-6}
    vector(yarn.inv_freq(64, 10_000.0), expected)
    assert yarn.attention_factor == 1.0, "the two m(40, 1) cancel"


def test_yarn_gives_kimi_k2s_frequencies_where_the_ramp_is_one_step():
    yarn = YaRNScaling(32.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0)
    plain = default_inv_freq(64, 50_000.0)
    vector(yarn.inv_freq(64, 50_000.0), {18: plain[18].item(), 19: 0.00162176, 20: 3.61405e-5})


def test_yarns_attention_factor():
    assert YaRNScaling(4.0, 64).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert YaRNScaling(40.0, 64, mscale=1.0, mscale_all_dim=0.5).attention_factor == pytest.approx(
        1.36889 / 1.184444, rel=1e-5
    )
    assert YaRNScaling(4.0, 64, explicit_attention_factor=1.25).attention_factor == 1.25


def test_yarns_limits_are_plain_and_interpolated():
    """The ramp behind the last pair: nothing is stretched; the ramp before pair 1: all but the fastest pair is."""
    plain = default_inv_freq(16, 1e4)
    assert_relatively_close(YaRNScaling(8.0, 64, beta_fast=9e-4, beta_slow=1e-4).inv_freq(16, 1e4), plain)
    assert_relatively_close(YaRNScaling(8.0, 64, beta_fast=5.73, beta_slow=5.73).inv_freq(16, 1e4)[1:], plain[1:] / 8)


LONG = LongRoPEScaling(32.0, 8, short_factor=(1.0, 2.0), long_factor=(4.0, 8.0))


def angles(scope: Scope) -> torch.Tensor:
    """The angles (B,T,pairs) of LongRoPE, from its sines: theta 1, so that position p turns by p / divisor."""
    _, sin = RotaryEmbedding(4, 1.0, LONG).cos_sin(scope, torch.float64)
    return torch.asin(sin / LONG.attention_factor)[:, :, 0]


def test_longrope_takes_the_list_of_a_rows_length_for_all_its_positions():
    expected_short, expected_long = torch.tensor([1.0, 0.5]).double(), torch.tensor([0.25, 0.125]).double()
    inside, beyond = torch.arange(8), torch.arange(9)
    torch.testing.assert_close(angles(Scope(inside[None]))[0, 1], expected_short, rtol=1e-6, atol=0)
    torch.testing.assert_close(angles(Scope(beyond[None]))[0, 1], expected_long, rtol=1e-6, atol=0)
    rows = torch.stack([torch.cat((torch.tensor([-1]), inside)), beyond])
    torch.testing.assert_close(angles(Scope(rows))[0, 2], expected_short, rtol=1e-6, atol=0)
    torch.testing.assert_close(angles(Scope(rows))[1, 1], expected_long, rtol=1e-6, atol=0)


def test_longrope_with_a_cache_keeps_the_list_that_its_capacity_needs():
    """Keys keep the rotation that they were written with, so a growing text must not change its list."""
    first = torch.arange(3)[None]
    short, long = (Scope(first, cache=Cache([], 1, capacity)) for capacity in (8, 9))
    torch.testing.assert_close(angles(short)[0, 1], torch.tensor([1.0, 0.5]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(angles(long)[0, 1], torch.tensor([0.25, 0.125]).double(), rtol=1e-6, atol=0)


def test_longropes_attention_factor_belongs_to_short_texts_too():
    assert LongRoPEScaling(32.0, 4096, (1.0,), (1.0,)).attention_factor == pytest.approx(1.19024, abs=1e-5)
    cos, _ = RotaryEmbedding(4, 1.0, LONG).cos_sin(Scope(torch.zeros(1, 1, dtype=torch.int64)), torch.float32)
    assert cos.unique().tolist() == pytest.approx([LONG.attention_factor])


def test_longrope_needs_a_factor_for_every_pair():
    with pytest.raises(ValueError, match="longrope has 2 factors for 4 rotated pairs"):
        RotaryEmbedding(8, 10_000.0, LONG)


def test_interleaved_pairs_of_a_part_of_a_head_leave_the_rest_in_its_order():
    """GLM-4: neighbors within the first half; the second half passes through as it is."""
    x = torch.arange(8.0).view(1, 1, 1, 8)
    turned = RotaryEmbedding(4, 10_000.0, interleaved=True)(x, Scope(torch.zeros(1, 1, dtype=torch.int64)))
    assert turned.flatten().tolist() == [0, 2, 1, 3, 4, 5, 6, 7]


def test_two_scalings_of_equal_width_and_base_do_not_share_a_table():
    scope, x = Scope(torch.tensor([[50]])), torch.ones(1, 1, 1, 16)
    turned = [RotaryEmbedding(16, 1e4, scaling)(x, scope) for scaling in SCALINGS.values()]
    for i, one in enumerate(turned):
        assert not any(torch.allclose(one, other) for other in turned[i + 1 :])


def test_angles_are_worked_out_in_float32_also_for_bfloat16():
    """At position 4097 a bfloat16 angle would be off by whole turns."""
    x = torch.ones(1, 1, 1, 16)
    scope = Scope(torch.tensor([[4097]]))
    rotary = RotaryEmbedding(16, 1e4)
    torch.testing.assert_close(rotary(x.bfloat16(), scope).float(), rotary(x, scope), rtol=0, atol=0.02)
    cos, _ = rotary.cos_sin(scope, torch.float32)
    torch.testing.assert_close(
        cos.flatten().double(), (4097 * default_inv_freq(16, 1e4).double()).cos(), rtol=0, atol=3e-4
    )


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="rotary width 7 is not a positive even number"):
        RotaryEmbedding(7, 1e4)


def test_no_rotary_leaves_everything():
    x = torch.randn(1, 2, 3, 4)
    assert NoRotary()(x, Scope.unpadded(torch.zeros(1, 2, dtype=torch.int64))) is x


def test_rotate_and_rotate_back_is_the_identity(generator: torch.Generator):
    x, angle = torch.randn(1, 1, 2, 6, generator=generator), torch.rand(1, 1, 1, 3, generator=generator)
    there, back = widen_tables(angle.cos(), angle.sin()), widen_tables(angle.cos(), -angle.sin())
    torch.testing.assert_close(apply_rotary_emb(apply_rotary_emb(x, *there), *back), x)


def test_rotation_in_fewer_operators_equals_the_definition_to_the_last_bit(generator: torch.Generator):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 2, 64, generator=generator).to(dtype)
        angle = torch.rand(2, 3, 1, 32, generator=generator) * 100
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        a, b = x.chunk(2, dim=-1)
        expected = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        assert torch.equal(apply_rotary_emb(x, *widen_tables(cos, sin)), expected)


PUBLISHED = {
    "linear": (LinearScaling(4.0), {"factor": 4.0}),
    "llama3": (
        Llama3Scaling(8.0, 1.0, 4.0, 64),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn": (YaRNScaling(8.0, 64), {"factor": 8.0, "original_max_position_embeddings": 64}),
    "yarn, one step": (
        YaRNScaling(8.0, 512, beta_fast=1.0),
        {"factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 1.0},
    ),
    "yarn, not truncated": (
        YaRNScaling(8.0, 512, truncate=False),
        {"factor": 8.0, "original_max_position_embeddings": 512, "truncate": False},
    ),
    "yarn, mscales": (
        YaRNScaling(40.0, 512, mscale=1.0, mscale_all_dim=0.5),
        {"factor": 40.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 0.5},
    ),
}


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_equal_transformers(name: str, width: int):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (ours, theirs), kind = PUBLISHED[name], name.split(",")[0]
    rope = {"rope_type": kind, "rope_theta": 10000.0, **theirs}
    config = transformers.LlamaConfig(head_dim=width, max_position_embeddings=4096, rope_parameters=rope)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    torch.testing.assert_close(ours.inv_freq(width, 10000.0), frequencies, rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(factor)
