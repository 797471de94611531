"""Files that are whole or not there: written beside their place, made durable, moved in one step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Make a file, or a folder's entries, durable (not every system lets folders be opened)."""
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """A new file, durable; mode by umask. FileExistsError if something is there."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def atomic_write_text(path: Path, text: str) -> None:
    """A file replaced as a whole: readers see the old text or the new one. A link there is replaced, not followed."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_text(temporary, text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json(path: Path, content: Any) -> None:
    """A new file of JSON. NaN is not JSON and is refused."""
    write_text(path, to_json(content))


def atomic_write_json(path: Path, content: Any) -> None:
    """A file of JSON replaced as a whole."""
    atomic_write_text(path, to_json(content))


def to_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
