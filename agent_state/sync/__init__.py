"""The managers and the runtime for scripts, notebooks and threads: the same methods, blocking.

Each runs its asynchronous counterpart on an event loop in a background thread. A package that
brings a manager of its own makes it blocking with ``BlockingView`` and the functions beside it.
"""

from agent_state.sync.event_loop_thread import (
    BlockingView,
    EventLoopThread,
    blocking,
    entered,
    followed,
    iterated,
    plain,
)
from agent_state.sync.managers import (
    SyncAgentRuntime,
    SyncAttachedSessions,
    SyncSessionManager,
    SyncStatePersistenceManager,
    attach_sync,
)

__all__ = [
    "BlockingView",
    "EventLoopThread",
    "SyncAgentRuntime",
    "SyncAttachedSessions",
    "SyncSessionManager",
    "SyncStatePersistenceManager",
    "attach_sync",
    "blocking",
    "entered",
    "followed",
    "iterated",
    "plain",
]
