"""Every recipe with every option that recipes have in common: it takes the option, or refuses it by name.

`python -m tests.recipes.option_combinations [RECIPE ...]` runs every recipe, tiny and of two steps, with each option
alone and with all of them together, and prints what became of each; the suite runs them together alone."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llm_quest.errors import UsageError
from tests.recipes.every_recipe import NAMES, prepare, run_tiny

OPTIONS: dict[str, list[str]] = {
    "lora": ["techniques=[{name: lora, rank: 2}]"],
    "gradient_checkpointing": ["gradient_checkpointing=true"],
    "freeze": ["freeze=['*norm*']"],
    "muon": ["optim=muon"],
    "schedule": ["lr_scheduler_type=wsd", "warmup_steps=1", "min_lr_ratio=0"],
    "max_grad_norm": ["max_grad_norm=null"],
    "best": ["metric_for_best_model=loss", "early_stopping_patience=2",
             "load_best_model_at_end=true"],
    "checkpoints": ["keep_every=1", "save_total_limit=1", "async_save=false", "save_minutes=0"],
    "trackers": ["report_to=[tensorboard]"],
    "bf16": ["precision=bf16"],
    "max_time": ["max_time=1h"],
    "evaluation": ["eval_steps=1"],
    "epochs": ["num_train_epochs=0.01"],
}  # fmt: skip
"""Option -> its settings."""
REFUSALS: dict[tuple[str, str], str] = {}
"""(recipe, option) -> what the refusal says."""


def combined(recipe: str) -> list[str]:
    """All options together, without those that the recipe refuses."""
    return [pair for name, pairs in OPTIONS.items() if (recipe, name) not in REFUSALS for pair in pairs]


def outcome(recipe: str, folder: Path, out: Path, pairs: Sequence[str]) -> str:
    """ok, or the refusal. Whatever else is raised goes on."""
    try:
        run_tiny(recipe, folder, out, *pairs)
    except UsageError as error:
        return f"refused: {error}"
    return "ok"


def main(names: Sequence[str]) -> None:
    folder = Path(tempfile.mkdtemp())
    prepare(folder)
    for number, recipe in enumerate(names or NAMES):
        if recipe == "rpt_control":
            run_tiny("rpt", folder, folder / "alone" / "rpt")
        for name, pairs in {"all": combined(recipe), **OPTIONS}.items():
            try:
                found = outcome(recipe, folder, folder / f"{number}-{name}", pairs)
            except Exception as error:
                found = f"FAILED: {type(error).__name__}: {error}"
            print(f"{recipe:12} {name:24} {found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
