"""The renderers of exports: a session as Markdown, as JSON, as plain text.

Messages are escaped, so that they cannot become structure: in Markdown they stand in quotations, in
plain text behind an indent.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from datetime import UTC, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import orjson

from agent_state.clock import instant
from agent_state.errors import StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.journey.citations import Citations
from agent_state_integrations.journey.models import Citation, JourneyState
from agent_state_integrations.journey.repository import JourneyRepository


class ExportSource:
    """A session as it was when its export began: each log as far as the totals reach.

    Each stream can be read again from the beginning, oldest first.
    """

    def __init__(
        self,
        repository: JourneyRepository,
        citations: Citations,
        state: JourneyState,
        *,
        export_id: str,
        exported_at: str,
        include_transcript: bool,
        assistant_name: str,
    ) -> None:
        self._repository = repository
        self._citations = citations
        self._key = (state.user_id, state.session_id)
        self.state = state
        self.export_id = export_id
        self.citation = f"if://export/{state.session_id}/{export_id}"
        self.exported_at = exported_at
        self.include_transcript = include_transcript
        self.assistant_name = assistant_name
        self._zone = zone_named(state.user_timezone)

    @property
    def zone(self) -> str:
        """The zone of the export's times: the person's, or UTC if it has none."""
        return "UTC" if self._zone is UTC else str(self.state.user_timezone)

    def moment(self, text: object) -> str:
        """A stored time in the person's zone; a dash if it is not a time."""
        if self._zone is UTC or not isinstance(text, str):
            return moment(text)
        try:
            local = instant(text).astimezone(self._zone)
        except (ValueError, OverflowError):
            return moment(text)
        return f"{local:%Y-%m-%d %H:%M:%S} {local.tzname()}"

    async def number_of(self, message_id: object) -> int | None:
        """The number of a message in the transcript; None when it is not in it."""
        if not isinstance(message_id, str) or not self.include_transcript:
            return None
        found = await self._repository.message_number(self._key, self.state, message_id)
        return found if found is not None and found <= self.state.counters.messages else None

    async def numbered_messages(self) -> AsyncGenerator[tuple[int, JsonObject], None]:
        """The messages with their numbers."""
        count = self.state.counters.messages
        if count == 0:
            return
        async with aclosing(self._repository.log(self._key, "messages")) as entries:
            async for entry in entries:
                yield entry.seq, entry.record
                count -= 1
                if count == 0:
                    return

    def emotions(self) -> AsyncGenerator[JsonObject, None]:
        return self._records("emotions", self.state.counters.emotion_updates)

    def milestones(self) -> AsyncGenerator[JsonObject, None]:
        return self._records("milestones", self.state.counters.milestones)

    def breakthroughs(self) -> AsyncGenerator[JsonObject, None]:
        return self._records("breakthroughs", self.state.counters.breakthroughs)

    def events(self) -> AsyncGenerator[JsonObject, None]:
        return self._records("events", self.state.counters.events)

    def citations(self) -> AsyncGenerator[Citation, None]:
        return self._citations.stream(self._key, limit=self.state.counters.citations)

    async def _records(self, log: str, count: int) -> AsyncGenerator[JsonObject, None]:
        if count == 0:
            return
        async with aclosing(self._repository.log(self._key, log)) as entries:
            async for entry in entries:
                yield entry.record
                count -= 1
                if count == 0:
                    return


# -- JSON: one object, one record a line --------------------------------------------------------


async def render_json(source: ExportSource) -> AsyncGenerator[str, None]:
    """The pieces of the export."""
    state = source.state.model_dump()
    emotion, context = state.pop("emotion"), state.pop("context_snapshot", {})
    head = {
        "export_id": source.export_id,
        "export_timestamp": source.exported_at,
        "citation": source.citation,
        "session_metadata": state,
        "emotional_state": emotion,
        "context_snapshot": context,
    }
    yield "{\n"
    for name, value in head.items():
        yield f'"{name}": {_dumps(value)},\n'
    lists = [
        ("messages", _json_messages(source) if source.include_transcript else _no_records()),
        ("emotional_journey", source.emotions()),
        ("milestones", source.milestones()),
        ("breakthroughs", source.breakthroughs()),
        ("events", source.events()),
        ("citations", _json_citations(source)),
    ]
    for name, records in lists:
        yield f'"{name}": ['
        between = "\n"
        async for record in records:
            yield f"{between}{_dumps(record)}"
            between = ",\n"
        yield "\n]\n" if name == lists[-1][0] else "\n],\n"
    yield "}\n"


async def _json_messages(source: ExportSource) -> AsyncGenerator[JsonObject, None]:
    async for place, record in source.numbered_messages():
        yield {**record, "seq": place}


async def _json_citations(source: ExportSource) -> AsyncGenerator[JsonObject, None]:
    async for citation in source.citations():
        yield citation.model_dump()


async def _no_records() -> AsyncGenerator[JsonObject, None]:
    return
    yield {}


def _dumps(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


# -- Markdown -----------------------------------------------------------------------------------

_ID_FACTS = frozenset({"Times", "Session ID", "User ID", "Citation"})
_EMPTY_SECTION = "*None was recorded.*\n\n"


async def render_markdown(source: ExportSource) -> AsyncGenerator[str, None]:
    """The pieces of the export, section by section."""
    yield _md_heading(source)
    yield _md_overview(source)
    yield _md_emotion(source)
    sections = [_md_trajectory, _md_milestones, _md_breakthroughs]
    if source.include_transcript:
        sections.append(_md_transcript)
    for section in sections:
        async for piece in section(source):
            yield piece
    yield _md_notes(source)
    yield _md_statistics(source)
    async for piece in _md_citations(source):
        yield piece
    yield f"---\n\n*Exported {source.moment(source.exported_at)}. Confidential.*\n"


def _md_heading(source: ExportSource) -> str:
    state = source.state
    return "# Conversation Journey\n\n" + _md_facts(
        [
            ("Session ID", state.session_id),
            ("User ID", state.user_id),
            ("Times", source.zone),
            ("Export Date", source.moment(source.exported_at)),
            ("Citation", source.citation),
        ]
    )


def _md_overview(source: ExportSource) -> str:
    state = source.state
    return "## Session Overview\n\n" + _md_table(
        [
            ("Duration", f"{state.duration_minutes:.1f} minutes"),
            ("Started", source.moment(state.talk_began_at)),
            ("Last Updated", source.moment(state.talk_ended_at)),
            ("Status", state.status),
            ("Total Messages", state.counters.messages),
            ("Milestones", state.counters.milestones),
            ("Breakthroughs", state.counters.breakthroughs),
        ]
    )


def _md_emotion(source: ExportSource) -> str:
    emotion = source.state.emotion
    return "## Current Emotional State\n\n" + _md_facts(
        [
            ("Emotion", emotion.emotion),
            ("Intensity", f"{emotion.intensity:.2f} of 1"),
            ("Confidence", percent(emotion.confidence)),
            ("Since", source.moment(emotion.last_change)),
        ]
    )


async def _md_trajectory(source: ExportSource) -> AsyncGenerator[str, None]:
    yield "## Emotional Trajectory\n\n"
    rows = 0
    async for each in source.emotions():
        if rows == 0:
            yield "| Time | From | To | Intensity | Confidence | Message |\n"
            yield "|---|---|---|---|---|---|\n"
        rows += 1
        cells = (
            source.moment(each.get("timestamp")),
            each.get("from_emotion", ""),
            each.get("to_emotion", ""),
            f"{number(each.get('intensity')):.2f}",
            percent(each.get("confidence")),
        )
        message = await _md_message(source, each.get("message_id"))
        yield f"| {' | '.join(inline(cell) for cell in cells)} | {message} |\n"
    yield "\n" if rows else _EMPTY_SECTION


async def _md_milestones(source: ExportSource) -> AsyncGenerator[str, None]:
    yield "## Key Milestones\n\n"
    place = 0
    async for each in source.milestones():
        place += 1
        yield f"### Milestone {place}: {source.moment(each.get('timestamp'))}\n\n"
        yield block(each.get("description", ""))
        yield _md_facts(
            [
                ("Emotion", each.get("emotion_state", "")),
                ("Model", each.get("model_id") or ""),
                ("Messages to point", each.get("message_count", 0)),
                ("Citation", each.get("tracking_id", "")),
            ]
        )[:-1]
        yield f"- **Message:** {await _md_message(source, each.get('message_id'))}\n\n"
    if not place:
        yield _EMPTY_SECTION


async def _md_breakthroughs(source: ExportSource) -> AsyncGenerator[str, None]:
    yield "## Breakthroughs\n\n"
    found = await by_confidence(source)
    for place, each in enumerate(found, 1):
        yield f"### Breakthrough {place}: {percent(each.get('confidence'))} confident\n\n"
        yield block(each.get("insight", ""))
        yield _md_facts(
            [
                ("Time", source.moment(each.get("timestamp"))),
                ("Category", each.get("therapeutic_category", "")),
                ("Emotion shift", each.get("emotion_shift") or ""),
                ("Citation", each.get("tracking_id", "")),
            ]
        )[:-1]
        trigger = await _md_message(source, each.get("trigger_message_id"))
        yield f"- **Triggered by message:** {trigger}\n\n"
        yield block(each.get("trigger_excerpt", ""))
    if not found:
        yield _EMPTY_SECTION


async def _md_transcript(source: ExportSource) -> AsyncGenerator[str, None]:
    yield f"## Conversation Transcript ({source.state.counters.messages} messages)\n\n"
    async for place, each in source.numbered_messages():
        who = inline(speaker(source, each))
        heading = f"**{place}. \\[{source.moment(each.get('timestamp'))}\\] {who}:**"
        yield f'<a id="message-{place}"></a>{heading} {code(each.get("message_id", ""))}\n\n'
        yield block(each.get("content", ""))


def _md_notes(source: ExportSource) -> str:
    context = source.state.context_snapshot
    pieces = ["## Therapeutic Notes\n\n"]
    for name, text in (
        ("Current Theme", context.current_theme),
        ("Therapeutic Focus", context.therapeutic_focus),
        ("Client State", context.client_state_summary),
        ("Session Notes", context.session_notes),
    ):
        pieces.append(f"### {name}\n\n{block(text) if text else _EMPTY_SECTION}")
    pieces.append("### Working Hypotheses\n\n")
    hypotheses = [f"- {inline(each)}\n" for each in context.working_hypotheses]
    pieces.append("".join(hypotheses) + "\n" if hypotheses else _EMPTY_SECTION)
    return "".join(pieces)


def _md_statistics(source: ExportSource) -> str:
    state, counters = source.state, source.state.counters
    return "## Session Statistics\n\n" + _md_table(
        [
            ("Duration", f"{state.duration_minutes:.1f} minutes"),
            ("Messages", counters.messages),
            ("Average response time", seconds(state.average_response_seconds)),
            ("Emotional state changes", counters.emotion_changes),
            ("Milestones", counters.milestones),
            ("Breakthroughs", counters.breakthroughs),
            ("Tokens", counters.tokens),
            ("Models used", ", ".join(state.models_used)),
        ]
    )


async def _md_citations(source: ExportSource) -> AsyncGenerator[str, None]:
    yield "## Citations & Traceability\n\n"
    yield f"- {code(source.citation)} (this export)\n"
    async for each in source.citations():
        cited = [await _md_message(source, message.message_id) for message in each.evidence]
        evidence = ", ".join(cited)
        rests = f", rests on {evidence}" if evidence else ""
        yield f"- {code(each.citation_id)} ({inline(each.type)}, {each.status}){rests}\n"
    yield "\n"


async def _md_message(source: ExportSource, message_id: object) -> str:
    """A message that is referred to: its number, as a link into the transcript, and its id."""
    if not message_id:
        return "—"
    place = await source.number_of(message_id)
    return f"{f'[{place}](#message-{place}) ' if place else ''}{code(message_id)}"


def _md_facts(facts: Iterable[tuple[str, object]]) -> str:
    """Bullets; the value of a name in ``_ID_FACTS`` is an id."""
    lines = [
        f"- **{name}:** {code(value) if name in _ID_FACTS else inline(value)}\n"
        for name, value in facts
    ]
    return "".join(lines) + "\n"


def _md_table(rows: Iterable[tuple[str, object]]) -> str:
    return "| Metric | Value |\n|---|---|\n" + "".join(_md_row(*row) for row in rows) + "\n"


def _md_row(*cells: object) -> str:
    return f"| {' | '.join(inline(cell) for cell in cells)} |\n"


# -- plain text ---------------------------------------------------------------------------------


async def render_text(source: ExportSource) -> AsyncGenerator[str, None]:
    """The pieces of the export, section by section."""
    yield _text_head(source)
    async for piece in _text_journey(source):
        yield piece
    if source.include_transcript:
        yield _text_title(f"Conversation transcript ({source.state.counters.messages} messages)")
        async for place, each in source.numbered_messages():
            who, ident = plain_line(speaker(source, each)), plain_line(each.get("message_id"))
            yield f"{place}. [{source.moment(each.get('timestamp'))}] {who} ({ident}):\n"
            yield f"{plain(each.get('content', ''))}\n"
    yield _text_notes(source)
    yield _text_title("Citations")
    yield f"{plain_line(source.citation)} (this export)\n"
    async for citation in source.citations():
        what = f"{plain_line(citation.type)}, {citation.status}"
        yield f"{plain_line(citation.citation_id)} ({what})\n"


def _text_head(source: ExportSource) -> str:
    state, counters, emotion = source.state, source.state.counters, source.state.emotion
    return "Conversation journey\n====================\n\n" + _text_facts(
        [
            ("Session", state.session_id),
            ("User", state.user_id),
            ("Times", source.zone),
            ("Exported", source.moment(source.exported_at)),
            ("Citation", source.citation),
            ("Started", source.moment(state.talk_began_at)),
            ("Last updated", source.moment(state.talk_ended_at)),
            ("Status", state.status),
            ("Duration", f"{state.duration_minutes:.1f} minutes"),
            ("Messages", counters.messages),
            ("Average response time", seconds(state.average_response_seconds)),
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


async def _text_journey(source: ExportSource) -> AsyncGenerator[str, None]:
    yield _text_title("Emotional trajectory")
    async for each in source.emotions():
        way = f"{each.get('from_emotion')} -> {each.get('to_emotion')}"
        yield (
            f"{source.moment(each.get('timestamp'))}  {plain_line(way)}, intensity "
            f"{number(each.get('intensity')):.2f}, confidence {percent(each.get('confidence'))}, "
            f"message {await _text_message(source, each.get('message_id'))}\n"
        )
    yield _text_title("Milestones")
    async for each in source.milestones():
        yield (
            f"{source.moment(each.get('timestamp'))}  {plain_line(each.get('emotion_state'))}, "
            f"after {plain_line(each.get('message_count'))} messages, "
            f"{plain_line(each.get('tracking_id'))}, "
            f"message {await _text_message(source, each.get('message_id'))}\n"
            f"{plain(each.get('description', ''))}"
        )
    yield _text_title("Breakthroughs")
    for each in await by_confidence(source):
        yield (
            f"{source.moment(each.get('timestamp'))}  "
            f"{plain_line(each.get('therapeutic_category'))}, "
            f"{percent(each.get('confidence'))} confident, {plain_line(each.get('tracking_id'))}\n"
            f"{plain(each.get('insight', ''))}"
            f"  triggered by {await _text_message(source, each.get('trigger_message_id'))}:\n"
            f"{plain(each.get('trigger_excerpt', ''))}"
        )


async def _text_message(source: ExportSource, message_id: object) -> str:
    """A message that is referred to: its number in the transcript, and its id."""
    if not message_id:
        return "—"
    place = await source.number_of(message_id)
    return f"{place} ({plain_line(message_id)})" if place else plain_line(message_id)


def _text_notes(source: ExportSource) -> str:
    context = source.state.context_snapshot
    pieces = [_text_title("Therapeutic notes")]
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


def _text_title(text: str) -> str:
    return f"\n{text}\n{'-' * len(text)}\n\n"


def _text_facts(facts: Iterable[tuple[str, object]]) -> str:
    return "".join(f"{name + ':':<25}{plain_line(value)}\n" for name, value in facts)


# -- words and numbers --------------------------------------------------------------------------


async def by_confidence(source: ExportSource) -> list[JsonObject]:
    """The breakthroughs, the most confident first, the older first among equals."""
    found = [record async for record in source.breakthroughs()]
    return sorted(found, key=lambda record: -number(record.get("confidence")))


def number(value: object) -> float:
    """A stored number; 0 if a person has replaced it by something else."""
    return float(value) if isinstance(value, (int, float)) else 0.0


def percent(value: object) -> str:
    return f"{number(value):.0%}"


def speaker(source: ExportSource, message: JsonObject) -> str:
    """The speaker; for a message that is not the user's also its model."""
    role = str(message.get("role", ""))
    if role == "user":
        return "User"
    name = source.assistant_name if role == "assistant" else role.capitalize()
    model = message.get("model_id")
    return f"{name} ({model})" if model else name


def moment(text: object) -> str:
    """A stored time as ``2026-01-01 00:00:00 UTC``; a dash if it is not a time."""
    if not isinstance(text, str) or len(text) < 19:
        return "—"
    return f"{text[:10]} {text[11:19]} UTC"


def zone_named(name: str | None) -> tzinfo:
    """The time zone of that name; UTC for None.

    Raises ``StateValidationError`` for a name that is not in the database.
    """
    try:
        return UTC if name is None else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise StateValidationError(f"user_timezone: {name!r} is no known time zone") from error


def seconds(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f} s"


# -- escaping -----------------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MARKS = "\\`*_[]<&|~$@"
"""The characters that begin markup inside a line: emphasis, HTML, entities, tables, addresses.
The backslash is first, as escaping the others adds backslashes."""

_LINE_START = re.compile(r"(?:[#+\-=:>]|\d{1,9}[.)](?=\s|$))")
_LINK = re.compile(r"(:)(?=//)|(?<=www)(\.)", re.IGNORECASE)
_ID = re.compile(r"[\w./:@-]+", re.ASCII)
_LEADING = re.compile(r"\s+")


def inline(text: object) -> str:
    """Text inside a line of Markdown, such as a table cell or a bullet."""
    return _escaped(plain_line(text))


def code(text: object) -> str:
    """An id as a code span, to be copied; escaped text if it cannot be one."""
    ident = str(text)
    return f"`{ident}`" if _ID.fullmatch(ident) else inline(ident)


def block(text: object) -> str:
    """Text as a quotation, line by line, followed by an empty line."""
    lines: list[str] = []
    before = False
    for line in _lines(str(text)):
        stripped = line.rstrip()
        if before and stripped:
            lines[-1] += "\\"
        lines.append(f"> {_indented(stripped)}" if stripped else ">")
        before = bool(stripped)
    return "\n".join(lines) + "\n\n"


def plain(text: object, indent: str = "    ") -> str:
    """Text for a plain file, each line behind the indent, which distinguishes it from headings."""
    return "".join(f"{indent}{line}".rstrip() + "\n" for line in _lines(str(text)))


def plain_line(text: object) -> str:
    """Text inside a line of a plain file."""
    return _visible(" ".join(str(text).split())) or "—"


def _lines(text: str) -> list[str]:
    return _visible(text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")


def _visible(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _indented(line: str) -> str:
    leading = _LEADING.match(line)
    if leading is None:
        return _escaped(line)
    spaces = "".join(
        "&nbsp;" if space == " " else f"&#{ord(space)};"
        for space in leading[0].replace("\t", "    ")
    )
    return spaces + _escaped(line[leading.end() :])


def _escaped(line: str) -> str:
    escaped = line
    for mark in _MARKS:  # faster here than a regular expression, or str.translate
        if mark in escaped:
            escaped = escaped.replace(mark, f"\\{mark}")
    if "//" in escaped or "www" in escaped.lower():
        escaped = _LINK.sub(lambda found: f"\\{found[0]}", escaped)
    start = _LINE_START.match(escaped)
    if start is None:
        return escaped
    at = start.end() - 1
    return f"{escaped[:at]}\\{escaped[at:]}"
