"""``agent-state mcp``: an MCP server over a state directory, on standard input and output."""

from __future__ import annotations

from agent_state.cli.options import STATE, WAIT_SECONDS, StateOption, WaitOption
from agent_state_integrations.mcp.directory_server import create_server


def mcp(state: StateOption = STATE, wait: WaitOption = WAIT_SECONDS) -> None:
    """Serve the directory to a client of the Model Context Protocol, on stdin and stdout.

    Tools: `coaia_tash`, `coaia_fetch`, `coaia_list` and `coaia_drop` stash texts under keys;
    `submit_task`, `requeue_tasks` and `send_message` change what agents have, through the server
    that runs them if one does. Resources: agents, tasks and mail. It serves until its input ends.

    Example: agent-state mcp --state state
    """
    create_server(state.absolute(), wait_seconds=wait).run("stdio")
