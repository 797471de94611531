"""Folders that many test files begin with and none changes (a trained policy, a run of every recipe): each is made once
for the whole run of pytest, whichever worker needs it first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, which `make(folder)` fills. Another worker that needs it waits; what a failed attempt left is
    removed. The package's cache is in it while it is made."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the folders of all workers
    folder, complete = root / f"shared {name}", root / f"shared {name}.complete"
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LLM_QUEST_CACHE", str(folder / "cache"))
                make(folder)
            complete.touch()
    return folder
