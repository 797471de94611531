"""Who may ask: the key, and the names under which a browser may reach this server.

A page of any site can send requests to 127.0.0.1, and a site whose name resolves to 127.0.0.1 can read the answers (DNS
rebinding). So `Host` must be a name of this server, and `Origin`, which browsers send, must be the server's own or one
that was allowed. A POST must be application/json, which a page cannot send elsewhere without asking first."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_quest.errors import DataError, UsageError
from llm_quest.serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_KEY_CHARACTERS = 8
OPEN_PATHS = ("/health", "/inside", "/inside/page.js", "/inside/page.css")
"""Paths that need no key: none of them shows anything of a request."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class AccessRules:
    """Who may use the server. keys: any of them opens the server; none: no key is asked for. names: under which it is
    reached. origins: of other pages that may use it. any_address: it listens on a network, where it is reached by any
    of its addresses."""

    keys: tuple[bytes, ...] = ()
    names: tuple[str, ...] = LOOPBACK_NAMES
    origins: tuple[str, ...] = ()
    any_address: bool = False

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """ApiError 403 or 401 for a request that may not pass."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.knows_host(host_name(host)):
            raise ApiError(403, "this server is not known under that Host; see --allow-host", code="host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in (f"http://{host}", f"https://{host}", *self.origins):
            raise ApiError(403, "pages of that Origin may not use this server; see --allow-origin", code="origin")
        if self.keys and path not in OPEN_PATHS and not self.knows_key(headers.get(b"authorization", b"")):
            raise ApiError(
                401, "the API key is missing or wrong", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )

    def knows_host(self, name: str) -> bool:
        return name in self.names or (self.any_address and is_address(name))

    def knows_key(self, authorization: bytes) -> bool:
        """Whether `Bearer KEY` has one of the keys, compared in constant time."""
        scheme, _, key = authorization.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return scheme.lower() == b"bearer" and any(matches)


def host_name(host: str) -> str:
    """The name in a Host header, without its port and without the brackets of IPv6, in small letters."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def make_access_rules(host: str, key_file: Path | None, hosts: Sequence[str], origins: Sequence[str]) -> AccessRules:
    """The rules of a server that listens on this host. UsageError for one that anybody could use."""
    keys = () if key_file is None else read_keys(key_file)
    if host not in LOOPBACK_NAMES and not keys:
        raise UsageError(f"--host {host} can be reached by others: give --api-key-file FILE, or leave --host out")
    names = {*LOOPBACK_NAMES, host.lower(), *(name.lower() for name in hosts)}
    return AccessRules(keys, tuple(sorted(names)), tuple(origins), any_address=host not in LOOPBACK_NAMES)


def read_keys(file: Path) -> tuple[bytes, ...]:
    """The keys of a file, one in a line; empty lines and lines that begin with # are no keys."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}: give a file with one API key in each line") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: an API key has ASCII characters only") from None
    keys = tuple(line.encode() for line in lines if line and not line.startswith("#"))
    if not keys:
        raise DataError(f"{file} has no API key: write one in each line")
    if any(len(key) < MIN_KEY_CHARACTERS or b" " in key for key in keys):
        raise DataError(f"{file}: an API key has at least {MIN_KEY_CHARACTERS} characters and no space")
    return keys


class AccessGuard:
    """Checks every request before the routes see it, and answers a browser that asks for an allowed page."""

    def __init__(self, app: ASGIApp, rules: AccessRules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        cross = self.cross_origin_headers(headers)
        try:
            if cross and scope["method"] == "OPTIONS":
                self.rules.check("/health", headers)
                await send_body(send, 204, {}, b"", cross)
                return
            self.rules.check(scope["path"], headers)
        except ApiError as error:
            body = json.dumps(error.body()).encode()
            await send_body(send, error.status, error.headers or {}, body, (*HEADERS, *cross))
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                added = [pair for pair in (*HEADERS, *cross) if pair[0] not in names]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def cross_origin_headers(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """What lets a page of an allowed origin read the answer."""
        origin = headers.get(b"origin", b"")
        if origin.decode("latin-1") not in self.rules.origins:
            return ()
        return (
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"vary", b"Origin"),
        )


async def send_body(
    send: Send, status: int, headers: Mapping[str, str], body: bytes, more: Sequence[tuple[bytes, bytes]]
) -> None:
    """A whole answer, as JSON."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    length = (b"content-length", str(len(body)).encode())
    kind = (b"content-type", b"application/json")
    await send({"type": "http.response.start", "status": status, "headers": [*pairs, *more, length, kind]})
    await send({"type": "http.response.body", "body": body})
