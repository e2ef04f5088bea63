#!/usr/bin/env bash
# py-key-value-aio 0.5.0: two long keys are one entry of a FileTreeStore with its V1 strategies, the later in the place of the earlier.
#
# Guess before looking: the name of a file for a key that is changed ends with a hash of the key, whether a character was replaced
# or the key was cut because it is too long; "a hash fragment is added when sanitization occurs to prevent collisions", says the class.
# Seen: the hash is added when a character was replaced. A key of letters and digits alone that is cut gets the prefix `S_` and no hash,
# so all keys with the same first 248 characters are one file: `put` of the second replaces the first, and `get` of a key
# that was never put gives an entry. With one character that must be replaced, or in MemoryStore, the keys are two entries.
# Met: `agent-state import key-value`, which makes the names of files again to know which key an entry had.
#
# Output seen:
#   keys                             MemoryStore     FileTreeStore
#   100 characters, and one more     first second    first second
#   300 characters, and one more     first second    second second
#   300 with a colon, and one more   first second    first second
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'py-key-value-aio[filetree,memory]==0.5.0'
cd "$folder"
cat >keys.py <<'PYTHON'
import asyncio
from importlib.metadata import version
from pathlib import Path

from key_value.aio.stores.filetree import (
    FileTreeStore,
    FileTreeV1CollectionSanitizationStrategy,
    FileTreeV1KeySanitizationStrategy,
)
from key_value.aio.stores.memory import MemoryStore

KEYS = {
    "100 characters, and one more": "a" * 100,
    "300 characters, and one more": "a" * 300,
    "300 with a colon, and one more": "a:" + "a" * 298,
}


async def both(store, key):
    await store.put(key, {"is": "first"})
    await store.put(key + "b", {"is": "second"})
    return " ".join([(await store.get(each))["is"] for each in (key, key + "b")])


async def main():
    folder = Path("entries").absolute()
    folder.mkdir()
    tree = FileTreeStore(
        data_directory=folder,
        key_sanitization_strategy=FileTreeV1KeySanitizationStrategy(folder),
        collection_sanitization_strategy=FileTreeV1CollectionSanitizationStrategy(folder),
    )
    print("py-key-value-aio", version("py-key-value-aio"))
    print(f"{'keys':32} {'MemoryStore':15} FileTreeStore")
    seen = []
    for title, key in KEYS.items():
        memory, files = await both(MemoryStore(), key), await both(tree, key)
        print(f"{title:32} {memory:15} {files}")
        seen.append((memory, files))
    two = "first second"
    assert seen == [(two, two), (two, "second second"), (two, two)], seen


asyncio.run(main())
PYTHON
venv/bin/python keys.py
