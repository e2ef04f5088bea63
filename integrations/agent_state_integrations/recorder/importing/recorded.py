"""Recorded logs: the flat, the wrapped and the stored form, one message a line."""

from __future__ import annotations

from pathlib import Path

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importing.shapes import ShapeName
from agent_state_integrations.recorder.receiving.understanding import CONTENT_NAMES


def is_line(line: JsonObject) -> bool:
    """Whether a line may be of a recorded log: it has something that was said."""
    return not CONTENT_NAMES.isdisjoint(line)


class Recorded:
    """``understand`` knows these forms; a line is left as it is."""

    name: ShapeName = "recorded"

    def __init__(self, path: Path) -> None:
        self.path = path

    def message(self, line: JsonObject, number: int) -> JsonObject:
        return line
