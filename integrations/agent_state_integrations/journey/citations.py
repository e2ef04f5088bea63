"""Citations: what was said about a session, and whether it still is what it was."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from hashlib import sha256

from agent_state.errors import Key, StateNotFoundError, StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.evidence import fingerprint
from agent_state_integrations.journey.models import (
    KIND,
    Citation,
    CitationCheck,
    CitationStatus,
    parsed,
)
from agent_state_integrations.journey.parts import Draft
from agent_state_integrations.journey.recording import SessionRecording

_STATUS = "status"


class SessionCitations(SessionRecording):
    """See ``ConversationStateManager``."""

    async def generate_citation(
        self,
        user_id: str,
        session_id: str,
        citation_type: str,
        data: Mapping[str, object],
        *,
        evidence: Sequence[str] = (),
    ) -> str:
        """Keep a statement of your own with the stored messages it rests on; its id.

        Raises ``StateNotFoundError`` for a message that there is not, ``SerializationError``.
        """
        if not isinstance(citation_type, str) or citation_type in {"", _STATUS}:
            raise StateValidationError(f"a citation's type is a word other than {_STATUS!r}")

        async def cite(draft: Draft) -> str:
            messages = [await self._stored_message(draft, each) for each in evidence]
            citation_id = draft.citation_id()
            draft.cite(citation_type, citation_id, data, messages)
            return citation_id

        return await self._change(user_id, session_id, cite)

    async def get_citations(self, user_id: str, session_id: str) -> list[Citation]:
        """All citations in the order they were made, as their status is now."""
        await self._find(user_id, session_id)
        return [citation async for citation in self._citations((user_id, session_id))]

    async def set_citation_status(
        self,
        user_id: str,
        session_id: str,
        citation_id: str,
        status: CitationStatus,
        *,
        reason: str | None = None,
    ) -> Citation:
        """Say that a citation is disputed, revoked, or verified after all; also when it has ended.

        Raises ``StateNotFoundError`` for a citation that there is not, ``StateValidationError``.
        """

        async def decide(draft: Draft) -> Citation:
            citation = await self._citation(draft.key, citation_id)
            body = {**citation.model_dump(), "status": status, "reason": reason}
            decided = parsed(Citation, body, "a citation")
            draft.append(
                "citations",
                {
                    "citation_id": citation_id,
                    "type": _STATUS,
                    "timestamp": draft.time,
                    "status": status,
                    "reason": reason,
                },
            )
            return decided

        return await self._change(user_id, session_id, decide, check=False, renews=False)

    async def verify_citation(
        self, user_id: str, session_id: str, citation_id: str, *, content: str | None = None
    ) -> CitationCheck:
        """Compute its hashes again from what is stored now, and compare.

        ``content``: the text of an export, which is not kept here. A citation that is not intact
        is disputed, whatever it was, unless it is revoked. Nothing is written. Raises
        ``StateNotFoundError``; ``StateValidationError`` for an export without its text.
        """
        key = (user_id, session_id)
        state = await self._find(user_id, session_id)
        citation = await self._citation(key, citation_id)
        changed = []
        if await self._fingerprint_now(key, citation, content) != citation.content_hash:
            changed.append(citation_id)
        for each in citation.evidence:
            message = await self._find_message(key, state, each.message_id)
            if message is None or fingerprint(message) != each.sha256:
                changed.append(each.message_id)
        status = citation.status
        if changed and status != "revoked":
            status = "disputed"
        return CitationCheck(citation, not changed, status, changed)

    async def _fingerprint_now(
        self, key: Key, citation: Citation, content: str | None
    ) -> str | None:
        if citation.type == "export":
            if content is None:
                raise StateValidationError(
                    "an export is verified with its text as content", kind=KIND, key=key
                )
            return sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        if citation.subject is None:
            return fingerprint(citation.data)
        async for entry in self._log(key, citation.subject):
            if entry.record.get("tracking_id") == citation.citation_id:
                return fingerprint(entry.record)
        return None

    async def _citation(self, key: Key, citation_id: str) -> Citation:
        async for citation in self._citations(key):
            if citation.citation_id == citation_id:
                return citation
        raise StateNotFoundError(f"there is no citation {citation_id!r:.120}", kind=KIND, key=key)

    async def _citations(self, key: Key, *, upto: int | None = None) -> AsyncIterator[Citation]:
        """The citations; a decision about one may come long after it, so decisions come first."""
        decisions: dict[str, JsonObject] = {}
        async for entry in self._log(key, "citations"):
            if entry.record.get("type") == _STATUS:
                decisions[str(entry.record.get("citation_id"))] = {
                    "status": entry.record.get("status"),
                    "reason": entry.record.get("reason"),
                }
        async for entry in self._log(key, "citations"):
            if entry.record.get("type") == _STATUS:
                continue
            if upto is not None:
                if upto == 0:
                    return
                upto -= 1
            decision = decisions.get(str(entry.record.get("citation_id")), {})
            yield Citation.model_validate({**entry.record, **decision})
