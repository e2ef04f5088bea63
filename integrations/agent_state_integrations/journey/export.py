"""Exports: a session as a text for people or programs, streamed in bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Literal

import orjson

from agent_state.clock import instant, stamp
from agent_state.errors import Key, OffTheRecordError, StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.citations import Citations
from agent_state_integrations.journey.export_formats import (
    ExportSource,
    render_json,
    render_markdown,
    render_text,
)
from agent_state_integrations.journey.models import KIND
from agent_state_integrations.journey.repository import JourneyDraft, JourneyRepository

ExportFormat = Literal["markdown", "json", "text", "md", "txt"]
"""A format of text; ``md`` is ``markdown``, and ``txt`` is ``text``."""
_SHORT = {"md": "markdown", "txt": "text"}

_PIECE_LENGTH = 16 * 1024
_RENDERERS: dict[str, Callable[[ExportSource], AsyncGenerator[str, None]]] = {
    "markdown": render_markdown,
    "json": render_json,
    "text": render_text,
}


@dataclass(frozen=True, slots=True)
class Export:
    """One export: iterate over it for its pieces of text, once, to the end.

    With the last piece it is stored as a citation with the SHA-256 of the text, so that
    ``citations.verify(..., export.citation, content=text)`` returns whether a text is the exported
    one.
    """

    export_id: str
    """Its id."""
    citation: str
    """The id of its citation, ``if://export/<session>/<export id>``."""
    format: ExportFormat
    """Its format."""
    _pieces: AsyncGenerator[str, None]

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def aclose(self) -> None:
        """Stop before the end; then no citation is stored."""
        await self._pieces.aclose()

    async def text(self) -> str:
        """The remaining text in one piece."""
        return "".join([piece async for piece in self._pieces])


class Exports:
    """``sessions.exports``: exports sessions, also ended ones, until they are erased.

    Every method raises ``StateNotFoundError`` and, for a session off the record,
    ``OffTheRecordError``.
    """

    def __init__(
        self, repository: JourneyRepository, citations: Citations, assistant_name: str
    ) -> None:
        self._repository = repository
        self._citations = citations
        self._assistant_name = assistant_name

    async def create(
        self,
        user_id: str,
        session_id: str,
        format: ExportFormat = "markdown",  # noqa: A002  # the usual word
        *,
        include_transcript: bool = True,
    ) -> Export:
        """An export of the session as it is now, to be streamed.

        Messages that are added later are not in it. Raises ``StateValidationError`` for an unknown
        format.
        """
        form = _SHORT.get(format, format)
        if form not in _RENDERERS:
            known = ", ".join((*_RENDERERS, *_SHORT))
            pdf = "; for pdf call pdf()" if form == "pdf" else ""
            raise StateValidationError(f"format {format!r:.40} is not one of {known}{pdf}")
        source = await self._source((user_id, session_id), include_transcript=include_transcript)
        return Export(source.export_id, source.citation, format, self._pieces(source, form))

    async def markdown(
        self, user_id: str, session_id: str, *, include_transcript: bool = True
    ) -> tuple[str, str]:
        """The export for a therapist: its text and its id."""
        made = await self.create(
            user_id, session_id, "markdown", include_transcript=include_transcript
        )
        return await made.text(), made.export_id

    async def text(
        self, user_id: str, session_id: str, *, include_transcript: bool = True
    ) -> tuple[str, str]:
        """The export as plain text, and its id."""
        made = await self.create(user_id, session_id, "text", include_transcript=include_transcript)
        return await made.text(), made.export_id

    async def json(self, user_id: str, session_id: str) -> tuple[JsonObject, str]:
        """The export as one object, and its id."""
        made = await self.create(user_id, session_id, "json")
        return orjson.loads(await made.text()), made.export_id

    async def pdf(
        self,
        user_id: str,
        session_id: str,
        *,
        include_transcript: bool = True,
        font: str | PathLike[str] | None = None,
    ) -> tuple[bytes, str]:
        """The export as PDF, and its id; the whole of it is in memory.

        ``font``: a TrueType font; None for one of the machine. Raises ``MissingExtraError``
        without the extra ``pdf``, and ``StateValidationError`` for a file that is no font.
        """
        from agent_state_integrations.journey.pdf import render_pdf  # it needs the extra

        source = await self._source((user_id, session_id), include_transcript=include_transcript)
        async with aclosing(render_text(source)) as rendered:
            text = "".join([piece async for piece in rendered])
        made_at = instant(source.exported_at)
        path = None if font is None else Path(font)
        data = await asyncio.to_thread(render_pdf, text, made_at, font=path)
        await self._cite(source, "pdf", sha256(data).hexdigest())
        return data, source.export_id

    async def _source(self, key: Key, *, include_transcript: bool) -> ExportSource:
        if self._repository.is_off_the_record(key):
            raise OffTheRecordError("the session is not exported", kind=KIND, key=key)
        return ExportSource(
            self._repository,
            self._citations,
            await self._repository.find(*key),
            export_id=self._repository.new_id(),
            exported_at=stamp(self._repository.clock.now()),
            include_transcript=include_transcript,
            assistant_name=self._assistant_name,
        )

    async def _cite(self, source: ExportSource, form: str, content_hash: str) -> None:
        """Store a citation of an export."""
        state = source.state

        async def cite(draft: JourneyDraft) -> None:
            record = {"export_id": source.export_id, "format": form}
            draft.cite("export", source.citation, record, content_hash=content_hash)

        await self._repository.change(
            state.user_id, state.session_id, cite, check=False, renews=False
        )

    async def _pieces(self, source: ExportSource, form: str) -> AsyncGenerator[str, None]:
        """The text in pieces; the citation is stored before the last one."""
        digest, size = sha256(), 0
        pending: list[str] = []
        async with aclosing(_RENDERERS[form](source)) as rendered:
            async for text in rendered:
                pending.append(text)
                size += len(text)
                if size >= _PIECE_LENGTH:
                    piece = "".join(pending)
                    pending, size = [], 0
                    digest.update(piece.encode())
                    yield piece
        piece = "".join(pending)
        digest.update(piece.encode())
        await self._cite(source, form, digest.hexdigest())
        yield piece
