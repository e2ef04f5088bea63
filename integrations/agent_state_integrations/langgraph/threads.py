"""The threads that a saver has in memory, and what it may claim about each."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Self

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import get_checkpoint_id

from agent_state import StatePersistenceManager
from agent_state.access import as_segment
from agent_state.protocols import JsonObject
from agent_state_integrations.langgraph.thread import CheckpointConflictError, ThreadIndex

KIND = "langgraph_threads"
"""The kind of the logs of threads."""
RECORDS_IN_MEMORY = 50_000
"""Records of threads that are kept; the threads used longest ago are forgotten, and read again."""
CLAIMS_IN_MEMORY = 20_000

_logger = logging.getLogger("agent_state.langgraph")


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """A thread, a namespace and perhaps a checkpoint, as a config names them."""

    thread_id: str
    namespace: str
    checkpoint_id: str | None

    @classmethod
    def of(cls, config: RunnableConfig) -> Self:
        """The place that a config names; a namespace that is left out is the root."""
        configurable = config["configurable"]
        return cls(
            str(configurable["thread_id"]),
            configurable.get("checkpoint_ns") or "",
            get_checkpoint_id(config),
        )

    def at(self, checkpoint_id: str) -> RunnableConfig:
        """The config of a checkpoint of this namespace."""
        return {
            "configurable": {
                "thread_id": self.thread_id,
                "checkpoint_ns": self.namespace,
                "checkpoint_id": checkpoint_id,
            }
        }


@dataclass(slots=True)
class CachedThread:
    """One thread: what its header says, and the index of its log."""

    thread_id: str
    generation: int = 0
    """How often the log was replaced."""
    revision: int = 0
    """The revision of the header; 0: there is none."""
    index: ThreadIndex = field(default_factory=ThreadIndex)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def key(self) -> tuple[str, ...]:
        """The key of the header."""
        return (as_segment(self.thread_id),)

    @property
    def log(self) -> tuple[str, ...]:
        """The key of the log."""
        return self.log_of(self.generation)

    def log_of(self, generation: int) -> tuple[str, ...]:
        """The key of the log of a generation."""
        return (*self.key, f"checkpoints-{generation}" if generation else "checkpoints")


class ThreadCache:
    """Threads by id, each read once and then followed."""

    def __init__(self) -> None:
        self._threads: OrderedDict[str, CachedThread] = OrderedDict()
        self._claims: OrderedDict[tuple[str, str, str | None], int] = OrderedDict()
        self._void: OrderedDict[tuple[str, str, str | None], None] = OrderedDict()

    def forget(self, thread_id: str) -> None:
        """Read the thread anew when it is needed."""
        self._threads.pop(thread_id, None)

    async def known(self, manager: StatePersistenceManager, thread_id: str) -> CachedThread:
        """The thread as it was read last."""
        thread = self._threads.get(thread_id)
        if thread is None:
            return await self.refreshed(manager, thread_id)
        self._threads.move_to_end(thread_id)
        return thread

    async def refreshed(self, manager: StatePersistenceManager, thread_id: str) -> CachedThread:
        """The thread with every record that is stored now."""
        thread = self._threads.setdefault(thread_id, CachedThread(thread_id))
        self._threads.move_to_end(thread_id)
        async with thread.reading:
            header = await manager.load_with_revision(KIND, thread.key)
            revision = header.revision if header is not None else 0
            if revision != thread.revision:
                generation = header.state.model_dump().get("generation") if header else None
                thread.generation = generation if isinstance(generation, int) else 0
                thread.revision, thread.index = revision, ThreadIndex()
            if not await _follow(manager, thread):  # it was deleted, and perhaps begun again
                thread.index = ThreadIndex()
                await _follow(manager, thread)
        self._shrink(thread_id)
        return thread

    async def added(
        self,
        manager: StatePersistenceManager,
        thread: CachedThread,
        seq: int,
        record: JsonObject,
        body: bytes,
    ) -> bool | None:
        """Take a record that was appended; False if it is void.

        None if the log was begun again before, so that the record builds on what is gone.
        """
        index = thread.index
        if seq == index.last_seq + 1 and not thread.reading.locked():
            index.apply(seq, record, body)
        else:
            index = (await self.refreshed(manager, thread.thread_id)).index
        if seq in index.void:
            return False
        if seq > index.last_seq:
            return None
        entry = index.namespace(record["ns"]).checkpoints.get(record["id"])
        return None if entry is not None and entry.missing else True

    def _shrink(self, keep: str) -> None:
        total = sum(thread.index.last_seq for thread in self._threads.values())
        for thread_id in [*self._threads]:
            if total <= RECORDS_IN_MEMORY or thread_id == keep:
                return
            total -= self._threads.pop(thread_id).index.last_seq

    # -- claims --------------------------------------------------------------------------------

    def claim(self, place: CheckpointPlace, checkpoint_id: str | None, seq: int) -> None:
        """Note that a checkpoint was the newest of its namespace, up to a record of the log."""
        self._claims[place.thread_id, place.namespace, checkpoint_id] = seq
        if len(self._claims) > CLAIMS_IN_MEMORY:
            self._claims.popitem(last=False)

    def claim_on(self, place: CheckpointPlace) -> int | None:
        """The record up to which the place's checkpoint was the newest; None without a claim."""
        return self._claims.get((place.thread_id, place.namespace, place.checkpoint_id))

    def release(self, place: CheckpointPlace) -> None:
        """Drop a claim: the caller goes back to a checkpoint on purpose."""
        self._claims.pop((place.thread_id, place.namespace, place.checkpoint_id), None)

    def void(self, place: CheckpointPlace, checkpoint_id: str) -> None:
        """Note that a checkpoint was refused: nothing is added to it later."""
        self._void[place.thread_id, place.namespace, checkpoint_id] = None
        if len(self._void) > CLAIMS_IN_MEMORY:
            self._void.popitem(last=False)

    def refuse_void(self, place: CheckpointPlace) -> None:
        """Raises ``CheckpointConflictError`` for a checkpoint that was refused."""
        if (place.thread_id, place.namespace, place.checkpoint_id) in self._void:
            raise conflict_at(place)


def conflict_at(place: CheckpointPlace) -> CheckpointConflictError:
    """The error for a record that another process has overtaken."""
    return CheckpointConflictError(
        f"another process has gone on from checkpoint {place.checkpoint_id} of namespace "
        f"{place.namespace!r}; read the thread again",
        kind=KIND,
        key=place.thread_id,
    )


async def _follow(manager: StatePersistenceManager, thread: CachedThread) -> bool:
    """Take the records after the last one; False if that one is not in the log any more."""
    index = thread.index
    found = index.last_seq == 0
    entries = manager.read_log(KIND, thread.log, after=max(index.last_seq - 1, 0))
    async with aclosing(entries):
        async for entry in entries:
            if entry.seq > index.last_seq:
                if not found:
                    return False
                try:
                    index.apply(entry.seq, entry.record)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    # A person has written it; values that build on it are reported when read.
                    _logger.warning("record %d of %s is unusable: %r", entry.seq, thread.log, error)
            elif entry.seq == index.last_seq:
                if not index.ends_with(entry.record):
                    return False
                found = True
    return found
