"""For tests of applications and stores: fakes, faults, crashes, and contracts as test classes.

Nothing here is imported by ``import agent_state``. Only the contracts need pytest, so they are
loaded when they are asked for. The pytest plugin that comes with this distribution gives most of
the rest as fixtures; docs/testing.md shows them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from agent_state.testing.clock import FakeClock
from agent_state.testing.contents import StateTree, assert_restored_equal, read_state
from agent_state.testing.faults import Crash, Fault, FaultyDisk
from agent_state.testing.llm import FakeLLM, ScriptEndedError
from agent_state.testing.processes import CrashPoint, ProcessGroup, kill

if TYPE_CHECKING:
    from agent_state.testing.contract import StateStoreContract
    from agent_state.testing.contract_companions import (
        MirrorContract,
        ObserverContract,
        SessionSourceContract,
    )

__all__ = [
    "Crash",
    "CrashPoint",
    "FakeClock",
    "FakeLLM",
    "Fault",
    "FaultyDisk",
    "MirrorContract",
    "ObserverContract",
    "ProcessGroup",
    "ScriptEndedError",
    "SessionSourceContract",
    "StateStoreContract",
    "StateTree",
    "assert_restored_equal",
    "kill",
    "read_state",
]

_CONTRACTS = {
    "MirrorContract": "contract_companions",
    "ObserverContract": "contract_companions",
    "SessionSourceContract": "contract_companions",
    "StateStoreContract": "contract",
}


def __getattr__(name: str) -> object:
    if name not in _CONTRACTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"agent_state.testing.{_CONTRACTS[name]}"), name)
