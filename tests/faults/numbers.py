"""Numbers that go wrong, in every recipe: one weight in the middle of the model becomes NaN, infinite or huge before
the third step; or the rate becomes a thousand times too high in the middle of a run, whose numbers stay finite. `python
-m tests.faults.numbers [RECIPE ...]` tries all of them; `tests/faults/test_numbers.py` one for each recipe.

Not in a warm-up, which saves by time alone and is over in seconds."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llm_quest.errors import GuardStop
from llm_quest.hub.locate import resolve_checkpoint
from llm_quest.train.session import TrainSession
from tests.recipes.every_recipe import NAMES, metric_rows, prepare, run_tiny

POISONS = {"nan": math.nan, "inf": math.inf, "huge": 1e30}
SPOILED_STEP = 14
STEP = 2
"""Steps that are done when the weight changes."""


@contextmanager
def poison_weight(value: float) -> Iterator[list[str]]:
    """Inside: the first training that has done STEP steps finds this value in a weight. Yields its name."""
    names: list[str] = []
    original = TrainSession.forward_backward

    def forward_backward(self: TrainSession, *given: Any) -> Any:
        is_warmup = self.run_dir is not None and self.run_dir.folder.name == "warmup"
        if self.progress.step == STEP and not names and not is_warmup:
            learned = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            name, parameter = learned[len(learned) // 2]
            names.append(name)
            with torch.no_grad():
                parameter.view(-1)[parameter.numel() // 2] = value
        return original(self, *given)

    TrainSession.forward_backward = forward_backward  # type: ignore[method-assign]
    try:
        yield names
    finally:
        TrainSession.forward_backward = original  # type: ignore[method-assign]


def four_steps(recipe: str) -> list[str]:
    """Settings by which a tiny run has four steps, each of them saved."""
    return [] if recipe == "rpt_control" else ["max_steps=4"]


def check_recipe(recipe: str, poison: str, folder: Path) -> str:
    """What is wrong with how a recipe meets a weight that went wrong; empty if nothing. Where there is a straight run
    (`run_straight`), the resumed one is compared with it."""
    run, straight = folder / "numbers" / poison / recipe, folder / "straight" / recipe
    with poison_weight(POISONS[poison]) as names:
        try:
            run_tiny(recipe, folder, run, *four_steps(recipe))
            return "the run went on" if names else "no training had a third step"
        except GuardStop as error:
            message = str(error)
    for part in (f"stopped at step {STEP + 1}: parameter {names[0]}", f"step-{STEP:08d}", "learning_rate"):
        if part not in message:
            return f"the message lacks {part!r}: {message}"
    if len(message.splitlines()) > 4:
        return f"the message has {len(message.splitlines())} lines: {message}"
    run_tiny(recipe, folder, run, *four_steps(recipe))
    if straight.is_dir():
        return "" if metric_rows(run) == metric_rows(straight) else "the resumed run is not the straight one"
    steps = [len(rows) for part, rows in metric_rows(run).items() if not part.endswith("warmup")]
    return "" if max(steps) > STEP else "the resumed run has no more steps"


@contextmanager
def spoil_rate(first: int) -> Iterator[None]:
    """Inside: from the step after this one on the rate is a thousand times as high, in every training but a warm-up."""
    original = TrainSession.forward_backward

    def forward_backward(self: TrainSession, *given: Any) -> Any:
        is_warmup = self.run_dir is not None and self.run_dir.folder.name == "warmup"
        for group in self.optimizer.param_groups:
            if self.progress.step >= first and not is_warmup and not group.get("spoiled"):
                group["initial_lr"], group["spoiled"] = 1000 * group["initial_lr"], True
        return original(self, *given)

    TrainSession.forward_backward = forward_backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainSession.forward_backward = original  # type: ignore[method-assign]


def alarms_of(out: Path) -> list[dict[str, Any]]:
    """What tells that the runs of a folder (but for warm-ups) go wrong: the events, each with its run."""
    files = [file for file in sorted(out.rglob("events.jsonl")) if file.parent.name != "warmup"]
    events = [{**json.loads(line), "run": file.parent} for file in files for line in file.read_text().splitlines()]
    named = ("diverging", "dead_experts")
    return [event for event in events if event["event"] in named or "which is kept" in event.get("message", "")]


def check_divergence(recipe: str, folder: Path) -> str:
    """What is wrong with how a recipe meets a rate that becomes too high; empty if nothing. The run that is well is
    left in peace; the other one names the step, the module, the checkpoint and the remedy, and keeps the checkpoint."""
    settings = ["save_total_limit=1", "save_steps=5"]
    if recipe == "rpt_control":  # whose length follows from what the RPT run has spent
        summary = folder / "alone/rpt/summary.json"
        spent = json.loads(summary.read_text())
        spent["metrics"]["teraflops"] = 26 / 4 * spent["metrics"]["teraflops"]
        summary.write_text(json.dumps(spent))
    else:
        settings.append("max_steps=26")
    well, run = folder / "well" / recipe, folder / "diverging" / recipe
    run_tiny(recipe, folder, well, *settings)
    if alarms := alarms_of(well):
        return f"an alarm in a healthy run: {alarms[0]['message']}"
    try:
        with spoil_rate(SPOILED_STEP):
            run_tiny(recipe, folder, run, *settings)
    except GuardStop as stop:
        last = str(stop)
    else:
        last = ""
    told = alarms_of(run)
    if not told:
        return f"nothing was told ({last})"
    first, message = told[0], told[0]["message"]
    if first["step"] > 22:
        return f"told at step {first['step']} only: {message}"
    place = "the largest gradient is in " if first["event"] == "diverging" and "not finite" not in message else ""
    for part in (place, ", which is kept", f"{first['run']}@good"):
        if part not in message:
            return f"the message lacks {part!r}: {message}"
    if not any("ower learning_rate" in event["message"] for event in told):
        return f"nothing says that the rate is too high: {message}"
    good = resolve_checkpoint(f"{first['run']}@good")
    if not good.is_dir() or str(good) not in told[-1]["message"]:
        return f"the good checkpoint is gone, or another one ({good}): {message}"
    return "" if int(good.name[5:]) <= SPOILED_STEP else f"what is called good was made after the fault: {message}"


def run_straight(recipe: str, folder: Path) -> None:
    """The run to which nothing happens."""
    run_tiny(recipe, folder, folder / "straight" / recipe, *four_steps(recipe))
    if recipe == "rpt":  # which rpt_control reads
        shutil.copytree(folder / "straight" / recipe, folder / "alone" / recipe)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help=", ".join(NAMES))
    wanted = parser.parse_args().recipes
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["LLM_QUEST_CACHE"] = f"{name}/cache"
        folder = Path(name)
        prepare(folder)
        for recipe in NAMES:
            run_straight(recipe, folder)
            for poison in POISONS if not wanted or recipe in wanted else ():
                fault = check_recipe(recipe, poison, folder)
                print(f"{recipe}, {poison}: {fault or 'stopped, and resumed with the same numbers'}", flush=True)
                faults += bool(fault)
            if not wanted or recipe in wanted:
                fault = check_divergence(recipe, folder)
                print(
                    f"{recipe}, diverging: {fault or 'told in its step, and the good checkpoint is kept'}", flush=True
                )
                faults += bool(fault)
    return faults > 0


if __name__ == "__main__":
    raise SystemExit(main())
