"""``agent-state agents`` and ``mail``: look at them, wake and stop agents, send messages."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from agent_state.cli.glance import list_agents
from agent_state.cli.inspector import Inspector
from agent_state.cli.nouns import new_noun, run_inspection, show_by_id
from agent_state.cli.options import (
    OK,
    STATE,
    WAIT_SECONDS,
    JsonOption,
    PriorityOption,
    RecordsOption,
    StateOption,
    WaitOption,
    given_keyring,
)
from agent_state.cli.output import did_you_mean, print_error, print_line, show_json
from agent_state.cli.owner import carry_out, end_with_report
from agent_state.codec import format_validation_error
from agent_state.runtime.requests import OPERATOR, AgentAction, AgentRequest, SendRequest

agents = typer.Typer(
    help="Agents: list and show them, wake, stop and start them.", no_args_is_help=True
)
AgentsArgument = Annotated[
    list[str], typer.Argument(metavar="AGENT...", help="The agents' ids.", show_default=False)
]
_DONE = {"wake": "woken", "stop": "stopped", "start": "started"}


@agents.command("ls")
def list_them(state: StateOption = STATE, as_json: JsonOption = False) -> None:
    """List the agents with their tasks, mail and sleep, as `agent-state ls` does.

    Example: agent-state agents ls --json
    """
    raise typer.Exit(list_agents(state, as_json, given_keyring()))


@agents.command("show")
def show_one(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="The agent's id.")],
    state: StateOption = STATE,
    limit: RecordsOption = 20,
    as_json: JsonOption = False,
) -> None:
    """Show an agent with its tasks, mail, sleep and logs.

    Example: agent-state agents show alice
    """
    raise typer.Exit(show_by_id(state, agent, limit, as_json, agents=True))


def _add_change(action: AgentAction, before: str, text: str) -> None:
    """Add a command that changes agents; ``before``: what those are that were so before."""

    @agents.command(action, help=text)
    def change(
        ids: AgentsArgument,
        wait: WaitOption = WAIT_SECONDS,
        state: StateOption = STATE,
        as_json: JsonOption = False,
    ) -> None:
        report = carry_out(AgentRequest(action=action, agents=ids), state, wait, "agents")
        end_with_report(report, "agent", _DONE[action], before, as_json)


_add_change(
    "wake",
    "awake",
    """End the sleep of agents, whatever they wait for.

    On a directory at rest they are awake at the next start; a running server takes the request from
    a file in its directory.

    Example: agent-state agents wake carol""",
)
_add_change(
    "stop",
    "stopped",
    """Let agents finish their tasks and begin no other. Their tasks and mail stay.

    Example: agent-state agents stop alice bob""",
)
_add_change(
    "start",
    "started",
    """Let stopped agents work again.

    Example: agent-state agents start alice""",
)


mail = new_noun("mail", "the mail of agents", "alice/01a22f278d84-234f2a1cf9")


@mail.command()
def send(
    *,
    to_agent: Annotated[str, typer.Argument(metavar="AGENT", help="Who gets the message.")],
    subject: Annotated[str, typer.Argument(help="What it is about.")],
    body: Annotated[str, typer.Option("--body", help="The text; JSON with --json-body.")] = "",
    json_body: Annotated[
        bool, typer.Option("--json-body", help="The body is JSON, and is sent as that.")
    ] = False,
    from_agent: Annotated[str, typer.Option("--from", help="The sender.")] = OPERATOR,
    priority: PriorityOption = None,
    wait: WaitOption = WAIT_SECONDS,
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """Send a message to an agent, which wakes it if it waits for mail.

    For an agent that does not exist it is kept, which is said on stderr.
    On a directory at rest it is read at the next start; a running server takes the request from a
    file in its directory.

    Example: agent-state mail send alice "new figures" --body "see figures.csv"
    """
    request = checked(
        SendRequest,
        to_agent=to_agent,
        from_agent=from_agent,
        subject=subject,
        body=parse_json("--body", body) if json_body else body,
        priority=priority or "normal",
    )
    report = carry_out(request, state, wait, "mail")
    if as_json:
        show_json(report)
    else:
        message = report["message"]
        print_line(f"sent: mail/{message['to_agent']}/{message['message_id']}")

    async def look(inspector: Inspector) -> int:
        names = [key[0] for key in await inspector.manager.keys("agents")]
        if to_agent not in names:
            hint = did_you_mean(to_agent, names)
            print_error(f"it is kept for {to_agent!r:.80}, an agent that does not exist{hint}")
        return OK

    raise typer.Exit(run_inspection(state, look))


def parse_json(option: str, text: str) -> Any:
    """The value in the JSON of an option. Raises ``typer.BadParameter``."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: not JSON: {error}") from error


def checked(model: type[BaseModel], **fields: Any) -> Any:
    """The request that the options make. Raises ``typer.BadParameter``."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        text = format_validation_error(error).removeprefix("not a valid state: ")
        raise typer.BadParameter(text) from error
