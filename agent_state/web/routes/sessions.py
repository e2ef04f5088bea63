"""Sessions: create, look, change, destroy; their tokens, history and live changes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from agent_state.errors import AgentStateError
from agent_state.protocols import Notice
from agent_state.sessions import (
    CleanupResult,
    CreatedSession,
    Session,
    SessionHistory,
    SessionManager,
)
from agent_state.sessions.models import SESSIONS, STATES
from agent_state.web.auth import Caller, caller, for_session, operator
from agent_state.web.backend import BackendDep, SessionsDep
from agent_state.web.events import EventFeed, EventStream
from agent_state.web.models import (
    ConversationView,
    NewSession,
    PathId,
    RevokeResult,
    SessionChange,
    SessionToken,
    SessionView,
)
from agent_state.web.problems import Problem, documented
from agent_state.web.replies import reply
from agent_state.web.routes.system import SSE, LastEventId

router = APIRouter(prefix="/api/global", tags=["sessions"])

READ = documented([401, 403, 404, 410, 422, 503])
WRITE = documented([401, 403, 404, 409, 410, 422, 503])
OWN = [Depends(for_session)]
OPERATOR = [Depends(operator)]
_BY_TOKEN = documented([401, 404, 410, 422, 503])

Messages = Annotated[
    int, Query(ge=0, le=100, description="So many of the latest of each conversation.")
]


@router.post(
    "/session",
    operation_id="create_session",
    response_model=SessionView,
    status_code=201,
    dependencies=OPERATOR,
    responses=documented([401, 403, 409, 422, 503]),
)
async def create_session(sessions: SessionsDep, new: NewSession) -> Response:
    """A new session and its token, which is told this once: only its hash is kept.

    A known user who has as many sessions as there may be loses the oldest.
    """
    kind = {} if new.session_type is None else {"session_type": new.session_type}
    made: CreatedSession = await sessions.create(new.user_id, context={**new.context, **kind})
    view = await _view(sessions, made.session, 0)
    return reply(view.model_copy(update={"session_token": made.session_token}), 201)


@router.get(
    "/session",
    operation_id="get_own_session",
    response_model=SessionView,
    responses=_BY_TOKEN,
)
async def get_own_session(
    backend: BackendDep, who: Annotated[Caller, Depends(caller)], messages: Messages = 20
) -> Response:
    """The session that the token opens. An operator's token opens none (404)."""
    who.check_not_ended()
    if who.session_id is None:
        raise Problem(404, "not_found", "This is no token of a session.")
    async with backend.view() as view:
        session = await view.sessions.get(who.session_id)
        return reply(await _view(view.sessions, session, messages))


@router.get(
    "/session/{session_id:id}",
    operation_id="get_session",
    response_model=SessionView,
    dependencies=OWN,
    responses=READ,
)
async def get_session(backend: BackendDep, session_id: PathId, messages: Messages = 20) -> Response:
    """The session with all that a page needs to go on. Looking does not renew its expiry."""
    async with backend.view() as view:
        session = await view.sessions.get(session_id)
        return reply(await _view(view.sessions, session, messages))


@router.patch(
    "/session/{session_id:id}",
    operation_id="update_session",
    response_model=SessionView,
    dependencies=OWN,
    responses=WRITE,
)
async def update_session(
    sessions: SessionsDep, session_id: PathId, change: SessionChange
) -> Response:
    """Change the session's state, its context, or both."""
    session = await sessions.update(
        session_id, change.state, context=change.context, mode=change.mode
    )
    return reply(await _view(sessions, session, 0))


@router.post(
    "/session/{session_id:id}/touch",
    operation_id="touch_session",
    response_model=SessionView,
    dependencies=OWN,
    responses=WRITE,
)
async def touch_session(sessions: SessionsDep, session_id: PathId) -> Response:
    """Renew the session's expiry and change nothing else."""
    return reply(await _view(sessions, await sessions.renew(session_id), 0))


@router.delete(
    "/session/{session_id:id}",
    operation_id="destroy_session",
    status_code=204,
    dependencies=OWN,
    responses=WRITE,
)
async def destroy_session(sessions: SessionsDep, session_id: PathId) -> Response:
    """End the session and erase all that is kept of it, so that nothing brings it back."""
    if not await sessions.destroy(session_id):
        raise Problem(404, "not_found", "there is no such session")
    return Response(status_code=204)


@router.post(
    "/session/{session_id:id}/token",
    operation_id="rotate_token",
    dependencies=OWN,
    responses=WRITE,
)
async def rotate_token(sessions: SessionsDep, session_id: PathId) -> SessionToken:
    """A new token for the session; the one before opens nothing any more."""
    return SessionToken(session_token=await sessions.tokens.rotate(session_id))


@router.delete(
    "/session/{session_id:id}/token",
    operation_id="revoke_token",
    dependencies=OWN,
    responses=WRITE,
)
async def revoke_token(sessions: SessionsDep, session_id: PathId) -> RevokeResult:
    """Let no token open the session."""
    return RevokeResult(revoked=await sessions.tokens.revoke(session_id))


@router.get(
    "/session/{session_id:id}/history",
    operation_id="get_session_history",
    response_model=SessionHistory,
    dependencies=OWN,
    responses=READ,
)
async def get_session_history(
    *,
    backend: BackendDep,
    session_id: PathId,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """What happened to the session, oldest first: not what was said, only how much."""
    async with backend.view() as view:
        found = await view.sessions.history(session_id, after=after, limit=limit)
    return reply(found)


@router.get(
    "/session/{session_id:id}/events",
    operation_id="session_events",
    status_code=200,
    response_class=EventStream,
    responses={**SSE, **READ},
)
async def session_events(
    request: Request,
    backend: BackendDep,
    session_id: PathId,
    who: Annotated[Caller, Depends(for_session)],
    last_event_id: LastEventId = None,
) -> EventStream:
    """Changes of this session, as server-sent events: see `/api/events`.

    Everything said in it changes its document, too. The stream ends with the session, and when
    the token opens it no longer.
    """
    async with backend.view() as view:
        await view.sessions.get(session_id)

    def wanted(notice: Notice) -> bool:
        return notice.kind in (SESSIONS, STATES) and notice.key[0] == session_id

    async def allowed() -> bool:
        try:
            async with backend.view() as view:
                await view.sessions.get(session_id)
            return who.token is None or await backend.resolve(who.token) == session_id
        except AgentStateError:
            return False  # it has ended, or nobody can tell; coming back says which

    feed: EventFeed = request.app.state.feed
    await feed.start()
    return EventStream(feed, feed.stream(last_event_id, wanted, allowed))


@router.post(
    "/sessions/cleanup",
    operation_id="cleanup_sessions",
    dependencies=OPERATOR,
    responses=documented([401, 403, 409, 503]),
)
async def cleanup_sessions(sessions: SessionsDep) -> CleanupResult:
    """Erase the sessions whose time is over."""
    return await sessions.cleanup()


async def _view(sessions: SessionManager, session: Session, messages: int) -> SessionView:
    conversations = {}
    for agent_type, conversation in session.conversations.items():
        shown = ConversationView.model_validate(conversation.model_dump())
        if messages and conversation.message_count and sessions.agent_types.accepts(agent_type):
            page = await sessions.conversations.page(session.session_id, agent_type, limit=messages)
            shown.messages = page.messages
        conversations[agent_type] = shown
    return SessionView.of(session, conversations)
