"""The export as PDF: every word is in it, and nothing that was said is a heading."""

from __future__ import annotations

import io
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pypdf
import pytest

from agent_state import MemoryStateStore, MissingExtraError, StatePersistenceManager
from agent_state import StateValidationError as Invalid
from agent_state.errors import OffTheRecordError
from agent_state.testing import FakeClock
from agent_state.web import LiveBackend
from agent_state_integrations.journey import ConversationStateManager
from agent_state_integrations.journey import pdf as pdf_module
from agent_state_integrations.journey.pdf import find_font, render_pdf
from tests.journey.journeys import journeys, said
from tests.journey.test_journey_export import story
from tests.web.client import answering

WORDS = "Zażółć gęślą jaźń, Ελληνικά, Кириллица"


def text_of(data: bytes) -> str:
    return "\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages)


def headings(data: bytes) -> list[str]:
    return [str(each.title) for each in pypdf.PdfReader(io.BytesIO(data)).outline]  # type: ignore[union-attr]


async def test_a_pdf_has_what_the_text_has(tmp_path: Path) -> None:
    clock = FakeClock()
    async with journeys("memory", tmp_path, clock) as sessions:
        user, session_id = await story(sessions, clock)
        data, export_id = await sessions.exports.pdf(user, session_id)
        brief, _ = await sessions.exports.pdf(user, session_id, include_transcript=False)
        check = await sessions.citations.verify(
            user, session_id, f"if://export/{session_id}/{export_id}", content=data
        )
        forged = await sessions.citations.verify(
            user, session_id, f"if://export/{session_id}/{export_id}", content=data + b" "
        )

    assert (check.intact, forged.intact) == (True, False)
    assert check.citation.content_hash == sha256(data).hexdigest()
    found = text_of(data)
    for words in (
        "I use humour to avoid being seen",
        "Tell me more",
        "# Not a heading",
        session_id,
    ):
        assert words in found
    assert headings(data) == [
        "Emotional trajectory",
        "Milestones",
        "Breakthroughs",
        "Conversation transcript (4 messages)",
        "Therapeutic notes",
        "Citations",
    ]
    assert "Tell me more" not in text_of(brief)


async def test_messages_that_are_referred_to_are_links_to_their_page(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        for number in range(120):
            update = {"emotion": "happy"} if number == 100 else None
            await sessions.append_message("ann", session_id, said(f"words {number}"), update)
        data, _ = await sessions.exports.pdf("ann", session_id)

    reader = pypdf.PdfReader(io.BytesIO(data))
    link, *_ = [each.get_object() for page in reader.pages for each in page.get("/Annots", ())]
    target = reader.get_page_number(link["/Dest"][0].get_object())
    assert target is not None
    assert "words 100" in reader.pages[target].extract_text()


@pytest.mark.skipif(find_font() is None, reason="no font with the world's letters here")
async def test_letters_of_the_world_are_printed_and_what_has_no_glyph_is_named() -> None:
    data = render_pdf(f"Title\n=====\n\n    {WORDS} \U0001fae0 \u0b95", FakeClock().now())

    found = " ".join(text_of(data).split())
    assert WORDS in found
    assert "[U+1FAE0] [U+0B95]" in found


def test_without_a_font_no_letter_is_lost_without_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pdf_module, "_FOLDERS", ())

    found = " ".join(text_of(render_pdf("    Zażółć é", FakeClock().now())).split())

    assert found == "Za[U+017C]ó[U+0142][U+0107] é"


def test_the_same_export_is_the_same_bytes() -> None:
    texts = [
        "Title\n=====\n\nHeading\n-------\n\n    said\n    -----\n",
        "",
        "\n" * 300,
        "x" * 5000,
    ]
    for text in texts:
        assert render_pdf(text, FakeClock().now()) == render_pdf(text, FakeClock().now())


@pytest.mark.parametrize("said_there", ["Notes\n-----", "===\n---", "1. [x] (y):", "message 7 (z)"])
async def test_nothing_that_was_said_is_a_heading(tmp_path: Path, said_there: str) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        await sessions.append_message("ann", session_id, said("words"))
        before, _ = await sessions.exports.pdf("ann", session_id)
        await sessions.append_message("ann", session_id, said(said_there))
        after, _ = await sessions.exports.pdf("ann", session_id)

    assert len(headings(after)) == len(headings(before))
    reader = pypdf.PdfReader(io.BytesIO(after))
    assert not any(page.get("/Annots") for page in reader.pages)


async def test_what_cannot_be_exported_as_pdf_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        secret, _ = await sessions.initialize_session("ann", off_the_record=True)
        with pytest.raises(OffTheRecordError):
            await sessions.exports.pdf("ann", secret)
        for wrong in (tmp_path / "none.ttf", Path(__file__)):
            with pytest.raises(Invalid, match="no font"):
                await sessions.exports.pdf("ann", session_id, font=wrong)
        with pytest.raises(Invalid, match=r"pdf\(\)"):
            await sessions.exports.create("ann", session_id, "pdf")  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, "fpdf", None)
        monkeypatch.delitem(sys.modules, pdf_module.__name__)
        with pytest.raises(MissingExtraError, match="pdf"):
            await sessions.exports.pdf("ann", session_id)


async def test_a_pdf_over_http() -> None:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        backend: Any = LiveBackend(manager=manager)
        sessions = ConversationStateManager(manager)
        session_id, _ = await sessions.initialize_session("ann")
        await sessions.append_message("ann", session_id, said("words over HTTP"))
        async with answering(backend) as client:
            path = f"/api/journeys/ann/{session_id}/export"
            got = await client.get(path, params={"format": "pdf"})
            short = await client.get(path, params={"format": "txt"})

    assert (got.status_code, got.headers["content-type"]) == (200, "application/pdf")
    assert got.headers["content-disposition"].endswith('.pdf"')
    assert "words over HTTP" in text_of(got.content)
    assert "words over HTTP" in short.text
