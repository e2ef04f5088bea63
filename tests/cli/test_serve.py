"""``agent-state serve``: its arguments, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.cli.commands import Call
from tests.web.processes import SERVE, serving

APPLICATION = """
from agent_state import AsyncAgentSessionManager
from agent_state.sessions import SessionManager
from agent_state.web import LiveBackend

def make(state):
    runtime = AsyncAgentSessionManager(state)

    @runtime.handler("doubler")
    async def double(ctx, task):
        return 2 * task.payload["number"]

    return runtime

def with_poets(state):
    runtime = make(state)
    sessions = SessionManager(runtime.manager, agent_types=["poet"])
    return LiveBackend(runtime=runtime, sessions=sessions)

nothing = 42
"""


async def test_it_runs_the_agents_of_an_application(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    async with (
        serving(tmp_path / "state", "--runtime", "application:make", cwd=tmp_path) as (address, _),
        httpx.AsyncClient(base_url=address, timeout=60) as client,
    ):
        await client.post("/api/agents", json={"agent_id": "d", "agent_type": "doubler"})
        task = {"name": "x", "payload": {"number": 21}}
        done = await client.post("/api/agents/d/tasks", params={"wait": 20}, json=task)
        metrics = (await client.get("/metrics")).text

    assert done.json()["result"] == 42
    assert 'agent_state_attempts_total{agent_type="doubler",outcome="completed"} 1' in metrics


async def test_it_serves_sessions_as_an_application_wants_them(tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    options = ("--runtime", "application:with_poets")
    async with (
        serving(tmp_path / "state", *options, cwd=tmp_path) as (address, _),
        httpx.AsyncClient(base_url=address, timeout=60) as client,
    ):
        made = (await client.post("/api/global/session", json={})).json()

    assert "poet" in made["conversations"]


async def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("from-the-file-0123456789\n")
    variables = {"AGENT_STATE_TOKEN": "from-the-variable-0123456789"}
    options = ("--token-file", str(tmp_path / "tokens"))
    async with (
        serving(tmp_path / "state", *options, env=variables) as (address, _),
        httpx.AsyncClient(base_url=address, timeout=60) as client,
    ):
        statuses = [
            (await client.get("/api/agents", headers={"Authorization": f"Bearer {t}"})).status_code
            for t in ("from-the-file-0123456789", "from-the-variable-0123456789", "from-nowhere")
        ]
        statuses.append((await client.get("/api/agents")).status_code)

    assert statuses == [200, 200, 401, 401]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "needs a token"),
        ((), "no such state directory"),
        (("--read-only",), "no such state directory"),
        (("--state", "elsewhere"), "DIR or --state"),
        (("--read-only", "--runtime", "a:b"), "changes nothing"),
        (("--token-file", "none"), "cannot be read"),
        (("--runtime", "no_such_module:x"), "no_such_module"),
        (("--runtime", "json:none"), "none"),
        (("--runtime", "json"), "json"),
        (("--runtime", "json:codecs"), "AsyncAgentSessionManager"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.delenv("AGENT_STATE_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)

    refused = call("serve", "state", *arguments)

    assert refused.code == 2
    assert said in refused.err
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("written", ["state", "--state state", "AGENT_STATE_DIR"])
async def test_the_directory_is_named_as_everywhere(tmp_path: Path, written: str) -> None:
    (tmp_path / "state").mkdir()
    variable = {written: "state"} if written == "AGENT_STATE_DIR" else {}
    options = () if variable else tuple(written.split())
    server = await asyncio.create_subprocess_exec(
        *(*SERVE, *options, "--port", "0"), cwd=tmp_path, env={**os.environ, **variable}, stdout=-1
    )
    assert server.stdout is not None
    try:
        async with asyncio.timeout(240):
            said = b""
            while b"serves" not in said:
                said = await server.stdout.readline()
                assert said
    finally:
        server.kill()
        await server.communicate()
    assert b"serves state;" in said


def test_an_address_that_is_taken_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [*SERVE, "state", "--port", str(taken.getsockname()[1])]
        refused = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )

    assert refused.returncode == 2
    assert "in use" in refused.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    blocked = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['agent-state', 'serve'];"
        "from agent_state.cli import main; sys.exit(main())"
    )
    refused = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, check=False, timeout=60
    )

    assert refused.returncode == 2
    assert "agent-state[server]" in refused.stderr
