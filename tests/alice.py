"""A state directory with one good agent, for tests of what may happen beside it.

The fixture ``alices`` of ``tests.conftest`` opens it, shared and exclusive.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from agent_state import AgentState, StatePersistenceManager

GOOD: dict[str, Any] = {"agent_id": "alice", "status": "idle"}


def alice(tmp_path: Path) -> Path:
    """Her file."""
    return tmp_path / "state" / "agents" / "alice.json"


def damage(path: Path, data: bytes) -> None:
    """Write, and make it look old: a fresh file is given a moment, as an editor may be at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (1_000_000_000, 1_000_000_000))


async def unharmed(manager: StatePersistenceManager) -> None:
    """She is as she was saved."""
    assert await manager.load_agent_state("alice") == AgentState(**GOOD)
