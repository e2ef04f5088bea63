"""What every command of the recorder does where there is nothing to read, or nothing it can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from agent_state.cli.output import print_error

if TYPE_CHECKING:
    from agent_state_integrations.recorder.reader import LogSource

_PROBLEM = 1


def stop_on_empty(path: Path, *, logs: bool = True) -> None:
    """Say so and exit 1 where a folder has no recording and, with ``logs``, no log either.

    Likewise for transcripts of agents' tools: as messages they mean something only once imported.
    """
    from agent_state.errors import StateNotFoundError
    from agent_state_integrations.recorder.reader import recording_at, sources

    if not path.exists() or (path.is_dir() and recording_at(path.resolve()) is not None):
        return
    try:
        with sources(path) as found:
            if found and logs:
                _stop_on_transcripts(found)
                return
    except StateNotFoundError:
        pass
    print_error(f"there is no recording{' and no log' if logs else ''} here [{path}]")
    raise typer.Exit(_PROBLEM)


def _stop_on_transcripts(found: Sequence[LogSource]) -> None:
    from agent_state.errors import AgentStateError
    from agent_state_integrations.recorder.importers import registry

    for source in found:
        if source.recording is not None or source.format in ("parquet", "json"):
            continue
        try:
            wrote = registry.format_of(next(source.batches(), []))
        except AgentStateError:
            continue  # reading it says why
        if wrote is not None and wrote.format.name != "recorded":
            what = f"a transcript of {wrote.format.title}"
            print_error(f"{source.path.name} is {what}: use `agent-state record import`")
            raise typer.Exit(_PROBLEM)
