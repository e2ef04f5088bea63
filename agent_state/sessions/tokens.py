"""The token of a session: unguessable, kept as its hash alone, and good for that session alone."""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from hashlib import sha256
from typing import cast

from agent_state.sessions.errors import SessionNotFoundError, UnknownTokenError
from agent_state.sessions.models import TOKENS, Session, StoredSession, TokenEntry
from agent_state.sessions.parts import SessionParts, check_alive
from agent_state.sessions.saving import Draft

_BYTES = 32
_LONGEST = 256


class TokenMethods(SessionParts):
    """What a session manager does with tokens."""

    async def resolve_token(self, token: str) -> Session:
        """The session that the token opens.

        Raises ``UnknownTokenError``, and ``SessionExpiredError`` for a session whose time is
        over. It never makes a session.
        """
        return await self._public(await self._opened_by(token))

    async def authorize(self, token: str, session_id: str) -> Session:
        """That session, if the token opens it. Raises as ``resolve_token`` does."""
        session = await self._opened_by(token)
        if session.session_id != session_id:
            raise UnknownTokenError("the token does not open this session")
        return await self._public(session)

    async def rotate_token(self, session_id: str) -> str:
        """A new token for the session, told this once; the one before opens nothing any more."""
        token = self._new_token()
        await self._replace_token(session_id, digest_of(token))
        return token

    async def revoke_token(self, session_id: str) -> bool:
        """Let no token open the session; whether one did. ``rotate_token`` gives a new one."""
        return await self._replace_token(session_id, None)

    async def _replace_token(self, session_id: str, digest: str | None) -> bool:
        former: list[str] = []

        def work(draft: Draft) -> None:
            session = draft.session
            former[:] = [session.token_sha256] if session.token_sha256 else []
            for old in former:
                draft.group.delete(TOKENS, old)
            if digest is not None:
                draft.group.save(TOKENS, digest, TokenEntry(session_id=session_id), expected=0)
            session.token_sha256 = digest
            draft.tell("token_revoked" if digest is None else "token_rotated")

        await self._change(session_id, work)
        for old in former:
            await self.manager.erase(TOKENS, old)
        return bool(former)

    async def _opened_by(self, token: str) -> StoredSession:
        if not isinstance(token, str) or not 0 < len(token) <= _LONGEST:
            raise UnknownTokenError("that is no token")
        digest = digest_of(token)
        entry = cast("TokenEntry | None", await self.manager.load(TOKENS, digest))
        if entry is None:
            raise UnknownTokenError("the token opens no session")
        try:
            session, _ = await self._stored(entry.session_id)
            # The index may be older than the session, which alone says what opens it.
            if not hmac.compare_digest(session.token_sha256 or "", digest):
                raise UnknownTokenError("the token opens no session")
            check_alive(session, self.clock.now())
        except SessionNotFoundError as error:
            raise UnknownTokenError("the token opens no session") from error
        return session

    def _new_token(self) -> str:
        return urlsafe_b64encode(self._random_bytes(_BYTES)).rstrip(b"=").decode()


def digest_of(token: str) -> str:
    """SHA-256 in hex, all that is kept of a token."""
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
