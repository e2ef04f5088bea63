"""Fixtures for the test suites of agent frameworks; pytest loads them by itself.

``-p no:agent_state`` leaves them out. Loading this module imports nothing of agent_state: a
fixture does, when a test first asks for it. docs/testing.md shows each.

The asynchronous fixtures run on the loop of the test, with pytest-asyncio in either mode and with
anyio.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from random import Random
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from agent_state import AgentRuntime, StatePersistenceManager, StateStore
    from agent_state.testing import CrashPoint, FakeClock, FakeLLM, ProcessGroup
    from agent_state.testing.contents import StateTree
    from agent_state.testing.faults import Action

STORES = ("memory", "shared", "exclusive", "redis")
"""The stores that ``state_manager`` runs a test with; ``redis`` where there is one."""
LOOP_SCOPES = ("function", "class", "module", "package", "session")
REDIS_URL = "AGENT_STATE_TEST_REDIS"
"""The environment variable with the URL of a Redis for tests."""
_UPDATE = "--snapshot-update"
_REDIS_STARTS = 6_000
"""How often a server is asked whether it has started, every 10 ms."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "agent_state_stores",
        "the stores that the fixture state_manager runs a test with "
        f"(default: {' '.join(STORES)}; redis where redis-server or ${REDIS_URL} is there)",
        type="args",
        default=list(STORES),
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser) -> None:
    """Add the option now, when every other plugin is loaded: several bring one of that name."""
    if early_config.getoption(_UPDATE, None) is None:
        group = parser.getgroup("agent_state", "agent_state")
        group.addoption(
            _UPDATE, action="store_true", default=False, help="store what state_tree compares"
        )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_asynchronous_fixtures(config), "agent_state_fixtures")


# -- fixtures that do not await --------------------------------------------------------------------


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """The state directory of the test; it does not exist yet."""
    return tmp_path / "state"


@pytest.fixture
def fake_clock() -> FakeClock:
    """A clock that stands at 2026-01-01 until ``await fake_clock.advance(seconds)``."""
    from agent_state.testing import FakeClock

    return FakeClock()


@pytest.fixture
def fake_llm(fake_clock: FakeClock) -> FakeLLM:
    """A language model that answers as the test says."""
    from agent_state.testing import FakeLLM

    return FakeLLM(clock=fake_clock)


@pytest.fixture
def assert_restored_equal() -> Callable[..., Any]:
    """The function of that name in ``agent_state.testing``, to be awaited."""
    from agent_state.testing import assert_restored_equal

    return assert_restored_equal


class Processes:
    """What the fixtures of one test have opened, and how each is opened."""

    def __init__(self) -> None:
        from agent_state.testing import ProcessGroup

        self.group: ProcessGroup = ProcessGroup()
        self.makers: dict[str, Callable[[], Any]] = {}


@pytest.fixture
def _state_processes() -> Processes:
    return Processes()


class RestartFunction(Protocol):
    """``await restart(process, crash=False)``."""

    async def __call__(self, process: Any, *, crash: bool = False) -> Any:
        """End a runtime or a manager that a fixture made, and return the one after it."""


@pytest.fixture
def restart(_state_processes: Processes) -> RestartFunction:
    """Ends a runtime or a manager in good order, or with ``crash=True`` as a kill; starts the next.

    ::

        agent_runtime = await restart(agent_runtime, crash=True)
    """
    return _state_processes.group.restart


@pytest.fixture
def crash_at(state_dir: Path, _state_processes: Processes) -> Callable[..., CrashPoint]:
    """Makes a block of the test a process that dies at a system call.

    ::

        async with crash_at("rename", 2):
            ...
    """
    from agent_state.testing import CrashPoint

    def crash(call: str, at: int = 1, *, action: Action = "crash before") -> CrashPoint:
        group = _state_processes.group
        return CrashPoint(state_dir, call=call, at=at, action=action, group=group)

    return crash


@pytest.fixture
def crash_after(state_dir: Path, _state_processes: Processes) -> Callable[..., CrashPoint]:
    """Makes a block of the test a process that dies once so many commits are durable.

    ::

        async with crash_after(commits=2):
            ...
    """
    from agent_state.testing import CrashPoint

    def crash(*, commits: int) -> CrashPoint:
        return CrashPoint(state_dir, commits=commits, group=_state_processes.group)

    return crash


class TreeSnapshot:
    """``await state_tree.check()``: what the test left on disk is what it left before."""

    def __init__(
        self, state_dir: Path, snapshots: Path, name: str, group: ProcessGroup, *, update: bool
    ) -> None:
        self._state_dir, self._snapshots, self._name = state_dir, snapshots, name
        self._group, self._update = group, update
        self.waiting = 0

    def _tree(self, name: str | None) -> StateTree:
        from agent_state.testing.contents import StateTree

        snapshot = self._snapshots / f"{name or self._name}.txt"
        return StateTree(self._state_dir, snapshot, update=self._update)

    async def text(self, mask: dict[str, str] | None = None) -> str:
        """The files below the state directory, with their text."""
        await self._group.flush()
        return self._tree(None).text(mask)

    def check(
        self, name: str | None = None, *, mask: dict[str, str] | None = None
    ) -> Coroutine[None, None, None]:
        """Compare them with the snapshot of that name; None: that of the test's name.

        Parametrised tests share one. ``mask``: texts by the regular expression that they replace.
        A check that is not awaited fails the test.
        """
        self.waiting += 1
        return self._check(name, mask)

    async def _check(self, name: str | None, mask: dict[str, str] | None) -> None:
        self.waiting -= 1
        await self._group.flush()
        self._tree(name).check(mask)


@pytest.fixture
def state_tree(
    request: pytest.FixtureRequest, state_dir: Path, _state_processes: Processes
) -> Iterator[TreeSnapshot]:
    """``await state_tree.check()``; ``pytest --snapshot-update`` stores it."""
    test = request.node
    names = [*(each.name for each in test.listchain() if isinstance(each, pytest.Class))]
    name = ".".join((*names, getattr(test, "originalname", None) or test.name))
    folder = test.path.parent / "__snapshots__" / test.path.stem
    update = bool(request.config.getoption(_UPDATE, default=False))
    tree = TreeSnapshot(state_dir, folder, name, _state_processes.group, update=update)
    yield tree
    if tree.waiting:
        pytest.fail("state_tree.check() was not awaited, and compared nothing", pytrace=False)


# -- stores ----------------------------------------------------------------------------------------


def _stores(config: pytest.Config) -> list[str]:
    names = list(config.getini("agent_state_stores"))
    unknown = {*names} - {*STORES}
    if unknown:
        known = ", ".join(STORES)
        raise pytest.UsageError(f"agent_state_stores: {unknown} is not among {known}")
    if "redis" in names and not _has_redis():
        names.remove("redis")
    return names


def _has_redis() -> bool:
    if importlib.util.find_spec("redis") is None:
        return False
    return REDIS_URL in os.environ or shutil.which("redis-server") is not None


@pytest.fixture(scope="session")
def _state_redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Redis that is given, or one that lives as long as this test run."""
    given = os.environ.get(REDIS_URL)
    if given:
        yield given
        return
    with _running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@contextmanager
def _running_redis(folder: Path) -> Iterator[str]:
    """A server of our own on a free port; it keeps nothing on disk."""
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError as NotYet
    from redis.retry import Retry

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log) as server:  # noqa: S603  # no input of others
        try:
            with Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:  # by default it naps
                for _ in range(_REDIS_STARTS):
                    with suppress(NotYet):
                        client.ping()
                        break
                    if server.poll() is not None:
                        raise RuntimeError(f"redis-server ended: {(folder / 'log').read_text()}")
                    time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.kill()


def _new_store(request: pytest.FixtureRequest, name: str) -> Callable[[], StateStore | None]:
    """Makes the store as each process opens it; None for files. Memory outlives a process."""
    clock = request.getfixturevalue("fake_clock")
    if name == "memory":
        from agent_state import MemoryStateStore

        kept = MemoryStateStore(clock=clock)
        return lambda: kept
    if name == "redis":
        from agent_state.redis.store import RedisStateStore

        url = request.getfixturevalue("_state_redis_url")
        prefix = f"{request.getfixturevalue('state_dir')}:"
        return lambda: RedisStateStore(url, prefix=prefix, clock=clock)
    if name not in STORES:
        raise pytest.UsageError(f"{name!r} is none of the stores {', '.join(STORES)}")
    return lambda: None


def _manager_maker(
    request: pytest.FixtureRequest, name: str
) -> Callable[[], StatePersistenceManager]:
    from agent_state import StatePersistenceManager

    clock, new_store = request.getfixturevalue("fake_clock"), _new_store(request, name)

    def make() -> StatePersistenceManager:
        store = new_store()
        if store is not None:
            return StatePersistenceManager(store=store, clock=clock)
        path, exclusive = request.getfixturevalue("state_dir"), name == "exclusive"
        return StatePersistenceManager(path, exclusive=exclusive, durability="os", clock=clock)

    return make


def _runtime_maker(request: pytest.FixtureRequest, name: str) -> Callable[[], AgentRuntime]:
    from agent_state import AgentRuntime

    clock, new_store = request.getfixturevalue("fake_clock"), _new_store(request, name)
    numbers = count(1)

    def make() -> AgentRuntime:
        store = new_store()
        settings: dict[str, Any] = {
            "clock": clock,
            "new_id": lambda: f"id-{next(numbers):04d}",
            "random": Random(0),  # noqa: S311  # jitter, the same in every run
            "grace_seconds": 0.0,  # a handler that waits for the fake clock would never end
        }
        if store is not None:
            return AgentRuntime(store=store, exclusive=name == "memory", **settings)
        path, exclusive = request.getfixturevalue("state_dir"), name == "exclusive"
        return AgentRuntime(path, exclusive=exclusive, durability="os", **settings)

    return make


# -- fixtures on the loop of the test --------------------------------------------------------------


def _asynchronous_fixtures(config: pytest.Config) -> ModuleType:
    """``state_manager`` and ``agent_runtime``, and for each what opens it on one kind of loop."""
    fixtures = ModuleType("agent_state_fixtures")

    @pytest.fixture(params=_stores(config))
    def state_manager(
        request: pytest.FixtureRequest, _state_processes: Processes
    ) -> StatePersistenceManager:
        """An open manager on the fake clock, over each kind of store."""
        return _begun(request, "manager", _manager_maker(request, request.param))  # type: ignore[no-any-return]  # what it opens

    @pytest.fixture
    def agent_runtime(request: pytest.FixtureRequest, _state_processes: Processes) -> AgentRuntime:
        """A started runtime on the fake clock, which owns the state directory.

        ``parametrize("agent_runtime", ["memory", "shared"], indirect=True)`` chooses other stores.
        """
        store = getattr(request, "param", "exclusive")
        return _begun(request, "runtime", _runtime_maker(request, store))  # type: ignore[no-any-return]  # what it opens

    fixtures.state_manager, fixtures.agent_runtime = state_manager, agent_runtime  # type: ignore[attr-defined]  # a namespace
    has_asyncio = _has_asyncio(config)
    for what in ("manager", "runtime"):
        name = f"_state_{what}_anyio"
        setattr(fixtures, name, pytest.fixture(name=name)(_opening(what)))
        for scope in LOOP_SCOPES if has_asyncio else ():
            import pytest_asyncio

            name = f"_state_{what}_{scope}"
            made = pytest_asyncio.fixture(name=name, loop_scope=scope)(_opening(what))  # type: ignore[call-overload]  # a scope by a variable
            setattr(fixtures, name, made)
    return fixtures


def _has_asyncio(config: pytest.Config) -> bool:
    names = ("asyncio", "pytest_asyncio.plugin")  # as it is installed, as ``-p`` names it
    return any(map(config.pluginmanager.has_plugin, names))


def _opening(what: str) -> Callable[[Processes], AsyncIterator[Any]]:
    async def opened(_state_processes: Processes) -> AsyncIterator[Any]:
        group = _state_processes.group
        try:
            yield await group.begin(_state_processes.makers[what])
        finally:
            await group.end()

    return opened


def _begun(request: pytest.FixtureRequest, what: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, begun on the loop that the test runs on."""
    request.getfixturevalue("_state_processes").makers[what] = make
    return request.getfixturevalue(f"_state_{what}_{_loop_of(request)}")


def _loop_of(request: pytest.FixtureRequest) -> str:
    """``anyio``, or the scope of pytest-asyncio's loop."""
    config, node = request.config, request.node
    has_asyncio = _has_asyncio(config)
    automatic = has_asyncio and config.getoption("asyncio_mode", None) == "auto"
    automatic = automatic or (has_asyncio and config.getini("asyncio_mode") == "auto")
    if "anyio_backend" in request.fixturenames and not automatic:
        backend = request.getfixturevalue("anyio_backend")
        name = backend if isinstance(backend, str) else backend[0]
        if name != "asyncio":
            pytest.fail(f"agent_state needs asyncio; this test runs on {name}", pytrace=False)
        return "anyio"
    if not has_asyncio:
        pytest.fail("this fixture needs pytest-asyncio, or a test of anyio's", pytrace=False)
    marker = node.get_closest_marker("asyncio")
    scope = marker.kwargs.get("loop_scope") if marker is not None else None
    return str(scope or config.getini("asyncio_default_test_loop_scope") or "function")
