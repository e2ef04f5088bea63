"""Conversations with the way they went: begin, resume, append, look, close, erase."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep
from agent_state.web.models import IdempotencyKey, PathId
from agent_state.web.operations import JSONReply
from agent_state.web.problems import Problem, documented
from agent_state_integrations.journey import (
    EmotionTransition,
    EmotionUpdate,
    JourneyMessage,
    JourneySummary,
    ResumedSession,
    SessionMetadata,
    SessionStats,
)
from agent_state_integrations.journey.route_models import (
    ClosedJourney,
    JourneyIds,
    NewJourney,
    NewJourneyMessage,
    StoredMessageId,
)
from agent_state_integrations.journey.served import WritableJourneys, journeys_of

router = APIRouter(
    prefix="/api/journeys/{user_id:id}", tags=["journeys"], dependencies=[Depends(operator)]
)

_READ = documented([401, 403, 404, 422, 503])
_WRITE = documented([401, 403, 404, 409, 410, 422, 503])

Limit = Annotated[int, Query(ge=0, le=1000, description="At most so many, the latest.")]


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
    return JSONReply(resumed)


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
    return JSONReply(found)


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
    message = JourneyMessage(role=new.role, content=new.content)
    for name in ("model_id", "tokens", "emotion_context", "parent_message_id"):
        if name in new.model_fields_set:
            setattr(message, name, getattr(new, name))
    if idempotency_key is not None:
        message.message_id = idempotency_key
    update = new.update_emotion
    message_id = await journeys.append_message(
        user_id,
        session_id,
        message,
        update_emotion=EmotionUpdate.model_validate(update.model_dump()) if update else None,
        is_breakthrough=new.is_breakthrough,
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
    return JSONReply(found)


@router.get(
    "/{session_id:id}/summary",
    operation_id="get_journey_summary",
    response_model=JourneySummary,
    responses=_READ,
)
async def get_journey_summary(backend: BackendDep, user_id: PathId, session_id: PathId) -> Response:
    """All milestones and breakthroughs, oldest first, and how long it has taken."""
    async with backend.view() as view:
        return JSONReply(await journeys_of(view).get_journey_summary(user_id, session_id))


@router.get("/{session_id:id}/stats", operation_id="get_journey_stats", responses=_READ)
async def get_journey_stats(
    backend: BackendDep, user_id: PathId, session_id: PathId
) -> SessionStats:
    """Counts and times."""
    async with backend.view() as view:
        return await journeys_of(view).get_session_stats(user_id, session_id)
