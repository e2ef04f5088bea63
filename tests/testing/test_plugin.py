"""The pytest plugin, as the test suite of somebody else has it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agent_state import AgentRuntime, StatePersistenceManager, TaskContext
from agent_state.testing import FakeClock, FakeLLM, ScriptEndedError
from agent_state.testing.contents import StateTree
from agent_state_integrations.pytest_plugin import STORES

ROOT = Path(__file__).parents[2]

SUITE = """
import asyncio
import pytest
from agent_state import TaskContext

{marker}

async def test_a_manager(state_manager, app):
    assert await app() == 1
    await state_manager.save_agent_state("ann", {{"agent_id": "ann", "mood": "good"}})


async def test_a_crash_reaches_the_test(agent_runtime, crash_after, restart, fake_clock):
    @agent_runtime.task("nap", agent_type="worker")
    async def nap(ctx: TaskContext):
        await ctx.step("look", dict)
        await fake_clock.sleep(60)
        return "slept"

    await agent_runtime.agents.create("ann", agent_type="worker")
    async with crash_after(commits=2):
        task = await agent_runtime.tasks.submit("ann", "nap")
        await agent_runtime.tasks.result(task)
    runtime = await restart(agent_runtime)
    [task] = await runtime.tasks.list("ann")
    await fake_clock.advance(120)
    assert await runtime.tasks.result(task) == "slept"


async def test_a_tree(agent_runtime, state_tree):
    await agent_runtime.agents.create("ann", agent_type="worker")
    await state_tree.check()
"""
APP = """
import pytest
{imports}

@{decorator}
async def app(state_manager):
    async def count():
        return await state_manager.save("counts", "a", {{"n": 1}})

    yield count
    assert await state_manager.delete("counts", "a")  # it is still open
"""


KINDS_OF_STORES = STORES if shutil.which("redis-server") else STORES[:-1]


def run(folder: Path, *arguments: str, warnings: str = "error") -> tuple[int, str]:
    """Run pytest as a user does, with the plugins that the arguments name."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"-W{warnings}"]
    done = subprocess.run(
        [*command, "-p", "agent_state", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def write_suite(
    folder: Path, *, marker: str = "", anyio: bool = False, strict: bool = True
) -> None:
    imports, decorator = ("", "pytest.fixture")
    if strict and not anyio:
        imports, decorator = "import pytest_asyncio", "pytest_asyncio.fixture"
    (folder / "conftest.py").write_text(APP.format(imports=imports, decorator=decorator))
    (folder / "test_suite.py").write_text(SUITE.format(marker=marker))
    (folder / "pytest.ini").write_text("[pytest]\n")


LOOP = ("-p", "pytest_asyncio.plugin")
ASYNCIO = (*LOOP, "-o", "asyncio_default_fixture_loop_scope=function")
ANYIO = ("-p", "anyio.pytest_plugin")
BACKEND = """
@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


SEVERAL = pytest.mark.long("each is a test run of its own")


@pytest.mark.parametrize(
    "way",
    ["strict", "anyio", *(pytest.param(way, marks=SEVERAL) for way in ("auto", "both", "session"))],
)
def test_a_suite_passes_with_every_plugin_for_loops(way: str, tmp_path: Path) -> None:
    plugins: tuple[str, ...] = ASYNCIO
    marker = "pytestmark = pytest.mark.asyncio"
    if way in ("anyio", "both"):
        marker = "pytestmark = pytest.mark.anyio\n" + BACKEND
        plugins = ANYIO if way == "anyio" else (*ANYIO, *ASYNCIO)
    write_suite(tmp_path, marker=marker, anyio=way in ("anyio", "both"), strict=way != "auto")
    if way == "auto":
        plugins = (*plugins, "--asyncio-mode=auto")
    if way == "session":
        scopes = [f"asyncio_default_{what}_loop_scope=session" for what in ("fixture", "test")]
        plugins = (*LOOP, "-o", scopes[0], "-o", scopes[1])

    code, output = run(tmp_path, *plugins, "--snapshot-update")

    assert code == 0, output
    assert f"{len(KINDS_OF_STORES) + 2} passed" in output


def test_a_suite_passes_with_xdist_and_a_changed_file_is_shown(tmp_path: Path) -> None:
    write_suite(tmp_path, marker="pytestmark = pytest.mark.asyncio")
    snapshot = tmp_path / "__snapshots__" / "test_suite" / "test_a_tree.txt"

    code, output = run(tmp_path, *ASYNCIO, "-p", "xdist.plugin", "-n", "2", "--snapshot-update")
    assert code == 0, output
    assert f"{len(KINDS_OF_STORES) + 2} passed" in output
    stored = snapshot.read_text()
    assert "=== agents/ann.json\n{\n" in stored

    snapshot.write_text(stored.replace('"agent_type": "worker"', '"agent_type": "boss"'))
    code, output = run(tmp_path, *ASYNCIO, "-k", "tree")
    assert code == 1
    assert '-  "agent_type": "boss"' in output
    assert '+  "agent_type": "worker"' in output


def test_without_a_plugin_for_loops_it_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(state_manager): pass\n")
    code, output = run(tmp_path)
    assert code == 1
    assert "needs pytest-asyncio, or a test of anyio's" in output


def test_on_trio_it_says_that_it_needs_asyncio(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n@pytest.fixture\ndef anyio_backend():\n    return 'trio'\n\n"
        "def test_it(anyio_backend, agent_runtime): pass\n"
    )
    code, output = run(tmp_path, *ANYIO)
    assert code == 1
    assert "agent_state needs asyncio; this test runs on trio" in output


def test_the_stores_are_chosen_by_the_settings_and_by_the_test(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nagent_state_stores = memory shared\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_both(state_manager): pass\n\n"
        '@pytest.mark.parametrize("state_manager", ["exclusive"], indirect=True)\n'
        "def test_one(state_manager): assert state_manager.state_dir\n"
    )
    code, output = run(tmp_path, *ASYNCIO, "-v")
    assert code == 0, output
    assert "test_both[memory]" in output
    assert "test_both[shared]" in output
    assert "test_one[exclusive]" in output
    assert "3 passed" in output

    (tmp_path / "pytest.ini").write_text("[pytest]\nagent_state_stores = floppy\n")
    code, output = run(tmp_path, *ASYNCIO)
    assert code == 4
    assert "floppy" in output


def test_a_check_that_is_not_awaited_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(state_tree):\n    state_tree.check()\n")
    code, output = run(tmp_path, *ASYNCIO)

    assert code == 1
    assert "state_tree.check() was not awaited" in output


def test_another_plugin_may_have_the_option_for_snapshots(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "def pytest_addoption(parser):\n"
        "    parser.getgroup('other').addoption('--snapshot-update', action='store_true',\n"
        "        default=False, dest='update_snapshots')\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n@pytest.mark.asyncio\n"
        "async def test_it(state_tree, state_dir):\n"
        "    state_dir.mkdir()\n    (state_dir / 'a.json').write_text('{}')\n"
        "    await state_tree.check('mine')\n"
    )
    code, output = run(tmp_path, *ASYNCIO, "-p", "other")
    assert code == 1
    assert "`pytest --snapshot-update` stores what is there" in output
    code, output = run(tmp_path, *ASYNCIO, "-p", "other", "--snapshot-update")
    assert code == 0, output
    assert (tmp_path / "__snapshots__" / "test_it" / "mine.txt").read_text() == "=== a.json\n{}\n"


def test_it_is_installed_and_loads_nothing_until_a_test_asks(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import sys\n\ndef pytest_sessionfinish(session):\n"
        "    plugin = session.config.pluginmanager.has_plugin('agent_state')\n"
        "    loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "    print('plugin', plugin, 'library', 'agent_state' in loaded, 'pydantic' in loaded)\n"
    )
    (tmp_path / "test_it.py").write_text("def test_it(tmp_path): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:schemathesis"]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}

    def told(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return next(line for line in done.stdout.splitlines() if "plugin" in line)

    assert "plugin True library False" in told()
    assert "plugin False library False" in told("-p", "no:agent_state")


# -- fixtures, used by this suite itself -----------------------------------------------------------


async def test_advance_waits_until_a_task_on_a_disk_sleeps(
    agent_runtime: AgentRuntime, fake_clock: FakeClock
) -> None:
    """Each save of the attempt is work in a thread; time goes on when the handler sleeps."""
    woken = list[float]()

    @agent_runtime.task("nap", agent_type="worker")
    async def nap(ctx: TaskContext) -> None:
        for name in "abc":
            await ctx.checkpoint({"at": name})
            await ctx.step(name, time.sleep, 0.01)  # a plain function runs in a thread
            await fake_clock.sleep(10)
            woken.append(fake_clock.monotonic())

    await agent_runtime.agents.create("ann", agent_type="worker")
    task = await agent_runtime.tasks.submit("ann", "nap")
    await fake_clock.advance(30)
    assert woken == [10, 20, 30]
    await agent_runtime.tasks.result(task)


async def test_a_snapshot_of_both_ways_to_write_files_is_the_same(
    state_manager: StatePersistenceManager, state_tree: Any
) -> None:
    await state_manager.save_agent_state("ann", {"agent_id": "ann", "mood": "good"})
    await state_manager.append("notes", "all", {"n": 1})
    if state_manager.state_dir is not None:
        await state_tree.check(mask={r'("mood": )"\w+"': r'\1"<mood>"'})
        assert '"mood": "good"' in await state_tree.text()
    else:
        assert await state_tree.text() == ""


def test_a_snapshot_names_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "state/notes").mkdir(parents=True)
    (tmp_path / "state/notes/picture.png").write_bytes(b"\x89PNG\xff")
    tree = StateTree(tmp_path / "state", tmp_path / "tree.txt", update=True)
    assert tree.text() == (
        "=== notes/picture.png\n(5 bytes that are no text, SHA-256 88d68653bc6eba81)\n"
    )


async def test_the_model_answers_as_it_is_told(fake_llm: FakeLLM, fake_clock: FakeClock) -> None:
    fake_llm.call_tool("add", a=1, b=2).reply("3").fail(TimeoutError("late"))
    fake_llm.answer(lambda messages: {"role": "assistant", "content": f"{len(messages)} messages"})
    question = [{"role": "user", "content": "1 + 2?"}]

    message = await fake_llm(question, model="any")
    assert message["tool_calls"] == [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a":1,"b":2}'},
        }
    ]
    assert fake_llm.complete(question) == {"role": "assistant", "content": "3"}
    with pytest.raises(TimeoutError, match="late"):
        await fake_llm(question)
    question.append({"role": "user", "content": "Well?"})
    assert (await fake_llm(question))["content"] == "2 messages"
    assert [len(messages) for messages in fake_llm.calls] == [1, 1, 1, 2]
    assert fake_llm.left == 0
    with pytest.raises(ScriptEndedError, match=r"call 5 .*Well"):
        await fake_llm(question)


async def test_a_model_may_take_its_time(fake_llm: FakeLLM, fake_clock: FakeClock) -> None:
    asking = asyncio.create_task(fake_llm.reply("at last", seconds=60)([]))
    await fake_clock.advance(59)
    assert not asking.done()
    await fake_clock.advance(1)
    assert (await asking)["content"] == "at last"
