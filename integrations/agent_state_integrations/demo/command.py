"""``agent-state demo``: watch agents being killed, and lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent_state.cli.options import JsonOption


def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="The text files to read: by default those of the current folder, or of this "
            "program's own source where there are none.",
            show_default=False,
        ),
    ] = None,
    kills: Annotated[int, typer.Option(help="How often to kill the server.", min=0, max=12)] = 4,
    seed: Annotated[
        int | None, typer.Option(help="Choose the same moments again.", show_default=False)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DIR",
            help="An empty or new directory for the state: by default a temporary one, "
            "which is kept.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a small team of agents get killed, and lose nothing.

    A planner, readers and a reporter analyse the text files of FOLDER in a server of their own,
    without any language model. The server is killed with SIGKILL several times and started
    again; at the end the result is checked against a run that nobody disturbed. Takes less
    than half a minute.
    """
    from agent_state_integrations.demo import show  # only this command pays for it

    sound = show.run(folder, kills=kills, seed=seed, state=state, as_json=as_json)
    raise typer.Exit(0 if sound else 1)
