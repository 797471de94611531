"""Every recipe stops in the step in which a weight goes wrong, names it and the last good checkpoint, and resumes from
that. `python -m tests.faults.numbers` tries every kind in each, and compares with the run to which nothing happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.numbers import POISONS, check_divergence, check_recipe, run_straight
from tests.recipes.every_recipe import NAMES, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("numbers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_QUEST_CACHE", str(here / "cache"))
        prepare(here)
        run_straight("rpt", here)  # which rpt_control reads
    return here


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_recipe_stops_where_a_weight_goes_wrong_and_resumes(number: int, folder: Path):
    poison = list(POISONS)[number % len(POISONS)]
    assert check_recipe(NAMES[number], poison, folder) == ""


@pytest.mark.parametrize("recipe", ["sft", "vit", "iterative"])
def test_a_recipe_whose_rate_becomes_too_high_says_so_and_keeps_the_good_checkpoint(recipe: str, folder: Path):
    """The others: `python -m tests.faults.numbers`."""
    assert check_divergence(recipe, folder) == ""
