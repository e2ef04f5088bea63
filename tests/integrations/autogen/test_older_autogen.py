"""States of teams that older versions have saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import BaseChatAgent
from autogen_agentchat.base import Response
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat

from agent_state_integrations.agent_framework import load_state, save_state
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("autogen-agentchat", "autogen-core")


class Counter(BaseChatAgent):
    """Says how many messages it was shown."""

    seen = 0
    produced_message_types = (TextMessage,)

    async def on_messages(self, messages: Any, cancellation_token: Any) -> Response:
        self.seen += len(messages)
        return Response(chat_message=TextMessage(content=str(self.seen), source=self.name))

    async def on_reset(self, cancellation_token: Any) -> None:
        self.seen = 0

    async def save_state(self) -> Mapping[str, Any]:
        return {"seen": self.seen, "ü": [1.5, None]}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def new_team() -> RoundRobinGroupChat:
    stop = MaxMessageTermination(2)
    return RoundRobinGroupChat([Counter("counter", "counts")], termination_condition=stop)


async def write(directory: Path, turn: int) -> None:
    for name in ("both/ü", f"of {turn}"):
        team = new_team()
        await load_state(directory, name, team)
        result = await team.run(task="count")
        assert result.messages[-1].content == str(turn if name == "both/ü" else 1)
        await save_state(directory, name, team)


async def read(directory: Path) -> Any:
    """How far each team has counted, and what was said in it."""
    found = []
    for name in ("both/ü", "of 1", "of 2"):
        team = new_team()
        if await load_state(directory, name, team):
            agents = (await team.save_state())["agent_states"]
            manager = agents["RoundRobinGroupChatManager"]
            texts = [each["content"] for each in manager["message_thread"]]
            found.append([name, agents["counter"]["agent_state"], texts])
    return found


@pytest.mark.parametrize("older", older_states("autogen"), ids=name_of)
async def test_a_team_of_an_older_version_goes_on(older: OlderState, tmp_path: Path) -> None:
    await check(older, tmp_path, write, read)
