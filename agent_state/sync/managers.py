"""The managers and the runtime for scripts, notebooks and threads: the same methods, blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from agent_state.codec import Group
from agent_state.errors import Key
from agent_state.manager import StatePersistenceManager
from agent_state.metrics import JournalLag
from agent_state.protocols import Document, Incident, Notice
from agent_state.runtime import (
    AgentService,
    AsyncAgentSessionManager,
    AttachedSessions,
    MailService,
    RestoreReport,
    TaskService,
)
from agent_state.runtime import attach as attach_async
from agent_state.sessions.conversations import Conversations
from agent_state.sessions.manager import SessionManager
from agent_state.sessions.states import SessionStates
from agent_state.sessions.tokens import SessionTokens
from agent_state.sessions.workflows import Workflows
from agent_state.sync.event_loop_thread import (
    BlockingView,
    EventLoopThread,
    blocking,
    entered,
    followed,
    iterated,
    plain,
)

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


def _constructed(
    make: Callable[P, T],
) -> Callable[[Callable[[S, T], None]], Callable[Concatenate[S, P], None]]:
    """An ``__init__`` that takes the arguments of ``make`` and is given the result."""

    def decorate(init: Callable[[S, T], None]) -> Callable[Concatenate[S, P], None]:
        def construct(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, make(*args, **kwargs))

        return construct

    return decorate


class SyncStatePersistenceManager(BlockingView[StatePersistenceManager]):
    """Takes the arguments of ``StatePersistenceManager``. Use it with ``with``.

    Any thread may call it. A lock belongs to the thread that took it: that thread's saves go
    through, and those of other threads wait. A process that was forked opens one of its own.
    """

    @_constructed(StatePersistenceManager)
    def __init__(self, manager: StatePersistenceManager) -> None:
        super().__init__(EventLoopThread("manager"), manager)

    @classmethod
    def over(cls, view: BlockingView[Any], manager: StatePersistenceManager) -> Self:
        """A manager that lives on the thread of another object, and is opened and closed by it."""
        self = cls.__new__(cls)
        BlockingView.__init__(self, view.thread, manager)
        return self

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start the thread and open the store. A second call is a no-op."""
        self.thread.start(self.viewed.open)

    def close(self) -> None:
        """Close the store and end the thread. A second call is a no-op."""
        self.thread.stop(self.viewed.close)

    flush = blocking(StatePersistenceManager.flush)
    save_agent_state = blocking(StatePersistenceManager.save_agent_state)
    load_agent_state = blocking(StatePersistenceManager.load_agent_state)
    save_sleep_state = blocking(StatePersistenceManager.save_sleep_state)
    load_sleep_state = blocking(StatePersistenceManager.load_sleep_state)
    save_system_state = blocking(StatePersistenceManager.save_system_state)
    load_system_state = blocking(StatePersistenceManager.load_system_state)
    save_task_queue_state = blocking(StatePersistenceManager.save_task_queue_state)
    load_task_queue_state = blocking(StatePersistenceManager.load_task_queue_state)
    save_mailbox_state = blocking(StatePersistenceManager.save_mailbox_state)
    load_mailbox_state = blocking(StatePersistenceManager.load_mailbox_state)
    list_persisted_agents = blocking(StatePersistenceManager.list_persisted_agents)
    save = blocking(StatePersistenceManager.save)
    load = blocking(StatePersistenceManager.load)
    load_with_revision = blocking(StatePersistenceManager.load_with_revision)
    delete = blocking(StatePersistenceManager.delete)
    erase = blocking(StatePersistenceManager.erase)
    is_removed = blocking(StatePersistenceManager.is_removed)
    check_merged = blocking(StatePersistenceManager.check_merged)
    keys = blocking(StatePersistenceManager.keys)
    scan = iterated(StatePersistenceManager.scan)
    append = blocking(StatePersistenceManager.append)
    read_log = iterated(StatePersistenceManager.read_log)
    read_keyed = iterated(StatePersistenceManager.read_keyed)
    read_history = iterated(StatePersistenceManager.read_history)
    lock = entered(StatePersistenceManager.lock)
    edit = entered(StatePersistenceManager.edit)
    group = entered(StatePersistenceManager.group)
    commit = blocking(StatePersistenceManager.commit)
    cleanup_old_states = blocking(StatePersistenceManager.cleanup_old_states)

    def document(self, kind: str, key: Key | str) -> Document | None:
        """The stored version, not decoded; an agent's has its conversation. None for none."""
        return self.thread.call(self.viewed.document(kind, key))

    def whole(self, document: Document) -> Document:
        """An earlier version of a document, as a file has it; an agent's with its conversation."""
        return self.thread.call(self.viewed.whole(document))

    def new_group(self) -> Group:
        """An empty group, for ``commit``."""
        return self.viewed.new_group()

    def incidents(self) -> list[Incident]:
        """Damaged and unusable documents that were found since ``open``, and what was done."""
        return self.viewed.incidents()

    def journal_lag(self) -> JournalLag | None:
        """How far the files are behind the journal; None for a store without a journal."""
        return self.viewed.journal_lag()

    def watch(self) -> Iterator[Notice]:
        """The changes made after this returns. Waits for each one; ``close`` ends it."""
        return self.thread.follow(self.thread.call(self.viewed.subscribe()))


# -- the runtime ---------------------------------------------------------------------------------


class SyncAgents(BlockingView[AgentService]):
    """``SyncAgentRuntime.agents``."""

    create = blocking(AgentService.create)
    stop = blocking(AgentService.stop)
    start = blocking(AgentService.start)
    get = plain(AgentService.get)
    list = plain(AgentService.list)
    sleep = blocking(AgentService.sleep)
    wake = blocking(AgentService.wake)


class SyncTasks(BlockingView[TaskService]):
    """``SyncAgentRuntime.tasks``."""

    submit = blocking(TaskService.submit)
    get = blocking(TaskService.get)
    list = blocking(TaskService.list)
    result = blocking(TaskService.result)
    search = blocking(TaskService.search)
    watch = followed(TaskService.watch)
    retry = blocking(TaskService.retry)
    cancel = blocking(TaskService.cancel)
    delete = blocking(TaskService.delete)
    retry_all = blocking(TaskService.retry_all)
    cancel_all = blocking(TaskService.cancel_all)
    delete_all = blocking(TaskService.delete_all)
    perform = blocking(TaskService.perform)


class SyncMail(BlockingView[MailService]):
    """``SyncAgentRuntime.mail``."""

    send = blocking(MailService.send)
    inbox = plain(MailService.inbox)
    read = blocking(MailService.read)
    archive = blocking(MailService.archive)
    reply = blocking(MailService.reply)
    history = blocking(MailService.history)
    pending_replies = plain(MailService.pending_replies)
    get = plain(MailService.get)
    find = blocking(MailService.find)
    first_answer = blocking(MailService.first_answer)


class SyncAgentRuntime(BlockingView[AsyncAgentSessionManager]):
    """Takes the arguments of ``AgentRuntime``. Use it with ``with``, or between start and stop.

    Handlers are coroutine functions, as there, and run on the loop of the background thread;
    blocking work of theirs is a step that is a plain function, which has a thread of its own.
    Hooks may be plain functions. Signals are the program's own matter: SIGTERM ends the block only
    if the program raises for it.
    """

    @_constructed(AsyncAgentSessionManager)
    def __init__(self, runtime: AsyncAgentSessionManager) -> None:
        super().__init__(EventLoopThread("runtime"), runtime)
        self.manager = SyncStatePersistenceManager.over(self, runtime.manager)
        self.agents = SyncAgents(self.thread, runtime.agents)
        self.tasks = SyncTasks(self.thread, runtime.tasks)
        self.mail = SyncMail(self.thread, runtime.mail)
        self.handler = runtime.handler
        self.task = runtime.task
        self.on_mail = runtime.on_mail
        self.on_failure = runtime.on_failure
        self.on_dead = runtime.on_dead
        self.on_restore = runtime.on_restore

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> RestoreReport:
        """Start the thread, restore everything, then run. Twice is a no-op."""
        return self.thread.start(self.viewed.start)

    def stop(self) -> None:
        """Stop in good order, and end the thread. A second call is a no-op."""
        self.thread.stop(self.viewed.stop)

    @property
    def report(self) -> RestoreReport | None:
        """The report of the last start; None before the first."""
        return self.viewed.report

    schedule = plain(AsyncAgentSessionManager.schedule)
    emit = blocking(AsyncAgentSessionManager.emit)
    wait_idle = blocking(AsyncAgentSessionManager.wait_idle)
    save_session_state = blocking(AsyncAgentSessionManager.save_session_state)
    save_all_session_states = blocking(AsyncAgentSessionManager.save_all_session_states)
    restore_session_state = blocking(AsyncAgentSessionManager.restore_session_state)
    restore_all_session_states = blocking(AsyncAgentSessionManager.restore_all_session_states)
    cleanup_old_states = blocking(AsyncAgentSessionManager.cleanup_old_states)


class SyncAttachedSessions(BlockingView[AttachedSessions]):
    """What ``attach_sync`` returns. Use it with ``with``.

    The methods of the session manager are called in the background thread.
    """

    def __init__(self, attached: AttachedSessions) -> None:
        super().__init__(EventLoopThread("attached manager"), attached)
        self.manager = SyncStatePersistenceManager.over(self, attached.manager)

    def __enter__(self) -> Self:
        self.thread.start(self.viewed.__aenter__)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.thread.stop(partial(self.viewed.__aexit__, kind, error, traceback))

    @property
    def restored(self) -> list[str]:
        """The ids of the sessions that the start has imported into the manager."""
        return self.viewed.restored

    save_session_state = blocking(AttachedSessions.save_session_state)
    save_all_session_states = blocking(AttachedSessions.save_all_session_states)
    restore_session_state = blocking(AttachedSessions.restore_session_state)
    restore_all_session_states = blocking(AttachedSessions.restore_all_session_states)
    cleanup_old_states = blocking(AttachedSessions.cleanup_old_states)
    saved = blocking(AttachedSessions.saved)


def _attaching(make: Callable[P, AttachedSessions]) -> Callable[P, SyncAttachedSessions]:
    @wraps(make)
    def attach(*args: P.args, **kwargs: P.kwargs) -> SyncAttachedSessions:
        return SyncAttachedSessions(make(*args, **kwargs))

    return attach


attach_sync = _attaching(attach_async)
"""``agent_state.attach`` for synchronous programs; use the result with ``with``."""


# -- sessions ------------------------------------------------------------------------------------


class SyncTokens(BlockingView[SessionTokens]):
    """``SyncSessionManager.tokens``."""

    new_token = plain(SessionTokens.new_token)
    resolve = blocking(SessionTokens.resolve)
    authorize = blocking(SessionTokens.authorize)
    rotate = blocking(SessionTokens.rotate)
    revoke = blocking(SessionTokens.revoke)


class SyncConversations(BlockingView[Conversations]):
    """``SyncSessionManager.conversations``."""

    add = blocking(Conversations.add)
    add_many = blocking(Conversations.add_many)
    page = blocking(Conversations.page)
    find = blocking(Conversations.find)
    update_context = blocking(Conversations.update_context)


class SyncWorkflows(BlockingView[Workflows]):
    """``SyncSessionManager.workflows``."""

    track = blocking(Workflows.track)
    get = blocking(Workflows.get)
    unfinished = blocking(Workflows.unfinished)


class SyncSessionStates(BlockingView[SessionStates]):
    """``SyncSessionManager.states``."""

    save = blocking(SessionStates.save)
    add_contribution = blocking(SessionStates.add_contribution)
    load = blocking(SessionStates.load)
    load_all = blocking(SessionStates.load_all)
    delete = blocking(SessionStates.delete)


def _of_sync_manager(
    make: Callable[Concatenate[StatePersistenceManager, P], T],
) -> Callable[
    [Callable[[S, SyncStatePersistenceManager, T], None]],
    Callable[Concatenate[S, SyncStatePersistenceManager, P], None],
]:
    """As ``_constructed``, for what takes a manager: it is given the blocking one."""

    def decorate(
        init: Callable[[S, SyncStatePersistenceManager, T], None],
    ) -> Callable[Concatenate[S, SyncStatePersistenceManager, P], None]:
        def construct(
            self: S, manager: SyncStatePersistenceManager, /, *args: P.args, **kwargs: P.kwargs
        ) -> None:
            init(self, manager, make(manager.viewed, *args, **kwargs))

        return construct

    return decorate


class SyncSessionManager(BlockingView[SessionManager]):
    """Takes an open ``SyncStatePersistenceManager``, and options as ``SessionManager``."""

    @_of_sync_manager(SessionManager)
    def __init__(self, manager: SyncStatePersistenceManager, sessions: SessionManager) -> None:
        super().__init__(manager.thread, sessions)
        self.manager = manager
        self.tokens = SyncTokens(self.thread, sessions.tokens)
        self.conversations = SyncConversations(self.thread, sessions.conversations)
        self.workflows = SyncWorkflows(self.thread, sessions.workflows)
        self.states = SyncSessionStates(self.thread, sessions.states)

    extend = plain(SessionManager.extend)
    create = blocking(SessionManager.create)
    get = blocking(SessionManager.get)
    validate = blocking(SessionManager.validate)
    of_user = blocking(SessionManager.of_user)
    history = blocking(SessionManager.history)
    change = blocking(SessionManager.change)
    update = blocking(SessionManager.update)
    renew = blocking(SessionManager.renew)
    destroy = blocking(SessionManager.destroy)
    cleanup = blocking(SessionManager.cleanup)
