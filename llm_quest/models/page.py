"""What a family's page consists of, and the vocabulary of its two-way tables.

A table of names maps each of our parameters to what the published files hold: a plain name, several matrices stacked by
rows (`Rows`), one stored the other way round (`Transposed`) or in another shape (`Shaped`), or several, one for each
expert (`Stack`). `{i}` stands for the layer's number. Reading and
writing both follow the one table (hub/), so that export then import is the identity by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
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


@dataclass(frozen=True)
class Stack:
    """Our parameter is these, stacked along a new first dimension: one entry per expert."""

    entries: tuple[str | Rows, ...]


@dataclass(frozen=True)
class Shaped:
    """The same numbers in the same order in another shape: a convolution's (D,C,P,P) for our (D, C P P)."""

    name: str
    shape: tuple[int, ...]


Published = str | Rows | Transposed | Shaped | Stack
Names = Mapping[str, Published]


@dataclass(frozen=True)
class Page:
    """A family, as the rest of the house sees it.

    name: of the file. model_type, architecture: what `config.json` calls it. Config: the frozen dataclass of its
    numbers. assemble(config) -> Decoder (call it under `torch.device("meta")` to spend no memory); initialize(model,
    generator) fills it. names(config): our parameter names -> published ones. read(config.json's contents) -> Config,
    publish its inverse. ignore: published tensors that are not weights, as regular expressions. also: further
    model_types read by this page (`publish` says which one a config is, where that changes what is computed).
    copies(config): published names that hold another one's tensor again. settle(config, names in the files): the config
    that fits what is there, where files may leave a part out. task: the hub's word for what it does. optional_prefix: a
    piece of the names that some files leave out."""

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
    also: tuple[str, ...] = ()
    task: str = "text-generation"
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {}
    settle: Callable[[Any, Collection[str]], Any] = lambda config, stored: config

    def reads(self, published: Mapping[str, Any]) -> bool:
        """Is this config.json one of this page's?"""
        kind = published.get("model_type")
        named = self.architecture in (published.get("architectures") or ())
        return kind in (self.model_type, *self.also) or (kind is None and named)


def per_layer(table: Names, layers: int | Iterable[int]) -> dict[str, Published]:
    """The table with `{i}` written out for every layer: so many, or these."""
    numbers = list(range(layers) if isinstance(layers, int) else layers)
    written: dict[str, Published] = {}
    for ours, theirs in table.items():
        for layer in numbers if "{i}" in ours else [0]:
            written[number(ours, layer)] = renumber(theirs, layer)
    return written


def renumber(theirs: Published, layer: int) -> Published:
    return renamed(theirs, lambda name: number(name, layer))


def renamed(theirs: Published, rename: Callable[[str], str]) -> Published:
    """The entry with every published name in it changed."""
    match theirs:
        case Rows(names=names):
            return Rows(*(rename(name) for name in names))
        case Stack(entries=entries):
            return Stack(tuple(renamed(entry, rename) for entry in entries))  # type: ignore[misc]
        case Transposed(name=name):
            return Transposed(rename(name))
        case Shaped(name=name, shape=shape):
            return Shaped(rename(name), shape)
    return rename(theirs)


def per_expert(entry: str | Rows, experts: int) -> Stack:
    """The entry with `{e}` written out for every expert."""

    def numbered(name: str, expert: int) -> str:
        return name.replace("{e}", str(expert))

    if isinstance(entry, Rows):
        return Stack(tuple(Rows(*(numbered(name, e) for name in entry.names)) for e in range(experts)))
    return Stack(tuple(numbered(entry, e) for e in range(experts)))


def number(name: str, layer: int) -> str:
    return name.replace("{i}", str(layer))


def swiglu_names(ours: str, theirs: str) -> dict[str, Published]:
    """A gated feed-forward layer's, as all but Mixtral publish it."""
    return {
        f"{ours}gate_up.weight": Rows(f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        f"{ours}down.weight": f"{theirs}down_proj.weight",
    }


def expert_names(ours: str, theirs: str, experts: int) -> dict[str, Published]:
    """A router's and its experts', likewise."""
    one = theirs + "experts.{e}."
    return {
        f"{ours}router.weight": f"{theirs}gate.weight",
        f"{ours}experts.gate_up": per_expert(Rows(f"{one}gate_proj.weight", f"{one}up_proj.weight"), experts),
        f"{ours}experts.down": per_expert(f"{one}down_proj.weight", experts),
    }


def need(published: Mapping[str, Any], field: str) -> Any:
    """A field that has no default."""
    if published.get(field) is None:
        raise DataError(f"config.json has no {field!r}, which a {published.get('model_type', 'model')} needs")
    return published[field]


def only(published: Mapping[str, Any], field: str, *allowed: Any) -> None:
    """A field whose other values change the computation in a way this page does not have: refuse, rather than compute
    wrongly."""
    if published.get(field, allowed[0]) not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise DataError(f"config.json: {field} is {published[field]!r}; this page computes {choices} only")


def each_layer(published: Mapping[str, Any], field: str, layers: int, *kinds: Any) -> list[Any] | None:
    """A field that says one of these kinds for every layer; None where it is absent."""
    listed = published.get(field)
    if listed is None:
        return None
    if not isinstance(listed, list) or len(listed) != layers:
        count = len(listed) if isinstance(listed, list) else repr(listed)
        raise DataError(f"config.json: {field} has {count} entries for {layers} layers; it must say one for each")
    for kind in listed:
        if kind not in kinds:
            raise DataError(f"config.json: {field} names {kind!r}; known: {', '.join(map(str, kinds))}")
    return listed


def window_of(published: Mapping[str, Any], field: str, default: int) -> int:
    """How many tokens a windowed layer sees, itself included."""
    window = published.get(field, default)
    if type(window) is not int or window < 1:
        raise DataError(f"config.json: {field} is {window!r}; a windowed layer sees at least itself: 1 or more")
    return window


def read_rotary(published: Mapping[str, Any], width: int, theta: float = 10000.0, context: int | None = None) -> Rotary:
    """Both generations: `rope_parameters` (transformers 5), else top-level `rope_theta` and `rope_scaling`."""
    rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or published.get("rope_theta") or theta
    return Rotary(width, float(theta), read_scaling(rope, published.get("max_position_embeddings") or context))


def read_scaling(rope: Mapping[str, Any], context: int | None) -> Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.get("original_max_position_embeddings") or context
    if kind not in SCALINGS:
        raise DataError(f"config.json: rope type {kind!r} is unknown here; known: {', '.join(SCALINGS)}")
    return SCALINGS[kind](rope, original, context)


def read_yarn(rope: Mapping[str, Any], original: int | None, context: int | None) -> YaRN:
    original = trained_length(original)
    factor = rope.get("factor") or (context or original) / original
    return YaRN(
        float(factor),
        original,
        fast=float(rope.get("beta_fast") or 32),
        slow=float(rope.get("beta_slow") or 1),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        explicit_factor=rope.get("attention_factor"),
        truncate=rope.get("truncate", True),
    )


def read_llama3(rope: Mapping[str, Any], original: int | None, context: int | None) -> Llama3:
    low, high = need(rope, "low_freq_factor"), need(rope, "high_freq_factor")
    return Llama3(float(need(rope, "factor")), float(low), float(high), trained_length(original))


def trained_length(original: int | None) -> int:
    """What a stretch that depends on it is measured by."""
    if not original:
        raise DataError(
            "config.json has no 'original_max_position_embeddings' to stretch from, nor 'max_position_embeddings'"
        )
    return int(original)


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
            optional = {
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
                "attention_factor": yarn.explicit_factor,
            }
            return {
                "rope_type": "yarn",
                **fields,
                **{name: value for name, value in optional.items() if value is not None},
            }
    raise ValueError(f"no published spelling for {type(scaling).__name__}")
