"""Recipes: from settings in YAML to a run. A recipe is a module with a schema and a `RECIPE`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_quest.recipes.recipe import Recipe
    from llm_quest.recipes.yaml_io import RawConfig

RECIPES = {
    "pretrain": "llm_quest.recipes.pretrain",
    "sft": "llm_quest.recipes.sft",
    "reward": "llm_quest.recipes.reward",
    "dpo": "llm_quest.recipes.dpo",
    "classify": "llm_quest.recipes.classify",
    "grpo": "llm_quest.recipes.grpo",
    "iterative": "llm_quest.recipes.iterative",
    "rpt": "llm_quest.recipes.rpt.recipe",
    "rpt_control": "llm_quest.recipes.rpt.control",
    "vit": "llm_quest.recipes.vit",
    "vlm": "llm_quest.recipes.vlm",
}
"""What `recipe:` may say -> the module that holds it as `RECIPE`; imported when it is needed."""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name."""
    recipe: Recipe = importlib.import_module(RECIPES[name]).RECIPE
    return recipe


def load_recipe(name: str, overrides: Sequence[str]) -> tuple[Recipe, Any, RawConfig]:
    """A recipe, its typed config, and where each key was written. UsageError with every mistake at once. name: of a
    recipe, a YAML file or a run folder. overrides: `key=value` pairs on top."""
    from llm_quest.recipes.config import config_error, did_you_mean, load_raw_config, parse_config
    from llm_quest.recipes.model_config import model_config_problems
    from llm_quest.recipes.yaml_io import ConfigProblem

    settings = load_raw_config(name, overrides)
    kind = settings.tree.get("recipe")
    if not settings.problems and kind not in RECIPES:
        what = "missing" if kind is None else f"{kind!r} is no kind of recipe{did_you_mean(str(kind), list(RECIPES))}"
        place = settings.location(("recipe",))
        raise config_error([ConfigProblem(place, "recipe", f"{what}; known: {', '.join(RECIPES)}")])
    recipe = get_recipe(str(kind) if kind in RECIPES else "pretrain")
    return recipe, parse_config(recipe.Config, settings, model_config_problems(recipe.Config, settings)), settings
