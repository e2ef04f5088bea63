"""Documents of every version open, and those of a newer library are left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import agent_state.sessions  # noqa: F401  # each of these three registers schemas
import agent_state_integrations.journey
import agent_state_integrations.recorder.checkpoint  # noqa: F401
from agent_state import SchemaTooNewError, StateCorruptedError, StatePersistenceManager
from agent_state.migrations import VERSIONS, migrate, parse_schema, schema_of
from agent_state.models import SCHEMAS

FIXTURES = Path(__file__).parent / "fixtures"
FILES = sorted(FIXTURES.glob("*/v*.json"))
KINDS = {"task_queues": "tasks", "mailboxes": "mail"}
CURRENT = {schema: VERSIONS.get(schema, 1) for schema in SCHEMAS}
FROM_ZERO = {"agents", "sleep", "system", "task_queues"}
"""The schemas with a version 0, from before this library."""


def put_in_place(fixture: Path, root: Path, **fields: Any) -> Path:
    schema = fixture.parent.name
    path = root / KINDS.get(schema, schema) / "alice.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(fixture.read_bytes())
    content.update(fields)
    path.write_text(json.dumps(content))
    return path


async def load(manager: StatePersistenceManager, schema: str) -> Any:
    views = {
        "task_queues": manager.load_task_queue_state,
        "mailboxes": manager.load_mailbox_state,
    }
    if schema in views:
        return await views[schema]("alice")
    return await manager.load(schema, "alice")


def test_there_is_a_document_of_every_version_of_every_schema() -> None:
    assert set(VERSIONS) <= set(SCHEMAS)
    expected = {
        f"{schema}/v{number}"
        for schema, current in CURRENT.items()
        for number in range(0 if schema in FROM_ZERO else 1, current + 1)
    }
    assert {f"{path.parent.name}/{path.stem}" for path in FILES} == expected


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("fixture", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
async def test_a_document_of_any_version_opens_as_todays(
    tmp_path: Path, fixture: Path, exclusive: bool
) -> None:
    schema = fixture.parent.name
    put_in_place(fixture, tmp_path)
    newest = json.loads((fixture.parent / f"v{CURRENT[schema]}.json").read_bytes())

    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        loaded = await load(manager, schema)
        assert manager.incidents() == []

    body = {name: value for name, value in newest.items() if not name.startswith("_")}
    assert loaded.model_dump() == body


@pytest.mark.parametrize("fixture", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
async def test_an_old_document_is_written_in_todays_form_at_its_next_save(
    tmp_path: Path, fixture: Path
) -> None:
    schema = fixture.parent.name
    path = put_in_place(fixture, tmp_path)
    async with StatePersistenceManager(tmp_path) as manager:
        state = await load(manager, schema)
        if schema == "task_queues":
            await manager.save_task_queue_state("alice", state)
        elif schema == "mailboxes":
            await manager.save_mailbox_state("alice", state)
        else:
            await manager.save(schema, "alice", state)

    stored = json.loads(path.read_bytes())
    assert stored["_schema"] == schema_of(schema)
    assert "_version" not in stored


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("schema", sorted(CURRENT))
async def test_a_document_of_a_newer_schema_is_refused_and_left_alone(
    tmp_path: Path, schema: str, exclusive: bool
) -> None:
    fixture = FIXTURES / schema / f"v{CURRENT[schema]}.json"
    path = put_in_place(fixture, tmp_path, _schema=f"{schema}/{CURRENT[schema] + 1}", new=[1])
    before = path.read_bytes()
    kind = path.parent.name

    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        with pytest.raises(SchemaTooNewError, match=schema):
            await load(manager, schema)
        if kind == schema:
            with pytest.raises(SchemaTooNewError):
                await manager.save(schema, "alice", _old(schema))
        assert [loaded async for loaded in manager.scan(kind)] == []
        assert any("newer" in incident.what for incident in manager.incidents())
        await manager.cleanup_old_states(max_age_hours=0)
        await manager.flush()

    assert path.read_bytes() == before
    quarantine = tmp_path / ".quarantine"
    assert list(quarantine.glob("[!.]*")) == []


def _old(schema: str) -> dict[str, Any]:
    content = json.loads((FIXTURES / schema / f"v{CURRENT[schema]}.json").read_bytes())
    return {name: value for name, value in content.items() if not name.startswith("_")}


@pytest.mark.parametrize(
    "schema", ["agents", "agents/", "/1", "agents/x", "agents/-1", "agents/²", ""]
)
def test_what_is_no_schema_is_damage(schema: str) -> None:
    with pytest.raises(StateCorruptedError):
        parse_schema(schema)


async def test_a_document_that_names_no_schema_of_ours_is_put_aside(tmp_path: Path) -> None:
    put_in_place(FIXTURES / "agents" / "v1.json", tmp_path, _schema="agents/x")
    async with StatePersistenceManager(tmp_path) as manager:
        with pytest.raises(StateCorruptedError, match="schema"):
            await manager.load_agent_state("alice")
        assert len(manager.incidents()) == 1


def test_a_schema_nobody_knows_is_taken_as_it_is() -> None:
    assert migrate("notes/1", {"a": 1}) == {"a": 1}
    with pytest.raises(SchemaTooNewError):
        migrate("notes/2", {"a": 1})
    with pytest.raises(StateCorruptedError, match="no migration"):
        migrate("notes/0", {"a": 1})


def test_a_migration_leaves_what_it_was_given_alone() -> None:
    body = {"_version": "1.0", "agent_id": "a"}
    assert migrate("agents/0", body) == {"agent_id": "a"}
    assert body == {"_version": "1.0", "agent_id": "a"}


async def test_a_moved_directory_opens_as_it_was(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path / "here") as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
    shutil.move(tmp_path / "here", tmp_path / "there")
    async with StatePersistenceManager(tmp_path / "there", exclusive=True) as manager:
        assert await manager.list_persisted_agents() == ["alice"]
        assert manager.incidents() == []
