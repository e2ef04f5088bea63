"""``SnapshotArchive`` in ChromaDB, embedded: a folder of files, without a server.

The texts are embedded by a function of the application, such as a call of its model's embeddings:
Chroma's own default would download a model at the first call. Nothing is sent elsewhere; Chroma's
telemetry is switched off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from typing import Any, TypeVar, cast

from agent_state.errors import needs_extra
from agent_state_integrations.journey.snapshot_archive import ArchivedSnapshot

with needs_extra("chroma", "chromadb"):
    import chromadb
    from chromadb.config import Settings

T = TypeVar("T")

Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""The vectors of texts, all of one length. It is called in a thread."""

COLLECTION = "context_archive"
_PAGE = 1000


class ChromaSnapshotArchive:
    """Snapshots in the collection ``context_archive`` of a Chroma database in ``folder``.

    ``embed``: see ``Embed``; the same function for as long as the folder lives.
    """

    def __init__(self, folder: str | PathLike[str], embed: Embed) -> None:
        self._folder = fspath(folder)
        self._embed = embed
        self._collection: Any = None
        self._working = asyncio.Lock()

    async def missing(self, archive_ids: Sequence[str]) -> set[str]:
        def work(collection: Any) -> set[str]:
            found = collection.get(ids=list(archive_ids), include=[])
            return set(archive_ids) - set(found["ids"])

        return await self._run(work)

    async def add(self, snapshots: Sequence[ArchivedSnapshot]) -> None:
        def work(collection: Any) -> None:
            collection.upsert(
                ids=[each.archive_id for each in snapshots],
                embeddings=self._vectors([each.text for each in snapshots]),
                documents=[each.text for each in snapshots],
                metadatas=[
                    {
                        "user_id": each.user_id,
                        "session_id": each.session_id,
                        "timestamp": each.timestamp,
                        "emotion": each.emotion,
                    }
                    for each in snapshots
                ],
            )

        await self._run(work)

    async def search(self, user_id: str, text: str, *, limit: int = 5) -> list[ArchivedSnapshot]:
        def work(collection: Any) -> list[ArchivedSnapshot]:
            found = collection.query(
                query_embeddings=self._vectors([text]),
                where={"user_id": user_id},
                n_results=limit,
                include=["documents", "metadatas"],
            )
            rows = zip(found["ids"][0], found["metadatas"][0], found["documents"][0], strict=True)
            return [
                ArchivedSnapshot(archive_id, text=document, **cast("dict[str, str]", facts))
                for archive_id, facts, document in rows
            ]

        return await self._run(work)

    async def sessions(self, user_id: str | None = None) -> set[tuple[str, str]]:
        def work(collection: Any) -> set[tuple[str, str]]:
            where = None if user_id is None else {"user_id": user_id}
            sessions: set[tuple[str, str]] = set()
            start = 0
            while facts := collection.get(
                where=where, limit=_PAGE, offset=start, include=["metadatas"]
            )["metadatas"]:
                sessions.update((each["user_id"], each["session_id"]) for each in facts)
                start += len(facts)
            return sessions

        return await self._run(work)

    async def erase(self, user_id: str, session_id: str) -> None:
        def work(collection: Any) -> None:
            where = {"$and": [{"user_id": user_id}, {"session_id": session_id}]}
            collection.delete(where=where)

        await self._run(work)

    def _vectors(self, texts: Sequence[str]) -> list[list[float]]:
        return [[float(number) for number in vector] for vector in self._embed(texts)]

    async def _run(self, work: Callable[[Any], T]) -> T:
        """Do the work in a thread; one at a time, as Chroma's client is one connection."""

        def open_and_work() -> T:
            if self._collection is None:
                settings = Settings(anonymized_telemetry=False)
                client = chromadb.PersistentClient(path=self._folder, settings=settings)
                self._collection = client.get_or_create_collection(
                    COLLECTION, embedding_function=None
                )
            return work(self._collection)

        async with self._working:
            return await asyncio.to_thread(open_and_work)
