"""The commands that inspect, check and tidy a directory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.cli.output import printable
from tests.cli.commands import Call, assert_one_line_of_error, owned_by_another_process

# -- looking ----------------------------------------------------------------------------------


def test_ls_shows_agents_with_tasks_mail_and_sleep(call: Call, state: Path) -> None:
    called = call("ls", "--state", state)

    assert called.code == 0
    [alice] = [line for line in called.out.splitlines() if line.startswith(" alice")]
    assert "1 completed, 1 in_progress, 1 pending" in alice
    assert "2999-01-01T00:00:00Z" in alice


def test_ls_as_json(call: Call, state: Path) -> None:
    bob, alice = call("ls", "--json", "--state", state).json()["agents"]

    assert (bob["agent_id"], bob["status"]) == ("Bob", "stopped")
    assert alice["tasks"] == {"completed": 1, "in_progress": 1, "pending": 1}
    assert (alice["unread"], alice["asleep"]) == (1, True)


@pytest.mark.parametrize("exclusive", [False, True])
async def test_ls_shows_an_edit_that_was_set_aside_with_its_line_and_column(
    call: Call, state: Path, exclusive: bool
) -> None:
    path = state / "tasks/alice/t1.json"
    async with StatePersistenceManager(state, exclusive=exclusive) as manager:
        for status in ("pending", "completed"):
            await manager.save("tasks", ("alice", "t1"), {"task_id": "t1", "status": status})
        await manager.flush()
        path.write_bytes(b'{\n  "task_id": "t1",\n  "status": pending\n}\n')
        assert await manager.load("tasks", ("alice", "t1")) is not None
        await manager.flush()

        called = await asyncio.to_thread(call, "ls", "--state", state)
        listed = await asyncio.to_thread(call, "ls", "--json", "--state", state)

    assert called.code == listed.code == 0
    [line] = [line for line in called.out.splitlines() if "tasks/alice/t1.json" in line]
    assert "line 3 column 13" in line
    [kept] = listed.json()["quarantine"]
    assert (kept["was"], kept["key"]) == ("tasks/alice/t1.json", ["alice", "t1"])
    assert "line 3 column 13" in kept["reason"]


@pytest.fixture
async def queue_of_plain_tasks(tmp_path: Path) -> Path:
    """A queue that was saved with all its tasks, whose lists alone say how they stand."""
    async with StatePersistenceManager(tmp_path / "state") as manager:
        queue = {
            "agent_id": "alice",
            "pending_tasks": [{"task_id": "a"}],
            "in_progress_tasks": [{"task_id": "b"}, {"task_id": "c"}],
            "completed_tasks": [{"task_id": "d"}],
        }
        await manager.save_task_queue_state("alice", queue)
    return tmp_path / "state"


def test_ls_counts_tasks_without_a_status_by_the_list_that_names_them(
    call: Call, queue_of_plain_tasks: Path
) -> None:
    [alice] = call("ls", "--json", "--state", queue_of_plain_tasks).json()["agents"]

    assert alice["tasks"] == {"pending": 1, "in_progress": 2, "completed": 1}


@pytest.mark.parametrize("kind", ["agents", "tasks", "sleep", "mail", "system"])
def test_ls_of_a_kind(call: Call, state: Path, kind: str) -> None:
    found = call("ls", kind, "--json", "--state", state)

    assert found.code == 0
    paths = {row["path"] for row in (*found.json()["documents"], *found.json()["logs"])}
    assert paths == {str(path.relative_to(state)) for path in (state / kind).rglob("*.json*")}
    assert call("ls", kind, "--state", state).code == 0


def test_ls_of_an_unknown_kind_is_misuse(call: Call, state: Path) -> None:
    called = call("ls", "tusks", "--state", state)

    assert called.code == 2
    assert_one_line_of_error(called, "no kind 'tusks'", "agents, tasks, sleep, mail, system")


def test_show_of_an_agent_has_all_that_is_its_own(call: Call, state: Path) -> None:
    called = call("show", "alice", "--state", state)

    assert called.code == 0
    for words in (
        "alice: researcher, idle",
        "asleep until 2999",
        "tasks/alice/t2",
        "mail/alice/m1",
    ):
        assert words in called.out

    found = call("show", "alice", "--json", "--state", state).json()
    assert found["agent"]["state"]["agent_type"] == "researcher"
    assert {task["key"][1] for task in found["tasks"]} == {"t1", "t2", "a/b"}
    assert found["sleep"]["revision"] == 1


@pytest.mark.parametrize(
    "ident", ["tasks/alice/a/b", "tasks/alice/a%2fb.json", "tasks/alice/a%2fb", "agents/Bob"]
)
def test_show_of_a_document_by_its_id_or_its_file(call: Call, state: Path, ident: str) -> None:
    called = call("show", ident, "--json", "--state", state)

    if ident == "tasks/alice/a%2fb":  # an id that nobody has, though a file looks like it
        assert called.code == 2
        return
    assert called.code == 0
    assert called.json()["key"] in (["alice", "a/b"], ["Bob"])
    assert '"' in call("show", ident, "--state", state).out


def test_show_of_a_log_has_its_newest_records(call: Call, state: Path) -> None:
    found = call("show", "system/events", "--limit", 3, "--json", "--state", state).json()

    assert [record["seq"] for record in found["records"]] == [28, 29, 30]
    assert "record 30" in call("show", "system/events", "--state", state).out


@pytest.mark.parametrize("ident", ["nobody", "tasks/alice/t9", "", "/", "tusks/alice", "\x1b[31m"])
def test_show_of_what_is_not_there_is_misuse(call: Call, state: Path, ident: str) -> None:
    called = call("show", ident, "--state", state)

    assert called.code == 2
    assert_one_line_of_error(called, "nothing is stored under")
    assert "\x1b" not in called.err


@pytest.mark.parametrize("args", [("ls",), ("ls", "agents"), ("show", "alice")])
def test_what_cannot_be_used_is_told_and_the_rest_is_shown(
    call: Call, damaged: Path, args: tuple[str, ...]
) -> None:
    called = call(*args, "--state", damaged)

    assert called.code == 1
    assert "agents/alice.json: not JSON" in called.out
    assert called.err == ""

    found = call(*args, "--json", "--state", damaged)
    assert found.code == 1
    assert found.json()
    assert "agents/alice.json" in found.err


def test_show_of_a_damaged_document_is_one_line_of_error(call: Call, damaged: Path) -> None:
    called = call("show", "agents/alice", "--state", damaged)

    assert called.code == 1
    assert_one_line_of_error(called, "not JSON")


async def _save_hostile_agent(root: Path) -> None:
    hostile = "\x1b]0;owned\x07\u202e[red]"
    async with StatePersistenceManager(root) as manager:
        await manager.save_agent_state(hostile, {"agent_id": hostile, "status": "\x1b[2J"})


@pytest.fixture
async def hostile(tmp_path: Path) -> Path:
    await _save_hostile_agent(tmp_path / "state")
    return tmp_path / "state"


def test_nothing_stored_can_act_upon_the_terminal(call: Call, hostile: Path) -> None:
    printed = (
        call("ls", "--state", hostile).out
        + call("show", "\x1b]0;owned\x07\u202e[red]", "--state", hostile).out
    )

    assert "\\x1b]0;owned" in printed
    assert "[red]" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert printable("plain, ünïcode ✓") == "plain, ünïcode ✓"


# -- beside a running server -------------------------------------------------------------------


def test_looking_works_beside_a_server_that_owns_the_directory(call: Call, state: Path) -> None:
    with owned_by_another_process(state) as pid:
        assert call("ls", "--json", "--state", state).json()["owner"] == pid
        assert f"owned by process {pid}" in call("ls", "--state", state).out
        assert call("show", "carol", "--json", "--state", state).json()["agent"] is not None
        report = call("verify", "--json", "--state", state)
        assert (report.code, report.json()["owner"]) == (0, pid)
        assert call("restore", "--dry-run", "--state", state).code == 0
        assert call("cleanup", "--dry-run", "--state", state).code == 0


def test_changing_a_directory_that_a_server_owns_is_refused(call: Call, state: Path) -> None:
    with owned_by_another_process(state) as pid:
        for command in ("restore", "cleanup"):
            called = call(command, "--state", state)

            assert called.code == 2
            assert_one_line_of_error(called, f"pid {pid}")


# -- checking ---------------------------------------------------------------------------------


def test_verify_of_a_whole_directory(call: Call, state: Path) -> None:
    called = call("verify", "--state", state)

    assert called.code == 0
    assert "Everything can be used." in called.out
    assert call("verify", "--json", "--state", state).json()["ok"] is True


def test_verify_of_a_damaged_directory_says_what_and_where(call: Call, damaged: Path) -> None:
    called = call("verify", "--state", damaged)

    assert called.code == 1
    assert "agents/alice.json" in called.out
    assert "not JSON" in called.out

    found = call("verify", "--json", "--state", damaged)
    assert found.code == 1
    assert [problem["fault"] for problem in found.json()["problems"]] == ["damaged"]


# -- restoring --------------------------------------------------------------------------------


def test_restore_dry_run_says_what_a_start_would_do_and_does_nothing(
    call: Call, damaged: Path
) -> None:
    (damaged / "agents/carol.json").write_text('{"agent_id": "carol"}')
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}

    called = call("restore", "--dry-run", "--json", "--state", damaged)

    assert called.code == 1
    assert called.json()["agents"] == ["Bob", "carol"]
    assert [one["path"] for one in called.json()["contained"]] == ["agents/alice.json"]
    after = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    assert after == before


def test_restore_tells_of_tasks_whose_process_died(call: Call, state: Path) -> None:
    called = call("restore", "--dry-run", "--state", state)

    assert called.code == 0
    assert "tasks/alice/t2" in called.out
    assert "nothing was changed" in called.out


def test_restore_puts_damage_aside_once(call: Call, damaged: Path) -> None:
    first = call("restore", "--state", damaged)

    assert first.code == 1
    assert not (damaged / "agents/alice.json").exists()
    assert (damaged / ".quarantine/agents/alice.json.1").read_text() == '{"agent_id": '

    assert call("restore", "--state", damaged).code == 0
    assert call("verify", "--state", damaged).code == 0


# -- tidying ----------------------------------------------------------------------------------


def test_cleanup_archives_what_is_finished_and_old(call: Call, state: Path) -> None:
    args = ("cleanup", "--max-age-hours", 0, "--json", "--state", state)

    planned = call(*args, "--dry-run").json()
    assert planned["dry_run"] is True
    assert (planned["tasks"], planned["mail"]) == (["alice/t1"], ["alice/m2"])
    assert (state / "tasks/alice/t1.json").exists()

    done = call(*args).json()
    assert {**done, "dry_run": True} == planned
    assert not (state / "tasks/alice/t1.json").exists()
    assert call("show", "tasks/alice/archive", "--state", state).code == 0


def test_cleanup_spares_what_is_young(call: Call, state: Path) -> None:
    called = call("cleanup", "--state", state)

    assert called.code == 0
    assert called.out.startswith("0 cleaned up")


def test_cleanup_tells_of_what_it_could_not_use(call: Call, damaged: Path) -> None:
    called = call("cleanup", "--json", "--state", damaged)

    assert called.code == 1
    assert called.json()["unusable"][0]["path"] == "agents/alice.json"
