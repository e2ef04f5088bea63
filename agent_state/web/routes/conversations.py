"""What was said in a session, and the states behind it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from agent_state.sessions import (
    AddedMessage,
    Conversation,
    ConversationPage,
    SessionState,
)
from agent_state.web.auth import Caller, for_session
from agent_state.web.backend import BackendDep, SessionsDep
from agent_state.web.models import (
    ContextChange,
    ConversationOwner,
    IdempotencyKey,
    Moment,
    NewSessionMessage,
    PathId,
    StateChange,
)
from agent_state.web.problems import Problem
from agent_state.web.replies import reply
from agent_state.web.routes.sessions import OPERATOR, OWN, READ, WRITE

router = APIRouter(tags=["conversations"])

_SESSION = "/api/global/session/{session_id:id}"
_CONVERSATION = _SESSION + "/conversations/{agent_type:id}"

Number = Annotated[int | None, Query(ge=0, le=2**53)]


@router.get(
    _CONVERSATION + "/messages",
    operation_id="list_messages",
    response_model=ConversationPage,
    dependencies=OWN,
    responses=READ,
)
async def list_messages(
    *,
    backend: BackendDep,
    session_id: PathId,
    agent_type: PathId,
    after: Number = None,
    before: Number = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    role: str | None = None,
    workflow_id: str | None = None,
    since: Annotated[Moment, Query()] = None,
    until: Annotated[Moment, Query()] = None,
    text: Annotated[str | None, Query(max_length=1000, description="Is in the content.")] = None,
) -> Response:
    """A page of what was said, oldest first: by default the latest `limit` messages.

    `next_before` and `next_after` are what to ask with for the pages beside it.
    """
    async with backend.view() as view:
        page = await view.sessions.conversations.page(
            session_id,
            agent_type,
            after=after,
            before=before,
            limit=limit,
            role=role,
            workflow_id=workflow_id,
            since=since,
            until=until,
            text=text,
        )
    return reply(page)


@router.post(
    _CONVERSATION + "/messages",
    operation_id="add_message",
    response_model=AddedMessage,
    status_code=201,
    responses={
        200: {"description": "It was there already, under this key.", "model": AddedMessage},
        **WRITE,
    },
)
async def add_message(
    *,
    sessions: SessionsDep,
    session_id: PathId,
    agent_type: PathId,
    said: NewSessionMessage,
    who: Annotated[Caller, Depends(for_session)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Add what was said; it is stored when this answers. Under one key it is stored once.

    Who holds the session's token speaks as `user` only.
    """
    if not who.is_operator and said.role != "user":
        raise Problem(403, "forbidden", "The token of a session speaks as user.")
    added = await sessions.conversations.add(
        session_id,
        agent_type,
        said.role,
        said.content,
        orchestrator_context=said.orchestrator_context,
        dedupe_key=idempotency_key,
        metadata=said.metadata,
    )
    return reply(added, 200 if added.duplicate else 201)


@router.patch(
    _CONVERSATION + "/context",
    operation_id="update_conversation_context",
    response_model=Conversation,
    dependencies=OPERATOR,
    responses=WRITE,
)
async def update_conversation_context(
    sessions: SessionsDep, session_id: PathId, agent_type: PathId, change: ContextChange
) -> Response:
    """Say which workflow a conversation is about."""
    conversation = await sessions.conversations.update_context(
        session_id, agent_type, change.context, mode=change.mode
    )
    return reply(conversation)


@router.get(
    "/api/global/conversations/{conversation_id:id}",
    operation_id="find_conversation",
    dependencies=OPERATOR,
    responses=READ,
)
async def find_conversation(backend: BackendDep, conversation_id: PathId) -> ConversationOwner:
    """Which session a conversation belongs to."""
    async with backend.view() as view:
        session, agent_type = await view.sessions.conversations.find(conversation_id)
    return ConversationOwner(session_id=session.session_id, agent_type=agent_type)


@router.get(
    _SESSION + "/states/{state_id:id}",
    operation_id="get_session_state",
    response_model=SessionState,
    dependencies=OWN,
    responses=READ,
)
async def get_session_state(backend: BackendDep, session_id: PathId, state_id: PathId) -> Response:
    """A state of the session, as it was stored."""
    async with backend.view() as view:
        return reply(await view.sessions.states.load(session_id, state_id))


@router.put(
    _SESSION + "/states/{state_id:id}",
    operation_id="put_session_state",
    response_model=SessionState,
    dependencies=OPERATOR,
    responses=WRITE,
)
async def put_session_state(
    sessions: SessionsDep, session_id: PathId, state_id: PathId, change: StateChange
) -> Response:
    """Store a state of the session in the place of the one with this id."""
    state = await sessions.states.save(
        session_id,
        change.state_data,
        state_id=state_id,
        orchestrator=change.orchestrator,
        workflow_id=change.workflow_id,
        delegation_chain=change.delegation_chain,
        metadata=change.metadata,
        ttl_seconds=change.ttl_seconds,
    )
    return reply(state)
