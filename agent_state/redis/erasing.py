"""Erasing: a document, its log and all below them, with what is remembered and put aside of them.

Called under the lock of the place, which the script compares: whoever lost it erases nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from redis.exceptions import ResponseError

from agent_state.errors import Key, LeaseLostError
from agent_state.redis.client import FAILURES
from agent_state.redis.keys import Names
from agent_state.redis.link import Argument, Lane, Link, call
from agent_state.redis.reading import Member, members
from agent_state.redis.scripts import ERASE

_AT_ONCE = 200
_SCANNED = 1000


@dataclass(frozen=True, slots=True)
class Erasing:
    """One erasure. ``place`` and ``held``: the name of its lock, and the lock's value."""

    link: Link
    lane: Lane
    names: Names
    writer: str
    kind: str
    key: Key
    text: str
    place: str
    held: str

    async def run(self) -> tuple[list[Key], int]:
        """The keys of the documents that there were, and how many logs.

        Raises ``LeaseLostError``, ``StorageError``.
        """
        documents = await self._there(self.names.index(self.kind))
        logs = await self._there(self.names.logs(self.kind))
        for start in range(0, len(documents), _AT_ONCE):
            texts = [member.text for member in documents[start : start + _AT_ONCE]]
            await self._remove([self.names.document(self.kind, text) for text in texts], texts)
        for start in range(0, len(logs), _AT_ONCE):
            texts = [member.text for member in logs[start : start + _AT_ONCE]]
            keys = [self.names.log(self.kind, text) for text in texts]
            keys += [self.names.dedupe(self.kind, text) for text in texts]
            await self._remove(keys, (), texts)
        await self._remove_rest()
        return [member.key for member in documents], len(logs)

    async def _there(self, index: str) -> list[Member]:
        """The key itself and what is below it."""
        found = [member async for page in members(self.lane, index, self.key) for member in page]
        if await self.lane.run("ZSCORE", index, self.text) is not None:
            found.append(Member(self.text, self.key))
        return found

    async def _remove(
        self, keys: Sequence[str], documents: Sequence[str], logs: Sequence[str] = ()
    ) -> None:
        names = self.names
        shared = [names.locks, names.index(self.kind), names.logs(self.kind), names.notices]
        about: list[Argument] = [self.place, self.held, self.writer, self.kind, len(documents)]
        command = call(ERASE, [*shared, *keys], [*about, *documents, *logs])
        if not await self.lane.run(*command, doing="erasing"):
            raise LeaseLostError("the lock has expired", kind=self.kind, key=self.key)

    async def _remove_rest(self) -> None:
        """Revisions of what was deleted, and what was put aside: listed nowhere, so all is seen."""
        pattern = f"{_literally(self.names.tag)}:*:{self.kind}:*{_literally(self.text)}*"
        cursor = 0
        while True:
            try:
                cursor, page = await self.link.client.execute_command(
                    *("SCAN", cursor, "MATCH", pattern, "COUNT", _SCANNED),
                    **await self.link.node(),
                )
            except (*FAILURES, ResponseError) as error:
                raise self.link.error(error, "erasing") from error
            if isinstance(cursor, dict):
                [cursor] = cursor.values()  # a cluster's client says of which node it is
            rest = [name.decode() for name in page if self._is_part(name.decode(errors="replace"))]
            if rest:
                await self._remove(rest, ())
            if not int(cursor):
                return

    def _is_part(self, name: str) -> bool:
        text = self.names.text_in(name, self.kind)
        return text is not None and (text == self.text or text.startswith(f"{self.text}/"))


def _literally(text: str) -> str:
    """The text as a part of a pattern that stands for itself."""
    return re.sub(r"([*?\[\]\\^-])", r"\\\1", text)
