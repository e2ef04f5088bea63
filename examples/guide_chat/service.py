"""The chat service: stores the users' messages and submits a task for each to its agent.

It alone stores what people say, and each agent alone what it says. Every message has a key of its
own, so that neither a repeated request nor a repeated task stores it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent_state import AsyncAgentSessionManager
from agent_state.errors import SessionExpiredError
from agent_state.sessions import AddedMessage, Session, SessionManager, UnknownTokenError


@dataclass(slots=True)
class Visit:
    """An open page: its session, and the token that it keeps."""

    session: Session
    token: str
    new: bool


class ChatService:
    """The interface that a web page would use."""

    def __init__(self, runtime: AsyncAgentSessionManager, sessions: SessionManager) -> None:
        self._runtime = runtime
        self._sessions = sessions

    async def visit(self, token: str | None, user_id: str | None = None) -> Visit:
        """The session that the page's token opens; a new one without a valid token.

        The page is told that it is new: nobody loses a conversation without being told.
        """
        if token is not None:
            try:
                return Visit(await self._sessions.tokens.resolve(token), token, new=False)
            except (UnknownTokenError, SessionExpiredError):
                pass
        created = await self._sessions.create(user_id)
        return Visit(created.session, created.session_token, new=True)

    async def send(
        self, session_id: str, agent_type: str, text: str, message_id: str
    ) -> AddedMessage:
        """Take a message in, once for each ``message_id``, however often the page sends it.

        If the process dies between the two steps, the page has had no answer and sends it again.
        """
        added = await self._sessions.conversations.add(
            session_id, agent_type, "user", text, dedupe_key=f"user/{message_id}"
        )
        payload = {
            "session_id": session_id,
            "conversation": agent_type,
            "message_id": message_id,
            "text": text,
        }
        key = f"{session_id}/{agent_type}/{message_id}"
        await self._runtime.tasks.submit(agent_type, "answer", payload, dedupe_key=key)
        return added
