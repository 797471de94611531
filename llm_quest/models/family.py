"""What a family file declares, and its published sizes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_quest.contracts import Preset
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.models.config_fields import publish_config, read_config
from llm_quest.models.weight_names import WeightMap

HEADS = ("lm_head.", "embed_out.", "score.", "classifier.")
"""How the published names of output matrices begin, which stand outside the model's prefix."""
COMPUTED_TABLES = (r".*rotary_emb\.inv_freq", r".*embeddings\.position_ids")
"""Published tensors of any family that are not weights: every model computes them."""


@dataclass(frozen=True)
class SubConfig:
    """A part of a model of several parts. field: of config.json, where its numbers are. model_type: of the part alone.
    defaults: its class's values for sizes, which config.json leaves out where they are the same. of_whole: fields whose
    value outside the part holds for it, and what it is where it is left out."""

    field: str
    model_type: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of_whole: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A model family: how to build its models, and their form in Hugging Face folders.

    name: of the file. Config: the frozen dataclass of its numbers, with config.json's names (`config_fields.py`).
    assemble(config) -> Decoder (under `torch.device("meta")` it takes no memory); initialize(model, generator) fills
    it. weight_map(config): our parameter names -> published ones. architectures: model_type -> class, as config.json
    has them, the usual one first; choose_model_type(config) where there are several. classifiers: model_type -> class
    with a score head, where it is not called ...ForSequenceClassification (None: transformers has none).
    extra_model_types: further ones that are read. parts: model_type of a model of several parts -> the part that is
    this family's. other_parts: how the tensors of the other parts begin. keys_to_ignore: further published tensors that
    are not weights, as regular expressions. renames: further spellings of published names, (pattern at the beginning,
    replacement). duplicate_weights(config): published names that hold another one's tensor again.
    resolve_config(config, names in the files): the config that fits what is there, where files may leave a part out.
    pipeline_tag: the hub's word for the task."""

    name: str
    Config: type
    assemble: Callable[[Any], Any]
    weight_map: Callable[[Any], WeightMap]
    architectures: Mapping[str, str]
    presets: tuple[Preset, ...]
    choose_model_type: Callable[[Any], str] | None = None
    classifiers: Mapping[str, str | None] = field(default_factory=dict)
    initialize: Callable[[Any, torch.Generator | None], None] = init_depth_scaled_
    extra_model_types: tuple[str, ...] = ()
    keys_to_ignore: tuple[str, ...] = ()
    parts: Mapping[str, SubConfig] = field(default_factory=dict)
    other_parts: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    pipeline_tag: str = "text-generation"
    duplicate_weights: Callable[[Any], Mapping[str, str]] = lambda config: {}
    resolve_config: Callable[[Any, Collection[str]], Any] = lambda config, stored: config

    @property
    def model_type(self) -> str:
        """The usual one."""
        return next(iter(self.architectures))

    @property
    def model_types(self) -> tuple[str, ...]:
        """All that are read."""
        return (*self.architectures, *self.extra_model_types)

    def root_prefix(self, published: Collection[str]) -> str:
        """What all published names but the head's begin with (`model.`, `transformer.`); empty where they differ."""
        roots = {name.split(".")[0] for name in published if not name.startswith(HEADS)}
        return f"{roots.pop()}." if len(roots) == 1 else ""

    def ignores(self, published: str) -> bool:
        """Is the tensor of this name not a weight?"""
        return any(re.fullmatch(pattern, published) for pattern in (*COMPUTED_TABLES, *self.keys_to_ignore))

    def matches(self, hf_config: Mapping[str, Any]) -> bool:
        """Is this config.json one of this family?"""
        kind, named = hf_config.get("model_type"), hf_config.get("architectures")
        classes = named if isinstance(named, list) else ()
        return kind in self.model_types or (
            kind is None and any(architecture in classes for architecture in self.architectures.values())
        )

    def read(self, hf_config: Mapping[str, Any]) -> Any:
        """A Config from the contents of config.json; DataError for what is missing or not computed."""
        return read_config(self.Config, hf_config)

    def publish(self, config: Any) -> dict[str, Any]:
        """The contents of config.json, model_type and architectures included."""
        kind = self.choose_model_type(config) if self.choose_model_type else self.model_type
        return {"model_type": kind, "architectures": [self.architectures[kind]]} | publish_config(config)

    def classifier(self, model_type: str) -> str | None:
        """transformers' class with a score head; None where it has none."""
        name = re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", self.architectures.get(model_type, ""))
        return self.classifiers.get(model_type, name if name.endswith("ForSequenceClassification") else None)


SIZES = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size"
"""The columns of a table of presets that most families have."""


def preset_table(
    columns: str, *rows: tuple[Any, ...], make: Callable[..., Any], eos: tuple[int, ...] = (), notes: str = ""
) -> tuple[Preset, ...]:
    """Published sizes, one a row: name, hub id, number of parameters, then the numbers that `columns` names. make: the
    Config from those numbers."""
    presets = []
    for name, hub_id, num_parameters, *numbers in rows:
        config = make(**dict(zip(columns.split(), numbers, strict=True)))
        presets.append(Preset(name, config, num_parameters, hub_id, notes, eos))
    return tuple(presets)
