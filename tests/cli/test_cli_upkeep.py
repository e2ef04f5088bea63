from __future__ import annotations

from pathlib import Path

import pytest

from agent_state.cli.app import run
from tests.cli.calling import Call, Called, assert_one_line_of_error, fill, owned_by_another_process


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    return await fill(tmp_path / "state")


@pytest.fixture
def damaged(state: Path) -> Path:
    (state / "agents/alice.json").write_text('{"agent_id": ')
    return state


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def called(*args: object) -> Called:
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return called


# -- beside a running server -------------------------------------------------------------------


def test_looking_works_beside_a_server_that_owns_the_directory(call: Call, state: Path) -> None:
    with owned_by_another_process(state) as pid:
        assert call("ls", "--json", "--state", state).json()["owner"] == pid
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
