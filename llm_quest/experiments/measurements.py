"""Measures the runs of an experiment: each once, kept as a record under a hash of everything that its numbers depend
on. A command that was killed continues where it was, and experiments share the runs of their control."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_quest.errors import BusyError, UsageError
from llm_quest.experiments.arms import resolve_settings
from llm_quest.experiments.code_tree import CodeTree
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.worker_pool import WorkerPool
from llm_quest.files import load_json
from llm_quest.progress import phase


class OutOfTime(Exception):
    """The time of an experiment is over, and a run that it needs is not there."""


Record = dict[str, Any]
REPORTED_SEEDS, TUNING_SEEDS, AA_SEEDS = range(1, 101), range(101, 201), range(301, 401)
"""Seeds for three purposes, which never overlap: reported in a verdict, tuning of rates, A/A pairs."""


def require_reported_seeds(first: int, cap: int) -> None:
    """UsageError for seeds of another class."""
    wanted = range(first, first + cap)
    for seeds, what in ((TUNING_SEEDS, "tuning"), (AA_SEEDS, "A/A pairs")):
        if set(wanted) & set(seeds):
            raise UsageError(
                f"--first-seed {first}: seeds {seeds[0]} to {seeds[-1]} are for {what}, so their runs can't be "
                f"reported; take 1 to {TUNING_SEEDS[0] - cap}, or {AA_SEEDS[-1] + 1} and above"
            )


@dataclass(frozen=True)
class RunRequest:
    """A run: the arm's name, its settings, seed and code. role: tune, aa, report, base. repeat: a second run of the
    same. recipe: where it is another than the experiment's; such a run keeps its model. data: the hash of what it
    reads, where that is its own (`hash_inputs`)."""

    arm: str
    pairs: tuple[str, ...]
    seed: int
    code: CodeTree
    role: str
    repeat: int = 0
    recipe: str = ""
    data: str = ""


class Measurements:
    """Records of runs below `root`/runs, made by a pool of processes where they are missing. data: the hash of what
    runs read. deadline: of `time.monotonic`, after which no run is begun (OutOfTime)."""

    def __init__(
        self, recipe: str, root: Path, pool: WorkerPool, ledger: Ledger, experiment: str, data: str,
        deadline: float = math.inf,
    ):  # fmt: skip
        self.recipe, self.root, self.pool, self.ledger, self.experiment = recipe, root, pool, ledger, experiment
        self.data, self.deadline = data, deadline
        self.runs = 0

    def fingerprint(self, request: RunRequest) -> str:
        """The name of a run. data: the hash of what it reads."""
        settings = resolve_settings(request.recipe or self.recipe, (*request.pairs, f"seed={request.seed}"))
        content = [settings, request.code.hash, torch.__version__, request.data or self.data, request.repeat]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, request: RunRequest) -> Path:
        return self.root / "runs" / self.fingerprint(request)

    def measure(self, requests: Sequence[RunRequest], what: str) -> list[Record]:
        """The records, in the order of the requests. Equal requests are one run."""
        folders = [self.folder(request) for request in requests]
        missing = {folder: request for folder, request in zip(folders, requests, strict=True) if not has_record(folder)}
        if missing and time.monotonic() > self.deadline:
            raise OutOfTime
        for folder, request in missing.items():
            self.ledger.append("started", self.experiment, describe_request(request, folder))
        futures = {
            self.pool.submit(request.code, self.run_message(request, folder)): (folder, request)
            for folder, request in missing.items()
        }
        with phase(what, len(futures)) as now:
            for future in concurrent.futures.as_completed(futures):
                require_ended(future.result(), *futures[future])
                now.done += 1
        self.runs += len(futures)
        records = [read_record(folder) for folder in folders]
        for request, folder, record in zip(requests, folders, records, strict=True):
            self.ledger.append("run", self.experiment, describe_request(request, folder) | record)
        return records

    def run_message(self, request: RunRequest, folder: Path) -> dict[str, Any]:
        pairs, recipe = [*request.pairs, f"seed={request.seed}"], request.recipe or self.recipe
        keep = bool(request.recipe)
        return {"do": "run", "recipe": recipe, "pairs": pairs, "folder": str(folder.absolute()), "keep_model": keep}


def hash_inputs(about: Mapping[str, Any]) -> str:
    """The hashes of what runs of a description (`worker.describe_job`) read: rows, code of rewards, models."""
    return json.dumps({**about["identity"], **about.get("files", {})}, sort_keys=True)


def has_record(folder: Path) -> bool:
    return (folder / "record.json").is_file()


def read_record(folder: Path) -> Record:
    record: Record = load_json(folder / "record.json", remedy="remove the run's folder, and it is measured again")
    return record


def describe_request(request: RunRequest, folder: Path) -> dict[str, Any]:
    """The fields of a run in the ledger."""
    return {
        "run": folder.name, "arm": request.arm, "seed": request.seed, "role": request.role, "code": request.code.hash,
        "revision": request.code.revision, "settings": list(request.pairs),
    }  # fmt: skip


def require_ended(record: Record, folder: Path, request: RunRequest) -> None:
    """BusyError for a run that neither finished nor diverged."""
    if record["status"] not in ("finished", "diverged"):
        raise BusyError(
            f"the run of {request.arm}, seed {request.seed}, ended early ({record['status']}): {folder}\n"
            "the same command goes on with it"
        )


def read_metric(record: Mapping[str, Any], metric: str, arm: str, vocab_size: int | None = None) -> float | None:
    """A number of a run; None if it diverged: stopped by a guard, not finite, or a loss above that of equal
    probabilities. UsageError for a metric that it does not report."""
    if record["status"] == "diverged":
        return None
    metrics = record["metrics"]
    if metric not in metrics:
        known = ", ".join(sorted(name for name, value in metrics.items() if isinstance(value, int | float)))
        raise UsageError(f"--metric {metric}: {arm} reports no such number; it has {known}")
    value = metrics[metric]
    if value is None or not math.isfinite(value):
        return None
    if metric == "eval/loss" and vocab_size is not None and value > math.log(vocab_size):
        return None
    return float(value)
