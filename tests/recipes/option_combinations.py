"""Every recipe with every option that recipes have in common: it takes the option, or refuses it by name.

`python -m tests.recipes.option_combinations [RECIPE ...]` runs every recipe, tiny and of two steps, with each option
alone and with all of them together, loads the best and the last checkpoint and exports the model, and prints what
became of each; the suite runs some recipes with all options (`test_option_combinations.py`)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_quest.cli.export import export_run
from llm_quest.errors import QuestError
from llm_quest.hub.load_save import load
from tests.recipes.every_recipe import NAMES, prepare, run_tiny

OPTIONS: dict[str, list[str]] = {
    "lora": ["techniques=[{name: lora, rank: 2}]"],
    "gradient_checkpointing": ["gradient_checkpointing=true"],
    "freeze": ["freeze=['*norm*']"],
    "muon": ["optim=muon"],
    "schedule": ["lr_scheduler_type=wsd", "warmup_steps=1", "min_lr_ratio=0"],
    "max_grad_norm": ["max_grad_norm=null"],
    "best": ["metric_for_best_model=grad_norm", "greater_is_better=false", "early_stopping_patience=2",
             "load_best_model_at_end=true"],
    "checkpoints": ["keep_every=1", "save_total_limit=1", "async_save=false", "save_minutes=0"],
    "trackers": ["report_to=[tensorboard]"],
    "bf16": ["precision=bf16"],
    "max_time": ["max_time=1h"],
    "evaluation": ["eval_steps=1"],
    "epochs": ["num_train_epochs=0.01"],
}  # fmt: skip
"""Option -> its settings."""
REFUSALS = {
    ("grpo", "epochs"): "drawn without end; give max_steps",
    ("iterative", "epochs"): "drawn without end; give max_steps",
    ("vlm", "epochs"): "drawn without end; give max_steps",
    ("rpt_control", "epochs"): "num_train_epochs: unknown key",
}
"""(recipe, option) -> what the refusal says: problems and scenes are drawn without end, and the control of RPT is as
long as RPT's compute allows."""


def all_options(recipe: str) -> list[str]:
    """All options together, without those that the recipe refuses."""
    return [pair for name, pairs in OPTIONS.items() if (recipe, name) not in REFUSALS for pair in pairs]


def use_results(out: Path) -> None:
    """What a user does with a run: its best and its last model, and an export of it, with the adapter merged."""
    load(f"{out}@best")
    load(f"{out}@last")
    export_run(Path(f"{out}@best"), out / "exported", merged=True)


def outcome(use: Callable[[], None]) -> str:
    """ok, a refusal, or a fault."""
    try:
        use()
    except QuestError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"FAULT: {type(error).__name__}: {error}"
    return "ok"


def main(names: Sequence[str]) -> int:
    """The number of faults, and of refusals that are not expected."""
    folder, wrong = Path(tempfile.mkdtemp()), 0
    prepare(folder)
    for recipe in names or NAMES:
        if recipe == "rpt_control":
            run_tiny("rpt", folder, folder / "alone" / "rpt")
        for name, pairs in {"all": all_options(recipe), **OPTIONS}.items():
            out = folder / f"{recipe}-{name}"
            found = outcome(lambda: run_tiny(recipe, folder, out, *pairs))  # noqa: B023 (called at once)
            if name == "all" and found == "ok":
                found = outcome(lambda: use_results(out))  # noqa: B023
            expected = REFUSALS.get((recipe, name))
            wrong += found != "ok" if expected is None else expected not in found
            print(f"{recipe:12} {name:24} {found}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
