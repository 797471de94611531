"""The user's cache folder, for what can be made again. Where it cannot be written a run goes on without it: what it
needs lies in a temporary folder, and one warning names the folder and what to do."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from llm_quest.errors import QuestWarning, ResourceError, UsageError

ResultT = TypeVar("ResultT")
REMEDY = "name a folder for caches in LLM_QUEST_CACHE"


class TemporaryCache:
    """What this process uses in place of a cache that it cannot write. folder: None until it is needed. warned:
    whether the user knows."""

    folder: Path | None = None
    warned = False


def lasting_cache_dir(part: str) -> Path:
    """A folder of the user's cache: $LLM_QUEST_CACHE, otherwise llm-quest in $XDG_CACHE_HOME or ~/.cache. UsageError
    where no home folder is known."""
    own, cache = os.environ.get("LLM_QUEST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(own) if own else Path(cache or Path.home() / ".cache") / "llm-quest") / part
    except RuntimeError:  # a container's user, whom no file names
        raise UsageError(f"your home folder is not known (HOME is not set); {REMEDY}") from None


def require_results_dir(part: str) -> Path:
    """The folder of results that took long, which a temporary folder would lose. ResourceError where it cannot be
    written, before anything is measured."""
    folder = lasting_cache_dir(part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(f"results cannot be kept in {folder} ({reason}); {REMEDY}") from None
    return folder


def cache_dir(part: str) -> Path:
    """As `lasting_cache_dir`, but a temporary folder, with a warning, where no home folder is known."""
    try:
        return lasting_cache_dir(part)
    except UsageError:
        warn_without_cache(None, "your home folder is not known (HOME is not set)")
        return temporary_cache_dir(part)


def write_to_cache(part: str, write: Callable[[Path], ResultT]) -> ResultT:
    """What `write` makes in this folder of the cache; where the system refuses that (OSError), what it makes in a
    temporary folder. What it raises there is raised."""
    folder = cache_dir(part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write(folder)
    except OSError as error:
        warn_without_cache(folder, error.strerror or str(error))
    folder = temporary_cache_dir(part)
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder)


@contextlib.contextmanager
def tolerate_cache_errors(folder: Path) -> Iterator[None]:
    """Inside, what cannot be kept in this folder of the cache is a warning."""
    try:
        yield
    except (OSError, ResourceError) as error:
        warn_without_cache(folder, getattr(error, "strerror", None) or str(error))


def warn_without_cache(folder: Path | None, reason: str) -> None:
    """Warn, once in a process, that nothing is kept for the next run. folder: that cannot be written."""
    if not TemporaryCache.warned:
        TemporaryCache.warned = True
        what = f"the cache folder {folder} cannot be written ({reason})" if folder else reason
        warnings.warn(f"{what}: this run keeps nothing for the next one; {REMEDY}", QuestWarning, stacklevel=2)


def temporary_cache_dir(part: str) -> Path:
    """A folder that is removed when this process ends. (A process that it forks ends without removing it.)"""
    if TemporaryCache.folder is None:
        TemporaryCache.folder = Path(tempfile.mkdtemp(prefix="llm-quest-cache-"))
        atexit.register(_remove_in, os.getpid(), TemporaryCache.folder)
    return TemporaryCache.folder / part


def _remove_in(process: int, folder: Path) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
