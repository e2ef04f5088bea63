"""Which instance a state directory is: an id of its own, for whoever keeps a copy of it.

It is in ``.mirror/instance.json``, which git ignores: a clone of a directory is another instance.
"""

from __future__ import annotations

import os
import secrets

from agent_state.errors import StateCorruptedError
from agent_state.serializers import canonical_json, parse_object
from agent_state.storage import fileio

FOLDER = ".mirror"
_FILE = f"{FOLDER}/instance.json"


def read(root: str) -> str | None:
    """The id of a directory; None when it has none. Raises ``StateCorruptedError``. Blocks."""
    path = f"{root}/{_FILE}"
    found = fileio.read_file(path)
    if found is None:
        return None
    ident = parse_object(found[0]).get("instance")
    if type(ident) is not str or not ident:
        raise StateCorruptedError("it does not say which instance this is", path=path)
    return ident


def write(root: str, ident: str) -> None:
    """Give a directory this id. Raises ``StorageError``. Blocks."""
    fileio.make_directories(root, FOLDER, sync=True)
    ignore = f"{root}/{FOLDER}/.gitignore"
    if fileio.stat_file(ignore) is None:
        fileio.replace_file(ignore, b"*\n", sync=True)
    fileio.replace_file(f"{root}/{_FILE}", canonical_json({"instance": ident}) + b"\n", sync=True)


def ensure(root: str) -> str:
    """The id of a directory, made now if it has none. Blocks."""
    ident = read(root)
    if ident is None:
        ident = secrets.token_hex(8)
        write(root, ident)
        ident = read(root) or ident  # of two processes that made one, the last has won
    return ident


def is_fresh(root: str) -> bool:
    """Whether there is nothing in a directory that a copy could be mixed with. Blocks."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return read(root) is None and all(name.startswith(".") for name in names)
