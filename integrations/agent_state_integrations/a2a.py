"""A task store for A2A: each task is one JSON document.

Needs the extra ``a2a``. See ``docs/integrations/a2a.md``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from agent_state import StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, as_segment
from agent_state.errors import needs_extra
from agent_state.protocols import Durability

with needs_extra("a2a", "a2a", "google"):
    from a2a.server.context import ServerCallContext
    from a2a.server.owner_resolver import OwnerResolver, resolve_user_scope
    from a2a.server.tasks.task_store import TaskStore
    from a2a.types.a2a_pb2 import ListTasksRequest, ListTasksResponse, Task
    from a2a.utils.constants import DEFAULT_LIST_TASKS_PAGE_SIZE
    from a2a.utils.errors import InvalidParamsError
    from a2a.utils.task import (
        ListTasksCursor,
        decode_list_tasks_cursor,
        decode_page_token,
        encode_list_tasks_cursor,
    )
    from google.protobuf.json_format import MessageToDict, ParseDict

KIND = "a2a_tasks"
"""The kind of the tasks; a key is the owner and the task's id."""


class AgentStateTaskStore(TaskStore):
    """Keeps the tasks of an A2A server in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.
    ``owner_resolver``: whose tasks a call sees, as for the SDK's own stores.

    A page token names the last task of its page and stays valid when that task changes or goes.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        owner_resolver: OwnerResolver = resolve_user_scope,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._owner_of = owner_resolver

    async def __aenter__(self) -> Self:
        await self._access.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close a directory that was opened here."""
        await self._access.close()

    async def save(self, task: Task, context: ServerCallContext) -> None:
        key = self._key(task.id, context)
        body = {"task": MessageToDict(task)}
        await self._access.run(lambda m: m.save(KIND, key, body))

    async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
        key = self._key(task_id, context)
        found = await self._access.run(lambda m: m.load(KIND, key))
        return ParseDict(found.model_dump()["task"], Task()) if found is not None else None

    async def delete(self, task_id: str, context: ServerCallContext) -> None:
        """Remove a task; a no-op if it is not stored."""
        key = self._key(task_id, context)
        await self._access.run(lambda m: m.delete(KIND, key))

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        """One page of the owner's tasks, the one updated last first.

        Raises ``InvalidParamsError`` for a token that names no place.
        """
        owner = as_segment(self._owner_of(context))
        tasks = [
            task
            for task in await self._access.run(lambda m: _tasks(m, owner))
            if _is_wanted(task, params)
        ]
        tasks.sort(key=_order, reverse=True)
        start = _start(tasks, params.page_token)
        size = params.page_size or DEFAULT_LIST_TASKS_PAGE_SIZE
        page = tasks[start : start + size]
        is_last = start + size >= len(tasks)
        return ListTasksResponse(
            next_page_token=None if is_last else encode_list_tasks_cursor(_cursor(page[-1])),
            tasks=page,
            total_size=len(tasks),
            page_size=size,
        )

    def _key(self, task_id: str, context: ServerCallContext) -> tuple[str, str]:
        return as_segment(self._owner_of(context)), as_segment(task_id)


async def _tasks(manager: StatePersistenceManager, owner: str) -> Any:
    return [
        ParseDict(stored.state.model_dump()["task"], Task())
        async for stored in manager.scan(KIND, owner)
    ]


def _has_time(task: Task) -> bool:
    return bool(task.HasField("status") and task.status.HasField("timestamp"))


def _order(task: Task) -> tuple[bool, int, str]:
    has_time = _has_time(task)
    return has_time, task.status.timestamp.ToNanoseconds() if has_time else 0, task.id


def _cursor(task: Task) -> ListTasksCursor:
    has_time, nanoseconds, task_id = _order(task)
    return ListTasksCursor(timestamp_ns=nanoseconds if has_time else None, task_id=task_id)


def _is_wanted(task: Task, params: ListTasksRequest) -> bool:
    if params.context_id and task.context_id != params.context_id:
        return False
    if params.status and task.status.state != params.status:
        return False
    if not params.HasField("status_timestamp_after"):
        return True
    after = params.status_timestamp_after.ToNanoseconds()
    return _has_time(task) and bool(task.status.timestamp.ToNanoseconds() >= after)


def _start(tasks: Any, page_token: str) -> int:
    """The place of the first task of the page that a token asks for."""
    if not page_token:
        return 0
    cursor = decode_list_tasks_cursor(page_token)
    if cursor is not None:
        after = cursor.sort_key()
        return next((i for i, task in enumerate(tasks) if _order(task) < after), len(tasks))
    first = decode_page_token(page_token)  # an older SDK's token names the first task of a page
    for index, task in enumerate(tasks):
        if task.id == first:
            return index
    raise InvalidParamsError(f"Invalid page token: {page_token}")
