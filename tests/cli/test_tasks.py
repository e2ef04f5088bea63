"""``agent-state tasks``, on a directory at rest and on that of a running server."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.clock import SystemClock, later, stamp
from tests.cli.commands import (
    Call,
    agent_state,
    assert_one_line_of_error,
    owned_by_another_process,
    running,
)
from tests.deadlines import SECONDS, until


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    """Two agents with tasks of every status, submitted an hour apart."""
    now = SystemClock().now()
    async with StatePersistenceManager(tmp_path / "state") as manager:
        for agent_id in ("ann", "bob"):
            await manager.save_agent_state(agent_id, {"agent_id": agent_id, "agent_type": "x"})
        states = ("dead", "failed", "completed", "pending", "dead", "cancelled")
        for number, status in enumerate(states):
            task = {
                "task_id": f"t{number}",
                "name": "index" if number % 2 else "read",
                "status": status,
                "attempts": 3,
                "created_at": stamp(later(now, -3600 * number)),
                "error": "KeyError: 'doc'" if status in {"dead", "failed"} else None,
                "traceback": "Traceback …\nKeyError: 'doc'\n" if status == "dead" else None,
            }
            await manager.save("tasks", ("ann" if number < 4 else "bob", f"t{number}"), task)
    return tmp_path / "state"


def ids(called: Any) -> list[str]:
    assert called.code == 0, called.err
    return [task["task_id"] for task in called.json()]


def status_of(state: Path, name: str) -> str:
    [file] = state.glob(f"tasks/*/{name}.json")
    return str(json.loads(file.read_text())["status"])


# -- looking -------------------------------------------------------------------------------------


def test_tasks_of_all_agents_are_listed_and_filtered(state: Path, call: Call) -> None:
    def listed(*options: str) -> list[str]:
        return ids(call("tasks", "ls", "--state", state, "--json", *options))

    assert listed() == ["t0", "t1", "t2", "t3", "t4", "t5"]
    assert listed("--oldest", "--limit", "2") == ["t5", "t4"]
    assert listed("--oldest", "--limit", "2", "--after", "t4") == ["t3", "t2"]
    assert listed("--limit", "2", "--after", "ann/t1") == ["t2", "t3"]
    assert listed("--dead") == ["t0", "t4"]
    assert listed("--status", "failed", "--status", "cancelled") == ["t1", "t5"]
    assert listed("--agent", "bob") == ["t4", "t5"]
    assert listed("--name", "index") == ["t1", "t3", "t5"]
    assert listed("--error", "KeyError", "--agent", "ann") == ["t0", "t1"]
    assert listed("--older-than", "150m") == ["t3", "t4", "t5"]
    assert listed("--newer-than", "1.5h") == ["t0", "t1"]
    table = call("tasks", "ls", "--state", state, "--dead")
    assert table.code == 0
    assert re.search(r"t4 +bob +read +dead +3 .*KeyError: 'doc'", table.out)
    assert "more: --after ann/t1" in call("tasks", "ls", "--state", state, "--limit", "2").out


def test_a_task_is_shown_with_its_file_and_its_traceback(state: Path, call: Call) -> None:
    for name in ("t4", "bob/t4"):
        shown = call("tasks", "show", name, "--state", state)
        assert shown.code == 0
        assert shown.out.startswith("tasks/bob/t4.json: read, dead")
        assert "\nKeyError: 'doc'\n" in shown.out
    found = call("tasks", "show", "t4", "--state", state, "--json").json()
    assert found["path"] == "tasks/bob/t4.json"
    assert found["task"]["status"] == "dead"


def test_an_archived_task_is_shown_by_its_id_alone(state: Path, call: Call) -> None:
    assert call("cleanup", "--state", state, "--max-age-hours", "0").code == 0
    assert call("tasks", "show", "t2", "--state", state).out.startswith("archived: read, completed")
    assert ids(call("tasks", "ls", "--state", state, "--dead", "--json")) == ["t0", "t4"]


def test_cleanup_says_that_dead_tasks_stay_and_moves_them_when_told(
    state: Path, call: Call
) -> None:
    kept = call("cleanup", "--state", state, "--max-age-hours", "0")
    assert "2 dead tasks stayed" in kept.out
    told = call("cleanup", "--state", state, "--max-age-hours", "0", "--dead-letters")
    assert "tasks: 2 archived (" in told.out


# -- changing, at rest ---------------------------------------------------------------------------


def test_dead_tasks_are_counted_and_run_again(state: Path, call: Call) -> None:
    counted = call("tasks", "retry", "--dead", "--state", state, "--dry-run")
    assert (counted.code, counted.out) == (0, "2 tasks would be run again\n")
    assert status_of(state, "t0") == "dead"
    done = call("tasks", "retry", "--dead", "--state", state)
    assert (done.code, done.out) == (0, "2 tasks run again\n")
    assert [status_of(state, f"t{n}") for n in range(6)] == [
        "pending", "failed", "completed", "pending", "pending", "cancelled",
    ]  # fmt: skip


def test_named_tasks_are_changed_and_what_is_not_is_said(state: Path, call: Call) -> None:
    done = call("tasks", "retry", "t0", "ann/t2", "zzz", "--state", state)
    assert (done.code, done.out) == (1, "1 task run again\n")
    assert done.err.splitlines() == [
        "agent-state: not run again: ann/t2: it is completed",
        "agent-state: not run again: zzz: no such task",
    ]
    assert call("tasks", "cancel", "t3", "--state", state).out == "1 task cancelled\n"
    assert call("tasks", "delete", "t3", "t4", "--state", state).out == "2 tasks deleted\n"
    assert not (state / "tasks/bob/t4.json").exists()
    report = call("tasks", "delete", "--all", "--state", state, "--json").json()
    assert report == {"matched": 2, "changed": 2, "refused": {}, "dry_run": False}
    assert ids(call("tasks", "ls", "--state", state, "--json")) == ["t0", "t1"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["retry"], "name tasks by their ids, or choose them"),
        (["delete"], "name tasks by their ids, or choose them"),
        (["retry", "t0", "--dead"], "name tasks by their ids, or choose them"),
        (["ls", "--status", "deaf"], "deaf is not a status"),
        (["ls", "--older-than", "2 weeks"], "is not a time such as"),
        (["show", "zzz"], "no such task [tasks/zzz]"),
    ],
)
def test_what_is_not_clear_is_refused(state: Path, call: Call, args: list[str], said: str) -> None:
    called = call("tasks", *args, "--state", state)
    assert called.code == 2
    assert said in called.err
    assert called.out == ""


def test_a_directory_that_does_not_exist_is_not_made(tmp_path: Path, call: Call) -> None:
    called = call("tasks", "retry", "--dead", "--state", tmp_path / "misspelt")
    assert called.code == 2
    assert_one_line_of_error(called, "no such state directory")
    assert not (tmp_path / "misspelt").exists()


# -- changing, while a server runs ---------------------------------------------------------------


def test_an_owner_that_runs_no_agents_does_not_answer_and_the_request_is_withdrawn(
    state: Path, call: Call
) -> None:
    with owned_by_another_process(state) as pid:
        called = call("tasks", "retry", "t0", "--state", state, "--wait", "0.3")
    assert called.code == 2
    said = ("has not answered within 0.3 s", str(pid), "it has no runtime", "stop it and try again")
    assert_one_line_of_error(called, *said)
    assert list((state / "requests").iterdir()) == []
    assert status_of(state, "t0") == "dead"


def statuses(folder: Path) -> list[str]:
    files = sorted(folder.glob("state/tasks/*/*.json"))
    return [json.loads(file.read_text())["status"] for file in files]


@pytest.mark.long("deploys a server twice and calls the command several times")
@pytest.mark.parametrize("mode", ["--exclusive", "--shared"])
async def test_after_a_deploy_failed_tasks_are_found_in_the_log_mended_and_run_again(
    tmp_path: Path, mode: str
) -> None:
    """The walk of somebody who deployed a handler that wants another payload."""
    # The old version queues tasks with "text", and is deployed away while it works.
    async with running(tmp_path, mode, "--slow", "text", "text", reads="text") as server:
        await until(lambda: "in_progress" in statuses(tmp_path))
        server.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.wait(), SECONDS) == 0

    # The new version reads "doc".
    async with running(tmp_path, mode) as server:
        # The log says which tasks, which error, and where.
        log_file = tmp_path / "server.log"
        line = re.compile(r"task (ann|bob)/(\S+) \(index\) is dead after attempt 3 of 3: (.*)")
        await until(lambda: len(line.findall(log_file.read_text())) == 2)
        log = log_file.read_text()
        found = line.findall(log)
        assert {agent for agent, _, _ in found} == {"ann", "bob"}
        assert {error for _, _, error in found} == {"KeyError: 'doc'"}
        assert 'return len(task.payload["doc"].split())' in log

        # The same tasks are listed, and shown with their file.
        await until(lambda: statuses(tmp_path) == ["dead", "dead"])  # the file follows
        dead = json.loads(await agent_state(tmp_path, "tasks", "ls", "--dead", "--json"))
        one, other = (task_id for _, task_id, _ in found)
        assert {task["task_id"] for task in dead} == {one, other}
        shown = await agent_state(tmp_path, "tasks", "show", one)
        path, _, _ = shown.partition(":")
        assert 'return len(task.payload["doc"].split())' in shown

        # The payload is mended in that file, and the task runs again.
        file = tmp_path / "state" / path
        file.write_text(file.read_text().replace('"text"', '"doc"'))
        assert await agent_state(tmp_path, "tasks", "retry", one) == "1 task run again\n"
        await until(lambda: sorted(statuses(tmp_path)) == ["completed", "dead"])
        done = json.loads(await agent_state(tmp_path, "tasks", "show", one, "--json"))
        assert (done["task"]["result"], done["task"]["attempts"]) == (2, 4)

        # The other is not mended: it dies again, after all its attempts, and is deleted.
        assert await agent_state(tmp_path, "tasks", "retry", "--dead") == "1 task run again\n"

        def attempts() -> int:
            [task] = tmp_path.glob(f"state/tasks/*/{other}.json")
            stored = json.loads(task.read_text())
            return int(stored["attempts"]) if stored["status"] == "dead" else 0

        await until(lambda: attempts() == 6)
        assert await agent_state(tmp_path, "tasks", "delete", "--dead") == "1 task deleted\n"
        assert (await agent_state(tmp_path, "tasks", "ls", "--dead")).startswith("0 tasks")
        assert list((tmp_path / "state").glob("requests/*")) == []
        server.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.wait(), SECONDS) == 0
    await agent_state(tmp_path, "verify")


@pytest.mark.long("starts a server twice and calls the command")
async def test_mended_at_rest_the_tasks_run_at_the_next_start(tmp_path: Path) -> None:
    async with running(tmp_path, "text", "text", "text"):
        await until(lambda: statuses(tmp_path) == ["dead"] * 3)
    for file in tmp_path.glob("state/tasks/*/*.json"):
        file.write_text(file.read_text().replace('"text"', '"doc"'))
    # The server was killed: the command completes its journal first.
    assert await agent_state(tmp_path, "tasks", "retry", "--dead") == "3 tasks run again\n"
    async with running(tmp_path, "text", "text", "text"):
        await until(lambda: statuses(tmp_path) == ["completed"] * 3)


@pytest.mark.long("starts a server and kills it")
async def test_a_request_outlives_the_server_that_was_killed_before_it_answered(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, "text", "text") as server:
        await until(lambda: statuses(tmp_path) == ["dead"] * 2)
        server.send_signal(signal.SIGSTOP)
        asking = asyncio.create_task(agent_state(tmp_path, "tasks", "cancel", "--all", "--json"))
        asking2 = asyncio.create_task(agent_state(tmp_path, "tasks", "delete", "--dead"))
        requests = tmp_path / "state/requests"
        await until(lambda: requests.exists() and len(list(requests.glob("t*.json"))) == 2)
        server.send_signal(signal.SIGKILL)
        await server.wait()
        assert statuses(tmp_path) == ["dead"] * 2
        async with running(tmp_path, "text", "text"):
            assert json.loads(await asking)["changed"] == 0
            assert await asking2 == "2 tasks deleted\n"
            assert list(requests.glob("*.json")) == []
    assert (tmp_path / "state/requests").stat().st_mode & 0o777 == 0o700


@pytest.mark.long("starts a server")
async def test_a_request_that_is_not_one_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with running(tmp_path, "doc"):
        requests = tmp_path / "state/requests"
        requests.mkdir(exist_ok=True)
        asked = {"odd": '{"action": "explode"}', "torn": '{"action": "ret'}
        for name, body in asked.items():
            (requests / f"{name}.json").write_text(body)
        await until(lambda: "answered_at" in (requests / "odd.json").read_text())
        assert "explode" in json.loads((requests / "odd.json").read_text())["error"]
        dead = json.loads(await agent_state(tmp_path, "tasks", "retry", "--all", "--json"))
        assert dead["changed"] == 0  # a damaged request does not stop the others
