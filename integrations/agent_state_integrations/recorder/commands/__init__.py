"""``agent-state record``: record messages, query, verify and archive them."""

from __future__ import annotations

import typer

from agent_state_integrations.recorder.commands.archive import archive, checkpoints, status
from agent_state_integrations.recorder.commands.daemon import daemon
from agent_state_integrations.recorder.commands.imports import import_
from agent_state_integrations.recorder.commands.query import conversations, query

record = typer.Typer(
    help="Messages of agents: record, query, verify and archive them.", no_args_is_help=True
)
for command in (daemon, status, query, conversations, archive):
    record.command()(command)
record.command("import")(import_)
record.add_typer(checkpoints, name="checkpoints")
