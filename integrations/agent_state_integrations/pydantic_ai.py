"""A step store for the Pydantic AI harness: runs, events, snapshots and the ledger of tool effects.

Needs the extra ``pydantic-ai``. See ``docs/integrations/pydantic-ai.md``.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter

from agent_state import RevisionConflictError, StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, as_segment
from agent_state.errors import Key, needs_extra
from agent_state.manager import LogEntry
from agent_state.protocols import Durability, JsonObject

with needs_extra("pydantic-ai", "pydantic_ai", "pydantic_ai_harness"):
    from pydantic_ai.messages import ModelMessagesTypeAdapter
    from pydantic_ai_harness.step_persistence import (
        ContinuableSnapshot,
        RunRecord,
        StepEvent,
        ToolEffectRecord,
    )

KIND = "pydantic_ai_runs"
"""The kind of the runs, and of the logs and tool effects below each."""
_RUNS_IN_MEMORY = 256

_RUN = TypeAdapter(RunRecord)
_EVENT = TypeAdapter(StepEvent)
_EFFECT = TypeAdapter(ToolEffectRecord)
_SNAPSHOT_FIELDS = (
    "run_id",
    "step_index",
    "conversation_id",
    "parent_run_id",
    "agent_name",
    "state",
    "idempotency_key",
)


@dataclass(slots=True)
class _SnapshotLog:
    """The snapshots of a run, up to a record of their log."""

    seq: int = 0
    messages: list[JsonObject] = field(default_factory=list)
    """Those of the last snapshot."""


class AgentStateStepStore:
    """Keeps the steps of Pydantic AI's agents in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.

    A snapshot is stored as the messages that the one before did not have. A tool effect that has
    been completed is not opened again by a late ``started``.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._known: OrderedDict[str, _SnapshotLog] = OrderedDict()

    async def __aenter__(self) -> Self:
        await self._access.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close a directory that was opened here."""
        await self._access.close()

    # -- runs and events -----------------------------------------------------------------------

    async def register_run(self, record: RunRecord) -> None:
        """Store a run; one of the same id is replaced."""
        body, key = _RUN.dump_python(record, mode="json"), _run_key(record.run_id)
        await self._access.run(lambda m: m.save(KIND, key, body))

    async def get_run(self, *, run_id: str) -> RunRecord | None:
        found = await self._access.run(lambda m: m.load(KIND, _run_key(run_id)))
        return _RUN.validate_python(found.model_dump()) if found is not None else None

    async def list_runs(
        self, *, parent_run_id: str | None = None, conversation_id: str | None = None
    ) -> list[RunRecord]:
        """The matching runs, the oldest first. A time without a zone counts as UTC."""
        bodies = await self._access.run(lambda m: _bodies(m, (), 1))
        runs = [_RUN.validate_python(body) for body in bodies]
        found = [
            run
            for run in runs
            if parent_run_id in (None, run.parent_run_id)
            and conversation_id in (None, run.conversation_id)
        ]
        return sorted(found, key=lambda run: _aware(run.started_at))

    async def append_event(self, event: StepEvent) -> None:
        """Append an event; a no-op if the run has one with its idempotency key."""
        body, log = _EVENT.dump_python(event, mode="json"), _log(event.run_id, "events")
        dedupe_key = event.idempotency_key
        await self._access.run(lambda m: m.append(KIND, log, body, dedupe_key=dedupe_key))

    async def list_events(self, *, run_id: str) -> list[StepEvent]:
        records = await self._access.run(lambda m: _records(m, _log(run_id, "events")))
        return [_EVENT.validate_python(entry.record) for entry in records]

    # -- snapshots -----------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: ContinuableSnapshot) -> None:
        """Store a snapshot; a no-op if the run has one with its idempotency key."""
        messages = ModelMessagesTypeAdapter.dump_python(snapshot.messages, mode="json")
        body = {name: getattr(snapshot, name) for name in _SNAPSHOT_FIELDS}
        body["timestamp"] = snapshot.timestamp.isoformat()
        await self._access.run(lambda m: self._save(m, body, messages))

    async def latest_snapshot(
        self, *, run_id: str, include_interrupted: bool = False
    ) -> ContinuableSnapshot | None:
        found = await self.list_snapshots(run_id=run_id, include_interrupted=include_interrupted)
        return found[-1] if found else None

    async def list_snapshots(
        self, *, run_id: str, include_interrupted: bool = False
    ) -> list[ContinuableSnapshot]:
        """The snapshots of a run in the order in which they were saved."""
        records = await self._access.run(lambda m: _records(m, _log(run_id, "snapshots")))
        found, messages = [], list[JsonObject]()
        for entry in records:
            record = entry.record
            messages = [*messages[: record["keep"]], *record["messages"]]
            if include_interrupted or record["snapshot"]["state"] == "complete":
                fields = dict(record["snapshot"])
                fields["timestamp"] = datetime.fromisoformat(fields["timestamp"])
                restored = ModelMessagesTypeAdapter.validate_python(messages)
                found.append(ContinuableSnapshot(messages=restored, **fields))
        return found

    # -- tool effects --------------------------------------------------------------------------

    async def record_tool_effect(self, record: ToolEffectRecord) -> None:
        """Store what is known of a tool call; ``started`` after ``completed`` is a no-op."""
        body, key = _EFFECT.dump_python(record, mode="json"), _effect_key(record)
        await self._access.run(lambda m: _record_effect(m, key, body))

    async def get_tool_effect(self, *, run_id: str, tool_call_id: str) -> ToolEffectRecord | None:
        key = (*_run_key(run_id), "effects", as_segment(tool_call_id))
        found = await self._access.run(lambda m: m.load(KIND, key))
        return _EFFECT.validate_python(found.model_dump()) if found is not None else None

    async def list_unresolved_tool_effects(self, *, run_id: str) -> list[ToolEffectRecord]:
        """The calls of which it is not known how they ended, the oldest first."""
        prefix = (*_run_key(run_id), "effects")
        bodies = await self._access.run(lambda m: _bodies(m, prefix, 3))
        found = [_EFFECT.validate_python(body) for body in bodies if body["status"] == "started"]
        return sorted(found, key=lambda each: (_aware(each.started_at), each.tool_call_id))

    async def _save(
        self, manager: StatePersistenceManager, body: JsonObject, messages: list[JsonObject]
    ) -> None:
        run_id = body["run_id"]
        log = _log(run_id, "snapshots")
        async with manager.lock(KIND, log):
            known = self._known.setdefault(run_id, _SnapshotLog())
            self._known.move_to_end(run_id)
            if len(self._known) > _RUNS_IN_MEMORY:
                self._known.popitem(last=False)
            for entry in await _records(manager, log, after=known.seq):
                known.seq = entry.seq
                kept = known.messages[: entry.record["keep"]]
                known.messages = [*kept, *entry.record["messages"]]
            keep = _common(known.messages, messages)
            record = {"keep": keep, "messages": messages[keep:], "snapshot": body}
            key = body["idempotency_key"]
            seq = await manager.append(KIND, log, record, dedupe_key=key)
            if seq > known.seq:
                known.seq, known.messages = seq, messages


def _run_key(run_id: str) -> Key:
    return (as_segment(run_id),)


def _log(run_id: str, name: str) -> Key:
    return (*_run_key(run_id), name)


def _effect_key(record: ToolEffectRecord) -> Key:
    return (*_run_key(record.run_id), "effects", as_segment(record.tool_call_id))


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _common(one: Sequence[JsonObject], other: Sequence[JsonObject]) -> int:
    """How many messages both begin with."""
    count = 0
    for first, second in zip(one, other, strict=False):
        if first != second:
            break
        count += 1
    return count


async def _records(manager: StatePersistenceManager, log: Key, *, after: int = 0) -> list[LogEntry]:
    async with aclosing(manager.read_log(KIND, log, after=after)) as records:
        return [record async for record in records]


async def _bodies(manager: StatePersistenceManager, prefix: Key, length: int) -> list[Any]:
    return [
        stored.state.model_dump()
        async for stored in manager.scan(KIND, prefix)
        if len(stored.key) == length
    ]


async def _record_effect(manager: StatePersistenceManager, key: Key, body: JsonObject) -> None:
    while True:
        stored = await manager.load_with_revision(KIND, key)
        before = stored.state.model_dump() if stored is not None else {}
        if before.get("status") == "completed" and body["status"] == "started":
            return
        try:
            revision = stored.revision if stored is not None else 0
            await manager.save(KIND, key, body, expected=revision)
        except RevisionConflictError:
            await asyncio.sleep(0)  # another writer was first: look again
            continue
        return
