"""The command ``agent-state``: a state directory for people and scripts."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command of ``sys.argv``, and exit with its exit code."""
    _prepare_streams()
    raise SystemExit(_delivered(_run(sys.argv[1:])))


def _run(args: list[str]) -> int:
    if "_AGENT_STATE_COMPLETE" not in os.environ:
        if args == ["--version"]:
            return _print_version()
        quick = _quick(args)
        if quick is not None:
            return quick
    _show_logs()
    from agent_state.cli.app import run  # typer takes longer to import than ls to work

    return run(args)


def _delivered(code: int) -> int:
    """Write what is left of the output; the exit code.

    A reader that has left, as ``head`` does, is no error. The interpreter would end with 120.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        from agent_state.cli.output import MISUSE, discard, fail

        discard(sys.stdout)
        if code != MISUSE and not isinstance(error, BrokenPipeError):
            return fail(error)
    return code


def _quick(args: list[str]) -> int | None:
    """Do what needs no parser, and return the exit code; None for everything else."""
    from agent_state.cli.glance import quick_command
    from agent_state.cli.output import STOPPED, fail, print_error
    from agent_state.errors import AgentStateError

    work = quick_command(args)
    if work is None:
        return None
    try:
        return work()
    except KeyboardInterrupt:
        print_error("stopped")
        return STOPPED
    except (AgentStateError, OSError) as error:
        return fail(error)


def _show_logs() -> None:
    """Escape control characters in what is logged, where nobody has configured logging."""
    from logging import lastResort

    from agent_state.cli.output import LogFormatter

    if lastResort is not None:
        lastResort.setFormatter(LogFormatter())


def _print_version() -> int:
    from agent_state import __version__

    try:
        print(f"agent-state {__version__}")
    except OSError as error:  # stdout is unbuffered
        from agent_state.cli.output import fail

        return fail(error)
    return 0


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
