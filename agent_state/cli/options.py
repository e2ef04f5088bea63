"""The options and exit codes that the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_state.errors import EncryptionKeyError

if TYPE_CHECKING:
    from agent_state.encryption import Keyring

OK, PROBLEM, MISUSE = 0, 1, 2
"""Exit codes: success; a problem was found; the command could not be carried out."""

StateOption = Annotated[
    Path,
    typer.Option("--state", metavar="DIR", envvar="AGENT_STATE_DIR", help="The state directory."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]

KeyringOption = Annotated[
    Path | None,
    typer.Option(
        "--keyring",
        metavar="DIR",
        envvar="AGENT_STATE_KEYRING",
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


def needed_keyring() -> Keyring:
    """``given_keyring``. Raises ``EncryptionKeyError`` without one."""
    keyring = given_keyring()
    if keyring is None:
        raise EncryptionKeyError(
            "give the keyring: agent-state --keyring DIR …, or AGENT_STATE_KEYRING"
        )
    return keyring
