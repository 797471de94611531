"""LoRA and activation checkpointing are switched on by the same keys in every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_quest.hub.load_save import load
from llm_quest.layers.low_rank import LowRankUpdate
from llm_quest.recipes import RECIPES
from llm_quest.recipes.recipe import get_recipe
from llm_quest.techniques import activation_checkpointing
from tests.recipes.every_recipe import prepare, run_tiny

BOTH = ("gradient_checkpointing=true", "techniques=[{name: lora, rank: 2}]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes begin with, and the run of rpt that rpt_control reads."""
    folder = tmp_path_factory.mktemp("every")
    prepare(folder)
    run_tiny("rpt", folder, folder / "alone/rpt")
    return folder


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_trains_an_adapter_with_checkpointed_blocks(
    recipe: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """LoRA's second matrix begins at 0 and has moved; blocks were computed a second time."""
    calls: list[object] = []
    compute_again = activation_checkpointing.checkpoint

    def count(*inputs: Any, **options: Any) -> Any:
        calls.append(inputs[0])
        return compute_again(*inputs, **options)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", count)
    run_tiny(recipe, folder, tmp_path / "run", *BOTH)
    run = get_recipe(recipe).result_dir(tmp_path / "run")
    updates = [module for module in load(run).modules() if isinstance(module, LowRankUpdate)]
    assert updates
    assert any(update.B.abs().max() > 0 for update in updates)
    assert calls
