"""A signal in every phase of every recipe: no further pass of a model begins once patience is over, the exit code is
the signal's, and the resumed run has the straight run's bits and rows of metrics.

`python -m tests.faults signals [--recipe NAME]`: SIGTERM where each phase is entered, and at a pass in its middle
(preparing, warm-ups, evaluations before, between and after the steps, rollouts, scoring of answers). Whatever is told
goes on for longer than patience. `--patience 3` has the patience of a real run: the slowest end is then the time within
which a signal is heeded."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from llm_quest import progress
from llm_quest.errors import StoppedBySignal
from llm_quest.recipes import RECIPES
from llm_quest.train import signals
from tests.faults.recipe_files import Results, prepare_all, results
from tests.faults.writers import environment
from tests.recipes.every_recipe import run_tiny

PATIENCE, WAIT_SECONDS = 0.05, 0.45
SETTINGS = ("async_save=false", "eval_steps=1", "save_steps=1")
ENTRY = 0
"""The number of a phase's first moment; its passes are counted from 1."""


@dataclass(frozen=True)
class Moment:
    """Where a signal comes: in a phase, at its entry or at its n-th pass of a model."""

    phase: str
    number: int

    def __str__(self) -> str:
        return f"at the entry of {self.phase}" if self.number == ENTRY else f"at pass {self.number} of {self.phase}"


@dataclass
class Watch:
    """Counts passes by phase, and sends SIGTERM at a moment. late: the passes that began after patience was over.
    told: the clock, and the processor's seconds, when it was sent."""

    at: Moment | None = None
    patience: float = PATIENCE
    passes: Counter[str] = field(default_factory=Counter)
    is_told: bool = False
    late: int = 0
    told: tuple[float, float] = (0.0, 0.0)

    def note(self, phase: str, number: int) -> None:
        if self.is_told:
            self.late += number > ENTRY
        elif self.at == Moment(phase, number):
            self.is_told, self.told = True, (time.monotonic(), time.process_time())
            os.kill(os.getpid(), signal.SIGTERM)
            limit = time.monotonic() + self.patience + WAIT_SECONDS
            while time.monotonic() < limit:  # what heeds a signal raises here
                time.sleep(0.002)


class WatchedPhases(list[progress.Phase]):
    """The phases of the package, watched."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    @property
    def name(self) -> str:
        """All of them, the outermost first, without numbers."""
        return " > ".join(re.sub(r"[\d,]+", "N", one.name) for one in self) or "no phase"

    def append(self, phase: progress.Phase) -> None:
        super().append(phase)
        self.watch.passes[self.name] += 0
        self.watch.note(self.name, ENTRY)


@contextmanager
def watch_signals(at: Moment | None = None, patience: float = PATIENCE) -> Iterator[Watch]:
    """Inside, the process hears SIGTERM as a command does, and every pass of a whole model is counted."""
    watch, phases = Watch(at, patience), progress.PHASES
    progress.PHASES = found = WatchedPhases(watch)

    def count(module: nn.Module, given: Any) -> None:
        if "blocks" in module._modules:
            watch.passes[found.name] += 1
            watch.note(found.name, watch.passes[found.name])

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(number)

    hook, before = register_module_forward_pre_hook(count), signals.PATIENCE_SECONDS
    signals.PATIENCE_SECONDS = patience
    handler = signal.signal(signal.SIGTERM, stop)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGTERM, handler)
        hook.remove()
        signals.PATIENCE_SECONDS, progress.PHASES = before, phases


def train(recipe: str, here: Path, out: Path) -> int:
    """The tiny training; its exit code."""
    with environment(LLM_QUEST_CACHE=str(out.parent / "cache")):
        try:
            run_tiny(recipe, here, out, *SETTINGS)
        except StoppedBySignal as stop:
            return stop.exit_code
    return max((int(json.loads(one.read_text())["exit_code"]) for one in out.rglob("summary.json")), default=0)


def straight_run(recipe: str, here: Path) -> tuple[dict[str, int], Results]:
    """How many passes each phase has, and what the run ends with."""
    out = here / "straight" / recipe
    with watch_signals() as watch:
        assert train(recipe, here, out) == 0
    return dict(watch.passes), results(out)


def moments_of(passes: dict[str, int]) -> list[Moment]:
    """The entry of each phase, and its middle pass."""
    entries = [Moment(phase, ENTRY) for phase in passes if phase != "no phase"]
    return entries + [Moment(phase, (count + 1) // 2) for phase, count in passes.items() if count]


def stop_once(
    recipe: str, here: Path, at: Moment, straight: Results, patience: float
) -> tuple[str, tuple[float, float]]:
    """What is wrong with a run that is told to stop at a moment, and resumed; empty if nothing. And the seconds from
    the signal to its end, by the clock and of the processor."""
    shutil.rmtree(here / "stopped", ignore_errors=True)
    out = here / "stopped" / recipe
    with watch_signals(at, patience) as watch:
        code = train(recipe, here, out)
    took = time.monotonic() - watch.told[0], time.process_time() - watch.told[1]
    if not watch.is_told:
        return "the moment never came", (0.0, 0.0)
    return fault_of_stopped(recipe, here, out, code, watch, straight), took


def fault_of_stopped(recipe: str, here: Path, out: Path, code: int, watch: Watch, straight: Results) -> str:
    if code != 128 + signal.SIGTERM or watch.late:
        return f"exit code {code}, {watch.late} passes after patience was over"
    if again := train(recipe, here, out):
        return f"resumed, it ends with {again}"
    found = results(out)
    wrong = {name for run in straight for name in straight[run] if found.get(run, {}).get(name) != straight[run][name]}
    return f"resumed, it has other {', '.join(sorted(wrong))}" if wrong else ""


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults signals", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="", help=", ".join(RECIPES))
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds; of a real run: 3")
    args, total = parser.parse_args(words), 0
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        prepare_all(here)
        for recipe in [args.recipe] if args.recipe else RECIPES:
            begin = time.process_time()
            passes, straight = straight_run(recipe, here)
            moments = moments_of(passes)
            stopped = {at: stop_once(recipe, here, at, straight, args.patience) for at in moments}
            faults = [(at, what) for at, (what, _) in stopped.items() if what]
            slowest = max(stopped, key=lambda at: stopped[at][1])
            clock, processor = stopped[slowest][1]
            seconds = time.process_time() - begin
            print(f"{recipe}: {len(moments)} signals, {len(faults)} faults, {seconds:.0f} s", flush=True)
            print(
                f"  slowest end: {clock:.1f} s by the clock, {processor:.1f} s of the processor, {slowest}", flush=True
            )
            for at, what in faults:
                print(f"  {recipe}, SIGTERM {at}: {what}", flush=True)
            total += len(faults)
    return int(total > 0)
