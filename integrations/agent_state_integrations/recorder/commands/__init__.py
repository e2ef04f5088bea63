"""``agent-state record``: record what agents say, ask for it, check it, keep it small."""

from __future__ import annotations

import typer

from agent_state_integrations.recorder.commands.archive import archive, checkpoints, status
from agent_state_integrations.recorder.commands.daemon import daemon
from agent_state_integrations.recorder.commands.imports import import_
from agent_state_integrations.recorder.commands.query import conversations, query

record = typer.Typer(
    help="What the agents said: record it, ask for it, archive it.", no_args_is_help=True
)
for command in (daemon, status, query, conversations, archive):
    record.command()(command)
record.command("import")(import_)
record.add_typer(checkpoints, name="checkpoints")
