"""The routes of sessions: their life, tokens, history, events, conversations and states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from fastapi import Depends, Query, Request

from agent_state.clock import stamp
from agent_state.errors import (
    AgentStateError,
    DedupeKeyReusedError,
    SessionExpiredError,
    SessionNotFoundError,
    StateCorruptedError,
    UnmergedStateError,
)
from agent_state.models import Task
from agent_state.protocols import Notice
from agent_state.sessions import (
    AddedMessage,
    CleanupResult,
    Conversation,
    ConversationPage,
    Session,
    SessionHistory,
    SessionManager,
    SessionState,
)
from agent_state.sessions.models import SESSIONS, STATES
from agent_state.web.auth import Caller, caller, for_session, operator, operator_or_visitor
from agent_state.web.backend import Backend, BackendDep, SessionsDep
from agent_state.web.events import SSE, EventStream, open_stream
from agent_state.web.index import StateIndexes
from agent_state.web.models import (
    AnsweredMessage,
    ContextChange,
    ConversationOwner,
    ConversationView,
    Cursor,
    IdempotencyKey,
    Include,
    LastEventId,
    Limit,
    MessageTask,
    Moment,
    NewSession,
    NewSessionMessage,
    Page,
    PathId,
    RecordNumber,
    RevokeResult,
    SessionChange,
    SessionToken,
    SessionView,
    StateChange,
)
from agent_state.web.operations import (
    Created,
    OperationRouter,
    Versioned,
    document,
    from_cursor,
    to_cursor,
)
from agent_state.web.problems import Problem, no_runtime

_SESSION = "/session/{session_id:id}"
_CONVERSATION = _SESSION + "/conversations/{agent_type:id}"
_CHANGED = document(SESSIONS, "session_id")
_SAID = ("role", "content", "orchestrator_context", "metadata")
"""The fields of a message that its key stands for."""

router = OperationRouter(
    "/api/global",
    "sessions",
    access=for_session,
    ends=True,
    about="Sessions of people: their state, tokens, history and events.",
)
conversations = OperationRouter(
    "/api/global",
    "conversations",
    access=for_session,
    ends=True,
    about="What people and agents say to each other in a session.",
)

Messages = Annotated[
    int, Query(ge=0, le=100, description="The number of latest messages of each conversation.")
]

# -- sessions ----------------------------------------------------------------------------------


@router.operation(
    "POST",
    "/session",
    status=201,
    access=operator_or_visitor,
    errors=[401, 403, 409, 422, 429, 503],
)
async def create_session(
    sessions: SessionsDep,
    new: NewSession,
    client: Annotated[Caller | None, Depends(operator_or_visitor)],
) -> SessionView:
    """Create a session. Its token is only in this response; its hash is stored.

    A user who has the maximum number of sessions loses the oldest one. Where the server permits
    it, visitors without a token create anonymous sessions, so many in an hour (429).
    """
    if client is None and new.user_id is not None:
        raise Problem(403, "forbidden", "A visitor's session has no user.")
    kind = {} if new.session_type is None else {"session_type": new.session_type}
    created = await sessions.create(new.user_id, context={**new.context, **kind})
    view = await _view(sessions, created.session, 0)
    return view.model_copy(update={"session_token": created.session_token})


@router.operation("GET", "/session", access=caller, errors=[401, 404, 410, 422, 503])
async def get_own_session(
    backend: BackendDep, client: Annotated[Caller, Depends(caller)], messages: Messages = 20
) -> Versioned[SessionView]:
    """The session of the token. An operator's token has no session (404)."""
    client.check_not_ended()
    if client.session_id is None:
        raise Problem(404, "not_found", "This is not the token of a session.")
    return await _version(backend, client.session_id, messages)


@router.operation("GET", _SESSION)
async def get_session(
    backend: BackendDep, session_id: PathId, messages: Messages = 20
) -> Versioned[SessionView]:
    """A session with everything that a page needs to show it. Its expiry is not renewed.

    Its `ETag` is the revision of its document, which a new message changes, too.
    """
    return await _version(backend, session_id, messages)


@router.operation("PATCH", _SESSION, changes=_CHANGED)
async def update_session(
    sessions: SessionsDep, session_id: PathId, change: SessionChange
) -> SessionView:
    """Change the session's state, its context, or both.

    With `If-Match`, the ETag of GET, only if nothing has changed since (412).
    """
    session = await sessions.update(
        session_id, change.state, context=change.context, mode=change.mode
    )
    return await _view(sessions, session, 0)


@router.operation("POST", _SESSION + "/touch", changes=_CHANGED)
async def touch_session(sessions: SessionsDep, session_id: PathId) -> SessionView:
    """Renew the session's expiry, and change nothing else."""
    return await _view(sessions, await sessions.renew(session_id), 0)


@router.operation("DELETE", _SESSION, status=204, changes=_CHANGED)
async def destroy_session(sessions: SessionsDep, session_id: PathId) -> None:
    """End the session and erase all its documents, logs and copies."""
    if not await sessions.destroy(session_id):
        raise Problem(404, "not_found", "there is no such session")


@router.operation("POST", _SESSION + "/token", changes=_CHANGED)
async def rotate_token(sessions: SessionsDep, session_id: PathId) -> SessionToken:
    """Replace the session's token; the former one is no longer valid."""
    return SessionToken(session_token=await sessions.tokens.rotate(session_id))


@router.operation("DELETE", _SESSION + "/token", changes=_CHANGED)
async def revoke_token(sessions: SessionsDep, session_id: PathId) -> RevokeResult:
    """Make the session's token invalid, without a new one."""
    return RevokeResult(revoked=await sessions.tokens.revoke(session_id))


@router.operation("GET", _SESSION + "/history")
async def get_session_history(
    *,
    backend: BackendDep,
    session_id: PathId,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> SessionHistory:
    """The events of the session, oldest first, without the content of messages."""
    async with backend.view() as view:
        return await view.sessions.history(session_id, after=after, limit=limit)


@router.operation("GET", _SESSION + "/events", content=SSE)
async def session_events(
    *,
    request: Request,
    backend: BackendDep,
    session_id: PathId,
    client: Annotated[Caller, Depends(for_session)],
    include: Include = None,
    messages: Messages = 20,
    last_event_id: LastEventId = None,
) -> EventStream:
    """Changes of this session, as server-sent events: see `/api/events`.

    A message changes the session's document, too. With `include=body` a change of the session has
    the session as GET answers it, with so many `messages`. The stream ends with the session, and
    when the token is no longer valid.
    """
    async with backend.view() as view:
        await view.sessions.get(session_id)

    def wanted(notice: Notice) -> bool:
        return notice.kind in (SESSIONS, STATES) and notice.key[0] == session_id

    async def allowed() -> bool:
        try:
            async with backend.view() as view:
                await view.sessions.get(session_id)
            return client.token is None or await backend.resolve(client.token) == session_id
        except AgentStateError:
            return False  # it has ended, or cannot be read; a reconnect is answered with which

    async def content(notice: Notice) -> object:
        try:
            async with backend.view() as view:
                if notice.kind == STATES:
                    return await view.sessions.states.load(session_id, notice.key[1])
                session = await view.sessions.get(session_id)
                return await _view(view.sessions, session, messages)
        except AgentStateError:
            return None

    feed = request.app.state.feed
    return await open_stream(feed, last_event_id, wanted, allowed, content if include else None)


@router.operation("GET", "/sessions", access=operator, errors=[401, 403, 422, 503])
async def list_sessions(
    *,
    request: Request,
    backend: BackendDep,
    user_id: Annotated[str | None, Query(description="Only of this user.")] = None,
    oldest_first: bool = False,
    after: Cursor = None,
    limit: Limit = 50,
) -> Page[SessionView]:
    """The sessions that have not ended, the one with the latest activity first."""
    indexes: StateIndexes = request.app.state.indexes
    place = from_cursor(after, 2)
    async with backend.view() as view:
        now = stamp(view.manager.clock.now())
        found = (await indexes.get(SESSIONS, view.manager)).page(
            lambda entry: user_id in (None, entry.name) and entry.due > now,
            statuses=("active",),
            after=place,
            limit=limit + 1,
            backwards=not oldest_first,
        )
        page: Page[SessionView] = Page(items=[])
        for entry in found[:limit]:
            try:
                session = await view.sessions.get(entry.key[0])
                page.items.append(await _view(view.sessions, session, 0))
            except (SessionNotFoundError, SessionExpiredError):
                continue  # it has ended since
            except (StateCorruptedError, UnmergedStateError):
                page.unusable.append(entry.key[0])
    if len(found) > limit:
        page.next = to_cursor(found[limit - 1].order)
    return page


@router.operation("POST", "/sessions/cleanup", access=operator, errors=[401, 403, 409, 503])
async def cleanup_sessions(sessions: SessionsDep) -> CleanupResult:
    """Erase the expired sessions."""
    return await sessions.cleanup()


async def _version(backend: Backend, session_id: str, messages: int) -> Versioned[SessionView]:
    async with backend.view() as view:
        stored = await view.manager.load_with_revision(SESSIONS, session_id)
        session = await view.sessions.get(session_id)
        shown = await _view(view.sessions, session, messages)
        # With a pause between renewals, a message changes what is shown, and not the document.
        is_whole = not view.sessions.renew_interval_seconds
    return Versioned(shown, stored.revision if stored is not None else None, is_whole)


async def _view(sessions: SessionManager, session: Session, messages: int) -> SessionView:
    views = {}
    for agent_type, conversation in session.conversations.items():
        view = ConversationView.model_validate(conversation.model_dump())
        if messages and conversation.message_count and sessions.agent_types.accepts(agent_type):
            page = await sessions.conversations.page(session.session_id, agent_type, limit=messages)
            view.messages = page.messages
        views[agent_type] = view
    return SessionView.of(session, views)


# -- conversations and states ------------------------------------------------------------------


@conversations.operation("GET", _CONVERSATION + "/messages")
async def list_messages(
    *,
    backend: BackendDep,
    session_id: PathId,
    agent_type: PathId,
    after: RecordNumber = None,
    before: RecordNumber = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    role: str | None = None,
    workflow_id: str | None = None,
    since: Annotated[Moment, Query()] = None,
    until: Annotated[Moment, Query()] = None,
    text: Annotated[str | None, Query(max_length=1000, description="Part of the content.")] = None,
) -> ConversationPage:
    """A page of messages, oldest first: by default the latest `limit` messages.

    `next_before` and `next_after` are the `before` and `after` of the neighbouring pages.
    """
    async with backend.view() as view:
        return await view.sessions.conversations.page(
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


@conversations.operation(
    "POST",
    _CONVERSATION + "/messages",
    status=201,
    existing="It was stored before, under this key.",
)
async def add_message(
    *,
    request: Request,
    backend: BackendDep,
    sessions: SessionsDep,
    session_id: PathId,
    agent_type: PathId,
    new: NewSessionMessage,
    client: Annotated[Caller, Depends(for_session)],
    idempotency_key: IdempotencyKey = None,
) -> Created[AnsweredMessage]:
    """Add a message; it is durable once this is answered. A repeated key stores it once.

    A key that stands for another message is refused (422).
    With the token of a session the role is always `user`. `task` is queued once the message is
    stored, and once only; with the token of a session it has to be one that the server permits.
    """
    if not client.is_operator and new.role != "user":
        raise Problem(403, "forbidden", "The token of a session permits the role user only.")
    if new.task is not None:
        _check_task(request, backend, client, new.task)
    added = await sessions.conversations.add(
        session_id,
        agent_type,
        new.role,
        new.content,
        orchestrator_context=new.orchestrator_context,
        dedupe_key=idempotency_key,
        metadata=new.metadata,
    )
    if added.duplicate and any(
        getattr(added.message, name) != getattr(new, name) for name in _SAID
    ):
        raise DedupeKeyReusedError(
            f"the key {idempotency_key!r:.80} was used before, for other content"
        )
    task = None if new.task is None else await _queue(backend, added, new.task)
    answer = AnsweredMessage(**dict(added), task=task)
    return Created(answer, existed=added.duplicate)


def _check_task(request: Request, backend: Backend, client: Caller, task: MessageTask) -> None:
    """Refuse a task that cannot be queued, before the message is stored."""
    permitted: Collection[str] = request.app.state.visitor_tasks
    if not client.is_operator and f"{task.agent_id}/{task.name}" not in permitted:
        raise Problem(403, "forbidden", "The token of a session does not permit this task.")
    if backend.runtime is None:
        raise no_runtime()
    backend.runtime.agents.get(task.agent_id)


async def _queue(backend: Backend, added: AddedMessage, task: MessageTask) -> Task:
    """The task of a message: one, however often the message is sent."""
    if backend.runtime is None:
        raise no_runtime()
    ids = {
        "session_id": added.session_id,
        "agent_type": added.agent_type,
        "message_id": added.message.message_id,
        "seq": added.seq,
    }
    return await backend.runtime.tasks.submit(
        task.agent_id,
        task.name,
        {**task.payload, **ids},
        priority=task.priority,
        dedupe_key=f"message:{added.conversation_id}:{added.message.message_id}",
    )


@conversations.operation("PATCH", _CONVERSATION + "/context", access=operator, changes=_CHANGED)
async def update_conversation_context(
    sessions: SessionsDep, session_id: PathId, agent_type: PathId, change: ContextChange
) -> Conversation:
    """Change the workflow context of a conversation."""
    return await sessions.conversations.update_context(
        session_id, agent_type, change.context, mode=change.mode
    )


@conversations.operation("GET", "/conversations/{conversation_id:id}", access=operator)
async def find_conversation(backend: BackendDep, conversation_id: PathId) -> ConversationOwner:
    """The session and the agent type of a conversation."""
    async with backend.view() as view:
        session, agent_type = await view.sessions.conversations.find(conversation_id)
    return ConversationOwner(session_id=session.session_id, agent_type=agent_type)


@conversations.operation("GET", _SESSION + "/states/{state_id:id}")
async def get_session_state(
    backend: BackendDep, session_id: PathId, state_id: PathId
) -> Versioned[SessionState]:
    """A state of the session, as it was stored."""
    async with backend.view() as view:
        stored = await view.manager.load_with_revision(STATES, (session_id, state_id))
        state = await view.sessions.states.load(session_id, state_id)
    return Versioned(state, stored.revision if stored is not None else None)


@conversations.operation(
    "PUT",
    _SESSION + "/states/{state_id:id}",
    access=operator,
    changes=document(STATES, "session_id", "state_id"),
)
async def put_session_state(
    sessions: SessionsDep, session_id: PathId, state_id: PathId, change: StateChange
) -> SessionState:
    """Store a state of the session; it replaces the one of the same id."""
    return await sessions.states.save(
        session_id,
        change.state_data,
        state_id=state_id,
        orchestrator=change.orchestrator,
        workflow_id=change.workflow_id,
        delegation_chain=change.delegation_chain,
        metadata=change.metadata,
        ttl_seconds=change.ttl,
    )
