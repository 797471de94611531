"""The fields of a family's Config: each knows its place in config.json, so reading and writing follow from the class.

    vocab_size: int                                           required, under its own name
    max_position_embeddings: int = hf_default(2048)           2048 where config.json leaves it out, as in transformers
    hidden_size: int = spelled("n_embd")                      another name in config.json
    rotary: RotaryEmbedding = rope_field()                    rope_parameters, rope_scaling and rope_theta
    layer_types: tuple[str, ...] = per_layer("full_attention", "sliding_attention")
    moe: MoEConfig | None = nested(MoEConfig, when=...)       a part whose fields stand in the same JSON object
    hidden_act: Literal["silu"] = "silu"                      another value is refused by name

A field is read in the order of the class and may use those before it: `c.hidden_size`; `c.json` is config.json itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING
from types import NoneType, SimpleNamespace
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from llm_quest.errors import DataError
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.rope_config import publish_rotary, read_rotary, require_field, require_rope_objects

MAX_PLAUSIBLE_INT = 2**24
Json = Mapping[str, Any]
ORIGINAL = "original_max_position_embeddings"
Values = Any
"""What has been read so far, as attributes; `.json` is the whole of config.json."""


def read_config(config_class: type, hf_config: Json) -> Any:
    """A Config from the contents of config.json; DataError for the first field that is missing or refused."""
    values, kinds = SimpleNamespace(json=hf_config), type_hints(config_class)
    for field in dataclasses.fields(config_class):
        read = field.metadata.get("read") or plain_reader((), MISSING)
        setattr(values, field.name, read(values, field, kinds[field.name]))
    del values.json
    try:
        return config_class(**vars(values))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"config.json: {error}") from None


def publish_config(config: Any) -> dict[str, Any]:
    """The contents of config.json for a Config: the inverse of `read_config`."""
    published: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, write = getattr(config, field.name), field.metadata.get("write") or writer(field.name)
        published |= write(value, config)
    return published


type_hints = functools.cache(get_type_hints)


def per_layer_kinds(config_class: type) -> dict[str, tuple[Any, ...]]:
    """The fields that are lists with an entry for every layer, and what the entries may be."""
    fields = dataclasses.fields(config_class)
    return {field.name: field.metadata["per_layer"] for field in fields if field.metadata.get("per_layer")}


def default_per_layer(config_class: type, given: Json) -> dict[str, Any]:
    """The lists with an entry for every layer that `given`, fields of the class, leaves out: as a config.json without
    them is read. What follows from a number that is missing too is left out."""
    fields = dataclasses.fields(config_class)
    defaults = {field.name: field.default for field in fields if field.default is not MISSING}
    values, per_layer = SimpleNamespace(**{**defaults, **given, "json": given}), {}
    for field in fields:
        if field.metadata.get("per_layer") and field.name not in given:
            with suppress(AttributeError, TypeError):
                per_layer[field.name] = field.metadata["read"](values, field, None)
                setattr(values, field.name, per_layer[field.name])
    return per_layer


def unwritten(value: Any, config: Any) -> dict[str, Any]:
    """Writes nothing: the field follows from others in config.json."""
    return {}


def json_field(
    read: Callable[[Values], Any],
    write: Callable[[Any, Any], dict[str, Any]] | None = None,
    default: Any = MISSING,
    per_layer: tuple[Any, ...] = (),
) -> Any:
    """A field that is read by a function of what was read before and written by one of its value and the Config (None:
    under its own name). per_layer: it is a list with one of these for every layer."""
    metadata = {"read": lambda values, field, kind: read(values), "write": write, "per_layer": per_layer}
    return dataclasses.field(default=default, metadata=metadata)


def constant_field(*, default: Any) -> Any:
    """A field that the family does not have: always this value, neither read nor written."""
    return json_field(lambda values: default, unwritten, default=default)


def hf_default(value: Any, *, null: Any = MISSING, default: Any = MISSING) -> Any:
    """A field under its own name. value: where config.json leaves it out, or a function of what was read before. null:
    where it says null, if that is another one. default: of the class, likewise."""
    return dataclasses.field(default=default, metadata={"read": plain_reader((), value, null)})


def kv_heads_default(count: int) -> Any:
    """num_key_value_heads: so many where config.json leaves it out, as many as query heads where it says null."""
    return hf_default(count, null=lambda values: values.num_attention_heads)


def spelled(*names: str, also: tuple[str, ...] = (), hf_default: Any = MISSING, default: Any = MISSING) -> Any:
    """A field with other names in config.json: the first that is there is read, all are written. also: names that are
    read and not written, among them always its own."""

    def read(values: Values, field: Any, kind: Any) -> Any:
        return plain_reader((*names, *also, field.name), hf_default)(values, field, kind)

    return dataclasses.field(default=default, metadata={"read": read, "write": writer(*names)})


def spelled_alike(*names: str, hf_default: Any = MISSING, default: Any = MISSING) -> Any:
    """One number for several fields of config.json, which must agree."""

    def read(values: Values, field: Any, kind: Any) -> Any:
        given = {name: values.json.get(name) for name in names}
        if not callable(hf_default) and hf_default is not MISSING:
            given = {name: hf_default if value is None else value for name, value in given.items()}
        given = {name: value for name, value in given.items() if value is not None}
        if len(set(given.values())) > 1:
            listed = ", ".join(f"{name} is {value!r}" for name, value in given.items())
            raise DataError(f"config.json: {listed}; they are one number here: set them alike")
        return plain_reader(names, hf_default)(values, field, kind)

    return dataclasses.field(default=default, metadata={"read": read, "write": writer(*names)})


def per_layer(
    *kinds: str,
    hf_default: Callable[[Values], Any],
    numbered: str = "",
    default: tuple[str, ...] = MISSING,  # type: ignore[assignment]
) -> Any:
    """A field with one of these kinds for every layer. numbered: a field that says the same in numbers (0: the first of
    the kinds); it is read before, and written too."""

    def read(values: Values, field: Any, kind: Any) -> tuple[Any, ...]:
        numbers = read_per_layer(values.json, numbered, values.num_hidden_layers, *range(len(kinds)))
        if numbers is not None:
            return tuple(kinds[number] for number in numbers)
        given = read_per_layer(values.json, field.name, values.num_hidden_layers, *kinds)
        return tuple(hf_default(values) if given is None else given)

    def write(value: tuple[str, ...], config: Any) -> dict[str, Any]:
        (name,) = (field.name for field in dataclasses.fields(config) if field.metadata.get("read") is read)
        numbers = {numbered: [kinds.index(kind) for kind in value]} if numbered else {}
        return {name: list(value), **numbers}

    return dataclasses.field(default=default, metadata={"read": read, "write": write, "per_layer": kinds})


def nested(
    part: type,
    *,
    when: Callable[[Json], bool] = lambda json: True,
    default: Any = MISSING,
    absent: Callable[[Any], dict[str, Any]] = lambda config: {},
) -> Any:
    """A part of the Config whose fields stand in the same JSON object; None where `when` says that there is none.
    absent: what is written for a Config without the part."""

    def read(values: Values, field: Any, kind: Any) -> Any:
        return read_config(part, values.json) if when(values.json) else None

    def write(value: Any, config: Any) -> dict[str, Any]:
        return absent(config) if value is None else publish_config(value)

    return dataclasses.field(default=default, metadata={"read": read, "write": write})


def rope_field(
    dim: str = "head_dim",
    *,
    theta: float | Callable[[Values], float] = 10_000.0,
    partial: float | None = None,
    interleaved: bool = False,
    extra: Callable[[Any], dict[str, Any]] = lambda config: {},
    rope_scaling: bool = True,
    old_names: Mapping[str, str] = {},
    original: int | None = None,
    absent: Callable[[Values], Mapping[str, Any]] = lambda values: {},
) -> Any:
    """Rotary positions of a head of `dim` numbers. theta: the base where config.json says none. partial: the rotated
    part of a head where it says none. interleaved: the pairs are neighbors unless rope_interleave is false. extra:
    what else is written into rope_parameters. rope_scaling: the old spelling is written too. old_names: what the
    family calls rope_theta and partial_rotary_factor where they stand outside rope_parameters. absent: rope_parameters
    of a file that has none. original: original_max_position_embeddings where it does not stand outside them."""

    def read(values: Values, field: Any, kind: Any) -> RotaryEmbedding:
        require_rope_objects(values.json)
        olds = {name: values.json.get(old) for name, old in old_names.items()}
        json = ChainMap({name: value for name, value in olds.items() if value is not None}, values.json)
        json |= {} if original is None else {ORIGINAL: json.get(ORIGINAL) or original}
        if not (json.get("rope_parameters") or json.get("rope_scaling")):
            json["rope_parameters"] = absent(values)
        width = rotary_dim(json, getattr(values, dim), partial)
        base = theta(values) if callable(theta) else theta
        rope = read_rotary(rope_of_kind(json, "full_attention"), width, base, values.max_position_embeddings)
        return dataclasses.replace(rope, interleaved=interleaved and bool(values.json.get("rope_interleave", True)))

    def write(value: RotaryEmbedding, config: Any) -> dict[str, Any]:
        published = publish_rotary(value)
        more = extra(config)
        if partial is not None:
            published["partial_rotary_factor"] = more["partial_rotary_factor"] = rotary_fraction(config)
        if interleaved:
            published["rope_interleave"] = value.interleaved
        published["rope_parameters"] |= more
        published |= {old: published.pop(name) for name, old in old_names.items()}
        if not rope_scaling:
            del published["rope_scaling"]
        return published

    return dataclasses.field(metadata={"read": read, "write": write})


def local_rope_field(
    theta_name: str = "",
    *,
    theta: float = 10_000.0,
    partial: bool = False,
    when: Callable[[Any], bool] = lambda c: True,
    default: RotaryEmbedding = MISSING,  # type: ignore[assignment]
) -> Any:
    """Rotary positions of windowed layers: rope_parameters of sliding_attention, else the base `theta_name`, else
    theta. Where `when` is false they are those of the other layers."""

    def read(values: Values, field: Any, kind: Any) -> RotaryEmbedding:
        if not when(values):
            return values.rotary  # type: ignore[no-any-return]
        local = (values.json.get("rope_parameters") or {}).get("sliding_attention") or {}
        base = values.json.get(theta_name) or theta
        return read_rotary({"rope_parameters": local, "rope_theta": base}, values.rotary.dim)

    def write(value: RotaryEmbedding, config: Any) -> dict[str, Any]:
        if not when(config):
            return {}
        more = {"partial_rotary_factor": rotary_fraction(config)} if partial else {}
        kinds = {"full_attention": config.rotary, "sliding_attention": value}
        by_kind = {kind: publish_rotary(rotary)["rope_parameters"] | more for kind, rotary in kinds.items()}
        named = {theta_name: publish_rotary(value)["rope_theta"]} if theta_name else {}
        return {"rope_parameters": by_kind} | named

    return dataclasses.field(default=default, metadata={"read": read, "write": write})


Class = TypeVar("Class")


@dataclass_transform(
    frozen_default=True,
    field_specifiers=(
        json_field,
        constant_field,
        hf_default,
        kv_heads_default,
        spelled,
        spelled_alike,
        per_layer,
        nested,
        rope_field,
        local_rope_field,
    ),
)
def config_dataclass(cls: type[Class]) -> type[Class]:
    """A frozen dataclass of such fields. (To type checkers the functions above are what `dataclasses.field` is.)"""
    return dataclasses.dataclass(frozen=True)(cls)


def rope_of_kind(hf_config: Json, kind: str) -> Json:
    """config.json with the `rope_parameters` of one kind of layer, where they are given per kind. (No copy: who counts
    which fields are read goes on counting.)"""
    rope = hf_config.get("rope_parameters") or {}
    if not rope.get(kind):
        return hf_config
    merged = {**rope[kind], **(hf_config.get("rope_scaling") or {})}
    return ChainMap({"rope_parameters": merged, "rope_scaling": None}, hf_config)  # type: ignore[arg-type]


def rotary_dim(hf_config: Json, head_dim: int, partial: float | None) -> int:
    """How many numbers of a head are rotated: all of them, or the part that config.json says."""
    if partial is None:
        return head_dim
    rope = rope_of_kind(hf_config, "full_attention").get("rope_parameters") or {}
    fraction = hf_config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or partial
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise DataError(f"config.json: partial_rotary_factor is {fraction!r:.60}, expected a part of a head, 0 to 1")
    return int(head_dim * fraction)


def rotary_fraction(config: Any) -> float:
    """The rotated part of a head: a fraction whose product with head_dim, rounded down, is the rotated width."""
    fraction: float = config.rotary.dim / config.head_dim
    return (
        fraction
        if int(config.head_dim * fraction) == config.rotary.dim
        else (config.rotary.dim + 0.5) / config.head_dim
    )


def writer(*names: str) -> Callable[[Any, Any], dict[str, Any]]:
    """Writes a value under these names."""
    return lambda value, config: dict.fromkeys(names, list(value) if isinstance(value, tuple) else value)


def plain_reader(names: tuple[str, ...], hf_default: Any, null: Any = MISSING) -> Callable[[Values, Any, Any], Any]:
    """Reads a number, a truth value, a word or a list, under its own name or another. null: what null stands for, if
    not for the default."""

    def read(values: Values, field: Any, kind: Any) -> Any:
        for name in names or (field.name,):
            value = values.json.get(name)
            if value is not None:
                if kind is int:
                    return plausible_int(name, value)
                if get_origin(kind) is Literal and value not in get_args(kind):
                    allowed = " or ".join(map(repr, get_args(kind)))
                    raise DataError(f"config.json: {name} is {value!r}; only {allowed} is computed")
                return tuple(value) if isinstance(value, list) else value
            if name in values.json and NoneType in get_args(kind):
                return None
        is_null = null is not MISSING and (names or (field.name,))[0] in values.json
        fallback = null if is_null else field.default if hf_default is MISSING else hf_default
        if fallback is MISSING:
            return require_field(values.json, (names or (field.name,))[0])
        return fallback(values) if callable(fallback) else fallback

    return read


def plausible_int(name: str, value: Any) -> int:
    """A whole number (4096.0 is one). DataError for anything else, and for one above MAX_PLAUSIBLE_INT."""
    whole = (isinstance(value, float) and value.is_integer()) or type(value) is int
    if not whole:
        raise DataError(f"config.json: {name} is {value!r:.60}, expected a whole number")
    if abs(value) > MAX_PLAUSIBLE_INT:
        raise DataError(f"config.json: {name} is {value:,}, which is no plausible size")
    return int(value)


def read_per_layer(hf_config: Json, field: str, num_hidden_layers: int, *kinds: Any) -> list[Any] | None:
    """A field that says one of these kinds for every layer; None where it is absent."""
    values = hf_config.get(field)
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != num_hidden_layers:
        count = len(values) if isinstance(values, list | tuple) else repr(values)
        raise DataError(
            f"config.json: {field} has {count} entries for {num_hidden_layers} layers; one for each is needed"
        )
    for kind in values:
        if kind not in kinds:
            raise DataError(f"config.json: {field} names {kind!r}; known: {', '.join(map(str, kinds))}")
    return list(values)


def field_values(config: Any) -> dict[str, Any]:
    """The fields of a Config by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def nested_config(kind: Any) -> type | None:
    """The part of a config that a field holds, where it holds one."""
    parts = [one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one) and one is not RotaryEmbedding]
    return parts[0] if parts else None  # type: ignore[return-value]
