"""A checkpoint storage for the workflows of Microsoft Agent Framework."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from agent_framework import WorkflowCheckpoint
from agent_framework._workflows import _checkpoint_encoding
from agent_framework.exceptions import WorkflowCheckpointException

from agent_state import AgentStateError, RevisionConflictError, StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, Work, as_segment, from_segment
from agent_state.errors import Key
from agent_state.protocols import Durability, JsonObject
from agent_state_integrations.agent_framework.values import TypedJsonCodec

CHECKPOINT_KIND = "agent_framework_checkpoints"
"""The kind of checkpoints: one document each."""
WORKFLOW_KIND = "agent_framework_workflows"
"""The kind of the lists of checkpoints: one log for each workflow."""
_FRAMEWORK = ("agent_framework.", "agent_framework_orchestrations.", "openai.types.")
"""The modules whose types the framework's own storages restore without being asked."""


class AgentStateCheckpointStorage:
    """Keeps the checkpoints of workflows in a state directory, as JSON, without pickle.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.
    ``allowed_checkpoint_types``: types of the application that a checkpoint may have, as
    ``"module:qualname"``, in addition to those that ``register_checkpoint_type`` was told.

    Raises ``WorkflowCheckpointException``, also at ``save`` for a checkpoint that could not be
    loaded again. Its subclass of ``AgentStateError`` is the cause.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        allowed_checkpoint_types: Iterable[str] | None = None,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._allowed = frozenset(allowed_checkpoint_types or ())
        self._codec = TypedJsonCodec(self._is_allowed, self._is_of_application)

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

    async def save(self, checkpoint: WorkflowCheckpoint) -> str:
        """Store a checkpoint, in place of one with its id; its id."""
        body = self._body_of(checkpoint)
        name, entry = checkpoint.workflow_name, _entry_of(checkpoint)
        await self._run(
            f"saving checkpoint {checkpoint.checkpoint_id!r}",
            lambda m: _save(m, name, entry, body),
        )
        return str(checkpoint.checkpoint_id)

    async def load(self, checkpoint_id: str) -> WorkflowCheckpoint:
        """A copy of a checkpoint. Raises ``WorkflowCheckpointException`` if there is none."""
        found = await self._run(
            f"loading checkpoint {checkpoint_id!r}",
            lambda m: m.load(CHECKPOINT_KIND, _key(checkpoint_id)),
        )
        if found is None:
            raise WorkflowCheckpointException(f"No checkpoint found with ID {checkpoint_id}")
        return self._checkpoint_of(found.model_dump())

    async def list_checkpoints(self, *, workflow_name: str) -> list[WorkflowCheckpoint]:
        """Copies of the checkpoints of a workflow, in the order in which they were first saved."""
        bodies = await self._run(
            f"listing the checkpoints of {workflow_name!r}", lambda m: _bodies(m, workflow_name)
        )
        return [self._checkpoint_of(body) for body in bodies]

    async def list_checkpoint_ids(self, *, workflow_name: str) -> list[str]:
        """The ids of the checkpoints of a workflow, in the same order."""
        entries = await self._run(
            f"listing the checkpoints of {workflow_name!r}", lambda m: _entries(m, workflow_name)
        )
        return list(entries)

    async def get_latest(self, *, workflow_name: str) -> WorkflowCheckpoint | None:
        """A copy of the checkpoint with the newest time stamp; None if there is none."""
        body = await self._run(
            f"reading the checkpoints of {workflow_name!r}", lambda m: _latest(m, workflow_name)
        )
        return self._checkpoint_of(body) if body is not None else None

    async def delete(self, checkpoint_id: str) -> bool:
        """Erase a checkpoint; False if there is none."""
        async with _as_checkpoint_error(f"deleting checkpoint {checkpoint_id!r}"):
            return await self._access.run(lambda m: _delete(m, checkpoint_id))

    async def _run(self, doing: str, work: Work[Any]) -> Any:
        async with _as_checkpoint_error(doing):
            return await self._access.run(work)

    def _is_allowed(self, name: str) -> bool:
        return self._is_of_application(name) or name.startswith(_FRAMEWORK)

    def _is_of_application(self, name: str) -> bool:
        registered = _checkpoint_encoding._REGISTERED_CHECKPOINT_TYPE_KEYS  # noqa: SLF001  # has no public reader
        return name in self._allowed or name in registered

    def _body_of(self, checkpoint: WorkflowCheckpoint) -> JsonObject:
        """A checkpoint as JSON from which it can be made again."""
        try:
            body = {name: self._codec.encode(value) for name, value in checkpoint.to_dict().items()}
            self._codec.decode(body)
        except (RecursionError, TypeError, ValueError) as error:
            raise WorkflowCheckpointException(
                f"Checkpoint {checkpoint.checkpoint_id} cannot be stored, because it could not be "
                f"loaded again: {error}"
            ) from error
        return body

    def _checkpoint_of(self, body: JsonObject) -> WorkflowCheckpoint:
        try:
            fields = {name: self._codec.decode(value) for name, value in body.items()}
        except ValueError as error:
            raise WorkflowCheckpointException(
                f"Checkpoint {body.get('checkpoint_id')} cannot be loaded: {error}"
            ) from error
        return WorkflowCheckpoint.from_dict(fields)


def _key(checkpoint_id: str) -> Key:
    return (as_segment(checkpoint_id),)


def _entry_of(checkpoint: WorkflowCheckpoint) -> JsonObject:
    return {"id": as_segment(checkpoint.checkpoint_id), "timestamp": str(checkpoint.timestamp)}


async def _save(
    manager: StatePersistenceManager, workflow: str, entry: JsonObject, body: JsonObject
) -> None:
    """A checkpoint and its entry in the list of its workflow, both or none."""
    key: Key = (entry["id"],)
    while True:
        stored = await manager.load_with_revision(CHECKPOINT_KIND, key)
        group = manager.new_group()
        revision = 0 if stored is None else stored.revision
        group.save(CHECKPOINT_KIND, key, body, expected=revision)
        if stored is not None:
            before = stored.state.model_dump()["workflow_name"]
            if before != workflow:
                group.append(WORKFLOW_KIND, _key(before), {"id": entry["id"], "deleted": True})
        group.append(WORKFLOW_KIND, _key(workflow), entry)
        try:
            await manager.commit(group)
        except RevisionConflictError:
            continue  # another writer was first: replace what it has written
        return


async def _delete(manager: StatePersistenceManager, checkpoint_id: str) -> bool:
    key = _key(checkpoint_id)
    while (stored := await manager.load_with_revision(CHECKPOINT_KIND, key)) is not None:
        workflow = stored.state.model_dump()["workflow_name"]
        group = manager.new_group()
        group.delete(CHECKPOINT_KIND, key, expected=stored.revision)
        group.append(WORKFLOW_KIND, _key(workflow), {"id": key[0], "deleted": True})
        try:
            await manager.commit(group)
        except RevisionConflictError:
            continue
        await manager.erase(CHECKPOINT_KIND, key)  # a delete keeps an earlier version
        return True
    return False


async def _entries(manager: StatePersistenceManager, workflow: str) -> dict[str, datetime]:
    """The ids of a workflow's checkpoints in the order of their first save, with their times."""
    found: dict[str, datetime] = {}
    async with aclosing(manager.read_log(WORKFLOW_KIND, _key(workflow))) as records:
        async for entry in records:
            checkpoint_id = from_segment(entry.record["id"])
            if entry.record.get("deleted"):
                found.pop(checkpoint_id, None)
            else:
                found[checkpoint_id] = _moment(entry.record["timestamp"])
    return found


async def _bodies(manager: StatePersistenceManager, workflow: str) -> list[JsonObject]:
    found = [
        await manager.load(CHECKPOINT_KIND, _key(each))
        for each in await _entries(manager, workflow)
    ]
    return [each.model_dump() for each in found if each is not None]  # None: deleted meanwhile


async def _latest(manager: StatePersistenceManager, workflow: str) -> JsonObject | None:
    entries = await _entries(manager, workflow)
    for checkpoint_id in sorted(entries, key=entries.__getitem__, reverse=True):
        found = await manager.load(CHECKPOINT_KIND, _key(checkpoint_id))
        if found is not None:  # None: deleted meanwhile
            return found.model_dump()
    return None


def _moment(timestamp: str) -> datetime:
    """A time stamp; without a zone it is UTC, and what is no time is before all times."""
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


@asynccontextmanager
async def _as_checkpoint_error(doing: str) -> AsyncIterator[None]:
    try:
        yield
    except AgentStateError as error:
        raise WorkflowCheckpointException(f"{doing}: {error}") from error
