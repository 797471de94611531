"""The routes of the server (Starlette): bodies come in with limits, answers go out whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_quest import __version__
from llm_quest.contracts import LogFn
from llm_quest.errors import QuestError
from llm_quest.serve.answers import AnswerWriter, Part, make_answer
from llm_quest.serve.embeddings import EmbeddingsBody, answer_embeddings, read_inputs
from llm_quest.serve.engine import QueueFull, ServingEngine
from llm_quest.serve.errors import ApiError, queue_full
from llm_quest.serve.inside_routes import InsideViews
from llm_quest.serve.metrics import render_metrics
from llm_quest.serve.outbox import Mailbox, Outbox, unless_ended
from llm_quest.serve.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse_body
from llm_quest.serve.requests import GenerationRequest, RequestFailed
from llm_quest.serve.security import AccessGuard, AccessRules
from llm_quest.serve.service import RequestOptions, ServedModel, chat_request, completion_requests, model_samples

PING_SECONDS = 10.0
LEFT = 499
"""The status of a request whose client left, in the log."""
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclass(frozen=True)
class HttpLimits:
    """Limits of one HTTP connection. body_bytes: of a request; body_seconds: until all of it has come; request_seconds:
    until its answer is complete."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    request_seconds: float = 600.0


class QuestServer:
    """The application's state and its routes. log_prompts: whether the log may hold what was asked. inside: whether the
    last texts are kept, for the inside view."""

    def __init__(
        self,
        served: Mapping[str, ServedModel],
        engine: ServingEngine,
        outbox: Outbox,
        rules: AccessRules,
        limits: HttpLimits,
        *,
        log: LogFn,
        log_requests: bool = False,
        log_prompts: bool = False,
        inside: bool = False,
    ):
        self.served, self.engine, self.outbox, self.limits = served, engine, outbox, limits
        self.log, self.log_requests, self.log_prompts = log, log_requests or log_prompts, log_prompts
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/version", self.version),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]
        self.inside = InsideViews(engine) if inside else None
        routes += self.inside.routes() if self.inside else []
        handlers = {ApiError: answer_error, HTTPException: answer_error, Exception: answer_error}
        guard = Middleware(AccessGuard, rules=rules)
        self.app = Starlette(routes=routes, exception_handlers=handlers, middleware=[guard])  # type: ignore[arg-type]

    # --- about the server

    async def health(self, request: Request) -> Response:
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [describe_model(one) for one in self.served.values()]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(describe_model(self.find_model(request.path_params["name"])))

    async def metrics(self, request: Request) -> Response:
        text = render_metrics(model_samples(one) for one in self.served.values())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def find_model(self, name: str | None) -> ServedModel:
        """The model of this name. ApiError 404 for one that is not served."""
        if name is None:
            return next(iter(self.served.values()))
        if name not in self.served:
            known = ", ".join(self.served)
            message = f"there is no model {name[:200]!r} here; it serves {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.served[name]

    # --- tokens

    async def tokenize(self, request: Request) -> Response:
        body = await self.read(request, TokenizeBody)
        served = self.find_model(body.model)
        ids = await run_in_threadpool(served.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": served.max_model_len})

    async def detokenize(self, request: Request) -> Response:
        body = await self.read(request, DetokenizeBody)
        served = self.find_model(body.model)
        if wrong := [token for token in body.tokens if token >= served.tokenizer.vocab_size]:
            raise ApiError(400, f"token {wrong[0]} does not exist", param="tokens")
        return JSONResponse({"prompt": served.tokenizer.decode(body.tokens, keep_special_tokens=True)})

    # --- text

    async def embeddings(self, request: Request) -> Response:
        body = await self.read(request, EmbeddingsBody)
        served = self.find_model(body.model)
        texts = await run_in_threadpool(read_inputs, served, body)
        require_alive(self.engine)
        if self.engine.num_waiting >= self.engine.max_waiting:
            raise queue_full(self.engine.max_waiting)
        began, status = time.monotonic(), LEFT
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                answer = await unless_ended(
                    answer_embeddings(served, body, texts, self.engine), wait_until_left(request)
                )
            status = LEFT if answer is None else 200
            return Response(status_code=LEFT) if answer is None else JSONResponse(answer)
        except TimeoutError:
            status = 504
            raise ApiError(504, "the request took longer than this server allows", code="timeout") from None
        finally:
            self.log_end(f"embeddings {served.name}: {status}", served, texts, began)

    async def chat_completions(self, request: Request) -> Response:
        return await self.complete(request, await self.read(request, ChatBody))

    async def completions(self, request: Request) -> Response:
        return await self.complete(request, await self.read(request, CompletionBody))

    async def complete(self, request: Request, body: ChatBody | CompletionBody) -> Response:
        """Answer a request for text."""
        self.outbox.loop = asyncio.get_running_loop()
        served = self.find_model(body.model)
        options = RequestOptions(self.outbox.deliver, time.monotonic() + self.limits.request_seconds)
        try:
            requests = await run_in_threadpool(make_requests, served, body, options)
        except QuestError as error:
            raise ApiError(400, str(error)) from None
        answer = make_answer(served, requests, body)
        work = Work(self, answer, time.monotonic(), is_stream=body.stream)
        work.submit()
        if body.stream:
            return StreamingResponse(
                work.stream(include_usage=body.include_usage), headers=STREAM_HEADERS, media_type="text/event-stream"
            )
        return await work.collect(request)

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The body of a POST, within the limits."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise ApiError(415, "send Content-Type: application/json")
        too_large = ApiError(413, f"the body has more than {self.limits.body_bytes:,} bytes")
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.limits.body_bytes:
            raise too_large
        raw = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    raw += chunk
                    if len(raw) > self.limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.limits.body_seconds:g} s") from None
        except ClientDisconnect:
            raise ApiError(400, "the client left before the body had come") from None
        return await run_in_threadpool(parse_body, kind, bytes(raw))

    def log_end(self, entry: str, served: ServedModel, prompts: Sequence[Sequence[int]], began: float) -> None:
        """A line about a finished request; its prompts only if that was asked for."""
        if not self.log_requests:
            return
        line = f"{entry}, {sum(map(len, prompts))} tokens read, {time.monotonic() - began:.2f} s"
        if self.log_prompts:
            line += "".join(f"\n  {served.tokenizer.decode(prompt)!r}" for prompt in prompts)
        self.log(line)


def make_requests(
    served: ServedModel, body: ChatBody | CompletionBody, options: RequestOptions
) -> list[GenerationRequest]:
    """The engine's requests for a body."""
    if isinstance(body, CompletionBody):
        return completion_requests(served, body, options)
    return [chat_request(served, body, options)]


class Work:
    """The requests of one body while they run. Whatever ends it frees their slots."""

    def __init__(self, server: QuestServer, answer: AnswerWriter, began: float, *, is_stream: bool):
        self.server, self.answer, self.began = server, answer, began
        self.mailbox = Mailbox(is_stream=is_stream)

    def submit(self) -> None:
        """Queue the requests. ApiError 429 where too many wait, 503 where the engine has stopped."""
        engine, requests = self.server.engine, self.answer.requests
        require_alive(engine)
        self.server.outbox.mailboxes |= {request.number: self.mailbox for request in requests}
        try:
            for one in requests:
                engine.submit(self.answer.served.name, one)
        except QueueFull:
            self.release(429)
            raise queue_full(engine.max_waiting) from None

    def release(self, status: int) -> None:
        """Forget the requests; those that still run are cancelled."""
        for one in self.answer.requests:
            self.server.outbox.mailboxes.pop(one.number, None)
            if not self.answer.is_finished:
                self.server.engine.cancel(one)
        if self.server.inside and self.answer.is_finished:
            self.server.inside.keep(self.answer)
        answer, prompts = self.answer, [request.prompt for request in self.answer.requests]
        line = f"{answer.id} {answer.served.name}: {status}, {answer.usage['completion_tokens']} tokens made"
        self.server.log_end(line, answer.served, prompts, self.began)

    async def parts(self) -> AsyncIterator[list[Part] | None]:
        """The parts of choices as they are made; None where nothing came for a while."""
        while not self.answer.is_finished:
            parts: list[Part] = []
            failed: RequestFailed | None = None
            events = await self.mailbox.read(PING_SECONDS)
            for request, event in events:
                if isinstance(event, RequestFailed):
                    failed = event
                    break
                parts += self.answer.read(request, event)
            yield parts if events else None
            if failed is not None:
                raise ApiError(failed.status, failed.message, code=failed.code)

    async def stream(self, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        status = LEFT
        before, after = open_event(self.answer.chunk([], with_usage=include_usage))
        try:
            async for parts in self.parts():
                if parts is None:
                    yield ": ping\n\n"
                elif parts:
                    yield "".join(f"{before}{ENCODER.encode(part)}{after}" for part in parts)
            if include_usage:
                yield to_event(self.answer.usage_chunk())
            status = 200
            yield "data: [DONE]\n\n"
        except ApiError as error:
            status = error.status
            yield to_event(error.body())
        finally:
            self.release(status)

    async def collect(self, request: Request) -> Response:
        """The whole answer, unless the client leaves before."""
        status = LEFT
        try:
            whole = await unless_ended(self.gather(), wait_until_left(request))
            status = LEFT if whole is None else 200
            return Response(status_code=LEFT) if whole is None else JSONResponse(whole)
        except ApiError as error:
            status = error.status
            raise
        finally:
            self.release(status)

    async def gather(self) -> dict[str, Any]:
        async for _ in self.parts():
            pass
        return self.answer.whole()


def require_alive(engine: ServingEngine) -> None:
    """ApiError 503 where the engine has stopped."""
    if not engine.is_alive:
        raise ApiError(503, "the engine has stopped", headers={"retry-after": "10"})


async def wait_until_left(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def to_event(value: Mapping[str, Any]) -> str:
    return f"data: {ENCODER.encode(value)}\n\n"


def open_event(chunk: Mapping[str, Any]) -> tuple[str, str]:
    """What stands before and behind the choice in each event of a stream. chunk: one without choices. (No text in it
    can look like an empty list of choices: JSON escapes its quotes.)"""
    before, _, after = to_event(chunk).partition('"choices":[]')
    return f'{before}"choices":[', f"]{after}"


def describe_model(served: ServedModel) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    description = {"id": served.name, "object": "model", "created": served.created, "owned_by": "llm-quest"}
    return description | {"root": served.name, "parent": served.parent, "max_model_len": served.max_model_len}


async def answer_error(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's form."""
    if isinstance(error, HTTPException):
        messages = {404: "there is no such path here", 405: f"{request.method} is not for this path"}
        error = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    if isinstance(error, QuestError):
        error = ApiError(400, str(error))
    if not isinstance(error, ApiError):
        error = ApiError(500, f"an error of the server: {type(error).__name__}")
    return JSONResponse(error.body(), error.status, dict(error.headers or {}))
