"""From settings to a recipe's typed config: every mistake found is told, all at once, with its place and the nearest
known name.

A recipe's config is a tree of frozen pydantic models that refuse unknown keys. `resolve` reads a recipe's name or a
file and `key=value` pairs; `as_yaml` writes a config such that `resolve` gives it back, so a run folder's config.yaml
is itself a recipe.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path as File
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from llm_quest.errors import UsageError
from llm_quest.recipes.yaml import Mistake, Path, Settings, flat, merge, read_file, write

HERE = File(__file__).parent


class Strict(BaseModel):
    """What every part of a config has in common: it is frozen, and a key it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


Config = TypeVar("Config", bound=Strict)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in HERE.glob("*.yaml"))


def find(recipe: str) -> File:
    """The file of a recipe: a path, a run folder (its config.yaml), or a name from the package."""
    given = File(recipe)
    if given.suffix in (".yaml", ".yml") or given.is_file():
        if not given.exists():
            raise UsageError(
                f"there is no file {recipe}; recipes that come with the package: {', '.join(recipe_names())}"
            )
        return given
    if recipe in recipe_names():
        return HERE / f"{recipe}.yaml"
    if (given / "config.yaml").is_file():
        return given / "config.yaml"
    near = nearest(recipe, recipe_names())
    raise UsageError(
        f"no recipe is called {recipe!r}{near}; known: {', '.join(recipe_names())}, or give a YAML file or a run folder"
    )


def gather(recipe: str, pairs: Sequence[str] = ()) -> Settings:
    """The settings of a recipe with the pairs on top; mistakes are noted, not raised."""
    settings = read_file(find(recipe))
    own = settings.tree.get("model")
    page = own.get("page") if isinstance(own, dict) else None
    merge(settings, pairs)
    give_way(settings, {tuple(pair.partition("=")[0].strip().split(".")) for pair in pairs}, page)
    return settings


def give_way(settings: Settings, given: Collection[Path], page: Any) -> None:
    """A model that is chosen on the command line (`model.preset=NAME`, `model.page=NAME`, `model.load=FOLDER`) takes
    the place of the recipe's own, with what belongs to that one: its sizes, and for a model that is loaded the training
    that a fresh one needs and a tokenizer. given: the keys on the command line, which stay; page: the recipe's own."""
    model = settings.tree.get("model")
    chosen = [key for key in ALTERNATIVES if ("model", key) in given and isinstance(model, dict) and model.get(key)]
    if not isinstance(model, dict) or len(chosen) != 1:
        return
    for key in ALTERNATIVES:
        if ("model", key) not in given:
            model.pop(key, None)
    sizes = model.get("sizes")
    if isinstance(sizes, dict) and ("model", "sizes") not in given and (chosen != ["page"] or model["page"] != page):
        model["sizes"] = {key: value for key, value in sizes.items() if ("model", "sizes", key) in given}
    for key in ("warmup", "schooling", "tokenizer") if chosen == ["load"] else ():
        if not any(path[0] == key for path in given):
            settings.tree.pop(key, None)


ALTERNATIVES = ("preset", "page", "load")
"""What a model may come from; one of them is given."""


def resolve(schema: type[Config], settings: Settings, more: Sequence[Mistake] = ()) -> Config:
    """The typed config; UsageError with one line per mistake. more: mistakes that are not the schema's to find."""
    if settings.mistakes:
        raise mistaken(settings.mistakes)
    try:
        config = schema.model_validate(settings.tree)
    except ValidationError as error:
        raise mistaken([*explain(error, schema, settings), *more]) from None
    if more:
        raise mistaken(more)
    return config


def mistaken(mistakes: Sequence[Mistake]) -> UsageError:
    """All of them, one a line."""
    return UsageError("\n".join(map(str, mistakes)))


def as_yaml(config: Strict) -> str:
    """The text of a config; `resolve` reads the same config from it."""
    return write(config.model_dump(mode="json"))


def differences(old: Strict, new: Strict, free: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for every key with another value, but for those (or parts of the tree) that are free to
    change."""
    before, after = dict(flat(old.model_dump(mode="json"))), dict(flat(new.model_dump(mode="json")))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    bound = [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in free)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in bound]


def explain(error: ValidationError, schema: type[Strict], settings: Settings) -> Iterator[Mistake]:
    """Pydantic's findings in our words."""
    for finding in error.errors():
        path = tuple(str(part) for part in finding["loc"])
        fields = fields_at(schema, path[:-1])
        if finding["type"] == "extra_forbidden":
            what = f"unknown key{nearest(path[-1], list(fields))}; allowed here: {', '.join(fields)}"
        elif finding["type"] == "missing":
            what = f"missing; give {allowed(fields.get(path[-1]))}"
        elif finding["type"] in ("value_error", "assertion_error"):
            what = str(finding["ctx"]["error"])
        else:
            field = field_at(schema, path)
            what = f"{brief(finding['input'])} is not {allowed(field)}{closest(finding, field)}"
        yield Mistake(settings.place(path), ".".join(path), what)


def fields_at(schema: type[Strict], path: Path) -> dict[str, FieldInfo]:
    """The fields of the part of the schema at a path; none where there is no such part."""
    part: type[Strict] | None = schema
    for name in path:
        field = part.model_fields.get(name) if part else None
        part = part_of(field.annotation) if field else None
    return dict(part.model_fields) if part else {}


def field_at(schema: type[Strict], path: Path) -> FieldInfo | None:
    """The deepest field named along a path (a finding may point into a list or a choice of types)."""
    for depth in range(len(path), 0, -1):
        if field := fields_at(schema, path[: depth - 1]).get(path[depth - 1]):
            return field
    return None


def part_of(annotation: Any) -> type[Strict] | None:
    """The part a field holds, where it holds one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Strict):
            return candidate
    return None


def allowed(field: FieldInfo | None) -> str:
    """What a field takes, in words: the choices, or the type with its bounds, and what it is for."""
    if field is None:
        return "allowed here"
    told = [words(field.annotation), *bounds(field.metadata)]
    return " ".join(told) + (f" ({field.description})" if field.description else "")


def bounds(found: Iterable[Any]) -> list[str]:
    """The bounds among what a type is annotated with, in words."""
    return [BOUNDS[type(one).__name__](one) for one in found if type(one).__name__ in BOUNDS]


BOUNDS: dict[str, Callable[[Any], str]] = {
    "Gt": lambda bound: f"> {bound.gt}",
    "Ge": lambda bound: f">= {bound.ge}",
    "Lt": lambda bound: f"< {bound.lt}",
    "Le": lambda bound: f"<= {bound.le}",
    "MinLen": lambda bound: f"of length >= {bound.min_length}",
    "MaxLen": lambda bound: f"of length <= {bound.max_length}",
}

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def words(annotation: Any) -> str:
    """A type in words."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join("true or false" if isinstance(x, bool) else str(x) for x in get_args(annotation))
    if annotation in KINDS:
        return KINDS[annotation]
    if get_origin(annotation) is Annotated:
        kind, *notes = get_args(annotation)
        return " ".join([words(kind), *bounds(bound for note in notes for bound in getattr(note, "metadata", ()))])
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return f"a group of keys ({', '.join(annotation.model_fields)})"
    if get_origin(annotation) in (tuple, list):
        return f"a list ({words(get_args(annotation)[0])})"
    if get_origin(annotation) is dict:
        return "a group of keys"
    return " or ".join(words(part) for part in get_args(annotation)) or str(annotation)


def closest(finding: Any, field: FieldInfo | None) -> str:
    """The nearest of a field's choices, where it has choices and text came."""
    parts = (field.annotation, *get_args(field.annotation)) if field else ()
    choices = [str(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    return nearest(str(finding["input"]), choices)


def nearest(word: str, known: Sequence[str]) -> str:
    """', did you mean ...?' where a known name is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [name for name in known if sorted(name) == sorted(word)]  # two letters swapped in a short word
    return f", did you mean {near[0]!r}?" if near else ""


def brief(value: Any) -> str:
    """A value as it came, cut to a readable length."""
    shown = re.sub(r"\s+", " ", repr(value))
    return shown if len(shown) <= 60 else shown[:57] + "..."
