"""The public API as a user's type checker sees it. Checked by mypy, never run."""

from __future__ import annotations

from typing import Any, assert_type

from agent_state import (
    AgentState,
    AsyncAgentSessionManager,
    FileStateStore,
    JSONStateSerializer,
    MailMessage,
    MemoryStateStore,
    ModelStateValidator,
    RestoreReport,
    SleepState,
    StatePersistenceManager,
    StateSerializer,
    StateStore,
    StateValidator,
    Task,
    TaskContext,
    TaskFilter,
    TaskQueueState,
    TaskReport,
    WALStateStore,
)
from agent_state.codec import Group, StoredState
from agent_state.protocols import Notice, NoticeStream
from agent_state.sessions import (
    AddedMessage,
    ConversationPage,
    CreatedSession,
    Session,
    SessionDraft,
    SessionExtension,
    SessionManager,
    WorkflowState,
)
from agent_state.sync import SyncStatePersistenceManager
from agent_state_integrations.orchestration import Orchestration

stores: list[StateStore] = [
    MemoryStateStore(),
    FileStateStore("state"),
    WALStateStore("state"),
]
serializer: StateSerializer = JSONStateSerializer()
validator: StateValidator = ModelStateValidator()


async def the_manager() -> None:
    StatePersistenceManager("state", exclusive=True, durability="os")
    StatePersistenceManager("state", durability="never")  # type: ignore[arg-type]
    StatePersistenceManager("state", exclusiv=True)  # type: ignore[call-arg]
    async with StatePersistenceManager(store=stores[0]) as manager:
        assert_type(await manager.save_agent_state("a", {"agent_id": "a"}), int)
        assert_type(await manager.save_agent_state("a", AgentState(agent_id="a")), int)
        assert_type(await manager.load_agent_state("a"), AgentState | None)
        assert_type(await manager.load_task_queue_state("a"), TaskQueueState | None)
        assert_type(await manager.load_sleep_state("a"), SleepState | None)
        assert_type(await manager.list_persisted_agents(), list[str])
        async with manager.edit("agents", "a") as state:
            state.status = "idle"
        async for entry in manager.read_log("notes", ("a", "b"), last=10):
            assert_type(entry.record, dict[str, Any])
        async with manager.lock("agents", "a"):
            assert_type(await manager.load_with_revision("agents", "a"), StoredState | None)
        assert_type(await manager.subscribe(), NoticeStream)
        async for notice in manager.watch():
            assert_type(notice, Notice)


async def fetch(address: str, timeout_seconds: float = 5.0) -> bytes:
    return address.encode()


async def the_runtime() -> None:
    runtime = AsyncAgentSessionManager("state")

    @runtime.handler("reader")
    async def reader(ctx: TaskContext, task: Task) -> int:
        assert_type(await ctx.inbox(), list[MailMessage])
        assert_type(await ctx.step("count", len, "word"), int)
        assert_type(await ctx.step("fetch", fetch, "x", timeout_seconds=1.0), bytes)
        assert_type(await ctx.step_at_most_once("pay", fetch, "x"), bytes)
        await ctx.step("fetch", fetch, 7)  # type: ignore[call-overload]
        await ctx.step("fetch", fetch, "x", timeot=1.0)  # type: ignore[call-arg]
        await ctx.submit("b", "read", prioriti="high")  # type: ignore[call-arg]
        await ctx.sleep(wake_on=["mail_recieved"])  # type: ignore[list-item]

    assert_type(await runtime.start(), RestoreReport)
    task = await runtime.tasks.submit("a", "read", {"file": "x"}, priority="high")
    assert_type(task, Task)
    assert_type(await runtime.tasks.result(task, int), int)
    assert_type(await runtime.tasks.result(("a", "id"), list[str]), list[str])
    assert_type(await runtime.tasks.get(("a", "id")), Task)
    assert_type(await runtime.tasks.list("a", status="dead"), list[Task])
    assert_type(await runtime.tasks.result("id", int, timeout_seconds=5), int)
    assert_type(await runtime.tasks.retry("id"), bool)
    assert_type(await runtime.tasks.search(TaskFilter(status="dead"), limit=5), list[Task])
    assert_type(await runtime.tasks.retry_all(TaskFilter(name="read")), TaskReport)
    TaskFilter(status="deaf")  # type: ignore[arg-type]
    async for changed in runtime.tasks.watch(TaskFilter(status=("dead", "cancelled"))):
        assert_type(changed, Task)
    await runtime.tasks.submit("a", "read", priority="hihg")  # type: ignore[arg-type]

    @runtime.on_dead
    async def tell(task: Task, error: BaseException | None) -> None: ...

    @runtime.on_restore
    def restored(report: RestoreReport) -> None: ...

    runtime.on_dead(restored)  # type: ignore[type-var]
    assert_type(runtime.agents.get("a"), AgentState)
    assert_type(runtime.agents.list(), list[str])
    assert_type(runtime.mail.inbox("a"), list[MailMessage])
    await runtime.stop()


async def the_sessions(manager: StatePersistenceManager) -> None:
    sessions = SessionManager(manager, agent_types=["poet"], renew_interval_seconds=1)
    SessionManager(manager, agent_type="poet")  # type: ignore[call-arg]
    created = await sessions.create("ann", context={"page": "start"})
    assert_type(created, CreatedSession)
    session_id = created.session.session_id
    assert_type(await sessions.tokens.resolve(created.session_token), Session)
    assert_type(await sessions.tokens.rotate(session_id), str)
    added = await sessions.conversations.add(session_id, "poet", "user", "hi", dedupe_key="k")
    assert_type(added, AddedMessage)
    assert_type(await sessions.conversations.page(session_id, "poet"), ConversationPage)
    assert_type(await sessions.workflows.track(session_id, "w1"), WorkflowState)
    await sessions.update(session_id, {}, mode="overwrite")  # type: ignore[arg-type]
    await sessions.states.save(session_id, {}, ttl=60)  # type: ignore[call-arg]

    async def count(draft: SessionDraft) -> int:
        draft.session.state["count"] = draft.session.state.get("count", 0) + 1
        return len(draft.session.state)

    assert_type(await sessions.change(session_id, count), int)
    extension: SessionExtension = Orchestration(sessions)
    sessions.extend(extension)


def scripts() -> None:
    SyncStatePersistenceManager("state", exclusiv=True)  # type: ignore[call-arg]
    with SyncStatePersistenceManager("state", exclusive=True) as manager:
        assert_type(manager.load_agent_state("a"), AgentState | None)
        assert_type(manager.save("notes", ("a", "b"), {}, expected=0), int)
        manager.save("notes", "a", {}, expcted=0)  # type: ignore[call-arg]
        with manager.lock("agents", "a"), manager.group() as group:
            assert_type(group, Group)
        for stored in manager.scan("notes"):
            assert_type(stored, StoredState)
        for notice in manager.watch():
            assert_type(notice, Notice)
