"""A field that config.json leaves out, or has as null, means what transformers' class makes of it; either spelling of
rotary positions means the same. For every field that a family's tiny preset writes, those of its parts included.

The reference reads the file and says every number; our reading of the file must be our reading of those."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from llm_quest.contracts import Preset
from llm_quest.errors import DataError
from llm_quest.models import PART_FAMILIES
from llm_quest.models.family import Family
from llm_quest.recipes.model_config import DIVIDED_IN_TRANSFORMERS
from tests.oracles import transformers

SUBJECTS = {one.name: (family, one) for family in PART_FAMILIES for one in family.presets if one.name.endswith("-tiny")}
REQUIRED = "which a .* needs"
"""Sizes have no default here: a file without them is refused by name, where the reference builds a model of 7B."""
OLD_SPELLING = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
NEW_SPELLING = ("rope_parameters",)
EXCEPTIONS = {
    ("deepseek-v3-tiny", "num_nextn_predict_layers", "absent"): "how many modules there are is counted in the files",
    ("gpt2-tiny", "n_positions", "absent"): "n_ctx, which is the same number, is read",
    ("qwen3.5-vision-tiny", "tie_word_embeddings", "absent"): "the text part's word holds, as for the text alone",
    ("qwen3-moe-tiny", "num_local_experts", "null"): "num_experts, which is the same number, is read",
}
"""(preset, field, how it is missing) -> why another reading is right."""


@functools.cache
def config_json(name: str) -> dict[str, Any]:
    """A config.json as we write it, in both spellings, as JSON gives it back."""
    family, size = SUBJECTS[name]
    return dict(json.loads(json.dumps(family.publish(size.config))))


def reference_class(kind: str) -> Any:
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]


def variants(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The file without each field, with null in its place, and in one spelling alone."""
    whole = config_json(name)
    fields = [field for field in whole if field not in ("model_type", "architectures")]
    found = {(field, "absent"): without_fields(whole, field) for field in fields}
    found |= {(field, "null"): whole | {field: None} for field in fields}
    for part in ("text_config", "vision_config"):
        for field in whole.get(part, {}).keys() - {"model_type", "architectures"}:
            found[f"{part}.{field}", "absent"] = whole | {part: without_fields(whole[part], field)}
            found[f"{part}.{field}", "null"] = whole | {part: whole[part] | {field: None}}
    for spelling, dropped in {"old": NEW_SPELLING, "new": OLD_SPELLING}.items():
        found["rope", spelling] = without_fields(whole, *dropped)
        found["rope_theta", f"absent, {spelling}"] = without_theta(found["rope", spelling])
    return found


def without_fields(whole: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {field: value for field, value in whole.items() if field not in fields}


def without_theta(whole: Any) -> Any:
    """No base anywhere, also within rope_parameters."""
    bases = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "swa_rope_theta")
    return {
        field: without_theta(value) if isinstance(value, dict) else value
        for field, value in whole.items()
        if field not in bases
    }


def read_or_refuse(family: Family, config: dict[str, Any]) -> Any:
    """Our Config, or the message that refuses it."""
    try:
        return family.read(config)
    except (DataError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_a_file_leaves_out_is_what_the_reference_class_makes_of_it(name: str):
    family, size = SUBJECTS[name]
    kind = config_json(name)["model_type"]
    different = {}
    for change, config in variants(name).items():
        expected = reference_reading(family, config, kind)
        ours = read_or_refuse(family, config)
        is_refused = isinstance(ours, str) and REQUIRED.partition(" .* ")[0] in ours
        if expected is not None and not is_refused and ours != expected:
            different[name, *change] = differing_fields(ours, expected, size)
    assert different.keys() == {place for place in EXCEPTIONS if place[0] == name}, different


def reference_reading(family: Family, config: dict[str, Any], kind: str) -> Any:
    """Our reading of every number that the reference's class says; None for a file that it cannot read, or that it
    writes in a way that we refuse."""
    fields = {field: value for field, value in json.loads(json.dumps(config)).items() if field != "model_type"}
    try:
        spoken = reference_class(kind)(**fields).to_dict()
    except Exception:  # strict dataclasses raise errors of their own
        return None
    found = read_or_refuse(family, spoken)
    return None if isinstance(found, str) else found


def differing_fields(ours: Any, expected: Any, size: Preset) -> Any:
    if isinstance(ours, str):
        return ours
    names = [name for name in vars(size.config) if getattr(ours, name) != getattr(expected, name)]
    return {name: (getattr(ours, name), getattr(expected, name)) for name in names}


def refuses_width(name: str) -> bool:
    """Whether transformers' class refuses a width that is no multiple of the number of heads."""
    hf_config = config_json(name)
    uneven = hf_config | {"hidden_size": 7 * hf_config["num_attention_heads"] + 1}
    try:
        reference_class(hf_config["model_type"])(**{key: x for key, x in uneven.items() if key != "model_type"})
    except Exception as error:
        return "is not a multiple of the number of attention" in str(error)
    return False


def test_families_whose_width_transformers_divides_by_their_heads_are_those_that_a_recipe_divides():
    """A folder that was trained for hours, and that transformers then refuses, is refused before the training."""
    of_text = [name for name in SUBJECTS if {"hidden_size", "num_attention_heads"} <= config_json(name).keys()]
    separate = [name for name in of_text if "head_dim" in config_json(name) or "qk_nope_head_dim" in config_json(name)]
    found = {SUBJECTS[name][0].name for name in separate if refuses_width(name)}
    assert found == set(DIVIDED_IN_TRANSFORMERS)
    assert len(separate) > 15
