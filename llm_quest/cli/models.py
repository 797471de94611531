"""`quest models` and `quest show NAME`: list the presets, and describe one model by its layers, parameters, cache and
cost, all counted on the model itself, built on the meta device."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llm_quest.cli.diagram import describe_rotary, draw_model, nominal_image_tokens
from llm_quest.contracts import Preset
from llm_quest.cost.flops import ModelCost, image_flops, text_flops
from llm_quest.errors import DataError, UsageError
from llm_quest.files import load_json
from llm_quest.formatting import align_columns, format_bytes, parse_quantity
from llm_quest.hub.config import MAX_CONFIG_BYTES, implausible_fields
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import FAMILIES, VISION_FAMILIES
from llm_quest.models.build import DTYPES, build_meta_model, count_parameters, family_of, preset
from llm_quest.models.dual_encoder import CLIPModel, TextEncoder
from llm_quest.models.family import Family
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.multimodal import VisionLanguageModel

ALL_FAMILIES = (*FAMILIES, *VISION_FAMILIES)
DEFAULT_CONTEXT = 4096
LOADED_AS = ("float32", "bfloat16")


@dataclass(frozen=True)
class PresetList:
    """Every preset of every family, one row each."""

    rows: tuple[dict[str, Any], ...]

    def as_json(self) -> list[dict[str, Any]]:
        return list(self.rows)

    def lines(self) -> list[str]:
        cells = [("name", "family", "parameters", "context", "hub id", "notes")]
        for row in self.rows:
            counts = (f"{row['parameters']:,}", f"{row['context']:,}")
            cells.append((row["name"], row["family"], *counts, row["hub"] or "-", row["notes"]))
        hint = "quest show NAME describes one, quest diff A B compares two, quest plan estimates the cost of training"
        return [*align_columns(cells, right=(2, 3)), "", hint]


def list_presets(words: Sequence[str] = (), max_parameters: str | None = None) -> PresetList:
    """The presets whose name, family, hub id or notes hold every word (upper or lower case), with at most so many
    parameters (`4B`, `500M`). Published models have their published counts; others are counted on the meta device.
    UsageError where none is left, with the names that are near."""
    most = math.inf if max_parameters is None else parse_quantity(max_parameters, "--max-parameters")
    rows = [preset_row(family, one) for family in ALL_FAMILIES for one in family.presets]
    matching = [row for row in rows if row["parameters"] <= most and holds_words(row, words)]
    if not matching:
        names = [row["name"] for row in rows]
        near = get_close_matches(words[0], [*names, *{row["family"] for row in rows}], cutoff=0.5) if words else []
        raise UsageError(
            f"no model has {' and '.join(map(repr, words)) or 'a name'}"
            + (f" and at most {max_parameters} parameters" if max_parameters else "")
            + (f"; near: {', '.join(near)}" if near else "; quest models lists all")
        )
    return PresetList(tuple(matching))


def holds_words(row: Mapping[str, Any], words: Sequence[str]) -> bool:
    """Whether every word stands somewhere in a row."""
    text = " ".join(str(row[key] or "") for key in ("name", "family", "hub", "notes")).lower()
    return all(word.lower() in text for word in words)


def preset_row(family: Family, one: Preset) -> dict[str, Any]:
    parameters = (
        one.num_parameters if one.num_parameters is not None else count_parameters(build_meta_model(one.config))
    )
    return {
        "name": one.name,
        "family": family.name,
        "parameters": parameters,
        "context": one.config.max_position_embeddings,
        "hub": one.hub_id,
        "notes": one.notes or ("small, for tests and examples" if one.name.endswith("-tiny") else ""),
    }


@dataclass(frozen=True)
class ModelCard:
    """A model's layers, parameters, cache and cost.

    parts: parameters by part, tied matrices once (with the embedding). cache_per_token: bytes (bf16) that one more
    token adds to the cache; cache_fixed: bytes that do not grow (full windows, states); cache_total: at `context`
    tokens. flops_linear, flops_scores: FLOPs per token of a forward pass over `context` tokens (two per multiply-add;
    attention counts every pair that its kernel is given, masked ones too, as in Chowdhery et al. 2022, appendix B);
    training costs three times as much. load: bytes of weights by dtype. image_tokens: tokens of one image; 0 for a
    model without images. flops_image: FLOPs of the image encoder and projector for one image, forward. An image encoder
    has no cache, and its only tokens are those of an image."""

    name: str
    family: str
    headline: str
    numbers: dict[str, Any]
    picture: tuple[str, ...]
    parameters: int
    parts: dict[str, int]
    context: int
    cache_per_token: int
    cache_fixed: int
    cache_total: int
    flops_linear: int
    flops_scores: int
    load: dict[str, int]
    image_tokens: int = 0
    flops_image: int = 0

    @property
    def flops(self) -> int:
        """FLOPs per token, forward."""
        return self.flops_linear + self.flops_scores

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "flops_forward": self.flops, "flops_training": 3 * self.flops}

    def lines(self) -> list[str]:
        parts = [(f"  {part}", f"{count:,}", f"{count / self.parameters:6.1%}") for part, count in self.parts.items()]
        parts.append(("  total", f"{self.parameters:,}", ""))
        facts = self.image_cost_rows() if self.image_tokens else []
        facts += self.token_cost_rows() if self.cache_per_token else []
        facts += [
            ("weights", ", ".join(f"{format_bytes(num_bytes)} in {dtype}" for dtype, num_bytes in self.load.items()))
        ]
        header = [f"{self.name}: {self.headline}", "", *self.picture, ""]
        return [*header, "parameters", *align_columns(parts, right=(1, 2)), "", *align_columns(facts)]

    def token_cost_rows(self) -> list[tuple[str, str]]:
        """The cache and FLOPs of one token of a decoder."""
        fixed = f" and {format_bytes(self.cache_fixed)} that do not grow" if self.cache_fixed else ""
        at, scores = f"at {self.context:,} tokens", f"{self.flops_scores / self.flops:.0%} of it attention"
        return [
            (
                "cache, bfloat16",
                f"{self.cache_per_token:,} bytes per token{fixed}; {format_bytes(self.cache_total)} {at}",
            ),
            ("forward", f"{self.flops / 1e9:,.4g} GFLOPs per token {at} ({scores})"),
            ("training", f"{3 * self.flops / 1e9:,.4g} GFLOPs per token (backward costs twice the forward pass)"),
        ]

    def image_cost_rows(self) -> list[tuple[str, str]]:
        """The tokens and FLOPs of one image."""
        once, kept = self.flops_image / 1e9, self.image_tokens * self.cache_per_token
        cache_note = f"and {format_bytes(kept)} of the cache" if kept else "each attends to all, nothing is cached"
        return [
            ("an image", f"{self.image_tokens:,} tokens, {cache_note}"),
            ("forward, an image", f"{once:,.4g} GFLOPs" + (" before the decoder reads its tokens" if kept else "")),
            ("training, an image", f"{3 * once:,.4g} GFLOPs"),
        ]


def make_model_card(name: str, *, context: int | None = None) -> ModelCard:
    """Describe a preset, a family (its first preset), or a folder with a config.json. context: number of tokens at
    which cache and FLOPs are counted; by default the model's context, at most 4,096."""
    title, config = find_config(name)
    family, model = family_of(config), build_meta_model(config)
    if context is not None and context < 1:
        raise UsageError(f"context is {context}; it counts tokens, so give at least 1")
    parameters = count_parameters(model)
    return ModelCard(
        name=title,
        family=family.name,
        headline=family_headline(family),
        numbers=config_values(config),
        picture=tuple(draw_model(model)),
        parameters=parameters,
        parts=parameters_by_part(model),
        load={name: parameters * DTYPES[name].itemsize for name in LOADED_AS},
        **cost_fields(title, model, context),
    )


def cost_fields(title: str, model: Any, context: int | None) -> dict[str, int]:
    """The cost fields of a `ModelCard`."""
    config = model.config
    if isinstance(model, CLIPModel):
        tokens, flops = config.vision_config.max_position_embeddings, sum(image_flops(config))
        return cost_fields(title, model.text_encoder, context) | image_cost_fields(tokens, flops)
    if isinstance(model, ImageEncoder | TextEncoder):
        reads_images, tokens = isinstance(model, ImageEncoder), config.max_position_embeddings
        weights, pairs = image_flops(config) if reads_images else text_flops(config)
        cache_bytes = dict.fromkeys(("cache_per_token", "cache_fixed", "cache_total"), 0)
        each = {"context": tokens, "flops_linear": weights // tokens, "flops_scores": pairs // tokens}
        return cache_bytes | each | (image_cost_fields(tokens, weights + pairs) if reads_images else {})
    image: dict[str, int] = {}
    if isinstance(model, VisionLanguageModel):
        image, config = image_cost_fields(nominal_image_tokens(config), sum(image_flops(config))), config.text_config
        model = build_meta_model(config)
    context = context or min(config.max_position_embeddings, DEFAULT_CONTEXT)
    try:
        cost = ModelCost(model, DTYPES["bfloat16"])
        linear, scores = (round(flops / context) for flops in cost.count_pass(context))
    except ValueError as error:
        raise UsageError(f"{title} cannot be shown at {context:,} tokens: {error}") from None
    growing, fixed, total = cost.cache_bytes(context)
    cache_bytes = {"cache_per_token": growing, "cache_fixed": fixed, "cache_total": total}
    return {"context": context, **cache_bytes, "flops_linear": linear, "flops_scores": scores, **image}


def image_cost_fields(tokens: int, flops: int) -> dict[str, int]:
    return {"image_tokens": tokens, "flops_image": flops}


def find_config(name: str) -> tuple[str, Any]:
    """(title, config) of a preset, a family, or a folder with a config.json."""
    for family in ALL_FAMILIES:
        if name in [one.name for one in family.presets]:
            return name, preset(name).config
    for family in ALL_FAMILIES:
        if family.name == name:
            return family.presets[0].name, family.presets[0].config
    file = Path(name) / "config.json"
    if file.is_file():
        return name, read_family_config(file)
    if Path(name).is_dir():
        raise DataError(f"{name} holds no config.json, so there is nothing to show")
    try:
        return name, preset(name).config
    except UsageError as error:
        families = ", ".join(family.name for family in ALL_FAMILIES)
        raise UsageError(f"{error}; families: {families}; or a folder with a config.json") from None


def read_family_config(file: Path) -> Any:
    """The config of a Hugging Face folder, read by its family."""
    published = load_json(file, limit=MAX_CONFIG_BYTES)
    for family in ALL_FAMILIES:
        if family.matches(published):
            return read_plausible_config(family, published, file)
    known = ", ".join(name for family in ALL_FAMILIES for name in family.model_types)
    raise DataError(f"{file}: model_type {published.get('model_type')!r} is not supported; known: {known}")


def read_plausible_config(family: Family, published: Mapping[str, Any], file: Path) -> Any:
    """The family's config. DataError for fields that it cannot read, or numbers that no model has."""
    try:
        config = family.read(published)
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise DataError(f"{file}: {error}") from None
    if problems := implausible_fields(config):
        raise DataError(f"{file}: {problems[0]}")
    return config


def family_headline(family: Family) -> str:
    """The first sentence of the docstring of a family's file."""
    return family_docstring(family).split("\n\n")[0].replace("\n", " ").split(". What is new")[0].rstrip(".:")


def family_docstring(family: Family) -> str:
    """The docstring of a family's file."""
    module = inspect.getmodule(family.assemble)
    assert module is not None, "assemble is defined in the family's file"
    return inspect.cleandoc(module.__doc__ or "")


def config_values(config: Any) -> dict[str, Any]:
    """Field -> value; rotary embeddings as a short description."""
    return {field.name: to_plain_value(getattr(config, field.name)) for field in fields(config)}


def to_plain_value(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, tuple | list):
        return [to_plain_value(item) for item in value]
    return describe_rotary(value) if isinstance(value, RotaryEmbedding) else str(value)


def parameters_by_part(model: Any) -> dict[str, int]:
    """Parameter counts by part (PART_NAMES); every parameter is in exactly one part."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[parameter_part(name)] += parameter.numel()
    return {part: counts[part] for part in PART_NAMES if counts[part]}


PART_NAMES = ("image encoder", "adapter", "embedding", "attention", "feed-forward", "norms", "head", "other")


def parameter_part(name: str) -> str:
    words = name.removeprefix("decoder.").removeprefix("text_encoder.").split(".")
    named = {
        "tower": "image encoder",
        "image_encoder": "image encoder",
        "adapter": "adapter",
        "embed": "embedding",
        "head": "head",
    }
    if words[0] in named:
        return named[words[0]]
    if words[0] == "enter" or any("norm" in word for word in words):
        return "norms"
    return "attention" if "mixer" in words else "feed-forward" if "feed_forward" in words else "other"
