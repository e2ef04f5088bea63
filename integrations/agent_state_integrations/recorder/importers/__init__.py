"""Imports logs of other programs into a recording: recorded logs, and transcripts of agents' tools.

One module describes and reads the format of one tool. Importing the same file twice adds nothing.
"""

from agent_state_integrations.recorder.importers.importer import (
    FileReport,
    ImportReport,
    import_logs,
)
from agent_state_integrations.recorder.importers.ledger import ImportLedger
from agent_state_integrations.recorder.importers.registry import known, register
from agent_state_integrations.recorder.importers.transcript import (
    SkippedLineError,
    TranscriptFile,
    TranscriptFormat,
    TranscriptReader,
    message_of,
)

__all__ = [
    "FileReport",
    "ImportLedger",
    "ImportReport",
    "SkippedLineError",
    "TranscriptFile",
    "TranscriptFormat",
    "TranscriptReader",
    "import_logs",
    "known",
    "message_of",
    "register",
]
