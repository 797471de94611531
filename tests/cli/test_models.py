"""Portraits of models: every number is worked out from the model and agrees with what is known of it."""

from __future__ import annotations

import json
import re

import pytest
import torch

import llm_quest as quest
from benchmarks.cache import THEORY
from llm_quest.cli.diagram import describe_layer_range
from llm_quest.cli.models import list_presets, make_model_card
from llm_quest.cost.flops import ModelCost
from llm_quest.errors import DataError, UsageError
from llm_quest.models import FAMILIES, VISION_FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.scope import Scope

TINY = [one.name for page in FAMILIES for one in page.presets if one.name.endswith("-tiny")]


@pytest.mark.parametrize("name", TINY)
def test_every_presets_card_adds_up_has_the_real_cache_and_draws_the_blocks(name):
    """One card for all three: counting it takes a third of a second."""
    card, model = make_model_card(name, context=16), build(name, dtype="bfloat16")
    assert sum(card.parts.values()) == card.parameters == sum(p.numel() for p in model.parameters())
    cache = model.new_cache(1, 16)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        model(tokens, Scope.unpadded(tokens, cache=cache))
    assert card.cache_total == cache.nbytes()
    drawn = "\n".join(card.lines())
    assert "tokens (B,T)" in drawn
    assert "logits (B,T,V)" in drawn
    assert "Identity" not in drawn


@pytest.mark.parametrize("theory", THEORY, ids=lambda theory: theory.preset)
def test_a_published_sizes_cache_holds_what_its_paper_says(theory):
    """576 numbers per token and layer in DeepSeek-V3; windows and states that do not grow."""
    growing, fixed, total = ModelCost.from_config(preset(theory.preset).config).cache_bytes(2048)
    assert (growing, fixed) == (theory.per_token, theory.fixed)
    assert total == fixed + growing * (2048 + 1), "and one spare slot"


def test_an_image_encoder_is_drawn_and_counted_by_the_image():
    portrait = make_model_card("vit-base-patch16-224")
    drawn = "\n".join(portrait.lines())
    assert "images (B,C,H,W)" in drawn
    assert "blocks 0 to 11, 12 alike" in drawn
    assert "197 tokens, each attends to all, nothing is cached" in drawn
    assert (portrait.cache_total, portrait.image_tokens) == (0, 197)
    assert sum(portrait.parts.values()) == portrait.parameters == 86_567_656
    # patches and 11 blocks of 197 tokens; in the last block only the class token asks and is worked on
    width, tokens = 768, 197
    weights = 196 * width * width + 11 * 12 * width**2 * tokens
    last = 3 * width**2 * tokens + 9 * width**2 + 1000 * width
    pairs = 2 * width * (11 * tokens * tokens + tokens)
    assert portrait.flops_image == pytest.approx(2 * (weights + last + pairs), rel=1e-3)


def test_a_vision_language_model_is_an_encoder_an_adapter_and_a_decoder():
    portrait = make_model_card("llava-1.5-7b")
    drawn = "\n".join(portrait.lines())
    assert "23 alike" in drawn
    assert "576 vectors, in place of as many placeholder tokens" in drawn
    assert portrait.parts["image encoder"] == 303_507_456
    assert portrait.parts["adapter"] == 1024 * 4096 + 4096 * 4096 + 2 * 4096
    assert sum(portrait.parts.values()) == portrait.parameters == 7_063_427_072
    assert portrait.cache_per_token == 32 * 2 * 4096 * 2
    assert portrait.image_tokens == 576
    assert json.loads(json.dumps(portrait.as_json()))["flops_image"] > 3.8e11


def test_gemma_3_shows_256_vectors_of_an_image_and_all_blocks_of_its_encoder():
    portrait = make_model_card("gemma3-vision-4b")
    assert portrait.image_tokens == 256
    assert "27 alike" in "\n".join(portrait.lines())
    assert portrait.parts["image encoder"] == 416_866_032
    assert portrait.parts["adapter"] == 1152 * 2560 + 1152


@pytest.mark.parametrize(
    "name",
    [
        "vit-tiny",
        "clip-tiny",
        "clip-text-tiny",
        "clip-model-tiny",
        "llava-tiny",
        "gemma3-vision-tiny",
        "qwen3.5-vision-tiny",
    ],
)
def test_a_folder_that_reads_images_is_drawn(name, tmp_path):
    saved = quest.save(build(name), tmp_path / "model")
    assert make_model_card(str(saved)).parameters == make_model_card(name).parameters


def test_the_published_numbers_of_llama_3_2_1b():
    portrait = make_model_card("llama3.2-1b")
    assert portrait.parameters == 1_235_814_400
    assert portrait.cache_per_token == 16 * 2 * 8 * 64 * 2
    assert portrait.cache_fixed == 0
    assert portrait.load == {"float32": 4 * 1_235_814_400, "bfloat16": 2 * 1_235_814_400}
    assert "tied to the embedding" in "\n".join(portrait.picture)
    assert sum("blocks 0 to 15, 16 alike" in line for line in portrait.picture) == 1


def test_flops_are_two_per_weight_and_four_per_pair_and_channel():
    config = preset("llama3.2-tiny").config
    matrices = config.num_hidden_layers * (48 * (64 + 32 + 32) + 64 * 48 + 3 * 48 * 96) + 97 * 48
    linear, scores = (flops // 32 for flops in ModelCost.from_config(config).count_pass(32))
    assert linear == 2 * matrices
    assert scores == config.num_hidden_layers * 4 * 32 * config.num_attention_heads * config.head_dim


def test_the_catalog_holds_every_preset_and_is_json():
    found = list_presets()
    names = [one.name for page in (*FAMILIES, *VISION_FAMILIES) for one in page.presets]
    assert [row["name"] for row in found.as_json()] == names
    assert all(row["parameters"] > 0 for row in found.rows)
    json.dumps(found.as_json())
    assert [line.split()[0] for line in found.lines()[1 : 1 + len(names)]] == names


def test_a_page_stands_for_its_first_size():
    assert make_model_card("llama").name == "llama3.2-1b"


def test_a_portrait_is_json():
    told = json.loads(json.dumps(make_model_card("gpt2-tiny").as_json()))
    assert told["flops_training"] == 3 * told["flops_forward"]


def test_a_folder_is_shown_by_its_config(tmp_path):
    page = next(page for page in FAMILIES if page.name == "llama")
    published = {"model_type": page.model_type, **page.publish(preset("llama3.2-tiny").config)}
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert make_model_card(str(tmp_path)).parts == make_model_card("llama3.2-tiny").parts


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is not JSON"), ("[]", "a JSON object"), ('{"model_type": "bert"}', "'bert' is not supported; known: gpt2")],
)
def test_a_folder_that_cannot_be_read_is_named(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=said):
        make_model_card(str(tmp_path))


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean 'llama3.2-1b'\?.*families: gpt2"):
        make_model_card("llama3.2-1x")


def test_a_context_beyond_learned_positions_is_refused():
    with pytest.raises(UsageError, match="64 learned positions"):
        make_model_card("gpt2-tiny", context=65)
    with pytest.raises(UsageError, match="at least 1"):
        make_model_card("gpt2-tiny", context=0)


def test_layers_that_are_alike_are_named_by_their_numbers():
    assert describe_layer_range([3]) == "block 3"
    assert describe_layer_range(range(16)) == "blocks 0 to 15, 16 alike"
    assert describe_layer_range([0, 1, 3, 5, 6]) == "blocks 0 to 1, 3, 5 to 6, 5 alike"
    assert describe_layer_range(range(0, 20, 2)) == "blocks 0, 2, 4, 6, ..., 10 alike"


def test_multi_token_modules_are_drawn_with_all_they_hold():
    drawn = "\n".join(make_model_card("deepseek-v3-tiny").lines())
    assert "multi-token modules 1 to 2, 2 alike" in drawn
    assert "├── join   96 → 48" in drawn
    assert drawn.count("MixtureOfExperts") == 2, "once in the blocks, once in the modules"
    assert "multi-token module 1:" in "\n".join(make_model_card("mimo-tiny").lines())
    assert "multi-token" not in "\n".join(make_model_card("llama3.2-tiny").lines())


def test_models_are_searched_by_words_and_by_size():
    names = {row["name"] for row in list_presets().rows}
    found = list_presets(("Qwen3", "moe")).rows
    assert found
    assert {row["name"] for row in found} < names
    assert all("qwen3" in f"{row['name']} {row['family']} {row['hub']}".lower() for row in found)
    small = list_presets(max_parameters="500M").rows
    assert small
    assert all(row["parameters"] <= 5e8 for row in small)
    assert {row["name"] for row in list_presets(max_parameters="1.5B").rows} > {row["name"] for row in small}


@pytest.mark.parametrize(
    ("words", "most", "said"),
    [
        (("lamma3.2",), None, "no model has 'lamma3.2'; near: llama"),
        (("gpt2",), "1K", "no model has 'gpt2' and at most 1K parameters"),
        ((), "big", "--max-parameters 'big' is no number; write 50k, 500M or 1.5B"),
        ((), "1..5B", "--max-parameters '1..5B' is no number"),
    ],
)
def test_a_search_that_finds_nothing_says_what_is_near(words, most, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        list_presets(words, most)
