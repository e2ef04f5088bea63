"""A session as Markdown for a therapist. Nothing that was said can become structure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from agent_state_integrations.journey.escaping import block, code, inline
from agent_state_integrations.journey.reading import average_response, minutes
from agent_state_integrations.journey.source import (
    ExportSource,
    by_confidence,
    moment,
    number,
    percent,
    seconds,
    speaker,
)

_IDS = frozenset({"Session ID", "User ID", "Citation", "Triggered by message"})
_NOTHING = "*None was recorded.*\n\n"


async def render_markdown(source: ExportSource) -> AsyncIterator[str]:
    """The pieces of the export, section by section."""
    yield _heading(source)
    yield _overview(source)
    yield _emotion(source)
    sections = [_trajectory, _milestones, _breakthroughs]
    if source.include_transcript:
        sections.append(_transcript)
    for section in sections:
        async for piece in section(source):
            yield piece
    yield _notes(source)
    yield _statistics(source)
    async for piece in _citations(source):
        yield piece
    yield f"---\n\n*Exported {moment(source.exported_at)}. Confidential.*\n"


def _heading(source: ExportSource) -> str:
    state = source.state
    return "# Conversation Journey\n\n" + _facts(
        [
            ("Session ID", state.session_id),
            ("User ID", state.user_id),
            ("Export Date", moment(source.exported_at)),
            ("Citation", source.citation),
        ]
    )


def _overview(source: ExportSource) -> str:
    state = source.state
    return "## Session Overview\n\n" + _table(
        [
            ("Duration", f"{minutes(state):.1f} minutes"),
            ("Started", moment(state.started_at)),
            ("Last Updated", moment(state.last_updated)),
            ("Status", state.status),
            ("Total Messages", state.counters.messages),
            ("Milestones", state.counters.milestones),
            ("Breakthroughs", state.counters.breakthroughs),
        ]
    )


def _emotion(source: ExportSource) -> str:
    emotion = source.state.emotion
    return "## Current Emotional State\n\n" + _facts(
        [
            ("Emotion", emotion.emotion),
            ("Intensity", f"{emotion.intensity:.2f} of 1"),
            ("Confidence", percent(emotion.confidence)),
            ("Since", moment(emotion.last_change)),
        ]
    )


async def _trajectory(source: ExportSource) -> AsyncIterator[str]:
    yield "## Emotional Trajectory\n\n"
    rows = 0
    async for each in source.emotions():
        if rows == 0:
            yield "| Time | From | To | Intensity | Confidence | Message |\n"
            yield "|---|---|---|---|---|---|\n"
        rows += 1
        yield _row(
            moment(each.get("timestamp")),
            each.get("from_emotion", ""),
            each.get("to_emotion", ""),
            f"{number(each.get('intensity')):.2f}",
            percent(each.get("confidence")),
            each.get("message_id") or "",
        )
    yield "\n" if rows else _NOTHING


async def _milestones(source: ExportSource) -> AsyncIterator[str]:
    yield "## Key Milestones\n\n"
    place = 0
    async for each in source.milestones():
        place += 1
        yield f"### Milestone {place}: {moment(each.get('timestamp'))}\n\n"
        yield block(each.get("description", ""))
        yield _facts(
            [
                ("Emotion", each.get("emotion_state", "")),
                ("Model", each.get("model_id") or ""),
                ("Messages to point", each.get("message_count", 0)),
                ("Citation", each.get("tracking_id", "")),
            ]
        )
    if not place:
        yield _NOTHING


async def _breakthroughs(source: ExportSource) -> AsyncIterator[str]:
    yield "## Breakthroughs\n\n"
    found = await by_confidence(source)
    for place, each in enumerate(found, 1):
        yield f"### Breakthrough {place}: {percent(each.get('confidence'))} confident\n\n"
        yield block(each.get("insight", ""))
        yield _facts(
            [
                ("Time", moment(each.get("timestamp"))),
                ("Category", each.get("therapeutic_category", "")),
                ("Emotion shift", each.get("emotion_shift") or ""),
                ("Citation", each.get("tracking_id", "")),
                ("Triggered by message", each.get("trigger_message_id", "")),
            ]
        )
        yield block(each.get("trigger_excerpt", ""))
    if not found:
        yield _NOTHING


async def _transcript(source: ExportSource) -> AsyncIterator[str]:
    yield f"## Conversation Transcript ({source.state.counters.messages} messages)\n\n"
    async for each in source.messages():
        who = inline(speaker(source, each))
        yield f"**\\[{moment(each.get('timestamp'))}\\] {who}:**\n\n"
        yield block(each.get("content", ""))


def _notes(source: ExportSource) -> str:
    context = source.state.context_snapshot
    pieces = ["## Therapeutic Notes\n\n"]
    for name, text in (
        ("Current Theme", context.current_theme),
        ("Therapeutic Focus", context.therapeutic_focus),
        ("Client State", context.client_state_summary),
        ("Session Notes", context.session_notes),
    ):
        pieces.append(f"### {name}\n\n{block(text) if text else _NOTHING}")
    pieces.append("### Working Hypotheses\n\n")
    hypotheses = [f"- {inline(each)}\n" for each in context.working_hypotheses]
    pieces.append("".join(hypotheses) + "\n" if hypotheses else _NOTHING)
    return "".join(pieces)


def _statistics(source: ExportSource) -> str:
    state, counters = source.state, source.state.counters
    return "## Session Statistics\n\n" + _table(
        [
            ("Duration", f"{minutes(state):.1f} minutes"),
            ("Messages", counters.messages),
            ("Average response time", seconds(average_response(state))),
            ("Emotional state changes", counters.emotion_changes),
            ("Milestones", counters.milestones),
            ("Breakthroughs", counters.breakthroughs),
            ("Tokens", counters.tokens),
            ("Models used", ", ".join(state.models_used)),
        ]
    )


async def _citations(source: ExportSource) -> AsyncIterator[str]:
    yield "## Citations & Traceability\n\n"
    yield f"- {code(source.citation)} (this export)\n"
    async for each in source.citations():
        evidence = ", ".join(code(message.message_id) for message in each.evidence)
        rests = f", rests on {evidence}" if evidence else ""
        yield f"- {code(each.citation_id)} ({inline(each.type)}, {each.status}){rests}\n"
    yield "\n"


def _facts(facts: Iterable[tuple[str, object]]) -> str:
    """Bullets; the value of a name in ``_IDS`` is an id."""
    lines = [
        f"- **{name}:** {code(value) if name in _IDS else inline(value)}\n" for name, value in facts
    ]
    return "".join(lines) + "\n"


def _table(rows: Iterable[tuple[str, object]]) -> str:
    return "| Metric | Value |\n|---|---|\n" + "".join(_row(*row) for row in rows) + "\n"


def _row(*cells: object) -> str:
    return f"| {' | '.join(inline(cell) for cell in cells)} |\n"
