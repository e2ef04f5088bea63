"""Exports: a conversation as a text for people or programs, streamed as it is written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse

from agent_state.web.auth import operator
from agent_state.web.models import PathId
from agent_state.web.problems import documented
from agent_state_integrations.journey.served import WritableJourneys

router = APIRouter(tags=["exports"], dependencies=[Depends(operator)])

Format = Literal["markdown", "json", "text"]

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
    "/api/journeys/{user_id:id}/{session_id:id}/export",
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
    form: Annotated[Format, Query(alias="format")] = "markdown",
    transcript: Annotated[bool, Query(description="With all that was said.")] = True,
) -> Response:
    """The whole conversation, in bounded memory; it is kept as a citation that can be verified.

    An export that was cut off ends without the last chunk. Needs a server that may write.
    """
    made = await journeys.export(user_id, session_id, form, include_transcript=transcript)
    return await streamed(cast("AsyncGenerator[str, None]", aiter(made)), form, made.export_id)


async def streamed(pieces: AsyncGenerator[str, None], form: Format, name: str) -> Response:
    """A streamed answer, begun once the first piece is there: until then an error can be told."""
    first = await anext(pieces, "")

    async def whole() -> AsyncIterator[bytes]:
        async with aclosing(pieces) as rest:  # a client that goes leaves no file open
            yield first.encode()
            async for piece in rest:
                yield piece.encode()

    kind, ending = _KINDS[form]
    safe = "".join(char if char.isascii() and char.isalnum() else "-" for char in name)[:64]
    headers = {"Content-Disposition": f'attachment; filename="{safe}.{ending}"'}
    return StreamingResponse(whole(), media_type=kind, headers=headers)
