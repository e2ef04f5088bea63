"""Routes and managers that other packages and applications add to the served ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fastapi import APIRouter

from agent_state import AgentStateError, MemoryStateStore, StatePersistenceManager
from agent_state.web import LiveBackend, ReadOnlyBackend, create_app, installed_routers
from agent_state.web.backend import EXTENSIONS, BackendDep
from tests.distributions import install
from tests.web.client import answering

ROUTES = "agent_state.routes"


class Counter:
    """The manager of an added system."""

    def __init__(self, manager: StatePersistenceManager, step: int = 1) -> None:
        self.manager = manager
        self.step = step
        self.count = 0


router = APIRouter()


@router.get("/count", operation_id="count")
async def count(backend: BackendDep) -> int:
    async with backend.view() as view:
        counter = view.service(Counter)
        counter.count += counter.step
        return counter.count


def _memory() -> StatePersistenceManager:
    return StatePersistenceManager(store=MemoryStateStore())


async def test_an_application_passes_its_own_routers() -> None:
    async with (
        _memory() as manager,
        answering(LiveBackend(manager=manager), routers=[router]) as client,
    ):
        assert (await client.get("/count")).json() == 1
        assert (await client.get("/count")).json() == 2  # one manager for all requests
        paths = client.app.openapi()["paths"]
    assert "/api/agents" in paths
    assert not [path for path in paths if path.startswith("/api/journeys")]


async def test_the_manager_of_an_added_system_has_the_settings_of_the_application() -> None:
    async with _memory() as manager:
        backend = LiveBackend(manager=manager, services=[Counter(manager, step=10)])
        async with answering(backend, routers=[router]) as client:
            assert (await client.get("/count")).json() == 10
            assert (await client.get("/count")).json() == 20


async def test_a_directory_has_a_new_manager_for_each_view(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    made: list[Counter] = []

    def make(manager: StatePersistenceManager) -> Counter:
        made.append(Counter(manager, step=5))
        return made[-1]

    async with ReadOnlyBackend(tmp_path / "state", services=[make]) as backend:
        async with answering(backend, routers=[router]) as client:
            assert [(await client.get("/count")).json() for _ in range(2)] == [5, 5]
        async with backend.view() as view:
            assert made[-1].manager is view.manager


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    entries = {name: f"{name}:router" for name in modules}
    install(folder, ROUTES, entries, modules)
    monkeypatch.syspath_prepend(folder)


ADDED = """
from fastapi import APIRouter
router = APIRouter()

@router.get("/added", operation_id="added")
async def added() -> str:
    return "it is there"
"""


async def test_the_routes_of_an_installed_package_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, monkeypatch, added_routes=ADDED)

    async with _memory() as manager, answering(LiveBackend(manager=manager)) as client:
        assert (await client.get("/added")).json() == "it is there"
        assert (await client.get("/api/journeys/ann")).status_code == 200


EXTENSION = """
def extend(sessions):
    sessions.extended = True
"""


async def test_an_installed_package_extends_every_served_session_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path / "site",
        EXTENSIONS,
        {"mine": "added_extension:extend", "without": "no_such_extension:extend"},
        {"added_extension": EXTENSION},
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "state").mkdir()

    live = LiveBackend(manager=_memory()).writable().sessions
    async with ReadOnlyBackend(tmp_path / "state") as backend, backend.view() as view:
        found = [vars(sessions).get("extended") for sessions in (live, view.sessions)]

    assert found == [True, True]


def test_routes_whose_extra_is_missing_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without = len(installed_routers())
    extra = "from agent_state import MissingExtraError\nraise MissingExtraError('redis', 'redis')"
    _install(tmp_path, monkeypatch, no_module="import no_such_module", no_extra=extra)

    with caplog.at_level(logging.WARNING):
        assert len(installed_routers()) == without

    assert "no_such_module" in caplog.text
    assert "agent-state[redis]" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"), [("1 / 0", "division by zero"), ("router = 5", "not an APIRouter")]
)
def test_broken_routes_are_an_error_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    name = f"broken_{len(text)}"
    _install(tmp_path, monkeypatch, **{name: text})

    with pytest.raises(AgentStateError, match=f"{name}.*{message}"):
        create_app(LiveBackend(manager=_memory()))
