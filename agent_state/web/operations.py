"""The declaration of an operation, its response as JSON, and pages of documents.

A router of another package is an ``OperationRouter``, too::

    router = OperationRouter("/api/notes", "notes", access=operator)

    @router.operation("GET", "/{note_id:id}")
    async def get_note(backend: BackendDep, note_id: PathId) -> Note:
        async with backend.view() as view:
            return await load_one(view.manager, "notes", (note_id,), Note)

``access`` is ``operator`` or ``for_session`` of ``agent_state.web.auth``.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Response
from starlette.convertors import Convertor, register_url_convertor

from agent_state.errors import Key, SchemaTooNewError, StateCorruptedError, StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.models import OpenModel
from agent_state.web.answers import JSONReply
from agent_state.web.models import Page
from agent_state.web.problems import documented

T = TypeVar("T")
M = TypeVar("M", bound=OpenModel)
E = TypeVar("E", bound=Callable[..., Awaitable[object]])

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
Access = Callable[..., Awaitable[object]]

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
    ) -> Callable[[E], E]:
        """Serve a function; its return annotation is the model of the response.

        A function that returns None is answered without a body; one that returns a ``Response``
        is answered with that. ``name``: the operation id; the function's name unless given.
        ``existing``: describes the 200 of a function that returns ``Created``. ``access``: instead
        of the router's. ``errors``: the statuses of errors, if the usual ones do not apply.
        ``content``: the OpenAPI response of a success, if it is not JSON.
        """
        access = access or self._access
        if errors is None:
            errors = self._errors(method, path, access)

        def declare(function: E) -> E:
            signature = inspect.signature(function, eval_str=True)
            returned = signature.return_annotation
            responses = documented(errors)
            if get_origin(returned) is Created:
                [returned] = get_args(returned)
                responses[200] = {"description": existing, "model": returned}
            if content is not None:
                responses[status] = content
            is_response = isinstance(returned, type) and issubclass(returned, Response)
            self.add_api_route(
                path,
                _answered(function, signature, status),
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
        return sorted(errors)


def _answered(
    function: Callable[..., Awaitable[object]], signature: inspect.Signature, status: int
) -> Callable[..., Awaitable[Response]]:
    @wraps(function)
    async def answered(*args: object, **kwargs: object) -> Response:
        result = await function(*args, **kwargs)
        if isinstance(result, Response):
            return result
        if isinstance(result, Created):
            return JSONReply(result.value, 200 if result.existed else status)
        return Response(status_code=status) if result is None else JSONReply(result, status)

    # FastAPI reads the parameters here; the annotations of `function` belong to its own module.
    answered.__signature__ = signature  # type: ignore[attr-defined]
    return answered


# -- reading -----------------------------------------------------------------------------------


async def load_one(manager: StatePersistenceManager, kind: str, key: Key, model: type[M]) -> M:
    """The document. Raises ``StateNotFoundError``."""
    state = await manager.load(kind, key)
    if not isinstance(state, model):
        raise StateNotFoundError(f"there is no such document among {kind}", kind=kind, key=key)
    return state


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
        except (StateCorruptedError, SchemaTooNewError):
            page.unusable.append(key[-1])
            continue
        if isinstance(state, model) and wanted(state):
            page.items.append(state)
    return page
