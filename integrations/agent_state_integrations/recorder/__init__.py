"""What was said, and what it tells: the recorder, its queries and its analytics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from agent_state_integrations.recorder.analysis.analytics import Analysis, analyse
from agent_state_integrations.recorder.archives.archiving import archive
from agent_state_integrations.recorder.archives.growth import Policy
from agent_state_integrations.recorder.checkpoints import Checkpoint
from agent_state_integrations.recorder.enriching.enrichment import enrich
from agent_state_integrations.recorder.enriching.rules import Rules
from agent_state_integrations.recorder.importing import import_logs
from agent_state_integrations.recorder.messages import RecordedMessage
from agent_state_integrations.recorder.narrating import Narrator
from agent_state_integrations.recorder.past.conversations import Conversation, conversations
from agent_state_integrations.recorder.past.query import Query
from agent_state_integrations.recorder.past.reading import read, read_records
from agent_state_integrations.recorder.receiving.redaction import Redactor
from agent_state_integrations.recorder.recorder import Recorder
from agent_state_integrations.recorder.segments import Recording
from agent_state_integrations.recorder.writer import Recorded, RecordWriter

if TYPE_CHECKING:
    from agent_state_integrations.recorder.network.broker import Broker
    from agent_state_integrations.recorder.network.client import RecorderClient
    from agent_state_integrations.recorder.network.daemon import RecorderDaemon
    from agent_state_integrations.recorder.network.wire import Receipt

__all__ = [
    "Analysis",
    "Broker",
    "Checkpoint",
    "Conversation",
    "Narrator",
    "Policy",
    "Query",
    "Receipt",
    "RecordWriter",
    "Recorded",
    "RecordedMessage",
    "Recorder",
    "RecorderClient",
    "RecorderDaemon",
    "Recording",
    "Redactor",
    "Rules",
    "analyse",
    "archive",
    "conversations",
    "enrich",
    "import_logs",
    "read",
    "read_records",
]

_NETWORK = {
    "Broker": "broker",
    "Receipt": "wire",
    "RecorderClient": "client",
    "RecorderDaemon": "daemon",
}
"""What needs the extra, and the module it is in."""


def __getattr__(name: str) -> object:
    if name in _NETWORK:
        return getattr(
            import_module(f"agent_state_integrations.recorder.network.{_NETWORK[name]}"), name
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
