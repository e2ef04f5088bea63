"""The declaration of an operation, its response as JSON, and pages of documents.

A router of another package is an ``OperationRouter``, too::

    router = OperationRouter("/api/notes", "notes", access=operator)

    @router.operation("GET", "/{note_id:id}")
    async def get_note(backend: BackendDep, note_id: PathId) -> Note:
        async with backend.view() as view:
            return await load_one(view.manager, "notes", (note_id,), Note)

``access`` is ``operator`` or ``for_session`` of ``agent_state.web.auth``. An operation that changes
one document names it (``changes=document("notes", "note_id")``): then ``If-Match`` is compared in
the commit that changes it. All other operations refuse a request that has the header.
"""

from __future__ import annotations

import inspect
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from hashlib import blake2b
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Request, Response
from starlette.convertors import Convertor, register_url_convertor

from agent_state.errors import (
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    StateValidationError,
    UnmergedStateError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import OpenModel
from agent_state.preconditions import required_revision
from agent_state.web.answers import JSONReply, compressed
from agent_state.web.auth import WRITING, for_session
from agent_state.web.backend import Backend
from agent_state.web.models import IfMatch, Page
from agent_state.web.problems import Problem, documented

T = TypeVar("T")
M = TypeVar("M", bound=OpenModel)
E = TypeVar("E", bound=Callable[..., Awaitable[object]])

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
Access = Callable[..., Awaitable[object]]
Changed = Callable[[Mapping[str, Any]], Awaitable[tuple[str, Key]]]
"""Finds kind and key of the document that an operation changes, by the operation's arguments."""

MAX_SCANNED = 2000
"""Documents that are read for one page; a filtered page may end early, with its ``next``."""

# -- declaring ---------------------------------------------------------------------------------


class _IdConvertor(Convertor[str]):
    """Decodes an id that is one segment of the path.

    The guard leaves the path percent-encoded, so that an id may contain a slash as ``%2F``.
    """

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value, errors="surrogateescape")  # text that is not UTF-8 is not an id: 422

    def to_string(self, value: str) -> str:
        raise NotImplementedError("paths are read here, not written")


register_url_convertor("id", _IdConvertor())


@dataclass(frozen=True, slots=True)
class Created(Generic[T]):
    """The result of an operation that creates something: 201, or 200 if it existed before."""

    value: T
    existed: bool


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A document as it is at a revision, which becomes the ``ETag``; None for one without.

    ``is_whole``: what is shown has nothing that may change while the revision stays. ``compared``:
    what an ``ETag`` without a revision stands for; None for the whole value.
    """

    value: T
    revision: int | None = None
    is_whole: bool = True
    compared: object = None


def document(kind: str, *names: str) -> Changed:
    """The document of a kind whose key has these arguments of the operation."""

    async def find(given: Mapping[str, Any]) -> tuple[str, Key]:
        return kind, tuple(given[name] for name in names)

    return find


class OperationRouter(APIRouter):
    """Routes whose functions return models; ``operation`` names, documents and answers them.

    ``access``: the dependency that permits a request; None permits all. ``ends``: an operation on
    one item may be answered with 410, since the items expire. ``about``: describes the tag.
    """

    def __init__(
        self,
        prefix: str,
        tag: str,
        *,
        access: Access | None = None,
        ends: bool = False,
        about: str = "",
    ) -> None:
        super().__init__(prefix=prefix, tags=[tag])
        self.described_tag = {"name": tag, "description": about}
        self._access = access
        self._ends = ends

    def operation(
        self,
        method: Method,
        path: str,
        *,
        name: str | None = None,
        status: int = 200,
        existing: str | None = None,
        access: Access | None = None,
        errors: Sequence[int] | None = None,
        content: dict[str, Any] | None = None,
        changes: Changed | None = None,
        must_match: bool = False,
        unique: bool = False,
    ) -> Callable[[E], E]:
        """Serve a function; its return annotation is the model of the response.

        A function that returns None is answered without a body; one that returns a ``Response``
        is answered with that. ``name``: the operation id; the function's name unless given.
        ``existing``: describes the 200 of a function that returns ``Created``. ``access``: instead
        of the router's. ``errors``: the statuses of errors, if the usual ones do not apply.
        ``content``: the OpenAPI response of a success, if it is not JSON. ``changes``: the document
        that it changes, to which ``If-Match`` applies; ``must_match``: it is required.
        ``unique``: each answer is another one, so none is asked for again by its ``ETag``.
        """
        access = access or self._access
        if errors is None:
            errors = self._errors(method, path, access)
        if method != "GET":
            more = [422] if changes is None else [412, 422, 428] if must_match else [412, 422]
            errors = sorted({*errors, *more})
        match = _Match(changes, must_match) if method != "GET" else None

        def declare(function: E) -> E:
            signature = inspect.signature(function, eval_str=True)
            returned = signature.return_annotation
            responses = documented(errors)
            if get_origin(returned) is Versioned:
                [returned] = get_args(returned)
            if get_origin(returned) is Created:
                [returned] = get_args(returned)
                responses[200] = {"description": existing, "model": returned}
            if content is not None:
                responses[status] = content
            is_response = isinstance(returned, type) and issubclass(returned, Response)
            is_stream = "text/event-stream" in (content or {}).get("content", {})
            if method == "GET" and not is_stream and not unique:
                responses[304] = {"description": "It still has the ETag of `If-None-Match`."}
            self.add_api_route(
                path,
                _answered(function, signature, status, match),
                methods=[method],
                operation_id=name or getattr(function, "__name__", None),
                status_code=status,
                response_model=None if is_response else returned,
                response_class=returned if is_response else JSONReply,
                responses=responses,
                dependencies=[] if access is None else [Depends(access)],
            )
            return function

        return declare

    def _errors(self, method: Method, path: str, access: Access | None) -> list[int]:
        errors = [422, 503]
        if access is not None:
            errors += [401, 403]
        if "{" in self.prefix + path:
            errors += [404, 410] if self._ends else [404]
        if method != "GET":
            errors.append(409)
        if access is for_session and method in WRITING:
            errors.append(429)
        return sorted(errors)


@dataclass(frozen=True, slots=True)
class _Match:
    """What ``If-Match`` means for an operation that changes something."""

    changes: Changed | None
    must_match: bool

    async def call(self, request: Request, function: Callable[..., Awaitable[T]], given: Any) -> T:
        """The function's result. Raises ``Problem`` (412, 422, 428) if the header forbids it."""
        sent = request.headers.getlist("if-match")
        header = ", ".join(sent) if sent else None
        if self.changes is None:
            if header is not None:
                raise Problem(422, "invalid", "This changes nothing that If-Match could name.")
            return await function(**given)
        if header is None and not self.must_match:
            return await function(**given)
        backend: Backend = request.app.state.backend
        kind, key = await self.changes(given)
        stored = await backend.writable().manager.document(kind, key)
        if stored is None:  # nothing matches; the function may have a better answer
            with required_revision(kind, key, -1):
                await function(**given)
            raise Problem(412, "precondition_failed", "It does not exist.")
        if header is None:
            raise Problem(428, "precondition_required", "If-Match has to name the changed version.")
        if not has_etag(header, f'"{stored.revision}"'):
            raise Problem(412, "precondition_failed", f"It is at revision {stored.revision} now.")
        if header.strip() == "*":
            return await function(**given)
        with required_revision(kind, key, stored.revision):
            return await function(**given)


def _answered(
    function: Callable[..., Awaitable[object]],
    signature: inspect.Signature,
    status: int,
    match: _Match | None,
) -> Callable[..., Awaitable[Response]]:
    given = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in signature.parameters.values()
    ]
    # FastAPI gives the request to one parameter only.
    own = [one.name for one in given if one.annotation is Request]
    name = own[0] if own else "http_request"

    @wraps(function)
    async def answered(**kwargs: object) -> Response:
        http_request = kwargs[name] if own else kwargs.pop(name)
        assert isinstance(http_request, Request)  # noqa: S101  # FastAPI reads the annotation
        kwargs.pop("if_match", None)  # it is for the OpenAPI document; the header itself is read
        if match is None:
            result = await function(**kwargs)
        else:
            result = await match.call(http_request, function, kwargs)
        if isinstance(result, Response):
            if hasattr(result, "body_iterator") or not result.body:  # it is not known yet
                return compressed(http_request, result)
            return with_validator(http_request, result)
        number, etag, is_whole = status, None, True
        if isinstance(result, Versioned):
            is_whole = result.is_whole
            if result.revision is not None:
                etag = f'"{result.revision}"'
            elif result.compared is not None:
                etag = _etag_of(JSONReply(result.compared))
            result = result.value
        if isinstance(result, Created):
            result, number = result.value, 200 if result.existed else status
        reply = Response(status_code=number) if result is None else JSONReply(result, number)
        set_by_function = kwargs.get("response")
        if isinstance(set_by_function, Response):
            reply.headers.raw.extend(set_by_function.headers.raw)
        if result is None:
            return reply
        return with_validator(http_request, reply, etag, answers_for_itself=is_whole)

    # FastAPI reads the parameters here; the annotations of `function` belong to its own module.
    if match is not None and match.changes is not None:
        kind = inspect.Parameter.KEYWORD_ONLY
        given.append(inspect.Parameter("if_match", kind, default=None, annotation=IfMatch))
    asked = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Request)
    answered.__signature__ = signature.replace(  # type: ignore[attr-defined]  # what FastAPI reads
        parameters=given if own else [asked, *given]
    )
    return answered


def with_validator(
    request: Request, reply: Response, etag: str | None = None, *, answers_for_itself: bool = True
) -> Response:
    """The reply with its ``ETag``, compressed if the client takes that.

    ``etag``: None for one of the content. A GET whose ``If-None-Match`` has it is answered with
    304, if the ETag ``answers_for_itself``: whatever is in the reply changes it.
    """
    if request.method == "GET" and etag is None:
        etag = _etag_of(reply)
    if etag is not None:
        reply.headers["ETag"] = etag
        if request.method == "GET" and answers_for_itself and is_known(request, etag):
            kept = [one for one in reply.headers.items() if not one[0].startswith("content-")]
            return Response(status_code=304, headers=dict(kept))
    return compressed(request, reply)


def _etag_of(reply: Response) -> str:
    return f'W/"{blake2b(reply.body, digest_size=12).hexdigest()}"'


def is_known(request: Request, etag: str) -> bool:
    """Whether the client has this version already, as its ``If-None-Match`` says."""
    return has_etag(", ".join(request.headers.getlist("if-none-match")), etag)


def has_etag(header: str, etag: str) -> bool:
    """Whether a list of entity tags has this one, compared weakly (RFC 9110, 8.8.3.2)."""
    if header.strip() == "*":
        return True
    return etag.removeprefix("W/") in {one.strip().removeprefix("W/") for one in header.split(",")}


# -- pages -------------------------------------------------------------------------------------


def to_cursor(order: Sequence[str]) -> str:
    """The ``next`` of a page that ended at this place."""
    return urlsafe_b64encode(json.dumps(order).encode()).decode()


def from_cursor(cursor: str | None, parts: int) -> tuple[str, ...] | None:
    """The place that a page ended at; None for None. Raises ``StateValidationError``."""
    if cursor is None:
        return None
    try:
        place = tuple(map(str, json.loads(urlsafe_b64decode(cursor.encode()))))
    except (ValueError, TypeError) as error:
        raise StateValidationError("after is not the next of a page") from error
    if len(place) != parts:
        raise StateValidationError("after is not the next of a page")
    return place


# -- reading -----------------------------------------------------------------------------------


async def load_one(manager: StatePersistenceManager, kind: str, key: Key, model: type[M]) -> M:
    """The document. Raises ``StateNotFoundError``."""
    state = await manager.load(kind, key)
    if not isinstance(state, model):
        raise StateNotFoundError(f"there is no such document among {kind}", kind=kind, key=key)
    return state


async def load_version(
    manager: StatePersistenceManager, kind: str, key: Key, model: type[M]
) -> Versioned[M]:
    """As ``load_one``, with the revision."""
    stored = await manager.load_with_revision(kind, key)
    if stored is None or not isinstance(stored.state, model):
        raise StateNotFoundError(f"there is no such document among {kind}", kind=kind, key=key)
    return Versioned(stored.state, stored.revision)


async def load_page(
    manager: StatePersistenceManager,
    kind: str,
    keys: Sequence[Key],
    model: type[M],
    *,
    after: str | None,
    limit: int,
    wanted: Callable[[M], bool] = lambda _: True,
) -> Page[M]:
    """The wanted documents after an id, in the order of their ids.

    ``keys`` are sorted, and differ only in their last part, which is the id.
    """
    page: Page[M] = Page(items=[])
    first = bisect_right(keys, after, key=lambda key: key[-1]) if after is not None else 0
    for scanned, key in enumerate(keys[first:]):
        if len(page.items) == limit or scanned == MAX_SCANNED:
            page.next = keys[first + scanned - 1][-1]
            break
        try:
            state = await manager.load(kind, key)
        except (StateCorruptedError, SchemaTooNewError, UnmergedStateError):
            page.unusable.append(key[-1])
            continue
        if isinstance(state, model) and wanted(state):
            page.items.append(state)
    return page
