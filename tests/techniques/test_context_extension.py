"""Length extension: the longer model is the one that its config, published and read again, would make; and
transformers computes the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llm_quest as quest
from llm_quest.errors import UsageError
from llm_quest.layers.rotary import (
    LinearScaling,
    NTKScaling,
    RotaryEmbedding,
    YaRNScaling,
    default_inv_freq,
    yarn_by_wavelength,
)
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.techniques.context_extension import ROPE_EXTENSIONS, ContextExtension
from tests.later import Later
from tests.laws.subjects import TINY, own, random_tokens, randomize_, shared

transformers = Later("transformers")

PAPERS = "yarn_by_wavelength"
PLAIN = ("gemma2-tiny", "mixtral-tiny", "qwen3-tiny", "qwen3-next-tiny", "mimo-tiny")


def llama(dtype: torch.dtype = torch.float64) -> Decoder:
    """A Llama whose rotation is not stretched yet."""
    return randomize_(
        build(replace(preset("llama3.2-tiny").config, rotary=RotaryEmbedding(16, 10_000.0), max_position_embeddings=64))
    ).to(dtype)


def mla(dtype: torch.dtype = torch.float64) -> Decoder:
    config = replace(
        preset("deepseek-v3-tiny").config,
        rotary=RotaryEmbedding(8, 10_000.0, interleaved=True),
        max_position_embeddings=64,
    )
    return randomize_(build(config)).to(dtype)


every_kind = pytest.mark.parametrize(
    ("kind", "make"),
    [(kind, make) for kind in ROPE_EXTENSIONS for make in (llama, mla) if (kind, make) != (PAPERS, mla)],
)


@every_kind
def test_factor_1_is_neutral(kind: str, make):
    plain, model = make(), ContextExtension(1.0, kind)(make())
    tokens = random_tokens(plain, 2, 40)
    torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-5, rtol=0)


@every_kind
def test_the_saved_model_is_the_published_spelling_and_transformers_computes_it(kind: str, make, tmp_path):
    model = ContextExtension(4.0, kind)(make(torch.float32))
    folder = quest.save(model, tmp_path / "model")
    tokens = random_tokens(model, 2, 150)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert theirs.config.max_position_embeddings == model.config.max_position_embeddings == 256
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs.eval()(tokens).logits, atol=5e-5, rtol=1e-4)
    again = quest.load(folder)
    assert torch.equal(again(tokens), model(tokens))
    assert again.spec.techniques == (ContextExtension(4.0, kind),)


@pytest.mark.parametrize("page", PLAIN)
def test_every_layer_turns_as_the_read_config_says(page: str, tmp_path):
    model = ContextExtension(4.0)(own(page))
    again = quest.load(quest.save(model, tmp_path / "model"))
    tokens = random_tokens(model, 2, 20)
    torch.testing.assert_close(again(tokens), model(tokens), atol=1e-10, rtol=0)
    assert (model(tokens) - shared(page)(tokens)).abs().max() > 1e-4


def test_windowed_layers_with_a_rotation_of_their_own_keep_it():
    model, before = ContextExtension(4.0)(own("mimo-tiny")), own("mimo-tiny")
    changed = [a.mixer.layer.rotary != b.mixer.layer.rotary for a, b in zip(model.blocks, before.blocks, strict=True)]
    assert changed == [True, False, False, True]


def test_what_is_computed():
    model = ContextExtension(4.0)(llama())
    assert model.config.rotary == RotaryEmbedding(16, 10_000.0, YaRNScaling(4.0, 64))
    assert ContextExtension(4.0, original=32)(llama()).config.rotary.scaling == YaRNScaling(4.0, 32)
    assert ContextExtension(4.0, "linear")(llama()).config.rotary.scaling == LinearScaling(4.0)
    larger_base = ContextExtension(4.0, "ntk")(llama()).config.rotary
    expected = NTKScaling(4.0).inv_freq(16, 10_000.0)
    torch.testing.assert_close(torch.tensor(larger_base.inv_freq), expected)
    torch.testing.assert_close(expected[-1], default_inv_freq(16, 10_000.0)[-1] / 4)
    deep = ContextExtension(4.0)(mla())
    assert deep.config.rotary.scaling.attention_factor == 1.0, "the temperature is on the whole score"
    assert deep.blocks[0].mixer.layer.attend.scale == deep.config.softmax_scale > mla().config.softmax_scale
    assert deep.mtp_modules[0].block.mixer.layer.attend.scale == deep.config.softmax_scale


def test_every_page_with_learned_positions_or_a_stretch_refuses():
    refused = []
    for page in TINY:
        try:
            ContextExtension()(build(page))
        except UsageError:
            refused.append(page)
    scaled = {"llama3.2-tiny", "gemma3-tiny", "deepseek-v2-tiny", "deepseek-v3-tiny", "phi3-tiny", "olmo3-tiny"}
    scaled |= {"ministral-tiny", "gpt-oss-tiny"}
    assert set(refused) == {"gpt2-tiny"} | scaled


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="below 1: a length is extended, not cut"):
        ContextExtension(0.5)
    with pytest.raises(UsageError, match="known: yarn, yarn_by_wavelength, ntk, linear"):
        ContextExtension(kind="dynamic")
    with pytest.raises(UsageError, match="original has no effect with kind 'ntk'"):
        ContextExtension(kind="ntk", original=64)
    with pytest.raises(UsageError, match="latent attention needs it on the whole score"):
        ContextExtension(kind=PAPERS)(mla())
    with pytest.raises(ValueError, match="applied once"):
        ContextExtension(4.0)(ContextExtension(2.0)(llama()))


def test_the_papers_ramp_is_linear_in_the_number_of_turns():
    """With theta (2 pi)^4 the four pairs of 8 numbers have the wavelengths 2 pi times 1, 2 pi, (2 pi)^2, (2 pi)^3. In
    330 positions they make 52.52, 8.359, 1.330 and 0.2117 turns, so gamma is 1, 7.359 / 31, 0.330 / 31 and 0."""
    scaling = yarn_by_wavelength(4.0, 330, 8, (2 * math.pi) ** 4)
    turns = [330 / (2 * math.pi) ** (n + 1) for n in range(4)]
    assert turns == pytest.approx([52.521, 8.3590, 1.3304, 0.21174], rel=1e-4)
    gammas = [1.0, 7.3590 / 31, 0.3304 / 31, 0.0]
    wanted = [(2 * math.pi) ** -n * ((1 - gamma) / 4 + gamma) for n, gamma in enumerate(gammas)]
    assert scaling.inv_freq(8, (2 * math.pi) ** 4).tolist() == pytest.approx(wanted, rel=1e-4)
    assert scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_the_two_ramps_agree_at_their_ends_and_differ_between():
    theirs, papers = YaRNScaling(4.0, 2048), yarn_by_wavelength(4.0, 2048, 128, 10_000.0)
    released, paper = (one.inv_freq(128, 10_000.0) for one in (theirs, papers))
    assert theirs.attention_factor == papers.attention_factor
    assert torch.allclose(released[:10], paper[:10])
    assert torch.allclose(released[-10:], paper[-10:])
    assert ((released - paper).abs() / paper).max() > 0.2


def test_frequencies_are_numbers_also_while_a_plan_counts_on_fake_tensors():
    """`quest plan pretrain techniques='[length]'` ended as a bug of ours."""
    outside = RotaryEmbedding(16, 10_000.0, YaRNScaling(4.0, 64))
    with FakeTensorMode():
        inside = RotaryEmbedding(16, 10_000.0, YaRNScaling(4.0, 64))
    assert inside.inv_freq == outside.inv_freq
