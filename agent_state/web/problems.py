"""Errors as problem details (RFC 9457), and the status of each typed error.

A problem has no ``type`` of its own; programs read ``code``. The detail of a client's error is the
error's own message, without path or key. An error of the server is logged, and described in
general words.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal, NamedTuple, get_args

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import BaseRoute, Match

from agent_state.errors import (
    AgentStateError,
    DedupeKeyReusedError,
    DurabilityUnknownError,
    EncryptionKeyError,
    ErasedKeyError,
    InvalidKeyError,
    LeaseLostError,
    LockTimeoutError,
    OffTheRecordError,
    PreconditionFailedError,
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
    UnmergedStateError,
)
from agent_state.web.answers import compressed

Code = Literal[
    "busy",
    "conflict",
    "corrupted",
    "directory_in_use",
    "durability_unknown",
    "encryption_key",
    "ended",
    "erased",
    "forbidden",
    "held_elsewhere",
    "internal",
    "invalid",
    "invalid_id",
    "key_reused",
    "method_not_allowed",
    "missing_extra",
    "no_runtime",
    "not_finished",
    "not_found",
    "not_json",
    "off_the_record",
    "precondition_failed",
    "precondition_required",
    "rate_limited",
    "read_only",
    "schema_too_new",
    "starting",
    "stopping",
    "storage",
    "storage_full",
    "too_large",
    "too_many",
    "unauthorized",
    "unmerged",
    "wrong_host",
    "wrong_origin",
]
"""What programs tell problems apart by."""

MEDIA_TYPE = "application/problem+json"
_LONGEST = 500
_logger = logging.getLogger("agent_state.web")


class ErrorMapping(NamedTuple):
    """The problem of a typed error."""

    status: int
    code: Code
    detail: str | None = None
    """The text of the response; None for the error's own message."""
    retry_after: int | None = None
    """Seconds after which the client may try again."""


MAPPINGS: dict[type[AgentStateError], ErrorMapping] = {
    StateNotFoundError: ErrorMapping(404, "not_found"),
    StateValidationError: ErrorMapping(422, "invalid"),
    DedupeKeyReusedError: ErrorMapping(422, "key_reused"),
    SerializationError: ErrorMapping(422, "not_json"),
    InvalidKeyError: ErrorMapping(422, "invalid_id"),
    RevisionConflictError: ErrorMapping(409, "conflict"),
    PreconditionFailedError: ErrorMapping(412, "precondition_failed"),
    SessionEndedError: ErrorMapping(410, "ended"),
    OffTheRecordError: ErrorMapping(409, "off_the_record"),
    LeaseLostError: ErrorMapping(409, "held_elsewhere"),
    LockTimeoutError: ErrorMapping(
        503, "busy", "Another process holds the lock; nothing was changed.", 1
    ),
    StorageFullError: ErrorMapping(
        503, "storage_full", "The disk is full; nothing was changed.", 30
    ),
    DurabilityUnknownError: ErrorMapping(
        503, "durability_unknown", "The change was made, but the disk did not confirm it.", 5
    ),
    StorageError: ErrorMapping(503, "storage", "The disk failed; nothing was changed.", 5),
    StateDirectoryInUseError: ErrorMapping(
        503, "directory_in_use", "Another process owns the directory.", 5
    ),
    UnmergedStateError: ErrorMapping(
        503, "unmerged", "Git has left a merge of the document unresolved; it cannot change.", 30
    ),
    StateCorruptedError: ErrorMapping(500, "corrupted", "The stored document cannot be read."),
    SchemaTooNewError: ErrorMapping(
        500, "schema_too_new", "A newer version of the server wrote this document."
    ),
    EncryptionKeyError: ErrorMapping(
        500, "encryption_key", "The key of the stored document is not available."
    ),
    ErasedKeyError: ErrorMapping(410, "erased"),
    AgentStateError: ErrorMapping(500, "internal", "The server failed."),
}
_INTERNAL = MAPPINGS[AgentStateError]
_OF_FRAMEWORK: dict[int, Code] = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class Problem(HTTPException):
    """The response to a request that failed, with a ``code`` for programs."""

    def __init__(
        self, status: int, code: Code, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.code = code


def read_only() -> Problem:
    """The server only reads the directory."""
    return Problem(
        409, "read_only", "This server only reads the directory; it cannot change anything."
    )


def no_runtime() -> Problem:
    """The server runs no agents; it has no runtime."""
    return Problem(409, "no_runtime", "This server runs no agents.")


def too_many(detail: str) -> Response:
    """A limit of the server is reached; the client may try again later."""
    return problem_response(503, "too_many", detail, {"Retry-After": "5"})


def install(app: FastAPI) -> None:
    """Let every error of the app be answered with a problem."""
    app.add_exception_handler(AgentStateError, _typed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http)


def problem_for(error: BaseException) -> Response:
    """The response for an error; an error of the server is logged."""
    kinds = (MAPPINGS[kind] for kind in type(error).__mro__ if kind in MAPPINGS)
    mapping = next(kinds, _INTERNAL)
    if mapping.status >= 500:
        _logger.error("%s", error, exc_info=error if mapping.status == 500 else None)
    detail = mapping.detail or str(getattr(error, "message", ""))
    retry_after = mapping.retry_after
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return problem_response(mapping.status, mapping.code, detail, headers)


def problem_response(
    status: int,
    code: Code,
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
    # ASCII, because a wrong field's name may be half of a surrogate pair.
    return Response(json.dumps(body), status, dict(headers or {}), MEDIA_TYPE)


async def _typed(request: Request, error: Exception) -> Response:
    return compressed(request, problem_for(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)  # noqa: S101  # what it is registered for
    headers = dict(error.headers or {})
    if isinstance(error, Problem):
        return problem_response(error.status_code, error.code, str(error.detail), headers)
    if error.status_code == 400:  # from the framework: a body that is not UTF-8, or too deep
        return problem_response(422, "invalid", "The body cannot be parsed.", headers)
    if error.status_code == 405:  # the framework names the methods of the first route only
        headers = {name: value for name, value in headers.items() if name.lower() != "allow"}
        headers["Allow"] = ", ".join(sorted(_allowed(request)))
    code: Code = _OF_FRAMEWORK.get(error.status_code, "internal")
    return problem_response(error.status_code, code, str(error.detail), headers)


def _allowed(request: Request) -> set[str]:
    """The methods of all routes of the requested path."""
    methods: set[str] = set()
    for route in _routes(request.app.routes):
        matches, _ = route.matches(request.scope)
        if matches is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return methods | ({"HEAD"} if "GET" in methods else set())


def _routes(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """All routes; a newer FastAPI keeps an included router as one."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from _routes(router.routes)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  # what it is registered for
    # Without the input itself: it may be large, or secret.
    errors = [
        {"at": ".".join(str(part) for part in one["loc"])[:_LONGEST], "what": one["msg"]}
        for one in error.errors()[:20]
    ]
    first = f"{errors[0]['at']}: {errors[0]['what']}" if errors else "The request is not valid."
    return compressed(request, problem_response(422, "invalid", first, more={"errors": errors}))


SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "An error (RFC 9457). Programs read `code`.",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"$ref": "#/components/schemas/ProblemCode"},
        "detail": {"type": "string", "description": "For people."},
        "errors": {
            "type": "array",
            "description": "Each invalid field of the request.",
            "items": {"$ref": "#/components/schemas/InvalidField"},
        },
    },
}
SCHEMAS: dict[str, Any] = {
    "Problem": SCHEMA,
    "ProblemCode": {"type": "string", "enum": [*get_args(Code)]},
    "InvalidField": {
        "type": "object",
        "required": ["at", "what"],
        "properties": {
            "at": {"type": "string", "description": "The field, such as `body.name`."},
            "what": {"type": "string", "description": "What is wrong with it."},
        },
        "additionalProperties": False,
    },
}
"""The schemas of problems, for the OpenAPI document."""

_MEANING = {
    401: "The token is missing or unknown.",
    403: "The token does not permit this operation.",
    404: "It does not exist.",
    409: "The current state does not permit this operation.",
    410: "It has expired, or was destroyed.",
    412: "It has changed, or does not exist: `If-Match` names another revision.",
    413: "The body is too large for this server.",
    421: "This server does not serve that host.",
    422: "The request is not valid for this operation.",
    428: "`If-Match` has to name the revision that was changed.",
    429: "Too much was created or written; Retry-After has the seconds to wait.",
    503: "The server cannot do this now; Retry-After has the seconds to wait.",
}


def documented(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of these statuses."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _MEANING[status], "content": content} for status in statuses}
