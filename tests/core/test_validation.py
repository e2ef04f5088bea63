"""The validator is asked about every state: on the way in, and on the way out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from agent_state import (
    AsyncAgentSessionManager,
    JSONStateSerializer,
    MemoryStateStore,
    ModelStateValidator,
    StateCorruptedError,
    StatePersistenceManager,
    StateValidationError,
    StateValidator,
    TaskQueueState,
)
from agent_state.models import SCHEMAS, AgentState, OpenModel
from agent_state.protocols import JsonObject, Put
from agent_state.testing.contract_base import put
from agent_state.verify import verify
from agent_state.web.backend import ReadOnlyBackend


class Note(BaseModel):
    n: int


class NamedAgent(AgentState):
    agent_name: str


class SameValidator(ModelStateValidator):
    """A subclass that changes nothing."""


class AskingValidator(ModelStateValidator):
    """A subclass that keeps what the models return to itself."""

    def validate(self, kind: str, state: Mapping[str, Any]) -> None:
        super().validate(kind, state)


class WrappingValidator:
    """Another class that asks the default one."""

    def __init__(self, models: Mapping[str, type[BaseModel]]) -> None:
        self._validator = ModelStateValidator(models)

    def validate(self, kind: str, state: Mapping[str, Any]) -> None:
        self._validator.validate(kind, state)


VALIDATORS = [ModelStateValidator, SameValidator, AskingValidator, WrappingValidator]
MODELS: dict[str, type[BaseModel]] = {"notes": Note, "agents": NamedAgent}


class Other:
    """Another writer, that asks no validator: a person, or another program."""

    def __init__(self, manager: StatePersistenceManager, state_dir: Path) -> None:
        self._manager = manager
        self._state_dir = state_dir

    async def write(self, kind: str, key: tuple[str, ...], body: JsonObject) -> None:
        data = json.dumps(body, separators=(",", ":"), sort_keys=True)
        if isinstance(self._manager.store, MemoryStateStore):
            await self._manager.store.commit([Put(kind, key, data.encode(), f"{kind}/1")])
            return
        await self._manager.flush()
        path = self._state_dir.joinpath(kind, *key).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data)


CASES = [
    ("shared", ModelStateValidator),
    ("exclusive", ModelStateValidator),
    *(("memory", validator) for validator in VALIDATORS),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1].__name__}")
async def manager(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[StatePersistenceManager]:
    store, validator = request.param
    if store == "memory":
        made = StatePersistenceManager(store=MemoryStateStore(), validator=validator(MODELS))
    else:
        made = StatePersistenceManager(
            tmp_path, exclusive=store == "exclusive", validator=validator(MODELS)
        )
    async with made as manager:
        yield manager


@pytest.fixture
def other(manager: StatePersistenceManager, tmp_path: Path) -> Other:
    return Other(manager, tmp_path)


BAD = {"n": "not a number"}


async def test_a_save_and_a_load_refuse_the_same(
    manager: StatePersistenceManager, other: Other
) -> None:
    with pytest.raises(StateValidationError, match="n: "):
        await manager.save("notes", "a", BAD)
    await other.write("notes", ("a",), BAD)

    with pytest.raises(StateCorruptedError, match="n: ") as caught:
        await manager.load("notes", "a")

    assert (caught.value.kind, caught.value.key) == ("notes", ("a",))
    assert await manager.load("notes", "a") is None  # it is in quarantine
    [incident] = manager.incidents()
    assert (incident.kind, incident.key, incident.restored) == ("notes", ("a",), False)


async def test_a_replaced_model_is_asked_too(
    manager: StatePersistenceManager, other: Other
) -> None:
    with pytest.raises(StateValidationError, match="agent_name"):
        await manager.save_agent_state("a", {"agent_id": "a"})
    await manager.save_agent_state("b", {"agent_id": "b", "agent_name": "Bob", "more": [1]})
    await other.write("agents", ("a",), {"agent_id": "a"})

    with pytest.raises(StateCorruptedError, match="agent_name"):
        await manager.load_agent_state("a")
    loaded = await manager.load_agent_state("b")

    assert loaded == AgentState(agent_id="b", agent_name="Bob", more=[1])  # type: ignore[call-arg]


async def test_scan_and_edit_refuse_what_load_refuses(
    manager: StatePersistenceManager, other: Other
) -> None:
    await manager.save("notes", "good", {"n": 1, "more": "kept"})
    await other.write("notes", ("scanned",), BAD)
    await other.write("notes", ("edited",), BAD)

    with pytest.raises(StateCorruptedError):
        async with manager.edit("notes", "edited"):
            raise AssertionError("there is nothing that could be edited")
    found = {loaded.key: loaded.state.model_dump() async for loaded in manager.scan("notes")}

    assert found == {("good",): {"n": 1, "more": "kept"}}
    assert {incident.key for incident in manager.incidents()} == {("scanned",), ("edited",)}


async def test_a_scan_reports_an_unusable_document_that_is_not_in_its_file_yet(
    manager: StatePersistenceManager,
) -> None:
    await manager.store.commit([put("a", BAD)])  # by another manager of this store

    assert [loaded async for loaded in manager.scan("notes")] == []

    [incident] = manager.incidents()
    assert (incident.kind, incident.key) == ("notes", ("a",))


async def test_an_edit_that_is_refused_gives_way_to_the_version_before(
    manager: StatePersistenceManager, other: Other
) -> None:
    await manager.save("notes", "a", {"n": 1})
    await manager.flush()
    await manager.save("notes", "a", {"n": 2})
    await other.write("notes", ("a",), BAD)

    if isinstance(manager.store, MemoryStateStore):  # it keeps no earlier version
        with pytest.raises(StateCorruptedError):
            await manager.load("notes", "a")
        return
    loaded = await manager.load("notes", "a")

    assert loaded is not None
    assert loaded.model_dump() == {"n": 2}
    assert [incident.restored for incident in manager.incidents()] == [True]


async def test_who_is_notified_of_an_edit_that_is_refused_finds_the_error(
    manager: StatePersistenceManager, other: Other
) -> None:
    async with aclosing(await manager.subscribe()) as notices:
        await other.write("notes", ("a",), BAD)
        async for notice in notices:
            if notice.key == ("a",):
                break
        with pytest.raises(StateCorruptedError):
            await manager.load(notice.kind, notice.key)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("make", [ModelStateValidator, WrappingValidator])
async def test_what_was_edited_between_two_runs_is_refused(
    tmp_path: Path,
    make: Callable[[Mapping[str, type[BaseModel]]], StateValidator],
    exclusive: bool,
) -> None:
    validator = make(MODELS)
    async with StatePersistenceManager(tmp_path, validator=validator) as first:
        await first.save("notes", "a", {"n": 1})
    path = tmp_path / "notes" / "a.json"
    path.write_text(path.read_text().replace('"n": 1', '"n": "not a number"'))
    path.with_name("b.json").write_text(json.dumps(BAD))

    report = await verify(tmp_path, validator=validator)
    assert sorted(finding.key for finding in report.problems) == [("a",), ("b",)]
    async with StatePersistenceManager(
        tmp_path, validator=validator, exclusive=exclusive
    ) as manager:
        for key in ("a", "b"):
            with pytest.raises(StateCorruptedError, match="n: "):
                await manager.load("notes", key)

        assert not list((tmp_path / "notes").glob("*.json"))


async def test_verify_asks_the_serializer_too(tmp_path: Path) -> None:
    class Veiled(JSONStateSerializer):
        """Stores a state so that only it can read it."""

        def dumps(self, state: Mapping[str, Any]) -> bytes:
            return super().dumps({"veiled": dict(state)})

        def loads(self, data: bytes) -> JsonObject:
            found: JsonObject = super().loads(data)["veiled"]
            return found

    async with StatePersistenceManager(tmp_path, serializer=Veiled()) as manager:
        await manager.save_agent_state("a", {"agent_id": "a", "status": "idle"})
        await manager.save("sleep", "a", {"agent_id": "a", "wake_events": []})

    assert (await verify(tmp_path, serializer=Veiled())).ok
    assert {finding.fault for finding in (await verify(tmp_path)).problems} <= {"invalid"}


async def test_a_runtime_restores_no_agent_that_the_validator_refuses(tmp_path: Path) -> None:
    agents = tmp_path / "agents"
    agents.mkdir()
    agents.joinpath("bad.json").write_text('{"agent_id": "bad"}')
    agents.joinpath("good.json").write_text('{"agent_id": "good", "agent_name": "Good"}')

    async with AsyncAgentSessionManager(tmp_path, validator=ModelStateValidator(MODELS)) as runtime:
        report = runtime.report

    assert report is not None
    assert report.agents == ["good"]
    assert [incident.key for incident in report.contained] == [("bad",)]


async def test_a_backend_of_a_directory_asks_the_validator(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        await manager.save("notes", "a", BAD)

    backend = ReadOnlyBackend(tmp_path, validator=ModelStateValidator(MODELS))
    async with backend, backend.view() as view:
        with pytest.raises(StateCorruptedError):
            await view.manager.load("notes", "a")


# -- queues and mailboxes ---------------------------------------------------------------------


async def test_a_task_that_is_refused_by_load_is_not_in_its_queue(
    manager: StatePersistenceManager, other: Other
) -> None:
    bad = {"task_id": "bad", "attempts": "many"}
    with pytest.raises(StateValidationError, match="attempts"):
        await manager.save("tasks", ("a", "bad"), bad)
    await manager.save("tasks", ("a", "good"), {"task_id": "good", "attempts": 0})
    await other.write("tasks", ("a", "bad"), bad)

    queue = await manager.load_task_queue_state("a")

    assert queue is not None
    assert queue.pending_tasks == [{"task_id": "good", "attempts": 0}]
    assert [incident.key for incident in manager.incidents()] == [("a", "bad")]


async def test_a_queue_that_is_refused_on_save_is_refused_on_load(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    class Short(TaskQueueState):
        name: str

    held = StatePersistenceManager(
        store=manager.store, validator=ModelStateValidator({"task_queues": Short})
    )
    with pytest.raises(StateValidationError, match="name"):
        await held.save_task_queue_state("a", {"agent_id": "a"})
    await manager.save_task_queue_state("a", {"agent_id": "a"})

    with pytest.raises(StateCorruptedError, match="name"):
        await held.load_task_queue_state("a")


# -- at no price ------------------------------------------------------------------------------


async def test_a_load_validates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(OpenModel):
        n: int
        built: ClassVar[int] = 0

        def model_post_init(self, context: object, /) -> None:
            type(self).built += 1

    monkeypatch.setitem(SCHEMAS, "counted", Counted)
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        await manager.save("counted", "a", {"n": 1})
        saved = Counted.built
        await manager.load("counted", "a")

    assert (saved, Counted.built) == (1, 2)
