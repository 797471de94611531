"""Checkpoints that are whole or not there: staged in a hidden folder, synced, listed in a manifest, named by one
rename.

      checkpoints/.tmp-00001000-4711-x7k2/   model.safetensors optim.safetensors state.json MANIFEST.json
              |  os.rename, then fsync of the parent
      checkpoints/step-00001000/             and then LATEST, a small text file, by temp and os.replace

Whoever kills the process at any moment leaves either the old world or the new one. Reading takes the newest folder
whose manifest holds; one that does not is renamed `.corrupt`, said so, and the one before it is used. No pickle
anywhere.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llm_quest.disk import replace_text, sha256, sync, write_text
from llm_quest.errors import BusyError, DataError, ResourceError
from llm_quest.tensor_files import write_tensors

MODEL, OPTIM, STATE, MANIFEST, LATEST = (
    "model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json", "LATEST",
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a run on the host. identity: name -> hash of what the run must not change (config, tokenizer,
    data)."""

    step: int
    model: Mapping[str, Tensor]
    optim: Mapping[str, Tensor]
    state: Mapping[str, Any]
    identity: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(t.numel() * t.element_size() for t in [*self.model.values(), *self.optim.values()])


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies. root: the folder `checkpoints`."""
    return root / f"step-{step:08d}"


def write(root: Path, checkpoint: Checkpoint) -> Path:
    """Commit a checkpoint; its folder. ResourceError on a full disk: the staged folder is removed, the others are as
    they were."""
    final = folder_of(root, checkpoint.step)
    if final.exists():
        raise BusyError(f"{final} exists already and is not overwritten; resume from it, or choose another run folder")
    root.mkdir(parents=True, exist_ok=True)
    require_space(root, checkpoint.nbytes)
    staged = Path(tempfile.mkdtemp(prefix=f".tmp-{checkpoint.step:08d}-{os.getpid()}-", dir=root))
    try:
        _fill(staged, checkpoint)
        os.rename(staged, final)
        sync(root)
        replace_text(root.parent / LATEST, final.name + "\n")
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        if not is_full(error):
            raise
        raise ResourceError(
            f"the disk is full: {final.name} needs {checkpoint.nbytes / 1e6:.1f} MB ({error}). Earlier checkpoints are "
            f"untouched; make room under {root} and resume"
        ) from error
    return final


def _fill(staged: Path, checkpoint: Checkpoint) -> None:
    """Every file synced, the manifest last."""
    write_text(staged / STATE, json.dumps(checkpoint.state))
    mode = (staged / STATE).stat().st_mode & 0o777
    write_tensors(staged / MODEL, checkpoint.model)
    write_tensors(staged / OPTIM, checkpoint.optim)
    os.chmod(staged, mode | (mode & 0o444) >> 2)
    files = {
        name: {"size": (staged / name).stat().st_size, "sha256": sha256(staged / name)}
        for name in (MODEL, OPTIM, STATE)
    }
    manifest = {"format": 1, "step": checkpoint.step, "identity": dict(checkpoint.identity), "files": files}
    write_text(staged / MANIFEST, json.dumps(manifest, indent=1))
    sync(staged)


def read(folder: Path) -> Checkpoint:
    """A checkpoint whose manifest holds (call `fault` first)."""
    state = json.loads((folder / STATE).read_text())
    manifest = json.loads((folder / MANIFEST).read_text())
    model, optim = load_file(folder / MODEL), load_file(folder / OPTIM)
    return Checkpoint(manifest["step"], model, optim, state, manifest["identity"])


def fault(folder: Path, verify: str = "full") -> str:
    """What is wrong with a checkpoint, in words; empty if nothing. verify: full (hashes), size, or none (the list
    alone)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            size = (folder / name).stat().st_size
            if verify != "none" and size != entry["size"]:
                return f"{name} has {size} bytes, its manifest says {entry['size']}"
            if verify == "full" and sha256(folder / name) != entry["sha256"]:
                return f"{name} does not have the sha256 of its manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read or lists a file that is missing ({error})"
    return ""


def newest(root: Path, report: Callable[[str], None], verify: str = "full") -> Path | None:
    """The newest sound checkpoint; None if there has never been one. Each bad one is renamed and reported.

    DataError if there are checkpoints and all are bad: starting over in silence would throw the run away."""
    bad = 0
    for folder in sorted(listed(root), reverse=True):
        wrong = fault(folder, verify)
        if not wrong:
            return folder
        bad += 1
        aside = set_aside(folder, "corrupt")
        report(f"checkpoint {folder.name} is corrupt: {wrong}; renamed {aside.name}, the one before it is used")
    if bad:
        raise DataError(f"no usable checkpoint in {root}: all {bad} are corrupt; start again in another run folder")
    return None


def listed(root: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name[5:])


def set_aside(folder: Path, why: str) -> Path:
    """Rename to `<name>.<why>`, numbered if that is taken: nothing is lost, nothing is read again."""
    target, number = folder.with_name(f"{folder.name}.{why}"), 2
    while target.exists():
        target, number = folder.with_name(f"{folder.name}.{why}-{number}"), number + 1
    os.rename(folder, target)
    return target


def retain(root: Path, keep: int, every: int = 0, best: Collection[int] = ()) -> None:
    """Keep the last `keep` (0: all), those at multiples of `every`, and the best; the others go by way of a rename."""
    folders = listed(root)
    for folder in folders[: max(0, len(folders) - keep)] if keep else []:
        step = step_of(folder)
        if not (every and step % every == 0) and step not in best:
            trash = folder.with_name(f".trash-{folder.name}")
            os.rename(folder, trash)
            shutil.rmtree(trash, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what killed processes left half-written or half-deleted. Only under the run's lock."""
    for path in [*root.glob(".tmp-*"), *root.glob(".trash-*")]:
        shutil.rmtree(path, ignore_errors=True)


def require_space(root: Path, nbytes: int) -> None:
    """ResourceError unless `nbytes` and a tenth more are free."""
    free, need = shutil.disk_usage(root).free, int(nbytes * 1.1)
    if free < need:
        raise ResourceError(
            f"the disk is full: a checkpoint needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free under {root} "
            f"({(need - free) / 1e6:.1f} MB are missing). Earlier checkpoints are untouched; make room and resume"
        )


def is_full(error: BaseException) -> bool:
    """Does this error say that the disk (or a quota, or a size limit) is full?"""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(f"os error {number})" in str(error) for number in FULL)
