"""The options and exit codes that the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OK, PROBLEM, MISUSE = 0, 1, 2
"""Exit codes: success; a problem was found; the command could not be carried out."""

StateOption = Annotated[
    Path,
    typer.Option("--state", metavar="DIR", envvar="AGENT_STATE_DIR", help="The state directory."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
