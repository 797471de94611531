"""From settings to a model's config: a preset, or a page and its numbers, in the page's own words.

Numbers that follow from others need not be given: `vocab` is the tokenizer's, `groups` are as many as `heads`,
`head_width` is width / heads, `context` is the length of the training rows, `tied` is true. Rotary settings are given
as published configs spell them: `rotary: {rope_theta: 500000, rope_type: llama3, factor: 8, ...}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

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
}


def model_config(part: Model, settings: Settings, *, vocab: int, context: int) -> Any:
    """The page's config of the model to build. vocab: the tokenizer's; context: the length of a row."""
    try:
        base = preset(part.preset).config if part.preset is not None else None
    except UsageError as error:
        raise mistaken([Mistake(settings.place(("model", "preset")), "model.preset", str(error))]) from None
    page = page_of(base) if base is not None else named(part.page or "", settings)
    mistakes = [
        Mistake(settings.place(("model", "sizes", key)), f"model.sizes.{key}", what)
        for key, what in check(page, part, base)
    ]
    if mistakes:
        raise mistaken(mistakes)
    if base is not None:
        return completed(page, {**shallow(base), **part.sizes, "vocab": vocab}, settings)
    sizes = {"vocab": vocab, "context": context, **part.sizes}
    for key, derive in DERIVED.items():
        if key in numbers(page) and key not in sizes:
            sizes[key] = derive(sizes)
    return completed(page, sizes, settings)


def named(name: str, settings: Settings) -> Page:
    """The page of that name."""
    for page in PAGES:
        if page.name == name:
            return page
    known = [page.name for page in PAGES]
    what = f"no page is called {name!r}{nearest(name, known)}; known: {', '.join(known)}"
    raise mistaken([Mistake(settings.place(("model", "page")), "model.page", what)])


def check(page: Page, part: Model, base: Any) -> Iterator[tuple[str, str]]:
    """Every number that is unknown, missing or of the wrong type."""
    fields = numbers(page)
    for key, value in part.sizes.items():
        if key == "vocab":
            yield key, "the tokenizer decides it; set tokenizer.vocab"
        elif key not in fields:
            yield key, f"unknown number{nearest(key, list(fields))}; {page.name} has: {', '.join(fields)}"
        elif wrong := misfit(value, fields[key]):
            yield key, wrong
    if base is None:
        given = {*part.sizes, *DERIVED, "vocab", "context"}
        for key in [field.name for field in dataclasses.fields(page.Config) if field.default is dataclasses.MISSING]:
            if key not in given:
                yield key, f"missing; {page.name} needs {words(fields[key])}"


def misfit(value: Any, kind: Any) -> str | None:
    """Why a value is not of a field's kind; None if it is."""
    if kind is Rotary:
        good = isinstance(value, dict)
    elif kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    elif kind is bool:
        good = isinstance(value, bool)
    else:
        good = kind is not int or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
    return None if good else f"{value!r} is not {words(kind)}"


def words(kind: Any) -> str:
    told = {
        int: "a whole number > 0",
        float: "a number >= 0",
        bool: "true or false",
        Rotary: "a group of keys (rope_theta, rope_type, ...)",
    }
    return told.get(kind, str(kind))


def numbers(page: Page) -> dict[str, Any]:
    """The page's numbers and their types."""
    hints = get_type_hints(page.Config)
    return {field.name: hints[field.name] for field in dataclasses.fields(page.Config)}


def shallow(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def completed(page: Page, sizes: dict[str, Any], settings: Settings) -> Any:
    """The config itself, and the rules that its numbers keep among themselves."""
    where = settings.place(("model", "sizes"))
    if sizes["heads"] % sizes.get("groups", 1):
        what = f"heads {sizes['heads']} must be a multiple of groups {sizes['groups']}"
        raise mistaken([Mistake(where, "model.sizes.groups", what)])
    if "head_width" not in numbers(page) and sizes["width"] % sizes["heads"]:
        what = f"width {sizes['width']} must be a multiple of heads {sizes['heads']}"
        raise mistaken([Mistake(where, "model.sizes.width", what)])
    if sizes.get("head_width", 2) % 2:
        what = f"head_width {sizes['head_width']} must be even: rotary positions turn pairs"
        raise mistaken([Mistake(where, "model.sizes.head_width", what)])
    turned = {key: rotary(key, sizes, settings) for key, kind in numbers(page).items() if kind is Rotary}
    return page.Config(**{**sizes, **turned})


def rotary(key: str, sizes: Sizes, settings: Settings) -> Rotary:
    """A field's rotary positions, from the published spelling or a preset's."""
    given = sizes[key]
    if isinstance(given, Rotary):
        return dataclasses.replace(given, width=sizes["head_width"])
    where, path = settings.place(("model", "sizes", key)), f"model.sizes.{key}"
    unknown = [
        f"unknown key {name!r}{nearest(name, ROPE)}; known: {', '.join(ROPE)}" for name in given if name not in ROPE
    ]
    if unknown:
        raise mistaken([Mistake(where, path, what) for what in unknown])
    try:
        return read_rotary({"rope_parameters": given, "max_position_embeddings": sizes["context"]}, sizes["head_width"])
    except (TypeError, ValueError) as error:
        raise mistaken([Mistake(where, path, str(error).removeprefix("config.json: "))]) from None


ROPE = (
    "rope_theta", "rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
)  # fmt: skip
