"""The token of a session: unguessable, stored only as its hash, valid for that session alone."""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Callable
from hashlib import sha256
from typing import cast

from agent_state.errors import SessionNotFoundError, UnknownTokenError
from agent_state.sessions.models import TOKENS, Session, StoredSession, TokenEntry
from agent_state.sessions.repository import SessionDraft, SessionRepository, check_alive

RandomBytes = Callable[[int], bytes]

_TOKEN_BYTES = 32
_MAX_TOKEN_LENGTH = 256


class SessionTokens:
    """``sessions.tokens``: opens sessions by their token, replaces and revokes tokens."""

    def __init__(self, repository: SessionRepository, random_bytes: RandomBytes) -> None:
        self._repository = repository
        self._random_bytes = random_bytes

    def new_token(self) -> str:
        """A random token, which opens nothing yet."""
        return urlsafe_b64encode(self._random_bytes(_TOKEN_BYTES)).rstrip(b"=").decode()

    async def resolve(self, token: str) -> Session:
        """The session that the token opens. It never creates a session.

        Raises ``UnknownTokenError``, and ``SessionExpiredError`` for an expired session.
        """
        return await self._repository.public(await self._opened_by(token))

    async def authorize(self, token: str, session_id: str) -> Session:
        """This session, if the token opens it. Raises as ``resolve`` does."""
        session = await self._opened_by(token)
        if session.session_id != session_id:
            raise UnknownTokenError("the token does not open this session")
        return await self._repository.public(session)

    async def rotate(self, session_id: str) -> str:
        """A new token for the session, returned this once; the former one becomes invalid.

        Raises ``SessionNotFoundError``, ``SessionExpiredError``.
        """
        token = self.new_token()
        await self._replace(session_id, digest_of(token))
        return token

    async def revoke(self, session_id: str) -> bool:
        """Invalidate the session's token; whether it had one. ``rotate`` issues a new one.

        Raises ``SessionNotFoundError``, ``SessionExpiredError``.
        """
        return await self._replace(session_id, None)

    async def _replace(self, session_id: str, digest: str | None) -> bool:
        async def replace(draft: SessionDraft) -> str | None:
            session = draft.session
            former = session.token_sha256
            if former:
                draft.group.delete(TOKENS, former)
            if digest is not None:
                draft.group.save(TOKENS, digest, TokenEntry(session_id=session_id), expected=0)
            session.token_sha256 = digest
            draft.record_event("token_revoked" if digest is None else "token_rotated")
            return former

        former = await self._repository.change(session_id, replace)
        if former:
            await self._repository.manager.erase(TOKENS, former)
        return bool(former)

    async def _opened_by(self, token: str) -> StoredSession:
        if not isinstance(token, str) or len(token) > _MAX_TOKEN_LENGTH:
            raise UnknownTokenError("this is not a token")
        repository, digest = self._repository, digest_of(token)
        entry = cast("TokenEntry | None", await repository.manager.load(TOKENS, digest))
        if entry is None:
            raise UnknownTokenError("the token opens no session")
        try:
            session, _ = await repository.stored(entry.session_id)
            # The index may be older than the session, whose own hash alone decides.
            if not hmac.compare_digest(session.token_sha256 or "", digest):
                raise UnknownTokenError("the token opens no session")
            check_alive(session, repository.clock.now())
        except SessionNotFoundError as error:
            raise UnknownTokenError("the token opens no session") from error
        return session


def digest_of(token: str) -> str:
    """SHA-256 in hex; nothing else of a token is stored."""
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
