"""Weight maps: our parameter names -> the names in published files, for loading and for saving.

An entry is a plain name, several matrices stacked by rows (`ConcatRows`), one stored the other way round
(`Transposed`), in another shape (`Reshaped`), head by head (`RowsByHead`), gate and up in turn (`AlternatingRows`), or
one for each expert (`StackTensors`). `{i}` stands for the layer's number. Reading and writing follow the same map
(`hub/weight_map.py`), so that export then import is the identity by construction.
Below the entries, the rows that families share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any


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
    """A parameter that is stored in another shape, its numbers in the same order: a convolution's (D,C,P,P) for our (D,
    C P P)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RowsByHead:
    """Our parts of equal size, stacked by rows (q, k, v), are stored head by head: q, k, v of head 0, then of head 1
    (GPT-NeoX)."""

    name: str
    heads: int
    parts: int = 3


@dataclass(frozen=True)
class AlternatingRows:
    """Our two halves of the rows of every expert, gate (E,F,D) and up (E,F,D), are stored in turn, (in, out): gate 0,
    up 0, gate 1 ... are the columns of (E,D,2F), and of the biases (E,2F) (gpt-oss)."""

    name: str


PublishedWeight = AlternatingRows | RowsByHead | str | ConcatRows | Transposed | Reshaped | StackTensors
WeightMap = Mapping[str, PublishedWeight]
Names = dict[str, PublishedWeight]

OURS, THEIRS = "blocks.{i}.", "model.layers.{i}."
"""The prefixes of a layer, as we and as Llama's files name it."""


PRE_NORMS = {
    "mixer.norm.weight": "input_layernorm.weight",
    "feed_forward.norm.weight": "post_attention_layernorm.weight",
}
POST_NORMS = {
    "mixer.post_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.post_norm.weight": "post_feedforward_layernorm.weight",
}
"""The norms of a layer: before its two sublayers (Llama), or behind them alone (OLMo 2)."""


def decoder_names(*, tied: bool, norms: Mapping[str, str] = PRE_NORMS) -> Names:
    """Embedding, norms and head of a decoder in Llama's spelling."""
    head = {} if tied else {"head.weight": "lm_head.weight"}
    return {
        "embed.token.weight": "model.embed_tokens.weight",
        **layer_names(norms),
        "norm.weight": "model.norm.weight",
        **head,
    }


def attention_names(
    ours: str = f"{OURS}mixer.layer.",
    theirs: str = f"{THEIRS}self_attn.",
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    qk_norm: bool = False,
) -> Names:
    """Grouped-query attention in Llama's spelling. out_bias: of the output projection; None: as `bias`."""
    names: Names = {}
    for kind in ("weight", "bias") if bias else ("weight",):
        names[f"{ours}qkv.{kind}"] = ConcatRows(*(f"{theirs}{part}_proj.{kind}" for part in "qkv"))
    for kind in ("weight", "bias") if (bias if out_bias is None else out_bias) else ("weight",):
        names[f"{ours}out.{kind}"] = f"{theirs}o_proj.{kind}"
    norms = ("q_norm.weight", "k_norm.weight") if qk_norm else ()
    return names | {f"{ours}{norm}": f"{theirs}{norm}" for norm in norms}


def swiglu_names(
    ours: str = f"{OURS}feed_forward.layer.", theirs: str = f"{THEIRS}mlp.", *, bias: bool = False
) -> Names:
    """A gated feed-forward layer, as all but Mixtral publish it."""
    names: Names = {}
    for kind in ("weight", "bias") if bias else ("weight",):
        names[f"{ours}gate_up.{kind}"] = ConcatRows(f"{theirs}gate_proj.{kind}", f"{theirs}up_proj.{kind}")
        names[f"{ours}down.{kind}"] = f"{theirs}down_proj.{kind}"
    return names


def expert_names(
    experts: int,
    ours: str = f"{OURS}feed_forward.layer.",
    theirs: str = f"{THEIRS}mlp.",
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> Names:
    """A router and its experts."""
    one = theirs + "experts.{e}."
    return {
        f"{ours}router.weight": f"{theirs}gate.weight",
        f"{ours}experts.gate_up": stack_experts(ConcatRows(f"{one}{gate}.weight", f"{one}{up}.weight"), experts),
        f"{ours}experts.down": stack_experts(f"{one}{down}.weight", experts),
    }


def alternating_expert_names() -> Names:
    """A router and its experts, both with biases, as gpt-oss publishes them: in one tensor a layer."""
    ours, theirs = f"{OURS}feed_forward.layer.", f"{THEIRS}mlp."
    stacks = f"{theirs}experts."
    return {
        **{f"{ours}router.{kind}": f"{theirs}router.{kind}" for kind in ("weight", "bias")},
        f"{ours}experts.gate_up": AlternatingRows(f"{stacks}gate_up_proj"),
        f"{ours}experts.gate_up_bias": AlternatingRows(f"{stacks}gate_up_proj_bias"),
        f"{ours}experts.down": Transposed(f"{stacks}down_proj"),
        f"{ours}experts.down_bias": f"{stacks}down_proj_bias",
    }


def module_names(modules: Mapping[str, str], *, bias: bool) -> Names:
    """The weight of each module, and with bias its bias: ours -> theirs, both without the last word."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in kinds}


def norm_biases(table: Names) -> Names:
    """The map with a bias beside the weight of every norm."""
    weights = {ours: theirs for ours, theirs in table.items() if ours.endswith("norm.weight")}
    beside = {
        ours.replace(".weight", ".bias"): map_published_names(theirs, lambda name: name.replace(".weight", ".bias"))
        for ours, theirs in weights.items()
    }
    return table | beside


def parallel_names(table: Names, *, one_norm: bool) -> Names:
    """The map of a model whose layers are parallel (`ParallelLayers`), from that of the same layers in sequence.
    one_norm: both branches read the mixer's norm, and the other has no tensor."""
    moved = {
        "mixer.layer.": "sublayer.layer.mixer.",
        "feed_forward.layer.": "sublayer.layer.feed_forward.",
        "mixer.norm.": "sublayer.norm." if one_norm else "sublayer.layer.mixer_norm.",
        "feed_forward.norm.": "sublayer.layer.feed_forward_norm.",
    }
    renamed = {ours: theirs for ours, theirs in table.items() if not (one_norm and "feed_forward.norm." in ours)}
    for old, new in moved.items():
        renamed = {ours.replace(OURS + old, OURS + new): theirs for ours, theirs in renamed.items()}
    return renamed


def layer_names(parts: Mapping[str, str]) -> Names:
    """Further parameters of a layer: "mixer.post_norm.weight" -> "post_attention_layernorm.weight"."""
    return {OURS + ours: THEIRS + theirs for ours, theirs in parts.items()}


def expand_layers(table: WeightMap, layers: int | Iterable[int]) -> Names:
    """The map with `{i}` written out for every layer: so many, or these."""
    numbers = list(range(layers) if isinstance(layers, int) else layers)
    expanded: Names = {}
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
        case RowsByHead(name=name, heads=heads, parts=parts):
            return RowsByHead(rename(name), heads, parts)
        case AlternatingRows(name=name):
            return AlternatingRows(rename(name))
    return rename(theirs)


def published_names(entries: Iterable[PublishedWeight]) -> Iterator[str]:
    """Every published name in these entries of a weight map."""
    for entry in entries:
        match entry:
            case ConcatRows(names=names):
                yield from names
            case StackTensors(entries=inner):
                yield from published_names(inner)
            case Transposed() | Reshaped() | AlternatingRows() | RowsByHead() as entry:
                yield entry.name
            case str(name):
                yield name


def stack_experts(entry: str | ConcatRows, experts: int) -> StackTensors:
    """The entry with `{e}` written out for every expert."""
    return StackTensors(
        tuple(map_published_names(entry, lambda name, e=e: name.replace("{e}", str(e))) for e in range(experts))  # type: ignore[misc]
    )


def count_mtp_modules(
    join: str, first: Callable[[Any], int] = lambda config: 0
) -> Callable[[Any, Collection[str]], Any]:
    """`Family.resolve_config`: as many multi-token prediction modules as the files hold, for many conversions leave
    them out and keep the config. join: the published name of a module's projection, `{i}` for its number; first: that
    of the first module."""

    def resolve_config(config: Any, stored: Collection[str]) -> Any:
        joins = (format_layer(join, i) for i in count(first(config)))
        return replace(config, num_nextn_predict_layers=sum(1 for _ in takewhile(stored.__contains__, joins)))

    return resolve_config


def format_layer(name: str, layer: int) -> str:
    return name.replace("{i}", str(layer))
