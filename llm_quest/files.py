"""Files that are whole or not there: written beside their place, made durable, moved in one step (folders:
`atomic_dirs.py`)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llm_quest.errors import DataError, QuestError, ResourceError, UsageError, is_out_of_memory

NO_FSYNC = (errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""How systems say that this cannot be synced. Not EIO or ENOSPC, which lose data."""
REPLACE_PAUSES = (0.01, 0.05, 0.2, 0.7)
MAX_LINE_BYTES = 64_000_000
"""Of one row of JSON lines; images and audio in base64 are smaller."""
MAX_JSON_BYTES = 256_000_000
"""Of a JSON file that we wrote ourselves; strangers' files have smaller limits."""


def absolute_path(name: str) -> str:
    """The absolute path of a file or folder that exists, so that it is found from every working directory; of
    RUN@best its run's. Any other name, such as a hub id, as it is."""
    run, at, checkpoint = name.rpartition("@")
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):  # longer than a name may be, a zero byte, or nobody's home
        return name
    if at and not exists:
        return absolute_path(run) + at + checkpoint
    return str(path.absolute()) if name and exists else name


@contextlib.contextmanager
def name_file_errors(path: Path) -> Iterator[None]:
    """Inside, an error of the system that names no file (of a write, of a sync) gets this file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def fsync_path(path: Path) -> None:
    """Make a file, or a folder's entries, durable, where the system does that: some open no folders, some sync nothing
    that is open for reading. A device that fails is an error."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        with name_file_errors(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(handle)


def replace_file(source: Path, target: Path) -> None:
    """`os.replace`, tried again for a second where a reader has the target open, which some systems refuse."""
    for pause in REPLACE_PAUSES:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(pause)
    os.replace(source, target)


def parse_digits(text: str) -> int | None:
    """The number that up to 15 of the digits 0 to 9 write; None for any other text. (`str.isdigit` takes "²" too, which
    `int` refuses, and digits of other scripts, which are other file names.)"""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def read_pointer(file: Path) -> str:
    """What a small text file names (LATEST, RESULT); empty where it is not there, no regular file, or holds what is no
    name."""
    try:
        text = file.read_bytes()[:1000].decode().strip() if file.is_file() and file.stat().st_size <= 1000 else ""
    except (OSError, ValueError):
        return ""
    return text if text.isprintable() else ""


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def package_errors(message: str) -> Iterator[None]:
    """Inside: whatever the package `tokenizers` raises over a broken file is a DataError. It raises bare Exception, and
    panics in one that is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    except BaseException as error:
        raise DataError(f"{message}: {error}") from None


def iter_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank, without its end: the one place where JSON lines are split.

    Commonly got wrong: `str.splitlines` also splits at U+2028, U+2029 and U+0085, which may stand in a JSON string.
    DataError for a line longer than MAX_LINE_BYTES, before more of it is read (of a .gz it may be endless)."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            name = getattr(file, "name", "the file")
            raise DataError(f"{name}:{number} has more than {MAX_LINE_BYTES:,} bytes in one line; is it JSON lines?")
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def load_json(file: Path, kind: type = dict, *, limit: int = MAX_JSON_BYTES, remedy: str = "bring it back") -> Any:
    """The JSON of a regular file of at most `limit` bytes that holds a `kind` (dict, list). DataError names the file,
    what is wrong with it and the remedy."""
    try:
        if not file.is_file():
            raise DataError(f"{file} is not there, or no regular file; {remedy}")
        if (size := file.stat().st_size) > limit:
            raise DataError(f"{file} has {size:,} bytes, at most {limit:,} are read; {remedy}")
        content = json.loads(file.read_bytes().decode(), object_pairs_hook=refuse_key_twice)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, QuestError):
            raise
        what = "cannot be read" if isinstance(error, OSError) else "is not JSON"
        raise DataError(f"{file} {what} ({error}); {remedy}") from None
    if not isinstance(content, kind):
        expected = "a JSON object" if kind is dict else f"a {kind.__name__}"
        raise DataError(f"{file} holds a {type(content).__name__}, expected {expected}; {remedy}")
    return content


def refuse_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: ValueError for an object with a key twice, of which readers take different ones."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("an object has a key twice")
    return mapping


@contextlib.contextmanager
def damaged_file_errors(file: Path, remedy: str) -> Iterator[None]:
    """Inside: content of another form than we write is a DataError that names the file and the remedy."""
    try:
        yield
    except QuestError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"[:160]
        raise DataError(f"{file} is damaged, or of another version ({reason}); {remedy}") from None


def write_text(path: Path, text: str) -> None:
    """A new file, durable; mode by umask. FileExistsError if something is there."""
    with name_file_errors(path), path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def atomic_write_text(path: Path, text: str) -> None:
    """A file replaced as a whole: readers see the old text or the new one. A link there is replaced, not followed."""
    with atomic_file(path) as stage:
        write_text(stage, text)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a new file, which takes its place on success and is removed on any error."""
    stage = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield stage
        replace_file(stage, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what it failed with is what the caller has to know
            stage.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append whole lines, or none. A line without an end that stands there (of a process that was killed) is ended
    first."""
    with name_file_errors(path), path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        cut = end > 0 and file.read(1) != b"\n"
        content = ("\n" * cut + "".join(f"{line}\n" for line in lines)).encode()
        try:
            while content:
                content = content[file.write(content) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def remove_partial_line(path: Path) -> None:
    """Cut a last line that has no end, which a killed process has left."""
    if path.exists():
        with name_file_errors(path), path.open("r+b") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)


def update_text(path: Path, text: str) -> None:
    """A file with this text, replaced as a whole; untouched where it holds that text already."""
    if path.is_symlink() or not path.is_file() or path.read_bytes() != text.encode():
        atomic_write_text(path, text)


def write_json(path: Path, content: Any) -> None:
    """A new file of JSON. NaN is not JSON and is refused."""
    write_text(path, to_json(content))


def atomic_write_json(path: Path, content: Any) -> None:
    """A file of JSON replaced as a whole."""
    atomic_write_text(path, to_json(content))


def to_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def atomic_model_file(file: str | Path, *, overwrite: bool, required_bytes: int) -> Iterator[Path]:
    """`atomic_file` for a file that somebody asked for. UsageError where something is there and `overwrite` is false;
    ResourceError where the disk is full. required_bytes: bytes that must be free."""
    target = Path(file).expanduser().absolute()
    if target.is_dir() or target.is_symlink():
        raise UsageError(f"{target} exists and is no file; choose another name")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another name, or --overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target, required_bytes)
    with explain_full_disk(target), atomic_file(target) as stage:
        yield stage


def require_space(target: Path, required_bytes: int) -> None:
    """ResourceError where fewer bytes are free beside `target`."""
    free = shutil.disk_usage(target.parent).free
    if free < required_bytes:
        raise ResourceError(
            f"{target.parent} has {free:,} bytes free, {target.name} needs {required_bytes:,}; make room"
        )


@contextlib.contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Inside, an error of a full disk is a ResourceError that names the target."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ResourceError(f"no room left to write {target}: nothing was changed; make room and save again") from None
