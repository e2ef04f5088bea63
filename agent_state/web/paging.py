"""One page of many documents."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

from agent_state.errors import Key, SchemaTooNewError, StateCorruptedError, StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.models import OpenModel
from agent_state.web.models import Page

M = TypeVar("M", bound=OpenModel)

LOOKED_AT = 2000
"""So many documents are read for one page; one that filters may end early, and is gone on with."""


async def page(
    manager: StatePersistenceManager,
    kind: str,
    keys: Sequence[Key],
    model: type[M],
    *,
    after: str | None,
    limit: int,
    wanted: Callable[[M], bool] = lambda _: True,
) -> Page[M]:
    """The wanted documents from after an id on, in the order of their ids.

    ``keys`` are sorted, and differ only in their last part, which is the id.
    """
    found: Page[M] = Page(items=[])
    first = bisect_right(keys, after, key=lambda key: key[-1]) if after is not None else 0
    for looked_at, key in enumerate(keys[first:]):
        if len(found.items) == limit or looked_at == LOOKED_AT:
            found.next = keys[first + looked_at - 1][-1]
            break
        try:
            state = await manager.load(kind, key)
        except (StateCorruptedError, SchemaTooNewError):
            found.unusable.append(key[-1])
            continue
        if isinstance(state, model) and wanted(state):
            found.items.append(state)
    return found


async def one(manager: StatePersistenceManager, kind: str, key: Key, model: type[M]) -> M:
    """The document. Raises ``StateNotFoundError``."""
    state = await manager.load(kind, key)
    if not isinstance(state, model):
        raise StateNotFoundError(f"there is no such document among {kind}", kind=kind, key=key)
    return state
