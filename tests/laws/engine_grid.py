"""Every recipe with every technique by {one process, DDP, FSDP2}: the same losses and norms. And an error of the main
process, while it prepares or in a step, ends all processes of every recipe with its exit code.

`python -m tests.laws.engine_grid [RECIPE ...] [ENGINE ...]` judges every cell (of these recipes, by these engines), a
minute a recipe, and prints a table; the suite judges `suite_cells` (test_engine_grid.py)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm_quest.errors import QuestError, ResourceError
from llm_quest.recipes import RECIPES
from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES
from llm_quest.techniques.model_spec import techniques_to_json
from llm_quest.train.parallel import DistributedContext
from tests.laws.test_techniques import EXAMPLES, NOT_TRAINED
from tests.recipes.every_recipe import metric_rows, prepare, run_tiny
from tests.recipes.two import both_exit_codes
from tests.train.cells import OWN_NOISE

ENGINES = ("fsdp", "ddp")
GRID_TECHNIQUES = [name for name in EXAMPLES if name not in NOT_TRAINED]
GRID_RECIPES = [name for name in RECIPES if name != "rpt_control"]
"""rpt_control has the model of rpt's run."""
QUICK = ("sft", "dpo", "classify", "reward", "kto", "prm")
SUITABLE = {"multi_token": "sft", "qk_clip": "sft", "neftune": "sft"}
CLOSE = 1e-4
CELLS_OF_A_PAIR = 16
"""So many are run by one pair of processes."""


class Cell(NamedTuple):
    """A recipe, a technique, and the engine of two processes."""

    recipe: str
    technique: str
    engine: str


def all_cells(recipes: Sequence[str] = GRID_RECIPES, engines: Sequence[str] = ENGINES) -> list[Cell]:
    return [Cell(recipe, name, engine) for recipe in recipes for name in GRID_TECHNIQUES for engine in engines]


def suite_cells() -> list[Cell]:
    """Each technique once, with a recipe that takes it and an engine in turn. (Every recipe without a technique:
    tests/recipes/test_one_law.py; every technique by both engines on one objective: tests/train/test_one_law.py.)"""
    return [
        Cell(SUITABLE.get(name, QUICK[number % len(QUICK)]), name, ENGINES[number // len(QUICK) % 2])
        for number, name in enumerate(GRID_TECHNIQUES)
    ]


def run_cell(cell: Cell, folder: Path, out: Path) -> None:
    """The recipe's own techniques are replaced. No checkpoint but the last."""
    chosen = json.dumps(techniques_to_json([EXAMPLES[cell.technique]], TECHNIQUES | TRAINING_TECHNIQUES))
    run_tiny(cell.recipe, folder, out, f"techniques={chosen}", "save_steps=0", f"parallel={cell.engine}")


def refusal(cell: Cell, folder: Path, out: Path) -> str:
    """Run the cell on one process; why it cannot be run, empty if it was."""
    try:
        run_cell(cell, folder, out)
    except QuestError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except Exception as error:
        return f"FAILS: on one process: {type(error).__name__}: {str(error)[:200]}"
    return ""


def run_by_two(cells: Sequence[Cell], folder: str) -> None:
    """On each of two processes. The file `begun` has the cells so far; `failed`, what ended this process."""
    here, parallel = Path(folder), DistributedContext.from_environment("cpu")
    for cell in cells:
        if parallel.is_main_process:
            with (here / "begun").open("a") as file:
                file.write(f"{cells.index(cell)}\n")
        try:
            run_cell(cell, here, here / "_".join(cell))
        except BaseException:
            (here / f"failed-{parallel.rank}").write_text(traceback.format_exc())
            raise
    parallel.destroy_process_group()


def judge_by_two(cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, str]]:
    """Each cell with what is wrong, empty if nothing is. After a failure a new pair of processes goes on."""
    while cells:
        (folder / "begun").write_text("")
        codes = both_exit_codes(run_by_two, cells[:CELLS_OF_A_PAIR], str(folder))
        begun = len((folder / "begun").read_text().split())
        for number, cell in enumerate(cells[:begun]):
            complaint = ""
            if codes != [0, 0] and number == begun - 1:
                said = [file.read_text().strip().splitlines()[-1] for file in sorted(folder.glob("failed-*"))]
                complaint = f"exit codes {codes}: {' | '.join(said)}"
            yield cell, complaint or differences(cell, folder)
        for file in folder.glob("failed-*"):
            file.unlink()
        if not begun:
            raise RuntimeError(f"two processes could not start: {codes}")
        cells = cells[begun:]


def differences(cell: Cell, folder: Path) -> str:
    """How the losses and norms of two processes differ from those of one. (A technique's noise is each process's
    own.)"""
    two, one = (metric_rows(folder / "_".join(parts)) for parts in (cell, ("alone", *cell[:2])))
    if cell.technique in OWN_NOISE:
        return "" if two.keys() == one.keys() else "not the same runs"
    try:
        torch.testing.assert_close(two, one, rtol=CLOSE, atol=CLOSE)
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    return "" if any(one.values()) else "no step was made"


def verdicts(cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, str]]:
    """Each cell with "holds", "refused: ..." or "FAILS: ..."."""
    held, reasons = [], dict[tuple[str, str], str]()
    for cell in cells:
        pair = cell[:2]
        if pair not in reasons:
            reasons[pair] = refusal(cell, folder, folder / "_".join(("alone", *pair)))
        if reasons[pair]:
            yield cell, reasons[pair]
        else:
            held.append(cell)
    for cell, complaint in judge_by_two(held, folder):
        yield cell, f"FAILS: {complaint}" if complaint else "holds"


def run_with_error(recipe: str, folder: str, place: str) -> None:
    """A run of two processes whose main process fails in its first step, or while it prepares."""
    from llm_quest.cli.output import run_with_exit_code
    from llm_quest.recipes import engine
    from llm_quest.recipes import recipe as recipes

    here, rank = Path(folder), int(os.environ["RANK"])
    os.dup2(os.open(here / f"stderr-{recipe}-{place}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(here)

    class Fails:
        def on_step_end(self, model: Any, step: int) -> None:
            raise ResourceError("the main process has no more memory")

    if rank == 0 and place == "step":
        engine.compile_timers = lambda *given: [Fails()]  # type: ignore[assignment]
    if rank == 0 and place == "preparing":
        recipes.Job.__init__ = lambda *given, **named: Fails().on_step_end(None, 0)  # type: ignore[method-assign]
    sys.exit(run_with_exit_code(lambda: run_tiny(recipe, here, here / f"error-{recipe}-{place}", "parallel=fsdp") or 0))


def error_verdict(recipe: str, place: str, folder: Path) -> str:
    codes = both_exit_codes(run_with_error, recipe, str(folder), place)
    shown = "".join(file.read_text() for file in folder.glob(f"stderr-{recipe}-{place}-*"))
    told = shown.count("quest: ") == 1 and "no more memory" in shown
    if codes == [ResourceError.exit_code] * 2 and told and not (folder / "crash.txt").exists():
        return "holds"
    return f"FAILS: exit codes {codes}, said {shown[-300:]!r}"


def main(chosen: Sequence[str]) -> int:
    recipes = [name for name in GRID_RECIPES if name in chosen] or GRID_RECIPES
    engines = [name for name in ENGINES if name in chosen] or ENGINES
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LLM_QUEST_CACHE"] = str(folder / "cache")
        prepare(folder)
        print("| recipe | technique | engine | verdict |\n| --- | --- | --- | --- |", flush=True)
        for recipe in recipes:
            for cell, said in verdicts(all_cells([recipe], engines), folder):
                failures += said.startswith("FAILS")
                print(f"| {' | '.join(cell)} | {said} |", flush=True)
            for place in ("preparing", "step"):
                said = error_verdict(recipe, place, folder)
                failures += said.startswith("FAILS")
                print(f"| {recipe} | an error of the main process | {place} | {said} |", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
