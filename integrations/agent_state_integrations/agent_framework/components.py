"""The states of AutoGen's agents, teams and runtimes, in a state directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from agent_state.access import StateAccess, StateLocation, as_segment
from agent_state.errors import SerializationError
from agent_state_integrations.agent_framework.values import TypedJsonCodec

KIND = "autogen_states"
"""The kind of the states: a document for each name."""
_CODEC = TypedJsonCodec()


class SavableComponent(Protocol):
    """What has a state in AutoGen: an agent, a team, a runtime, a model's context."""

    async def save_state(self) -> Mapping[str, Any]: ...
    async def load_state(self, state: Mapping[str, Any], /) -> None: ...


async def save_state(state: StateLocation, name: str, component: SavableComponent) -> None:
    """Store the state of a component under a name, in place of the one before.

    ``state``: as for ``agent_state.access.StateAccess``. Raises ``SerializationError`` for a state
    that could not be loaded again.
    """
    content = dict(await component.save_state())
    try:
        body = {"state": _CODEC.encode(content)}
        _CODEC.decode(body["state"])
    except (TypeError, ValueError) as error:
        raise SerializationError(f"the state of {name!r}: {error}", kind=KIND) from error
    async with StateAccess(state) as access:
        await access.run(lambda m: m.save(KIND, (as_segment(name),), body))


async def load_state(state: StateLocation, name: str, component: SavableComponent) -> bool:
    """Give a component the state that is stored under a name; False if there is none."""
    async with StateAccess(state) as access:
        found = await access.run(lambda m: m.load(KIND, (as_segment(name),)))
    if found is None:
        return False
    await component.load_state(_CODEC.decode(found.model_dump()["state"]))
    return True
