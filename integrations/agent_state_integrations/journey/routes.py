"""The routes of journeys: begin, resume, append, read, close, erase, export.

They use the ``ConversationStateManager`` that the application gave to the backend,
``LiveBackend(manager=manager, services=[journeys])``, or else one with default settings.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from agent_state.web import StateView
from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep
from agent_state.web.models import IdempotencyKey, NonEmptyId, PathId, RequestModel
from agent_state.web.problems import Problem, documented
from agent_state.web.replies import reply
from agent_state_integrations.journey.export import ExportFormat
from agent_state_integrations.journey.manager import ConversationStateManager
from agent_state_integrations.journey.models import (
    EmotionTransition,
    JourneyMessage,
    JourneySummary,
    ResumedSession,
    SessionMetadata,
    SessionStats,
)

router = APIRouter(
    prefix="/api/journeys/{user_id:id}", tags=["journeys"], dependencies=[Depends(operator)]
)

_READ = documented([401, 403, 404, 422, 503])
_WRITE = documented([401, 403, 404, 409, 410, 422, 503])

Limit = Annotated[int, Query(ge=0, le=1000, description="At most so many, the latest.")]


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


@router.get("", operation_id="list_journeys", responses=documented([401, 403, 422, 503]))
async def list_journeys(
    backend: BackendDep,
    user_id: PathId,
    ended: Annotated[bool, Query(description="Also the closed and the expired ones.")] = False,
) -> list[SessionMetadata]:
    """A user's conversations, oldest first. None at all is an empty list."""
    async with backend.view() as view:
        return await journeys_of(view).get_user_sessions(user_id, ended=ended)


@router.post(
    "",
    operation_id="begin_journey",
    status_code=201,
    responses=documented([401, 403, 409, 422, 503]),
)
async def begin_journey(journeys: WritableJourneys, user_id: PathId, new: NewJourney) -> JourneyIds:
    """Begin a conversation. Off the record, it is never written anywhere."""
    begun = await journeys.initialize_session(
        user_id,
        model_id=new.model_id,
        user_timezone=new.user_timezone,
        off_the_record=new.off_the_record,
    )
    return JourneyIds(session_id=begun.session_id, conversation_id=begun.conversation_id)


@router.get("/{session_id:id}", operation_id="get_journey", responses=_READ)
async def get_journey(backend: BackendDep, user_id: PathId, session_id: PathId) -> SessionMetadata:
    """What the conversation is, even when it has ended."""
    async with backend.view() as view:
        return await journeys_of(view).get_session(user_id, session_id)


@router.post(
    "/{session_id:id}/resume",
    operation_id="resume_journey",
    response_model=ResumedSession,
    responses=_WRITE,
)
async def resume_journey(
    journeys: WritableJourneys,
    user_id: PathId,
    session_id: PathId,
    recent: Annotated[int, Query(ge=0, le=1000, description="How many messages.")] = 20,
    reopen: Annotated[bool, Query(description="Also a closed one.")] = False,
) -> Response:
    """All that a page needs to go on, and a renewed expiry."""
    resumed = await journeys.resume_session(user_id, session_id, recent=recent, reopen=reopen)
    return reply(resumed)


@router.post("/{session_id:id}/close", operation_id="close_journey", responses=_WRITE)
async def close_journey(
    journeys: WritableJourneys, user_id: PathId, session_id: PathId
) -> ClosedJourney:
    """Mark it as closed; what it holds stays until it expires. Twice is a no-op."""
    if not await journeys.close_session(user_id, session_id):
        raise Problem(404, "not_found", "there is no such session")
    return ClosedJourney()


@router.delete(
    "/{session_id:id}",
    operation_id="erase_journey",
    status_code=204,
    responses=documented([401, 403, 404, 409, 422, 503]),
)
async def erase_journey(
    journeys: WritableJourneys, user_id: PathId, session_id: PathId
) -> Response:
    """Remove everything there is of it, so that nothing brings it back."""
    if not await journeys.erase_session(user_id, session_id):
        raise Problem(404, "not_found", "there is no such session")
    return Response(status_code=204)


@router.get(
    "/{session_id:id}/messages",
    operation_id="list_journey_messages",
    response_model=list[JourneyMessage],
    responses=_READ,
)
async def list_journey_messages(
    *,
    backend: BackendDep,
    user_id: PathId,
    session_id: PathId,
    limit: Limit = 50,
    before: Annotated[int | None, Query(ge=1, description="Only before this number.")] = None,
) -> Response:
    """The latest messages, oldest first. `before` the `seq` of the first one is the page before."""
    async with backend.view() as view:
        found = await journeys_of(view).get_message_history(
            user_id, session_id, limit, before=before
        )
    return reply(found)


@router.post(
    "/{session_id:id}/messages",
    operation_id="append_journey_message",
    status_code=201,
    responses=_WRITE,
)
async def append_journey_message(
    journeys: WritableJourneys,
    user_id: PathId,
    session_id: PathId,
    new: NewJourneyMessage,
    idempotency_key: IdempotencyKey = None,
) -> StoredMessageId:
    """Add a message with all that it brings about; it is stored when this answers.

    An `Idempotency-Key` is the message's id: sent twice it is stored once. Another message under
    the same key is a mistake (422).
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


@router.get(
    "/{session_id:id}/emotions",
    operation_id="list_emotions",
    response_model=list[EmotionTransition],
    responses=_READ,
)
async def list_emotions(
    backend: BackendDep, user_id: PathId, session_id: PathId, limit: Limit = 1000
) -> Response:
    """The latest steps of the emotional journey, oldest first."""
    async with backend.view() as view:
        found = await journeys_of(view).get_emotion_journey(user_id, session_id, limit=limit)
    return reply(found)


@router.get(
    "/{session_id:id}/summary",
    operation_id="get_journey_summary",
    response_model=JourneySummary,
    responses=_READ,
)
async def get_journey_summary(backend: BackendDep, user_id: PathId, session_id: PathId) -> Response:
    """All milestones and breakthroughs, oldest first, and how long it has taken."""
    async with backend.view() as view:
        return reply(await journeys_of(view).get_journey_summary(user_id, session_id))


@router.get("/{session_id:id}/stats", operation_id="get_journey_stats", responses=_READ)
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
}
_EXPORT = {
    "description": "The export. `Content-Disposition` names a file after its id.",
    "content": {kind: {"schema": {}} for kind, _ in _KINDS.values()},
}


@router.get(
    "/{session_id:id}/export",
    tags=["exports"],
    operation_id="export_journey",
    status_code=200,
    response_class=Response,
    responses={200: _EXPORT, **documented([401, 403, 404, 409, 422, 503])},
)
async def export_journey(
    *,
    journeys: WritableJourneys,
    user_id: PathId,
    session_id: PathId,
    form: Annotated[ExportFormat, Query(alias="format")] = "markdown",
    transcript: Annotated[bool, Query(description="With all that was said.")] = True,
) -> Response:
    """The whole conversation, in bounded memory; it is kept as a citation that can be verified.

    An export that was cut off ends without the last chunk. Needs a server that may write.
    """
    made = await journeys.exports.create(user_id, session_id, form, include_transcript=transcript)
    return await streamed(cast("AsyncGenerator[str, None]", aiter(made)), form, made.export_id)


async def streamed(pieces: AsyncGenerator[str, None], form: ExportFormat, name: str) -> Response:
    """A streamed answer, begun once the first piece is there: until then an error can be told."""
    first = await anext(pieces, "")

    async def pieces_as_bytes() -> AsyncIterator[bytes]:
        async with aclosing(pieces) as rest:  # a client that disconnects leaves no file open
            yield first.encode()
            async for piece in rest:
                yield piece.encode()

    kind, ending = _KINDS[form]
    safe = "".join(char if char.isascii() and char.isalnum() else "-" for char in name)[:64]
    headers = {"Content-Disposition": f'attachment; filename="{safe}.{ending}"'}
    return StreamingResponse(pieces_as_bytes(), media_type=kind, headers=headers)
