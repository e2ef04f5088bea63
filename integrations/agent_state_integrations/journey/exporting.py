"""Exports: a session as a text for people or programs, streamed in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, cast

import orjson

from agent_state.clock import stamp
from agent_state.errors import OffTheRecordError, StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.export_json import render_json
from agent_state_integrations.journey.export_markdown import render_markdown
from agent_state_integrations.journey.export_text import render_text
from agent_state_integrations.journey.models import KIND, Citation, JourneyState
from agent_state_integrations.journey.parts import Draft
from agent_state_integrations.journey.reading import SessionReading
from agent_state_integrations.journey.source import ExportSource

Format = Literal["markdown", "json", "text"]
_PIECE = 16 * 1024
_RENDERERS: dict[str, Callable[[ExportSource], AsyncIterator[str]]] = {
    "markdown": render_markdown,
    "json": render_json,
    "text": render_text,
}


@dataclass(frozen=True, slots=True)
class Export:
    """One export: iterate over it for its pieces of text, once, to the end.

    After the last piece it is kept as a citation with the SHA-256 of the whole text, so that
    ``verify_citation(..., citation, content=text)`` can tell whether a text is what was exported.
    """

    export_id: str
    citation: str
    format: Format
    _pieces: AsyncGenerator[str, None]

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def aclose(self) -> None:
        """No more of it is wanted; then it is no citation."""
        await self._pieces.aclose()

    async def text(self) -> str:
        """The whole text at once."""
        return "".join([piece async for piece in self._pieces])


class SessionExporting(SessionReading):
    """See ``ConversationStateManager``. An ended session can be exported until it is erased."""

    async def export(
        self,
        user_id: str,
        session_id: str,
        format: Format = "markdown",  # noqa: A002  # the word everybody uses
        *,
        include_transcript: bool = True,
    ) -> Export:
        """An export of the session as it is now, to be streamed.

        Messages that are added meanwhile are not in it. Raises ``StateNotFoundError``,
        ``OffTheRecordError``, ``StateValidationError`` for a format that there is not.
        """
        key = (user_id, session_id)
        if key in self._private:
            raise OffTheRecordError("the session is not exported", kind=KIND, key=key)
        if format not in _RENDERERS:
            raise StateValidationError(f"format {format!r:.40} is none of {', '.join(_RENDERERS)}")
        state = await self._find(user_id, session_id)
        export_id = self._new_id()
        citation = f"if://export/{session_id}/{export_id}"
        source = _Source(self, state, export_id, citation, include_transcript=include_transcript)
        return Export(export_id, citation, format, self._cited(source, format))

    async def export_markdown(
        self, user_id: str, session_id: str, *, include_transcript: bool = True
    ) -> tuple[str, str]:
        """The export for a therapist: the text and the export's id. Raises as ``export`` does."""
        made = await self.export(
            user_id, session_id, "markdown", include_transcript=include_transcript
        )
        return await made.text(), made.export_id

    async def export_text(
        self, user_id: str, session_id: str, *, include_transcript: bool = True
    ) -> tuple[str, str]:
        """The export as plain text, and its id. Raises as ``export`` does."""
        made = await self.export(user_id, session_id, "text", include_transcript=include_transcript)
        return await made.text(), made.export_id

    async def export_json(self, user_id: str, session_id: str) -> tuple[JsonObject, str]:
        """Everything as one object, and the export's id. Raises as ``export`` does."""
        made = await self.export(user_id, session_id, "json")
        return orjson.loads(await made.text()), made.export_id

    async def _cited(self, source: ExportSource, form: Format) -> AsyncGenerator[str, None]:
        """The export's pieces, and after the last one its citation."""
        digest, size = sha256(), 0
        waiting: list[str] = []
        async with aclosing(cast("Any", _RENDERERS[form](source))) as rendered:
            async for text in rendered:
                waiting.append(text)
                size += len(text)
                if size >= _PIECE:
                    piece = "".join(waiting)
                    waiting, size = [], 0
                    digest.update(piece.encode())
                    yield piece
        piece = "".join(waiting)
        digest.update(piece.encode())

        async def cite(draft: Draft) -> None:
            record = {"export_id": source.export_id, "format": form}
            draft.cite("export", source.citation, record, content_hash=digest.hexdigest())

        state = source.state
        await self._change(state.user_id, state.session_id, cite, check=False, renews=False)
        yield piece


class _Source(ExportSource):
    """A session as it was when the export began: the logs as far as its totals say."""

    def __init__(
        self,
        sessions: SessionExporting,
        state: JourneyState,
        export_id: str,
        citation: str,
        *,
        include_transcript: bool,
    ) -> None:
        self._sessions = sessions
        self._key = (state.user_id, state.session_id)
        self.state = state
        self.export_id = export_id
        self.citation = citation
        self.exported_at = stamp(sessions.clock.now())
        self.include_transcript = include_transcript
        self.assistant_name = sessions.assistant_name

    def messages(self) -> AsyncIterator[JsonObject]:
        return self._records("messages", self.state.counters.messages)

    def emotions(self) -> AsyncIterator[JsonObject]:
        return self._records("emotions", self.state.counters.emotion_updates)

    def milestones(self) -> AsyncIterator[JsonObject]:
        return self._records("milestones", self.state.counters.milestones)

    def breakthroughs(self) -> AsyncIterator[JsonObject]:
        return self._records("breakthroughs", self.state.counters.breakthroughs)

    def events(self) -> AsyncIterator[JsonObject]:
        return self._records("events", self.state.counters.events)

    def citations(self) -> AsyncIterator[Citation]:
        return self._sessions._citations(  # noqa: SLF001  # a part of it
            self._key, upto=self.state.counters.citations
        )

    async def _records(self, log: str, count: int) -> AsyncIterator[JsonObject]:
        if count == 0:
            return
        async for entry in self._sessions._log(self._key, log):  # noqa: SLF001  # a part of it
            yield entry.record
            count -= 1
            if count == 0:
                return
