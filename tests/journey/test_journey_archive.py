"""Snapshots in a vector store: the protocol by a store in memory, and by ChromaDB where it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from agent_state.testing import FakeClock
from agent_state_integrations.journey.snapshot_archive import (
    ArchivedSnapshot,
    SnapshotArchive,
    archive_snapshots,
)
from tests.journey.journeys import journeys, said

WORDS = 64


def embed(texts: Sequence[str]) -> list[list[float]]:
    """A bag of words: texts that share words are near."""
    vectors = []
    for text in texts:
        vector = [0.01] * WORDS
        for word in text.lower().split():
            vector[sha256(word.encode()).digest()[0] % WORDS] += 1
        vectors.append(vector)
    return vectors


class _Memory:
    """What the protocol asks for, in a few lines: anything with vectors will do."""

    def __init__(self, _folder: Path) -> None:
        self._held: dict[str, ArchivedSnapshot] = {}

    async def missing(self, archive_ids: Sequence[str]) -> set[str]:
        return set(archive_ids) - self._held.keys()

    async def add(self, snapshots: Sequence[ArchivedSnapshot]) -> None:
        self._held.update({each.archive_id: each for each in snapshots})

    async def search(self, user_id: str, text: str, *, limit: int = 5) -> list[ArchivedSnapshot]:
        [wanted] = embed([text])
        mine = [each for each in self._held.values() if each.user_id == user_id]

        def distance(each: ArchivedSnapshot) -> float:
            return sum((a - b) ** 2 for a, b in zip(embed([each.text])[0], wanted, strict=True))

        return sorted(mine, key=distance)[:limit]

    async def sessions(self, user_id: str | None = None) -> set[tuple[str, str]]:
        found = {(each.user_id, each.session_id) for each in self._held.values()}
        return {each for each in found if user_id in (None, each[0])}

    async def erase(self, user_id: str, session_id: str) -> None:
        for archive_id, each in list(self._held.items()):
            if (each.user_id, each.session_id) == (user_id, session_id):
                del self._held[archive_id]


def _chroma(folder: Path) -> SnapshotArchive:
    from agent_state_integrations.journey.chroma_archive import ChromaSnapshotArchive

    return ChromaSnapshotArchive(folder / "chroma", embed)


CHROMA = pytest.param(
    _chroma,
    id="chroma",
    marks=[
        pytest.mark.long("imports ChromaDB, which takes seconds"),
        pytest.mark.skipif(
            importlib.util.find_spec("chromadb") is None,
            reason="the extra chroma is not installed: pip install -e '.[chroma]'",
        ),
        pytest.mark.filterwarnings("ignore"),  # of ChromaDB and what it imports
    ],
)


@pytest.mark.parametrize("make", [pytest.param(_Memory, id="memory"), CHROMA])
async def test_snapshots_are_found_by_what_they_are_about(
    tmp_path: Path, make: Callable[[Path], SnapshotArchive]
) -> None:
    clock = FakeClock()
    async with journeys("exclusive", tmp_path / "state", clock) as sessions:
        ids: dict[str, Any] = {}
        for user, themes in {"ann": ["fear of flying", "work and rest"], "bob": ["flying"]}.items():
            session_id, _ = await sessions.initialize_session(user)
            ids[user] = session_id
            for theme in themes:
                await sessions.append_message(user, session_id, said("x"), {"emotion": "anxious"})
                await sessions.update_context_snapshot(user, session_id, theme)
                await sessions.snapshot_session_state(user, session_id)
                await clock.advance(60)
        secret, _ = await sessions.initialize_session("ann", off_the_record=True)
        await sessions.snapshot_session_state("ann", secret)
        archive = make(tmp_path)

        assert await archive_snapshots(sessions.manager, archive, "bob") == 1
        assert await archive_snapshots(sessions.manager, archive) == 2
        assert await archive_snapshots(sessions.manager, archive) == 0  # each once
        found = await archive.search("ann", "flying")
        [nearest] = await archive.search("ann", "rest and work", limit=1)
        events = await sessions.get_events("ann", ids["ann"])

        assert [each.text for each in found] == ["fear of flying", "work and rest"]
        assert nearest.archive_id == events[-1]["tracking_id"]
        assert (nearest.user_id, nearest.session_id) == ("ann", ids["ann"])
        assert (nearest.emotion, nearest.timestamp) == ("anxious", "2026-01-01T00:01:00.000000Z")
        assert await archive.sessions() == {("ann", ids["ann"]), ("bob", ids["bob"])}
        assert await archive.sessions("bob") == {("bob", ids["bob"])}
        await archive.erase("ann", "nothing")
        assert await sessions.erase_session("ann", ids["ann"])
        assert await archive_snapshots(sessions.manager, archive, "bob") == 0
        assert len(await archive.search("ann", "flying")) == 2  # another one's call
        assert await archive_snapshots(sessions.manager, archive) == 0
        assert await archive.search("ann", "flying") == []
        assert len(await archive.search("bob", "flying")) == 1
        again = make(tmp_path) if make is _chroma else archive
        assert len(await again.search("bob", "flying")) == 1


async def test_many_snapshots_are_archived_in_batches(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        for _ in range(205):
            await sessions.snapshot_session_state("ann", session_id)
        archive = _Memory(tmp_path)

        assert await archive_snapshots(sessions.manager, archive) == 205
        assert await archive_snapshots(sessions.manager, archive) == 0
