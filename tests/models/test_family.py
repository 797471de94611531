"""config.json, both ways and in both spellings; and what cannot be computed is refused, not ignored."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from llm_quest.errors import DataError
from llm_quest.hub.config import family_for
from llm_quest.layers.rotary import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling, RotaryEmbedding, YaRNScaling
from llm_quest.models import FAMILIES, VISION_FAMILIES, gpt2, llama
from llm_quest.models.build import build_meta_model, family_of, preset
from llm_quest.models.rope_config import read_rotary
from llm_quest.models.weight_names import ConcatRows, Transposed, expand_layers, published_names

EVERY_PRESET = [(page, size) for page in FAMILIES for size in page.presets]
TINY = preset("llama3.2-tiny").config
SCALINGS: list[RopeScaling | None] = [
    None,
    LinearScaling(4.0),
    Llama3Scaling(8.0, 1.0, 4.0, 64),
    YaRNScaling(8.0, 64),
    YaRNScaling(8.0, 64, beta_fast=4.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.5, truncate=False),
    YaRNScaling(8.0, 64, explicit_attention_factor=1.5),
]


@pytest.mark.parametrize(("page", "size"), EVERY_PRESET, ids=lambda value: getattr(value, "name", ""))
def test_what_is_published_is_read_back_as_it_was(page, size):
    assert page.read(page.publish(size.config)) == size.config


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("spelling", ["both", "old", "new"])
def test_every_scaling_is_read_back_from_either_spelling(scaling: RopeScaling | None, spelling: str):
    config = replace(TINY, rotary=RotaryEmbedding(16, 500_000.0, scaling))
    published = llama.FAMILY.publish(config)
    if spelling == "old":
        del published["rope_parameters"]
    elif spelling == "new":
        del published["rope_theta"], published["rope_scaling"]
    assert llama.FAMILY.read(published) == config


def test_ntk_is_published_as_the_larger_base_that_it_is():
    config = replace(TINY, rotary=RotaryEmbedding(16, 10_000.0, NTKScaling(4.0)))
    again = llama.FAMILY.read(llama.FAMILY.publish(config))
    assert again.rotary.scaling is None
    assert again.rotary.inv_freq == pytest.approx(config.rotary.inv_freq, rel=1e-6)


def test_the_oldest_spelling_of_a_scalings_kind_is_understood():
    published = llama.FAMILY.publish(TINY) | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    del published["rope_parameters"]
    assert llama.FAMILY.read(published).rotary.scaling == LinearScaling(2.0)


MINIMAL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def test_what_an_old_llama_config_leaves_out_has_the_published_defaults():
    config = llama.FAMILY.read(MINIMAL)
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings, config.rms_norm_eps) == (
        4,
        12,
        False,
        1e-6,
    )
    assert (config.rotary.rope_theta, config.rotary.scaling, config.max_position_embeddings) == (10_000.0, None, 2048)
    nulls = {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None}
    assert llama.FAMILY.read(MINIMAL | nulls) == config


def test_yarn_without_its_original_length_takes_the_models():
    scaling = llama.FAMILY.read(MINIMAL | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}).rotary.scaling
    assert scaling == YaRNScaling(4.0, 2048)
    unscaled = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    assert llama.FAMILY.read(MINIMAL | {"rope_scaling": unscaled}).rotary.scaling == YaRNScaling(4.0, 512), (
        "the factor is 2048 / 512"
    )


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_a_stretch_from_an_unknown_length_is_refused(kind: str):
    rope = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(DataError, match="no 'original_max_position_embeddings' to stretch from"):
        read_rotary({"rope_scaling": rope}, 16)


@pytest.mark.parametrize("field", [field for field in MINIMAL if field != "model_type"])
def test_a_missing_number_is_named(field: str):
    published = {name: value for name, value in MINIMAL.items() if name != field}
    with pytest.raises(DataError, match=rf"config.json has no '{field}', which a llama needs"):
        llama.FAMILY.read(published)


@pytest.mark.parametrize(
    ("page", "field", "value"),
    [
        (llama.FAMILY, "hidden_act", "gelu"),
        (gpt2.FAMILY, "activation_function", "gelu"),
        (gpt2.FAMILY, "scale_attn_weights", False),
        (gpt2.FAMILY, "scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_value_that_would_change_the_computation_is_refused(page, field: str, value: object):
    with pytest.raises(DataError, match=rf"config.json: {field} is {value!r}; only .* is computed"):
        page.read(page.publish(preset(f"{'gpt2' if page is gpt2.FAMILY else 'llama3.2'}-tiny").config) | {field: value})


@pytest.mark.parametrize("kind", ["dynamic", "mrope"])
def test_an_unknown_stretch_is_refused_and_the_known_ones_listed(kind: str):
    with pytest.raises(
        DataError, match=rf"rope type '{kind}' is unknown here; known: default, linear, ntk, llama3, yarn"
    ):
        llama.FAMILY.read(MINIMAL | {"rope_scaling": {"rope_type": kind, "factor": 2.0}})


def test_gpt2s_hidden_width_is_four_times_the_stream_where_it_is_null():
    published = gpt2.FAMILY.publish(preset("gpt2").config) | {"n_inner": None}
    assert gpt2.FAMILY.read(published).intermediate_size == 3072


@pytest.mark.parametrize(("page", "size"), EVERY_PRESET, ids=lambda value: getattr(value, "name", ""))
def test_the_table_names_every_parameter_once(page, size):
    names, model = page.weight_map(size.config), build_meta_model(size.config)
    assert set(names) == {path for path, _ in model.named_parameters()}
    assert len({str(theirs) for theirs in names.values()}) == len(names)


@pytest.mark.parametrize("family", [*FAMILIES, *VISION_FAMILIES], ids=lambda family: family.name)
def test_tables_that_a_model_computes_are_ignored_and_no_weight_is(family):
    """Old files hold them: rotary frequencies, and the numbers of the positions."""
    assert family.ignores("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert family.ignores("vision_model.embeddings.position_ids")
    for entry in family.weight_map(family.presets[-1].config).values():
        published = list(published_names([entry]))
        assert published
        assert not any(map(family.ignores, published))


def test_biases_and_an_untied_head_are_in_the_table_when_the_model_has_them():
    config = replace(TINY, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    assert set(llama.FAMILY.weight_map(config)) == {path for path, _ in build_meta_model(config).named_parameters()}


def test_a_layers_number_is_written_into_every_kind_of_entry():
    table = {"norm": "n", "a.{i}": "x.{i}.y", "b.{i}": ConcatRows("p.{i}", "q.{i}"), "c.{i}": Transposed("t.{i}")}
    assert expand_layers(table, 2) == {
        "norm": "n",
        "a.0": "x.0.y",
        "a.1": "x.1.y",
        "b.0": ConcatRows("p.0", "q.0"),
        "b.1": ConcatRows("p.1", "q.1"),
        "c.0": Transposed("t.0"),
        "c.1": Transposed("t.1"),
    }


def test_mimos_released_words_are_read_and_its_window_leaves_the_token_itself_out():
    """The hub's config.json names patterns and counts in its own way; both spellings may stand there."""
    page = family_of(preset("mimo-tiny").config)
    published = {"model_type": "mimo_v2_flash", **page.publish(preset("mimo-tiny").config)}
    for name in ("layer_types", "mlp_layer_types", "rope_parameters", "rope_scaling", "head_dim", "rms_norm_eps"):
        published.pop(name, None)
    published |= {"sliding_window": 128, "sliding_window_size": 128, "hybrid_layer_pattern": [0, 1, 0, 1]}
    published |= {"moe_layer_freq": [0, 0, 1, 0], "swa_num_key_value_heads": 8, "swa_rope_theta": 20_000.0}
    published |= {"layernorm_epsilon": 1e-4, "attention_value_scale": 0.5}
    config = page.read(published)
    assert config.layer_types == ("full_attention", "sliding_attention") * 2
    assert config.sliding_window == 129
    assert config.mlp_layer_types == ("dense", "dense", "sparse", "dense")
    assert (config.num_key_value_heads, config.swa_num_key_value_heads) == (2, 8)
    assert (config.rotary.rope_theta, config.swa_rotary.rope_theta) == (5_000_000.0, 20_000.0)
    assert (config.rms_norm_eps, config.attention_value_scale) == (1e-4, 0.5)
    assert config.rotary.dim == 8


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3-next-tiny", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ("gemma3-tiny", {"layer_types": ["spam"] * 4}, "layer_types names 'spam'; known: full_attention, sliding"),
        ("gemma3-tiny", {"sliding_window": 0}, "sliding_window is 0; a windowed layer sees at least itself"),
        ("mimo-tiny", {"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern has 2 entries for 4 layers"),
        ("mimo-tiny", {"moe_layer_freq": [0, 2, 1, 1]}, "moe_layer_freq names 2; known: 0, 1"),
        ("mimo-tiny", {"n_group": 2}, "n_group is 2; only 1 is computed"),
        ("mimo-tiny", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("mimo-tiny", {"add_full_attention_sink_bias": True}, "add_full_attention_sink_bias is True; only False"),
        ("mimo-tiny", {"attention_bias": True}, "attention_bias is True; only False is computed"),
        ("mimo-tiny", {"swa_head_dim": 32}, "head_dim is 24, swa_head_dim is 32; they are one number here"),
        ("olmoe-tiny", {"clip_qkv": 0.0}, "clip_qkv is 0.0; numbers are limited to [-clip_qkv, clip_qkv]"),
        ("qwen3-moe-tiny", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; every so many"),
        (
            "deepseek-v3-tiny",
            {"first_k_dense_replace": 9},
            "first_k_dense_replace is 9; it counts dense",
        ),
        ("deepseek-v3-tiny", {"qk_rope_head_dim": 7}, "rotary width 7 is not a positive even number"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(name, change, message):
    config = preset(name).config
    page = family_of(config)
    published = {"model_type": page.model_type, **page.publish(config)}
    with pytest.raises(ValueError, match=re.escape(message)):
        page.read(published | change)


def test_kimi_k2s_model_type_is_deepseek_v3s_page():
    """Its config.json names a model_type of its own for the same code."""
    published = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    assert family_for(published).name == "deepseek_v3"


def test_gpt2_reads_one_dropout_and_refuses_three():
    sizes = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 4}
    assert gpt2.FAMILY.read(sizes).dropout == 0.1, "transformers' default, where a file says nothing"
    alike = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.3)
    assert gpt2.FAMILY.read(sizes | alike).dropout == 0.3
    with pytest.raises(DataError, match=r"attn_pdrop is 0\.0.*set them alike"):
        gpt2.FAMILY.read(sizes | alike | {"attn_pdrop": 0.0})


def test_numbers_that_differ_between_releases_are_the_published_ones():
    assert [preset(f"mixtral-{size}").config.router_aux_loss_coef for size in ("8x7b", "8x22b")] == [0.02, 0.001]
    assert preset("mixtral-8x22b").hub_id == "mistralai/Mixtral-8x22B-v0.1"
    assert preset("mixtral-8x22b").config.vocab_size == 32_000, "v0.3 has 32,768"
    for name in ("gemma2-2b", "gemma2-9b", "gemma2-27b", "gemma3-270m", "gemma3-1b", "gemma3-4b"):
        assert preset(name).eos_token_ids == (1,), "the base files: the end of a turn is the chat models'"
