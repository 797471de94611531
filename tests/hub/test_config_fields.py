"""Every field of every family's config.json, generated from what transformers writes: under another name it gives what
transformers' class gives; a field that nobody knows stops loading; what is listed as harmless is. (Left out or null:
tests/models/test_config_defaults.py.)"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from llm_quest.errors import DataError
from llm_quest.hub.config import family_for, list_unknown_fields, parse_hf_config
from llm_quest.hub.known_fields import (
    BOOKKEEPING,
    GENERATION,
    OF_FAMILY,
    TRAINING,
    FieldTracker,
    is_harmless,
    known_fields,
    unknown_fields,
)  # fmt: skip
from llm_quest.models import FAMILIES
from tests.family_oracles import ORACLES
from tests.oracles import logits_of, spell_old, tiny_gpt2, tiny_llama, transformers

BUILDERS: dict[str, Any] = {"gpt2": tiny_gpt2, "llama": tiny_llama, **ORACLES}


@functools.cache
def transformers_model(name: str) -> Any:
    return BUILDERS[name]()


@functools.cache
def transformers_json(name: str) -> dict[str, Any]:
    """config.json as transformers writes it for this model."""
    return json.loads(
        json.dumps(
            transformers_model(name).config.to_diff_dict() | {"model_type": transformers_model(name).config.model_type}
        )
    )


def all_fields(name: str, hf_config: dict[str, Any]) -> dict[str, Any]:
    """What transformers' class makes of it: every field, with its value."""
    made = type(transformers_model(name).config).from_dict(copy.deepcopy(hf_config))
    return json.loads(json.dumps(made.to_dict()))


def ours(hf_config: dict[str, Any]) -> Any:
    config, problems = parse_hf_config(family_for(hf_config), hf_config)
    if problems:
        raise DataError("; ".join(problems))
    return config


def describe_differences(one: Any, other: Any) -> str:
    pairs = ((field, getattr(one, field), getattr(other, field)) for field in vars(one))
    return ", ".join(f"{field} is {mine!r}, there {their!r}" for field, mine, their in pairs if mine != their)


@pytest.mark.parametrize("name", BUILDERS)
def test_what_transformers_writes_is_known_whole_and_what_it_takes_for_granted_too(name: str):
    family = family_for(transformers_json(name))
    for hf_config in (transformers_json(name), all_fields(name, transformers_json(name))):
        assert unknown_fields(family, hf_config, ours(hf_config)) == {}
        assert ours(hf_config) == ours(transformers_json(name))


@pytest.mark.parametrize("name", BUILDERS)
def test_another_spelling_of_a_field_is_read_as_transformers_reads_it(name: str):
    """The class's attribute_map: hidden_size for GPT-2's n_embd."""
    for alias, field in type(transformers_model(name).config).attribute_map.items():
        if field in transformers_json(name):
            hf_config = {key: value for key, value in transformers_json(name).items() if key != field}
            hf_config[alias] = transformers_json(name)[field]
            assert ours(hf_config) == ours(all_fields(name, hf_config)), alias


YOUNGER = ("ministral3", "mimo_v2_flash")
"""Families that are younger than the new spelling."""


@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.startswith(YOUNGER)])
def test_the_spelling_of_transformers_4_is_read_as_transformers_reads_it(name: str):
    hf_config = copy.deepcopy(transformers_json(name))
    if set(hf_config.get("rope_parameters") or {}) & {"full_attention", "sliding_attention"}:
        by_kind = hf_config.pop("rope_parameters")
        hf_config["rope_theta"] = by_kind["full_attention"].pop("rope_theta")
        hf_config["rope_scaling"] = by_kind["full_attention"]
        if name.startswith("gemma3"):
            hf_config["rope_local_base_freq"] = by_kind["sliding_attention"]["rope_theta"]
    else:
        spell_old(hf_config)
    for field in ("partial_rotary_factor", "llama_4_scaling_beta"):
        if field in (hf_config.get("rope_scaling") or {}):
            hf_config[field] = hf_config["rope_scaling"].pop(field)
    assert not describe_differences(ours(hf_config), ours(all_fields(name, hf_config)))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_field_that_nobody_knows_stops_loading_by_its_name(name: str):
    for value in (True, 0.5, 7, "alibi", [1, 2], {"a": 1}):
        with pytest.raises(DataError, match=r"config\.json: use_new_thing \(.*not known to .* delete it"):
            ours(transformers_json(name) | {"use_new_thing": value})
    for value in (None, [], {}, "", 2**24 + 1):
        assert ours(transformers_json(name) | {"use_new_thing": value}) == ours(transformers_json(name))


def configure(name: str, hf_config: dict) -> Any:
    """transformers' config object of this config.json."""
    return type(transformers_model(name).config).from_dict(copy.deepcopy(hf_config))


def rebuild_model(name: str, config: Any) -> Any:
    """transformers' model of this config with the tensors of `transformers_model(name)`: made alike, so that two
    of them that compute the same have the same rounding, which some families amplify."""
    model = type(transformers_model(name))(copy.deepcopy(config))
    model.load_state_dict(transformers_model(name).state_dict())
    model.set_attn_implementation("eager")
    return model.eval()


@contextmanager
def attributes_read() -> Iterator[set[str]]:
    """The attributes of transformers' configs that are looked at inside, by whatever of their names."""
    read, original = set[str](), transformers.PreTrainedConfig.__getattribute__

    def get(self: Any, name: str) -> Any:
        read.update((name, original(self, "attribute_map").get(name, name)))
        return original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.PreTrainedConfig, "__getattribute__", get)
        yield read


@pytest.mark.parametrize("name", BUILDERS)
def test_every_field_of_the_reference_class_is_read_or_harmless_or_refused(name: str):
    """Whatever another value of it does to transformers' logits, it does here, or nothing is loaded. Fields that we
    read are compared by the laws of parity; here are those that we do not read. (A model whose config differs in one
    attribute alone, at which nothing looks while it is built and computes, is the same model.)"""
    family, full = family_for(transformers_json(name)), all_fields(name, transformers_json(name))
    read, config = known_fields(family, full), configure(name, full)
    tokens = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))
    with attributes_read() as used:
        expected = logits_of(rebuild_model(name, config), tokens)
    for field, value in full.items():
        for other in other_values(value):
            if field in read or field in SWITCHES or not is_harmless(family, field, other):
                continue
            try:
                changed = configure(name, full | {field: other})
                differing = {key for key in vars(config) | vars(changed) if is_changed(key, config, changed)}
                if differing <= {field} - used:
                    continue
                model = rebuild_model(name, changed)
            except Exception:
                continue  # transformers refuses it
            torch.testing.assert_close(logits_of(model, tokens), expected, atol=1e-5, rtol=1e-5, msg=f"{field} {other}")


def is_changed(key: str, one: Any, other: Any) -> bool:
    """Whether an attribute is there in one object alone, or with another value."""
    return key not in vars(one) or key not in vars(other) or repr(vars(one)[key]) != repr(vars(other)[key])


SWITCHES = frozenset(("output_attentions", "output_hidden_states", "return_dict", "dtype", "torch_dtype", "use_cache"))
"""What is returned, in which form: no part of the logits."""


def other_values(value: Any) -> list[Any]:
    """Other values of this kind, and of a switch where there is none yet."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1]
        case float():
            return [value * 0.5 + 0.25]
        case None:
            return [True, 3]
    return []


def test_use_bidirectional_attention_is_refused():
    for name in ("gemma2", "gemma3"):
        with pytest.raises(DataError, match=r"use_bidirectional_attention \(True\)"):
            ours(transformers_json(name) | {"use_bidirectional_attention": True})


def test_a_rope_that_asks_for_more_is_refused():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "temperature_of_pairs": 3.0}
    with pytest.raises(DataError, match=r"rope_parameters\.temperature_of_pairs \(3\.0\)"):
        ours(transformers_json("llama") | {"rope_parameters": rope})


def test_a_part_of_a_head_that_the_family_does_not_rotate_is_refused():
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(DataError, match=r"rope_parameters\.partial_rotary_factor \(0\.5\)"):
        ours(transformers_json("llama") | {"rope_parameters": rope})
    ours(transformers_json("llama") | {"rope_parameters": rope | {"partial_rotary_factor": 1.0}})


def test_an_unknown_field_of_a_part_is_named():
    from llm_quest.models.llava import FAMILY

    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
    inner = transformers_json("llama") | {"use_new_thing": True}
    hf_config = {"model_type": "llava", "text_config": inner, "vision_config": vision, "image_token_index": 90}
    (said,) = list_unknown_fields(FAMILY, hf_config, None)
    assert "use_new_thing (True): not known to llama" in said


def test_no_table_names_a_field_that_a_family_reads_for_its_computation():
    """BOOKKEEPING, GENERATION: of no family. TRAINING and OF_FAMILY may be read by some."""
    for name in BUILDERS:
        read = FieldTracker(transformers_json(name))
        family_for(transformers_json(name)).read(read)
        assert not read.seen & (BOOKKEEPING | GENERATION) - {"model_type", "id2label", "dtype", "torch_dtype"}, name
    assert not TRAINING & (BOOKKEEPING | GENERATION)
    assert OF_FAMILY.keys() <= {family.name for family in FAMILIES} | {
        "vit",
        "clip",
        "clip_text",
        "clip_model",
        "vision_language",
    }
