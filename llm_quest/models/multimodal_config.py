"""Configs and weight maps of models of several parts: an image encoder (`vision_config`), an adapter and a decoder
(`text_config`), each part as its own family has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llm_quest.contracts import format_list
from llm_quest.errors import DataError, UsageError
from llm_quest.models.config_fields import Json
from llm_quest.models.family import Family
from llm_quest.models.rope_config import require_field
from llm_quest.models.weight_names import WeightMap, map_published_names

PartField = tuple[Callable[[Any], Any], Callable[[Any, Any], dict[str, Any]]]
"""The arguments of `json_field`."""
TIED = "tie_word_embeddings"
NOTHING: Json = MappingProxyType({})
PART_RENAMES = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"(model\.)?vision_tower\.", "vision_tower."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
"""transformers' names of today -> those of LLaVA's and Gemma 3's files."""
Rename = Callable[[str], str]
PART_NAMES: Mapping[str, Rename] = {
    "tower": lambda name: f"vision_tower.{name.removeprefix('vit.')}",
    "adapter": lambda name: name,
    "decoder": lambda name: f"language_model.{name}",
}
"""Our parts -> what their published names become in such files."""


class TextWithImages:
    """What follows from the parts, for the Config of a language model that reads images."""

    vision_config: Any
    text_config: Any
    image_token_id: int

    vocab_size = property(lambda config: config.text_config.vocab_size, doc="The decoder's.")
    max_position_embeddings = property(
        lambda config: config.text_config.max_position_embeddings, doc="Images and text."
    )
    num_hidden_layers = property(lambda config: config.text_config.num_hidden_layers, doc="The decoder's.")

    def require_image_token(self) -> None:
        """ValueError for a placeholder that the decoder has no row for."""
        token, rows = self.image_token_id, self.text_config.vocab_size
        if not 0 <= token < rows:
            raise ValueError(f"image_token {token} is outside the vocabulary of {rows}: enlarge it")


def vision_part(families: Sequence[Family], defaults: Json = NOTHING) -> PartField:
    """How a Config's field for `vision_config` is read and written, of one of these families; the first is meant where
    no model_type is given. defaults: what config.json may leave out of its numbers."""
    kind = families[0].model_type

    def write(value: Any, config: Any) -> dict[str, Any]:
        return {"vision_config": family_among(families, value).publish(value)}

    return lambda c: read_part(c.json, "vision_config", families, kind, defaults), write


def text_part(families: Sequence[Family], kind: str, defaults: Json = NOTHING) -> PartField:
    """How `text_config` is read and written, as `vision_part`. kind: the model_type where none is given. What
    config.json says of tied embeddings outside the part holds for it."""

    def read(c: Any) -> Any:
        outside = {} if c.json.get(TIED) is None else {TIED: c.json[TIED]}
        return read_part(c.json, "text_config", families, kind, defaults, outside)

    def write(value: Any, config: Any) -> dict[str, Any]:
        published = family_among(families, value).publish(value)
        return {"text_config": published, TIED: bool(published.get(TIED, False))}

    return read, write


def read_part(
    hf_config: Json, field: str, families: Sequence[Family], kind: str, defaults: Json, outside: Json = NOTHING
) -> Any:
    """One of the configs inside, read by the family that its model_type names. outside: fields of the whole that take
    precedence over the part's."""
    part = require_field(hf_config, field)
    if not isinstance(part, Mapping):
        raise DataError(
            f"config.json: {field} is {type(part).__name__}; it must be an object with the numbers of that part"
        )
    model_type = part.get("model_type", kind)
    for family in families:
        if model_type in family.model_types:
            known = defaults if model_type == kind else {}
            return family.read({**known, "model_type": model_type, **part, **outside})
    listed = " or ".join(kind if kind in family.model_types else family.model_type for family in families)
    raise DataError(f"config.json: {field} has model_type {model_type!r}; here it may be {listed}")


def family_among(families: Sequence[Family], config: Any) -> Family:
    """The family among these that a config belongs to."""
    for family in families:
        if type(config) is family.Config:
            return family
    known = format_list(family.name for family in families)
    raise UsageError(f"{type(config).__module__}.Config cannot stand here; a config of {known} can")


def join_weight_maps(
    tower: WeightMap, adapter: WeightMap, decoder: WeightMap, part_names: Mapping[str, Rename] = PART_NAMES
) -> dict[str, Any]:
    """The parts' own maps as one, each renamed. The tower's head is not read."""
    table: dict[str, Any] = {}
    for part, names in {"tower": tower, "adapter": adapter, "decoder": decoder}.items():
        for ours, theirs in names.items():
            if not (part == "tower" and ours.startswith("head.")):
                table[f"{part}.{ours}"] = map_published_names(theirs, part_names[part])
    return table
