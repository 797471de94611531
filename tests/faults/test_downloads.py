"""A hub that lies, breaks off or is somebody else costs one message, and what has arrived stays."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from llm_quest.errors import MissingError, QuestError
from llm_quest.hub.locate import CONFIG_FILES, download_snapshot
from tests.faults.failing_files import failing_files

PACKAGE = Path(__file__).parents[2] / "llm_quest"
COMMIT = "0" * 39 + "1"
CONFIG = json.dumps({"model_type": "llama", "padding": "x" * 40_000}).encode()
DIGEST = hashlib.sha256(CONFIG).hexdigest()
"""The ETag of a large file on the hub is its sha256."""


class Hub(BaseHTTPRequestHandler):
    """A hub with one file, and one way of failing (`server.kind`)."""

    def log_message(self, *given: object) -> None:
        pass

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        sent = {"Content-Length": str(len(body) if length is None else length), **headers}
        for name, value in sent.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        kind = self.server.kind  # type: ignore[attr-defined]
        if kind == "closes at once":
            self.connection.close()
        elif kind == "a portal's page":
            self.reply(200, b"<html>Log in to the hotel's network</html>")
        elif kind == "redirects without end":
            self.reply(302, b"", Location=self.path)
        elif kind == "a server error":
            self.reply(500, b"oops")
        elif "/tree/" in self.path:
            entry = {"type": "file", "path": "config.json", "size": len(CONFIG), "oid": "abc"}
            self.reply(200, b"[" if kind == "half an answer" else json.dumps([entry]).encode())
        elif "/api/models/" in self.path:
            info = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}], "private": False}
            self.reply(
                200, b"{" if kind == "half an answer" else json.dumps(info).encode(), Content_Type="application/json"
            )
        else:
            if kind == "a page in place of the file" and self.command == "GET":
                self.reply(200, b"<html>Log in</html>", X_Repo_Commit=COMMIT, ETag='"abc"')
                return
            self.reply_file(kind)
            self.close_connection = True

    def reply_file(self, kind: str) -> None:
        """The file, or the part of it that Range asks for."""
        tag = {"X_Repo_Commit": COMMIT, "ETag": f'"{DIGEST}"'}
        if self.command == "HEAD":
            self.reply(200, b"", len(CONFIG), **tag)
            return
        first = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.server.ranges.append(first)  # type: ignore[attr-defined]
        status, body = (206, CONFIG[first:]) if first else (200, CONFIG)
        place = f"bytes {first}-{len(CONFIG) - 1}/{len(CONFIG)}"
        if first:
            tag["Content_Range"] = place
        if first >= len(CONFIG):
            self.reply(416, b"")
        elif kind == "breaks off":
            self.reply(status, b"" if first else body[:4000], len(body), **tag)
        elif kind in ("one break", "another place", "another file") and not first:
            self.reply(status, body[:4000], len(body), **tag)
        elif kind == "another place" and first:
            self.reply(206, CONFIG[: len(body)], **tag | {"Content_Range": f"bytes 0-{len(body) - 1}/{len(CONFIG)}"})
        elif kind == "another file" and first:
            self.reply(206, body[::-1], **tag | {"ETag": f'"{"1" * 64}"'})
        elif kind == "other bytes":
            self.reply(200, CONFIG[::-1], **tag)
        elif kind == "gzip":
            self.reply(200, gzip.compress(CONFIG), Content_Encoding="gzip", **tag)
        elif kind == "more than it says":
            self.reply(200, CONFIG + b"x" * 99, len(CONFIG) + 99, **tag)
        elif kind == "less than it says":
            self.reply(status, body[:-9], len(body) - 9, **tag)
        elif kind == "too many requests":
            self.reply(429, b"slow down", Retry_After="1")
        elif kind == "silence":
            self.reply(status, body[:100], len(body), **tag)
            threading.Event().wait(1.0)
        elif kind == "headers alone":
            self.reply(status, b"", len(body), **tag)
            threading.Event().wait(1.0)
        elif kind == "a trickle":
            begin = 0 if first else 1000
            self.reply(status, body[:begin], len(body), **tag)
            with contextlib.suppress(OSError):
                for number in range(begin, len(body)):
                    threading.Event().wait(0.01)
                    self.wfile.write(body[number : number + 1])
        elif kind == "a slow line":
            self.reply(status, body[:20_000], len(body), **tag)
            threading.Event().wait(0.3)
            with contextlib.suppress(OSError):
                self.wfile.write(body[20_000:])
        else:
            self.reply(status, body, **tag)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.ranges = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    huggingface_hub.close_session()


WRONG = {
    "another place": "the server answers with another file",
    "another file": "damaged on its way",
    "other bytes": "damaged on its way",
}


def whole_files(folder: Path) -> list[bytes]:
    """The contents of what has its final name."""
    return [file.read_bytes() for file in folder.rglob("config.json")]


@pytest.mark.parametrize(
    "kind",
    [
        "closes at once",
        "a portal's page",
        "a server error",
        "half an answer",
        "breaks off",
        "redirects without end",
        "a page in place of the file",
        "other bytes",
        "more than it says",
        "less than it says",
        "too many requests",
        "silence",
        "headers alone",
    ],
)
def test_a_hub_that_fails_is_one_message_that_says_what_to_do(hub, kind: str, tmp_path, monkeypatch):
    hub.kind = kind
    if kind in ("silence", "headers alone"):  # six times
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    with pytest.raises(QuestError) as caught:
        download_snapshot("some/model", list(CONFIG_FILES), None)
    assert isinstance(caught.value, MissingError)
    assert "hf download some/model" in str(caught.value)
    assert "some/model" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not whole_files(tmp_path)


@pytest.mark.parametrize("lie", ["works", "one break", "gzip", "another place", "another file", "other bytes"])
def test_what_broke_off_is_fetched_when_it_is_asked_for_again(hub, lie: str, tmp_path):
    """A line that breaks once goes on where it was; where the server then sends another part, or of another file, that
    is noticed, and the next try is whole."""
    hub.kind = "breaks off"
    with pytest.raises(MissingError):
        download_snapshot("some/model", list(CONFIG_FILES), None)
    hub.kind, asked = lie, len(hub.ranges)
    message = ""
    try:
        download_snapshot("some/model", list(CONFIG_FILES), None)
    except MissingError as error:
        message = str(error)
    assert whole_files(tmp_path) == ([] if message else [CONFIG])
    assert len(message.splitlines()) <= 1
    assert WRONG[lie] in message if lie in WRONG else not message
    assert 4000 in hub.ranges[asked:], "the rest is asked for"
    hub.kind = "works"
    folder = download_snapshot("some/model", list(CONFIG_FILES), None)
    assert (folder / "config.json").read_bytes() == CONFIG


def test_a_download_that_trickles_is_given_up_and_told(hub, tmp_path, monkeypatch):
    """A byte each hundredth of a second: no read of it takes long."""
    monkeypatch.setattr("llm_quest.hub.downloads.WINDOW_SECONDS", 0.1)
    monkeypatch.setattr("llm_quest.hub.downloads.MIN_BYTES_PER_SECOND", 1e6)
    hub.kind = "a trickle"
    begin = time.monotonic()
    with pytest.raises(MissingError, match=r"it sends \d+ bytes a second.*hf download some/model") as caught:
        download_snapshot("some/model", list(CONFIG_FILES), None)
    assert time.monotonic() - begin < 60, "forty thousand bytes would take 400 seconds"
    assert len(str(caught.value).splitlines()) == 1
    assert hub.ranges[-1] >= 1000, "the rest is asked for"
    assert not whole_files(tmp_path)
    hub.kind = "works"
    folder = download_snapshot("some/model", list(CONFIG_FILES), None)
    assert (folder / "config.json").read_bytes() == CONFIG


def test_a_download_that_was_killed_leaves_nothing_that_is_taken_for_whole(hub, tmp_path):
    hub.kind = "a slow line"
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            download_snapshot("some/model", list(CONFIG_FILES), None)
        os._exit(0)
    limit = time.monotonic() + 60
    while not any(file.stat().st_size for file in tmp_path.rglob("*.incomplete")):
        assert time.monotonic() < limit
        threading.Event().wait(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not whole_files(tmp_path)
    hub.kind = "works"
    assert (download_snapshot("some/model", list(CONFIG_FILES), None) / "config.json").read_bytes() == CONFIG
    assert hub.ranges[-1] >= 4000, "what the killed process has left is not fetched again"
    assert not list(tmp_path.rglob("*.incomplete"))


def incomplete_files(folder: Path) -> list[int]:
    """The sizes of what downloads have left."""
    return sorted(file.stat().st_size for file in folder.rglob("*.incomplete"))


def fetch_config() -> bytes:
    return (download_snapshot("some/model", list(CONFIG_FILES), None) / "config.json").read_bytes()


def leave_part(folder: Path, name: str, content: bytes) -> Path:
    """A file as a download leaves it that is killed."""
    part = folder / "hub/models--some--model/blobs" / f"{name}.{len(content):08x}.incomplete"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    return part


def test_the_next_command_goes_on_with_a_part_and_fetches_no_whole_file_again(hub, tmp_path):
    """At 60 % the line breaks for good; then a portal answers; then the line is well."""
    part = leave_part(tmp_path, DIGEST, CONFIG[: len(CONFIG) * 6 // 10])
    size = part.stat().st_size
    hub.kind = "silence"
    for kind in ("a portal's page", "a page in place of the file", "less than it says", "too many requests"):
        hub.kind = kind
        with pytest.raises(MissingError):
            fetch_config()
        assert size in incomplete_files(tmp_path), f"{kind}: what had come is lost"
    hub.kind = "works"
    assert fetch_config() == CONFIG
    assert hub.ranges[-1] == size
    assert incomplete_files(tmp_path) == []
    asked = len(hub.ranges)
    assert fetch_config() == CONFIG
    assert len(hub.ranges) == asked, "a whole file is fetched again"


@pytest.mark.parametrize("content", [CONFIG + b"x", CONFIG[:9000][::-1], CONFIG[::-1], b"", CONFIG])
def test_a_part_that_is_longer_wrong_empty_or_whole_costs_no_command(hub, content: bytes, tmp_path):
    """The longest that may be right is taken, others of this file are removed, and one of another file stays a day."""
    leave_part(tmp_path, DIGEST, content)
    other, old = leave_part(tmp_path, "1" * 64, CONFIG[:7000]), leave_part(tmp_path, "2" * 64, CONFIG[:8000])
    day_before = time.time() - 2 * 24 * 3600
    os.utime(old, (day_before, day_before))
    hub.kind = "works"
    assert fetch_config() == CONFIG
    assert list(tmp_path.rglob("*.incomplete")) == [other]
    assert hub.ranges[-1:] == ([] if content == CONFIG else [0])


def test_where_locks_are_granted_to_all_the_part_of_another_process_is_left_alone(hub, tmp_path, monkeypatch):
    """Some network file systems do: then what is there may be another process's, which goes on writing."""
    part = leave_part(tmp_path, DIGEST, CONFIG[:5000])
    monkeypatch.setattr("llm_quest.hub.downloads.FileLock", lambda *given, **options: contextlib.nullcontext())
    hub.kind = "works"
    assert fetch_config() == CONFIG
    assert hub.ranges == [0]
    assert part.read_bytes() == CONFIG[:5000]


def test_every_download_goes_on_and_is_verified():
    """What comes from the hub comes through one function, but for rows that the package `datasets` gets."""
    calls = re.compile(r"\b(hf_hub_download|snapshot_download|http_get|urlretrieve)\(")
    files = {file.name for file in PACKAGE.rglob("*.py") if calls.search(file.read_text(encoding="utf-8"))}
    assert files == {"downloads.py"}


def test_two_downloads_at_once_leave_one_whole_file(hub, tmp_path):
    hub.kind = "a slow line"
    found: list[bytes] = []

    def fetch() -> None:
        found.append((download_snapshot("some/model", list(CONFIG_FILES), None) / "config.json").read_bytes())

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [CONFIG, CONFIG]


@pytest.mark.parametrize("call", range(1, 24, 3))
def test_a_disk_that_is_full_while_a_file_arrives_is_one_message(hub, call: int, tmp_path):
    hub.kind = "works"
    (tmp_path / "hub").mkdir()
    with failing_files(tmp_path / "hub", "ENOSPC", call) as state:
        message = "No space left"
        try:
            download_snapshot("some/model", list(CONFIG_FILES), None)
        except QuestError as error:
            message = str(error)
    assert "No space left" in message
    assert len(message.splitlines()) == 1
    assert state.calls
    assert whole_files(tmp_path) in ([], [CONFIG])
    assert incomplete_files(tmp_path) == [], "other programs need the space"
    folder = download_snapshot("some/model", list(CONFIG_FILES), None)
    assert (folder / "config.json").read_bytes() == CONFIG
