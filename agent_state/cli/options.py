"""The options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StateOption = Annotated[
    Path,
    typer.Option("--state", metavar="DIR", envvar="AGENT_STATE_DIR", help="The state directory."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
