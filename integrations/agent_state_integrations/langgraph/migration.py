"""Brings the checkpoints of another saver into a state directory, and verifies them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple

from agent_state import StateValidationError
from agent_state_integrations.langgraph.saver import AgentStateSaver


def import_checkpoints(checkpoints: Iterable[CheckpointTuple], saver: AgentStateSaver) -> int:
    """Store checkpoints with their pending writes; returns how many.

    ``checkpoints``: those of any saver, in any order, such as ``SqliteSaver(...).list(None)``. All
    are held in memory. Each is read back and compared afterwards: one that differs raises
    ``StateValidationError``. What was stored before stays, so a second run changes nothing.
    """
    found = sorted(checkpoints, key=lambda each: str(each.checkpoint["id"]))
    for each in found:
        if _stored(saver, each.config) == _content(each):
            continue
        versions = each.checkpoint["channel_versions"]
        config = saver.put(_parent_of(each), each.checkpoint, each.metadata, versions)
        for number, (task_id, writes) in enumerate(_by_task(each)):
            # The order of the tasks is that of their paths, which no saver gives away.
            saver.put_writes(config, writes, task_id, f"{number:08}")
    for each in found:
        if _stored(saver, each.config) != _content(each):
            place = each.config["configurable"]
            raise StateValidationError(
                f"checkpoint {place['checkpoint_id']} of thread {place['thread_id']} "
                "does not come back as it was"
            )
    return len(found)


def _by_task(each: CheckpointTuple) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    for task_id, writes in groupby(each.pending_writes or (), key=lambda write: write[0]):
        yield task_id, [(channel, value) for _, channel, value in writes]


def _parent_of(each: CheckpointTuple) -> RunnableConfig:
    """The config that a checkpoint was put with: that of its parent, or of its thread."""
    place = each.config["configurable"]
    config: RunnableConfig = {
        "configurable": {
            "thread_id": place["thread_id"],
            "checkpoint_ns": place.get("checkpoint_ns", ""),
        }
    }
    if each.parent_config is not None:
        parent = each.parent_config["configurable"]["checkpoint_id"]
        config["configurable"]["checkpoint_id"] = parent
    return config


def _content(each: CheckpointTuple) -> tuple[Any, ...]:
    parent = each.parent_config["configurable"]["checkpoint_id"] if each.parent_config else None
    return each.checkpoint, dict(each.metadata), parent, list(each.pending_writes or ())


def _stored(saver: AgentStateSaver, config: RunnableConfig) -> tuple[Any, ...] | None:
    found = saver.get_tuple(config)
    return _content(found) if found is not None else None
