"""For tests of applications and stores: a fake clock, a faulty disk, the contract of a store.

Nothing here is imported by ``import agent_state``. Only ``StateStoreContract`` needs pytest, so
it is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_state.testing.clock import FakeClock
from agent_state.testing.faults import Crash, Fault, FaultyDisk

if TYPE_CHECKING:
    from agent_state.testing.contract import StateStoreContract

__all__ = ["Crash", "FakeClock", "Fault", "FaultyDisk", "StateStoreContract"]


def __getattr__(name: str) -> object:
    if name != "StateStoreContract":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from agent_state.testing.contract import StateStoreContract

    return StateStoreContract
