"""``/ready`` tells when nothing can be written, on disks that are really full."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.deadlines import soon
from tests.web.processes import SERVE, serving

FULL = """
import asyncio, subprocess, sys
from pathlib import Path
from agent_state import StatePersistenceManager, StorageFullError
from agent_state.web.backend import check_writable
from tests.faults.filling import Ballast


async def main(kind, folder):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=True)
    ballast = Ballast(Path(folder) / "ballast")
    async with StatePersistenceManager(f"{folder}/state", exclusive=kind == "exclusive") as manager:
        await manager.save("notes", "a", {"n": 1})
        await check_writable(manager)
        assert [*await manager.keys("system")] == []
        ballast.fill()
        try:
            await check_writable(manager)
        except StorageFullError as error:
            print("refused")
        ballast.free()
        await check_writable(manager)
        assert [*await manager.keys("system")] == []


asyncio.run(main(*sys.argv[1:]))
"""


SLOW = """
from agent_state import AsyncAgentSessionManager


class SlowRuntime(AsyncAgentSessionManager):
    async def start(self):
        report = await super().start()
        await self.wait_for_gate()
        return report

    async def wait_for_gate(self):
        import asyncio, os
        reader = asyncio.StreamReader()
        gate = os.fdopen(os.open("gate", os.O_RDONLY | os.O_NONBLOCK), "rb")
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), gate
        )
        await reader.readline()


make = SlowRuntime
"""


@asynccontextmanager
async def _starting(folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, int, Process]]:
    """A server whose start waits for a line in a pipe, a client of it, and the pipe."""
    (folder / "slow.py").write_text(SLOW)
    os.mkfifo(folder / "gate")
    gate = os.open(folder / "gate", os.O_RDWR)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = await asyncio.create_subprocess_exec(
        *(*SERVE, "state", "--runtime", "slow:make", "--port", str(port)),
        cwd=folder,
        stdout=-1,
        stderr=-1,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            await soon(_until_answered(client))
            yield client, gate, server
    finally:
        if server.returncode is None:
            server.kill()
        await server.communicate()
        os.close(gate)


async def _until_answered(client: httpx.AsyncClient) -> None:
    """Ask until a server listens."""
    while True:
        with suppress(httpx.ConnectError):
            await client.get("/health")
            return


async def test_a_server_answers_while_its_state_is_restored(tmp_path: Path) -> None:
    async with _starting(tmp_path) as (client, gate, server):
        health, page = await client.get("/health"), await client.get("/")
        refused = [await client.get(path) for path in ("/ready", "/api/summary", "/metrics")]
        refused.append(await client.post("/api/agents", json={"agent_id": "alice"}))
        os.write(gate, b"\n")
        assert server.stdout is not None
        line = b""
        while b"serves" not in line:
            line = await soon(server.stdout.readline())
            assert line
        ready = await client.get("/ready")
        made = await client.post("/api/agents", json={"agent_id": "alice", "agent_type": "poet"})

    assert (health.status_code, page.status_code) == (200, 200)
    for answer in refused:
        assert (answer.status_code, answer.json()["code"]) == (503, "starting")
        assert answer.headers["retry-after"]
    assert (ready.status_code, made.status_code) == (200, 201)


async def test_a_server_can_be_ended_while_its_state_is_restored(tmp_path: Path) -> None:
    async with _starting(tmp_path) as (_, _, server):
        server.terminate()
        assert await soon(server.wait()) == 0
    async with serving(tmp_path / "state"):  # nobody has it any more
        pass


async def test_a_server_that_can_write_no_more_is_not_ready(tmp_path: Path) -> None:
    async with (
        serving(tmp_path / "state") as (address, server),
        httpx.AsyncClient(base_url=address, timeout=60) as client,
    ):
        assert (await client.get("/ready")).status_code == 200
        soft, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, hard))
        new = {"agent_id": "alice", "agent_type": "worker"}
        refused = await client.post("/api/agents", json=new)
        ready = await client.get("/ready")
        still = await client.get("/ready")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (soft, hard))
        again = await client.get("/ready")

    assert (refused.status_code, refused.json()["code"]) == (503, "storage_full")
    for answer in (ready, still):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_full")
        assert answer.headers["retry-after"]
    assert again.status_code == 200
    assert again.json()["writable"] is True


@pytest.mark.parametrize("kind", ["exclusive", "shared"])
def test_a_full_disk_is_known_before_a_save_is_refused(tmp_path: Path, kind: str) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False).returncode:
        pytest.skip("needs unshare -rm, for a file system of its own")
    command = [unshare, "-rm", sys.executable, "-c", FULL, kind, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
