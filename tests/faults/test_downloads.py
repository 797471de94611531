"""A hub that lies, breaks off or is somebody else costs one message, and what has arrived stays."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from llm_quest.errors import MissingError, QuestError
from llm_quest.hub.locate import CONFIG_FILES, download_snapshot

COMMIT = "0" * 39 + "1"
CONFIG = json.dumps({"model_type": "llama", "padding": "x" * 4000}).encode()


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
            cut = kind == "breaks off" and self.command == "GET"
            body = CONFIG[:100] if cut else CONFIG
            self.reply(200, body, len(CONFIG), X_Repo_Commit=COMMIT, ETag='"abc"')
            self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    huggingface_hub.close_session()


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
    ],
)
def test_a_hub_that_fails_is_one_message_that_says_what_to_do(hub, kind: str):
    hub.kind = kind
    with pytest.raises(QuestError) as caught:
        download_snapshot("some/model", list(CONFIG_FILES), None)
    assert isinstance(caught.value, MissingError)
    assert "hf download some/model" in str(caught.value)
    assert "some/model" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_broke_off_is_fetched_when_it_is_asked_for_again(hub):
    hub.kind = "breaks off"
    with pytest.raises(MissingError):
        download_snapshot("some/model", list(CONFIG_FILES), None)
    hub.kind = "works"
    folder = download_snapshot("some/model", list(CONFIG_FILES), None)
    assert (folder / "config.json").read_bytes() == CONFIG
