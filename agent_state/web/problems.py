"""What went wrong, as problem details (RFC 9457), and which status each typed error has.

A problem has no ``type`` of its own; ``code`` is the word for programs. The detail of a client's
mistake is the error's own message, without path or key. What went wrong on the server's side is
told in general words, and logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    InvalidKeyError,
    LeaseLostError,
    LockTimeoutError,
    OffTheRecordError,
    RevisionConflictError,
    SchemaTooNewError,
    SerializationError,
    SessionEndedError,
    StateCorruptedError,
    StateDirectoryInUseError,
    StateNotFoundError,
    StateValidationError,
    StorageError,
    StorageFullError,
)

MEDIA_TYPE = "application/problem+json"
_LONGEST = 500
_logger = logging.getLogger("agent_state.web")

Told = tuple[int, str, str | None, int | None]
"""Status, code, what is said instead of the error's message, seconds to wait before retrying."""

TOLD: dict[type[AgentStateError], Told] = {
    StateNotFoundError: (404, "not_found", None, None),
    StateValidationError: (422, "invalid", None, None),
    SerializationError: (422, "not_json", None, None),
    InvalidKeyError: (422, "invalid_id", None, None),
    RevisionConflictError: (409, "conflict", None, None),
    SessionEndedError: (410, "ended", None, None),
    OffTheRecordError: (409, "off_the_record", None, None),
    LeaseLostError: (409, "held_elsewhere", None, None),
    LockTimeoutError: (503, "busy", "Somebody else holds the lock; nothing was changed.", 1),
    StorageFullError: (503, "storage_full", "The disk is full; nothing was changed.", 30),
    DurabilityUnknownError: (
        503,
        "durability_unknown",
        "The change was made, but the disk did not confirm it.",
        5,
    ),
    StorageError: (503, "storage", "The disk said no; nothing was changed.", 5),
    StateDirectoryInUseError: (503, "directory_in_use", "Another process owns the directory.", 5),
    StateCorruptedError: (500, "corrupted", "What is stored cannot be read.", None),
    SchemaTooNewError: (500, "schema_too_new", "A newer version of the server wrote this.", None),
    AgentStateError: (500, "internal", "Something went wrong on the server.", None),
}
_INTERNAL: Told = TOLD[AgentStateError]


class Problem(HTTPException):
    """An answer that is no result. ``code`` is the word for programs."""

    def __init__(
        self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.code = code


def read_only() -> Problem:
    """Another process owns the directory, and this server only reads it."""
    return Problem(
        409, "read_only", "This server only reads the directory; it cannot change anything."
    )


def no_runtime() -> Problem:
    """The server runs no agents."""
    return Problem(409, "no_runtime", "This server runs no agents.")


def too_many(what: str) -> Response:
    """There are as many of something as there may be."""
    return answer(503, "too_many", what, {"Retry-After": "5"})


def install(app: FastAPI) -> None:
    """Let every error of the app be told as a problem."""
    app.add_exception_handler(AgentStateError, _typed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http)


def told(error: BaseException) -> Response:
    """The problem that an error is, logged when it is the server's."""
    kind = next((TOLD[cls] for cls in type(error).__mro__ if cls in TOLD), _INTERNAL)
    status, code, instead, wait = kind
    if status >= 500:
        _logger.error("%s", error, exc_info=error if status == 500 else None)
    detail = instead or str(getattr(error, "message", ""))
    headers = {} if wait is None else {"Retry-After": str(wait)}
    return answer(status, code, detail, headers)


def answer(
    status: int,
    code: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Response:
    """A response with problem details."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail[:_LONGEST],
        **(more or {}),
    }
    # ASCII, since a wrong field may be named by half a surrogate pair.
    return Response(json.dumps(body), status, dict(headers or {}), MEDIA_TYPE)


async def _typed(_: Request, error: Exception) -> Response:
    return told(error)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)  # noqa: S101  # what it is registered for
    headers = dict(error.headers or {})
    if isinstance(error, Problem):
        return answer(error.status_code, error.code, str(error.detail), headers)
    if error.status_code == 400:  # the framework's word for a body that is not UTF-8, or too deep
        return answer(422, "invalid", "The body cannot be parsed.", headers)
    code = HTTPStatus(error.status_code).name.lower()
    return answer(error.status_code, code, str(error.detail), headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  # what it is registered for
    # Not the input itself: it may be large, or somebody's secret.
    errors = [
        {"at": ".".join(str(part) for part in one["loc"])[:_LONGEST], "what": one["msg"]}
        for one in error.errors()[:20]
    ]
    first = f"{errors[0]['at']}: {errors[0]['what']}" if errors else "The request is not valid."
    return answer(422, "invalid", first, more={"errors": errors})


_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}

_MEANING = {
    401: "No token that is known here.",
    403: "The token does not open this.",
    404: "There is no such thing.",
    409: "It cannot be done as things are.",
    410: "It has expired, or was destroyed.",
    413: "The body is larger than this server takes.",
    421: "This server does not answer for that host.",
    422: "The request is not what this operation takes.",
    503: "Not now; Retry-After says when to try again.",
}


def documented(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses for these statuses."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _MEANING[status], "content": content} for status in statuses}


def schema() -> dict[str, Any]:
    """The JSON schema of a problem."""
    return _SCHEMA
