"""The routes of journeys: begin, resume, append, read, close, erase, export.

They use the ``ConversationStateManager`` that the application gave to the backend,
``LiveBackend(manager=manager, services=[journeys])``, or else one with default settings.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Literal, cast

from pydantic import BaseModel, Field

from agent_state.errors import MissingExtraError, needs_extra
from agent_state.web import StateView
from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep
from agent_state.web.models import (
    After,
    IdempotencyKey,
    Limit,
    NonEmptyId,
    Page,
    PathId,
    RequestModel,
    example,
)
from agent_state.web.operations import OperationRouter, Versioned, document
from agent_state.web.problems import Problem
from agent_state_integrations.journey.export import ExportFormat
from agent_state_integrations.journey.manager import ConversationStateManager
from agent_state_integrations.journey.models import (
    KIND,
    EmotionTransition,
    JourneyMessage,
    JourneySummary,
    ResumedSession,
    SessionMetadata,
    SessionStats,
)

with needs_extra("server", "fastapi"):
    from fastapi import Depends, Query, Response
    from fastapi.responses import StreamingResponse

router = OperationRouter(
    "/api/journeys/{user_id:id}",
    "journeys",
    access=operator,
    about="Conversations with their emotional journey, and exports of them.",
)

_CHANGE_ERRORS = [401, 403, 404, 409, 410, 422, 503]
"""The statuses of an operation that needs a conversation which has not ended."""

_JOURNEY = document(KIND, "user_id", "session_id")

Latest = Annotated[int, Query(ge=1, le=1000, description="At most so many, the latest.")]
Before = Annotated[
    int | None,
    Query(ge=1, le=2**53, description="Only before this number: `next` of the page after it."),
]


def journeys_of(view: StateView) -> ConversationStateManager:
    """The journeys that a request reads or changes."""
    return view.service(ConversationStateManager)


async def _writable(backend: BackendDep) -> ConversationStateManager:
    return journeys_of(backend.writable())


WritableJourneys = Annotated[ConversationStateManager, Depends(_writable)]


# -- bodies ------------------------------------------------------------------------------------

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class NewJourney(RequestModel):
    """A conversation to begin."""

    model_config = example({"model_id": "model-large", "user_timezone": "Europe/Vienna"})

    model_id: str | None = None
    user_timezone: str | None = None
    off_the_record: bool = False


class EmotionChange(RequestModel):
    """The user's emotion from a message on, and the insight that came with it."""

    emotion: str
    intensity: Fraction = 0.5
    confidence: Fraction = 0.7
    breakthrough_insight: str | None = None
    category: str | None = None


class NewJourneyMessage(RequestModel):
    """A message to add, with its effect on the journey."""

    model_config = example({"role": "user", "content": "I am glad that it works."})

    role: NonEmptyId
    content: str
    model_id: str | None = None
    tokens: int = Field(default=0, ge=0, le=2**53)
    emotion_context: str | None = None
    parent_message_id: str | None = None
    update_emotion: EmotionChange | None = None
    is_breakthrough: bool = False


class JourneyIds(BaseModel):
    """The ids of a conversation."""

    session_id: str
    conversation_id: str


class StoredMessageId(BaseModel):
    """The id of a message that is stored."""

    message_id: str


class ClosedJourney(BaseModel):
    """The conversation is closed."""

    closed: bool = True


# -- routes ------------------------------------------------------------------------------------


@router.operation("GET", "", errors=[401, 403, 422, 503])
async def list_journeys(
    *,
    backend: BackendDep,
    user_id: PathId,
    ended: Annotated[bool, Query(description="Also the closed and the expired ones.")] = False,
    after: After = None,
    limit: Limit = 100,
) -> Page[SessionMetadata]:
    """A user's conversations, oldest first."""
    async with backend.view() as view:
        found = await journeys_of(view).get_user_sessions(user_id, ended=ended)
    ids = [one.session_id for one in found]
    if after is not None and after not in ids:
        raise Problem(422, "invalid", "after is not the next of a page")
    first = 0 if after is None else ids.index(after) + 1
    items = found[first : first + limit]
    more = first + limit < len(found)
    return Page(items=items, next=items[-1].session_id if more else None)


@router.operation("POST", "", status=201, errors=[401, 403, 409, 422, 503])
async def begin_journey(journeys: WritableJourneys, user_id: PathId, new: NewJourney) -> JourneyIds:
    """Begin a conversation. Off the record, it is kept in memory only."""
    begun = await journeys.initialize_session(
        user_id,
        model_id=new.model_id,
        user_timezone=new.user_timezone,
        off_the_record=new.off_the_record,
    )
    return JourneyIds(session_id=begun.session_id, conversation_id=begun.conversation_id)


@router.operation("GET", "/{session_id:id}")
async def get_journey(
    backend: BackendDep, user_id: PathId, session_id: PathId
) -> Versioned[SessionMetadata]:
    """A conversation with its totals, even when it has ended."""
    async with backend.view() as view:
        stored = await view.manager.load_with_revision(KIND, (user_id, session_id))
        found = await journeys_of(view).get_session(user_id, session_id)
    return Versioned(found, None if stored is None else stored.revision)


@router.operation("POST", "/{session_id:id}/resume", errors=_CHANGE_ERRORS, changes=_JOURNEY)
async def resume_journey(
    journeys: WritableJourneys,
    user_id: PathId,
    session_id: PathId,
    recent: Annotated[int, Query(ge=0, le=1000, description="How many messages.")] = 20,
    reopen: Annotated[bool, Query(description="Also a closed one.")] = False,
) -> ResumedSession:
    """Everything that a page needs to go on; the expiry is renewed."""
    return await journeys.resume_session(user_id, session_id, recent=recent, reopen=reopen)


@router.operation("POST", "/{session_id:id}/close", errors=_CHANGE_ERRORS, changes=_JOURNEY)
async def close_journey(
    journeys: WritableJourneys, user_id: PathId, session_id: PathId
) -> ClosedJourney:
    """Mark it as closed; its content stays until it expires. Closing it twice is a no-op."""
    if not await journeys.close_session(user_id, session_id):
        raise Problem(404, "not_found", "there is no such session")
    return ClosedJourney()


@router.operation("DELETE", "/{session_id:id}", status=204, changes=_JOURNEY)
async def erase_journey(journeys: WritableJourneys, user_id: PathId, session_id: PathId) -> None:
    """Erase everything that is stored of it, with every earlier version."""
    if not await journeys.erase_session(user_id, session_id):
        raise Problem(404, "not_found", "there is no such session")


@router.operation("GET", "/{session_id:id}/messages")
async def list_journey_messages(
    *,
    backend: BackendDep,
    user_id: PathId,
    session_id: PathId,
    limit: Latest = 50,
    before: Before = None,
) -> Page[JourneyMessage]:
    """The latest messages, oldest first. `next` is the `before` of the page before."""
    async with backend.view() as view:
        found = await journeys_of(view).get_message_history(
            user_id, session_id, limit, before=before
        )
    first = found[0].seq if found else None
    return Page(items=found, next=str(first) if first is not None and first > 1 else None)


@router.operation("POST", "/{session_id:id}/messages", status=201, errors=_CHANGE_ERRORS)
async def append_journey_message(
    journeys: WritableJourneys,
    user_id: PathId,
    session_id: PathId,
    new: NewJourneyMessage,
    idempotency_key: IdempotencyKey = None,
) -> StoredMessageId:
    """Add a message with all its effects; it is stored when the response comes.

    An `Idempotency-Key` is the message's id: sent twice it is stored once. Another message under
    the same key is refused (422).
    """
    message = new.model_dump(exclude_unset=True, exclude={"update_emotion", "is_breakthrough"})
    update = new.update_emotion
    message_id = await journeys.append_message(
        user_id,
        session_id,
        message,
        update_emotion=update.model_dump() if update else None,
        is_breakthrough=new.is_breakthrough,
        dedupe_key=idempotency_key,
    )
    return StoredMessageId(message_id=message_id)


@router.operation("GET", "/{session_id:id}/emotions")
async def list_emotions(
    backend: BackendDep, user_id: PathId, session_id: PathId, limit: Latest = 1000
) -> Page[EmotionTransition]:
    """The latest steps of the emotional journey, oldest first."""
    async with backend.view() as view:
        found = await journeys_of(view).get_emotion_journey(user_id, session_id, limit=limit)
    return Page(items=found)


@router.operation("GET", "/{session_id:id}/summary")
async def get_journey_summary(
    backend: BackendDep, user_id: PathId, session_id: PathId
) -> JourneySummary:
    """All milestones and breakthroughs, oldest first, and the duration."""
    async with backend.view() as view:
        return await journeys_of(view).get_journey_summary(user_id, session_id)


@router.operation("GET", "/{session_id:id}/stats")
async def get_journey_stats(
    backend: BackendDep, user_id: PathId, session_id: PathId
) -> SessionStats:
    """Counts and times."""
    async with backend.view() as view:
        return await journeys_of(view).get_session_stats(user_id, session_id)


# -- exports -----------------------------------------------------------------------------------

_KINDS = {
    "markdown": ("text/markdown", "md"),
    "json": ("application/json", "json"),
    "text": ("text/plain", "txt"),
    "md": ("text/markdown", "md"),
    "txt": ("text/plain", "txt"),
}
_EXPORT = {
    "description": "The export. `Content-Disposition` names a file after its id.",
    "content": {
        kind: {"schema": {}} for kind in (*(kind for kind, _ in _KINDS.values()), "application/pdf")
    },
}


@router.operation(
    "GET",
    "/{session_id:id}/export",
    errors=[401, 403, 404, 409, 422, 503],
    content=_EXPORT,
    unique=True,
)
async def export_journey(
    *,
    journeys: WritableJourneys,
    user_id: PathId,
    session_id: PathId,
    form: Annotated[ExportFormat | Literal["pdf"], Query(alias="format")] = "markdown",
    transcript: Annotated[bool, Query(description="With the messages.")] = True,
) -> Response:
    """An export of the conversation, streamed in bounded memory, which can be verified later.

    An interrupted export ends without the last chunk. The server must be able to write, as it
    stores a citation of the export.
    """
    if form == "pdf":
        return await _pdf(journeys, user_id, session_id, transcript)
    made = await journeys.exports.create(user_id, session_id, form, include_transcript=transcript)
    return await streamed(cast("AsyncGenerator[str, None]", aiter(made)), form, made.export_id)


async def _pdf(
    journeys: ConversationStateManager, user_id: str, session_id: str, transcript: bool
) -> Response:
    try:
        data, name = await journeys.exports.pdf(user_id, session_id, include_transcript=transcript)
    except MissingExtraError as error:
        raise Problem(503, "missing_extra", str(error)) from error
    return Response(data, media_type="application/pdf", headers=_attachment(name, "pdf"))


def _attachment(name: str, ending: str) -> dict[str, str]:
    safe = "".join(char if char.isascii() and char.isalnum() else "-" for char in name)[:64]
    return {"Content-Disposition": f'attachment; filename="{safe}.{ending}"'}


async def streamed(pieces: AsyncGenerator[str, None], form: ExportFormat, name: str) -> Response:
    """A streamed response that starts with the first piece: errors before it have a status."""
    first = await anext(pieces, "")

    async def pieces_as_bytes() -> AsyncIterator[bytes]:
        async with aclosing(pieces) as rest:  # a client that disconnects leaves no file open
            yield first.encode()
            async for piece in rest:
                yield piece.encode()

    kind, ending = _KINDS[form]
    return StreamingResponse(pieces_as_bytes(), media_type=kind, headers=_attachment(name, ending))
