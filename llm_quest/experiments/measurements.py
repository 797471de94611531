"""Measures the runs of an experiment: each once, kept as a record under a hash of everything that its numbers depend
on. A command that was killed continues where it was, and experiments share the runs of their control."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
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
from llm_quest.progress import EtaClock, Phase, phase


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
        return list(self.measure_each(requests, what))

    def measure_each(self, requests: Sequence[RunRequest], what: str) -> Iterator[Record]:
        """Each record as soon as it and those before it are there, in the order of the requests."""
        folders = [self.folder(request) for request in requests]
        missing = {folder: request for folder, request in zip(folders, requests, strict=True) if not has_record(folder)}
        if missing and time.monotonic() > self.deadline:
            raise OutOfTime
        if reused := len(set(folders)) - len(missing):
            self.ledger.log(f"{what}: {reused} of {len(set(folders))} runs are there already and are used again")
        for folder, request in missing.items():
            self.ledger.append("started", self.experiment, describe_request(request, folder))
        futures = {
            folder: self.pool.submit(request.code, self.run_message(request, folder))
            for folder, request in missing.items()
        }
        with phase(what, len(futures)) as now:
            progress = RunProgress(missing, now)
            for folder, future in futures.items():
                future.add_done_callback(functools.partial(self.report_end, progress, folder))
            for request, folder in zip(requests, folders, strict=True):
                if folder in futures:
                    require_ended(futures[folder].result(), folder, request)
                record = read_record(folder)
                self.ledger.append("run", self.experiment, describe_request(request, folder) | record)
                yield record
        self.runs += len(futures)

    def report_end(self, progress: RunProgress, folder: Path, future: Future[Record]) -> None:
        """A line for a run that has ended; called by the thread that waited for it."""
        if not future.cancelled() and future.exception() is None:
            self.ledger.log(progress.end(folder, future.result()))

    def run_message(self, request: RunRequest, folder: Path) -> dict[str, Any]:
        pairs, recipe = [*request.pairs, f"seed={request.seed}"], request.recipe or self.recipe
        keep = bool(request.recipe)
        return {"do": "run", "recipe": recipe, "pairs": pairs, "folder": str(folder.absolute()), "keep_model": keep}


class RunProgress:
    """The progress of the runs of a phase: which of them run, at which step, and the time left."""

    def __init__(self, requests: Mapping[Path, RunRequest], now: Phase):
        self.requests, self.now = dict(requests), now
        self.waiting = list(self.requests)
        self.lock = threading.Lock()
        now.detail = self.describe

    def end(self, folder: Path, record: Record) -> str:
        """The line of a run that has ended."""
        with self.lock:
            self.waiting.remove(folder)
            self.now.done += 1
        request = self.requests[folder]
        score = next((f", {key} {value:.4f}" for key, value in record.get("metrics", {}).items()
                      if key.startswith("eval/") and value is not None), "")  # fmt: skip
        return (
            f"{self.now.name} {self.now.done} of {self.now.total}: {request.arm}, seed {request.seed}: "
            f"{record['status']}{score}, {record.get('seconds', 0):.1f} s{self.time_left()}"
        )

    def time_left(self) -> str:
        """By the rate so far."""
        clock = EtaClock(0, self.now.total or 0, self.now.began)
        return f", ETA {clock.time_left(self.now.done)}" if self.now.done and self.waiting else ""

    def describe(self) -> str:
        """The runs that are running, with their steps."""
        running = [describe_step(self.requests[one], one) for one in list(self.waiting) if one.is_dir()]
        return "; ".join(running) + self.time_left()


def describe_step(request: RunRequest, folder: Path) -> str:
    """The arm, seed and step of a run; the step is the last that it logged."""
    rows = read_tail(folder / "metrics.jsonl")
    steps = next((pair.partition("=")[2] for pair in reversed(request.pairs) if pair.startswith("max_steps=")), "?")
    step = json.loads(rows[-1]).get("step", 0) if rows else 0
    return f"{request.arm}, seed {request.seed}: step {step} of {steps}"


def read_tail(file: Path) -> list[bytes]:
    """The whole lines at the end of a file that grows; none of a file that is not there."""
    try:
        with file.open("rb") as handle:
            start = max(0, file.stat().st_size - 20_000)
            handle.seek(start)
            lines = handle.read().splitlines(keepends=True)[bool(start) :]
            return [line for line in lines if line.endswith(b"\n")]
    except OSError:
        return []


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
