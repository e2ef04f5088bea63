"""Every status that the OpenAPI document names really occurs, and no other one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent_state import AsyncAgentSessionManager, MemoryStateStore, StorageFullError
from agent_state.protocols import Change, Document, Key, LogRecord, Origin
from agent_state.sessions import SessionManager
from agent_state.storage.watch import Subscription
from agent_state.testing import FakeClock
from agent_state.web import EventSettings, LiveBackend, ReadOnlyBackend, VisitorLimits
from agent_state.web.auth import CSRF_HEADER, cookie_name, csrf_token
from agent_state_integrations.journey import ConversationStateManager
from agent_state_integrations.recorder import Recorder
from tests.web.client import TOKEN, Client, answering, openapi

MAX_BODY = 4000


class FullStore(MemoryStateStore):
    """The disk says no while ``full``, to whoever reads as well."""

    full = False
    directory: str | None = None

    def _ask(self) -> None:
        if self.full:
            raise StorageFullError("no space left")

    async def get(self, kind: str, key: Key) -> Document | None:
        self._ask()
        return await super().get(kind, key)

    async def keys(self, kind: str, prefix: Key = ()) -> list[Key]:
        self._ask()
        return await super().keys(kind, prefix)

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        self._ask()
        async for document in super().scan(kind, prefix):
            yield document

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        self._ask()
        return await super().commit(changes)

    async def erase(self, kind: str, key: Key) -> int:
        self._ask()
        return await super().erase(kind, key)

    async def logs(self, kind: str, prefix: Key = ()) -> list[Key]:
        self._ask()
        return await super().logs(kind, prefix)

    async def watch(self) -> Subscription:
        self._ask()
        return await super().watch()

    async def origin(self) -> Origin:
        self._ask()
        return replace(await super().origin(), state_dir=self.directory)

    async def read_log(
        self, kind: str, key: Key, *, after: int = 0, last: int | None = None
    ) -> AsyncIterator[LogRecord]:
        self._ask()
        async for record in super().read_log(kind, key, after=after, last=last):
            yield record


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is answered with success."""

    operation: str
    method: str
    path: str
    body: Any = None
    status: int = 200
    headers: Mapping[str, str] | None = None


@dataclass(slots=True)
class World:
    """One of everything, and what it takes to use it."""

    runtime: AsyncAgentSessionManager
    sessions: SessionManager
    journeys: ConversationStateManager
    session: str = ""
    token: str = ""
    other_token: str = ""
    journey: str = ""
    task: str = ""
    mail: str = ""

    async def fill(self) -> None:
        await self.runtime.agents.create("alice", agent_type="nobody")
        self.task = (await self.runtime.tasks.submit("alice", "x")).task_id
        lost = {"task_id": "lost", "status": "dead"}
        await self.runtime.manager.save("tasks", ("alice", "lost"), lost)
        self.mail = (await self.runtime.mail.send("bob", "alice", subject="?")).message_id
        await self.runtime.agents.sleep("alice", seconds=10**6)
        await self.runtime.agents.stop("alice")
        self.other_token = (await self.sessions.create()).session_token
        await self.fill_session()

    async def fill_session(self) -> None:
        made = await self.sessions.create("ann")
        self.session, self.token = made.session.session_id, made.session_token
        await self.sessions.states.save(self.session, {"a": 1}, state_id="st")
        self.journey = (await self.journeys.initialize_session("ann")).session_id

    def calls(self) -> list[Call]:
        """One for each operation that takes no other place, the last ones for good."""
        session, agent = f"/api/global/session/{self.session}", "/api/agents/alice"
        journey, guide = f"/api/journeys/ann/{self.journey}", "conversations/guide_agent"
        mail, task = f"{agent}/mail/{self.mail}", f"{agent}/tasks/{self.task}"
        mine = {"Authorization": f"Bearer {self.token}"}
        said = {"role": "user", "content": "hello"}
        once = {"Idempotency-Key": "k"}
        conversation = f"conv_guide_agent_{self.session}"
        document = "/api/documents/agents?key=alice"
        cookie = {
            "Host": "localhost",
            "Cookie": f"{cookie_name('localhost')}={self.token}",
            CSRF_HEADER: csrf_token(self.token),
        }
        return [
            Call("get_login", "GET", "/api/login", headers=cookie),
            Call("log_in", "POST", "/api/login", {"token": self.token}),
            Call("log_out", "DELETE", "/api/login", status=204),
            Call("get_summary", "GET", "/api/summary"),
            Call("search_mail", "GET", "/api/mail"),
            Call("list_sleepers", "GET", "/api/sleepers"),
            Call("wake_sleepers", "POST", "/api/sleepers", {"dry_run": True}),
            Call("list_sessions", "GET", "/api/global/sessions"),
            Call("list_quarantine", "GET", "/api/quarantine"),
            Call("list_changes", "GET", "/api/changes"),
            Call("get_log_report", "GET", "/api/recorder/analytics"),
            Call("list_logs", "GET", "/api/logs?kind=conversations"),
            Call("read_log", "GET", "/api/logs/conversations?key=x"),
            Call("get_document", "GET", document),
            Call("get_document_history", "GET", document.replace("documents", "history")),
            Call("put_document", "PUT", document, EDITED, headers={"If-Match": "*"}),
            Call("health", "GET", "/health"),
            Call("global_health", "GET", "/api/global/health"),
            Call("ready", "GET", "/ready"),
            Call("metrics", "GET", "/metrics"),
            Call("restore_report", "GET", "/api/restore-report"),
            Call("events", "GET", "/api/events"),
            Call("create_session", "POST", "/api/global/session", {}, 201),
            Call("get_own_session", "GET", "/api/global/session", headers=mine),
            Call("get_session", "GET", session),
            Call("update_session", "PATCH", session, {"state": {"x": 1}}),
            Call("touch_session", "POST", f"{session}/touch"),
            Call("get_session_history", "GET", f"{session}/history"),
            Call("session_events", "GET", f"{session}/events"),
            Call("add_message", "POST", f"{session}/{guide}/messages", said, 201, once),
            Call("add_message", "POST", f"{session}/{guide}/messages", said, 200, once),
            Call("list_messages", "GET", f"{session}/{guide}/messages"),
            Call(
                "update_conversation_context",
                "PATCH",
                f"{session}/{guide}/context",
                {"context": {}},
            ),
            Call("find_conversation", "GET", f"/api/global/conversations/{conversation}"),
            Call("get_orchestrator", "GET", f"{session}/orchestrators/O"),
            Call("track_workflow", "PUT", f"{session}/orchestrators/O/workflows/w", {}),
            Call("report_service", "POST", f"{session}/services/S", {}),
            Call("get_session_state", "GET", f"{session}/states/st"),
            Call("put_session_state", "PUT", f"{session}/states/st", {"state_data": {}}),
            Call("list_journeys", "GET", "/api/journeys/ann"),
            Call("begin_journey", "POST", "/api/journeys/ann", {}, 201),
            Call("get_journey", "GET", journey),
            Call("append_journey_message", "POST", f"{journey}/messages", said, 201),
            Call("list_journey_messages", "GET", f"{journey}/messages"),
            Call("list_emotions", "GET", f"{journey}/emotions"),
            Call("get_journey_summary", "GET", f"{journey}/summary"),
            Call("get_journey_stats", "GET", f"{journey}/stats"),
            Call("export_journey", "GET", f"{journey}/export"),
            Call("resume_journey", "POST", f"{journey}/resume"),
            Call("list_agents", "GET", "/api/agents"),
            Call(
                "create_agent",
                "POST",
                "/api/agents",
                {"agent_id": "new", "agent_type": "nobody"},
                201,
            ),
            Call(
                "create_agent", "POST", "/api/agents", {"agent_id": "new", "agent_type": "nobody"}
            ),
            Call("get_agent", "GET", agent),
            Call("get_sleep", "GET", f"{agent}/sleep"),
            Call("wake_agent", "POST", f"{agent}/wake"),
            Call("start_agent", "POST", f"{agent}/start"),
            Call("stop_agent", "POST", f"{agent}/stop"),
            Call("let_sleep", "POST", f"{agent}/sleep", {"seconds": 5}),
            Call("list_tasks", "GET", f"{agent}/tasks"),
            Call("submit_task", "POST", f"{agent}/tasks", {"name": "x"}, 201),
            Call("get_task", "GET", task),
            Call("cancel_task", "POST", f"{task}/cancel"),
            Call("search_tasks", "GET", "/api/tasks"),
            Call("operate_tasks", "POST", "/api/tasks", {"action": "retry", "filter": {}}),
            Call("find_task", "GET", f"/api/tasks/{self.task}"),
            Call("retry_task", "POST", "/api/tasks/lost/retry"),
            Call("cancel_any_task", "POST", f"/api/tasks/{self.task}/cancel"),
            Call("delete_task", "DELETE", f"/api/tasks/{self.task}", status=204),
            Call("list_mail", "GET", f"{agent}/mail"),
            Call("send_mail", "POST", f"{agent}/mail", {"from_agent": "bob"}, 201),
            Call("get_mail", "GET", mail),
            Call("read_mail", "POST", f"{mail}/read"),
            Call("reply_to_mail", "POST", f"{mail}/reply", {}, 201),
            Call("archive_mail", "POST", f"{mail}/archive"),
            Call("cleanup_sessions", "POST", "/api/global/sessions/cleanup"),
            Call("close_journey", "POST", f"{journey}/close"),
            Call("erase_journey", "DELETE", journey, status=204),
            Call("rotate_token", "POST", f"{session}/token"),
            Call("revoke_token", "DELETE", f"{session}/token"),
            Call("destroy_session", "DELETE", session, status=204),
        ]


EDITED = {"body": {"agent_id": "alice", "agent_type": "nobody"}}
"""The document of an agent as a person has changed it."""

NOBODY = {
    "get_document": "/api/documents/agents?key=nobody",
    "get_document_history": "/api/history/agents?key=nobody",
    "put_document": "/api/documents/agents?key=nobody",
    "get_own_session": "/api/global/session",
    "find_conversation": "/api/global/conversations/conv_guide_agent_nobody",
}
"""What is not found where it is no matter of an id that is unknown."""

INVALID: dict[str, tuple[str, Any, dict[str, str]]] = {
    "list_agents": ("?limit=0", None, {}),
    "search_tasks": ("?after=nonsense", None, {}),
    "search_mail": ("?after=W10=", None, {}),
    "list_sleepers": ("?limit=0", None, {}),
    "wake_sleepers": ("", {"text": 1}, {}),
    "list_sessions": ("?limit=0", None, {}),
    "list_quarantine": ("?limit=0", None, {}),
    "list_changes": ("?limit=0", None, {}),
    "get_log_report": ("?score=nonsense", None, {}),
    "list_logs": ("&kind=", None, {}),
    "log_in": ("", {}, {}),
    "log_out": ("", None, {"If-Match": "*"}),
    "cleanup_sessions": ("", None, {"If-Match": "*"}),
    "operate_tasks": ("", {"action": "retry"}, {}),
    "create_agent": ("", {"agent_id": 1}, {}),
    "create_session": ("", {"user_id": 1}, {}),
    "get_own_session": ("?messages=-1", None, {}),
    "events": ("", None, {"Last-Event-ID": "x" * 65}),
}
"""What is no request, for operations without an id in their path: query, body, headers."""


ABSENT = {"restore_report", "get_log_report"}
"""What a directory that was never written does not have."""

UNAVAILABLE = {"get_login", "log_in", "log_out"}
"""What is not found where there is no login."""


async def _ask(client: Client, call: Call, status: int, **changed: Any) -> None:
    """Call, and see this status; of a stream only its beginning."""
    given = {"method": call.method, "url": call.path, "json": call.body, "headers": call.headers}
    if "content" in changed:
        given.pop("json")
    async with client.stream(**{**given, **changed}) as response:
        text = "" if response.status_code == 200 else (await response.aread()).decode()
        assert response.status_code == status, f"{call.operation}: {text}"


def _documented() -> dict[str, set[int]]:
    return {
        operation["operationId"]: {int(status) for status in operation["responses"]}
        for operations in openapi()["paths"].values()
        for operation in operations.values()
    }


def _elsewhere(call: Call, ident: str) -> str:
    """The path with another id in the place of the first one."""
    head, kind, rest = call.path.partition("/api/global/session/")
    if not kind:
        for start in (
            "/api/agents/",
            "/api/tasks/",
            "/api/journeys/",
            "/api/global/conversations/",
            "/api/documents/",
            "/api/history/",
            "/api/logs/",
        ):
            head, kind, rest = call.path.partition(start)
            if kind:
                break
    first, *others = rest.split("/")
    assert first, call
    return head + kind + "/".join([ident, *others])


async def test_every_documented_status_occurs_and_no_other(tmp_path: Path) -> None:
    clock = FakeClock()
    store = FullStore(clock=clock)
    store.directory = str(tmp_path / "recorded")
    (tmp_path / "state").mkdir()
    async with Recorder(store.directory) as recorder:
        await recorder.record({"sender_id": "ann", "content": "hello"})
    async with AsyncAgentSessionManager(
        store=store, clock=clock, save_interval_seconds=10**6
    ) as runtime:
        sessions = SessionManager(runtime.manager)
        journeys = ConversationStateManager(runtime.manager)
        world = World(runtime, sessions, journeys)
        await world.fill()
        backend = LiveBackend(runtime=runtime, sessions=sessions, services=[journeys])
        async with answering(backend, max_body=MAX_BODY, login=True) as client:
            documented = _documented()
            assert {call.operation for call in world.calls()} == set(documented)
            await _refused(client, world, documented)
            no_streams = EventSettings(max_streams=0)
            async with answering(backend, login=True, events=no_streams) as full:
                await _full(full, world, documented, store)
            nobody_comes = VisitorLimits(per_address=0, bytes_per_address=0)
            async with answering(backend, visitors=nobody_comes) as closed:
                await _unavailable(closed, world, documented)
            await _ended(client, world, documented, clock)
            await world.fill_session()
            for call in world.calls():
                await _ask(client, call, call.status)
                if 304 in documented[call.operation]:
                    await _ask_again(client, call)
            seen = client.seen | full.seen | closed.seen
    async with _reading(tmp_path / "state") as client:
        await _only_read(client, world, documented)
        seen |= client.seen

    assert seen == {(name, status) for name, statuses in documented.items() for status in statuses}


@asynccontextmanager
async def _reading(state: Path) -> AsyncIterator[Client]:
    async with ReadOnlyBackend(state) as directory, answering(directory) as client:
        yield client


async def _refused(client: Client, world: World, documented: dict[str, set[int]]) -> None:
    wrong = {"Authorization": "Bearer nonsense"}
    other = {"Authorization": f"Bearer {world.other_token}"}
    for call in world.calls():
        statuses = documented[call.operation]
        await _ask(client, call, 421, headers={"Host": "evil.example"})
        await _ask(client, call, 413, content=b"x" * (MAX_BODY + 1))
        if 401 in statuses:
            await _ask(client, call, 401, headers=wrong, json=_unknown_token(call))
        if 403 in statuses:
            await _ask(client, call, 403, headers=other)
        if 412 in statuses:
            await _ask(client, call, 412, headers={"If-Match": '"0"'})
        elif call.method != "GET":
            await _ask(client, call, 422, headers={**(call.headers or {}), "If-Match": "*"})
        if 428 in statuses:
            await _ask(client, call, 428, headers={})
        if 404 in statuses and call.operation not in {*ABSENT, *UNAVAILABLE}:
            elsewhere = NOBODY.get(call.operation) or _elsewhere(call, "nobody")
            await _ask(client, call, 404, url=elsewhere, headers={})
        if 422 in statuses:
            query, body, headers = INVALID.get(call.operation, ("", call.body, {}))
            path = call.path if call.operation in INVALID else _elsewhere(call, "%ff")
            await _ask(client, call, 422, url=path + query, json=body, headers=headers)


def _unknown_token(call: Call) -> Any:
    return {"token": "nonsense"} if call.operation == "log_in" else call.body


async def _ask_again(client: Client, call: Call) -> None:
    """Ask for what has not changed since."""
    known = (await client.get(call.path, headers=call.headers)).headers["ETag"]
    await _ask(client, call, 304, headers={**(call.headers or {}), "If-None-Match": known})


async def _unavailable(client: Client, world: World, documented: dict[str, set[int]]) -> None:
    mine = {"Authorization": f"Bearer {world.token}"}
    for call in world.calls():
        if call.operation in UNAVAILABLE:
            await _ask(client, call, 404)
        if call.operation == "create_session":
            client.headers.pop("Authorization")
            await _ask(client, call, 429)
            client.headers["Authorization"] = f"Bearer {TOKEN}"
        elif 429 in documented[call.operation]:
            await _ask(client, call, 429, headers=mine)


async def _full(
    client: Client, world: World, documented: dict[str, set[int]], store: FullStore
) -> None:
    store.full = True
    for call in world.calls():
        if 503 in documented[call.operation]:
            await _ask(client, call, 503)
    store.full = False


async def _ended(
    client: Client, world: World, documented: dict[str, set[int]], clock: FakeClock
) -> None:
    await clock.advance(8 * 86_400, threads=False)
    mine = {"Authorization": f"Bearer {world.token}"}
    for call in world.calls():
        if 410 in documented[call.operation]:
            headers = {} if call.operation in BY_OPERATORS else mine
            await _ask(client, call, 410, headers=headers)


BY_OPERATORS = {
    "update_conversation_context",
    "find_conversation",
    "track_workflow",
    "report_service",
    "put_session_state",
    "append_journey_message",
    "resume_journey",
    "close_journey",
}
"""What ends with its session, and is not for who holds its token."""


async def _only_read(client: Client, world: World, documented: dict[str, set[int]]) -> None:
    for call in world.calls():
        if 409 in documented[call.operation]:
            await _ask(client, call, 409)
        if call.operation in ABSENT:
            await _ask(client, call, 404)
