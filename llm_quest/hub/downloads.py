"""Downloads from the hub. A large file resumes where an earlier command ended, gets its name once its hash is right,
and is given up below a minimum rate (which a time limit for each read does not notice).

`huggingface_hub` deletes its part at the end of a failed download, and compares sizes alone; what hf_xet fetches cannot
be continued or watched. So files of more than one chunk are fetched here, by HTTP, into the cache that it uses."""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_quest.atomic_dirs import SWEEP_SECONDS
from llm_quest.files import file_sha256, replace_file

TRIES, WORKERS = 6, 8
"""Requests for a file without the progress of a chunk; files downloaded at once."""
HASH_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The name of a file in the cache: git's hash, or the sha256 of a large file."""

MIN_BYTES_PER_SECOND = 1000.0
WINDOW_SECONDS = 30.0


def limit_rate(parts: Iterable[bytes], fail: Callable[[str], Exception]) -> Iterator[bytes]:
    """Yield the parts as they arrive. Raises `fail(message)` if fewer than MIN_BYTES_PER_SECOND arrive in
    WINDOW_SECONDS of waiting."""
    waited, received, since = 0.0, 0, time.monotonic()
    for part in parts:
        waited, received = waited + time.monotonic() - since, received + len(part)
        yield part
        if waited >= WINDOW_SECONDS:
            if received < MIN_BYTES_PER_SECOND * waited:
                raise fail(f"it sends {received / waited:.0f} bytes a second, and is given up")
            waited, received = 0.0, 0
        since = time.monotonic()


def limit_response(response: Any) -> None:
    """Limit the rate of a response of `huggingface_hub`'s client: on ReadTimeout it requests the rest again."""
    http = importlib.import_module(type(response).__module__.partition(".")[0])  # httpx, or httpx2
    stream, request = response.stream, response.request

    class RateLimitedStream(http.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            return limit_rate(stream, lambda text: http.ReadTimeout(text, request=request))

        def close(self) -> None:
            stream.close()

    response.stream = RateLimitedStream()


@contextmanager
def require_rate() -> Iterator[None]:
    """Require a minimum rate of the downloads that `huggingface_hub` makes in Python inside."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["response"]
    hooks.append(limit_response)
    try:
        yield
    finally:
        hooks.remove(limit_response)


class OtherFileError(OSError):
    """The server sent another file than the requested one."""


def fetch_snapshot(name: str, **options: Any) -> Path:
    """`huggingface_hub.snapshot_download` with its options; raises what it raises, and OSError for a damaged file."""
    from huggingface_hub import snapshot_download, utils
    from huggingface_hub.errors import DryRunError

    class NoProgressBar(utils.tqdm):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **settings: Any):
            super().__init__(*given, **settings | {"disable": True})

    with require_rate():
        with suppress(DryRunError):  # the hub cannot be reached: the call below reads the cache, or raises
            plan = snapshot_download(name, dry_run=True, tqdm_class=NoProgressBar, **options)
            fetch_large_files(name, plan, options.get("repo_type"))
        began = time.time()
        folder = Path(snapshot_download(name, **options))
    remove_damaged(folder, began - 1)
    sweep_partial_downloads(folder.parents[1] / "blobs")
    return folder


def fetch_large_files(name: str, plan: Iterable[Any], repo_type: str | None) -> None:
    """Fetch the files of a dry run that have more than one chunk; not those that the hub gives by hf_xet alone, and
    none where HF_XET_HIGH_PERFORMANCE asks for it."""
    from huggingface_hub import constants

    sizes = range(constants.DOWNLOAD_CHUNK_SIZE + 1, constants.MAX_HTTP_DOWNLOAD_SIZE + 1)
    large = [file for file in plan if file.will_download and file.file_size in sizes]
    if not constants.HF_XET_HIGH_PERFORMANCE:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda file: fetch_file(name, file, repo_type), large))


def fetch_file(name: str, file: Any, repo_type: str | None) -> None:
    """Fetch a file of a dry run into the cache's blobs. A file without a hash is left to `huggingface_hub`."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, utils
    from huggingface_hub.file_download import repo_folder_name

    url = hf_hub_url(name, file.filename, repo_type=repo_type, revision=file.commit_hash)
    metadata = get_hf_file_metadata(url)
    if metadata.size is None or not HASH_NAME.fullmatch(metadata.etag or ""):
        return
    cache, repo = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=name, repo_type=repo_type or "model")
    blob, lock = cache / repo / "blobs" / str(metadata.etag), cache / ".locks" / repo / f"{metadata.etag}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with utils.WeakFileLock(lock):
        if not blob.exists():
            fetch_blob(url, blob, metadata.size, claim_part(blob, metadata.size, lock), file.filename)


def claim_part(blob: Path, size: int, lock: Path) -> Path:
    """Rename the longest part that earlier downloads left of a file, and remove the others; return its new name. The
    downloads have ended, for each holds the lock. On a file system that grants the lock to all, nothing is touched."""
    own, parts = new_part(blob), []
    with suppress(Timeout, NotImplementedError), FileLock(lock, timeout=0):
        return own
    for part in blob.parent.glob(f"{blob.name}.*incomplete"):
        with suppress(OSError):
            parts.append((part.stat().st_size, part))
    for length, part in sorted(parts, reverse=True):
        with suppress(OSError):
            if length > size or own.exists():
                part.unlink()
            else:
                part.rename(own)
    return own


def new_part(blob: Path) -> Path:
    """A name that no other download has."""
    return blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")


def fetch_blob(url: str, blob: Path, size: int, claimed: Path, shown: str) -> None:
    """Complete a part of a file, and rename it once its hash is right. A part that the server cannot continue is kept
    until the whole file has been downloaded again."""
    for part in (claimed, new_part(blob)):
        is_old = part.exists()
        try:
            complete_part(url, part, size, shown)
            if not has_hash(part, blob.name):
                part.unlink()
                raise OtherFileError(f"{shown} was damaged on its way, and is removed")
            break
        except OtherFileError:
            if part is not claimed or not (is_old or part_size(part)):
                raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # other programs need the space
                part.unlink(missing_ok=True)
            raise
    replace_file(part, blob)
    claimed.unlink(missing_ok=True)


def complete_part(url: str, part: Path, size: int, shown: str) -> None:
    """Append the rest to a part of a file, and request again after a broken connection. OtherFileError for another
    length."""
    from huggingface_hub import constants, get_session, utils

    http: Any = importlib.import_module(type(get_session()).__module__.partition(".")[0])  # httpx, or httpx2
    have, tries = part_size(part), TRIES
    with utils.tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=shown, disable=None) as bar:
        while have != size:
            try:
                append_rest(url, part, have, size, bar)
                if (actual_size := part_size(part)) != size:
                    os.truncate(part, have)
                    raise OtherFileError(f"{shown} came with {actual_size:,} bytes, not {size:,}")
            except http.TransportError:
                tries = TRIES if part_size(part) - have >= constants.DOWNLOAD_CHUNK_SIZE else tries - 1
                if not tries:
                    raise
                time.sleep(1)
            have = part_size(part)


def append_rest(url: str, part: Path, have: int, size: int, bar: Any) -> None:
    """Request the bytes after the first `have`, and append them. OtherFileError for another answer, such as the page of
    a captive portal."""
    from huggingface_hub import constants, utils

    headers = utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    request: dict[str, Any] = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    retries: dict[str, Any] = {"retry_on_exceptions": (), "retry_on_status_codes": (408, 429)}
    with utils.http_stream_backoff("GET", url, **request, **retries) as answer:
        utils.hf_raise_for_status(answer)
        place = answer.headers.get("Content-Range", "")
        if have and not (answer.status_code == 206 and re.fullmatch(rf"bytes {have}-\d+/({size}|\*)", place)):
            raise OtherFileError(f"the server answers with another file (status {answer.status_code})")
        with part.open("ab") as file:
            for content in answer.iter_bytes():
                file.write(content)
                bar.update(len(content))


def part_size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def remove_damaged(snapshot: Path, since: float) -> None:
    """Remove the files of a snapshot that have arrived since then and are not what the hub says, and raise OSError. The
    cache names what it holds by its sha256 (large files) or by git's hash; `huggingface_hub` compares sizes alone."""
    for file in sorted(snapshot.rglob("*")):
        blob = file.resolve()
        if not HASH_NAME.fullmatch(blob.name) or not blob.is_file() or blob.stat().st_mtime < since:
            continue
        if not has_hash(blob, blob.name):
            file.unlink()
            blob.unlink(missing_ok=True)
            raise OSError(f"{file.name} was damaged on its way, and is removed")


def sweep_partial_downloads(blobs: Path) -> None:
    """Remove parts of downloads that ended a day ago or earlier."""
    for stray in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - stray.stat().st_mtime > SWEEP_SECONDS:
                stray.unlink()


def has_hash(file: Path, name: str) -> bool:
    """Whether the content of a file has the hash that is its name in the cache."""
    return (file_sha256(file) if len(name) == 64 else git_blob_sha1(file)) == name


def git_blob_sha1(file: Path) -> str:
    """The name that git gives a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
