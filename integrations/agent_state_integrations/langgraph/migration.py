"""Brings the checkpoints of another saver into a state directory, and verifies them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agent_state import StatePersistenceManager, StateValidationError
from agent_state.clock import stamp
from agent_state.protocols import JsonObject
from agent_state_integrations.langgraph.saver import AgentStateSaver
from agent_state_integrations.langgraph.store import KIND, document_key, item_body
from agent_state_integrations.langgraph.values import ValueCodec


@dataclass(slots=True)
class StoredItem:
    """An item of another store, with its times and vectors."""

    namespace: tuple[str, ...]
    key: str
    value: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None
    ttl_minutes: float | None
    vectors: dict[str, list[float]] = field(default_factory=dict)
    """The vector of each indexed field."""


async def import_item(manager: StatePersistenceManager, item: StoredItem) -> None:
    """Store an item as it is, and read it back.

    One that is stored already stays. Raises ``StateValidationError`` for one that is stored with
    another content.
    """
    key = document_key((item.namespace, item.key))
    codec = ValueCodec(JsonPlusSerializer())
    body = item_body(codec, item.value, item.vectors)
    body |= {"created_at": stamp(item.created_at), "updated_at": stamp(item.updated_at)}
    if item.expires_at is not None:
        body |= {"expires_at": stamp(item.expires_at), "ttl_minutes": item.ttl_minutes}
    stored = await manager.load(KIND, key)
    if stored is None:
        await manager.save(KIND, key, body, expected=0)
        stored = await manager.load(KIND, key)
    found: JsonObject = stored.model_dump() if stored is not None else {}
    if found != body:
        raise StateValidationError("it is stored with another content", kind=KIND, key=key)


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
