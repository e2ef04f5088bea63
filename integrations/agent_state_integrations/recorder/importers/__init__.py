"""Imports logs of other programs into a recording.

Recorded logs (the flat, the wrapped and the stored form), Claude Code's transcripts and Codex's
rollouts. Importing the same file twice adds nothing.
"""

from agent_state_integrations.recorder.importers.importer import (
    FileReport,
    ImportReport,
    import_logs,
)
from agent_state_integrations.recorder.importers.transcript import LOG_FORMATS, LogFormat

__all__ = ["LOG_FORMATS", "FileReport", "ImportReport", "LogFormat", "import_logs"]
