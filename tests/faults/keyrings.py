"""The keys of the stores that are encrypted, in every process of the suite."""

from __future__ import annotations

import os

from agent_state.encryption import Keyring, MasterKeys

FOLDER = "AGENT_STATE_FAULTS_KEYRING"
"""The environment variable that names their folder: other processes inherit it."""
ENCRYPTS = "AGENT_STATE_FAULTS_ENCRYPTS"
"""Set, for the managers of writers that are killed, in every process of theirs."""


def given_keyring() -> Keyring | None:
    """The keyring of a writer that encrypts; None for one that does not."""
    return make_keyring() if os.environ.get(ENCRYPTS) else None


def make_keyring() -> Keyring:
    """It compresses nothing: the tests' large bodies are to be large on the disk."""
    return Keyring(os.environ[FOLDER], MasterKeys(lambda: [b"m" * 32]), compress_over=None)
