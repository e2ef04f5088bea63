"""The command ``agent-state``: a state directory for people and scripts.

It needs the extra ``cli`` (typer and rich); the other packages do not.
"""

from __future__ import annotations

import sys

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
    from agent_state.cli.output import prepare_streams

    prepare_streams()
    raise SystemExit(run(sys.argv[1:]))
