"""Journeys for scripts, notebooks and threads: the same methods, blocking."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from agent_state.clock import IdFactory
from agent_state.sync import (
    BlockingView,
    EventLoopThread,
    SyncStatePersistenceManager,
    blocking,
    iterated,
)
from agent_state_integrations.journey.citations import Citations
from agent_state_integrations.journey.export import Exports
from agent_state_integrations.journey.manager import DAY, ConversationStateManager
from agent_state_integrations.journey.models import Vocabulary
from agent_state_integrations.journey.repository import ConversationCache


class SyncCitations(BlockingView[Citations]):
    """``SyncConversationStateManager.citations``."""

    generate = blocking(Citations.generate)
    all = blocking(Citations.all)
    set_status = blocking(Citations.set_status)
    verify = blocking(Citations.verify)
    stream = iterated(Citations.stream)


class SyncExports(BlockingView[Exports]):
    """``SyncConversationStateManager.exports``."""

    markdown = blocking(Exports.markdown)
    text = blocking(Exports.text)
    json = blocking(Exports.json)
    pdf = blocking(Exports.pdf)


class SyncConversationStateManager(BlockingView[ConversationStateManager]):
    """Takes an open ``SyncStatePersistenceManager``, and options as ``ConversationStateManager``.

    Used with ``with``. With None for the manager it opens one of its own.
    """

    def __init__(
        self,
        manager: SyncStatePersistenceManager | None = None,
        *,
        ttl_seconds: float = 7 * DAY,
        vocabulary: Vocabulary | None = None,
        window: int = 100,
        snapshot_every: int = 0,
        assistant_name: str = "Assistant",
        cache: ConversationCache | None = None,
        new_id: IdFactory | None = None,
    ) -> None:
        journeys = ConversationStateManager(
            None if manager is None else manager.viewed,
            ttl_seconds=ttl_seconds,
            vocabulary=vocabulary,
            window=window,
            snapshot_every=snapshot_every,
            assistant_name=assistant_name,
            cache=cache,
            new_id=new_id,
        )
        self._owns_thread = manager is None
        super().__init__(
            EventLoopThread("manager") if manager is None else manager.thread, journeys
        )
        self.manager = manager or SyncStatePersistenceManager.over(self, journeys.manager)
        self.citations = SyncCitations(self.thread, journeys.citations)
        self.exports = SyncExports(self.thread, journeys.exports)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Let the cache follow the sessions, and open a manager of one's own."""
        if self._owns_thread:
            self.thread.start(self.viewed.open)
        else:
            self.thread.call(self.viewed.open())

    def close(self) -> None:
        """Let the cache write what is pending, and close a manager of one's own."""
        if self._owns_thread:
            self.thread.stop(self.viewed.close)
        else:
            self.thread.call(self.viewed.close())

    initialize_session = blocking(ConversationStateManager.initialize_session)
    resume_session = blocking(ConversationStateManager.resume_session)
    close_session = blocking(ConversationStateManager.close_session)
    erase_session = blocking(ConversationStateManager.erase_session)
    check_session_expiry = blocking(ConversationStateManager.check_session_expiry)
    cleanup_expired_sessions = blocking(ConversationStateManager.cleanup_expired_sessions)
    append_message = blocking(ConversationStateManager.append_message)
    update_emotion = blocking(ConversationStateManager.update_emotion)
    record_milestone = blocking(ConversationStateManager.record_milestone)
    record_breakthrough = blocking(ConversationStateManager.record_breakthrough)
    switch_model_context = blocking(ConversationStateManager.switch_model_context)
    update_context_snapshot = blocking(ConversationStateManager.update_context_snapshot)
    snapshot_session_state = blocking(ConversationStateManager.snapshot_session_state)
    get_session = blocking(ConversationStateManager.get_session)
    get_user_sessions = blocking(ConversationStateManager.get_user_sessions)
    get_message_history = blocking(ConversationStateManager.get_message_history)
    stream_messages = iterated(ConversationStateManager.stream_messages)
    get_emotion_state = blocking(ConversationStateManager.get_emotion_state)
    get_emotion_journey = blocking(ConversationStateManager.get_emotion_journey)
    get_events = blocking(ConversationStateManager.get_events)
    get_context_snapshot = blocking(ConversationStateManager.get_context_snapshot)
    get_journey_summary = blocking(ConversationStateManager.get_journey_summary)
    export_markdown = blocking(ConversationStateManager.export_markdown)
    export_json = blocking(ConversationStateManager.export_json)
    statistics = blocking(ConversationStateManager.statistics)
    get_session_stats = blocking(ConversationStateManager.get_session_stats)
