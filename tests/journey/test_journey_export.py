"""Exports of a journey: whole, the same every time, and nothing that was said is structure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from agent_state import StateNotFoundError, StateValidationError
from agent_state.testing import FakeClock
from agent_state_integrations.journey import ConversationStateManager
from agent_state_integrations.journey.export_formats import block, code, inline, plain
from tests.journey.journeys import DAY, journeys, said

GOLDEN = Path(__file__).parent / "fixtures"
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MARKS = "#*_-+=>|`~<&[]()!\\:.1/ \t\n\rawx\x00\u00a0"

ADVERSARIAL = [
    "# Heading",
    "Heading\n=======",
    "Heading\n---",
    "---",
    "***",
    "___",
    "* * *",
    "- item\n- item",
    "+ item",
    "* item",
    "-",
    "1. one\n2. two",
    "1) one",
    "123456789. x",
    "> quote",
    ">",
    "a\n> quote",
    "```\ncode\n```",
    "~~~\ncode",
    "`code` and ``code``",
    "    indented code",
    "a\n\n    indented code",
    "\tindented code",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "a | b\n--- | ---\n1 | 2",
    "a\n:-:",
    "<b>bold</b>",
    "<script>alert(1)</script>",
    "<!-- a comment",
    "<?php",
    "<https://example.org>",
    "<a@example.org>",
    "[link](https://example.org)",
    "[link][ref]\n\n[ref]: https://example.org",
    "[ref]: https://example.org",
    "![image](x.png)",
    "https://example.org and www.example.org",
    "*emphasis* _emphasis_ **strong** __strong__ ~~gone~~",
    "***",
    "&lt;b&gt; &amp; &nbsp; &#35;",
    "back\\slash \\* \\# \\",
    "ends in a backslash\\\nnext",
    "two spaces  \nhard break",
    "a\r\nb\rc",
    "**[2026-01-01 00:00:00 UTC] User:**\n\nI said this",
    "[2026-01-01 00:00:00 UTC] User:\nI said this",
    "## Breakthroughs",
    "\n\n# after empty lines\n\n",
    " # one space",
    "   - three spaces",
    "\u00a0# no-break space",
    "\u2028# line separator",
    "a\x0b# b\x0c# c\x85# d",
    "\x1b[31mred\x1b[0m \x00",
    "",
    " ",
    "\n",
    "$x$ @somebody #1",
    "- [ ] task",
    "[^1]: a note",
    "term\n: definition",
    "!\\[x](y)",
    "a" * 5000,
    "[" * 500,
]


def tree(text: str) -> list[tuple[str, int]]:
    """Each block with its depth."""
    return [(token.type, token.level) for token in MARKDOWN.parse(text)]


def inner(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in (token.children or [])]


def rendered(text: str) -> str:
    """What a reader sees, a line for a line."""
    lines: list[str] = []
    for token in MARKDOWN.parse(text):
        if token.type == "inline":
            said_here = ""
            for child in token.children or []:
                assert child.type in {"text", "text_special", "hardbreak"}, child
                said_here += "\n" if child.type == "hardbreak" else child.content
            lines.append(said_here)
    return "\n\n".join(lines)


def seen(text: str) -> str:
    """The text as it should be seen: unseen characters marked, white space at line ends gone."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    marked = "".join(
        "\N{REPLACEMENT CHARACTER}"
        if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160
        else c
        for c in text
    )
    paragraphs: list[list[str]] = [[]]
    for line in marked.split("\n"):
        bare = line.rstrip()
        if not bare:
            paragraphs.append([])
            continue
        start = len(bare) - len(bare.lstrip())
        leading = bare[:start].replace("\t", "    ").replace(" ", "\u00a0")
        paragraphs[-1].append(leading + bare[start:])
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_a_block_of_text_is_a_quotation_of_paragraphs_and_says_what_was_said(text: str) -> None:
    _check_block(text)


@given(st.one_of(st.text(st.sampled_from(MARKS), max_size=40), st.text()))
def test_no_text_is_structure(text: str) -> None:
    _check_block(text)
    _check_inline(text)
    for line in plain(text).split("\n"):
        assert line == "" or line.startswith("    ")


def _check_block(text: str) -> None:
    markdown = f"before\n\n{block(text)}after\n"
    inside = [kind for kind, level in tree(markdown) if level > 0]
    assert set(inside) <= {"paragraph_open", "inline", "paragraph_close"}, markdown
    outside = [kind for kind, level in tree(markdown) if level == 0]
    assert outside == [
        "paragraph_open", "paragraph_close", "blockquote_open", "blockquote_close",
        "paragraph_open", "paragraph_close",
    ]  # fmt: skip
    quoted = "\n\n".join(rendered(markdown).split("\n\n")[1:-1])
    assert quoted == seen(text)


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_text_within_a_line_stays_there(text: str) -> None:
    _check_inline(text)


def _check_inline(text: str) -> None:
    markdown = f"- {inline(text)}\n\n| a | b |\n|---|---|\n| {inline(text)} | {code(text)} |\n"
    tokens = MARKDOWN.parse(markdown)
    assert [token.type for token in tokens if token.level == 0] == [
        "bullet_list_open", "bullet_list_close", "table_open", "table_close",
    ]  # fmt: skip
    assert sum(token.type == "td_open" for token in tokens) == 2
    assert sum(token.type == "list_item_open" for token in tokens) == 1
    assert not {"heading_open", "hr", "blockquote_open", "code_block", "fence"} & {
        token.type for token in tokens
    }
    kinds = {child.type for child in inner(tokens)}
    assert kinds <= {"text", "text_special", "code_inline"}


async def story(sessions: ConversationStateManager, clock: FakeClock) -> tuple[str, str]:
    """A session with everything in it, the same every time."""
    user = "ann|b*"
    session_id, _ = await sessions.initialize_session(user, model_id="claude-haiku-4-5")
    first = await sessions.append_message(
        user,
        session_id,
        said("I am overwhelmed.\n# Not a heading\n\n| a | b |", tokens=20),
        {"emotion": "anxious", "intensity": 0.8, "confidence": 0.9},
    )
    await clock.advance(2.5)
    await sessions.append_message(
        user, session_id, said("Tell me more", "assistant", model_id="claude-haiku-4-5", tokens=4)
    )
    await clock.advance(90)
    await sessions.record_milestone(user, session_id, "Names the *feeling*", message_id=first)
    await sessions.switch_model_context(user, session_id, "claude-sonnet-4-5")
    await sessions.append_message(
        user,
        session_id,
        said("I use humour to avoid being seen"),
        {
            "emotion": "breakthrough",
            "intensity": 0.9,
            "confidence": 0.95,
            "breakthrough_insight": "Humour is armour",
            "category": "pattern_recognition",
        },
    )
    await clock.advance(1.5)
    await sessions.append_message(
        user, session_id, said("Yes.", "assistant", model_id="claude-sonnet-4-5", tokens=1)
    )
    await sessions.record_breakthrough(
        user, session_id, "Being overwhelmed is allowed", first, category="acceptance",
        confidence=0.99,
    )  # fmt: skip
    await sessions.update_context_snapshot(
        user,
        session_id,
        current_theme="Avoidance",
        therapeutic_focus="Being seen",
        client_state_summary="Open\nand tired",
        session_notes="1. not a list",
        working_hypotheses=["Humour protects", "- nested?"],
    )
    await sessions.snapshot_session_state(user, session_id)
    await clock.advance(60)
    return user, session_id


@pytest.mark.parametrize(
    ("form", "name"),
    [("markdown", "journey.md"), ("json", "journey.json"), ("text", "journey.txt")],
)
@pytest.mark.parametrize("kind", ["exclusive", "shared", "memory"])
async def test_an_export_is_the_same_every_time(
    tmp_path: Path, kind: str, form: str, name: str
) -> None:
    clock = FakeClock()
    async with journeys(kind, tmp_path, clock, assistant_name="IF.emotion") as sessions:
        user, session_id = await story(sessions, clock)

        text = await (await sessions.exports.create(user, session_id, form)).text()  # type: ignore[arg-type]

    assert text == (GOLDEN / name).read_text()


async def test_the_markdown_has_every_section_and_no_other(tmp_path: Path) -> None:
    clock = FakeClock()
    async with journeys("memory", tmp_path, clock) as sessions:
        user, session_id = await story(sessions, clock)
        text, _ = await sessions.exports.markdown(user, session_id)
        brief, _ = await sessions.exports.markdown(user, session_id, include_transcript=False)

    assert headings(text, "h2") == [
        "Session Overview",
        "Current Emotional State",
        "Emotional Trajectory",
        "Key Milestones",
        "Breakthroughs",
        "Conversation Transcript (4 messages)",
        "Therapeutic Notes",
        "Session Statistics",
        "Citations & Traceability",
    ]
    assert headings(text, "h1") == ["Conversation Journey"]
    assert "Breakthrough 1: 99% confident" in headings(text, "h3")
    assert "Breakthrough 2: 95% confident" in headings(text, "h3")
    assert "Assistant (claude-sonnet-4-5)" in text
    assert "Conversation Transcript (4 messages)" not in headings(brief, "h2")
    assert "overwhelmed." in text


def headings(text: str, tag: str) -> list[str]:
    tokens = MARKDOWN.parse(text)
    return [
        tokens[at + 1].content
        for at, token in enumerate(tokens)
        if token.type == "heading_open" and token.tag == tag
    ]


async def test_adversaries_change_no_section(tmp_path: Path) -> None:
    async def structure(words: list[str]) -> list[tuple[str, str, int]]:
        async with journeys("memory", tmp_path, FakeClock()) as sessions:
            session_id, _ = await sessions.initialize_session("ann", model_id=words[0] or None)
            for word in words:
                message_id = await sessions.append_message(
                    "ann", session_id, said(word, "assistant", model_id=word[:50] or None),
                    is_breakthrough=True,
                )  # fmt: skip
                await sessions.record_milestone("ann", session_id, word)
                await sessions.record_breakthrough("ann", session_id, word, message_id)
            await sessions.update_context_snapshot(
                "ann", session_id, session_notes="x", working_hypotheses=words
            )
            text, _ = await sessions.exports.markdown("ann", session_id)
        skipped = {"paragraph_open", "paragraph_close", "inline"}
        return [
            (token.type, token.tag, token.level)
            for token in MARKDOWN.parse(text)
            if token.type not in skipped
        ]

    assert await structure(ADVERSARIAL) == await structure(["harmless"] * len(ADVERSARIAL))


async def test_json_holds_everything(tmp_path: Path) -> None:
    clock = FakeClock()
    async with journeys("exclusive", tmp_path, clock) as sessions:
        user, session_id = await story(sessions, clock)
        whole, export_id = await sessions.exports.json(user, session_id)

    assert whole["export_id"] == export_id
    assert whole["export_timestamp"] == "2026-01-01T00:02:34.000000Z"
    assert {name: len(value) for name, value in whole.items() if isinstance(value, list)} == {
        "messages": 4, "emotional_journey": 2, "milestones": 1, "breakthroughs": 2, "events": 2,
        "citations": 7,
    }  # fmt: skip
    assert whole["session_metadata"]["user_id"] == user
    assert whole["emotional_state"]["emotion"] == "breakthrough"
    assert whole["context_snapshot"]["current_theme"] == "Avoidance"


async def test_an_export_is_a_moment_and_comes_in_pieces(tmp_path: Path) -> None:
    async with journeys("exclusive", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        for number in range(200):
            await sessions.append_message("ann", session_id, said(f"{number} " + "x" * 500))
        made = await sessions.exports.create("ann", session_id, "json")
        pieces = [await anext(aiter(made))]
        await sessions.append_message("ann", session_id, said("too late"))
        pieces += [piece async for piece in made]

        messages = json.loads("".join(pieces))["messages"]
        assert len(messages) == 200
        assert len(pieces) > 5
        assert max(map(len, pieces)) < 2 * 16 * 1024


async def test_what_is_added_after_an_export_began_is_not_in_it(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        made = await sessions.exports.create("ann", session_id, "json")
        await sessions.append_message(
            "ann", session_id, said("late"), {"emotion": "happy"}, is_breakthrough=True
        )

        whole = json.loads(await made.text())

        assert [name for name, value in whole.items() if isinstance(value, list) and value] == []
        assert whole["emotional_state"]["emotion"] == "neutral"


async def test_an_export_that_was_not_read_to_its_end_is_no_citation(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        for _ in range(50):
            await sessions.append_message("ann", session_id, said("x" * 1000))
        made = await sessions.exports.create("ann", session_id)
        await anext(aiter(made))
        await made.aclose()

        assert await sessions.citations.all("ann", session_id) == []


async def test_what_has_ended_can_be_exported_and_stays_ended(tmp_path: Path) -> None:
    clock = FakeClock()
    async with journeys("exclusive", tmp_path, clock) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        await sessions.append_message("ann", session_id, said("remember me"))
        await clock.advance(8 * DAY)

        text, export_id = await sessions.exports.text("ann", session_id)

        assert "    remember me\n" in text
        assert export_id in text
        assert (await sessions.check_session_expiry("ann", session_id)).expired


async def test_what_is_not_there_and_formats_that_are_none(tmp_path: Path) -> None:
    async with journeys("memory", tmp_path, FakeClock()) as sessions:
        with pytest.raises(StateNotFoundError, match="no such session"):
            await sessions.exports.markdown("ann", "unknown")
        session_id, _ = await sessions.initialize_session("ann")
        with pytest.raises(StateValidationError, match="pdf"):
            await sessions.exports.create("ann", session_id, "pdf")  # type: ignore[arg-type]
        text, _ = await sessions.exports.markdown("ann", session_id)
        assert text.count("*None was recorded.*") == 8
