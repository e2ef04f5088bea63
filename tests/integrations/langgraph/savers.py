"""Savers over each kind of store, and checkpoints to put into them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state_integrations.langgraph import AgentStateSaver

STATES = ("directory", "shared", "exclusive", "memory")


@asynccontextmanager
async def saver_on(state: str, directory: Path) -> AsyncIterator[AgentStateSaver]:
    """A saver on a directory, on an open manager, or on a store in memory."""
    if state == "directory":
        async with AgentStateSaver(directory) as saver:
            yield saver
    elif state == "memory":
        yield AgentStateSaver(MemoryStateStore())
    else:
        exclusive = state == "exclusive"
        async with StatePersistenceManager(directory, exclusive=exclusive) as manager:
            yield AgentStateSaver(manager)


def config_of(thread_id: str, namespace: str = "", checkpoint_id: str | None = None) -> Any:
    configurable = {"thread_id": thread_id, "checkpoint_ns": namespace}
    if checkpoint_id is not None:
        configurable["checkpoint_id"] = checkpoint_id
    return {"configurable": configurable}


def checkpoint_with(values: dict[str, Any], version: int) -> Checkpoint:
    """A checkpoint in which every channel has this version."""
    checkpoint = empty_checkpoint()
    checkpoint["id"] = str(uuid6(clock_seq=version))
    checkpoint["channel_values"] = values
    checkpoint["channel_versions"] = dict.fromkeys(values, f"{version:032}.1")
    return checkpoint


async def put(
    saver: AgentStateSaver, config: Any, values: dict[str, Any], version: int, **metadata: Any
) -> Any:
    checkpoint = checkpoint_with(values, version)
    described: Any = {"source": "loop", "step": version, "parents": {}, **metadata}
    return await saver.aput(config, checkpoint, described, checkpoint["channel_versions"])
