"""Figures over journeys."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state.metrics import to_prometheus
from agent_state.testing import FakeClock
from tests.journey.journeys import DAY, STORES, journeys, said


@pytest.mark.parametrize("kind", STORES)
async def test_the_figures_are_the_sums_over_the_sessions(tmp_path: Path, kind: str) -> None:
    clock = FakeClock()
    async with journeys(kind, tmp_path, clock, ttl_seconds=2 * DAY) as sessions:
        old, _ = await sessions.initialize_session("ann")
        await sessions.append_message("ann", old, said("once", tokens=3))
        await clock.advance(3 * DAY)
        for user in ("ann", "bob", "cleo"):
            sid, _ = await sessions.initialize_session(user, off_the_record=user == "cleo")
            await sessions.append_message(user, sid, said("hi", tokens=5), {"emotion": "anxious"})
            await clock.advance(30)
            await sessions.append_message(user, sid, said("ho", "assistant", tokens=7))
            await sessions.record_milestone(user, sid, "first")
        [bobs] = await sessions.get_user_sessions("bob")
        await sessions.close_session("bob", bobs.session_id)

        everyone = await sessions.statistics()
        ann = await sessions.statistics("ann")

    assert dict(everyone.sessions) == {"active": 2, "closed": 1, "expired": 1}
    assert dict(everyone.emotions) == {"anxious": 2}
    assert everyone.totals["messages"] == 7
    assert everyone.totals["tokens"] == 3 + 3 * 12
    assert (everyone.totals["milestones"], everyone.totals["emotion_changes"]) == (3, 3)
    assert everyone.average_response_seconds == 30
    assert everyone.minutes == pytest.approx(0.5 + 1 + 0.5)  # closing is a write, too
    assert dict(ann.sessions) == {"active": 1, "expired": 1}
    page = to_prometheus(everyone.metrics())
    assert 'agent_state_journeys{status="closed"} 1' in page
    assert "agent_state_journeys_response_seconds 30" in page


async def test_without_a_session_there_are_no_averages(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        nothing = await sessions.statistics()

    assert (nothing.average_minutes, nothing.average_response_seconds) == (None, None)
    assert to_prometheus(nothing.metrics())
