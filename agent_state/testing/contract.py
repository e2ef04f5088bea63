"""What every store must do, as tests that any store's author can inherit.

::

    from agent_state.testing import StateStoreContract

    class TestMyStore(StateStoreContract):
        def make_store(self, directory):
            return MyStateStore(directory, lock_timeout_seconds=self.lock_timeout_seconds)

Needs pytest and pytest-asyncio, in either mode.
"""

from __future__ import annotations

from agent_state.testing.contract_concurrency import ConcurrencyContract
from agent_state.testing.contract_documents import DocumentContract
from agent_state.testing.contract_erasure import ErasureContract
from agent_state.testing.contract_groups import GroupContract
from agent_state.testing.contract_logs import LogContract


class StateStoreContract(
    DocumentContract, GroupContract, LogContract, ConcurrencyContract, ErasureContract
):
    """The words of ``agent_state.protocols.StateStore`` as tests.

    A subclass gives ``make_store``, and ``reopen`` where a new object would not find what an
    earlier one kept.
    """
