"""Building blocks of recipe schemas, and descriptions of their keys in words: the choices, the bounds, the nearest
known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from llm_quest.files import absolute_path


class Choice:
    """Annotation of a key whose value is a name in a table, which is the only list of the names.

    loss_type: Annotated[str, Choice(PREFERENCE_LOSSES)] = "dpo"
    """

    def __init__(self, table: Mapping[str, Any]):
        self.names = list(table)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(self.names)

    def __str__(self) -> str:
        return "one of " + ", ".join(self.names)


def find_choices(annotation: Any, metadata: Iterable[Any] = ()) -> list[Choice]:
    """The choices of a field: among its own annotations, and among those of the parts of its type."""
    parts = [
        choice for part in get_args(annotation) for choice in find_choices(part, getattr(part, "__metadata__", ()))
    ]
    return [one for one in metadata if isinstance(one, Choice)] + parts


class StrictModel(BaseModel):
    """Base class of every part of a config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=StrictModel)
LocalPath = Annotated[str, AfterValidator(absolute_path)]
"""A file, a folder or a hub id. A local path is made absolute, so that a run resumes from anywhere."""


def is_local_path(field: Any) -> bool:
    """Whether a field, or a part of its type, names a file, a folder or a hub id."""
    notes = *getattr(field, "metadata", ()), *getattr(field, "__metadata__", ())
    parts = get_args(field.annotation if isinstance(field, FieldInfo) else field)
    named = any(isinstance(note, AfterValidator) and note.func is absolute_path for note in notes)
    return named or any(map(is_local_path, parts))


def describe_field(field: FieldInfo | None) -> str:
    """Describe the values of a field: the choices, or the type with its bounds, and its description."""
    if field is None:
        return "allowed here"
    own = find_choices(None, field.metadata)
    phrases = [str(own[0]) if own else describe_type(field.annotation), *bounds(field.metadata)]
    return " ".join(phrases) + (f" ({field.description})" if field.description else "")


def bounds(constraints: Iterable[Any]) -> list[str]:
    """The bounds among what a type is annotated with, in words."""
    return [
        BOUND_PHRASES[type(constraint).__name__](constraint)
        for constraint in constraints
        if type(constraint).__name__ in BOUND_PHRASES
    ]


BOUND_PHRASES: dict[str, Callable[[Any], str]] = {
    "Gt": lambda bound: f"> {bound.gt}",
    "Ge": lambda bound: f">= {bound.ge}",
    "Lt": lambda bound: f"< {bound.lt}",
    "Le": lambda bound: f"<= {bound.le}",
    "MinLen": lambda bound: f"of length >= {bound.min_length}",
    "MaxLen": lambda bound: f"of length <= {bound.max_length}",
}


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def describe_type(annotation: Any) -> str:
    """A type in words."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join("true or false" if isinstance(x, bool) else str(x) for x in get_args(annotation))
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    if get_origin(annotation) is Annotated:
        kind, *notes = get_args(annotation)
        if own := find_choices(None, notes):
            return str(own[0])
        return " ".join(
            [describe_type(kind), *bounds(bound for note in notes for bound in getattr(note, "metadata", ()))]
        )
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return f"a group of keys ({', '.join(annotation.model_fields)})"
    if get_origin(annotation) in (tuple, list):
        return f"a list ({describe_type(get_args(annotation)[0])})"
    if get_origin(annotation) is dict:
        return "a group of keys"
    return " or ".join(describe_type(part) for part in get_args(annotation)) or str(annotation)


def suggest_choice(finding: Any, field: FieldInfo | None) -> str:
    """The nearest of a field's choices, where it has choices and text came."""
    parts = (field.annotation, *get_args(field.annotation)) if field else ()
    choices = [str(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    choices += (
        [name for choice in find_choices(field.annotation, field.metadata) for name in choice.names] if field else []
    )
    if finding["type"] in ("tuple_type", "list_type") and finding["input"] in choices:
        return f"; write [{finding['input']}]"
    return did_you_mean(str(finding["input"]), choices)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """', did you mean ...?' where a known name is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [name for name in known if sorted(name) == sorted(word)]  # two letters swapped in a short word
    return f", did you mean {near[0]!r}?" if near else ""


def short_repr(value: Any) -> str:
    """The repr of a value, cut to 60 characters."""
    shown = re.sub(r"\s+", " ", repr(value))
    return shown if len(shown) <= 60 else shown[:57] + "..."
