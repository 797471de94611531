"""Runs the experiment of a paper: every arm with every seed, in parallel processes; each measurement is saved as soon
as it is finished.

      docs/papers/  NAME.json (measurements)  NAME.svg (plot)  NAME.md (card)

A second run of the same command measures only what is missing, unless the code of the experiment has changed."""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib
import inspect
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from llm_quest.child_process import end_with_parent
from llm_quest.contracts import LogFn
from llm_quest.experiments.code_tree import code_text
from llm_quest.files import atomic_write_json, damaged_file_errors, load_json
from llm_quest.papers import load_paper
from llm_quest.papers.paper import ExperimentResults, Measurement, Paper

ArmSeed = tuple[str, int]
LAB_IMPORT = re.compile(r"^from llm_quest\.papers\.(\w+) import", re.MULTILINE)


def run_experiment(name: str, *, seeds: int, out: Path, jobs: int, log: LogFn) -> ExperimentResults:
    """All measurements of a paper; they are saved in `out`/NAME.json."""
    chosen = load_paper(name)
    file = out / f"{name}.json"
    results = load_results(file, chosen)
    wanted = [(arm, seed) for seed in range(1, seeds + 1) for arm in chosen.arms]
    missing = [(arm, seed) for arm, seed in wanted if seed not in results.arms.get(arm, {})]
    if len(missing) < len(wanted):
        log(f"{len(wanted) - len(missing)} of {len(wanted)} measurements are there already: {file}")
    began = time.monotonic()
    for number, ((arm, seed), measured) in enumerate(run_measurements(name, missing, jobs), 1):
        results.add(arm, seed, measured)
        save_results(file, chosen, results)
        left = (time.monotonic() - began) / number * (len(missing) - number)
        summary = ", ".join(f"{key} {value:.4g}" for key, value in measured.numbers.items())
        log(f"[{number}/{len(missing)}] {arm}, seed {seed}: {summary}   ({left:.0f} s left)")
    return ExperimentResults({arm: {s: results.arms[arm][s] for s in range(1, seeds + 1)} for arm in chosen.arms})


def run_measurements(name: str, arm_seeds: Iterable[ArmSeed], jobs: int) -> Iterator[tuple[ArmSeed, Measurement]]:
    """Measurements in the order in which they finish. Every process has one thread, so the number of jobs does not
    change the results."""
    spawn = multiprocessing.get_context("spawn")
    parent = os.getpid()
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=end_with_parent, initargs=(parent,)) as pool:
        futures = {pool.submit(measure_arm, name, arm, seed): (arm, seed) for arm, seed in arm_seeds}
        for done in concurrent.futures.as_completed(futures):
            yield futures[done], done.result()


def measure_arm(name: str, arm: str, seed: int) -> Measurement:
    """The measurement of one arm with one seed."""
    torch.set_num_threads(1)
    return load_paper(name).arms[arm](seed)


def code_fingerprint(chosen: Paper) -> str:
    """A hash of the code of the paper's file and of the modules of llm_quest.papers that it imports."""
    own = inspect.getmodule(chosen.verdict)
    assert own is not None, "a verdict is a function of the paper's file"
    names = sorted(set(LAB_IMPORT.findall(inspect.getsource(own))) - {"paper"})
    modules = [own, *(importlib.import_module(f"llm_quest.papers.{name}") for name in names)]
    return hashlib.sha256("".join(code_text(inspect.getsource(m)) for m in modules).encode()).hexdigest()[:16]


def load_results(file: Path, chosen: Paper) -> ExperimentResults:
    """The saved measurements, if the same code made them."""
    results = ExperimentResults()
    if file.is_file():
        remedy = "remove it, and everything is measured again"
        content = load_json(file, remedy=remedy)
        with damaged_file_errors(file, remedy):
            arms = content["arms"] if content["code"] == code_fingerprint(chosen) else {}
            for arm, seed, measured in ((arm, *one) for arm, seeds in arms.items() for one in seeds.items()):
                numbers, curve = parse_numbers(measured["numbers"]), parse_curve(measured["curve"])
                results.add(arm, int(seed), Measurement(numbers, curve))
    return results


def save_results(file: Path, chosen: Paper, results: ExperimentResults) -> None:
    """Writes NAME.json. The file also holds the fingerprint of the code and the version of torch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arms = {
        arm: {
            str(seed): {
                "numbers": {key: finite_or_text(value) for key, value in measured.numbers.items()},
                "curve": [[x, finite_or_text(round(y, 5))] for x, y in measured.curve],
            }
            for seed, measured in sorted(seeds.items())
        }
        for arm, seeds in results.arms.items()
    }
    atomic_write_json(
        file, {"paper": chosen.name, "code": code_fingerprint(chosen), "torch": torch.__version__, "arms": arms}
    )


def finite_or_text(value: float) -> float | str:
    """NaN and infinities as text, because JSON has no numbers for them."""
    return value if math.isfinite(value) else str(value)


def parse_numbers(read: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in read.items()}


def parse_curve(read: list[list[Any]]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in read]
