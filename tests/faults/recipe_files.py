"""A disk that fails inside the training of any recipe: the message has one to four lines, what was saved before stays
whole, and the resumed run ends with the bits of the straight one.

`python -m tests.faults files recipes --recipe NAME --kind KIND --calls N`: every recipe of the table, in every way,
at every call that writes, or at N of them in equal distances."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from llm_quest.manifest import find_fault
from llm_quest.recipes import RECIPES
from llm_quest.train.checkpoint import list_checkpoints
from tests.faults.failing_files import failing_files
from tests.faults.kills import run_result
from tests.faults.writers import FileFault, environment, message_fault, show_faults
from tests.recipes.every_recipe import prepare, run_tiny

WAYS = ("ENOSPC", "EIO", "EIO once", "EROFS", "ESTALE", "short")
Results = dict[str, dict[str, str]]


def train(recipe: str, here: Path, out: Path) -> None:
    """The tiny training of the recipe; saved in its own thread, so that calls have an order."""
    with environment(LLM_QUEST_CACHE=str(here / "cache")):
        run_tiny(recipe, here, out, "async_save=false")


def results(out: Path) -> Results:
    """Of every run in a folder (iterative has several)."""
    runs = sorted(folder.parent for folder in out.rglob("checkpoints") if folder.is_dir())
    return {str(run.relative_to(out)): run_result(run) for run in runs}


def prepare_all(here: Path) -> None:
    """What the recipes begin with; rpt_control reads a run of rpt."""
    prepare(here)
    train("rpt", here, here / "alone/rpt")


def measure(recipe: str, here: Path, kind: str) -> tuple[int, Results]:
    """How many calls of the straight run may fail in this way, and what it ends with."""
    out = here / "straight"
    shutil.rmtree(out, ignore_errors=True)
    with failing_files(out, kind, 10**9) as state:
        train(recipe, here, out)
    return state.calls, results(out)


def fail_once(recipe: str, here: Path, kind: str, number: int, straight: Results) -> tuple[bool, str]:
    """Whether a call failed, and what was wrong afterwards."""
    out, what = here / "failing", ""
    shutil.rmtree(out, ignore_errors=True)
    with failing_files(out, kind, number) as state:
        try:
            train(recipe, here, out)
        except Exception as error:
            what = message_fault(error)
    saved = [one for folder in out.rglob("checkpoints") for one in list_checkpoints(folder)]
    what = what or next((f"{one.name} is damaged: {fault}" for one in saved if (fault := find_fault(one))), "")
    try:
        train(recipe, here, out)
    except Exception as error:
        return bool(state.failures), what or f"the resumed run raises {type(error).__name__}: {error}"
    found = results(out)
    wrong = sorted(
        {name for run in straight for name in straight[run] if found.get(run, {}).get(name) != straight[run][name]}
    )
    return bool(state.failures), what or (f"the resumed run has other {', '.join(wrong)}" if wrong else "")


def check_recipe(
    recipe: str, here: Path, kind: str, calls: Iterable[int], straight: Results
) -> tuple[list[FileFault], int]:
    """The faults of a recipe whose n-th call fails, for these n; and how many of them failed."""
    faults, tried = [], 0
    for number in calls:
        failed, what = fail_once(recipe, here, kind, number, straight)
        tried += failed
        faults += [FileFault(recipe, kind, number, what)] if what else []
    return faults, tried


def spread(calls: int, count: int) -> list[int]:
    """`count` of the numbers of calls in equal distances, all for 0."""
    return list(range(calls)) if not count else sorted({(2 * i + 1) * calls // (2 * count) for i in range(count)})


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults files recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="", help=", ".join(RECIPES))
    parser.add_argument("--kind", default="", help=", ".join(WAYS))
    parser.add_argument("--calls", type=int, default=0)
    args = parser.parse_args(words)
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        prepare_all(here)
        for recipe in [args.recipe] if args.recipe else RECIPES:
            begin = time.process_time()
            faults, tried, most = [], 0, 0
            for way, kind in enumerate([args.kind] if args.kind else WAYS):
                calls, straight = measure(recipe, here, kind)
                most = max(most, calls)
                numbers = [(one + way) % calls for one in spread(calls, args.calls)]  # another one in each way
                found, count = check_recipe(recipe, here, kind, numbers, straight)
                faults, tried = faults + found, tried + count
            seconds = time.process_time() - begin
            print(f"{recipe}: {tried} of up to {most} calls failing, {len(faults)} faults, {seconds:.0f} s", flush=True)
            total += show_faults(faults)
    return int(total > 0)
