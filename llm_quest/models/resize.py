"""The same model at another width and depth, for ladders of sizes and for parametrizations.

Width grows by the number of heads: hidden size, feed-forward widths and low ranks keep their ratio to it. The head
dimension, the vocabulary, the number of experts and the window stay. A pattern of layers is repeated or cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from llm_quest.errors import UsageError

WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank",
    "kv_lora_rank",
)  # fmt: skip
KEY_VALUE_HEADS = ("num_key_value_heads", "swa_num_key_value_heads")
PATTERNS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields with an entry for each layer."""


def resize_config(config: Any, *, heads: int, layers: int) -> Any:
    """The config with so many query heads and layers."""
    ratio = Fraction(heads, config.num_attention_heads)
    sizes = {**scaled_widths(config, ratio, heads), "num_attention_heads": heads}
    return replace_sizes(config, {**sizes, "num_hidden_layers": layers})


def scaled_widths(config: Any, ratio: Fraction, heads: int) -> dict[str, Any]:
    """The fields of a config, or of a part of it, that grow with the width."""
    sizes: dict[str, Any] = {}
    for name in field_names(config):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            sizes[name] = scaled_widths(value, ratio, heads)
        elif name in WIDTHS and value:
            sizes[name] = max(1, round(value * ratio))
        elif name in KEY_VALUE_HEADS:
            most = max(1, int(value * ratio))
            sizes[name] = max(count for count in range(1, most + 1) if heads % count == 0)
    if "linear_num_key_heads" in field_names(config):
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        sizes["linear_num_key_heads"] = max(1, round(keys * ratio))
        sizes["linear_num_value_heads"] = sizes["linear_num_key_heads"] * (values // keys)
    return {name: value for name, value in sizes.items() if value != {}}


def replace_sizes(config: Any, sizes: Mapping[str, Any]) -> Any:
    """The config with these fields; a group is a mapping of the fields of a part. Patterns of layers follow the number
    of layers unless they are given. UsageError for a field that it does not have, and for a value of another type."""
    changed: dict[str, Any] = {}
    for name, value in sizes.items():
        if name not in field_names(config):
            raise UsageError(f"{type(config).__module__.rpartition('.')[2]} has no size {name!r}")
        before = getattr(config, name)
        if isinstance(value, Mapping):
            changed[name] = replace_sizes(before, value)
        elif type(before) in (int, float) and (type(value) is not type(before) or value <= 0):
            raise UsageError(f"{name} is {value!r}; expected a number above 0, such as {before}")
        else:
            changed[name] = value
    layers = changed.get("num_hidden_layers")
    if layers is not None:
        for name in set(PATTERNS) & set(field_names(config)) - set(changed):
            changed[name] = repeat_pattern(getattr(config, name), layers)
    try:
        return dataclasses.replace(config, **changed)
    except ValueError as error:
        raise UsageError(f"these sizes make no model: {error}") from None


def repeat_pattern(pattern: tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    """The first `layers` entries of the pattern, repeated."""
    return (pattern * (1 + layers // max(1, len(pattern))))[:layers] if pattern else pattern


def differing_sizes(config: Any, other: Any) -> dict[str, Any]:
    """The fields of `other` that `config` has otherwise, parts as mappings."""
    differing: dict[str, Any] = {}
    for name in field_names(config):
        mine, theirs = getattr(config, name), getattr(other, name)
        if mine == theirs:
            continue
        nested = dataclasses.is_dataclass(mine) and dataclasses.is_dataclass(theirs)
        differing[name] = differing_sizes(mine, theirs) if nested else theirs
    return differing


def field_names(config: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(config))
