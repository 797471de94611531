"""Options that recipes have in common, in every recipe and together."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quest.errors import UsageError
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from tests.recipes.every_recipe import COMMON, NAMES, TEXTS, prepare, run_tiny
from tests.recipes.option_combinations import OPTIONS, REFUSALS, all_options, use_results


@pytest.mark.parametrize("option", OPTIONS)
def test_every_recipe_knows_the_option_or_refuses_it_by_name(option: str):
    for recipe in NAMES:
        text = f"recipe: {recipe}\n{COMMON}{TEXTS[recipe]}"
        settings = apply_overrides(read_yaml(text, f"{recipe}.yaml"), OPTIONS[option])
        config = get_recipe(recipe).Config
        if "unknown key" in (refusal := REFUSALS.get((recipe, option), "")):
            with pytest.raises(UsageError, match=refusal):
                parse_config(config, settings)
        else:
            parse_config(config, settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    prepare(folder)
    return folder


@pytest.mark.parametrize("recipe", ["classify", "kto", "vit", "grpo"])
def test_all_options_go_together_and_the_result_can_be_used(recipe: str, folder: Path):
    """The other recipes: `python -m tests.recipes.option_combinations`."""
    run_tiny(recipe, folder, folder / recipe, *all_options(recipe))
    use_results(folder / recipe)
    assert list((folder / recipe).rglob("events.out.tfevents*")), "TensorBoard"
