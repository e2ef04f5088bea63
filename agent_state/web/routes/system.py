"""Whether the server is there and ready, what it has restored, and what changes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse

from agent_state import __version__
from agent_state.protocols import Notice
from agent_state.web.auth import Operator
from agent_state.web.backend import BackendDep
from agent_state.web.events import EventFeed, EventStream
from agent_state.web.models import Health, Ready, Report
from agent_state.web.problems import Problem, documented

router = APIRouter(tags=["system"])

LastEventId = Annotated[
    str | None,
    Header(max_length=64, description="The id of the event that was seen last."),
]

SSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events: `ready`, `change`, `gone`, `reset`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.get("/health", operation_id="health")
@router.get("/api/global/health", operation_id="global_health")
async def health(backend: BackendDep) -> Health:
    """That the server answers. Needs no token, and looks at no disk."""
    mode = "read-only" if backend.read_only else "runtime" if backend.runtime else "manager"
    return Health(version=__version__, mode=mode)


@router.get("/ready", operation_id="ready", responses=documented([503]))
async def ready(request: Request, backend: BackendDep) -> Ready:
    """That the state can be read, and the server is not about to stop. Needs no token."""
    if request.app.state.closing.is_set():
        raise Problem(503, "stopping", "The server is stopping.", {"Retry-After": "5"})
    async with backend.view() as view:
        await view.manager.load_with_revision("system", "runtime")
    here = len(backend.runtime.agents.list()) if backend.runtime is not None else 0
    return Ready(agents_here=here, writable=not backend.read_only)


@router.get(
    "/api/restore-report",
    operation_id="restore_report",
    response_model=Report,
    responses=documented([401, 403, 404]),
)
async def restore_report(_: Operator, backend: BackendDep) -> JSONResponse:
    """What the last start has restored, put back to work, and could not use."""
    if backend.runtime is None or backend.runtime.report is None:
        raise Problem(404, "not_found", "This server has restored nothing.")
    return JSONResponse(backend.runtime.report.to_dict())


@router.get(
    "/api/events",
    operation_id="events",
    status_code=200,
    response_class=EventStream,
    responses={**SSE, **documented([401, 403, 422, 503])},
)
async def events(
    request: Request,
    _: Operator,
    kind: Annotated[list[str] | None, Query(description="Only of these kinds.")] = None,
    of: Annotated[
        list[str] | None, Query(description="Only what is filed under these ids.")
    ] = None,
    last_event_id: LastEventId = None,
) -> EventStream:
    """Documents as they are saved and removed, whoever does it, as server-sent events.

    With `Last-Event-ID` what was missed comes first; where that is not known any more (the server
    was started again, too much has changed) a `reset` says: look again.
    """

    def wanted(notice: Notice) -> bool:
        return (not kind or notice.kind in kind) and (not of or notice.key[0] in of)

    async def allowed() -> bool:
        return True

    feed: EventFeed = request.app.state.feed
    await feed.start()
    return EventStream(feed, feed.stream(last_event_id, wanted, allowed))
