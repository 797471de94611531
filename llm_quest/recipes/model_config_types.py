"""Types of the fields of a family's Config, and messages for values of another type."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.config_fields import field_values, nested_config
from llm_quest.recipes.schema import did_you_mean


def missing_inside(value: Any, kind: Any, before: Any) -> list[str]:
    """The required keys that a nested config lacks. before: the preset's."""
    part = nested_config(kind)
    if part is None or not isinstance(value, dict):
        return []
    known = {**({} if before is None else field_values(before)), **value}
    fields: Any = dataclasses.fields(part)  # type: ignore[arg-type]
    return [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in known]


def describe_type_error(value: Any, kind: Any, least: int = 1) -> str | None:
    """A message for a value that is not of a field's type; None if it is."""
    if value is None and type(None) in get_args(kind):
        return None
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"{value!r} is not computed; {describe_expected(kind)}"
    if (part := nested_config(kind)) is not None:
        return describe_nested_type_error(value, part)
    if kind is RotaryEmbedding:
        good = isinstance(value, dict)
    elif get_origin(kind) is tuple:
        good = isinstance(value, list) and len(value) > 0
    elif kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    elif kind is bool:
        good = isinstance(value, bool)
    else:
        good = kind is not int or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
    return None if good else f"{value!r} is not {describe_expected(kind)}"


def describe_nested_type_error(value: Any, part: type) -> str | None:
    """A message for a nested config with a key or a value of the wrong type; None if it is right."""
    kinds = get_type_hints(part)
    if not isinstance(value, dict):
        return f"{value!r} is not {describe_expected(part)}"
    for key, inner in value.items():
        if key not in kinds:
            return f"unknown number {key!r}{did_you_mean(key, list(kinds))}; there are: {', '.join(kinds)}"
        if wrong := describe_type_error(inner, kinds[key]):
            return f"{key}: {wrong}"
    return None


def describe_expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"only {' or '.join(map(repr, get_args(kind)))} is"
    if (part := nested_config(kind)) is not None:
        return f"a group of keys ({', '.join(get_type_hints(part))})"
    names = {
        int: "a whole number > 0",
        float: "a number >= 0",
        bool: "true or false",
        RotaryEmbedding: "a group of keys (rope_theta, rope_type, ...)",
    }
    return "a list, one entry per layer" if get_origin(kind) is tuple else names.get(kind, str(kind))
