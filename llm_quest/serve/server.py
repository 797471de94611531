"""Starts the server: models with their batches, the engine's thread, the routes, a socket."""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn

from llm_quest.contracts import LogFn
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.generate import require_inference_mode
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.speculative.decoder import DraftSource, make_drafter
from llm_quest.generation.stopping import end_token_ids
from llm_quest.hub.pooling import Pooling
from llm_quest.models.decoder import Decoder
from llm_quest.serve.app import HttpLimits, QuestServer
from llm_quest.serve.batch import BatchLimits, RunningBatch
from llm_quest.serve.engine import ServingEngine
from llm_quest.serve.images import BODY_BYTES, ImageReader
from llm_quest.serve.metrics import ServerMetrics
from llm_quest.serve.outbox import Outbox
from llm_quest.serve.security import AccessRules, make_access_rules
from llm_quest.serve.service import ServedModel

DEFAULT_CONTEXT = 4096
"""The longest context that a server has unless it is told to: slots x context positions are its memory."""
BACKLOG = 2048
HEADER_BYTES = 64 * 1024
SHUTDOWN_SECONDS = 5
SWITCH_SECONDS = 0.0005
"""Python's switch interval: how long the engine's thread waits at most for the lock that the event loop holds. With
Python's own 5 ms it waited a third longer."""


@dataclass(frozen=True)
class LoadedModel:
    """A model to serve. defaults: how it is sampled where a request says nothing. parent: of an adapter, the name of
    its base. pooling: None: it makes no embeddings. draft: whose proposals the inside view shows. images: what reads
    images, whose decoder is the model."""

    model: Decoder
    tokenizer: Tokenizer
    defaults: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    pooling: Pooling | None = None
    draft: DraftSource | None = None
    images: ImageReader | None = None


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, who may use it, and what a request may take. max_model_len: None: the model's context, at
    most DEFAULT_CONTEXT. port: 0: any that is free."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_hosts: Sequence[str] = ()
    allow_origins: Sequence[str] = ()
    slots: int = 16
    max_model_len: int | None = None
    max_waiting: int = 256
    prefix_mib: int = 256
    limits: HttpLimits = field(default_factory=HttpLimits)
    log_requests: bool = False
    log_prompts: bool = False
    inside: bool = False

    def access_rules(self) -> AccessRules:
        """Who may ask. UsageError for a server that anybody could use, DataError for a file without keys."""
        return make_access_rules(self.host, self.api_key_file, self.allow_hosts, self.allow_origins)

    def batch_limits(self, model: Decoder) -> BatchLimits:
        """The limits of a model's batch. UsageError for a context that the model does not have."""
        context = int(model.config.max_position_embeddings)
        length = min(context, DEFAULT_CONTEXT) if self.max_model_len is None else self.max_model_len
        if length > context:
            raise UsageError(f"--max-model-len {length} is more than the model's context of {context}")
        return BatchLimits(slots=self.slots, max_model_len=length, prefix_bytes=self.prefix_mib * 2**20)


def make_server(
    models: Mapping[str, LoadedModel], options: ServeOptions, rules: AccessRules, log: LogFn
) -> QuestServer:
    """A server of these models, by name; the first one answers requests that name none. Its engine is not started."""
    served = {name: serve_model(name, model, options) for name, model in models.items()}
    limits = options.limits
    if any(model.images for model in models.values()):
        limits = replace(limits, body_bytes=max(limits.body_bytes, BODY_BYTES))
    outbox = Outbox()
    engine = ServingEngine(
        {name: one.batch for name, one in served.items()},
        max_waiting=options.max_waiting,
        log=log,
        after_step=outbox.flush,
    )
    return QuestServer(
        served, engine, outbox, rules, limits,
        log=log, log_requests=options.log_requests, log_prompts=options.log_prompts, inside=options.inside,
    )  # fmt: skip


def serve_model(name: str, loaded: LoadedModel, options: ServeOptions) -> ServedModel:
    model = loaded.model
    require_inference_mode(model)
    if loaded.draft is not None:
        make_drafter(loaded.draft, model, SamplingParams())  # UsageError here for one that cannot draft for this model
    batch = RunningBatch(model, options.batch_limits(model), ServerMetrics(), loaded.images)
    return ServedModel(
        name,
        loaded.tokenizer,
        batch,
        end_token_ids(model, loaded.tokenizer),
        loaded.defaults,
        loaded.parent,
        loaded.pooling,
        loaded.draft,
        loaded.images,
    )


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. UsageError for a port that is in use or may not be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)  # Windows, where SO_REUSEADDR shares a port that is in use
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if exclusive is None else exclusive, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        used = error.errno == errno.EADDRINUSE
        why = "is in use: another server runs there" if used else f"cannot be used ({error.strerror or error})"
        raise UsageError(f"port {port} of {host} {why}; give another --port or --host") from None
    return listener


def http_server(server: QuestServer) -> uvicorn.Server:
    """Uvicorn for the application: it logs no request line, which may hold what was asked."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        server.app,
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def run_server(server: QuestServer, listener: socket.socket, http: uvicorn.Server) -> None:
    """Serve until SIGINT or SIGTERM; running requests have a few seconds to end."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    server.engine.start()
    try:
        http.run(sockets=[listener])
    finally:
        server.engine.stop()
        for one in server.served.values():
            one.close()
        listener.close()
        sys.setswitchinterval(interval)
