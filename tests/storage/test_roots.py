"""Where a state directory may be: behind a symlink, in a home, on a disk of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    FileStateStore,
    StateDirectoryInUseError,
    StateNotFoundError,
    StatePersistenceManager,
    StorageError,
    WALStateStore,
)
from agent_state.cli.app import run
from agent_state.storage import ReadOnlyStateStore
from agent_state.verify import verify
from agent_state_integrations.recorder.writer import RecordWriter

STORES = pytest.mark.parametrize("exclusive", [False, True])


@pytest.fixture(params=["there", "not yet there", "a chain"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """``state``, which is a symlink to ``data/state``."""
    (tmp_path / "data").mkdir()
    target = tmp_path / "data/state"
    if request.param == "there":
        target.mkdir()
    elif request.param == "a chain":
        target.mkdir()
        (tmp_path / "other").symlink_to(target)
        target = tmp_path / "other"
    (tmp_path / "state").symlink_to(target)
    return tmp_path / "state"


@STORES
async def test_a_symlinked_directory_is_opened_and_stays_a_symlink(
    link: Path, tmp_path: Path, exclusive: bool
) -> None:
    async with StatePersistenceManager(link, exclusive=exclusive) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
        await manager.append("system", "events", {"n": 1})
        await manager.flush()
        with pytest.raises(StateDirectoryInUseError):
            other = WALStateStore(tmp_path / "data/state")
            await other.open()

    assert link.is_symlink()
    assert (tmp_path / "data/state/agents/alice.json").exists()
    for store in (ReadOnlyStateStore(link), FileStateStore(link), WALStateStore(link)):
        await store.open()
        assert await store.keys("agents") == [("alice",)]
        await store.close()
    assert (await verify(link)).ok


@STORES
async def test_a_link_that_is_turned_to_another_place_changes_nothing_of_an_open_store(
    link: Path, tmp_path: Path, exclusive: bool
) -> None:
    async with StatePersistenceManager(link, exclusive=exclusive) as manager:
        link.unlink()
        link.symlink_to(tmp_path / "elsewhere")
        await manager.save_agent_state("alice", {"agent_id": "alice"})
    assert (tmp_path / "data/state/agents/alice.json").exists()
    assert not (tmp_path / "elsewhere").exists()


@STORES
async def test_a_link_below_the_directory_stays_refused(tmp_path: Path, exclusive: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    async with StatePersistenceManager(tmp_path / "state", exclusive=exclusive) as manager:
        (tmp_path / "state/agents").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StorageError, match="symlink"):
            await manager.save_agent_state("alice", {"agent_id": "alice"})
            await manager.flush()
        (tmp_path / "state/agents").unlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_recorder_and_the_command_line_follow_the_link(link: Path) -> None:
    with RecordWriter(link) as writer:
        [result] = writer.write(['{"text":"hello","sender":"alice"}'])
        assert result.outcome == "recorded"
    assert (link / "record/current.jsonl").exists()
    for command in ("ls", "verify", "restore"):
        assert run([command, "--state", str(link)]) == 0


@pytest.mark.parametrize(
    "opened",
    [
        lambda root: FileStateStore(root).root,
        lambda root: WALStateStore(root).root,
        lambda root: ReadOnlyStateStore(root).root,
        lambda root: str(RecordWriter(root).recording.state_dir),
    ],
)
def test_a_tilde_is_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Any], str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert opened("~/state") == str(tmp_path / "state")
    assert opened(Path("~/state")) == str(tmp_path / "state")
    assert opened("./~/state") == str(Path.cwd() / "~/state")
    with pytest.raises(StateNotFoundError, match="~nobody-of-this-name"):
        opened("~nobody-of-this-name/state")
