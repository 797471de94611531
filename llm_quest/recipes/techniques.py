"""The key `techniques` of every recipe: `techniques: [lora]`, or `[{name: lora, rank: 8}, checkpointing]`, in the order
in which they are applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from llm_quest.contracts import Callback
from llm_quest.errors import UsageError
from llm_quest.recipes.config import describe_type, did_you_mean
from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES
from llm_quest.techniques.adapter_targets import describe_addresses
from llm_quest.techniques.lora import adapter_addresses

LogFn = Callable[[str], None]


def parse_technique_entry(given: Any) -> dict[str, Any]:
    """One entry with all its options written out; ValueError in words for a name, option or value that is not known."""
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or "name" not in given:
        raise ValueError(f"{given!r} is no technique: write its name, or {{name: lora, rank: 8}}")
    known, name = known_techniques(), str(given["name"])
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


def describe_option_error(found: Any, technique: type) -> str:
    """One of pydantic's findings, about one option, in our words."""
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    kind = get_type_hints(technique, include_extras=True)[str(found["loc"][0])]
    return f"{found['loc'][0]}: {found['input']!r} is not {describe_type(kind)}"


def join_names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def known_techniques() -> dict[str, type]:
    """What a recipe may name."""
    return TECHNIQUES | TRAINING_TECHNIQUES


TechniqueEntry = Annotated[dict[str, Any], BeforeValidator(parse_technique_entry)]


def apply_techniques(entries: Sequence[Mapping[str, Any]], model: Any, log: LogFn) -> list[Callback]:
    """Edit the model in place by each in turn, and say what became trainable; returns those that act after every
    step."""
    callbacks: list[Callback] = []
    for entry in entries:
        options = {key: value for key, value in entry.items() if key != "name"}
        one: Any = TypeAdapter(known_techniques()[entry["name"]]).validate_python(options)
        if callable(one):
            try:
                edited = one(model)
            except ValueError as error:
                raise UsageError(f"technique {entry['name']}: {error}") from None
            assert edited is model, "a recipe's techniques edit in place"
        if isinstance(one, Callback):
            callbacks.append(one)
        log(f"technique: {entry['name']}{trainable_summary(model)}")
    return callbacks


def trainable_summary(model: Any) -> str:
    """Which matrices have adapters, and how much of the model is trained now, where that is not all of it."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    found = adapter_addresses(model)
    where = f" of {describe_addresses(found)} ({len(found)} matrices)" if found else ""
    return where + (
        f"; {learned:,} of {whole:,} numbers are trained ({learned / whole:.3%})" if learned < whole else ""
    )
