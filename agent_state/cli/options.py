"""The options and exit codes that the commands share: one word means the same everywhere."""

from __future__ import annotations

import os
import re
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_state.cli import glance
from agent_state.cli.output import MISUSE as MISUSE
from agent_state.cli.output import OK as OK
from agent_state.cli.output import PROBLEM as PROBLEM
from agent_state.errors import EncryptionKeyError

if TYPE_CHECKING:
    from agent_state.encryption import Keyring

STATE = Path(glance.STATE)
"""The default of ``--state``."""
WAIT_SECONDS = 60.0
"""The default of ``--wait``."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_seconds(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``15m``, ``2h`` or ``3d``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip(), re.ASCII)
    seconds = float(found[1]) * _UNITS[found[2] or "s"] if found else inf
    if seconds == inf:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 15m, 2h or 3d")
    return seconds


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a person wrote the option on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


StateOption = Annotated[
    Path,
    typer.Option(
        "--state", metavar="DIR", envvar=glance.STATE_VARIABLE, help="The state directory."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only report what would change; change nothing.")
]
WaitOption = Annotated[
    float,
    typer.Option("--wait", help="How many seconds a running server may take to answer.", min=0),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", help="At most so many.", min=1, show_default=False)
]
RecordsOption = Annotated[
    int, typer.Option("--limit", help="The number of newest records of a log.", min=1)
]
PriorityOption = Annotated[
    str | None, typer.Option("--priority", help="low, normal, high or urgent.", show_default=False)
]

KeyringOption = Annotated[
    Path | None,
    typer.Option(
        "--keyring",
        metavar="DIR",
        envvar=glance.KEYRING_VARIABLE,
        help="The folder of the data keys, for a state that is encrypted.",
        show_default=False,
    ),
]
MasterKeysOption = Annotated[
    Path | None,
    typer.Option(
        "--master-keys",
        metavar="FILE",
        envvar="AGENT_STATE_MASTER_KEYS_FILE",
        help="The master keys in base64, the newest first; else AGENT_STATE_MASTER_KEYS has them.",
        show_default=False,
    ),
]


class KeyOptions:
    """The options of the encryption keys that the command line has, before the command."""

    keyring: Path | None = None
    master_keys: Path | None = None


def given_keyring() -> Keyring | None:
    """The keyring that the options name; None if there is none.

    Raises ``MissingExtraError``.
    """
    if KeyOptions.keyring is None:
        return None
    from agent_state import encryption  # needs the extra

    file = KeyOptions.master_keys
    keys = encryption.MasterKeys
    master = keys.from_environment() if file is None else keys.from_file(file)
    return encryption.Keyring(KeyOptions.keyring, master)


def needed_keyring(*, exists: bool = False) -> Keyring:
    """``given_keyring``. Raises ``EncryptionKeyError`` without one.

    ``exists``: also for a folder that is not there, which is otherwise made with the first key.
    """
    keyring = given_keyring()
    if keyring is None:
        raise EncryptionKeyError(
            "give the keyring: agent-state --keyring DIR …, or AGENT_STATE_KEYRING"
        )
    if exists and not os.path.isdir(keyring.folder):  # noqa: PTH112  # as text, as everywhere
        raise EncryptionKeyError("there is no such keyring", path=keyring.folder)
    return keyring
