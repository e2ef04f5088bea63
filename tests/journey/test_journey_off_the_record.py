"""A session off the record is in memory alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state import StateNotFoundError
from agent_state.errors import OffTheRecordError
from agent_state.testing import FakeClock
from tests.journey.journeys import DAY, journeys, said


@pytest.mark.parametrize("kind", ["exclusive", "shared"])
async def test_it_works_and_is_nowhere(tmp_path: Path, kind: str) -> None:
    clock = FakeClock()
    async with journeys(kind, tmp_path / "state", clock, snapshot_every=1) as sessions:
        recorded, _ = await sessions.initialize_session("ann")
        await sessions.append_message("ann", recorded, said("on the record"))
        session_id, _ = await sessions.initialize_session("ann", off_the_record=True)
        message_id = ""
        for _ in range(2):
            message_id = await sessions.append_message(
                "ann",
                session_id,
                said("between us", message_id="mine"),
                {"emotion": "anxious", "breakthrough_insight": "between us too"},
            )
        await sessions.record_milestone("ann", session_id, "between us three")
        await sessions.record_breakthrough("ann", session_id, "between us four", message_id)
        await sessions.update_context_snapshot("ann", session_id, session_notes="between us five")

        resumed = await sessions.resume_session("ann", session_id)
        assert [each.content for each in resumed.recent_messages] == ["between us"]
        assert resumed.session_metadata.off_the_record
        assert resumed.emotional_state.emotion == "anxious"
        assert len(await sessions.get_user_sessions("ann")) == 2
        for form in ("markdown", "json", "text"):
            with pytest.raises(OffTheRecordError):
                await sessions.exports.create("ann", session_id, form)
        await sessions.manager.flush()

    held = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert any(b"on the record" in path.read_bytes() for path in held)
    for path in held:
        assert b"between us" not in path.read_bytes()
        assert session_id not in path.name
        assert session_id.encode() not in path.read_bytes()


async def test_it_expires_and_is_erased_as_others_are(tmp_path: Path) -> None:
    clock = FakeClock()
    async with journeys("memory", tmp_path, clock) as sessions:
        first, _ = await sessions.initialize_session("ann", off_the_record=True)
        second, _ = await sessions.initialize_session("ann", off_the_record=True)
        assert await sessions.erase_session("ann", first)
        with pytest.raises(StateNotFoundError):
            await sessions.append_message("ann", first, said("hi"))
        await clock.advance(7 * DAY)
        assert await sessions.cleanup_expired_sessions() == 1
        with pytest.raises(StateNotFoundError):
            await sessions.get_session("ann", second)
