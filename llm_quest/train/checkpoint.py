"""Checkpoints that are complete or absent: written to a hidden folder, synced, listed in a manifest, and named by
one rename.

          checkpoints/.tmp-00001000-4711-x7k2/   model.safetensors optim.safetensors state.json MANIFEST.json
                  |  os.rename, then fsync of the parent
          checkpoints/step-00001000/             and then LATEST, a small text file, by temp and os.replace

A process killed at any moment leaves either the old state or the new one. Reading takes the newest folder whose
manifest is right; a damaged one is renamed `.corrupt`, which is reported, and the one before it is used. There is no
pickle. `CheckpointSaver` writes in the background, one checkpoint at a time; its errors are raised in the training
loop."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from llm_quest.atomic_dirs import exchange_names
from llm_quest.errors import BusyError, DataError, ResourceError
from llm_quest.files import atomic_write_text, fsync_path, load_json, parse_digits, write_text
from llm_quest.manifest import MANIFEST_FILE, file_entry, find_fault, read_manifest
from llm_quest.tensor_files import write_tensors

FORMAT = 2
"""1: the first version, whose states are of other names: its weights load, and it cannot be resumed."""
TENSOR_FILES = {"model": "model.safetensors", "optimizer": "optim.safetensors"}
SHARDS_DIR = "shards"
"""Holds the tensors of a checkpoint that several processes wrote in parts (`train/sharded_checkpoint.py`)."""
STATE_FILE, LATEST_FILE, BEST_FILE = "state.json", "LATEST", "BEST"
"""BEST names the checkpoint that the run's name stands for, where that is not the newest (load_best_model_at_end)."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """The `state_dict` of a `TrainState` on the host: "model" and "optimizer" are tensors by name, the rest is JSON.
    identity: name -> hash of what the run must not change (config, tokenizer, data). replaces: it takes the place of
    the checkpoint of the same step."""

    step: int
    state_dict: Mapping[str, Any]
    identity: Mapping[str, str] = field(default_factory=dict)
    replaces: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        tensors = [t for name in TENSOR_FILES for t in self.state_dict[name].values()]
        return sum(t.numel() * t.element_size() for t in tensors)


def checkpoint_dir(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint. root: the folder `checkpoints`."""
    return root / f"step-{step:08d}"


def save_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Commit a checkpoint and return its folder. ResourceError on a full disk: the staged folder is removed, the
    others are as they were."""
    require_new(root, checkpoint)
    require_checkpoint_space(root, checkpoint.nbytes)
    staged = Path(tempfile.mkdtemp(prefix=f".tmp-{checkpoint.step:08d}-{os.getpid()}-", dir=root))
    try:
        for name, file in TENSOR_FILES.items():
            write_tensors(staged / file, checkpoint.state_dict[name])
        entries = {file: file_entry(staged / file) for file in TENSOR_FILES.values()}
        return commit_checkpoint(staged, checkpoint, entries)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        name = checkpoint_dir(root, checkpoint.step).name
        if not is_disk_full(error):
            raise ResourceError(
                f"{root / name} cannot be written ({error}). Earlier checkpoints are untouched; look at the disk "
                "and resume"
            ) from error
        raise ResourceError(
            f"the disk is full: {name} needs {checkpoint.nbytes / 1e6:.1f} MB ({error}). Earlier checkpoints are "
            f"untouched; make room under {root} and resume"
        ) from error


def require_new(root: Path, checkpoint: Checkpoint) -> None:
    """BusyError where this step's checkpoint is there and is not to be replaced. root is made if it is not."""
    final = checkpoint_dir(root, checkpoint.step)
    if final.exists() and not checkpoint.replaces:
        raise BusyError(f"{final} exists already and is not overwritten; resume from it, or choose another run folder")
    root.mkdir(parents=True, exist_ok=True)


def commit_checkpoint(staged: Path, checkpoint: Checkpoint, entries: Mapping[str, Any]) -> Path:
    """Complete a staged folder that has its tensors, and rename it. entries: of the tensor files, for the manifest."""
    final = checkpoint_dir(staged.parent, checkpoint.step)
    write_state(staged, checkpoint, entries)
    if checkpoint.replaces and final.exists():
        exchange_names(staged, final)
        shutil.rmtree(staged, ignore_errors=True)
    else:
        os.rename(staged, final)
    fsync_path(final.parent)
    atomic_write_text(final.parent.parent / LATEST_FILE, final.name + "\n")
    return final


def write_state(staged: Path, checkpoint: Checkpoint, entries: Mapping[str, Any]) -> None:
    """Write and sync what is no tensor, the manifest last."""
    values = {name: value for name, value in checkpoint.state_dict.items() if name not in TENSOR_FILES}
    write_text(staged / STATE_FILE, json.dumps(values))
    mode = (staged / STATE_FILE).stat().st_mode & 0o777
    with contextlib.suppress(OSError):  # a file system without modes
        os.chmod(staged, mode | (mode & 0o444) >> 2)
    files = {**entries, STATE_FILE: file_entry(staged / STATE_FILE)}
    manifest = {"format": FORMAT, "step": checkpoint.step, "identity": dict(checkpoint.identity), "files": files}
    write_text(staged / MANIFEST_FILE, json.dumps(manifest, indent=1))
    fsync_path(staged)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint whose manifest is right (call `find_fault` first). A sharded one comes without its tensors.
    DataError for one of another format."""
    manifest = read_manifest(folder)
    try:
        plain = {} if (folder / SHARDS_DIR).is_dir() else TENSOR_FILES
        tensors = {name: load_file(folder / file) for name, file in plain.items()}
        values = load_json(folder / STATE_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"the checkpoint {folder} cannot be read: {error}") from error
    if manifest["format"] != FORMAT:
        raise DataError(
            f"{folder} was saved by another version of LLM Quest (format {manifest['format']}; this version resumes "
            f"{FORMAT}): it loads for generate, eval and export; to train on, start a new run from its weights"
        )
    return Checkpoint(manifest["step"], tensors | values, manifest["identity"])


def latest_checkpoint(root: Path, report: Callable[[str], None], verify: str = "full") -> Path | None:
    """The newest undamaged checkpoint; None if there has never been one. Damaged ones after it are renamed and
    reported.

    DataError if there have been checkpoints and none is usable, now and each time it is asked: starting over silently
    would throw the run away. Then nothing is renamed."""
    damaged: list[tuple[Path, str]] = []
    for folder in sorted(list_checkpoints(root), reverse=True):
        wrong = find_fault(folder, verify)
        if not wrong:
            for other, fault in damaged:
                aside = rename_aside(other, "corrupt")
                report(f"checkpoint {other.name} is corrupt: {fault}; renamed {aside.name}, the one before it is used")
            return folder
        damaged.append((folder, wrong))
    lost = [f"{folder.name}: {fault}" for folder, fault in damaged] or sorted(
        p.name for p in root.glob("step-*.corrupt*")
    )
    if lost:
        raise DataError(
            f"no usable checkpoint in {root}, all are corrupt ({'; '.join(lost[:3])}); bring one back, or start again "
            "in another run folder"
        )
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir() and parse_digits(path.name[5:]) is not None)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name[5:])


def rename_aside(folder: Path, suffix: str) -> Path:
    """Rename a folder to `<name>.<suffix>`, numbered if that exists: nothing is lost, nothing is read again."""
    target, number = folder.with_name(f"{folder.name}.{suffix}"), 2
    while target.exists():
        target, number = folder.with_name(f"{folder.name}.{suffix}-{number}"), number + 1
    os.rename(folder, target)
    return target


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the `save_total_limit` newest ones (0: all), those at multiples of `keep_every`,
    those of keep_steps (the best, the last good one), and the newest that is known to be healthy.

    That is the newest of a step up to `healthy_until`. The oldest one after it is kept too: it is the next that will be
    known to be healthy, where checkpoints are saved more often than it takes to know that."""

    save_total_limit: int
    keep_every: int = 0
    keep_steps: Collection[int] = ()
    healthy_until: int | None = None

    def select(self, steps: Sequence[int]) -> set[int]:
        """Select the steps, given oldest first, whose checkpoints are kept."""
        if not self.save_total_limit:
            return set(steps)
        kept = set(steps[-self.save_total_limit :]) | set(self.keep_steps)
        kept |= {step for step in steps if self.keep_every and step % self.keep_every == 0}
        if self.healthy_until is not None:
            kept |= set([step for step in steps if step <= self.healthy_until][-1:])
            kept |= set([step for step in steps if step > self.healthy_until][:1])
        return kept


def prune_checkpoints(root: Path, retention: Retention) -> None:
    """Remove the checkpoints that are not kept: each is renamed first, so that none is half there under its name."""
    folders = {checkpoint_step(folder): folder for folder in list_checkpoints(root)}
    kept = retention.select(list(folders))
    for folder in [folder for step, folder in folders.items() if step not in kept]:
        trash = folder.with_name(f".trash-{folder.name}")
        with contextlib.suppress(OSError):  # a checkpoint too many does not end a run
            os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def remove_partial_checkpoints(root: Path) -> None:
    """Remove what killed processes left half-written or half-deleted. Call it only while holding the run's lock."""
    for path in [*root.glob(".tmp-*"), *root.glob(".trash-*")]:
        shutil.rmtree(path, ignore_errors=True)


def require_checkpoint_space(root: Path, nbytes: int) -> None:
    """ResourceError unless `nbytes` and a tenth more are free."""
    free, need = shutil.disk_usage(root).free, int(nbytes * 1.1)
    if free < need:
        raise ResourceError(
            f"the disk is full: a checkpoint needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free under {root} "
            f"({(need - free) / 1e6:.1f} MB are missing). Earlier checkpoints are untouched; make room and resume"
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether this error says that the disk (or a quota, or a size limit) is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL_ERRNOS
    return any(f"os error {number})" in str(error) for number in DISK_FULL_ERRNOS)


class CheckpointSaver:
    """`start(job)` runs a job that returns the folder it wrote; `take_result()` returns that folder once.

    A new save waits for the one before it. background=False writes at once, in the caller's thread."""

    def __init__(self, background: bool = True):
        self.background = background
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future[Path] | None = None

    def close(self) -> None:
        """Wait for the running job."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def start(self, job: Callable[[], Path]) -> None:
        """Start a job. The result of the job before it has been taken (`take_result(wait=True)`)."""
        assert self._pending is None, "a checkpoint is still being written: call take_result(wait=True) first"
        if self._pool is not None:
            self._pending = self._pool.submit(job)
            return
        self._pending = Future()
        try:
            self._pending.set_result(job())
        except Exception as error:
            self._pending.set_exception(error)

    def take_result(self, wait: bool = False) -> Path | None:
        """The folder written since the last call, if any; raises what the job raised."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        pending, self._pending = self._pending, None
        return pending.result()
