"""The status of a recording: the number and sizes of its files."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from agent_state.errors import StateNotFoundError
from agent_state.storage import logs
from agent_state_integrations.recorder import checkpoint as checkpoints
from agent_state_integrations.recorder.archive_index import read_index
from agent_state_integrations.recorder.files import Recording


@dataclass(frozen=True, slots=True)
class FileTotals:
    """Some of a recording's files."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingStatus:
    """A recording at a glance."""

    state_dir: str
    last_seq: int
    """The number of the last message; 0 before the first."""
    live: FileTotals
    segments: FileTotals
    archives: FileTotals
    removed_archives: int
    """How many archives retention has removed."""
    dead_letters: int
    checkpoints: int
    last_checkpoint: str | None
    """Its id."""
    since_checkpoint: int
    """How many messages came since."""


def status(state_dir: str | PathLike[str]) -> RecordingStatus:
    """Look at a recording, also at one that is written. Reads no message.

    Raises ``StateNotFoundError`` if it is missing, ``StateCorruptedError`` for a damaged index.
    """
    recording = Recording(state_dir)
    if not recording.folder.is_dir():
        raise StateNotFoundError("there is no recording here", path=state_dir)
    directory = recording.directory()
    index = read_index(directory)
    segments = recording.segments()
    newest = [*(segment.path for segment in segments[-1:]), recording.current]
    last_seq = max(index.last_seq, *(logs.last_seq(str(path)) for path in newest))
    made = checkpoints.ids(directory)
    last = checkpoints.newest(directory)
    return RecordingStatus(
        state_dir=str(state_dir),
        last_seq=last_seq,
        live=_files([recording.current] if recording.current.exists() else []),
        segments=_files([segment.path for segment in segments]),
        archives=_files([archive.path for archive in recording.archives()]),
        removed_archives=index.removed,
        dead_letters=logs.last_seq(str(recording.dead_letters)),
        checkpoints=len(made),
        last_checkpoint=last.checkpoint_id if last is not None else None,
        since_checkpoint=max(0, last_seq - (last.last_seq if last is not None else 0)),
    )


def _files(paths: list[Path]) -> FileTotals:
    sizes = []
    for path in paths:
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # it was rotated or archived since
    return FileTotals(len(sizes), sum(sizes))
