"""A session as one JSON object, one record a line."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from agent_state.protocols import JsonObject
from agent_state_integrations.journey.source import ExportSource


async def render_json(source: ExportSource) -> AsyncIterator[str]:
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
        yield f'"{name}": {_json(value)},\n'
    lists = [
        ("messages", source.messages() if source.include_transcript else _none()),
        ("emotional_journey", source.emotions()),
        ("milestones", source.milestones()),
        ("breakthroughs", source.breakthroughs()),
        ("events", source.events()),
        ("citations", _citations(source)),
    ]
    for name, records in lists:
        yield f'"{name}": ['
        between = "\n"
        async for record in records:
            yield f"{between}{_json(record)}"
            between = ",\n"
        yield "\n]\n" if name == lists[-1][0] else "\n],\n"
    yield "}\n"


async def _citations(source: ExportSource) -> AsyncIterator[JsonObject]:
    async for citation in source.citations():
        yield citation.model_dump()


async def _none() -> AsyncIterator[JsonObject]:
    return
    yield {}


def _json(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
