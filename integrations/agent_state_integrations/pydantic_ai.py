"""A step store for the Pydantic AI harness: runs, events, snapshots and the ledger of tool effects.

Needs the extra ``pydantic-ai``. See ``docs/integrations/pydantic-ai.md``.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, TypeAlias, TypeVar

import typer
from pydantic import TypeAdapter

from agent_state import (
    AgentStateError,
    MemoryStateStore,
    RevisionConflictError,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.access import StateAccess, StateLocation, as_segment
from agent_state.cli.options import STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, show_import
from agent_state.errors import Key, needs_extra
from agent_state.manager import LogEntry
from agent_state.protocols import Durability, JsonObject

with needs_extra("pydantic-ai", "pydantic_ai", "pydantic_ai_harness"):
    from pydantic_ai.messages import ModelMessagesTypeAdapter
    from pydantic_ai_harness.step_persistence import (
        ContinuableSnapshot,
        FileStepStore,
        RunRecord,
        SqliteStepStore,
        StepEvent,
        ToolEffectRecord,
    )

KIND = "pydantic_ai_runs"
"""The kind of the runs, and of the logs and tool effects below each."""
_RUNS_IN_MEMORY = 256

T = TypeVar("T")

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


# -- agent-state import pydantic-ai --------------------------------------------------------------

_RUN_FILES = ("run.json", "events.jsonl", "tool_effects.jsonl", "snapshots")
"""What ``FileStepStore`` may have of a run."""
_TheirStore: TypeAlias = FileStepStore | SqliteStepStore


@dataclass(slots=True)
class StepImport:
    """What was brought over from a store of the harness."""

    runs: int = 0
    events: int = 0
    snapshots: int = 0
    effects: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Runs that could not be brought over whole, with the reason."""


async def import_steps(
    source: Path, store: AgentStateStepStore, *, dry_run: bool = False
) -> StepImport:
    """Bring over the runs of a ``FileStepStore`` or ``SqliteStepStore``, and read them back.

    ``source``: its directory or database, which is left as it is; a database is copied into memory.
    A run of which the beginning is stored here is completed; one with another content is refused.
    ``dry_run``: only count. Raises ``StateNotFoundError`` for anything else.
    """
    report = StepImport()
    theirs, effects = await asyncio.to_thread(_open_source, source)
    for run_id, calls in sorted(effects.items()):
        try:
            content = await _read_run(run_id, calls, theirs)
            report.runs += 1
            report.events += len(content.events)
            report.snapshots += len(content.snapshots)
            report.effects += len(content.effects)
            if not dry_run:
                await _bring_run(content, store)
        except (AgentStateError, LookupError, TypeError, ValueError) as error:
            report.refused[run_id] = str(error)
    return report


def _open_source(source: Path) -> tuple[_TheirStore, dict[str, list[str]]]:
    """A store of the harness, and for each of its runs the calls whose effects it has."""
    if source.is_dir():
        # Beside the runs there is the folder of their media; a run may be called so, too.
        folders = [
            each for each in source.iterdir() if any((each / name).exists() for name in _RUN_FILES)
        ]
        return FileStepStore(source), {each.name: _calls_in(each) for each in folders}
    memory = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    try:
        with closing(
            sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)
        ) as database:
            database.backup(memory)
        effects: dict[str, list[str]] = {
            run_id: []
            for (run_id,) in memory.execute(
                "SELECT run_id FROM runs UNION SELECT run_id FROM events"
                " UNION SELECT run_id FROM snapshots UNION SELECT run_id FROM tool_effects"
            )
        }
        for run_id, call in memory.execute("SELECT run_id, tool_call_id FROM tool_effects"):
            effects[run_id].append(call)
    except sqlite3.Error as error:
        memory.close()
        raise StateNotFoundError(f"no runs can be read: {error}", path=source) from error
    return SqliteStepStore(connection=memory), effects


def _calls_in(folder: Path) -> list[str]:
    path = folder / "tool_effects.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [*dict.fromkeys(json.loads(line)["tool_call_id"] for line in lines if line.strip())]


@dataclass(frozen=True, slots=True)
class _RunContent:
    """A run with all that a store of the harness has of it."""

    run_id: str
    run: RunRecord | None
    events: Sequence[StepEvent]
    snapshots: Sequence[ContinuableSnapshot]
    effects: Sequence[ToolEffectRecord]


async def _read_run(run_id: str, calls: Sequence[str], theirs: _TheirStore) -> _RunContent:
    effects = [await theirs.get_tool_effect(run_id=run_id, tool_call_id=call) for call in calls]
    return _RunContent(
        run_id,
        await theirs.get_run(run_id=run_id),
        await theirs.list_events(run_id=run_id),
        await theirs.list_snapshots(run_id=run_id, include_interrupted=True),
        [effect for effect in effects if effect is not None],
    )


async def _bring_run(content: _RunContent, store: AgentStateStepStore) -> None:
    run_id = content.run_id
    if content.run is not None:
        await _complete([content.run], lambda: _listed(store.get_run, run_id), store.register_run)
    await _complete(content.events, lambda: store.list_events(run_id=run_id), store.append_event)
    await _complete(
        content.snapshots,
        lambda: store.list_snapshots(run_id=run_id, include_interrupted=True),
        store.save_snapshot,
    )
    for effect in content.effects:
        find = partial(store.get_tool_effect, tool_call_id=effect.tool_call_id)
        await _complete([effect], partial(_listed, find, run_id), store.record_tool_effect)


async def _listed(find: Callable[..., Coroutine[Any, Any, T | None]], run_id: str) -> list[T]:
    found = await find(run_id=run_id)
    return [] if found is None else [found]


async def _complete(
    wanted: Sequence[T],
    stored: Callable[[], Coroutine[Any, Any, list[T]]],
    store: Callable[[T], Coroutine[Any, Any, None]],
) -> None:
    """Store those that are missing at the end, and read all back."""
    before = await stored()
    if before == [*wanted[: len(before)]]:
        for each in wanted[len(before) :]:
            await store(each)
        before = await stored()
    if before != [*wanted]:
        raise StateValidationError(f"{wanted[0]!r:.80} and what follows is stored otherwise")


def import_pydantic_ai(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="The directory or database of a step store.")
    ],
    state: StateOption = STATE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over the runs of a step store of the Pydantic AI harness, and compare both sides.

    What is stored in --state already is not changed; a second run goes on with the first. Exit 1
    if a run could not be brought over whole.

    Example: agent-state import pydantic-ai steps.db --state state --dry-run
    """

    async def bring() -> StepImport:
        async with AgentStateStepStore(MemoryStateStore() if dry_run else state) as store:
            return await import_steps(source, store, dry_run=dry_run)

    report = asyncio.run(bring())
    what = f"{counted(report.runs, 'run')} with {counted(report.snapshots, 'snapshot')}"
    raise typer.Exit(show_import(report, what, dry_run=dry_run, as_json=as_json))
