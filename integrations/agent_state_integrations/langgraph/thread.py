"""One thread of LangGraph, as the log of its records tells it.

A thread is one log. A record is a checkpoint, or the writes of one task for a checkpoint. A
checkpoint's record has the values of the channels that changed; a list that grew is stored as
what was appended. ``ThreadIndex.apply`` takes the records in their order, so every process sees
the same thread.

Two processes may run one thread. A record that builds on the newest checkpoint claims so
(``"claims": true``). If another writer has added a checkpoint meanwhile, the record is void: for
every reader, and its writer gets ``CheckpointConflictError``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from agent_state import RevisionConflictError
from agent_state.protocols import JsonObject
from agent_state_integrations.langgraph.values import (
    EncodedValue,
    ListValue,
    StoredValue,
    WholeValue,
    encoded,
    list_from_json,
    list_to_json,
    list_value,
)


class CheckpointConflictError(RevisionConflictError):
    """Another process has gone on with the thread; this one's record was not added."""


@dataclass(slots=True)
class StoredCheckpoint:
    """A checkpoint without its values decoded."""

    checkpoint_id: str
    parent: str | None
    state: bytes
    """The element of the checkpoint without its values."""
    metadata: bytes
    """The element of its metadata."""
    versions: Mapping[str, Any]
    """The version of each channel."""
    values: dict[str, StoredValue]
    run_id: str | None
    missing: frozenset[str] = frozenset()
    """Channels whose values cannot be read: the record that held them is damaged."""
    deltas: frozenset[str] = frozenset()
    """Channels that are rebuilt from the writes of earlier checkpoints."""


@dataclass(frozen=True, slots=True)
class StoredWrite:
    """One pending write of a task."""

    task_id: str
    index: int
    path: str
    channel: str
    element: bytes

    @property
    def order(self) -> tuple[str, str, int]:
        """The order in which LangGraph applies the writes of a step."""
        return self.path, self.task_id, self.index


@dataclass(slots=True)
class ThreadNamespace:
    """The checkpoints of one namespace of a thread, which is one graph or subgraph."""

    checkpoints: dict[str, StoredCheckpoint] = field(default_factory=dict)
    writes: dict[str, dict[tuple[str, int], StoredWrite]] = field(default_factory=dict)
    """By checkpoint, then by task and index."""
    authors: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    """Who wrote the results of a task of a checkpoint, and in which record."""
    by_version: dict[tuple[str, str], StoredValue] = field(default_factory=dict)
    """The newest value of each version of each channel."""
    tip: tuple[str, str] | None = None
    """The checkpoint that was added last, and its writer."""

    @property
    def newest(self) -> str | None:
        """The id of the newest checkpoint: ids sort by time."""
        return max(self.checkpoints, default=None)

    def writes_of(self, checkpoint_id: str) -> list[StoredWrite]:
        """The pending writes of a checkpoint, in the order in which they apply."""
        return sorted(self.writes.get(checkpoint_id, {}).values(), key=lambda each: each.order)

    def ancestors(self, checkpoint_id: str) -> Iterator[StoredCheckpoint]:
        """The checkpoints that one was made from, newest first."""
        entry = self.checkpoints.get(checkpoint_id)
        seen = {checkpoint_id}
        while entry is not None and entry.parent is not None and entry.parent not in seen:
            seen.add(entry.parent)
            entry = self.checkpoints.get(entry.parent)
            if entry is not None:
                yield entry

    def needed_by(self, checkpoint_id: str) -> set[str]:
        """A checkpoint and the ancestors that its delta channels are rebuilt from."""
        needed = {checkpoint_id}
        entry = self.checkpoints[checkpoint_id]
        open_channels = entry.deltas - entry.values.keys()
        for ancestor in self.ancestors(checkpoint_id) if open_channels else ():
            needed.add(ancestor.checkpoint_id)
            open_channels -= ancestor.values.keys()
            if not open_channels:
                break
        return needed


class ThreadIndex:
    """What is known of one thread: the records up to ``last_seq``."""

    def __init__(self) -> None:
        self.last_seq = 0
        self.last_record: JsonObject | bytes = {}
        """The record with that number, or its JSON."""
        self.void: set[int] = set()
        """The numbers of records that another writer had overtaken."""
        self.namespaces: dict[str, ThreadNamespace] = {}

    def namespace(self, name: str) -> ThreadNamespace:
        """The namespace, made if it is new."""
        return self.namespaces.setdefault(name, ThreadNamespace())

    def knows(self, namespace: str, versions: Mapping[str, Any], channel: str) -> bool:
        """Whether the value of this version of a channel is stored."""
        found = self.namespaces.get(namespace)
        return found is not None and (channel, _version(versions, channel)) in found.by_version

    # -- making records ------------------------------------------------------------------------

    def checkpoint_record(
        self,
        namespace: str,
        checkpoint: StoredCheckpoint,
        values: Mapping[str, EncodedValue | None],
    ) -> JsonObject:
        """The record of a checkpoint. A value of None: its channel's version has it."""
        known = self.namespaces.get(namespace) or ThreadNamespace()
        parent = known.checkpoints.get(checkpoint.parent or "")
        record: JsonObject = {
            "checkpoint": checkpoint.state,
            "id": checkpoint.checkpoint_id,
            "metadata": checkpoint.metadata,
            "ns": namespace,
            "op": "checkpoint",
            "parent": checkpoint.parent,
            "values": {},
            "versions": dict(checkpoint.versions),
        }
        if checkpoint.run_id is not None:
            record["run_id"] = checkpoint.run_id
        if checkpoint.deltas:
            record["deltas"] = sorted(checkpoint.deltas)
        same = []
        for channel, value in values.items():
            stored = known.by_version.get((channel, _version(checkpoint.versions, channel)))
            if stored is not None and (value is None or value == encoded(stored)):
                same.append(channel)
            elif value is not None:
                record["values"][channel] = _stored_form(parent, channel, value)
        if same:
            record["same"] = sorted(same)
        return record

    # -- taking records ------------------------------------------------------------------------

    def ends_with(self, record: JsonObject) -> bool:
        """Whether this is the last record."""
        if isinstance(self.last_record, bytes):
            self.last_record = orjson.loads(self.last_record)
        return self.last_record == record

    def apply(self, seq: int, record: JsonObject, body: bytes | None = None) -> bool:
        """Take the next record; False if it is void. ``body``: its JSON, if it was made here."""
        self.last_seq, self.last_record = seq, record if body is None else body
        namespace = self.namespace(record["ns"])
        if record["op"] == "writes":
            accepted = _take_writes(namespace, seq, record)
        else:
            accepted = _take_checkpoint(namespace, record)
        if not accepted:
            self.void.add(seq)
        return accepted


def writes_record(
    namespace: str,
    checkpoint_id: str,
    task_id: str,
    task_path: str,
    writes: Sequence[tuple[int, str, bytes]],
) -> JsonObject:
    """The record of the writes of a task: index, channel and element of each."""
    return {
        "id": checkpoint_id,
        "ns": namespace,
        "op": "writes",
        "path": task_path,
        "task": task_id,
        "writes": [[index, channel, element] for index, channel, element in writes],
    }


def record_body(record: JsonObject) -> bytes:
    """The canonical JSON of a record, in which elements are bytes."""
    return orjson.dumps(record, default=orjson.Fragment, option=orjson.OPT_SORT_KEYS)


def rewritten(index: ThreadIndex, keep: Mapping[str, Collection[str]]) -> list[JsonObject]:
    """The records of a new log that has these checkpoints of each namespace, and their writes."""
    target, records = ThreadIndex(), []

    def add(record: JsonObject) -> None:
        records.append(record)
        target.apply(len(records), record)

    for name, ids in keep.items():
        namespace = index.namespaces[name]
        for checkpoint_id, entry in namespace.checkpoints.items():
            if checkpoint_id in ids:
                values = {channel: encoded(value) for channel, value in entry.values.items()}
                add(target.checkpoint_record(name, entry, values))
        for checkpoint_id in ids:
            by_task: dict[tuple[str, str], list[tuple[int, str, bytes]]] = {}
            for write in namespace.writes_of(checkpoint_id):
                task = by_task.setdefault((write.task_id, write.path), [])
                task.append((write.index, write.channel, write.element))
            for (task_id, path), writes in by_task.items():
                add(writes_record(name, checkpoint_id, task_id, path, writes))
    return records


def _take_checkpoint(namespace: ThreadNamespace, record: JsonObject) -> bool:
    parent, writer = record["parent"], record.get("writer", "")
    if record.get("claims") and _is_overtaken(namespace, parent, writer):
        return False
    versions: Mapping[str, Any] = record["versions"]
    values: dict[str, StoredValue] = {}
    missing = set()
    for channel in record.get("same", ()):
        stored = namespace.by_version.get((channel, _version(versions, channel)))
        if stored is None:
            missing.add(channel)
        else:
            values[channel] = stored
    for channel, form in record["values"].items():
        value = _value_of(namespace, channel, form)
        if value is None:
            missing.add(channel)
            continue
        values[channel] = namespace.by_version[channel, _version(versions, channel)] = value
    checkpoint_id = record["id"]
    namespace.checkpoints[checkpoint_id] = StoredCheckpoint(
        checkpoint_id,
        parent,
        _element(record["checkpoint"]),
        _element(record["metadata"]),
        versions,
        values,
        record.get("run_id"),
        frozenset(missing),
        frozenset(record.get("deltas", ())),
    )
    namespace.tip = (checkpoint_id, writer)
    return True


def _take_writes(namespace: ThreadNamespace, seq: int, record: JsonObject) -> bool:
    checkpoint_id, task_id, writer = record["id"], record["task"], record.get("writer", "")
    author = namespace.authors.get((checkpoint_id, task_id))
    if record.get("claims"):
        if _is_overtaken(namespace, checkpoint_id, writer):
            return False
        if author is not None and author[0] != writer and author[1] > record["after"]:
            return False
    found = namespace.writes.setdefault(checkpoint_id, {})
    for index, channel, content in record["writes"]:
        # The results of a task are written once; an error or an interrupt replaces the one before.
        if index < 0 or (task_id, index) not in found:
            found[task_id, index] = StoredWrite(
                task_id, index, record["path"], channel, _element(content)
            )
            if index >= 0:
                namespace.authors[checkpoint_id, task_id] = (writer, seq)
    return True


def _is_overtaken(namespace: ThreadNamespace, claimed: str | None, writer: str) -> bool:
    tip = namespace.tip
    return tip is not None and tip[0] != claimed and tip[1] != writer


def _stored_form(
    parent: StoredCheckpoint | None, channel: str, value: EncodedValue
) -> JsonObject | bytes:
    if isinstance(value, bytes):
        return value
    base = parent.values.get(channel) if parent is not None else None
    if parent is None or not isinstance(base, ListValue) or not base.starts(value):
        return list_to_json(value)
    appended = list_to_json(value[base.count :])
    return {"base": parent.checkpoint_id, "keep": base.count, **appended}


def _value_of(
    namespace: ThreadNamespace, channel: str, form: JsonObject | bytes
) -> StoredValue | None:
    """The value in a record; None if it builds on one that is missing."""
    if isinstance(form, bytes) or "items" not in form:
        return WholeValue(_element(form))
    elements = list_from_json(form)
    if "base" not in form:
        return list_value(elements)
    parent = namespace.checkpoints.get(form["base"])
    base = parent.values.get(channel) if parent is not None else None
    if not isinstance(base, ListValue) or base.count != form["keep"]:
        return None
    return base.extended(base.count, elements)


def _version(versions: Mapping[str, Any], channel: str) -> str:
    return repr(versions.get(channel))


def _element(content: JsonObject | bytes) -> bytes:
    if isinstance(content, bytes):  # in a record that was made here
        return content
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
