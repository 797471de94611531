"""From settings to a model's config: a preset, or a page and its numbers, in the page's own words.

Numbers that follow from others need not be given: `vocab` is the tokenizer's, `groups` are as many as `heads`,
`head_width` is width / heads, `context` is the length of the training rows, `tied` is true. Rotary settings are given
as published configs spell them: `rotary: {rope_theta: 500000, rope_type: llama3, factor: 8, ...}`. A part of a config
(Qwen3's `sparse`, Qwen3-Next's `delta`) is a group of keys; a pattern of layers (`windows`) is a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from llm_quest.errors import UsageError
from llm_quest.layers.rotary import Rotary
from llm_quest.models import PAGES
from llm_quest.models.build import page_of, preset
from llm_quest.models.page import Page, read_rotary
from llm_quest.recipes.config import mistaken, nearest
from llm_quest.recipes.parts import Model
from llm_quest.recipes.yaml import Mistake, Settings

Sizes = Mapping[str, Any]

DERIVED: dict[str, Callable[[Sizes], Any]] = {
    "groups": lambda sizes: sizes["heads"],
    "head_width": lambda sizes: sizes["width"] // sizes["heads"],
    "tied": lambda sizes: True,
    "rotary": lambda sizes: {},
    "local_rotary": lambda sizes: {},
}
ZERO = ("lookahead", "dense", "shared")
"""Numbers of which none is a number too."""


def model_config(part: Model, settings: Settings, *, vocab: int, context: int) -> Any:
    """The page's config of the model to build; UsageError with every mistake. vocab: the tokenizer's; context: the
    length of a row."""
    plan = planned(part, settings, vocab, context)
    if mistakes := list(mistakes_in(plan, settings)):
        raise mistaken(mistakes)
    turned = {key: rotary(key, plan.sizes, plan.base) for key in rotaries(plan.page)}
    return plan.page.Config(**{**fitting(plan), **turned})


def size_mistakes(settings: Settings, *, vocab: int, context: int) -> list[Mistake]:
    """What is wrong with the numbers under `model`, to be told with the schema's findings."""
    try:
        part = Model.model_validate(settings.tree.get("model"))
        return [] if part.load is not None else list(mistakes_in(planned(part, settings, vocab, context), settings))
    except ValidationError:  # the schema's to tell
        return []
    except Mistaken as error:
        return [error.mistake]


class Mistaken(UsageError):
    """One mistake, raised because nothing can be said of what depends on it."""

    def __init__(self, mistake: Mistake):
        super().__init__(str(mistake))
        self.mistake = mistake


@dataclass(frozen=True)
class Sized:
    """A page and the numbers for it. base: the preset's config they change; own: what was given."""

    page: Page
    base: Any
    own: Sizes
    sizes: Sizes


def planned(part: Model, settings: Settings, vocab: int, context: int) -> Sized:
    """The page, and its numbers with those that follow from others. A page without sizes takes those of its `-tiny`
    preset."""
    if part.preset is not None:
        try:
            base = preset(part.preset).config
        except UsageError as error:
            raise Mistaken(Mistake(settings.place(("model", "preset")), "model.preset", str(error))) from None
        return Sized(page_of(base), base, part.sizes, {**shallow(base), **part.sizes, "vocab": vocab})
    page = named(part.page or "", settings)
    if not part.sizes:
        base = next(one.config for one in page.presets if one.name.endswith("-tiny"))
        return Sized(page, base, {}, {**shallow(base), "vocab": vocab, "context": context})
    sizes = {"vocab": vocab, "context": context, **part.sizes}
    for key, derive in DERIVED.items():
        if key in numbers(page) and key not in sizes:
            with suppress(KeyError, TypeError, ZeroDivisionError):  # what it follows from is missing or wrong
                sizes[key] = derive(sizes)
    return Sized(page, None, part.sizes, sizes)


def mistakes_in(plan: Sized, settings: Settings) -> Iterator[Mistake]:
    """Every number that is unknown, missing, of the wrong type or at odds with another."""
    wrong = dict(check(plan))
    found = [*wrong.items(), *(pair for pair in relations(plan) if pair[0] not in wrong)]
    told = {key for key, _ in found}
    for key in rotaries(plan.page):
        if isinstance(plan.sizes.get(key), dict) and not told & {key, "head_width", "rope", "context"}:
            found += [(key, what) for what in rotary_mistakes(key, plan)]
    for key, what in found:
        yield Mistake(settings.place(("model", "sizes", key)), f"model.sizes.{key}", what)


def named(name: str, settings: Settings) -> Page:
    """The page of that name."""
    for page in PAGES:
        if page.name == name:
            return page
    known = [page.name for page in PAGES]
    what = f"no page is called {name!r}{nearest(name, known)}; known: {', '.join(known)}"
    raise Mistaken(Mistake(settings.place(("model", "page")), "model.page", what))


def check(plan: Sized) -> Iterator[tuple[str, str]]:
    """Every number that is unknown, missing or of the wrong type."""
    page, fields = plan.page, numbers(plan.page)
    for key, value in plan.own.items():
        if key == "vocab":
            yield key, "the tokenizer decides it; set tokenizer.vocab"
        elif key not in fields:
            yield key, f"unknown number{nearest(key, list(fields))}; {page.name} has: {', '.join(fields)}"
        elif wrong := misfit(value, fields[key], least=0 if key in ZERO else 1):
            yield key, wrong
        elif missing := missing_inside(value, fields[key], None if plan.base is None else getattr(plan.base, key)):
            yield key, f"missing in it: {', '.join(missing)}"
    if plan.base is None:
        given = {*plan.own, *DERIVED, "vocab", "context"}
        for key in [field.name for field in dataclasses.fields(page.Config) if field.default is dataclasses.MISSING]:
            if key not in given:
                yield key, f"missing; {page.name} needs {words(fields[key])}"


def missing_inside(value: Any, kind: Any, before: Any) -> list[str]:
    """What a part of a config, given as a group of keys, leaves out. before: the preset's."""
    part = part_of(kind)
    if part is None or not isinstance(value, dict):
        return []
    known = {**({} if before is None else shallow(before)), **value}
    fields: Any = dataclasses.fields(part)  # type: ignore[arg-type]
    return [one.name for one in fields if one.default is dataclasses.MISSING and one.name not in known]


def relations(plan: Sized) -> Iterator[tuple[str, str]]:
    """The rules that numbers keep among themselves."""
    sizes = {key: value for key, value in plan.sizes.items() if type(value) is int and value > 0}
    for key in ("groups", "local_groups"):
        if {"heads", key} <= sizes.keys() and sizes["heads"] % sizes[key]:
            yield key, f"heads {sizes['heads']} must be a multiple of {key} {sizes[key]}"
    free = {"head_width", "nope"} & set(numbers(plan.page))
    if not free and {"width", "heads"} <= sizes.keys() and sizes["width"] % sizes["heads"]:
        yield "width", f"width {sizes['width']} must be a multiple of heads {sizes['heads']}"
    for key in ("head_width", "rope"):
        if sizes.get(key, 2) % 2:
            yield key, f"{key} {sizes[key]} must be even: rotary positions turn pairs"


def misfit(value: Any, kind: Any, least: int = 1) -> str | None:
    """Why a value is not of a field's kind; None if it is."""
    if value is None and type(None) in get_args(kind):
        return None
    if (part := part_of(kind)) is not None:
        return misfit_inside(value, part)
    if kind is Rotary:
        good = isinstance(value, dict)
    elif get_origin(kind) is tuple:
        good = isinstance(value, list) and len(value) > 0
    elif kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    elif kind is bool:
        good = isinstance(value, bool)
    else:
        good = kind is not int or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
    return None if good else f"{value!r} is not {words(kind)}"


def misfit_inside(value: Any, part: type) -> str | None:
    """The same for a part of a config, given as a group of keys."""
    kinds = get_type_hints(part)
    if not isinstance(value, dict):
        return f"{value!r} is not {words(part)}"
    for key, inner in value.items():
        if key not in kinds:
            return f"unknown number {key!r}{nearest(key, list(kinds))}; there are: {', '.join(kinds)}"
        if wrong := misfit(inner, kinds[key]):
            return f"{key}: {wrong}"
    return None


def part_of(kind: Any) -> type | None:
    """The part of a config that a field holds, where it holds one."""
    parts = [one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one) and one is not Rotary]
    return parts[0] if parts else None  # type: ignore[return-value]


def words(kind: Any) -> str:
    if (part := part_of(kind)) is not None:
        return f"a group of keys ({', '.join(get_type_hints(part))})"
    told = {
        int: "a whole number > 0",
        float: "a number >= 0",
        bool: "true or false",
        Rotary: "a group of keys (rope_theta, rope_type, ...)",
    }
    return "a list, one entry per layer" if get_origin(kind) is tuple else told.get(kind, str(kind))


def numbers(page: Page) -> dict[str, Any]:
    """The page's numbers and their types."""
    hints = get_type_hints(page.Config)
    return {field.name: hints[field.name] for field in dataclasses.fields(page.Config)}


def shallow(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def fitting(plan: Sized) -> dict[str, Any]:
    """The numbers with lists as tuples, and groups of keys as the parts they stand for."""
    kinds, fitted = numbers(plan.page), dict(plan.sizes)
    for key, value in plan.sizes.items():
        part = part_of(kinds[key])
        if isinstance(value, list):
            fitted[key] = tuple(value)
        elif part is not None and isinstance(value, dict):
            inside = {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
            before = None if plan.base is None else getattr(plan.base, key)
            fitted[key] = part(**{**({} if before is None else shallow(before)), **inside})
    return fitted


def rotaries(page: Page) -> list[str]:
    """The fields that hold rotary positions."""
    return [key for key, kind in numbers(page).items() if kind is Rotary]


def rotary_mistakes(key: str, plan: Sized) -> list[str]:
    """What is wrong with rotary settings."""
    given = plan.sizes[key]
    unknown = [name for name in given if name not in ROPE]
    if unknown:
        return [f"unknown key {name!r}{nearest(name, ROPE)}; known: {', '.join(ROPE)}" for name in unknown]
    try:
        rotary(key, plan.sizes, plan.base)
    except KeyError:  # a number it follows from is missing, and told
        return []
    except (TypeError, ValueError) as error:
        return [str(error).removeprefix("config.json: ")]
    return []


def rotary(key: str, sizes: Sizes, base: Any) -> Rotary:
    """A field's rotary positions, from the published spelling or a preset's."""
    given = sizes[key]
    before: Rotary | None = None if base is None else getattr(base, key)
    if isinstance(given, Rotary):
        return dataclasses.replace(given, width=rotated(sizes, {}, before, base))
    width = rotated(sizes, given, before, base)
    read = read_rotary({"rope_parameters": given, "max_position_embeddings": sizes["context"]}, width)
    return dataclasses.replace(read, interleaved=before is not None and before.interleaved)


def rotated(sizes: Sizes, given: Sizes, before: Rotary | None, base: Any) -> int:
    """How much of a head is rotated: what is said, else as large a part as in the preset, else all of it."""
    if "rope" in sizes:
        return int(sizes["rope"])
    if "partial_rotary_factor" in given or before is None:
        return int(sizes["head_width"] * given.get("partial_rotary_factor", 1.0))
    return max(2, before.width * sizes["head_width"] // base.head_width // 2 * 2)


ROPE = (
    "rope_theta", "rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor",
)  # fmt: skip
