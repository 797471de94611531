"""Numbers that go wrong, in every recipe: one weight in the middle of the model becomes NaN, infinite or huge before
the third step. `python -m tests.faults.numbers [RECIPE ...]` tries all of them; `tests/faults/test_numbers.py` one for
each recipe.

Not in a warm-up, which saves by time alone and is over in seconds."""

from __future__ import annotations

import argparse
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
from llm_quest.train.session import TrainSession
from tests.recipes.every_recipe import NAMES, metric_rows, prepare, run_tiny

POISONS = {"nan": math.nan, "inf": math.inf, "huge": 1e30}
STEP = 2
"""Steps that are done when the weight changes."""


@contextmanager
def poisoned_weight(value: float) -> Iterator[list[str]]:
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
    with poisoned_weight(POISONS[poison]) as names:
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
    return faults > 0


if __name__ == "__main__":
    raise SystemExit(main())
