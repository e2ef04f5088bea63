"""What was said, and what it tells: the recorder, its queries and its analytics."""

from agent_state.record.checkpoints import Checkpoint
from agent_state.record.messages import Message
from agent_state.record.narrating import Narrator
from agent_state.record.recorder import Recorder
from agent_state.record.segments import Recording
from agent_state.record.writer import Recorded, RecordWriter

__all__ = [
    "Checkpoint",
    "Message",
    "Narrator",
    "RecordWriter",
    "Recorded",
    "Recorder",
    "Recording",
]
