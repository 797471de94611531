"""Finds the settings of an arm that nobody gave and that differ from the recipe's own: a warm-up that a shorter run
shortens, sizes that another model replaces, and what `quest ablate` fixes for all arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_quest.errors import UsageError
from llm_quest.experiments.arms import CONTROL, DEV, FIXED, TEST, resolve_settings
from llm_quest.recipes.config import load_raw_config
from llm_quest.recipes.recipe import load_recipe
from llm_quest.recipes.yaml_io import flatten_tree

FIXED_PAIRS = (*(f"{key}={value}" for key, value in FIXED.items()), DEV, TEST)
"""The pairs that `quest ablate` adds."""
WHY = {"warmup_steps": "shortened with max_steps"}
FIXED_FOR_ALL, FOLLOWS = "fixed by quest ablate for all arms", "follows from the settings that were given"
Derived = dict[str, dict[str, Any]]
"""Key -> {"recipe": the recipe's own value, "value": the arm's, "why": the reason}."""


def find_derived_settings(recipe: str, pairs: Sequence[str]) -> Derived:
    """The settings that differ from the recipe's own and that no pair of the user's gives."""
    settings = load_recipe(recipe, pairs)[2]
    own, here = (dict(flatten_tree(tree)) for tree in (load_raw_config(recipe).tree, settings.tree))
    defaults, resolved = default_settings(recipe), flat_settings(recipe, pairs)
    given = {pair.partition("=")[0].strip() for pair in pairs if pair not in FIXED_PAIRS}
    fixed = {pair.partition("=")[0] for pair in pairs if pair in FIXED_PAIRS}
    derived: Derived = {}
    for key in {**own, **here}:
        before, after = plain(own.get(key, defaults.get(key))), plain(here.get(key, resolved.get(key)))
        if before != after and not any(f"{key}.".startswith(f"{one}.") for one in given):
            why = FIXED_FOR_ALL if key in fixed else WHY.get(key, FOLLOWS)
            derived[key] = {"recipe": before, "value": after, "why": why}
    return derived


def default_settings(recipe: str) -> dict[str, Any]:
    """The recipe's settings after defaults; none of a recipe that does not run without further settings."""
    try:
        return flat_settings(recipe, ())
    except UsageError:
        return {}


def plain(value: Any) -> Any:
    """Lists for tuples, as YAML and JSON have them."""
    return list(value) if isinstance(value, tuple) else value


def describe_derived(recipe: str, arms: Mapping[str, Derived]) -> list[str]:
    """A line for each derived setting of the control, and of an arm where it has another; not for those that are fixed
    for all arms."""
    control = arms.get(CONTROL, {})
    return [
        f"{arm}: {key} is {one['value']}, not {recipe}'s {one['recipe']} ({one['why']}); give {key} to choose it"
        for arm, derived in arms.items() for key, one in derived.items()
        if one["why"] != FIXED_FOR_ALL and (arm == CONTROL or control.get(key) != one)
    ]  # fmt: skip


def describe_fixed(derived: Mapping[str, Mapping[str, Any]]) -> str:
    """The fixed settings on one line; empty for none."""
    fixed = [f"{key}={one['value']}" for key, one in derived.items() if one["why"] == FIXED_FOR_ALL]
    return f"{FIXED_FOR_ALL}: {' '.join(fixed)}" if fixed else ""


def flat_settings(recipe: str, pairs: Sequence[str]) -> dict[str, Any]:
    """All settings of an arm after defaults, by their dotted keys."""
    return dict(flatten_tree(resolve_settings(recipe, tuple(pairs))))


def settings_unlike_control(settings: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an arm that are not the control's; None for one that it does not have."""
    keys: Iterable[str] = {**control, **settings}
    return {key: settings.get(key) for key in keys if settings.get(key) != control.get(key)}
