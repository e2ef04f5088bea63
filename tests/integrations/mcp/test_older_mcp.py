"""Events that older versions have stored."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mcp_types import JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from agent_state import StatePersistenceManager
from agent_state.testing import FakeClock
from agent_state_integrations.mcp import AgentStateEventStore
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("mcp", "mcp-types")


async def write(directory: Path, turn: int) -> None:
    clock = FakeClock(datetime(2026, 1, turn, tzinfo=UTC))
    async with (
        StatePersistenceManager(directory, clock=clock) as manager,
        AgentStateEventStore(manager) as store,
    ):
        params = {"n": turn, "none": None}
        await store.store_event("one", None)
        for message in (
            JSONRPCNotification(jsonrpc="2.0", method="notifications/n", params=params),
            JSONRPCRequest(jsonrpc="2.0", id=turn, method="tools/list"),
            JSONRPCResponse(jsonrpc="2.0", id=f"ü {turn}", result={"tools": []}),
        ):
            await store.store_event("one", message)
            await store.store_event("other", message)


async def read(directory: Path) -> Any:
    found: list[Any] = []

    async def collect(event: Any) -> None:
        body = event.message.model_dump(by_alias=True, mode="json", exclude_unset=True)
        found.append([event.event_id, body])

    async with AgentStateEventStore(directory) as store:
        streams = [
            await store.replay_events_after(f"2026-01-01/{number}", collect) for number in (1, 3, 7)
        ]
    return [streams, found]


@pytest.mark.parametrize("older", older_states("mcp"), ids=name_of)
async def test_a_stream_of_an_older_version_goes_on(older: OlderState, tmp_path: Path) -> None:
    await check(older, tmp_path, write, read)
