"""What every command of the recorder does on a folder in which there is nothing."""

from __future__ import annotations

from pathlib import Path

import typer

from agent_state.cli.output import print_error

_PROBLEM = 1


def stop_on_empty(path: Path, *, logs: bool = True) -> None:
    """Say so and exit 1 where a folder has no recording and, with ``logs``, no log either."""
    from agent_state.errors import StateNotFoundError
    from agent_state_integrations.recorder.reader import recording_at, sources

    if not path.is_dir() or recording_at(path.resolve()) is not None:
        return
    try:
        with sources(path) as found:
            if found and logs:
                return
    except StateNotFoundError:
        pass
    print_error(f"there is no recording{' and no log' if logs else ''} here [{path}]")
    raise typer.Exit(_PROBLEM)
