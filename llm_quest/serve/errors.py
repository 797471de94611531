"""Errors of the HTTP interface, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""error.type by status; another 4xx is an invalid_request_error, a 5xx a server_error."""


class ApiError(Exception):
    """An answer other than 200. param: the field that is wrong; code: what programs compare."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def queue_full(waiting: int) -> ApiError:
    """429, where so many requests wait already."""
    message = f"{waiting} requests wait already; try again later"
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
