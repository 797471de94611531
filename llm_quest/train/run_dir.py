"""RunDir: the folder of a run, locked by the one process that writes it; RunLog: events and rows of metrics, to the
display, to the trackers and to that folder.

          config.yaml  env.json  metrics.jsonl  events.jsonl  samples/  checkpoints/step-00001000/  LATEST  run.lock

`metrics.jsonl` has one row per logged step and never two of one step: a resumed run first cuts it back to its
checkpoint. `events.jsonl` is only appended to. Every process of a parallel run opens the folder; the main process
writes."""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_quest.atomic_dirs import SWEEP_SECONDS
from llm_quest.errors import BusyError, DataError, ResourceError, UsageError
from llm_quest.files import (
    append_lines,
    atomic_write_text,
    fsync_path,
    iter_lines,
    load_json,
    name_file_errors,
    parse_digits,
    remove_partial_line,
)
from llm_quest.manifest import describe_changes, find_fault, read_manifest
from llm_quest.progress import Logger, utc_now
from llm_quest.train import checkpoint as files
from llm_quest.train.checkpoint import Checkpoint
from llm_quest.train.parallel import DistributedContext


class RunDir:
    """`with RunDir(folder, ...) as run_dir:` holds the lock. A second process is refused with BusyError.

    config: the resolved configuration as YAML text. env: machine and packages. identity: name -> hash of what may
    not change between a checkpoint and its resumption. resume: auto (continue if there is a checkpoint), never
    (BusyError if there is one), or the path of a checkpoint. is_main_process: False for the other ranks, which write
    nothing. accept: names of the identity that may have changed."""

    def __init__(
        self,
        folder: str | Path,
        *,
        config: str = "",
        env: Mapping[str, Any] | None = None,
        identity: Mapping[str, str] | None = None,
        resume: str | Path = "auto",
        verify: str = "full",
        is_main_process: bool = True,
        accept: Collection[str] = (),
    ):
        if verify not in ("full", "size", "none"):
            raise UsageError(f"verify is {verify!r}; known: full, size, none")
        self.folder = Path(folder)
        self.config, self.env, self.identity = config, dict(env or {}), dict(identity or {})
        self.accept = accept
        self.resume, self.verify, self.is_main_process = resume, verify, is_main_process
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self._lock = FileLock(self.folder / "run.lock", timeout=0)

    def __enter__(self) -> RunDir:
        if self.is_main_process:
            self._open()
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_main_process:
            self._lock.release()

    def _open(self) -> None:
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(
                f"{self.folder} cannot be a run folder: a file of that name is in the way ({error})"
            ) from error
        self._take_lock()
        try:
            note = {"pid": os.getpid(), "host": socket.gethostname(), "started": utc_now()}
            with name_file_errors(self.folder / "run.lock"):
                (self.folder / "run.lock").write_text(json.dumps(note) + "\n", encoding="utf-8")
            if self.resume == "never" and files.list_checkpoints(self.checkpoints):
                raise BusyError(f"{self.folder} holds a run already: resume it, or choose another folder")
            for name in ("metrics.jsonl", "events.jsonl"):
                require_ordinary_file(self.folder / name)
            files.remove_partial_checkpoints(self.checkpoints)
            (self.checkpoints / files.BEST_FILE).unlink(missing_ok=True)
            for stray in filter(is_left_by_a_run, self.folder.glob(".tmp-*")):
                stray.unlink(missing_ok=True)
            remove_partial_line(self.folder / "events.jsonl")
            atomic_write_text(self.folder / "config.yaml", self.config)
            atomic_write_text(self.folder / "env.json", json.dumps(self.env, indent=1) + "\n")
        except BaseException as error:
            self._lock.release()
            if files.is_disk_full(error):
                raise ResourceError(f"the disk is full: {self.folder} cannot be written ({error})") from error
            raise

    def _take_lock(self) -> None:
        require_ordinary_file(self.folder / "run.lock")
        try:
            self._lock.acquire()
        except Timeout:
            raise busy_folder(self.folder) from None

    def resolve_checkpoint(self) -> Path | None:
        """The checkpoint to continue from (None: start from the beginning). Later rows of metrics are removed, later
        checkpoints are renamed."""
        if isinstance(self.resume, Path) or self.resume not in ("auto", "never"):
            chosen: Path | None = self._check_checkpoint(Path(self.resume))
        else:
            chosen = files.latest_checkpoint(
                self.checkpoints, lambda text: self.log_event("corrupt", message=text), self.verify
            )
        if chosen is not None:
            self._require_identity(chosen)
        step = -1 if chosen is None else files.checkpoint_step(chosen)
        own = files.list_checkpoints(self.checkpoints)
        if chosen is not None and own and chosen.parent.resolve() != self.checkpoints.resolve():
            raise BusyError(f"{self.folder} holds a run already and cannot go on from {chosen}; choose another folder")
        for later in own:
            if files.checkpoint_step(later) > step:
                self.log_event(
                    "checkpoint_renamed", checkpoint=later.name, renamed=files.rename_aside(later, "aside").name
                )
        self.truncate_metrics(step)
        return chosen

    def _check_checkpoint(self, folder: Path) -> Path:
        if not folder.is_dir() or not folder.name.startswith("step-") or parse_digits(folder.name[5:]) is None:
            raise UsageError(
                f"resume={folder} is no checkpoint folder; expected auto, never, or a path ending in step-00001000"
            )
        if wrong := find_fault(folder, self.verify):
            raise DataError(f"the checkpoint {folder} is corrupt: {wrong}; choose another one")
        return folder

    def _require_identity(self, folder: Path) -> None:
        changes = describe_changes(read_manifest(folder)["identity"], self.identity)
        refused = {name: change for name, change in changes.items() if name not in self.accept}
        if refused:
            raise BusyError(
                f"{folder} belongs to another run: its {', '.join(refused.values())} differs.\nBring back what it was "
                f"trained with, choose another folder, or go on with the change by --accept {','.join(refused)}"
            )
        if changes:
            self.log_event("accepted", message=f"changed since the checkpoint: {', '.join(changes.values())}")

    def truncate_metrics(self, step: int) -> None:
        """Remove rows after `step`, and a last line that is incomplete, from metrics.jsonl. A run that starts again at
        its first step, because it was stopped before any checkpoint, puts the old rows aside."""
        path = self.folder / "metrics.jsonl"
        if path.exists() and step < 0 and path.stat().st_size:
            aside = files.rename_aside(path, "aside")
            self.log_event("restarted", message=f"no checkpoint was saved before; the old rows are in {aside.name}")
        elif path.exists():
            with path.open("rb") as file:
                kept = [line.decode("utf-8", "replace") for _, line in iter_lines(file)]
            atomic_write_text(path, "".join(line + "\n" for line in kept if _row_step(line) <= step))

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row of metrics. NaN and infinities, which JSON does not have, are null and named under
        `nonfinite`."""
        if self.is_main_process:
            self._append_line("metrics.jsonl", json_safe(row))

    def log_event(self, name: str, **fields: Any) -> None:
        """Append an event, with the time."""
        if self.is_main_process:
            self._append_line("events.jsonl", json_safe({"time": utc_now(), "event": name, **fields}))

    def _append_line(self, name: str, line: Mapping[str, Any]) -> None:
        try:
            append_lines(self.folder / name, [json.dumps(line)])
        except OSError as error:
            self.require_present()
            if not files.is_disk_full(error):
                raise ResourceError(
                    f"{self.folder / name} cannot be written ({error}); look at the disk and resume"
                ) from error
            raise ResourceError(f"the disk is full: {self.folder / name} cannot grow; make room and resume") from error

    def require_present(self) -> None:
        """Raise DataError if the run's folder was deleted: what is saved now could not be loaded."""
        if not (self.folder / "config.yaml").is_file():
            raise DataError(
                f"{self.folder} was deleted or emptied while its run was training, and can't be saved into; start "
                "a new run"
            )

    def save_checkpoint(
        self,
        checkpoint: Checkpoint,
        retention: files.Retention,
        parallel: DistributedContext | None = None,
    ) -> Path:
        """Commit a checkpoint, and only then remove older ones. parallel: the processes that write it together, each
        its part."""
        self.require_present()
        if self.is_main_process and (self.folder / "metrics.jsonl").exists():
            fsync_path(self.folder / "metrics.jsonl")
        if parallel is None:
            folder = files.save_checkpoint(self.checkpoints, checkpoint)
        else:
            from llm_quest.train.sharded_checkpoint import save_sharded_checkpoint  # 0.3 s that others do not pay

            folder = save_sharded_checkpoint(self.checkpoints, checkpoint, parallel)
        if self.is_main_process:
            files.prune_checkpoints(self.checkpoints, retention)
        return folder

    def mark_best(self, folder: Path) -> None:
        """Make this the checkpoint that the run's name stands for, until the run is trained further."""
        if self.is_main_process:
            atomic_write_text(self.checkpoints / files.BEST_FILE, folder.name + "\n")

    def write_crash_report(self, report: Mapping[str, Any]) -> Path:
        """Write crash.json: why a guard stopped the run."""
        path = self.folder / "crash.json"
        if self.is_main_process:
            atomic_write_text(path, json.dumps(json_safe(report), indent=1) + "\n")
        return path


def json_safe(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for NaN and infinities, which are named under "nonfinite"."""
    bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    safe_row = {name: None if name in bad else value for name, value in row.items()}
    return safe_row | ({"nonfinite": bad} if bad else {})


def require_ordinary_file(path: Path) -> None:
    """UsageError if something other than an ordinary file (a link, a device, a pipe, a folder) has this name."""
    if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
        raise UsageError(f"{path} is not an ordinary file and is not written to; choose another run folder")


OWN_FILES = ("config", "env", "metrics", "summary", "model", "data", "preprocessor_config", "crash")
"""What a run writes as a whole, under its lock."""


def is_left_by_a_run(stage: Path) -> bool:
    """Whether a file is half of one that only a run writes, or a day old. Others may be writing a report here."""
    is_own = stage.name.startswith(tuple(f".tmp-{name}." for name in OWN_FILES))
    return stage.is_file() and (is_own or time.time() - stage.stat().st_mtime > SWEEP_SECONDS)


def require_free(folder: Path) -> None:
    """BusyError while another process trains in this folder, or in one below it (a warm-up, an iteration)."""
    for lock in sorted(folder.rglob("run.lock")):
        require_ordinary_file(lock)
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            raise busy_folder(lock.parent) from None


def busy_folder(folder: Path) -> BusyError:
    owner = lock_owner(folder / "run.lock")
    return BusyError(f"{folder} is in use by {owner}; wait for it, or choose another folder")


def lock_owner(path: Path) -> str:
    """The process that holds a lock, as far as the lock says."""
    try:
        note = load_json(path, limit=10_000)
        return f"process {note['pid']} on {note['host']} since {note['started']}"
    except (DataError, LookupError):
        return "another process"


def _row_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf


class RunLog:
    """Logs events and metrics from the main process; the other processes log nothing."""

    def __init__(self, run_dir: RunDir | None, logger: Logger, is_main_process: bool):
        self.run_dir, self.logger, self.is_main_process = run_dir, logger, is_main_process

    def event(self, name: str, **fields: Any) -> None:
        """Log an event: a saved checkpoint, a skipped step, advice."""
        if self.is_main_process:
            self.logger.log_event(
                f"{name}: " + "  ".join(str(v) if k == "message" else f"{k} {v}" for k, v in fields.items())
            )
            if self.run_dir is not None:
                self.run_dir.log_event(name, **fields)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics."""
        if self.is_main_process:
            self.logger.log_metrics(row)
            if self.run_dir is not None:
                self.run_dir.log_metrics(row)

    def write_crash_report(self, report: Mapping[str, Any]) -> str:
        """Log that a guard stopped the run, and write crash.json. Returns " (its path)", empty without a folder."""
        where = f" ({self.run_dir.write_crash_report(report)})" if self.run_dir is not None else ""
        self.event("stopped_by_guard", **report)
        return where
