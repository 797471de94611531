"""What a family's page consists of, and the vocabulary of its two-way tables.

A table of names maps each of our parameters to what the published files hold: a plain name, several matrices stacked by
rows (`Rows`), one stored the other way round (`Transposed`) or in another shape (`Reshaped`), or several, one for each
expert (`StackTensors`). `{i}` stands for the layer's number. Reading and
writing both follow the one table (hub/), so that export then import is the identity by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llm_quest.contracts import Preset
from llm_quest.errors import DataError
from llm_quest.layers.rotary import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling, RotaryEmbedding, YaRNScaling
from llm_quest.models.decoder import Decoder


@dataclass(frozen=True)
class ConcatRows:
    """Our parameter is these published ones, stacked by rows in this order."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Transposed:
    """Stored (in, out) in the published file, (out, in) with us."""

    name: str


@dataclass(frozen=True)
class StackTensors:
    """Our parameter is these, stacked along a new first dimension: one entry per expert."""

    entries: tuple[str | ConcatRows, ...]


@dataclass(frozen=True)
class Reshaped:
    """The same numbers in the same order in another shape: a convolution's (D,C,P,P) for our (D, C P P)."""

    name: str
    shape: tuple[int, ...]


PublishedWeight = str | ConcatRows | Transposed | Reshaped | StackTensors
WeightMap = Mapping[str, PublishedWeight]


@dataclass(frozen=True)
class Family:
    """A family, as the rest of the house sees it.

    name: of the file. model_type, architecture: what `config.json` calls it. Config: the frozen dataclass of its
    numbers. assemble(config) -> Decoder (call it under `torch.device("meta")` to spend no memory); initialize(model,
    generator) fills it. names(config): our parameter names -> published ones. read(config.json's contents) -> Config,
    publish its inverse. keys_to_ignore: published tensors that are not weights, as regular expressions.
    extra_model_types: further model_types read by this page (`to_preprocessor_config` says which one a config is, where
    that changes what is computed). copies(config): published names that hold another one's tensor again. settle(config,
    names in the files): the config that fits what is there, where files may leave a part out. pipeline_tag: the hub's
    word for what it does. optional_prefix: a piece of the names that some files leave out."""

    name: str
    model_type: str
    architecture: str
    Config: type
    assemble: Callable[[Any], Decoder]
    initialize: Callable[[Decoder, torch.Generator | None], None]
    names: Callable[[Any], WeightMap]
    read: Callable[[Mapping[str, Any]], Any]
    publish: Callable[[Any], dict[str, Any]]
    presets: tuple[Preset, ...]
    keys_to_ignore: tuple[str, ...] = ()
    optional_prefix: str = ""
    extra_model_types: tuple[str, ...] = ()
    pipeline_tag: str = "text-generation"
    duplicate_weights: Callable[[Any], Mapping[str, str]] = lambda config: {}
    resolve_config: Callable[[Any, Collection[str]], Any] = lambda config, stored: config

    def matches(self, hf_config: Mapping[str, Any]) -> bool:
        """Is this config.json one of this page's?"""
        kind = hf_config.get("model_type")
        named = self.architecture in (hf_config.get("architectures") or ())
        return kind in (self.model_type, *self.extra_model_types) or (kind is None and named)


def expand_layers(table: WeightMap, layers: int | Iterable[int]) -> dict[str, PublishedWeight]:
    """The table with `{i}` written out for every layer: so many, or these."""
    numbers = list(range(layers) if isinstance(layers, int) else layers)
    expanded: dict[str, PublishedWeight] = {}
    for ours, theirs in table.items():
        for layer in numbers if "{i}" in ours else [0]:
            expanded[format_layer(ours, layer)] = substitute_layer(theirs, layer)
    return expanded


def substitute_layer(theirs: PublishedWeight, layer: int) -> PublishedWeight:
    return map_published_names(theirs, lambda name: format_layer(name, layer))


def map_published_names(theirs: PublishedWeight, rename: Callable[[str], str]) -> PublishedWeight:
    """The entry with every published name in it changed."""
    match theirs:
        case ConcatRows(names=names):
            return ConcatRows(*(rename(name) for name in names))
        case StackTensors(entries=entries):
            return StackTensors(tuple(map_published_names(entry, rename) for entry in entries))  # type: ignore[misc]
        case Transposed(name=name):
            return Transposed(rename(name))
        case Reshaped(name=name, shape=shape):
            return Reshaped(rename(name), shape)
    return rename(theirs)


def stack_experts(entry: str | ConcatRows, experts: int) -> StackTensors:
    """The entry with `{e}` written out for every expert."""

    def format_expert(name: str, expert: int) -> str:
        return name.replace("{e}", str(expert))

    if isinstance(entry, ConcatRows):
        return StackTensors(
            tuple(ConcatRows(*(format_expert(name, e) for name in entry.names)) for e in range(experts))
        )
    return StackTensors(tuple(format_expert(entry, e) for e in range(experts)))


def format_layer(name: str, layer: int) -> str:
    return name.replace("{i}", str(layer))


def swiglu_names(ours: str, theirs: str) -> dict[str, PublishedWeight]:
    """A gated feed-forward layer's, as all but Mixtral publish it."""
    return {
        f"{ours}gate_up.weight": ConcatRows(f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        f"{ours}down.weight": f"{theirs}down_proj.weight",
    }


def expert_names(ours: str, theirs: str, experts: int) -> dict[str, PublishedWeight]:
    """A router's and its experts', likewise."""
    one = theirs + "experts.{e}."
    return {
        f"{ours}router.weight": f"{theirs}gate.weight",
        f"{ours}experts.gate_up": stack_experts(ConcatRows(f"{one}gate_proj.weight", f"{one}up_proj.weight"), experts),
        f"{ours}experts.down": stack_experts(f"{one}down_proj.weight", experts),
    }


def require_field(hf_config: Mapping[str, Any], field: str) -> Any:
    """A field that has no default."""
    if hf_config.get(field) is None:
        raise DataError(f"config.json has no {field!r}, which a {hf_config.get('model_type', 'model')} needs")
    return hf_config[field]


def require_value(hf_config: Mapping[str, Any], field: str, *allowed: Any) -> None:
    """A field whose other values change the computation in a way this page does not have: refuse, rather than compute
    wrongly."""
    if hf_config.get(field, allowed[0]) not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise DataError(f"config.json: {field} is {hf_config[field]!r}; this page computes {choices} only")


def read_per_layer(hf_config: Mapping[str, Any], field: str, num_hidden_layers: int, *allowed: Any) -> list[Any] | None:
    """A field that says one of these kinds for every layer; None where it is absent."""
    values = hf_config.get(field)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != num_hidden_layers:
        count = len(values) if isinstance(values, list) else repr(values)
        raise DataError(
            f"config.json: {field} has {count} entries for {num_hidden_layers} layers; it must say one for each"
        )
    for kind in values:
        if kind not in allowed:
            raise DataError(f"config.json: {field} names {kind!r}; known: {', '.join(map(str, allowed))}")
    return values


def read_window(hf_config: Mapping[str, Any], field: str, default: int) -> int:
    """How many tokens a windowed layer sees, itself included."""
    window = hf_config.get(field, default)
    if type(window) is not int or window < 1:
        raise DataError(f"config.json: {field} is {window!r}; a windowed layer sees at least itself: 1 or more")
    return window


def read_rotary(
    hf_config: Mapping[str, Any], dim: int, default_theta: float = 10000.0, max_position_embeddings: int | None = None
) -> RotaryEmbedding:
    """Both generations: `rope_parameters` (transformers 5), else top-level `rope_theta` and `rope_scaling`."""
    rope = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    default_theta = rope.get("rope_theta") or hf_config.get("rope_theta") or default_theta
    return RotaryEmbedding(
        dim,
        float(default_theta),
        read_scaling(rope, hf_config.get("max_position_embeddings") or max_position_embeddings),
    )


def read_scaling(rope: Mapping[str, Any], max_position_embeddings: int | None) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.get("original_max_position_embeddings") or max_position_embeddings
    if kind not in ROPE_SCALINGS:
        raise DataError(f"config.json: rope type {kind!r} is unknown here; known: {', '.join(ROPE_SCALINGS)}")
    return ROPE_SCALINGS[kind](rope, original, max_position_embeddings)


def read_yarn(rope: Mapping[str, Any], original: int | None, max_position_embeddings: int | None) -> YaRNScaling:
    original = require_original_length(original)
    factor = rope.get("factor") or (max_position_embeddings or original) / original
    return YaRNScaling(
        float(factor),
        original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        explicit_attention_factor=rope.get("attention_factor"),
        truncate=rope.get("truncate", True),
    )


def read_llama3(rope: Mapping[str, Any], original: int | None, max_position_embeddings: int | None) -> Llama3Scaling:
    low, high = require_field(rope, "low_freq_factor"), require_field(rope, "high_freq_factor")
    return Llama3Scaling(
        float(require_field(rope, "factor")), float(low), float(high), require_original_length(original)
    )


def require_original_length(original: int | None) -> int:
    """What a stretch that depends on it is measured by."""
    if not original:
        raise DataError(
            "config.json has no 'original_max_position_embeddings' to stretch from, nor 'max_position_embeddings'"
        )
    return int(original)


ROPE_SCALINGS: dict[str, Callable[[Mapping[str, Any], int | None, int | None], RopeScaling | None]] = {
    "default": lambda rope, original, context: None,
    "linear": lambda rope, original, context: LinearScaling(float(require_field(rope, "factor"))),
    "ntk": lambda rope, original, context: NTKScaling(float(require_field(rope, "factor"))),
    "llama3": read_llama3,
    "yarn": read_yarn,
}


def publish_rotary(rotary: RotaryEmbedding) -> dict[str, Any]:
    """Both spellings: a folder with only the new one is read with theta 10000 by transformers 4, in silence.

    NTK-aware scaling is a larger base, and is published as one: no reader has another name for it."""
    theta, scaling = rotary.rope_theta, publish_scaling(rotary.scaling)
    if isinstance(rotary.scaling, NTKScaling):
        theta = rotary.rope_theta * rotary.scaling.factor ** (rotary.dim / (rotary.dim - 2))
    rope = {"rope_type": "default"} | (scaling or {})
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": {"rope_theta": theta} | rope}


def publish_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    match scaling:
        case None | NTKScaling():
            return None
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(
            factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
        ):
            fields = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **fields, "original_max_position_embeddings": original}
        case YaRNScaling() as yarn:
            fields = {"factor": yarn.factor, "original_max_position_embeddings": yarn.original_max_position_embeddings}
            fields |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "truncate": yarn.truncate}
            optional = {
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
                "attention_factor": yarn.explicit_attention_factor,
            }
            return {
                "rope_type": "yarn",
                **fields,
                **{name: value for name, value in optional.items() if value is not None},
            }
    raise ValueError(f"no published spelling for {type(scaling).__name__}")
