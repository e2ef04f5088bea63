"""``/ready`` tells when nothing can be written, on disks that are really full."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.web.processes import serving

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
