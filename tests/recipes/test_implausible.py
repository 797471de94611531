"""A number that no run can have is refused where it is read, in every recipe, before anything is allocated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load, save
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, family_of, preset
from llm_quest.models.config_fields import per_layer_kinds
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import find_implausible_numbers, nested_schema, takes_number
from llm_quest.recipes.model_config import build_model_config
from llm_quest.recipes.recipe import get_recipe, load_recipe
from llm_quest.recipes.yaml_io import RawConfig


def numeric_keys(schema: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a schema that holds a number."""
    found = []
    for name, field in schema.model_fields.items():
        if takes_number(field.annotation):
            found.append((*path, name))
        elif (part := nested_schema(field.annotation)) is not None:
            found += numeric_keys(part, (*path, name))
    return found


def tree_of(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: tree_of(path[1:], value) if path[1:] else value}


@pytest.mark.parametrize(
    "value", [True, False, 10**20, -(10**20), 10**5000], ids=["true", "false", "1e20", "-1e20", "5000"]
)
@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_every_recipe_refuses_truth_values_and_huge_numbers(name: str, value: Any):
    schema = get_recipe(name).Config
    keys = numeric_keys(schema)
    assert len(keys) > 15
    for path in keys:
        problems = list(find_implausible_numbers(schema, RawConfig(tree_of(path, value), "recipe.yaml")))
        assert [problem.key for problem in problems] == [".".join(path)]
        assert len(str(problems[0])) < 400


def test_plausible_numbers_are_left_to_the_schema():
    tree = {
        "max_steps": 10**7,
        "learning_rate": 1e-3,
        "seed": 2**62,
        "tensorboard": True,
        "model": {"config": {"x": True}},
    }
    assert not list(find_implausible_numbers(get_recipe("pretrain").Config, RawConfig(tree, "recipe.yaml")))


@pytest.mark.parametrize(
    "family", [family.name for family in FAMILIES if family.name not in ("vit", "clip", "vision_language")]
)
def test_a_model_of_implausible_size_is_refused_at_once(family: str):
    for key in ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "num_attention_heads"):
        if key in next(one for one in FAMILIES if one.name == family).Config.__dataclass_fields__:
            with pytest.raises(UsageError, match=rf"model\.config\.{key}: 1,000,000,000 is more than .*plausible"):
                load_recipe("tiny", [f"model.family={family}", f"model.config.{key}=1000000000"])


TINY = [one.name for family in FAMILIES for one in family.presets if one.name.endswith("-tiny")]
PATTERNS = [(name, key) for name in TINY for key in per_layer_kinds(type(preset(name).config))]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layers", [1, 6])
def test_a_preset_takes_another_number_of_layers(name: str, layers: int):
    """What a model has for every layer is, where it is not given, the family's own pattern of so many layers."""
    _, config, settings = load_recipe("pretrain", [f"model.preset={name}", f"model.config.num_hidden_layers={layers}"])
    made = build_model_config(config.model, settings, vocab=64, context=32)
    assert {len(getattr(made, key)) for key in per_layer_kinds(type(made))} <= {layers}
    assert len(build(made, seed=0).blocks) == layers


@pytest.mark.parametrize(("name", "key"), PATTERNS)
def test_a_pattern_of_layers_of_another_length_or_of_unknown_kinds_is_told(name: str, key: str):
    layers = preset(name).config.num_hidden_layers
    for wrong, said in (
        ([per_layer_kinds(type(preset(name).config))[key][0]] * (layers + 1), "one entry for each of the"),
        (["wave"] * layers, "'wave' is no kind of layer; known: "),
    ):
        with pytest.raises(UsageError, match=rf"model\.config\.{key}: .*{said}"):
            load_recipe("pretrain", [f"model.preset={name}", f"model.config.{key}={wrong}"])


@pytest.mark.parametrize(
    ("name", "pair", "key"),
    [
        ("smollm3-tiny", "sliding_window=0", "sliding_window"),
        ("granite-tiny", "logits_scaling=-1.0", "logits_scaling"),
        ("deepseek-v3-tiny", "first_k_dense_replace=9", "first_k_dense_replace"),
        ("ministral-tiny", "layer_types=[full_attention, sliding_attention]", "llama_4_scaling_beta"),
    ],
)
def test_what_a_familys_own_class_refuses_is_told_with_its_key(name: str, pair: str, key: str):
    with pytest.raises(UsageError, match=rf"model\.config\.{key}: "):
        load_recipe("pretrain", [f"model.preset={name}", f"model.config.{pair}"])


def switches(config: Any) -> Iterator[tuple[str, Any]]:
    """Another value of each field that is true or false, or a part that may be absent."""
    for key, kind in get_type_hints(type(config)).items():
        value = getattr(config, key)
        if isinstance(value, bool):
            yield key, not value
        elif value is not None and dataclasses.is_dataclass(value) and type(None) in get_args(kind):
            yield key, None


def refusal(pairs: list[str]) -> str:
    """What the recipe of pretraining says against these settings; empty where it takes them."""
    try:
        load_recipe("pretrain", pairs)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", TINY)
def test_what_config_json_cannot_hold_is_refused_before_a_model_is_trained(name: str):
    """A model that was saved without it would be read as another, whose weights have other names or shapes."""
    family = family_of(preset(name).config)
    for key, value in switches(preset(name).config):
        pairs = [f"model.preset={name}", f"model.config.{key}={json.dumps(value)}"]
        if refused := refusal(pairs):
            assert f"model.config.{key}" in refused
            continue
        _, config, settings = load_recipe("pretrain", pairs)
        made = build_model_config(config.model, settings, vocab=64, context=32)
        saved = family.read(json.loads(json.dumps(family.publish(made))))
        assert getattr(saved, key) == getattr(made, key) == value


def test_a_dense_qwen3_next_is_read_as_it_was_saved(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pairs = ["model.preset=qwen3-next-tiny", "model.config.moe=null"]
    _, config, settings = load_recipe("pretrain", pairs)
    model = build(build_model_config(config.model, settings, vocab=64, context=32), seed=0).eval()
    save(model, tmp_path)
    tokens = torch.arange(24).reshape(2, 12)
    assert torch.equal(load(tmp_path)(tokens), model(tokens))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").double()
    difference = theirs(tokens).logits - model.double()(tokens)
    assert difference.abs().max() < 1e-6, "their DeltaNet computes in float32 within a model of float64"
