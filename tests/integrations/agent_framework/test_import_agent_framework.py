"""``agent-state import agent-framework``: what the framework's file stores have, in a directory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from agent_framework import (
    AgentSession,
    FileCheckpointStorage,
    FileHistoryProvider,
    FileSessionStore,
    Message,
    WorkflowCheckpoint,
)

from agent_state.cli.app import run as main
from agent_state_integrations.agent_framework import (
    AgentStateCheckpointStorage,
    AgentStateHistoryProvider,
    AgentStateSessionStore,
)
from tests.integrations.states import HOSTILE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # sessions are experimental

IDS = [each for each in HOSTILE if each and len(each) < 100]
TYPE = f"{__name__}:Order"


class Order:
    """A type of the application."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]  # it can be changed


def checkpoint(ident: str, minute: int, **fields: Any) -> WorkflowCheckpoint:
    fields = {"workflow_name": "w", "graph_signature_hash": "g", **fields}
    return WorkflowCheckpoint(
        checkpoint_id=ident, timestamp=f"2026-01-01T12:{minute:02}:00+00:00", **fields
    )


CHECKPOINTS = [
    checkpoint("z", 1, state={"order": Order(1), "pair": (1, 2)}),
    checkpoint("k", 2, previous_checkpoint_id="z", messages={"one": []}),
    checkpoint("m", 3, workflow_name="v", metadata={"n": 2**70}),
]


def session(ident: str) -> AgentSession:
    made = AgentSession(session_id=f"inner {ident}", service_session_id="there")
    made.state = {"b": [1, None], "a": {"m": Message("user", ["hi"])}}
    return made


def messages(ident: str) -> list[Message]:
    said = [Message("user", ["hi"]), Message("assistant", [f"to {ident}"], message_id="1")]
    return [*said, Message("user", ["hi"])]  # the same words are said again


@pytest.fixture(params=["json", "msgpack"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return asyncio.run(fill(tmp_path / "old", request.param))


async def fill(folder: Path, form: Any) -> Path:
    checkpoints = FileCheckpointStorage(folder, allowed_checkpoint_types=[TYPE])
    for each in CHECKPOINTS:
        await checkpoints.save(each)
    # The two have the same names in MessagePack, so that each needs a directory then.
    sessions = FileSessionStore(folder, serialization_format=form)
    histories = FileHistoryProvider(folder, serialization_format=form)
    for n, ident in enumerate(IDS):
        if form == "json" or n % 2:
            await sessions.set(ident, session(ident))
        if form == "json" or not n % 2:
            await histories.save_messages(ident, messages(ident))
    return folder


async def compare(folder: Path, form: str, state: Path) -> None:
    """Both sides are read, each with its own class."""
    async with (
        AgentStateCheckpointStorage(state, allowed_checkpoint_types=[TYPE]) as checkpoints,
        AgentStateSessionStore(state) as sessions,
        AgentStateHistoryProvider(state) as histories,
    ):
        old = FileCheckpointStorage(folder, allowed_checkpoint_types=[TYPE])
        for name, ids in (("w", ["z", "k"]), ("v", ["m"])):
            assert await checkpoints.list_checkpoint_ids(workflow_name=name) == ids
            theirs = await old.list_checkpoints(workflow_name=name)
            ours = await checkpoints.list_checkpoints(workflow_name=name)
            assert ours == sorted(theirs, key=lambda each: each.timestamp)
            assert ours == [each for each in CHECKPOINTS if each.workflow_name == name]
            assert await checkpoints.get_latest(workflow_name=name) == ours[-1]
        old_sessions = FileSessionStore(folder, serialization_format=form)
        old_histories = FileHistoryProvider(folder, serialization_format=form)
        for n, ident in enumerate(IDS):
            if form == "json" or n % 2:
                found, before = await sessions.get(ident), await old_sessions.get(ident)
                assert found is not None
                assert before is not None
                assert found.to_dict() == before.to_dict() == session(ident).to_dict()
            if form == "json" or not n % 2:
                said = [each.to_dict() for each in await histories.get_messages(ident)]
                assert said == [each.to_dict() for each in await old_histories.get_messages(ident)]
                assert len(said) == 3


def test_all_is_brought_over_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: Any
) -> None:
    state = tmp_path / "state"
    before = {path: path.read_bytes() for path in source.iterdir()}
    command = ["import", "agent-framework", str(source), "--state", str(state), "--allow", TYPE]
    form = request.node.callspec.params["source"]
    share = len(IDS) if form == "json" else len(IDS) // 2
    histories = len(IDS) - share % len(IDS)
    expected = {"checkpoints": 3, "histories": histories, "refused": {}, "sessions": share}

    assert main([*command, "--dry-run"]) == 0
    assert "3 checkpoints" in capsys.readouterr().out
    assert not state.exists()
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected
    asyncio.run(compare(source, form, state))
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_what_cannot_be_brought_over_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, state = tmp_path / "old", tmp_path / "state"

    async def prepare() -> None:
        await fill(folder, "json")
        await FileHistoryProvider(folder).save_messages("X" * 300, messages("x"))
        async with AgentStateSessionStore(state) as sessions:
            await sessions.set("a", session("other"))
        async with AgentStateHistoryProvider(state) as histories:
            await histories.save_messages("con", messages("other"))
            await histories.save_messages("a", [*messages("a"), Message("user", ["more"])])

    asyncio.run(prepare())
    (folder / "broken.json").write_text('{"type": "session", ')
    (folder / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    assert main(["import", "agent-framework", str(folder), "--state", str(state), "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert "other messages" in refused.pop("~session-mnxw4.jsonl")
    assert "digest" in refused.pop(*(name for name in refused if "sha256" in name))
    assert "another content" in refused.pop("a.json")
    assert "Order" in refused.pop("z.json")  # it was not allowed
    assert {*refused} == {"broken.json", "notes.txt"}
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    async def look() -> None:
        async with AgentStateHistoryProvider(state) as histories:
            assert len(await histories.get_messages("a")) == 4
            assert (await histories.get_messages("con"))[1].text == "to other"

    asyncio.run(look())


def test_a_directory_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import", "agent-framework", str(tmp_path / "missing"), "--state", str(tmp_path)]
    assert main(command) == 2
    assert "there is no such directory" in capsys.readouterr().err
