"""A checkpoint saver for LangGraph: each thread is one log of JSON records."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_id,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import _DeltaSnapshot  # the only name there is

from agent_state import RevisionConflictError, StateCorruptedError, StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, as_segment, from_segment
from agent_state.protocols import Durability, JsonObject
from agent_state_integrations.langgraph.thread import (
    CheckpointConflictError,
    StoredCheckpoint,
    StoredWrite,
    ThreadIndex,
    ThreadNamespace,
    record_body,
    rewritten,
    writes_record,
)
from agent_state_integrations.langgraph.threads import (
    KIND,
    CheckpointPlace,
    ThreadCache,
    conflict_at,
)
from agent_state_integrations.langgraph.values import EncodedValue, ValueCodec


class AgentStateSaver(BaseCheckpointSaver[str]):
    """Keeps the checkpoints of LangGraph's threads in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``. ``serde``: a
    serializer of LangGraph's; its own stores JSON as JSON, and any other one, such as
    ``EncryptedSerializer``, is asked for every value.

    It is a context manager, sync and async, and needs neither. A checkpoint is durable when
    ``put`` returns. ``put`` and ``put_writes`` raise ``CheckpointConflictError`` when another
    process has gone on with the thread. Reading raises ``StateCorruptedError`` when a record that
    a checkpoint needs is damaged.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        serde: SerializerProtocol | None = None,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        super().__init__(serde=serde)
        # A copy of the saver, as ``with_allowlist`` makes one, shares all of these.
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._threads = ThreadCache()
        self._writer = uuid4().hex[:16]

    # -- life ----------------------------------------------------------------------------------

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

    def __enter__(self) -> Self:
        self._access.open_blocking()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """Close a directory that was opened here."""
        await self._access.close()

    def close(self) -> None:
        """Close a directory that was opened here."""
        self._access.close_blocking()

    def get_next_version(self, current: str | float | None, channel: None) -> str:
        """A version that sorts after ``current``, and that no other process gives."""
        if isinstance(current, str):
            current = int(current.split(".")[0])
        return f"{int(current or 0) + 1:032}.{random.random():018.16f}"  # noqa: S311  # no secret

    # -- reading -------------------------------------------------------------------------------

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self._decoded(await self._access.run(lambda m: self._get(m, config)))

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self._decoded(self._access.run_blocking(lambda m: self._get(m, config)))

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """The newest first. ``limit`` 0 or less gives none, and None all."""
        codec = ValueCodec(self.serde)
        for found in await self._access.run(
            lambda m: self._select(m, config, filter, before, limit)
        ):
            yield self._decode(found, codec)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """As ``alist``."""
        codec = ValueCodec(self.serde)
        for found in self._access.run_blocking(
            lambda m: self._select(m, config, filter, before, limit)
        ):
            yield self._decode(found, codec)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await self._access.run(lambda m: self._history(m, config, channels))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return self._access.run_blocking(lambda m: self._history(m, config, channels))

    # -- writing -------------------------------------------------------------------------------

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        put = _CheckpointPut(self, config, checkpoint, metadata, new_versions)
        return await self._access.run(lambda m: self._put(m, put))

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        put = _CheckpointPut(self, config, checkpoint, metadata, new_versions)
        return self._access.run_blocking(lambda m: self._put(m, put))

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        where, record = self._writes_record(config, writes, task_id, task_path)
        await self._access.run(lambda m: self._put_writes(m, where, record))

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        where, record = self._writes_record(config, writes, task_id, task_path)
        self._access.run_blocking(lambda m: self._put_writes(m, where, record))

    async def adelete_thread(self, thread_id: str) -> None:
        await self._access.run(lambda m: self._delete_thread(m, str(thread_id)))

    def delete_thread(self, thread_id: str) -> None:
        self._access.run_blocking(lambda m: self._delete_thread(m, str(thread_id)))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await self._access.run(lambda m: self._delete_for_runs(m, run_ids))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        self._access.run_blocking(lambda m: self._delete_for_runs(m, run_ids))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        source, target = str(source_thread_id), str(target_thread_id)
        await self._access.run(lambda m: self._copy_thread(m, source, target))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        source, target = str(source_thread_id), str(target_thread_id)
        self._access.run_blocking(lambda m: self._copy_thread(m, source, target))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete the threads, or all but what the newest checkpoint of each namespace needs."""
        await self._access.run(lambda m: self._prune(m, thread_ids, strategy))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """As ``aprune``."""
        self._access.run_blocking(lambda m: self._prune(m, thread_ids, strategy))

    # -- on the loop of the state ----------------------------------------------------------------

    async def _get(
        self, manager: StatePersistenceManager, config: RunnableConfig
    ) -> _FoundCheckpoint | None:
        where = CheckpointPlace.of(config)
        thread = await self._threads.refreshed(manager, where.thread_id)
        namespace = thread.index.namespaces.get(where.namespace)
        wanted = where.checkpoint_id
        checkpoint_id = wanted or (namespace.newest if namespace is not None else None)
        if wanted is None:
            self._threads.claim(where, checkpoint_id, thread.index.last_seq)
        else:
            self._threads.release(where)
        if namespace is None or checkpoint_id not in namespace.checkpoints:
            return None
        return _FoundCheckpoint.of(where, namespace, checkpoint_id)

    async def _select(
        self,
        manager: StatePersistenceManager,
        config: RunnableConfig | None,
        wanted: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Collection[_FoundCheckpoint]:
        if config is None:
            thread_ids = await self._thread_ids(manager)
            namespace, only = None, None
        else:
            thread_ids = [str(config["configurable"]["thread_id"])]
            namespace = config["configurable"].get("checkpoint_ns")
            only = get_checkpoint_id(config)
        bound = get_checkpoint_id(before) if before else None
        codec = ValueCodec(self.serde)
        found: list[tuple[str, CheckpointPlace, ThreadNamespace]] = []
        for thread_id in thread_ids:
            thread = await self._threads.refreshed(manager, thread_id)
            for name, each in thread.index.namespaces.items():
                if namespace is None or name == namespace:
                    place = CheckpointPlace(thread_id, name, None)
                    found += [(checkpoint_id, place, each) for checkpoint_id in each.checkpoints]
        found.sort(key=lambda each: each[0], reverse=True)
        chosen: list[_FoundCheckpoint] = []
        for checkpoint_id, place, each in found:
            if limit is not None and len(chosen) >= max(limit, 0):
                break
            if (only and checkpoint_id != only) or (bound and checkpoint_id >= bound):
                continue
            if wanted:
                metadata = codec.decode_element(each.checkpoints[checkpoint_id].metadata)
                if any(metadata.get(key) != value for key, value in wanted.items()):
                    continue
            chosen.append(_FoundCheckpoint.of(place, each, checkpoint_id))
        return chosen

    async def _history(
        self, manager: StatePersistenceManager, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        where = CheckpointPlace.of(config)
        thread = await self._threads.refreshed(manager, where.thread_id)
        namespace = thread.index.namespaces.get(where.namespace) or ThreadNamespace()
        codec = ValueCodec(self.serde)
        history: dict[str, DeltaChannelHistory] = {name: {"writes": []} for name in channels}
        remaining = set(channels)
        for entry in namespace.ancestors(where.checkpoint_id or namespace.newest or ""):
            for write in reversed(namespace.writes_of(entry.checkpoint_id)):
                if write.channel in remaining:
                    value = codec.decode_element(write.element)
                    history[write.channel]["writes"].append((write.task_id, write.channel, value))
            for channel in remaining & entry.values.keys():
                history[channel]["seed"] = codec.decode(entry.values[channel])
            _refuse_missing(where, entry, remaining)
            remaining -= entry.values.keys()
            if not remaining:
                break
        for found in history.values():
            found["writes"].reverse()
        return history

    async def _put(self, manager: StatePersistenceManager, put: _CheckpointPut) -> RunnableConfig:
        where = put.where
        self._threads.refuse_void(where)

        def record(index: ThreadIndex) -> JsonObject:
            return index.checkpoint_record(where.namespace, put.entry, put.values_for(index))

        checkpoint_id = put.entry.checkpoint_id
        try:
            seq = await self._add(manager, where, record)
        except CheckpointConflictError:
            self._threads.void(where, checkpoint_id)
            raise
        self._threads.claim(where, checkpoint_id, seq)
        return where.at(checkpoint_id)

    def _writes_record(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> tuple[CheckpointPlace, JsonObject]:
        where, codec = CheckpointPlace.of(config), ValueCodec(self.serde)
        encoded = [
            (WRITES_IDX_MAP.get(channel, index), channel, codec.element(value))
            for index, (channel, value) in enumerate(writes)
        ]
        checkpoint_id = config["configurable"]["checkpoint_id"]
        return where, writes_record(where.namespace, checkpoint_id, task_id, task_path, encoded)

    async def _put_writes(
        self, manager: StatePersistenceManager, where: CheckpointPlace, record: JsonObject
    ) -> None:
        if record["writes"]:
            self._threads.refuse_void(where)
            await self._add(manager, where, lambda _: record)

    async def _add(
        self,
        manager: StatePersistenceManager,
        where: CheckpointPlace,
        make: Callable[[ThreadIndex], JsonObject],
    ) -> int:
        """Append a record to the thread's log; its number. Raises ``CheckpointConflictError``."""
        thread = await self._threads.known(manager, where.thread_id)
        claim = self._threads.claim_on(where)
        while True:
            record = {**make(thread.index), "writer": self._writer}
            if claim is not None:
                record |= {"claims": True, "after": claim}
            group = manager.new_group()
            group.check(KIND, thread.key, thread.revision)
            body = record_body(record)
            group.append_json(KIND, thread.log, body)
            try:
                seq = (await manager.commit(group))[-1]
            except RevisionConflictError:  # the log was replaced by a shorter one
                thread = await self._threads.refreshed(manager, where.thread_id)
                continue
            accepted = await self._threads.added(manager, thread, seq, record, body)
            if accepted is None:  # the thread was deleted meanwhile, so this builds on nothing
                thread, claim = await self._threads.refreshed(manager, where.thread_id), None
                continue
            if not accepted:
                raise conflict_at(where)
            return seq

    async def _thread_ids(self, manager: StatePersistenceManager) -> Collection[str]:
        logs = await manager.store.logs(KIND)
        return sorted({from_segment(key[0]) for key in logs})

    async def _delete_thread(self, manager: StatePersistenceManager, thread_id: str) -> None:
        await manager.erase(KIND, (as_segment(thread_id),))
        self._threads.forget(thread_id)

    async def _delete_for_runs(
        self, manager: StatePersistenceManager, run_ids: Sequence[str]
    ) -> None:
        gone = {str(run_id) for run_id in run_ids}

        def keep(namespace: ThreadNamespace) -> set[str]:
            entries = namespace.checkpoints.values()
            return {each.checkpoint_id for each in entries if each.run_id not in gone}

        for thread_id in await self._thread_ids(manager):
            await self._rewrite(manager, thread_id, keep)

    async def _prune(
        self, manager: StatePersistenceManager, thread_ids: Sequence[str], strategy: str
    ) -> None:
        if strategy not in ("keep_latest", "delete"):
            raise ValueError(f"a strategy is 'keep_latest' or 'delete', not {strategy!r}")

        def keep(namespace: ThreadNamespace) -> set[str]:
            newest = namespace.newest
            return namespace.needed_by(newest) if newest is not None else set()

        for thread_id in map(str, thread_ids):
            if strategy == "delete":
                await self._delete_thread(manager, thread_id)
            else:
                await self._rewrite(manager, thread_id, keep)

    async def _rewrite(
        self,
        manager: StatePersistenceManager,
        thread_id: str,
        keep: Callable[[ThreadNamespace], set[str]],
    ) -> None:
        """Replace the log of a thread by one with fewer checkpoints, atomically."""
        key = (as_segment(thread_id),)
        async with manager.lock(KIND, key):  # until it is released nobody appends to the log
            thread = await self._threads.refreshed(manager, thread_id)
            namespaces = thread.index.namespaces
            kept = {name: keep(each) for name, each in namespaces.items()}
            if all(len(kept[name]) == len(namespaces[name].checkpoints) for name in kept):
                return
            if any(kept.values()):
                generation = thread.generation + 1
                new_log = thread.log_of(generation)
                await manager.erase(KIND, new_log)  # what a crash has left
                group = manager.new_group()
                group.save(KIND, key, {"generation": generation}, expected=thread.revision)
                for record in rewritten(thread.index, kept):
                    group.append_json(KIND, new_log, record_body(record))
                await manager.commit(group)
                await manager.erase(KIND, thread.log)
            else:
                await manager.erase(KIND, key)
        self._threads.forget(thread_id)

    async def _copy_thread(
        self, manager: StatePersistenceManager, source: str, target: str
    ) -> None:
        index = (await self._threads.refreshed(manager, source)).index
        everything = {name: {*each.checkpoints} for name, each in index.namespaces.items()}
        records = rewritten(index, everything)
        thread = await self._threads.refreshed(manager, target)
        if not records or source == target:
            return
        group = manager.new_group()
        group.check(KIND, thread.key, thread.revision)
        for record in records:
            group.append_json(KIND, thread.log, record_body(record))
        await manager.commit(group)

    # -- decoding --------------------------------------------------------------------------------

    def _decoded(self, found: _FoundCheckpoint | None) -> CheckpointTuple | None:
        return None if found is None else self._decode(found, ValueCodec(self.serde))

    def _decode(self, found: _FoundCheckpoint, codec: ValueCodec) -> CheckpointTuple:
        entry, where = found.entry, found.where
        _refuse_missing(where, entry, entry.missing)
        checkpoint = codec.decode_element(entry.state)
        checkpoint["channel_values"] = {
            channel: codec.decode(value) for channel, value in entry.values.items()
        }
        return CheckpointTuple(
            config=where.at(entry.checkpoint_id),
            checkpoint=checkpoint,
            metadata=codec.decode_element(entry.metadata),
            parent_config=where.at(entry.parent) if entry.parent else None,
            pending_writes=[
                (write.task_id, write.channel, codec.decode_element(write.element))
                for write in found.writes
            ],
        )


@dataclass(frozen=True, slots=True)
class _FoundCheckpoint:
    """A checkpoint and its writes as they were when it was found."""

    where: CheckpointPlace
    entry: StoredCheckpoint
    writes: Sequence[StoredWrite]

    @classmethod
    def of(
        cls, where: CheckpointPlace, namespace: ThreadNamespace, checkpoint_id: str
    ) -> _FoundCheckpoint:
        entry = namespace.checkpoints[checkpoint_id]
        return cls(where, entry, namespace.writes_of(checkpoint_id))


class _CheckpointPut:
    """A checkpoint to store. What changed is encoded now, as the graph may go on to change it."""

    def __init__(
        self,
        saver: AgentStateSaver,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> None:
        codec = ValueCodec(saver.serde)
        self.where = CheckpointPlace.of(config)
        state = {name: value for name, value in checkpoint.items() if name != "channel_values"}
        described = get_checkpoint_metadata(config, metadata)
        run_id = described.get("run_id")
        versions = checkpoint["channel_versions"]
        values = self._values = checkpoint["channel_values"]
        counted = described.get("counters_since_delta_snapshot") or ()
        snapshots = [name for name in values if isinstance(values[name], _DeltaSnapshot)]
        self._codec = codec
        self._namespace = self.where.namespace
        self._encoded: dict[str, EncodedValue | None] = {
            channel: codec.encode(value) if channel in new_versions else None
            for channel, value in values.items()
        }
        self.entry = StoredCheckpoint(
            checkpoint["id"],
            self.where.checkpoint_id,
            codec.element(state, ordered=False),
            codec.element(described, ordered=False),
            dict(versions),
            {},
            str(run_id) if run_id is not None else None,
            deltas=frozenset([*counted, *snapshots]),
        )

    def values_for(self, index: ThreadIndex) -> Mapping[str, EncodedValue | None]:
        """The values, each encoded unless the index has that version of its channel."""
        for channel, encoded in self._encoded.items():
            if encoded is None and not index.knows(self._namespace, self.entry.versions, channel):
                self._encoded[channel] = self._codec.encode(self._values[channel])
        return self._encoded


def _refuse_missing(
    where: CheckpointPlace, entry: StoredCheckpoint, channels: Collection[str]
) -> None:
    if lost := entry.missing & set(channels):
        raise StateCorruptedError(
            f"a record that checkpoint {entry.checkpoint_id} needs for "
            f"{', '.join(sorted(lost))} is damaged",
            kind=KIND,
            key=where.thread_id,
        )
