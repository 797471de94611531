"""What a family's page consists of, and the vocabulary of its two-way tables.

A table of names maps each of our parameters to what the published files hold: a plain name, several matrices stacked by
rows (`Rows`), or one stored the other way round (`Transposed`). `{i}` stands for the layer's number. Reading and writing
both follow the one table (hub/), so that export then import is the identity by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llm_quest.contracts import Preset
from llm_quest.errors import DataError
from llm_quest.layers.rotary import NTK, Linear, Llama3, Rotary, Scaling, YaRN
from llm_quest.models.decoder import Decoder


@dataclass(frozen=True)
class Rows:
    """Our parameter is these published ones, stacked by rows in this order."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Transposed:
    """Stored (in, out) in the published file, (out, in) with us."""

    name: str


Published = str | Rows | Transposed
Names = Mapping[str, Published]


@dataclass(frozen=True)
class Page:
    """A family, as the rest of the house sees it.

    name: of the file. model_type, architecture: what `config.json` calls it. Config: the frozen dataclass of its numbers.
    assemble(config) -> Decoder (call it under `torch.device("meta")` to spend no memory); initialize(model, generator) fills
    it. names(config): our parameter names -> published ones. read(config.json's contents) -> Config, publish its inverse.
    ignore: published tensors that are not weights, as regular expressions."""

    name: str
    model_type: str
    architecture: str
    Config: type
    assemble: Callable[[Any], Decoder]
    initialize: Callable[[Decoder, torch.Generator | None], None]
    names: Callable[[Any], Names]
    read: Callable[[Mapping[str, Any]], Any]
    publish: Callable[[Any], dict[str, Any]]
    presets: tuple[Preset, ...]
    ignore: tuple[str, ...] = ()
    optional_prefix: str = ""


def per_layer(table: Names, layers: int) -> dict[str, Published]:
    """The table with `{i}` written out for every layer."""
    written: dict[str, Published] = {}
    for ours, theirs in table.items():
        for layer in range(layers) if "{i}" in ours else range(1):
            written[number(ours, layer)] = renumber(theirs, layer)
    return written


def renumber(theirs: Published, layer: int) -> Published:
    if isinstance(theirs, Rows):
        return Rows(*(number(name, layer) for name in theirs.names))
    return Transposed(number(theirs.name, layer)) if isinstance(theirs, Transposed) else number(theirs, layer)


def number(name: str, layer: int) -> str:
    return name.replace("{i}", str(layer))


def need(published: Mapping[str, Any], field: str) -> Any:
    """A field that has no default."""
    if published.get(field) is None:
        raise DataError(f"config.json has no {field!r}, which a {published.get('model_type', 'model')} needs")
    return published[field]


def only(published: Mapping[str, Any], field: str, *allowed: Any) -> None:
    """A field whose other values change the computation in a way this page does not have: refuse, rather than compute wrongly."""
    if published.get(field, allowed[0]) not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise DataError(f"config.json: {field} is {published[field]!r}; this page computes {choices} only")


def read_rotary(published: Mapping[str, Any], width: int, theta: float = 10000.0) -> Rotary:
    """Both generations: `rope_parameters` (transformers 5), else top-level `rope_theta` and `rope_scaling`."""
    rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or published.get("rope_theta") or theta
    return Rotary(width, float(theta), read_scaling(rope, published.get("max_position_embeddings")))


def read_scaling(rope: Mapping[str, Any], context: int | None) -> Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.get("original_max_position_embeddings") or context
    if kind not in SCALINGS:
        raise DataError(f"config.json: rope type {kind!r} is unknown here; known: {', '.join(SCALINGS)}")
    return SCALINGS[kind](rope, original, context)


def read_yarn(rope: Mapping[str, Any], original: int | None, context: int | None) -> YaRN:
    factor = rope.get("factor") or (context or 1) / (original or 1)
    return YaRN(
        float(factor),
        int(original or 0),
        fast=float(rope.get("beta_fast") or 32),
        slow=float(rope.get("beta_slow") or 1),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        explicit_factor=rope.get("attention_factor"),
        truncate=rope.get("truncate", True),
    )


def read_llama3(rope: Mapping[str, Any], original: int | None, context: int | None) -> Llama3:
    low, high = need(rope, "low_freq_factor"), need(rope, "high_freq_factor")
    return Llama3(float(need(rope, "factor")), float(low), float(high), int(original or 0))


SCALINGS: dict[str, Callable[[Mapping[str, Any], int | None, int | None], Scaling | None]] = {
    "default": lambda rope, original, context: None,
    "linear": lambda rope, original, context: Linear(float(need(rope, "factor"))),
    "ntk": lambda rope, original, context: NTK(float(need(rope, "factor"))),
    "llama3": read_llama3,
    "yarn": read_yarn,
}


def publish_rotary(rotary: Rotary) -> dict[str, Any]:
    """Both spellings: a folder with only the new one is read with theta 10000 by transformers 4, in silence.

    NTK-aware scaling is a larger base, and is published as one: no reader has another name for it."""
    theta, scaling = rotary.theta, publish_scaling(rotary.scaling)
    if isinstance(rotary.scaling, NTK):
        theta = rotary.theta * rotary.scaling.factor ** (rotary.width / (rotary.width - 2))
    rope = {"rope_type": "default"} | (scaling or {})
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": {"rope_theta": theta} | rope}


def publish_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case None | NTK():
            return None
        case Linear(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3(factor=factor, low=low, high=high, original=original):
            fields = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **fields, "original_max_position_embeddings": original}
        case YaRN() as yarn:
            fields = {"factor": yarn.factor, "original_max_position_embeddings": yarn.original}
            fields |= {"beta_fast": yarn.fast, "beta_slow": yarn.slow, "truncate": yarn.truncate}
            optional = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim, "attention_factor": yarn.explicit_factor}
            return {"rope_type": "yarn", **fields, **{name: value for name, value in optional.items() if value is not None}}
    raise ValueError(f"no published spelling for {type(scaling).__name__}")
