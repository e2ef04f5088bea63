"""Citations: kept with what they rest on, and checked against what is stored now."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state import StateNotFoundError, StateValidationError
from agent_state.testing import FakeClock
from agent_state_integrations.journey import ConversationStateManager
from tests.journey.journeys import journeys, said


async def _filled(sessions: ConversationStateManager) -> tuple[str, str]:
    session_id, _ = await sessions.initialize_session("ann")
    message_id = await sessions.append_message(
        "ann", session_id, said("I see"), {"emotion": "happy"}, is_breakthrough=True
    )
    await sessions.record_milestone("ann", session_id, "seen", message_id=message_id)
    await sessions.switch_model_context("ann", session_id, "m2")
    await sessions.snapshot_session_state("ann", session_id)
    await sessions.citations.generate("ann", session_id, "note", {"page": 7}, evidence=[message_id])
    return session_id, message_id


async def test_everything_that_is_cited_is_kept_and_intact(
    tmp_path: Path,
) -> None:
    async with journeys("exclusive", tmp_path, FakeClock()) as sessions:
        session_id, message_id = await _filled(sessions)

        citations = await sessions.citations.all("ann", session_id)

        assert [each.type for each in citations] == [
            "emotion", "breakthrough", "milestone", "model_switch", "archive", "note",
        ]  # fmt: skip
        for each in citations:
            check = await sessions.citations.verify("ann", session_id, each.citation_id)
            assert (check.intact, check.status, check.changed) == (True, "verified", [])
            assert each.citation_id.startswith(("if://citation/", f"if://archive/{session_id}/"))
        resting = [each.type for each in citations if each.evidence]
        assert resting == ["emotion", "breakthrough", "milestone", "note"]
        assert {e.message_id for each in citations for e in each.evidence} == {message_id}


async def test_what_a_person_changed_is_found(tmp_path: Path) -> None:
    async with journeys("shared", tmp_path, FakeClock()) as sessions:
        session_id, message_id = await _filled(sessions)
        folder = tmp_path / "journeys" / "ann" / session_id
        by_type = {
            each.type: each.citation_id for each in await sessions.citations.all("ann", session_id)
        }

        async def changed(kind: str) -> list[str]:
            check = await sessions.citations.verify("ann", session_id, by_type[kind])
            assert check.intact is (not check.changed)
            assert check.status == ("verified" if check.intact else "disputed")
            return check.changed

        log = folder / "breakthroughs.jsonl"
        log.write_text(log.read_text().replace('"confidence":0.7', '"confidence":0.99'))
        assert await changed("breakthrough") == [by_type["breakthrough"]]
        assert await changed("milestone") == []

        log = folder / "messages.jsonl"
        log.write_text(log.read_text().replace("I see", "I saw"))
        assert await changed("milestone") == [message_id]
        assert await changed("note") == [message_id]
        assert await changed("model_switch") == []

        (folder / "events.jsonl").unlink()
        assert await changed("archive") == [by_type["archive"]]


async def test_a_citation_is_disputed_and_revoked(tmp_path: Path) -> None:
    clock = FakeClock()
    async with journeys("exclusive", tmp_path, clock) as sessions:
        session_id, _ = await _filled(sessions)
        note = (await sessions.citations.all("ann", session_id))[-1].citation_id

        await sessions.citations.set_status("ann", session_id, note, "disputed", reason="typo")
        await sessions.close_session("ann", session_id)
        await clock.advance(8 * 86400)
        await sessions.citations.set_status("ann", session_id, note, "revoked")

        check = await sessions.citations.verify("ann", session_id, note)
        assert (check.status, check.intact) == ("revoked", True)
        assert len(await sessions.citations.all("ann", session_id)) == 6
        with pytest.raises(StateValidationError):
            await sessions.citations.set_status("ann", session_id, note, "perhaps")  # type: ignore[arg-type]
        with pytest.raises(StateNotFoundError, match="no citation"):
            await sessions.citations.verify("ann", session_id, "if://citation/none")
        assert (await sessions.check_session_expiry("ann", session_id)).expired


async def test_evidence_must_be_there(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        with pytest.raises(StateNotFoundError):
            await sessions.citations.generate("ann", session_id, "note", {}, evidence=["nobody"])
        with pytest.raises(StateValidationError):
            await sessions.citations.generate("ann", session_id, "status", {})


async def test_an_export_is_known_by_its_text(tmp_path: Path) -> None:
    async with journeys("exclusive", tmp_path, FakeClock()) as sessions:
        session_id, _ = await _filled(sessions)
        made = await sessions.exports.create("ann", session_id)
        text = await made.text()

        same = await sessions.citations.verify("ann", session_id, made.citation, content=text)
        other = await sessions.citations.verify(
            "ann", session_id, made.citation, content=text + "and he is cured\n"
        )

        assert made.citation == f"if://export/{session_id}/{made.export_id}"
        assert (same.intact, other.intact) == (True, False)
        with pytest.raises(StateValidationError, match="content"):
            await sessions.citations.verify("ann", session_id, made.citation)


async def test_a_revoked_citation_stays_revoked_whatever_changes(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await _filled(sessions)
        export = await sessions.exports.create("ann", session_id, "text")
        await export.text()
        changed = await sessions.citations.verify("ann", session_id, export.citation, content="x")
        assert (changed.intact, changed.status) == (False, "disputed")

        await sessions.citations.set_status("ann", session_id, export.citation, "revoked")
        changed = await sessions.citations.verify("ann", session_id, export.citation, content="x")
        assert (changed.intact, changed.status) == (False, "revoked")
