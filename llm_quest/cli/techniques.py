"""`quest techniques`: lists the techniques with their options, defaults, and the setting that applies each."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from llm_quest.errors import UsageError
from llm_quest.recipes.schema import describe_type, did_you_mean
from llm_quest.recipes.settings_reference import show_value
from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES

COMMANDS = {
    "checkpointing": "RECIPE gradient_checkpointing=true",
    "length": "RECIPE model.config.rotary='{rope_theta: 10000}' techniques='[length]'",
    "quantize": "RECIPE techniques='[quantize, lora]'",
    "score_head": "classify",
}
"""Techniques that `RECIPE techniques='[NAME]'` does not apply: they have a setting or a recipe of their own, or need
another technique or a model without rotary scaling."""


@dataclass(frozen=True)
class TechniqueOption:
    """An option of a technique. takes: what it may be, in words; default: as YAML writes it."""

    name: str
    takes: str
    default: str


@dataclass(frozen=True)
class TechniqueEntry:
    """A technique with its options. command: what follows `quest train` to switch it on. in_training: acts in
    training alone; no saved model names it."""

    name: str
    summary: str
    command: str
    options: tuple[TechniqueOption, ...]
    in_training: bool


@dataclass(frozen=True)
class TechniqueList:
    """All techniques."""

    entries: tuple[TechniqueEntry, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]

    def lines(self) -> list[str]:
        result = []
        for entry in self.entries:
            alone = " (in training alone)" if entry.in_training else ""
            result += [f"{entry.name}{alone}: {entry.summary}", f"    quest train {entry.command}"]
            result += [f"    {option.name}: {option.takes}, default {option.default}" for option in entry.options]
            result.append("")
        return [*result, "several, with options: techniques='[{name: lora, rank: 16}, qk_clip]'"]


def list_techniques(words: Sequence[str] = ()) -> TechniqueList:
    """The techniques whose name or first sentence holds every word. UsageError where none is left."""
    entries = [
        describe_technique(name, technique, in_training)
        for table, in_training in ((TECHNIQUES, False), (TRAINING_TECHNIQUES, True))
        for name, technique in table.items()
    ]
    matching = [
        entry for entry in entries if all(word.lower() in f"{entry.name} {entry.summary}".lower() for word in words)
    ]
    if not matching:
        near = did_you_mean(words[0], [*TECHNIQUES, *TRAINING_TECHNIQUES])
        raise UsageError(f"no technique has {' and '.join(map(repr, words))}{near}")
    return TechniqueList(tuple(matching))


def describe_technique(name: str, technique: type, in_training: bool) -> TechniqueEntry:
    hints = get_type_hints(technique, include_extras=True)
    options = tuple(
        TechniqueOption(field.name, describe_type(hints[field.name]), show_value(option_default(field)))
        for field in dataclasses.fields(technique)
    )
    command = COMMANDS.get(name, f"RECIPE techniques='[{name}]'")
    summary = re.sub(r"\s+", " ", inspect.getdoc(technique) or "").split(". ")[0].rstrip(".")
    return TechniqueEntry(name, summary, command, options, in_training)


def option_default(field: dataclasses.Field[Any]) -> Any:
    """The default of an option; every technique works without any."""
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING, f"{field.name} has no default"
    return field.default_factory()
