"""`quest train` and `quest plan`: run a recipe and write its report, or estimate its cost."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_quest.cli.doctor import inspect_machine
from llm_quest.contracts import LogFn
from llm_quest.cost.plan import Plan
from llm_quest.errors import UsageError, tolerate_failure
from llm_quest.files import atomic_write_json
from llm_quest.hub.locate import is_checkpoint, resolve_checkpoint, run_of_checkpoint
from llm_quest.recipes.config import config_to_yaml
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import Recipe, RunOutcome, load_recipe
from llm_quest.recipes.technique_check import check_techniques
from llm_quest.recipes.yaml_io import RawConfig


@dataclass(frozen=True)
class DryRunResult:
    """A config that passes all checks."""

    config: RunConfig
    exit_code: int = 0

    def as_json(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    def lines(self) -> list[str]:
        return config_to_yaml(self.config).splitlines()


def start_training(
    recipe: str,
    overrides: Sequence[str],
    *,
    out: Path | None,
    resume: str = "auto",
    accept: Sequence[str] = (),
    dry_run: bool = False,
    quiet: bool = False,
    log: LogFn,
) -> RunOutcome | DryRunResult:
    """Train with a recipe: start a new run, or resume the one in the folder."""
    loaded_recipe, config, settings = load_recipe(recipe, overrides)
    if dry_run:
        config = loaded_recipe.check(config, settings)
        check_techniques(config, settings)
        return DryRunResult(config)
    folder, resume = choose_run_dir(recipe, config, out, resume)
    env = inspect_machine(folder).as_json()
    outcome = run_recipe(
        loaded_recipe, config, settings, folder, resume=resume, accept=accept, env=env, quiet=quiet, log=log
    )
    if outcome.exit_code:  # a stopped command ends at once
        log(f"a run that was stopped gets no report; quest report {folder} writes it")
    elif os.environ.get("RANK", "0") == "0":
        write_plan_and_report(folder, predict_cost(loaded_recipe, config, settings, folder), log)
    return outcome


def predict_cost(recipe: Recipe, config: RunConfig, settings: RawConfig, folder: Path) -> Plan | None:
    """The plan of a run that has none and whose plan needs no data, from counted FLOPs alone: nothing that the run
    measured is in it, so that the report compares a prediction. Made after the run, which does not wait for it."""
    from llm_quest.recipes.planning import WITHOUT_DATA, plan_recipe

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if recipe.name not in WITHOUT_DATA or not alone or (folder / "plan.json").exists():
        return None
    return plan_recipe(recipe, config, settings, folder, measure=False, log=lambda text: None)


def choose_run_dir(recipe: str, config: RunConfig, out: Path | None, resume: str) -> tuple[Path, str]:
    """(run folder, resume mode): the mode is auto, never or a checkpoint."""
    if resume not in ("auto", "never"):
        place = resolve_checkpoint(resume) if "@" in resume else Path(resume)
        if not place.is_dir():
            raise UsageError(
                f"--resume {resume}: no such folder; give auto, never, a run folder or a checkpoint in one (RUN@good)"
            )
        if is_checkpoint(place):
            return out or run_of_checkpoint(place), str(place)
        if out is not None and out.resolve() != place.resolve():
            raise UsageError(f"--resume {resume} continues in that folder, and --out names {out}; give one of them")
        return place, "auto"
    if out is not None:
        return out, resume
    if (Path(recipe) / "config.yaml").is_file():
        return Path(recipe), resume
    return new_run_dir(Path("runs"), f"{Path(recipe).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"), resume


def new_run_dir(folder: Path, name: str) -> Path:
    """A folder of that name, numbered if it exists. UsageError under torchrun, whose processes need one folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need one run folder: name it with --out")
    tried, number = folder / name, 2
    while tried.exists():
        tried, number = folder / f"{name}-{number}", number + 1
    return tried


def write_plan_and_report(folder: Path, training_plan: Plan | None, log: LogFn) -> None:
    """Write the plan, if there is one, and the report that compares it with what was measured."""
    from llm_quest.report.page import write_report

    with tolerate_failure("the report", log):
        if training_plan is not None:
            atomic_write_json(folder / "plan.json", training_plan.as_json())
        log(f"report: {write_report([folder])}")


def estimate_cost(
    recipe: str, overrides: Sequence[str], *, measure: bool, log: LogFn, ladder: Path | None = None
) -> Plan:
    """Estimate the cost of a recipe on this machine, with the loss that a ladder predicts. Nothing is left on disk."""
    from llm_quest.recipes.planning import plan_recipe

    loaded_recipe, config, settings = load_recipe(recipe, overrides)
    with tempfile.TemporaryDirectory() as folder:
        if ladder is None:
            return plan_recipe(loaded_recipe, config, settings, Path(folder), measure=measure, log=log)
        from llm_quest.experiments.ladder_forecast import forecast_loss

        loss = forecast_loss(ladder, recipe, overrides)
        cost = plan_recipe(loaded_recipe, config, settings, Path(folder), measure=measure, log=log)
        return replace(cost, details={**cost.details, "predicted_loss": loss})
