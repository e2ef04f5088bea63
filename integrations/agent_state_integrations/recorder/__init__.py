"""The recorder: a durable log of messages, its queries, archives and analytics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from agent_state_integrations.recorder.analytics.analysis import LogAnalysis, analyse
from agent_state_integrations.recorder.archiver import RetentionPolicy, archive
from agent_state_integrations.recorder.checkpoint import Checkpoint
from agent_state_integrations.recorder.conversation import RecordedConversation, conversations
from agent_state_integrations.recorder.enrichment import enrich
from agent_state_integrations.recorder.files import Recording
from agent_state_integrations.recorder.importers import import_logs
from agent_state_integrations.recorder.message import RecordedMessage
from agent_state_integrations.recorder.query import Query
from agent_state_integrations.recorder.reader import read, read_records
from agent_state_integrations.recorder.recorder import Recorder
from agent_state_integrations.recorder.redact import SecretRedactor
from agent_state_integrations.recorder.rules import Rules
from agent_state_integrations.recorder.runtime_recorder import RuntimeRecorder
from agent_state_integrations.recorder.writer import RecordResult, RecordWriter

if TYPE_CHECKING:
    from agent_state_integrations.recorder.network.client import RecorderClient
    from agent_state_integrations.recorder.network.daemon import Broker, RecorderDaemon
    from agent_state_integrations.recorder.network.wire import Receipt

__all__ = [
    "Broker",
    "Checkpoint",
    "LogAnalysis",
    "Query",
    "Receipt",
    "RecordResult",
    "RecordWriter",
    "RecordedConversation",
    "RecordedMessage",
    "Recorder",
    "RecorderClient",
    "RecorderDaemon",
    "Recording",
    "RetentionPolicy",
    "Rules",
    "RuntimeRecorder",
    "SecretRedactor",
    "analyse",
    "archive",
    "conversations",
    "enrich",
    "import_logs",
    "read",
    "read_records",
]

_NETWORK = {
    "Broker": "daemon",
    "Receipt": "wire",
    "RecorderClient": "client",
    "RecorderDaemon": "daemon",
}
"""The names that need the extra ``recorder``, and the module of each."""


def __getattr__(name: str) -> object:
    if name in _NETWORK:
        return getattr(
            import_module(f"agent_state_integrations.recorder.network.{_NETWORK[name]}"), name
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
