"""Checkpoints, histories and sessions of Microsoft Agent Framework in a state directory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from agent_framework import (
    Agent,
    AgentSession,
    BaseChatClient,
    ChatResponse,
    FileCheckpointStorage,
    FileHistoryProvider,
    InMemoryCheckpointStorage,
    Message,
    WorkflowCheckpoint,
)
from agent_framework.exceptions import WorkflowCheckpointException

from agent_state import SerializationError
from agent_state_integrations.agent_framework import (
    AgentStateCheckpointStorage,
    AgentStateHistoryProvider,
    AgentStateSessionStore,
)
from tests.frameworks import ROOT
from tests.integrations.agent_framework import letters
from tests.integrations.agent_framework.letters import ALLOWED, Draft, Letter
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
    writer,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # parts of it are experimental

NOON = "2026-01-01T12:00:00+00:00"


def checkpoint(checkpoint_id: str, workflow: str = "w", **fields: Any) -> WorkflowCheckpoint:
    made = {"timestamp": NOON, "graph_signature_hash": "g", **fields}
    return WorkflowCheckpoint(workflow_name=workflow, checkpoint_id=checkpoint_id, **made)


@pytest.fixture(params=STATES)
async def storage(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateCheckpointStorage]:
    async with (
        state_of(request.param, tmp_path) as state,
        AgentStateCheckpointStorage(state, allowed_checkpoint_types=ALLOWED) as made,
    ):
        yield made


@pytest.fixture(params=STATES)
async def history(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateHistoryProvider]:
    async with state_of(request.param, tmp_path) as state, AgentStateHistoryProvider(state) as made:
        yield made


# -- checkpoints ---------------------------------------------------------------------------------


async def test_checkpoints_are_those_of_the_frameworks_own_storage(
    storage: AgentStateCheckpointStorage,
) -> None:
    other = InMemoryCheckpointStorage()
    made = [
        checkpoint("a", timestamp="2026-01-01T12:00:00+00:00", state={"b": 1, "a": (1, 2)}),
        checkpoint("b", timestamp="2026-01-01T13:30:00+02:00"),  # earlier than a
        checkpoint("c", "v", metadata={"n": 2**70}),
        checkpoint("a", timestamp="2026-01-01T12:00:01Z", previous_checkpoint_id="b"),
    ]
    for each in made:
        assert await storage.save(each) == await other.save(each)
        for name in ("w", "v", "u"):
            ids = await storage.list_checkpoint_ids(workflow_name=name)
            assert ids == await other.list_checkpoint_ids(workflow_name=name)
            found = await storage.list_checkpoints(workflow_name=name)
            assert found == await other.list_checkpoints(workflow_name=name)
            latest = await storage.get_latest(workflow_name=name)
            assert latest == await other.get_latest(workflow_name=name)
    assert await storage.load("a") == made[3]
    assert await storage.delete("a")
    assert not await storage.delete("a")
    with pytest.raises(WorkflowCheckpointException, match="No checkpoint found with ID a"):
        await storage.load("a")
    assert await storage.list_checkpoint_ids(workflow_name="w") == ["b"]
    assert (await storage.get_latest(workflow_name="w")) == made[1]


async def test_an_id_that_moves_to_another_workflow_leaves_the_first(
    storage: AgentStateCheckpointStorage,
) -> None:
    await storage.save(checkpoint("a", "one"))
    await storage.save(checkpoint("a", "two"))

    assert await storage.list_checkpoint_ids(workflow_name="one") == []
    assert await storage.get_latest(workflow_name="one") is None
    assert await storage.list_checkpoint_ids(workflow_name="two") == ["a"]


async def test_times_without_a_zone_and_without_sense_are_no_obstacle(
    storage: AgentStateCheckpointStorage,
) -> None:
    for name, moment in (("a", "2026-01-01T12:00:00"), ("b", NOON), ("c", "noon")):
        await storage.save(checkpoint(name, timestamp=moment))

    assert (await storage.get_latest(workflow_name="w")).checkpoint_id in "ab"  # type: ignore[union-attr]  # saved


async def test_what_is_saved_and_loaded_is_a_copy(storage: AgentStateCheckpointStorage) -> None:
    made = checkpoint("a", state={"letter": Letter(to="ann", draft=Draft("x", tags={"t"}))})
    await storage.save(made)
    made.state["letter"].draft.tags.add("later")
    first = await storage.load("a")
    first.state["letter"].draft.tags.add("mine")

    second = await storage.load("a")
    assert second.state["letter"] == Letter(to="ann", draft=Draft("x", tags={"t"}))


@pytest.mark.parametrize(
    "value", [letters.Secret(), lambda: 1, "\ud800"], ids=["class", "function", "surrogate"]
)
async def test_what_could_not_be_loaded_is_refused(
    storage: AgentStateCheckpointStorage, value: Any
) -> None:
    await storage.save(checkpoint("a", state={"n": 1}))
    with pytest.raises(WorkflowCheckpointException):
        await storage.save(checkpoint("a", state={"value": value}))

    assert (await storage.load("a")).state == {"n": 1}
    assert await storage.list_checkpoint_ids(workflow_name="w") == ["a"]


@pytest.mark.parametrize("text", ["", "x"])
async def test_a_type_of_the_application_that_is_called_comes_back(
    storage: AgentStateCheckpointStorage, text: str
) -> None:
    await storage.save(checkpoint("a", state={"sealed": letters.Sealed(text)}))

    first = (await storage.load("a")).state["sealed"]
    assert type(first) is letters.Sealed
    first.text = "changed"
    assert (await storage.load("a")).state["sealed"].text == text


async def test_a_type_that_is_no_longer_allowed_is_not_made(tmp_path: Path) -> None:
    async with AgentStateCheckpointStorage(tmp_path, allowed_checkpoint_types=ALLOWED) as storage:
        await storage.save(checkpoint("a", state={"draft": Draft("x")}))
    async with AgentStateCheckpointStorage(tmp_path) as storage:
        with pytest.raises(WorkflowCheckpointException, match="Draft is not allowed"):
            await storage.load("a")


async def test_no_file_has_pickle(tmp_path: Path) -> None:
    async with AgentStateCheckpointStorage(tmp_path, allowed_checkpoint_types=ALLOWED) as storage:
        await letters.workflow_with(storage).run(Draft(""))
    (one, *_) = (tmp_path / "agent_framework_checkpoints").glob("*.json")

    body = json.loads(one.read_text())
    assert body["workflow_name"] == letters.NAME
    assert "pickle" not in one.read_text()


async def test_every_id_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    async with AgentStateCheckpointStorage(tmp_path) as storage:
        for each in HOSTILE:
            await storage.save(checkpoint(each, each, metadata={"id": each}))
        for each in HOSTILE:
            assert (await storage.load(each)).metadata == {"id": each}
            assert await storage.list_checkpoint_ids(workflow_name=each) == [each]
        assert await storage.delete("..")
        assert len([each for each in HOSTILE if each != ".." and await storage.load(each)]) == 11


def test_a_workflow_goes_on_after_kill_9_at_every_step(tmp_path: Path) -> None:
    program = (
        "import asyncio\nfrom tests.integrations.agent_framework import letters\n"
        "asyncio.run(letters.main({!r}))"
    )
    whole = subprocess.run(
        [sys.executable, "-c", program.format(str(tmp_path / "whole"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.splitlines()
    assert whole[-1] == "['......']"

    for count in range(1, len(whole)):
        directory = tmp_path / str(count)
        kill_after_lines(program.format(str(directory)), count)
        asyncio.run(_goes_on(directory))


async def _goes_on(directory: Path) -> None:
    async with AgentStateCheckpointStorage(directory, allowed_checkpoint_types=ALLOWED) as storage:
        latest = await storage.get_latest(workflow_name=letters.NAME)
        assert latest is not None
        chain = {
            each.checkpoint_id: each.previous_checkpoint_id
            for each in await storage.list_checkpoints(workflow_name=letters.NAME)
        }
        assert all(before in {None, *chain} for before in chain.values())
        workflow = letters.workflow_with(storage)
        await workflow.run(checkpoint_id=latest.checkpoint_id)
        letter = (await storage.get_latest(workflow_name=letters.NAME)).state["letter"]  # type: ignore[union-attr]  # saved
        assert letter.draft == Draft("......", tags=set("012345"))


def test_eight_processes_save_at_once(tmp_path: Path) -> None:
    run_at_once(
        writer(
            AgentStateCheckpointStorage,
            tmp_path,
            times=10,
            body="""
from agent_framework import WorkflowCheckpoint
for name in (f"{sys.argv[1]}-{n}", "same"):
    state = {"by": [sys.argv[1]] * 50}
    await it.save(WorkflowCheckpoint("w", "g", checkpoint_id=name, state=state))
""",
        ),
        8,
    )

    async def read() -> list[WorkflowCheckpoint]:
        async with AgentStateCheckpointStorage(tmp_path) as storage:
            return await storage.list_checkpoints(workflow_name="w")

    found = asyncio.run(read())
    assert {each.checkpoint_id for each in found} == {"same"} | {
        f"{process}-{n}" for process in range(8) for n in range(10)
    }
    assert all(len({*each.state["by"]}) == 1 for each in found)


async def test_a_cancelled_save_is_whole(tmp_path: Path) -> None:
    async with AgentStateCheckpointStorage(tmp_path) as storage:
        await storage.save(checkpoint("a"))
        await cancel_soon(storage.save(checkpoint("b")))
        ids = await storage.list_checkpoint_ids(workflow_name="w")
        assert ids in (["a"], ["a", "b"])
        assert len(await storage.list_checkpoints(workflow_name="w")) == len(ids)
        await storage.save(checkpoint("c"))
        assert (await storage.list_checkpoint_ids(workflow_name="w"))[-1] == "c"


@pytest.mark.long("ten thousand checkpoints")
async def test_ten_thousand_checkpoints(tmp_path: Path) -> None:
    async with AgentStateCheckpointStorage(tmp_path, exclusive=True) as storage:
        for start in range(0, 10_000, 100):
            await asyncio.gather(
                *(
                    storage.save(
                        checkpoint(
                            str(n),
                            timestamp=datetime.fromtimestamp(n, UTC).isoformat(),
                        )
                    )
                    for n in range(start, start + 100)
                )
            )

        assert (await storage.get_latest(workflow_name="w")).checkpoint_id == "9999"  # type: ignore[union-attr]  # saved
        assert len(await storage.list_checkpoint_ids(workflow_name="w")) == 10_000


async def test_what_the_frameworks_own_storage_has_can_be_moved_here(tmp_path: Path) -> None:
    old = FileCheckpointStorage(tmp_path / "old", allowed_checkpoint_types=ALLOWED)
    await letters.workflow_with(old).run(Draft(""))
    async with AgentStateCheckpointStorage(
        tmp_path / "new", allowed_checkpoint_types=ALLOWED
    ) as new:
        for each in await old.list_checkpoints(workflow_name=letters.NAME):
            await new.save(each)

        latest = await old.get_latest(workflow_name=letters.NAME)
        found = await new.get_latest(workflow_name=letters.NAME)
        assert found is not None
        assert latest is not None
        assert (found.checkpoint_id, found.state) == (latest.checkpoint_id, latest.state)


# -- history -------------------------------------------------------------------------------------


def message(text: str, role: str = "user", **fields: Any) -> Message:
    return Message(role, [text], **fields)


def texts(messages: list[Message]) -> list[str]:
    return [each.text for each in messages]


async def test_messages_come_back_as_they_were(history: AgentStateHistoryProvider) -> None:
    given = [
        message("a", message_id="1", additional_properties={"x": {"b": 1, "a": None}}),
        Message(
            "assistant",
            [
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"b":1}'},
                {"type": "text", "text": "ä"},
            ],
            author_name="bob",
        ),
    ]
    for session_id in ("s", None, ""):
        assert await history.get_messages(session_id) == []
        await history.save_messages(session_id, given)
        await history.save_messages(session_id, [])
        found = await history.get_messages(session_id)
        assert [each.to_dict() for each in found] == [each.to_dict() for each in given]
    assert await history.delete_messages(None)
    assert not await history.delete_messages(None)
    assert len(await history.get_messages("")) == 2


async def test_what_is_stored_again_is_what_the_frameworks_own_provider_keeps(
    history: AgentStateHistoryProvider, tmp_path: Path
) -> None:
    other = FileHistoryProvider(tmp_path / "other")
    a, b, c = message("a"), message("b", "assistant"), message("c", message_id="m")
    calls = [
        [a],
        [a],  # a person says the same again
        [a, b],
        [a, a, b, c],  # the transcript from its beginning, longer
        [c],  # by its id
        [b, c, message("d")],  # the end of it, and more
        [message("d"), message("d")],
        [a, a, b, c, message("d")],
        [c, message("e", message_id="m2"), c],
    ]
    for call in calls:
        await history.save_messages("s", call)
        await other.save_messages("s", call)

        assert texts(await history.get_messages("s")) == texts(await other.get_messages("s"))


async def test_messages_that_were_excluded_can_be_left_out(tmp_path: Path) -> None:
    async with AgentStateHistoryProvider(tmp_path, skip_excluded=True) as history:
        gone = message("gone", additional_properties={"_excluded": True})
        await history.save_messages("s", [message("a"), gone])
        assert texts(await history.get_messages("s")) == ["a"]
    async with AgentStateHistoryProvider(tmp_path) as history:
        assert texts(await history.get_messages("s")) == ["a", "gone"]
    async with AgentStateHistoryProvider(tmp_path, source_id="audit") as history:
        assert await history.get_messages("s") == []


async def test_a_message_that_is_not_json_is_refused_with_those_beside_it(
    history: AgentStateHistoryProvider,
) -> None:
    bad = message("b", additional_properties={"x": float("nan")})
    with pytest.raises(SerializationError):
        await history.save_messages("s", [message("a"), bad])

    assert await history.get_messages("s") == []


class CountingClient(BaseChatClient):
    """Says how many messages it was shown."""

    async def _inner_get_response(self, *, messages: Any, **kwargs: Any) -> ChatResponse:
        return ChatResponse(messages=[Message("assistant", [str(len(messages))])])


async def test_an_agent_goes_on_in_another_process(tmp_path: Path) -> None:
    for expected in ("1", "3", "5"):
        async with (
            AgentStateHistoryProvider(tmp_path) as history,
            AgentStateSessionStore(tmp_path) as sessions,
        ):
            agent = Agent(CountingClient(), context_providers=[history])
            session = await sessions.get("ann") or AgentSession(session_id="ann")
            assert (await agent.run("hello", session=session)).text == expected
            await sessions.set("ann", session)


async def test_every_session_id_is_a_history_of_its_own(tmp_path: Path) -> None:
    async with AgentStateHistoryProvider(tmp_path) as history:
        for session_id in HOSTILE:
            await history.save_messages(session_id, [message(session_id)])
        for session_id in HOSTILE:
            assert texts(await history.get_messages(session_id)) == [session_id]


def test_eight_processes_add_messages_at_once(tmp_path: Path) -> None:
    run_at_once(
        writer(
            AgentStateHistoryProvider,
            tmp_path,
            times=10,
            body="""
from agent_framework import Message
texts = [f"{sys.argv[1]}-{n}-{half}" for half in "ab"]
await it.save_messages("s", [Message("user", [text]) for text in texts])
""",
        ),
        8,
    )

    async def read() -> list[str]:
        async with AgentStateHistoryProvider(tmp_path) as history:
            return texts(await history.get_messages("s"))

    found = asyncio.run(read())
    assert len({*found}) == len(found) == 160
    assert all(one[:-1] == other[:-1] for one, other in zip(found[::2], found[1::2], strict=True))


def test_acknowledged_messages_survive_kill_9(tmp_path: Path) -> None:
    lines = kill_after_lines(
        writer(
            AgentStateHistoryProvider,
            tmp_path,
            body="""
from agent_framework import Message
made = [Message("user", [f"{n}{half}"]) for half in "ab"]
await it.save_messages("s", made)
""",
        ),
        10,
    )

    async def read() -> list[str]:
        async with AgentStateHistoryProvider(tmp_path) as history:
            return texts(await history.get_messages("s"))

    found = asyncio.run(read())
    assert found == [f"{n}{half}" for n in range(len(found) // 2) for half in "ab"]
    assert len(found) // 2 in (len(lines), len(lines) + 1)


async def test_a_cancelled_save_of_messages_is_whole(tmp_path: Path) -> None:
    async with AgentStateHistoryProvider(tmp_path) as history:
        await cancel_soon(history.save_messages("s", [message("a"), message("b")]))
        assert texts(await history.get_messages("s")) in ([], ["a", "b"])
        await history.save_messages("s", [message("c")])
        assert texts(await history.get_messages("s"))[-1] == "c"


async def test_ten_thousand_messages(tmp_path: Path) -> None:
    async with AgentStateHistoryProvider(tmp_path) as history:
        for start in range(0, 10_000, 500):
            await history.save_messages("s", [message(str(n)) for n in range(start, start + 500)])
        await history.save_messages("s", [message("9999"), message("last")])

        assert texts(await history.get_messages("s")) == [
            *map(str, range(10_000)),
            "9999",  # a person said it again
            "last",
        ]
