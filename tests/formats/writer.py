"""Writes a directory in the format of today, as a file of ``tests/formats``.

``python tests/formats/writer.py NAME`` writes ``NAME.json``: a directory that was closed, one whose
owner was killed with changes in its journal, one that is encrypted, and what is in each. It is
called when the format changes, once, and the file is never changed again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agent_state import StatePersistenceManager

HERE = Path(__file__).parent
ALICE = {"agent_id": "alice", "agent_type": "researcher", "status": "active"}
LARGE = {"text": "ü", "words": {f"word-{number:03d}": number for number in range(400)}}
TURNS = [
    {"role": "user" if number % 2 else "assistant", "content": f"turn {number} " + "ü" * 200}
    for number in range(24)
]
TALKER = {"agent_id": "talker", "context": {"conversation_history": TURNS}}
DOCUMENTS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("agents", ["alice"], {**ALICE, "context": {"working_memory": {"read": 2}}}),
    ("agents", ["Bob/№ 7"], {"agent_id": "Bob/№ 7", "status": "stopped"}),
    (
        "tasks",
        ["alice", "t1"],
        {
            "task_id": "t1",
            "agent_id": "alice",
            "name": "index",
            "status": "pending",
            "payload": {"doc": "a b"},
        },
    ),
    (
        "mail",
        ["alice", "m1"],
        {
            "message_id": "m1",
            "from_agent": "bob",
            "to_agent": "alice",
            "subject": "hi",
            "body": "there",
            "status": "unread",
        },
    ),
    ("agents", ["talker"], TALKER),
    ("sleep", ["alice"], {"agent_id": "alice", "sleep_until": "2999-01-01T00:00:00.000000Z"}),
    ("system", ["settings"], {"limit": 3}),
    ("notes", ["alice", "2026"], {"text": "ü", "n": [1, None, 1.5]}),
    ("notes", ["alice", "late"], {"text": "in the journal"}),
    ("notes", ["alice", "large"], LARGE | {"edition": 3}),
]
"""What every directory holds in the end; those of before 2026-12 have no large document, and those
of before 2026-12-02 no long conversation."""
LOGS = [("system", ["events"], [{"number": number} for number in (1, 2, 3)])]
LATE = (
    ("agents", ["alice"]),
    ("agents", ["talker"]),
    ("notes", ["alice", "late"]),
    ("notes", ["alice", "large"]),
)
MASTER = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n"
"""A master key for tests alone."""


async def write(root: Path, keys: Path | None, *, kill: bool) -> None:
    """Write all, the last changes into the journal alone; then close, or die."""
    keyring: Any = None
    if keys is not None:
        from agent_state.encryption import Keyring, MasterKeys

        keyring = Keyring(keys / "keyring", MasterKeys.from_file(keys / "master-keys"))
    async with StatePersistenceManager(root, exclusive=True, encryption=keyring) as manager:
        early = {**ALICE, "context": {"working_memory": {"read": 1}}}
        await manager.save("agents", ("alice",), early)
        for kind, key, state in DOCUMENTS:
            if (kind, key) not in LATE:
                await manager.save(kind, tuple(key), state)
        await manager.save("notes", ("alice", "large"), LARGE)
        for kind, key, records in LOGS:
            for record in records[:-1]:
                await manager.append(kind, tuple(key), record)
        early = {**TALKER, "context": {"conversation_history": TURNS[:20]}}
        await manager.save("agents", ("talker",), early)
        await manager.flush()
        for edition in (1, 2):  # the second of these is a patch in the journal
            await manager.save("notes", ("alice", "large"), LARGE | {"edition": edition})
        for kind, key, state in DOCUMENTS:
            if (kind, key) in LATE:
                await manager.save(kind, tuple(key), state)
        for kind, key, records in LOGS:
            await manager.append(kind, tuple(key), records[-1])
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)


def pack(root: Path) -> dict[str, str]:
    """The files of a directory, without its locks."""
    return {
        str(path.relative_to(root)): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


def unpack(files: dict[str, str], root: Path) -> None:
    """Write files as ``pack`` has read them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def written(folder: Path) -> dict[str, Any]:
    """What today's code writes, each in a process of its own."""
    keys = folder / "keys"
    keys.mkdir(parents=True)
    (keys / "master-keys").write_text(MASTER)
    (keys / "master-keys").chmod(0o600)
    found: dict[str, Any] = {"documents": DOCUMENTS, "logs": LOGS}
    for end in ("closed", "killed", "encrypted"):
        given = str(keys) if end == "encrypted" else ""
        command = [sys.executable, __file__, str(folder / end), end, given]
        done = subprocess.run(command, cwd=HERE.parents[1], check=False)
        assert done.returncode == (-signal.SIGKILL if end == "killed" else 0)
        found[end] = pack(folder / end)
    found["keys"] = pack(keys)
    return found


if __name__ == "__main__":
    if len(sys.argv) == 2:
        with tempfile.TemporaryDirectory() as temporary:
            text = json.dumps(written(Path(temporary)), indent=1, ensure_ascii=False)
        (HERE / f"{sys.argv[1]}.json").write_text(f"{text}\n")
    else:
        _, state, end, given = sys.argv
        asyncio.run(write(Path(state), Path(given) if given else None, kill=end == "killed"))
