"""The routes of the server as such: health, readiness, the restore report, and all changes."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import Query, Request, Response

from agent_state import __version__
from agent_state.errors import AgentStateError
from agent_state.metrics import PROMETHEUS, to_prometheus
from agent_state.protocols import Notice
from agent_state.runtime import stored_metrics
from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep, check_writable
from agent_state.web.events import SSE, EventStream, open_stream
from agent_state.web.models import Health, Include, LastEventId, Ready, StartReport
from agent_state.web.operations import OperationRouter
from agent_state.web.problems import Problem

_logger = logging.getLogger("agent_state.web")

router = OperationRouter("", "system", about="The server as such, and live changes.")


@router.operation("GET", "/health", errors=[])
@router.operation("GET", "/api/global/health", name="global_health", errors=[])
async def health(request: Request, backend: BackendDep) -> Health:
    """The server answers. Needs no token, and reads no file."""
    return Health(
        version=__version__,
        mode="read-only" if backend.read_only else "runtime" if backend.runtime else "manager",
        added_routes=request.app.state.added_routes,
    )


@router.operation("GET", "/ready", errors=[503])
async def ready(request: Request, backend: BackendDep) -> Ready:
    """The state can be read and changed, and the server is not stopping. Needs no token."""
    if request.app.state.closing.is_set():
        raise Problem(503, "stopping", "The server is stopping.", {"Retry-After": "5"})
    async with backend.view() as view:
        await view.manager.load("system", "runtime")
        if not backend.read_only:
            await check_writable(view.manager)
    here = len(backend.runtime.agents.list()) if backend.runtime is not None else 0
    return Ready(agents_here=here, writable=not backend.read_only)


class MetricsPage(Response):
    """Figures in Prometheus' text format."""

    media_type = PROMETHEUS


_METRICS = {
    "description": "Figures in Prometheus' text format.",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}


@router.operation("GET", "/metrics", access=operator, errors=[401, 403], content=_METRICS)
async def metrics(backend: BackendDep) -> MetricsPage:
    """Figures about agents, tasks and saves, for Prometheus. What cannot be read is left out.

    A server without a runtime reads every stored task for it.
    """
    if backend.runtime is not None:
        statistics = backend.runtime.statistics
        return MetricsPage(to_prometheus(await statistics.metrics(), [statistics.saves]))
    try:
        async with backend.view() as view:
            return MetricsPage(to_prometheus(await stored_metrics(view.manager)))
    except AgentStateError:
        _logger.exception("the stored tasks could not be counted")
        return MetricsPage("")


@router.operation("GET", "/api/restore-report", access=operator, errors=[401, 403, 404])
async def restore_report(backend: BackendDep) -> StartReport:
    """The agents, tasks and damaged files that the last start found."""
    if backend.runtime is None or backend.runtime.report is None:
        raise Problem(404, "not_found", "This server has restored nothing.")
    return StartReport.model_validate(backend.runtime.report.to_dict())


@router.operation("GET", "/api/events", access=operator, errors=[401, 403, 422, 503], content=SSE)
async def events(
    *,
    request: Request,
    backend: BackendDep,
    kind: Annotated[list[str] | None, Query(description="Only of these kinds.")] = None,
    of: Annotated[list[str] | None, Query(description="Only under these first ids.")] = None,
    include: Include = None,
    since: Annotated[
        str | None,
        Query(max_length=64, description="Stands for `Last-Event-ID`, if that is not sent."),
    ] = None,
    last_event_id: LastEventId = None,
) -> EventStream:
    """Saved and removed documents, whichever process changed them, as server-sent events.

    With `Last-Event-ID` the stream starts with the events since then. If they are no longer known
    (the server was restarted, or too many followed), it starts with `reset`: read the documents
    again. A browser's `EventSource` cannot send that header when it begins: `since` does it.
    """

    def wanted(notice: Notice) -> bool:
        return (not kind or notice.kind in kind) and (not of or notice.key[0] in of)

    async def allowed() -> bool:
        return True

    async def content(notice: Notice) -> object:
        try:
            async with backend.view() as view:
                return await view.manager.load(notice.kind, notice.key)
        except AgentStateError:
            return None

    feed = request.app.state.feed
    at = last_event_id or since
    return await open_stream(feed, at, wanted, allowed, content if include else None)
