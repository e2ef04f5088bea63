"""Logs that other programs wrote, brought into a recording.

Recorded logs (the flat, the wrapped and the stored form), Claude Code's transcripts and Codex's
rollouts. Importing the same file twice adds nothing.
"""

from agent_state_integrations.recorder.importing.logs import import_logs
from agent_state_integrations.recorder.importing.report import FileReport, ImportReport
from agent_state_integrations.recorder.importing.shapes import SHAPES, ShapeName

__all__ = ["SHAPES", "FileReport", "ImportReport", "ShapeName", "import_logs"]
