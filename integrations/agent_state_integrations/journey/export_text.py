"""A session as plain text. What was said is indented, and can look like nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from agent_state_integrations.journey.escaping import plain, plain_line
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


async def render_text(source: ExportSource) -> AsyncIterator[str]:
    """The pieces of the export, section by section."""
    yield _head(source)
    async for piece in _journey(source):
        yield piece
    if source.include_transcript:
        yield _title(f"Conversation transcript ({source.state.counters.messages} messages)")
        async for each in source.messages():
            who = plain_line(speaker(source, each))
            yield f"[{moment(each.get('timestamp'))}] {who}:\n{plain(each.get('content', ''))}\n"
    yield _notes(source)
    yield _title("Citations")
    yield f"{plain_line(source.citation)} (this export)\n"
    async for citation in source.citations():
        what = f"{plain_line(citation.type)}, {citation.status}"
        yield f"{plain_line(citation.citation_id)} ({what})\n"


def _head(source: ExportSource) -> str:
    state, counters, emotion = source.state, source.state.counters, source.state.emotion
    return "Conversation journey\n====================\n\n" + _facts(
        [
            ("Session", state.session_id),
            ("User", state.user_id),
            ("Exported", moment(source.exported_at)),
            ("Citation", source.citation),
            ("Started", moment(state.started_at)),
            ("Last updated", moment(state.last_updated)),
            ("Status", state.status),
            ("Duration", f"{minutes(state):.1f} minutes"),
            ("Messages", counters.messages),
            ("Average response time", seconds(average_response(state))),
            ("Emotional state changes", counters.emotion_changes),
            ("Milestones", counters.milestones),
            ("Breakthroughs", counters.breakthroughs),
            ("Tokens", counters.tokens),
            ("Models used", ", ".join(state.models_used)),
            ("Emotion now", emotion.emotion),
            ("Intensity", f"{emotion.intensity:.2f} of 1"),
            ("Confidence", percent(emotion.confidence)),
        ]
    )


async def _journey(source: ExportSource) -> AsyncIterator[str]:
    yield _title("Emotional trajectory")
    async for each in source.emotions():
        way = f"{each.get('from_emotion')} -> {each.get('to_emotion')}"
        yield (
            f"{moment(each.get('timestamp'))}  {plain_line(way)}, intensity "
            f"{number(each.get('intensity')):.2f}, confidence {percent(each.get('confidence'))}\n"
        )
    yield _title("Milestones")
    async for each in source.milestones():
        yield (
            f"{moment(each.get('timestamp'))}  {plain_line(each.get('emotion_state'))}, "
            f"after {plain_line(each.get('message_count'))} messages, "
            f"{plain_line(each.get('tracking_id'))}\n{plain(each.get('description', ''))}"
        )
    yield _title("Breakthroughs")
    for each in await by_confidence(source):
        yield (
            f"{moment(each.get('timestamp'))}  {plain_line(each.get('therapeutic_category'))}, "
            f"{percent(each.get('confidence'))} confident, {plain_line(each.get('tracking_id'))}\n"
            f"{plain(each.get('insight', ''))}"
            f"  triggered by {plain_line(each.get('trigger_message_id'))}:\n"
            f"{plain(each.get('trigger_excerpt', ''))}"
        )


def _notes(source: ExportSource) -> str:
    context = source.state.context_snapshot
    pieces = [_title("Therapeutic notes")]
    for name, text in (
        ("Current theme", context.current_theme),
        ("Therapeutic focus", context.therapeutic_focus),
        ("Client state", context.client_state_summary),
        ("Session notes", context.session_notes),
        *(("Working hypothesis", each) for each in context.working_hypotheses),
    ):
        if text:
            pieces.append(f"{name}:\n{plain(text)}")
    return "".join(pieces)


def _title(text: str) -> str:
    return f"\n{text}\n{'-' * len(text)}\n\n"


def _facts(facts: Iterable[tuple[str, object]]) -> str:
    return "".join(f"{name + ':':<25}{plain_line(value)}\n" for name, value in facts)
