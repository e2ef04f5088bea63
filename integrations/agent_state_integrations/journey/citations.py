"""Citations: statements about a session, and whether their ground is still what it was."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from hashlib import sha256

from agent_state.errors import Key, StateNotFoundError, StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.models import (
    KIND,
    Citation,
    CitationCheck,
    CitationStatus,
    fingerprint,
    validated,
)
from agent_state_integrations.journey.repository import JourneyDraft, JourneyRepository

_STATUS = "status"
"""The type of a record that sets the status of a citation."""


class Citations:
    """``sessions.citations``: makes, reads and verifies the citations of sessions.

    Every method raises ``StateNotFoundError`` for a session that does not exist.
    """

    def __init__(self, repository: JourneyRepository) -> None:
        self._repository = repository

    async def generate(
        self,
        user_id: str,
        session_id: str,
        citation_type: str,
        data: Mapping[str, object],
        *,
        evidence: Sequence[str] = (),
    ) -> str:
        """Store a statement with the ids of the messages that it rests on; its id.

        Raises ``StateNotFoundError`` for a message that does not exist, ``SerializationError``,
        ``StateValidationError``, ``SessionExpiredError``, ``SessionClosedError``.
        """
        if not isinstance(citation_type, str) or citation_type in {"", _STATUS}:
            raise StateValidationError(f"a citation's type is a word other than {_STATUS!r}")

        async def cite(draft: JourneyDraft) -> str:
            messages = [await self._repository.stored_message(draft, each) for each in evidence]
            citation_id = draft.new_citation_id()
            draft.cite(citation_type, citation_id, data, messages)
            return citation_id

        return await self._repository.change(user_id, session_id, cite)

    async def all(self, user_id: str, session_id: str) -> list[Citation]:
        """The citations with their current status, in the order in which they were made."""
        await self._repository.find(user_id, session_id)
        return [citation async for citation in self.stream((user_id, session_id))]

    async def set_status(
        self,
        user_id: str,
        session_id: str,
        citation_id: str,
        status: CitationStatus,
        *,
        reason: str | None = None,
    ) -> Citation:
        """Dispute, revoke or confirm a citation, also of an ended session; the citation then.

        Raises ``StateNotFoundError`` for a citation that does not exist, ``StateValidationError``.
        """

        async def decide(draft: JourneyDraft) -> Citation:
            citation = await self._find(draft.key, citation_id)
            body = {**citation.model_dump(), "status": status, "reason": reason}
            decided = validated(Citation, body, "a citation")
            record = {
                "citation_id": citation_id,
                "type": _STATUS,
                "timestamp": draft.time,
                "status": status,
                "reason": reason,
            }
            draft.append("citations", record)
            return decided

        return await self._repository.change(user_id, session_id, decide, check=False, renews=False)

    async def verify(
        self, user_id: str, session_id: str, citation_id: str, *, content: str | bytes | None = None
    ) -> CitationCheck:
        """Compute the citation's hashes from what is stored now, and compare. Nothing is written.

        ``content``: the text of an export, or its bytes, which are not stored. A citation that is
        not intact is disputed, unless it is revoked. Raises ``StateNotFoundError``, and
        ``StateValidationError`` for an export without its text.
        """
        key = (user_id, session_id)
        state = await self._repository.find(user_id, session_id)
        citation = await self._find(key, citation_id)
        changed = []
        if await self._current_hash(key, citation, content) != citation.content_hash:
            changed.append(citation_id)
        for each in citation.evidence:
            message = await self._repository.find_message(key, state, each.message_id)
            if message is None or fingerprint(message) != each.sha256:
                changed.append(each.message_id)
        status = citation.status
        if changed and status != "revoked":
            status = "disputed"
        return CitationCheck(citation, not changed, status, changed)

    async def stream(self, key: Key, *, limit: int | None = None) -> AsyncGenerator[Citation, None]:
        """The citations of a session in order, or the first ``limit`` of them.

        A status may be set long after its citation, so all of them are read first.
        """
        decisions: dict[str, JsonObject] = {}
        async for entry in self._repository.log(key, "citations"):
            if entry.record.get("type") == _STATUS:
                decisions[str(entry.record.get("citation_id"))] = {
                    "status": entry.record.get("status"),
                    "reason": entry.record.get("reason"),
                }
        count = 0
        async for entry in self._repository.log(key, "citations"):
            if entry.record.get("type") == _STATUS:
                continue
            if count == limit:
                return
            count += 1
            decision = decisions.get(str(entry.record.get("citation_id")), {})
            yield Citation.model_validate({**entry.record, **decision})

    async def _find(self, key: Key, citation_id: str) -> Citation:
        async with aclosing(self.stream(key)) as citations:
            async for citation in citations:
                if citation.citation_id == citation_id:
                    return citation
        raise StateNotFoundError(f"there is no citation {citation_id!r:.120}", kind=KIND, key=key)

    async def _current_hash(
        self, key: Key, citation: Citation, content: str | bytes | None
    ) -> str | None:
        if citation.type == "export":
            if content is None:
                raise StateValidationError(
                    "an export is verified with its text as content", kind=KIND, key=key
                )
            if isinstance(content, str):
                content = content.encode("utf-8", "surrogatepass")
            return sha256(content).hexdigest()
        if citation.subject is None:
            return fingerprint(citation.data)
        async with aclosing(self._repository.log(key, citation.subject)) as entries:
            async for entry in entries:
                if entry.record.get("tracking_id") == citation.citation_id:
                    return fingerprint(entry.record)
        return None
