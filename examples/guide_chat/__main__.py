"""``python -m examples.guide_chat [--state DIR] [--pause SECONDS]``: the chat, in a terminal.

The token is kept in ``chat-token`` beside the state, as a page keeps it in the browser. A line
that is typed is a message to the guide; ``@content_liaison text`` is one to that agent.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from pathlib import Path

from agent_state import AsyncAgentSessionManager
from agent_state.sessions import SessionManager
from examples.guide_chat import agents
from examples.guide_chat.service import ChatService


def tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Page:
    """The user's view: every message of every conversation, each shown once."""

    def __init__(self, sessions: SessionManager, session_id: str) -> None:
        self._sessions = sessions
        self._session_id = session_id
        self._shown: dict[str, int] = {}
        self._one_at_a_time = asyncio.Lock()

    async def show(self) -> None:
        """Show the messages that were added since the last call."""
        async with self._one_at_a_time:
            session = await self._sessions.get(self._session_id)
            for agent_type in session.conversations:
                await self._show(agent_type)

    async def _show(self, agent_type: str) -> None:
        after: int | None = self._shown.get(agent_type, 0)
        while after is not None:
            page = await self._sessions.conversations.page(
                self._session_id, agent_type, after=after
            )
            for message in page.messages:
                tell(f"{agent_type} #{message.seq} {message.role}: {message.content}")
                self._shown[agent_type] = message.seq or 0
            after = page.next_after

    async def follow(self, runtime: AsyncAgentSessionManager) -> None:
        """Show each new message: every message changes the session."""
        async for notice in runtime.manager.watch():
            if notice.kind == "sessions" and notice.key == (self._session_id,):
                await self.show()


async def chat(state: Path, pause: float) -> None:
    """Restore the runtime, show the messages, resume unfinished work, and read new messages."""
    runtime = AsyncAgentSessionManager(state)
    sessions = SessionManager(runtime.manager)
    agents.assemble(runtime, sessions, pause)
    async with runtime:
        await agents.set_up(runtime)
        service, kept = ChatService(runtime, sessions), state / "chat-token"
        visit = await service.visit(kept.read_text() if kept.exists() else None)
        kept.touch(mode=0o600)
        kept.write_text(visit.token)
        session_id = visit.session.session_id
        tell(f"{'A new session' if visit.new else 'Welcome back to'} {session_id}")
        page = Page(sessions, session_id)
        following = asyncio.create_task(page.follow(runtime))
        await page.show()
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            to, _, text = line.removeprefix("@").partition(" ")
            agent_type = to if line.startswith("@") else agents.GUIDE
            if agent_type not in visit.session.conversations:
                tell(
                    f"There is no {agent_type}; there are {', '.join(visit.session.conversations)}"
                )
                continue
            said = text if line.startswith("@") else line
            await service.send(session_id, agent_type, said, uuid.uuid4().hex)
        await runtime.wait_idle()
        await page.show()
        following.cancel()
        await asyncio.wait([following])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.guide_chat", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("chat-state"))
    parser.add_argument("--pause", type=float, default=2.0, help="seconds a service takes")
    arguments = parser.parse_args()
    asyncio.run(chat(arguments.state, arguments.pause))


if __name__ == "__main__":
    main()
