"""The server is killed in mid-chat and started again: what was acknowledged is there."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from tests.web.processes import SERVE, serving

pytestmark = pytest.mark.long("starts and kills servers")


async def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    state, said = tmp_path / "state", "/conversations/guide_agent/messages"
    sessions: list[dict[str, str]] = []
    acknowledged: dict[str, set[str]] = {}
    enough = asyncio.Event()

    async def chat(address: str, session: dict[str, str]) -> None:
        mine = {"Authorization": f"Bearer {session['session_token']}"}
        path = f"/api/global/session/{session['session_id']}{said}"
        known = acknowledged.setdefault(session["session_id"], set())
        async with httpx.AsyncClient(base_url=address, headers=mine, timeout=60) as client:
            number = len(known)
            while True:
                number += 1
                content = f"message {number}"
                key = {"Idempotency-Key": content}
                answer = await client.post(path, json={"content": content}, headers=key)
                assert answer.status_code in {200, 201}
                known.add(content)
                if all(len(each) >= 20 for each in acknowledged.values()):
                    enough.set()

    for _ in range(2):
        enough.clear()
        async with serving(state) as (address, server):
            async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                while len(sessions) < 4:
                    made = await client.post("/api/global/session", json={"context": {}})
                    sessions.append(made.json())
            chats = [asyncio.create_task(chat(address, session)) for session in sessions]
            async with asyncio.timeout(60):
                await enough.wait()
            server.kill()
            for ended in await asyncio.gather(*chats, return_exceptions=True):
                assert isinstance(ended, httpx.TransportError), ended

    async with (
        serving(state) as (address, _),
        httpx.AsyncClient(base_url=address, timeout=60) as client,
    ):
        for session in sessions:
            ident = session["session_id"]
            mine = {"Authorization": f"Bearer {session['session_token']}"}
            page = await client.get(
                f"/api/global/session/{ident}{said}", params={"limit": 1000}, headers=mine
            )
            stored = [message["content"] for message in page.json()["messages"]]
            assert len(stored) == len(set(stored))
            assert acknowledged[ident] <= set(stored)
            assert len(stored) <= len(acknowledged[ident]) + 2  # one may be under way at each kill
            assert page.json()["message_count"] == len(stored)


async def test_a_signal_ends_streams_and_the_server_in_good_order(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with (
        serving(state) as (address, server),
        httpx.AsyncClient(base_url=address, timeout=60) as client,
        client.stream("GET", "/api/events") as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == "event: ready"
        server.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            rest = [line async for line in lines]
            code = await server.wait()

    assert code == 0
    assert not any(line.startswith("event") for line in rest)
    async with serving(state) as (address, server), httpx.AsyncClient(base_url=address) as client:
        report = (await client.get("/api/restore-report")).json()
    assert report["after_crash"] is False


async def test_a_server_beside_the_owner_only_looks(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with serving(state) as (owner, _), serving(state, "--read-only") as (beside, _):
        async with httpx.AsyncClient(timeout=60) as client:
            made = (await client.post(f"{owner}/api/global/session", json={})).json()
            mine = {"Authorization": f"Bearer {made['session_token']}"}
            seen = await client.get(f"{beside}/api/global/session", headers=mine)
            refused = await client.post(f"{beside}/api/global/session", json={})
        second = await asyncio.create_subprocess_exec(*SERVE, str(state), stdout=-1, stderr=-1)
        _, complaint = await second.communicate()

    assert seen.json()["session_id"] == made["session_id"]
    assert refused.status_code == 409
    assert second.returncode == 2
    assert b"--read-only" in complaint
