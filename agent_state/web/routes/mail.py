"""Mail: look, deliver, read, archive, answer."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from agent_state.models import AgentState, MailMessage, MailStatus
from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep, RuntimeDep
from agent_state.web.models import (
    After,
    IdempotencyKey,
    Limit,
    NewMail,
    Page,
    PathId,
    ReplyRequest,
)
from agent_state.web.paging import one, page
from agent_state.web.problems import documented
from agent_state.web.replies import reply

router = APIRouter(
    prefix="/api/agents/{agent_id:id}/mail", tags=["mail"], dependencies=[Depends(operator)]
)

_READ = documented([401, 403, 404, 422, 503])
_CHANGE = documented([401, 403, 404, 409, 422, 503])


@router.get("", operation_id="list_mail", response_model=Page[MailMessage], responses=_READ)
async def list_mail(
    *,
    backend: BackendDep,
    agent_id: PathId,
    status: Annotated[MailStatus | None, Query(description="Only of this status.")] = None,
    after: After = None,
    limit: Limit = 100,
) -> Response:
    """The agent's mail by id, without what was cleaned up."""
    async with backend.view() as view:
        await one(view.manager, "agents", (agent_id,), AgentState)
        keys = [key for key in await view.manager.keys("mail", agent_id) if len(key) == 2]
        found = await page(
            view.manager,
            "mail",
            keys,
            MailMessage,
            after=after,
            limit=limit,
            wanted=lambda message: status is None or message.status == status,
        )
    return reply(found)


@router.post(
    "", operation_id="send_mail", response_model=MailMessage, status_code=201, responses=_CHANGE
)
async def send_mail(
    *,
    runtime: RuntimeDep,
    agent_id: PathId,
    new: NewMail,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Deliver a message; it is stored when this answers.

    An `Idempotency-Key` is the message's id: what was delivered under it is given again.
    """
    runtime.agents.get(agent_id)  # nobody reads what is sent to an agent that does not exist
    sent = await runtime.mail.send(
        new.from_agent,
        agent_id,
        subject=new.subject,
        body=new.body,
        priority=new.priority,
        expects_reply=new.expects_reply,
        dedupe_key=idempotency_key,
        metadata=new.metadata,
    )
    return reply(sent, 201)


@router.get(
    "/{message_id:id}", operation_id="get_mail", response_model=MailMessage, responses=_READ
)
async def get_mail(backend: BackendDep, agent_id: PathId, message_id: PathId) -> Response:
    """One message. Looking at it does not mark it as read."""
    async with backend.view() as view:
        found = await one(view.manager, "mail", (agent_id, message_id), MailMessage)
    return reply(found)


@router.post(
    "/{message_id:id}/read", operation_id="read_mail", response_model=MailMessage, responses=_CHANGE
)
async def read_mail(runtime: RuntimeDep, agent_id: PathId, message_id: PathId) -> Response:
    """Mark a message as read."""
    return reply(await runtime.mail.read(agent_id, message_id))


@router.post(
    "/{message_id:id}/archive",
    operation_id="archive_mail",
    response_model=MailMessage,
    responses=_CHANGE,
)
async def archive_mail(runtime: RuntimeDep, agent_id: PathId, message_id: PathId) -> Response:
    """Take a message out of the inbox."""
    return reply(await runtime.mail.archive(agent_id, message_id))


@router.post(
    "/{message_id:id}/reply",
    operation_id="reply_to_mail",
    response_model=MailMessage,
    status_code=201,
    responses=_CHANGE,
)
async def reply_to_mail(
    runtime: RuntimeDep, agent_id: PathId, message_id: PathId, answer: ReplyRequest
) -> Response:
    """Answer a message, once: a second answer gives the first one again."""
    replied = await runtime.mail.reply(agent_id, message_id, answer.body, priority=answer.priority)
    return reply(replied, 201)
