"""A server of a tiny model, and an adapter of it, on a free port of loopback; a plain client that sends any bytes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.hub.pooling import Pooling
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.serve.app import QuestServer
from llm_quest.serve.server import LoadedModel, ServeOptions, bind_socket, http_server, make_server, run_server
from llm_quest.techniques.lora import LoRA
from tests.generation.test_generate import enlarge_weights
from tests.tokenizer_kinds import byte_level

Headers = Mapping[str, str]


def tiny_tokenizer() -> Tokenizer:
    return byte_level(False)


def tiny_model(tokenizer: Tokenizer) -> Decoder:
    return enlarge_weights(build(replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size), seed=1))


def tiny_adapter(tokenizer: Tokenizer) -> Decoder:
    """The same model with an adapter that changes its texts."""
    model = LoRA(rank=2, alpha=8)(tiny_model(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


class LocalServer:
    """A running server. lines: what it has logged."""

    def __init__(self, server: QuestServer, port: int, lines: list[str]):
        self.server, self.port, self.lines = server, port, lines
        self.url = f"http://127.0.0.1:{port}/v1"
        self.served = next(iter(server.served.values()))

    def ask(
        self, method: str, path: str, body: Any = None, headers: Headers = MappingProxyType({})
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON, or text) and headers of an answer. body: bytes are sent as they are."""
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(raw)), "Connection": "close"}
        given |= {"Content-Type": "application/json"} if body is not None else {}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (given | dict(headers)).items())]
        return parse_answer(self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw))

    def send(self, raw: bytes) -> bytes:
        """Send bytes; what comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(raw)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
        return received


def parse_answer(raw: bytes) -> tuple[int, Any, dict[str, str]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    is_json = headers.get("content-type", "").startswith("application/json")
    return int(status.split()[1]), json.loads(body) if is_json and body else body.decode(), headers


@contextmanager
def local_server(pooling: Pooling | None = None, draft: str | None = None, **options: Any) -> Iterator[LocalServer]:
    """A server of the tiny models in this process, until the end of the block."""
    tokenizer = tiny_tokenizer()
    models = {
        "tiny": LoadedModel(tiny_model(tokenizer), tokenizer, pooling=pooling, draft=draft),
        "adapted": LoadedModel(tiny_adapter(tokenizer), tokenizer, parent="tiny"),
    }
    with serving(models, **options) as server:
        yield server


@contextmanager
def serving(models: Mapping[str, LoadedModel], **options: Any) -> Iterator[LocalServer]:
    """A server of these models in this process, until the end of the block."""
    lines: list[str] = []
    settings = ServeOptions(**options)
    server = make_server(models, settings, settings.access_rules(), lines.append)
    listener = bind_socket("127.0.0.1", 0)
    http = http_server(server)
    thread = threading.Thread(target=run_server, args=(server, listener, http), daemon=True)
    thread.start()
    try:
        yield LocalServer(server, listener.getsockname()[1], lines)
    finally:
        http.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
