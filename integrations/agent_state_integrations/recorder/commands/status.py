"""``agent-state record status``: how much was recorded, and where it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import say, show_json, show_table

if TYPE_CHECKING:
    from agent_state_integrations.recorder.status import Files


def status(state: StateOption = Path("state"), *, as_json: JsonOption = False) -> None:
    """How much was recorded, and where it is."""
    from agent_state_integrations.recorder.status import status as look

    found = look(state)
    if as_json:
        show_json(asdict(found))
        return
    say(f"{found.state_dir}: {found.last_seq} messages so far")
    rows = [
        _row("live log", found.live),
        _row("segments", found.segments),
        _row("archives", found.archives),
    ]
    show_table(("", "files", "size"), rows)
    if found.removed_archives:
        say(f"archives removed by retention: {found.removed_archives}")
    if found.last_checkpoint is not None:
        say(f"checkpoints: {found.checkpoints}, the last one {found.last_checkpoint}")
    say(f"messages since the last checkpoint: {found.since_checkpoint}")
    if found.dead_letters:
        say(f"dead letters: {found.dead_letters}; record/dead-letter.jsonl says why", "yellow")


def _row(name: str, files: Files) -> tuple[str, int, str]:
    return name, files.files, size(files.bytes)


def size(count: float) -> str:
    """Bytes, short."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
