"""Mail, sleep and events: how agents are reached and woken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from agent_state import mail as mail_rules
from agent_state.models import MailMessage, SleepState
from agent_state.runtime.parts import Parts


class MessageMethods(Parts):
    """What a runtime does with mail, sleep and events."""

    # -- sleep and events --------------------------------------------------------------------

    async def sleep(
        self,
        agent_id: str,
        *,
        seconds: float | None = None,
        until: datetime | None = None,
        wake_on: Sequence[str] = (),
        reason: str | None = None,
    ) -> SleepState:
        """Let the agent begin no task until the time, a wake event, or ``wake``.

        Wake events: ``mail_received``, ``high_priority_mail`` (urgent counts), ``system_event``,
        ``manual_wake``. Mail that was unread before does not wake it.
        """
        return await self._bedroom.sleep(
            self._agent(agent_id), seconds=seconds, until=until, wake_on=wake_on, reason=reason
        )

    async def wake(self, agent_id: str) -> bool:
        """End the agent's sleep, whatever it waits for; whether it slept."""
        return await self._bedroom.wake(self._agent(agent_id), "manual_wake")

    async def emit(self, event: str = "system_event", data: Mapping[str, Any] | None = None) -> int:
        """Record an event in ``system/events`` and wake who waits for it; how many woke."""
        return await self._bedroom.emit(event, dict(data or {}))

    # -- mail --------------------------------------------------------------------------------

    async def send_mail(
        self,
        from_agent: str,
        to_agent: str,
        *,
        subject: str,
        body: Any = "",
        priority: str = "normal",
        expects_reply: bool = False,
        message_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> MailMessage:
        """Deliver a message; a ``message_id`` that was delivered already is delivered once."""
        message = mail_rules.new_message(
            message_id or self.core.new_id(),
            from_agent,
            to_agent,
            subject=subject,
            body=body,
            now=self.core.now(),
            priority=priority,
            expects_reply=expects_reply,
            metadata=dict(metadata or {}),
        )
        return await self.post.send(message)

    def inbox(self, agent_id: str, *, status: str | None = "unread") -> list[MailMessage]:
        """The agent's mail of that status (None: any but archived), oldest first."""
        return self.post.inbox(agent_id, status=status)

    async def read_mail(self, agent_id: str, message_id: str) -> MailMessage:
        """The message, marked as read. Raises ``StateNotFoundError``."""
        message = self.post.find(agent_id, message_id)
        return await self.post.mark(mail_rules.read(message, self.core.now()))

    async def archive_mail(self, agent_id: str, message_id: str) -> MailMessage:
        """The message, out of the inbox. Raises ``StateNotFoundError``."""
        message = self.post.find(agent_id, message_id)
        return await self.post.mark(mail_rules.archive(message, self.core.now()))

    async def reply(
        self, agent_id: str, message_id: str, body: Any, *, priority: str = "normal"
    ) -> MailMessage:
        """Answer a message, once; it counts as replied. Raises ``StateNotFoundError``."""
        message = self.post.find(agent_id, message_id)
        sent = await self._answer(message, f"{message_id}.reply", body, priority)
        if sent.from_agent != agent_id:
            # The message went to several agents, and another one has answered under this id.
            sent = await self._answer(message, f"{message_id}.reply.{agent_id}", body, priority)
        return sent

    async def _answer(
        self, message: MailMessage, reply_id: str, body: Any, priority: str
    ) -> MailMessage:
        answer = mail_rules.new_message(
            reply_id,
            message.to_agent,
            message.from_agent,
            subject=f"Re: {message.subject}",
            body=body,
            now=self.core.now(),
            priority=priority,
            reply_to=message.message_id,
        )
        return await self.post.send(answer, answered=message)

    async def mail_history(self, agent_id: str) -> list[MailMessage]:
        """Every message the agent ever got, oldest first."""
        return await self.post.history(agent_id)

    def pending_replies(self, agent_id: str) -> list[MailMessage]:
        """What the agent was asked and has not answered, oldest first."""
        return self.post.pending_replies(agent_id)
