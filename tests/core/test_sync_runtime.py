"""The blocking runtime, sessions and attached managers do what the asynchronous ones do."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AgentRuntime,
    AgentStateError,
    RestoreReport,
    Task,
    TaskContext,
    TaskFailedError,
    sync,
)
from agent_state.runtime import AgentService, AttachedSessions, MailService, TaskService
from agent_state.sessions import SessionManager
from agent_state.sessions.conversations import Conversations
from agent_state.sessions.states import SessionStates
from agent_state.sessions.tokens import SessionTokens
from agent_state.sessions.workflows import Workflows
from agent_state.sync import SyncAgentRuntime, SyncSessionManager, SyncStatePersistenceManager
from agent_state.sync.managers import (
    SyncAgents,
    SyncAttachedSessions,
    SyncConversations,
    SyncMail,
    SyncSessionStates,
    SyncTasks,
    SyncTokens,
    SyncWorkflows,
)

SECONDS = 60.0


def public(made: object) -> set[str]:
    return {name for name, _ in inspect.getmembers(made, callable) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("asynchronous", "blocking", "left_out"),
    [
        (
            AgentService,
            SyncAgents,
            {
                "begin",
                "admit",
                "replace",
                "restore",
                "restore_all",
                "keep_heartbeat",
                "confirm_all",
                "take_over",
                "take_free",
                "owner_changed",
                "end_taking",
                "save_all",
                "remove_archived",
            },
        ),  # what the runtime itself calls
        (
            TaskService,
            SyncTasks,
            {"submit_run", "report_handlerless", "result_of", "look_up", "apply", "end_watches"},
        ),
        (MailService, SyncMail, {"deliver"}),
        (AttachedSessions, SyncAttachedSessions, set()),
        (SessionManager, SyncSessionManager, set()),
        (SessionTokens, SyncTokens, set()),
        (Conversations, SyncConversations, set()),
        (Workflows, SyncWorkflows, set()),
        (SessionStates, SyncSessionStates, set()),
    ],
)
def test_every_method_is_here_with_its_parameters(
    asynchronous: type, blocking: type, left_out: set[str]
) -> None:
    assert public(asynchronous) - public(blocking) == left_out
    for name in public(asynchronous) - left_out:
        theirs, ours = getattr(asynchronous, name), getattr(blocking, name)
        assert inspect.signature(theirs) == inspect.signature(ours)


def test_every_method_of_the_runtime_is_here() -> None:
    runtime = SyncAgentRuntime()
    assert public(AgentRuntime) - public(runtime) == {
        "serve",  # waits for signals, which come to the main thread
        "abort",
        "register_as",
    }
    for name in public(AgentRuntime) & public(runtime):
        theirs, ours = inspect.signature(getattr(AgentRuntime(), name)), getattr(runtime, name)
        assert theirs.parameters == inspect.signature(ours).parameters


def begun(state_dir: Path) -> SyncAgentRuntime:
    runtime = SyncAgentRuntime(state_dir)

    @runtime.task("add", agent_type="worker")
    async def add(ctx: TaskContext, task: Task) -> int:
        ctx.memory["sums"] = ctx.memory.get("sums", 0) + 1
        return await ctx.step("sum", sum, task.payload["numbers"])

    @runtime.task("fail", agent_type="worker", max_attempts=1)
    async def fail(ctx: TaskContext) -> None:
        raise ZeroDivisionError

    return runtime


def test_agents_do_tasks_and_go_on_in_the_next_process(tmp_path: Path) -> None:
    reports: list[RestoreReport] = []
    with begun(tmp_path) as runtime:
        runtime.agents.create("ann", agent_type="worker")
        task = runtime.tasks.submit("ann", "add", {"numbers": [1, 2]})
        assert runtime.tasks.result(task, timeout_seconds=SECONDS) == 3
        failed = runtime.tasks.submit("ann", "fail")
        with pytest.raises(TaskFailedError):
            runtime.tasks.result(failed)
        assert [each.status for each in runtime.tasks.list("ann")] == ["completed", "dead"]
        assert runtime.agents.list() == ["ann"]
        message = runtime.mail.send("ann", "ann", subject="remember")
        assert [each.message_id for each in runtime.mail.inbox("ann")] == [message.message_id]
        runtime.wait_idle()

    again = begun(tmp_path)
    done = threading.Event()

    @again.on_restore
    def restored(report: RestoreReport) -> None:
        reports.append(report)
        done.set()

    with again:
        assert done.wait(SECONDS)
        assert again.report == reports[0]
        assert again.agents.get("ann").context.working_memory == {"sums": 1}
        assert again.manager.list_persisted_agents() == ["ann"]
        assert again.tasks.get(task).result == 3
    assert again.report is not None
    with pytest.raises(AgentStateError, match="not open"):
        again.wait_idle()


def test_a_handler_that_is_registered_after_the_start_gets_what_waits(tmp_path: Path) -> None:
    with SyncAgentRuntime(tmp_path) as runtime:
        runtime.agents.create("ann", agent_type="late")
        task = runtime.tasks.submit("ann", "work")

        @runtime.handler("late")
        async def handle(ctx: TaskContext, task: Task) -> str:
            return "done"

        assert runtime.tasks.result(task, timeout_seconds=SECONDS) == "done"


def test_tasks_are_watched_until_the_runtime_stops(tmp_path: Path) -> None:
    with begun(tmp_path) as runtime, ThreadPoolExecutor(1) as pool:
        runtime.agents.create("ann", agent_type="worker")
        seen = threading.Event()

        def follow() -> list[str]:
            statuses = []
            for task in runtime.tasks.watch():
                statuses.append(task.status)
                seen.set()
            return statuses

        following = pool.submit(follow)
        while not seen.is_set():
            task = runtime.tasks.submit("ann", "add", {"numbers": []})
            runtime.tasks.result(task)
        runtime.stop()
        assert following.result(SECONDS)


def test_what_would_wait_for_itself_is_refused(tmp_path: Path) -> None:
    with SyncAgentRuntime(tmp_path) as runtime:

        @runtime.handler("worker")
        async def handle(ctx: TaskContext, task: Task) -> None:
            runtime.tasks.list("ann")

        runtime.agents.create("ann", agent_type="worker")
        task = runtime.tasks.submit("ann", "work", max_attempts=1)
        with pytest.raises(TaskFailedError, match="would wait for itself"):
            runtime.tasks.result(task, timeout_seconds=SECONDS)


async def test_it_works_where_a_loop_runs_as_in_a_notebook(tmp_path: Path) -> None:
    with begun(tmp_path) as runtime:
        runtime.agents.create("ann", agent_type="worker")
        task = runtime.tasks.submit("ann", "add", {"numbers": [3]})
        assert runtime.tasks.result(task, timeout_seconds=SECONDS) == 3
    await asyncio.sleep(0)


def test_threads_that_wait_while_it_is_closed_get_an_error(tmp_path: Path) -> None:
    manager = SyncStatePersistenceManager(tmp_path)
    manager.open()
    saving = threading.Barrier(5)

    def save(name: str) -> None:
        saving.wait()
        with manager.lock("notes", name):
            for n in range(10**9):
                manager.save("notes", name, {"n": n})

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(save, name) for name in "abcd"]
        saving.wait()
        manager.close()
        for each in threads:
            with pytest.raises(AgentStateError):
                each.result(SECONDS)


FORK = """
import os, sys
from agent_state import AgentStateError
from agent_state.sync import SyncAgentRuntime, SyncSessionManager, SyncStatePersistenceManager

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except AgentStateError as error:
            os._exit(7 if "before a fork" in str(error) else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

root = sys.argv[1]
with SyncStatePersistenceManager(root) as manager:
    manager.save("notes", "a", {"n": 1})
    sessions = SyncSessionManager(manager)
    assert child(lambda: manager.save("notes", "a", {"n": 2})) == 7
    assert child(lambda: sessions.create("ann")) == 7
    assert child(manager.open) == 7
    assert child(manager.close) == 0
    reading = manager.scan("notes")
    next(reading)
    assert child(reading.close) == 0
    with manager.edit("notes", "a") as note:
        note.n = 3
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if pid == 0:
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

    def work():
        with SyncStatePersistenceManager(root) as own:
            own.save("notes", "b", {"n": 4})

    assert child(work) == 0
    assert manager.load("notes", "a").n == 3
    assert manager.load("notes", "b").n == 4
with SyncAgentRuntime(root) as runtime:
    assert child(runtime.wait_idle) == 7
    assert child(runtime.stop) == 0
    runtime.agents.create("ann", agent_type="worker")
print("done")
"""


def test_a_forked_worker_gets_an_error_or_works_and_never_hangs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "state")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


class Chats:
    """Somebody's session manager."""

    def __init__(self) -> None:
        self.sessions: dict[str, Mapping[str, Any]] = {}
        self.callback: Callable[[str], None] = lambda _: None

    def list_sessions(self) -> list[str]:
        return [*self.sessions]

    def export_session(self, session_id: str) -> Mapping[str, Any] | None:
        return self.sessions.get(session_id)

    def import_session(self, session_id: str, state: Mapping[str, Any]) -> None:
        self.sessions[session_id] = state

    def on_change(self, callback: Callable[[str], None]) -> None:
        self.callback = callback


def test_attached_sessions_are_saved_and_restored(tmp_path: Path) -> None:
    chats = Chats()
    with sync.attach_sync(chats, tmp_path) as attached:
        chats.sessions["a"] = {"agent_id": "a", "mood": "good"}
        chats.callback("a")
        attached.saved()
        assert attached.manager.list_persisted_agents() == ["a"]

    chats = Chats()
    with sync.attach_sync(chats, tmp_path) as attached:
        assert attached.restored == ["a"]
        assert chats.sessions["a"]["mood"] == "good"
        assert attached.save_all_session_states() == 1


def test_sessions_of_people(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path) as manager:
        sessions = SyncSessionManager(manager, agent_types=["guide"], ttl_seconds=60)
        created = sessions.create("ann")
        session_id = created.session.session_id
        added = sessions.conversations.add(session_id, "guide", "user", "hello")
        assert added.seq == 1
        page = sessions.conversations.page(session_id, "guide")
        assert [message.content for message in page.messages] == ["hello"]
        assert [each.session_id for each in sessions.of_user("ann")] == [session_id]
        assert sessions.tokens.resolve(created.session_token).session_id == session_id
        assert sessions.destroy(session_id)
        assert sessions.of_user("ann") == []
