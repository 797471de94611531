"""Recipes: from settings in YAML to a run. A recipe is a module with a schema and a `RECIPE`."""

from __future__ import annotations

RECIPES = {
    "pretrain": "llm_quest.recipes.pretrain",
    "sft": "llm_quest.recipes.sft",
    "reward": "llm_quest.recipes.reward",
    "dpo": "llm_quest.recipes.dpo",
    "kto": "llm_quest.recipes.kto",
    "gkd": "llm_quest.recipes.gkd",
    "prm": "llm_quest.recipes.prm",
    "classify": "llm_quest.recipes.classify",
    "grpo": "llm_quest.recipes.grpo",
    "iterative": "llm_quest.recipes.iterative",
    "rpt": "llm_quest.recipes.rpt.recipe",
    "rpt_control": "llm_quest.recipes.rpt.control",
    "vit": "llm_quest.recipes.vit",
    "vlm": "llm_quest.recipes.vlm",
}
"""Value of `recipe:` -> the module with its `RECIPE`, imported when it is needed."""
