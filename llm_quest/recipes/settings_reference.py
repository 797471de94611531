"""The reference of a recipe's settings, generated from its schema: name, allowed values, default, description.

`quest train RECIPE --help` prints it, and `quest settings --write docs/settings` writes one page for each recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llm_quest.files import atomic_write_text
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import load_raw_config, nested_schema, recipe_names
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.schema import StrictModel, describe_type, find_choices
from llm_quest.recipes.schema import bounds as bounds_in_words

ARXIV = {
    "DAPO": "2503.14476", "DeepSeek-V3": "2412.19437", "GAE": "1506.02438", "RPT": "2506.08007", "ST-MoE": "2202.08906",
    "Switch": "2101.03961", "TR-DPO": "2404.09656",
}  # fmt: skip
"""A paper that a description names -> its number."""


@dataclass(frozen=True)
class Setting:
    """A key of a recipe. takes: its allowed values, in words; default: as YAML writes it, or `required`; is_group:
    whether it holds the keys that follow."""

    key: str
    takes: str
    default: str
    description: str
    is_group: bool = False

    @property
    def papers(self) -> list[str]:
        """The papers that the description names."""
        return [number for name, number in ARXIV.items() if re.search(rf"\b{re.escape(name)}\b", self.description)]


@dataclass(frozen=True)
class SettingsPage:
    """All settings of a recipe, its own first, then those that all recipes have."""

    name: str
    summary: str
    settings: tuple[Setting, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.name,
            "summary": self.summary,
            "settings": [asdict(setting) for setting in self.settings],
        }

    def lines(self) -> list[str]:
        """The settings as lines for the screen."""
        result = [
            f"quest train {self.name}: {self.summary}",
            "",
            "settings: KEY=VALUE on the command line, or in a YAML file",
        ]
        for setting in self.settings:
            result += [
                "",
                f"{setting.key}  ({setting.takes}; default: {setting.default})",
                f"    {setting.description}",
            ]
        return result

    def markdown(self) -> str:
        """The settings as a page of docs/settings."""
        rows = [
            f"| `{setting.key}` | {escape_cell(setting.takes)} | `{escape_cell(setting.default)}` | "
            f"{escape_cell(describe(setting))} |"
            for setting in self.settings
        ]
        head = [
            f"# Settings of `quest train {self.name}`", "", f"{self.summary}", "",
            "Made from the schema by `quest settings --write docs/settings`. A setting is given as `KEY=VALUE` on the "
            "command line or in a YAML file.", "", "| setting | takes | default | what it is for |",
            "| --- | --- | --- | --- |",
        ]  # fmt: skip
        return "\n".join([*head, *rows]) + "\n"


def describe(one: Setting) -> str:
    """The description, with the papers that it names."""
    links = [f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in one.papers]
    return " ".join([one.description, *links])


def escape_cell(text: str) -> str:
    """Text in a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def make_page(name: str) -> SettingsPage:
    """The settings of a recipe, with the defaults of its file. UsageError for a name that is none."""
    raw = load_raw_config(name)
    schema = get_recipe(str(raw.tree["recipe"])).Config
    settings = list(iter_settings(schema, raw.tree))
    ranks = [set(vars(cls).get("__annotations__", ())) for cls in schema.__mro__]
    settings.sort(key=lambda one: next(rank for rank, keys in enumerate(ranks) if one.key.split(".")[0] in keys))
    summary = re.sub(r"\s+", " ", (schema.__doc__ or "").strip()).split(". ")[0]
    return SettingsPage(name, summary, tuple(settings))


def iter_settings(schema: type[StrictModel], given: Mapping[str, Any], prefix: str = "") -> Iterator[Setting]:
    """The settings of a part of a schema. given: what the recipe's file says instead of the defaults."""
    for key, field in schema.model_fields.items():
        if key == "recipe":
            continue
        inner = nested_schema(field.annotation)
        yield make_setting(prefix + key, field, given.get(key, PydanticUndefined), inner)
        if inner is not None and inner is not schema:
            below = given.get(key)
            defaults = field.get_default(call_default_factory=True)
            values = defaults.model_dump(mode="json") if isinstance(defaults, StrictModel) else {}
            yield from iter_settings(inner, {**values, **(below if isinstance(below, dict) else {})}, f"{prefix}{key}.")


def make_setting(key: str, field: FieldInfo, given: Any, inner: type[StrictModel] | None) -> Setting:
    """One setting."""
    own = find_choices(None, field.metadata)
    takes = " ".join([str(own[0]) if own else describe_type(field.annotation), *bounds_in_words(field.metadata)])
    default = field.get_default(call_default_factory=True) if given is PydanticUndefined else given
    if inner is not None:
        optional = default is None
        return Setting(key, "a group of keys", "null" if optional else "as below", describe_group(field, inner), True)
    return Setting(key, takes, show_value(default), field.description or "")


def describe_group(field: FieldInfo, inner: type[StrictModel]) -> str:
    """The description of a group of keys."""
    return field.description or re.sub(r"\s+", " ", (inner.__doc__ or "").strip())


def show_value(value: Any) -> str:
    """A default as it is written on the command line."""
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show_value, value)) + "]"
    if isinstance(value, StrictModel):
        return show_value(value.model_dump(mode="json", exclude_defaults=True))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {show_value(one)}" for key, one in value.items()) + "}"
    return repr(value) if isinstance(value, str) and value.strip() != value else str(value)


@dataclass(frozen=True)
class SettingsIndex:
    """The recipes that have a page. written: the files that were written."""

    names: tuple[str, ...]
    written: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        if self.written:
            return list(self.written)
        return [f"quest settings {name}" for name in self.names]


def list_pages() -> SettingsIndex:
    """The recipes that have settings to show."""
    return SettingsIndex(tuple(recipe_names()))


def write_pages(folder: Path) -> SettingsIndex:
    """Write the page of every recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        atomic_write_text(folder / f"{name}.md", make_page(name).markdown())
    return SettingsIndex(tuple(RECIPES), tuple(f"{folder / name}.md" for name in RECIPES))
