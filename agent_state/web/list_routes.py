"""Routes that look over all agents: the summary, and lists in order, filtered, in pages."""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response

from agent_state import __version__
from agent_state.clock import instant, stamp
from agent_state.errors import StateNotFoundError
from agent_state.metrics import JournalLag
from agent_state.models import (
    AgentState,
    AgentStatus,
    MailMessage,
    MailStatus,
    SleepState,
    Task,
    TaskStatus,
)
from agent_state.runtime import TaskFilter
from agent_state.storage import ReadOnlyStateStore
from agent_state.storage.quarantine import quarantined, quarantined_paths
from agent_state.storage.sealed_store import SealedStateStore
from agent_state.storage.tree import DocumentTree
from agent_state.web.auth import operator
from agent_state.web.backend import Backend, BackendDep, RuntimeDep, StateView
from agent_state.web.index import DocumentEntry, DocumentIndex, StateIndexes, load_entries
from agent_state.web.models import (
    After,
    Cursor,
    JournalSummary,
    Limit,
    MirrorSummary,
    OperationReport,
    Page,
    QuarantinedDocument,
    QueueSummary,
    Summary,
    WakeRequest,
)
from agent_state.web.operations import OperationRouter, Versioned, from_cursor, to_cursor

overview = OperationRouter(
    "/api", "overview", access=operator, about="What there is, over all agents."
)

_agents = OperationRouter("/api", "agents", access=operator)
_tasks = OperationRouter("/api", "tasks", access=operator)
_mail = OperationRouter("/api", "mail", access=operator)
routers = (overview, _agents, _tasks, _mail)

SUMMARIZED = ("agents", "tasks", "sleep", "mail", "sessions")
_OPEN = ("pending", "failed")
_LISTED = [401, 403, 422, 503]


async def _indexes(request: Request) -> StateIndexes:
    found: StateIndexes = request.app.state.indexes
    return found


IndexesDep = Annotated[StateIndexes, Depends(_indexes)]


@dataclass(frozen=True, slots=True)
class Lists:
    """What lists are made of."""

    backend: Backend
    indexes: StateIndexes


async def _lists(backend: BackendDep, indexes: IndexesDep) -> Lists:
    return Lists(backend, indexes)


ListsDep = Annotated[Lists, Depends(_lists)]
Text = Annotated[str | None, Query(max_length=200, description="Only with this text in it.")]


# -- the summary -------------------------------------------------------------------------------


@overview.operation("GET", "/summary", errors=[401, 403, 503])
async def get_summary(
    request: Request, response: Response, backend: BackendDep
) -> Versioned[Summary]:
    """Everything at one look. Counts are kept in memory: it costs the same for any number of tasks.

    The first request after a start reads every document once. `GET /api/events` with the answer's
    `Last-Event-ID` begins with the first change that the answer may lack. The `ETag` does not
    change with the time alone, so `now` and the ages may be those of a look before.
    """
    found, event_id = await summarize(request.app, backend)
    response.headers["Last-Event-ID"] = event_id
    ages: dict[str, Any] = {
        "now": True,
        "queues": {"__all__": {"oldest_seconds"}},
        "journal": {"oldest_seconds"},
        "mirror": {"lag_seconds"},
    }
    return Versioned(found, compared=found.model_dump(exclude=ages))


async def summarize(app: FastAPI, backend: Backend) -> tuple[Summary, str]:
    """The summary, and the id of the event since which it may lack changes."""
    feed, indexes = app.state.feed, app.state.indexes
    await feed.start()
    event_id: str = feed.last_id
    async with backend.view() as view:
        agents, tasks, sleep, mail, sessions = [
            await indexes.get(kind, view.manager) for kind in SUMMARIZED
        ]
        directory = view.manager.state_dir
        quarantine: Collection[str] = ()
        if directory is not None:
            quarantine = await asyncio.to_thread(quarantined_paths, DocumentTree(directory))
        summary = Summary(
            **_server(backend, view, directory),
            now=stamp(view.manager.clock.now()),
            agents=len(agents.entries),
            agents_by_status=_counts(agents),
            tasks=len(tasks.entries),
            tasks_by_status=_counts(tasks),
            queues=_queues(agents, tasks, view.manager.clock.now()),
            sleepers=sleep.statuses["sleeping"],
            mail=len(mail.entries),
            unread_mail=mail.statuses["unread"],
            sessions=sessions.statuses["active"],
            dead_letters=tasks.statuses["dead"],
            quarantined=len(quarantine),
            added_routes=app.state.added_routes,
        )
    return summary, event_id


def _server(backend: Backend, view: StateView, directory: str | None) -> dict[str, Any]:
    runtime, manager = backend.runtime, view.manager
    store = manager.store.store if isinstance(manager.store, SealedStateStore) else manager.store
    if isinstance(store, ReadOnlyStateStore):
        owner = store.owner()
    else:
        owner = os.getpid() if directory is not None else None
    lag, mirror = manager.journal_lag(), manager.mirror
    status = mirror.status() if mirror is not None else None
    return {
        "version": __version__,
        "mode": "read-only" if backend.read_only else "runtime" if runtime else "manager",
        "writable": not backend.read_only,
        "directory": directory,
        "owner_pid": owner,
        "agents_here": len(runtime.agents.list()) if runtime is not None else 0,
        "journal": None if lag is None else _journal(lag),
        "mirror": status
        and MirrorSummary(state=status.state, waiting=status.waiting, lag_seconds=status.lag),
    }


def _journal(lag: JournalLag) -> JournalSummary:
    return JournalSummary(documents=lag.documents, oldest_seconds=lag.seconds)


def _counts(index: DocumentIndex) -> dict[str, int]:
    return {status: count for status, count in sorted(index.statuses.items()) if count}


def _queues(agents: DocumentIndex, tasks: DocumentIndex, now: datetime) -> list[QueueSummary]:
    waiting, running = Counter[str](), Counter[str]()
    oldest: dict[str, str] = {}

    def type_of(agent_id: str) -> str:
        agent = agents.entries.get((agent_id,))
        return agent.name if agent is not None else ""

    for status in _OPEN:
        for agent_id, places in tasks.by_agent(status).items():
            name = type_of(agent_id)
            waiting[name] += len(places)
            first = bisect_left(places, ("0",))  # what a person wrote may be no time
            due = places[first][0] if first < len(places) else ""
            if due[:1].isdigit() and due < oldest.setdefault(name, due):
                oldest[name] = due
    for agent_id, places in tasks.by_agent("in_progress").items():
        running[type_of(agent_id)] += len(places)
    return [
        QueueSummary(
            agent_type=name,
            waiting=waiting[name],
            running=running[name],
            oldest_seconds=_seconds_since(oldest.get(name), now),
        )
        for name in sorted(waiting.keys() | running.keys())
    ]


def _seconds_since(time: str | None, now: datetime) -> float:
    try:
        return 0.0 if time is None else max(0.0, (now - instant(time)).total_seconds())
    except ValueError:  # a person wrote it
        return 0.0


async def _quarantined(directory: str | None) -> list[QuarantinedDocument]:
    if directory is None:
        return []
    found = await asyncio.to_thread(quarantined, DocumentTree(directory))
    return [
        QuarantinedDocument(
            path=one.path,
            was=one.was,
            reason=one.reason,
            at=one.at,
            kind=one.kind,
            key=list(one.key),
        )
        for one in found
    ]


# -- lists -------------------------------------------------------------------------------------


async def _page(
    lists: Lists,
    kind: str,
    wanted: Callable[[DocumentEntry, datetime], bool],
    statuses: Sequence[str] | None,
    *,
    after: str | None,
    limit: int,
    backwards: bool | None = None,
) -> Page[Any]:
    """A page of the documents of a kind; ``backwards``: None for the order of agents' ids."""
    by_id = backwards is None
    parts = 2 if kind == "sleep" else 3
    place = from_cursor(after, parts) if not by_id else None if after is None else (after,)
    async with lists.backend.view() as view:
        index, now = await lists.indexes.get(kind, view.manager), view.manager.clock.now()
        found = index.page(
            lambda entry: wanted(entry, now),
            statuses=tuple(statuses or ()),
            after=place,
            limit=limit + 1,  # one more says whether another page follows
            backwards=bool(backwards),
        )
        items, unusable = await load_entries(view.manager, index, found[:limit])
    more = None
    if len(found) > limit:
        more = found[limit - 1].agent_id if by_id else to_cursor(found[limit - 1].order)
    return Page(items=items, next=more, unusable=unusable)


@_agents.operation("GET", "/agents", errors=_LISTED)
async def list_agents(
    *,
    lists: ListsDep,
    status: Annotated[list[AgentStatus] | None, Query(description="Of one of these.")] = None,
    agent_type: Annotated[str | None, Query(description="Only of this type.")] = None,
    text: Text = None,
    after: After = None,
    limit: Limit = 100,
) -> Page[AgentState]:
    """The stored agents, by id. ``text`` is looked for in ids and names."""

    def wanted(entry: DocumentEntry, _: datetime) -> bool:
        return agent_type in (None, entry.name) and (
            text is None or text in entry.agent_id or text in entry.text
        )

    return await _page(lists, "agents", wanted, status, after=after, limit=limit)


@_tasks.operation("GET", "/tasks", errors=_LISTED)
async def search_tasks(
    *,
    lists: ListsDep,
    status: Annotated[list[TaskStatus] | None, Query(description="Of one of these.")] = None,
    name: Annotated[str | None, Query(description="Only of this name.")] = None,
    agent_id: Annotated[str | None, Query(description="Only of this agent.")] = None,
    error: Annotated[str | None, Query(description="Only with this text in the error.")] = None,
    older_than: Annotated[float | None, Query(ge=0, le=10**9, description="In seconds.")] = None,
    newer_than: Annotated[float | None, Query(ge=0, le=10**9, description="In seconds.")] = None,
    oldest_first: bool = False,
    after: Cursor = None,
    limit: Limit = 100,
) -> Page[Task]:
    """The tasks of all agents by the time of submission, without the archived ones."""
    wanted = TaskFilter(
        name=name,
        agent_id=agent_id,
        error=error,
        older_than_seconds=older_than,
        newer_than_seconds=newer_than,
    )
    return await _page(
        lists, "tasks", wanted.matches, status, after=after, limit=limit, backwards=not oldest_first
    )


@_mail.operation("GET", "/mail", errors=_LISTED)
async def search_mail(
    *,
    lists: ListsDep,
    status: Annotated[list[MailStatus] | None, Query(description="Of one of these.")] = None,
    to_agent: Annotated[str | None, Query(description="Only in this mailbox.")] = None,
    from_agent: Annotated[str | None, Query(description="Only from this sender.")] = None,
    text: Text = None,
    oldest_first: bool = False,
    after: Cursor = None,
    limit: Limit = 100,
) -> Page[MailMessage]:
    """The mail of all agents by the time it was sent. ``text`` is looked for in subjects."""

    def wanted(entry: DocumentEntry, _: datetime) -> bool:
        return (
            to_agent in (None, entry.agent_id)
            and from_agent in (None, entry.name)
            and (text is None or text in entry.text)
        )

    return await _page(
        lists, "mail", wanted, status, after=after, limit=limit, backwards=not oldest_first
    )


def _sleeps(text: str | None) -> Callable[[DocumentEntry, datetime], bool]:
    return lambda entry, _: text is None or text in entry.agent_id or text in entry.text


@_agents.operation("GET", "/sleepers", errors=_LISTED)
async def list_sleepers(
    *,
    lists: ListsDep,
    text: Text = None,
    latest_first: bool = False,
    after: Cursor = None,
    limit: Limit = 100,
) -> Page[SleepState]:
    """The agents that sleep by the end of their sleep; the last ones wait for an event only.

    ``text`` is looked for in ids and reasons.
    """
    return await _page(
        lists,
        "sleep",
        _sleeps(text),
        ["sleeping"],
        after=after,
        limit=limit,
        backwards=latest_first,
    )


@_agents.operation("POST", "/sleepers", errors=[*_LISTED, 409])
async def wake_sleepers(
    runtime: RuntimeDep, lists: ListsDep, asked: WakeRequest
) -> OperationReport:
    """Wake the sleepers with the text in their ids or reasons; with `dry_run`, only count them."""
    async with lists.backend.view() as view:
        index, now = await lists.indexes.get("sleep", view.manager), view.manager.clock.now()
    wanted = _sleeps(asked.text)
    matched = [one.agent_id for one in index.of_status("sleeping") if wanted(one, now)]
    report = OperationReport(matched=len(matched), changed=0, refused={}, dry_run=asked.dry_run)
    for agent_id in () if asked.dry_run else matched:
        try:
            report.changed += await runtime.agents.wake(agent_id)
        except StateNotFoundError as error:  # it runs elsewhere, or is gone
            report.refused[agent_id] = error.message
    return report


@overview.operation("GET", "/quarantine", errors=_LISTED)
async def list_quarantine(
    *,
    backend: BackendDep,
    kind: Annotated[str | None, Query(description="Only of this kind.")] = None,
    text: Text = None,
    oldest_first: bool = False,
    after: Cursor = None,
    limit: Limit = 100,
) -> Page[QuarantinedDocument]:
    """Files that could not be used, the newest first. ``text`` is one of their path or reason."""
    async with backend.view() as view:
        origin = await view.manager.store.origin()
    kept = await _quarantined(origin.state_dir)
    wanted = {
        (one.at or "", one.path): one
        for one in kept
        if kind in (None, one.kind) and (text is None or text in one.path or text in one.reason)
    }
    order, place = sorted(wanted, reverse=not oldest_first), from_cursor(after, 2)
    if place is not None:
        order = [one for one in order if (one > place if oldest_first else one < place)]
    more = to_cursor(order[limit - 1]) if len(order) > limit else None
    return Page(items=[wanted[one] for one in order[:limit]], next=more)
