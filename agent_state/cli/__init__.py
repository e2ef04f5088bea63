"""The command ``agent-state``: a state directory as a person, or a script, sees it.

Needs the extra ``cli`` (typer and rich); nothing else in the package does.
"""

from __future__ import annotations

import sys

from agent_state.errors import MissingExtraError


def main() -> None:
    """Run the command that ``sys.argv`` asks for, and leave with its exit code."""
    try:
        import rich  # noqa: F401  # asked for here, so that its absence is said well
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"agent-state: {MissingExtraError('cli', str(error.name))}", file=sys.stderr)
        raise SystemExit(2) from None

    from agent_state.cli.app import run  # needs what was just looked for

    raise SystemExit(run(sys.argv[1:]))
