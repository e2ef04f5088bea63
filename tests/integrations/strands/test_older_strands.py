"""Values of a storage, and agents with their messages, that older versions have kept."""

from __future__ import annotations

from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any

import pytest
from strands import Agent
from strands.models.model import Model
from strands.session.repository_session_manager import RepositorySessionManager
from strands.session.snapshot_session_manager import SnapshotSessionManager
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from agent_state_integrations.strands import AgentStateSessionRepository, AgentStateStorage
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("strands-agents",)
THEN = "2026-01-01T12:00:00+00:00"


class CountingModel(Model):
    """Answers with the number of messages that it was shown."""

    def answer(self, messages: Any) -> str:
        return str(len(messages))

    def update_config(self, **model_config: Any) -> None: ...

    def get_config(self) -> Any:
        return {}

    def structured_output(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def stream(self, messages: Any, *args: Any, **kwargs: Any) -> AsyncIterable[Any]:
        yield {"messageStart": {"role": "assistant"}}
        yield {"contentBlockStart": {"start": {}}}
        yield {"contentBlockDelta": {"delta": {"text": self.answer(messages)}}}
        yield {"contentBlockStop": {}}
        yield {"messageStop": {"stopReason": "end_turn"}}


def run_agent(kind: str, directory: Path, model: Model | None = None) -> Agent:
    manager: Any
    if kind == "repository":
        manager = RepositorySessionManager("run", AgentStateSessionRepository(directory))
    else:
        manager = SnapshotSessionManager("run", storage=AgentStateStorage(directory))
    model = model or CountingModel()
    return Agent(model=model, agent_id="a", session_manager=manager, callback_handler=None)


async def write(directory: Path, turn: int) -> None:
    async with AgentStateStorage(directory) as storage:
        await storage.write("both", f"text {turn}".encode())
        await storage.write(f"folder/{turn}", b"\x00\xff")
    with AgentStateSessionRepository(directory) as repository:
        if turn == 1:
            repository.create_session(Session("s/ü", SessionType.AGENT, THEN, THEN))
        state = {"turn": turn}
        agent = SessionAgent("a", state, {}, _internal_state={}, created_at=THEN, updated_at=THEN)
        repository.create_agent("s/ü", agent)
        for number in (turn, 7):
            content: Any = [{"text": f"{number} in {turn}"}]
            if turn == 1:
                content.append({"image": {"format": "png", "source": {"bytes": b"\x00\xff"}}})
            message: Any = {"role": "user", "content": content}
            repository.create_message(
                "s/ü",
                "a",
                SessionMessage(message, number, created_at=THEN, updated_at=THEN),
            )
    if turn == 1:
        for kind in ("repository", "snapshots"):
            assert str(run_agent(kind, directory)("one")).strip() == "1"


async def read(directory: Path) -> Any:
    async with AgentStateStorage(directory) as storage:
        names = [each for each in await storage.list() if not each.startswith("run/")]
        found = {name: str(await storage.read(name)) for name in names if "run" not in name}
    with AgentStateSessionRepository(directory) as repository:
        session, agent = repository.read_session("s/ü"), repository.read_agent("s/ü", "a")
        assert session is not None
        assert agent is not None
        messages = [each.to_dict() for each in repository.list_messages("s/ü", "a")]
        return [found, session.session_type, agent.state, messages]


@pytest.mark.parametrize("older", older_states("strands"), ids=name_of)
async def test_what_an_older_version_kept_is_read_and_replaced(
    older: OlderState, tmp_path: Path
) -> None:
    await check(older, tmp_path, write, read)


@pytest.mark.parametrize("kind", ["repository", "snapshots"])
@pytest.mark.parametrize("older", older_states("strands"), ids=name_of)
def test_an_agent_of_an_older_version_goes_on(older: OlderState, kind: str, tmp_path: Path) -> None:
    older.unpack(tmp_path)
    assert str(run_agent(kind, tmp_path)("two")).strip() == "3"
