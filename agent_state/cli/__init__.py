"""The command ``agent-state``: a state directory for people and scripts.

It needs the extra ``cli`` (typer and rich); the other packages do not.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from agent_state.errors import MissingExtraError


def main() -> None:
    """Run the command of ``sys.argv``, and exit with its exit code."""
    try:
        import rich  # noqa: F401  # imported here to report a missing extra in one line
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"agent-state: {MissingExtraError('cli', str(error.name))}", file=sys.stderr)
        raise SystemExit(2) from None

    from agent_state.cli.app import run  # it needs both

    _prepare_streams()
    raise SystemExit(run(sys.argv[1:]))


def _prepare_streams() -> None:
    """Make the standard streams usable: those that are closed, and those that are not UTF-8.

    A closed one would give its number to the next file that is opened. A character that the
    encoding does not have is printed as an escape.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            mode = "r" if name == "stdin" else "w"
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # of UTF-8 every character has an encoding
            stream.reconfigure(errors="backslashreplace")
