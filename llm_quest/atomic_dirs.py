"""Folders that are whole or not there: written beside their place under another name, made durable, and exchanged with
what stood there in one step (`files.py` does the same for one file)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llm_quest.errors import UsageError
from llm_quest.files import explain_full_disk, fsync_path, require_space

SWEEP_SECONDS = 24 * 3600.0


@contextlib.contextmanager
def atomic_dir(
    folder: str | Path, *, overwrite: bool, replaceable: Callable[[str], bool], required_bytes: int
) -> Iterator[Path]:
    """A new empty folder to write into; on success it takes the place of `folder`, on any error it is removed.

    A folder that is not empty is refused, unless `overwrite` and every file in it is one that we would write (`ours`):
    so a mistyped path never costs anybody's files. Links, files and devices are refused. required_bytes: bytes that
    must be free."""
    target = Path(folder).expanduser().absolute()
    check_target(target, overwrite, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target, required_bytes)
    sweep_stages(target)
    stage = target.parent / f".tmp-{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    stage.mkdir()
    try:
        with explain_full_disk(target):
            yield stage
            for file in (*stage.iterdir(), stage):
                fsync_path(file)
            swap_directories(stage, target, overwrite=overwrite)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_target(target: Path, overwrite: bool, replaceable: Callable[[str], bool]) -> None:
    if target.is_symlink():
        raise UsageError(f"{target} is a link; give the folder itself")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is no folder")
    entries = sorted(p.name for p in target.iterdir()) if target.exists() else []
    if entries and not overwrite:
        raise UsageError(
            f"{target} is not empty; choose another folder, or replace the model in it (--overwrite, overwrite=True)"
        )
    regular_files = {name for name in entries if (target / name).is_file() and not (target / name).is_symlink()}
    if foreign_files := [name for name in entries if not replaceable(name) or name not in regular_files]:
        raise UsageError(
            f"{target} holds more than a saved model ({', '.join(foreign_files[:5])}); it will not be replaced"
        )


def sweep_stages(target: Path) -> None:
    """Remove what processes that were killed while they wrote `target` left beside it a day ago or longer."""
    for stage in target.parent.glob(f".tmp-{target.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - stage.stat().st_mtime > SWEEP_SECONDS:
                shutil.rmtree(stage)


def swap_directories(stage: Path, target: Path, *, overwrite: bool) -> None:
    """Give a written folder its name; what stood there is removed. UsageError where another process has written the
    folder meanwhile, and it is not to be replaced."""
    if target.exists() and not overwrite:
        try:
            target.rmdir()  # an empty folder, which not every system lets a rename replace
        except OSError:
            raise UsageError(f"{target} was written by another process meanwhile; nothing was changed") from None
    if target.exists():
        exchange_names(stage, target)
    else:
        os.rename(stage, target)
    fsync_path(target.parent)


def exchange_names(first: Path, second: Path) -> None:
    """Exchange the names of two folders: in one step on Linux, elsewhere by three renames (a process that is killed
    between them leaves `second` under the name `.tmp-...-old`)."""
    if _exchange_in_one_step(first, second):
        return
    old = second.with_name(f".tmp-{second.name}-{os.getpid()}-{secrets.token_hex(4)}-old")
    os.rename(second, old)
    try:
        os.rename(first, second)
    except OSError:
        os.rename(old, second)
        raise
    os.rename(old, first)


def _exchange_in_one_step(first: Path, second: Path) -> bool:
    """renameat2 with RENAME_EXCHANGE; False where the system or the file system has no such call."""
    import ctypes

    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # macOS, Windows, an old C library
        return False
    return call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0  # type: ignore[no-any-return]
