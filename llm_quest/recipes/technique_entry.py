"""Parses an entry of `techniques` in a recipe: a name, or a group with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from llm_quest.recipes.schema import describe_type, did_you_mean
from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES
from llm_quest.techniques.model_spec import FORMER_NAMES


def parse_technique_entry(given: Any) -> dict[str, Any]:
    """Parse one entry and fill in all its options. ValueError, in words, for an unknown name, option or value."""
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or "name" not in given:
        raise ValueError(f"{given!r} is no technique: write its name, or {{name: lora, rank: 8}}")
    known, name = known_techniques(), str(given["name"])
    if name in FORMER_NAMES:
        now = ", ".join(f"{key}: {value}" for key, value in FORMER_NAMES[name].items())
        raise ValueError(f"the technique {name!r} has another name now: write {{{now}}}")
    if name not in known:
        raise ValueError(f"no technique is called {name!r}{did_you_mean(name, list(known))}; known: {', '.join(known)}")
    options = {key: value for key, value in given.items() if key != "name"}
    allowed = [field.name for field in fields(known[name])]
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"{name} has no option {key!r}{did_you_mean(str(key), allowed)}; it has {join_names(allowed)}"
            )
    try:
        technique: Any = TypeAdapter(known[name]).validate_python(options)
    except ValidationError as error:
        raise ValueError(
            "; ".join(f"{name}: {describe_option_error(one, known[name])}" for one in error.errors())
        ) from None
    return {"name": name, **asdict(technique)}


def describe_option_error(error: Any, technique: type) -> str:
    """Translate one of pydantic's findings about an option."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    kind = get_type_hints(technique, include_extras=True)[str(error["loc"][0])]
    return f"{error['loc'][0]}: {error['input']!r} is not {describe_type(kind)}"


def join_names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def known_techniques() -> dict[str, type]:
    """Name -> class of every technique that a recipe may name."""
    return TECHNIQUES | TRAINING_TECHNIQUES


TechniqueEntry = Annotated[dict[str, Any], BeforeValidator(parse_technique_entry)]
"""An entry of `techniques: [lora]` or `[{name: lora, rank: 8}, checkpointing]`, in the order of application."""
