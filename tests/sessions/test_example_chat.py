"""The example chat, killed with SIGKILL in the middle of its workflow, again and again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.sessions import SessionManager
from agent_state_integrations.orchestration import context_of
from examples.guide_chat import agents
from examples.guide_chat.service import ChatService

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = [
    "I ask the content_liaison to help you.",
    "The work has begun.",
    "FileParser is done (1 of 3).",
    "DataAnalyzer is done (2 of 3).",
    "Summarizer is done (3 of 3).",
    "All done.",
]


@contextmanager
def running(state: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.guide_chat", "--state", str(state), "--pause", "0.1"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"it ended without {text!r}: {lines}")


def type_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


async def test_a_killed_chat_goes_on_and_no_message_is_lost_or_doubled(tmp_path: Path) -> None:
    with running(tmp_path) as chat:
        [first_line] = read_until(chat, "A new session")
        session_id = first_line.split()[-1]
        type_line(chat, "Help me upload a file")
        read_until(chat, ANSWERS[0])
    for answer in ANSWERS[1:5]:  # each time it dies right after it has said this
        with running(tmp_path) as chat:
            [line] = read_until(chat, session_id)
            assert line == f"Welcome back to {session_id}"
            read_until(chat, answer)
    with running(tmp_path) as chat:
        shown = read_until(chat, "All done.")
        type_line(chat, "")
        assert chat.wait(timeout=60) == 0
    expected = ["user: Help me upload a file", *(f"assistant: {answer}" for answer in ANSWERS)]
    assert shown[1:] == [f"guide_agent #{seq} {said}" for seq, said in enumerate(expected, start=1)]
    async with StatePersistenceManager(tmp_path) as files:
        sessions = SessionManager(files)
        session = await sessions.get(session_id)
        context = context_of(session)
        [workflow] = context.finished_orchestrators
        assert context.active_orchestrators == []
        assert workflow.status == "completed"
        assert workflow.progress == {"done": 3, "of": 3}
        assert workflow.delegation_chain == [
            "ContentAnalysisOrchestrator",
            "FileParser",
            "DataAnalyzer",
            "Summarizer",
        ]
        assert session.conversations["guide_agent"].orchestrator_context["active_workflows"] == []
        page = await sessions.conversations.page(
            session_id, "guide_agent", workflow_id=workflow.workflow_id
        )
        assert [message.content for message in page.messages] == ANSWERS[1:]


async def test_what_is_sent_again_is_neither_stored_nor_answered_again(tmp_path: Path) -> None:
    runtime = AsyncAgentSessionManager(tmp_path)
    sessions = SessionManager(runtime.manager)
    agents.assemble(runtime, sessions, pause=0)
    async with runtime:
        await agents.set_up(runtime)
        service = ChatService(runtime, sessions)
        visit = await service.visit(None, "ann")
        session_id = visit.session.session_id

        async def send(text: str, message_id: str, agent_type: str = "guide_agent") -> None:
            await service.send(session_id, agent_type, text, message_id)

        await asyncio.gather(*(send("Upload my file", "m1") for _ in range(5)))
        await runtime.wait_idle()
        await send("Upload my file", "m1")  # and once more when all is done
        await send("Show a trend and a chart", "m2", "insights_liaison")
        await runtime.wait_idle()
        guide = await sessions.conversations.page(session_id, "guide_agent")
        assert [message.content for message in guide.messages] == ["Upload my file", *ANSWERS]
        liaison = await sessions.conversations.page(session_id, "insights_liaison")
        assert [message.role for message in liaison.messages] == ["user", *["assistant"] * 4]
        again = await service.visit(visit.token)
        assert (again.new, again.session.session_id) == (False, session_id)
        assert (await service.visit("not a token")).new is True


async def test_a_session_that_ends_while_its_workflow_goes_on_stops_nobody(tmp_path: Path) -> None:
    runtime = AsyncAgentSessionManager(tmp_path)
    sessions = SessionManager(runtime.manager)
    agents.assemble(runtime, sessions, pause=0.01)
    async with runtime:
        await agents.set_up(runtime)
        service = ChatService(runtime, sessions)
        session_id = (await service.visit(None)).session.session_id
        await service.send(session_id, "guide_agent", "Upload my file", "m1")
        await sessions.destroy(session_id)
        await runtime.wait_idle()
        tasks = [task async for task in runtime.manager.scan("tasks")]
        assert {task.state.model_dump()["status"] for task in tasks} == {"completed"}
        assert await runtime.manager.store.logs("conversations") == []
