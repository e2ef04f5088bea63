"""The revision that a document must have when it is changed next, whatever code changes it.

A caller that has seen a version says so once, around the call of a service that knows nothing of
it, and the commit that changes the document compares it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from agent_state.errors import Key, PreconditionFailedError, RevisionConflictError
from agent_state.protocols import Change, Delete, Put, StateStore

Commit = Callable[[Sequence[Change]], Awaitable[list[int]]]


@dataclass(slots=True)
class _Precondition:
    kind: str
    key: Key
    revision: int
    is_met: bool = False


_required: ContextVar[_Precondition | None] = ContextVar("required_revision", default=None)


@contextmanager
def required_revision(kind: str, key: Key, revision: int) -> Iterator[None]:
    """Within the block this task changes the document only if it is at that revision.

    That holds for its first change in the block; later ones build on that. Another revision raises
    ``PreconditionFailedError``, and nothing of the commit is made. -1 is a revision that no
    document has.
    """
    precondition = _Precondition(kind, key, revision)
    token = _required.set(precondition)
    try:
        yield
    finally:
        _required.reset(token)
        precondition.is_met = True  # tasks that were begun in the block go on without it


def is_required(kind: str, key: Key) -> bool:
    """Whether the next change of the document by this task has a precondition."""
    found = _required.get()
    return found is not None and not found.is_met and (kind, key) == (found.kind, found.key)


async def commit_checked(store: StateStore, changes: Sequence[Change], commit: Commit) -> list[int]:
    """Commit the changes, that of the document at the required revision only."""
    required = _required.get()
    if required is None:
        return await commit(changes)
    places = [
        place
        for place, change in enumerate(changes)
        if isinstance(change, Put | Delete) and is_required(change.kind, change.key)
    ]
    if not places:
        return await commit(changes)
    change = changes[places[0]]
    assert isinstance(change, Put | Delete)  # noqa: S101  # such a place was looked for
    kind, key = change.kind, change.key
    if change.expected not in (None, required.revision):  # one of the two is out of date
        stored = await store.get(kind, key)
        actual = 0 if stored is None else stored.revision
        if actual != required.revision:
            raise PreconditionFailedError(actual=actual, kind=kind, key=key)
        raise RevisionConflictError(
            expected=change.expected or 0, actual=actual, kind=kind, key=key
        )
    checked = [*changes]
    checked[places[0]] = replace(change, expected=required.revision)
    try:
        numbers = await commit(checked)
    except RevisionConflictError as error:
        if (error.kind, error.key) == (kind, key) and error.actual != required.revision:
            raise PreconditionFailedError(actual=error.actual, kind=kind, key=key) from error
        raise  # the caller looks again, and commits anew
    required.is_met = True
    return numbers
