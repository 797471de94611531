"""A hub that lies, breaks off or is somebody else costs one message, and what has arrived stays."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
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
        if kind == "breaks off":
            self.reply(status, b"" if first else body[:4000], len(body), **tag)
        elif kind in ("one break", "another place", "another file") and not first:
            self.reply(status, body[:4000], len(body), **tag)
        elif kind == "another place" and first:
            self.reply(206, CONFIG[: len(body)], Content_Range=f"bytes 0-{len(body) - 1}/{len(CONFIG)}", **tag)
        elif kind == "another file" and first:
            self.reply(206, body[::-1], Content_Range=place, **tag | {"ETag": f'"{"1" * 64}"'})
        elif kind == "other bytes":
            self.reply(200, CONFIG[::-1], **tag)
        elif kind == "gzip":
            self.reply(200, gzip.compress(CONFIG), Content_Encoding="gzip", **tag)
        elif kind == "more than it says":
            self.reply(200, CONFIG + b"x" * 99, len(CONFIG) + 99, **tag)
        elif kind == "less than it says":
            self.reply(200, CONFIG[:-9], len(CONFIG) - 9, **tag)
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
            self.reply(status, body, **tag | ({"Content_Range": place} if first else {}))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.ranges = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
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


DAMAGE = ("another place", "another file", "other bytes")


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
def test_a_hub_that_fails_is_one_message_that_says_what_to_do(hub, kind: str, tmp_path):
    hub.kind = kind
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
    hub.kind = lie
    message = ""
    try:
        download_snapshot("some/model", list(CONFIG_FILES), None)
    except MissingError as error:
        message = str(error)
    assert whole_files(tmp_path) == ([] if message else [CONFIG])
    assert len(message.splitlines()) <= 1
    assert ("damaged on its way" in message) == (lie in DAMAGE)
    assert (hub.ranges[-1] == 4000) == (lie in ("one break", "another place", "another file"))
    hub.kind = "works"
    folder = download_snapshot("some/model", list(CONFIG_FILES), None)
    assert (folder / "config.json").read_bytes() == CONFIG


def test_a_download_that_trickles_is_given_up_and_told(hub, tmp_path, monkeypatch):
    """A byte each hundredth of a second: no read of it takes long."""
    monkeypatch.setattr("llm_quest.hub.download_rate.WINDOW_SECONDS", 0.1)
    monkeypatch.setattr("llm_quest.hub.download_rate.MIN_BYTES_PER_SECOND", 1e6)
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
    (stray,) = tmp_path.rglob("*.incomplete")
    assert hub.ranges[-1] == 0, "huggingface_hub goes on with it: say so in docs/reliability.md"
    day_before = time.time() - 2 * 24 * 3600
    os.utime(stray, (day_before, day_before))
    download_snapshot("some/model", list(CONFIG_FILES), None)
    assert not stray.exists()


def test_a_part_of_a_file_is_fetched_again_by_the_next_command_and_a_whole_one_is_not(hub, tmp_path):
    """What docs/reliability.md says of `huggingface_hub`: it goes on within a command, and deletes the part at its
    end."""
    hub.kind = "breaks off"
    with pytest.raises(MissingError):
        download_snapshot("some/model", list(CONFIG_FILES), None)
    assert hub.ranges[-1] == 4000, "the rest is asked for within the command"
    assert not list(tmp_path.rglob("*.incomplete"))
    hub.kind = "works"
    download_snapshot("some/model", list(CONFIG_FILES), None)
    assert hub.ranges[-1] == 0
    asked = len(hub.ranges)
    download_snapshot("some/model", list(CONFIG_FILES), None)
    assert len(hub.ranges) == asked, "a whole file is fetched again"


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


@pytest.mark.parametrize("call", range(0, 24, 3))
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
    folder = download_snapshot("some/model", list(CONFIG_FILES), None)
    assert (folder / "config.json").read_bytes() == CONFIG
