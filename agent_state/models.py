"""The stored states: agents, tasks, sleep, mail, and data of the system.

The models are open. Only the id is required and unknown fields are kept. The words for a status
or a priority are the writer's own, because the states of other session managers are stored too.
Times are text as it was written; this library writes UTC with microseconds and ``Z``
(``agent_state.clock.stamp``). A model is stored as the fields that were set or changed: an
untouched default is not written, so that reading a document and saving it leaves no diff.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictFloat,
    StrictInt,
    StringConstraints,
    ValidationError,
    model_serializer,
)

T = TypeVar("T")
NonEmptyStr = Annotated[str, StringConstraints(min_length=1)]


def _only_strings(value: Any) -> Any:
    """Report the first item that is not text: pydantic would report millions."""
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(item, str):
            raise ValueError(f"item {index} is not text")  # noqa: TRY004  # pydantic asks for it
    return value


StrList = Annotated[list[str], BeforeValidator(_only_strings)]
StoredTime = str | StrictInt | StrictFloat
"""A time: ISO 8601 text, or what another program writes, such as seconds since 1970. It is kept
as it is written; ``agent_state.clock.instant`` reads it."""
MAX_COUNT = 2**53
"""The highest count. A person may write a count as text, which could be beyond 64 bits."""

AgentStatus = Literal["idle", "active", "sleeping", "waiting", "stopped"]
"""The status that the runtime gives an agent. Other programs may store other words."""
TaskStatus = Literal["pending", "in_progress", "completed", "failed", "dead", "cancelled"]
"""The states of a task; ``agent_state.runtime`` has their rules."""
MailStatus = Literal["unread", "read", "replied", "archived"]
"""The states of a message."""
Priority = Literal["low", "normal", "high", "urgent"]
"""The priority of a task or a message."""
WakeEvent = Literal["mail_received", "high_priority_mail", "system_event", "manual_wake"]
"""An event that may end an agent's sleep."""

_STATUS_WORDS = frozenset(
    word for words in (AgentStatus, TaskStatus, MailStatus) for word in get_args(words)
)


def meaning_of(status: str) -> str:
    """Return the status that a word means, however a person or another program has written it.

    ``STOPPED`` is ``stopped`` and ``In Progress`` is ``in_progress``; other words mean themselves.
    """
    word = status.strip().lower().replace(" ", "_").replace("-", "_")
    return word if word in _STATUS_WORDS else status


ARCHIVE = "archive"
"""The last segment of the key of a log that holds what cleanup archived from a folder."""

UNFINISHED = frozenset({"pending", "in_progress", "failed"})
"""Task states with work left; ``failed`` waits for its next attempt."""

PRIORITIES = {"low": 0, "normal": 1, "medium": 1, "high": 2, "urgent": 3}
"""Rank of the priorities; a word that is not here counts as normal."""


def detached(value: T) -> T:
    """A deep copy, so that the caller may change its own value.

    A value that cannot be copied is returned as it is: the serializer refuses it, by name.
    """
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001  # a foreign object may raise anything
        return value


def plain_copy(value: Any) -> Any:
    """A deep copy of JSON values, with lists for tuples, as the store would give it back.

    A value that is not JSON, or nested too deeply, is returned as ``detached`` does.
    """
    try:
        return _plain(value)
    except RecursionError:
        return value


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is dict:
        return {key: item if type(item) in _LEAVES else _plain(item) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [item if type(item) in _LEAVES else _plain(item) for item in value]
    return detached(value)


_LEAVES = frozenset({str, int, float, bool, type(None)})


class OpenModel(BaseModel):
    """A model that keeps the fields it does not know, and stores only what was set or changed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    defaults: ClassVar[dict[str, Any]] = {}
    """The default of each optional field, to compare with; not to be changed."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        cls.defaults = {
            name: field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }

    @model_serializer(mode="wrap")
    def _as_stored(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        values, defaults = self.__dict__, self.defaults
        for name in defaults.keys() - self.model_fields_set:
            if values[name] == defaults[name]:
                data.pop(name, None)
        return data


M = TypeVar("M", bound=OpenModel)


def copied(model: M) -> M:
    """A deep copy. Many times as fast as pydantic's own, as most fields are text or empty."""
    copy = model.model_copy()
    for fields in (copy.__dict__, copy.model_extra or {}):
        for name, value in fields.items():
            if type(value) not in _LEAVES:
                fields[name] = plain_copy(value)
    return copy


class ConversationMessage(OpenModel):
    """One turn, as the runtime writes it; a history may also hold plain strings."""

    role: str
    """The speaker, such as ``user``, ``assistant`` or ``system``."""
    content: Any = ""
    """The text, or any JSON value."""
    timestamp: StoredTime | None = None
    """The time of the turn; None if unknown."""


class AgentMemory(OpenModel):
    """An agent's memory: its prompt, the conversation, and its working data."""

    system_prompt: str | None = None
    """The instructions the agent began with."""
    conversation_history: list[Any] = Field(default_factory=list)
    """The turns so far, oldest first: ``ConversationMessage`` objects, or plain strings."""
    conversation_history_offset: int = Field(default=0, ge=0, le=MAX_COUNT)
    """How many stored turns stand before those in ``conversation_history``, with a
    ``history_window``; a save leaves them as they are."""
    working_memory: dict[str, Any] = Field(default_factory=dict)
    """The data of the current work."""
    agent_data: dict[str, Any] = Field(default_factory=dict)
    """The application's own data about the agent."""


class AgentState(OpenModel):
    """One agent: its identity, its settings and its memory."""

    agent_id: NonEmptyStr
    """The agent's id; the key of its document."""
    agent_name: str | None = None
    """A name for people."""
    agent_type: str | None = None
    """The type, which selects the handler of its tasks."""
    status: str = "idle"
    """The activity of the agent, such as an ``AgentStatus``."""
    created_at: StoredTime | None = None
    """The time of its creation."""
    last_active: StoredTime | None = None
    """The time of its latest activity."""
    configuration: dict[str, Any] = Field(default_factory=dict)
    """The application's settings for the agent."""
    context: AgentMemory = Field(default_factory=AgentMemory)
    """The agent's memory."""
    tool_sets: list[Any] | dict[str, Any] = Field(default_factory=list)
    """The tools the agent may use, in the application's own form."""
    counters: dict[str, Any] = Field(default_factory=dict)
    """The application's counts, such as of tasks done."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """The application's further data."""


def dump_shared(state: AgentState) -> dict[str, Any]:
    """The state as it is stored, with the very messages of its conversation and not with copies."""
    data = state.model_dump(exclude={"context": {"conversation_history"}})
    history = state.context.conversation_history
    if "context" in data and (history or "conversation_history" in state.context.model_fields_set):
        data["context"]["conversation_history"] = history
    return data


def without_history_before(state: AgentState, start: int) -> AgentState:
    """The state with those turns of its conversation that stand behind the first ``start``.

    The state itself if it begins later, or ends before.
    """
    memory = state.context
    cut = start - memory.conversation_history_offset
    if not 0 < cut <= len(memory.conversation_history):
        return state
    later = {
        "conversation_history": memory.conversation_history[cut:],
        "conversation_history_offset": start,
    }
    return state.model_copy(update={"context": memory.model_copy(update=later)})


def trim_history(state: AgentState, window: int | None) -> AgentState:
    """The state with the last turns of its conversation, if there are twice as many as asked for.

    Not while a handler has a copy of them. ``window``: None for all.
    """
    memory = state.context
    count = len(memory.conversation_history)
    if window is None or count < 2 * window:
        return state
    return without_history_before(state, memory.conversation_history_offset + count - window)


class Lease(OpenModel):
    """The runtime that works on a task; it has the right to as long as it owns the agent."""

    owner: NonEmptyStr
    """The random id of the runtime."""
    token: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """The fencing token of its ownership of the agent; None where the store has one owner."""
    expires_at: StoredTime | None = None
    """Only older versions wrote it: the time after which another runtime could take the task."""


class Patch(OpenModel):
    """One change of an agent's memory, conversation or configuration."""

    op: Literal["replace", "remove", "append", "prepend", "discard", "add"]
    """``append`` continues a list or an object, ``prepend`` puts items before a list, ``discard``
    takes one out, ``add`` counts an integer; ``replace`` and ``remove`` are as in RFC 6902."""
    path: StrList
    """The field of the agent's context, or ``configuration``, and the keys below it."""
    value: Any = None
    """The new value, the further items, or the number to add."""


class TaskReference(OpenModel):
    """One task, by its agent and its id."""

    agent_id: NonEmptyStr
    """The agent whose task it is."""
    task_id: NonEmptyStr
    """The task's id."""


class Step(OpenModel):
    """One remembered step of a task."""

    status: str
    """``started``, ``done`` or ``failed``."""
    attempt: int = Field(default=1, ge=-MAX_COUNT, le=MAX_COUNT)
    """The attempt of the task in which the step ran."""
    result: Any = None
    """The result of a step that is ``done``."""
    error: str | None = None
    """The error of a step that ``failed``."""
    memory: list[Patch] = Field(default_factory=list)
    """The changes that the step made in the agent's memory, until they are stored with it."""


def _as_steps(value: Any) -> Any:
    """Validate step by step and report the first fault: pydantic would report millions."""
    if not isinstance(value, dict):
        return value
    steps = {}
    for name, step in value.items():
        try:
            steps[name] = Step.model_validate(step)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in (name, *fault["loc"]))
            raise ValueError(f"{where:.80}: {fault['msg']}") from None
    return steps


class Task(OpenModel):
    """One piece of work for one agent; see ``runtime.transitions`` for its states."""

    task_id: NonEmptyStr
    """The task's id, unique among the tasks of its agent."""
    agent_id: str = ""
    """The agent that does the work."""
    name: str = ""
    """The name of the work, such as ``summarize``."""
    payload: dict[str, Any] = Field(default_factory=dict)
    """The arguments for the handler."""
    payload_version: int = Field(default=1, ge=1, le=MAX_COUNT)
    """The version of the payload's layout, as its handler had it when the task was queued."""
    status: str = "pending"
    """The state of the task, such as a ``TaskStatus``."""
    priority: str = "normal"
    """The priority, such as a ``Priority``; a word that is not one counts as ``normal``."""
    created_at: StoredTime | None = None
    """The time of its submission."""
    started_at: StoredTime | None = None
    """The time at which the latest attempt began."""
    finished_at: StoredTime | None = None
    """The time at which it was completed, dead or cancelled."""
    scheduled_for: StoredTime | None = None
    """The time of the schedule that this task is the run of."""
    not_before: StoredTime | None = None
    """The earliest time for the next attempt; None for at once."""
    attempts: int = Field(default=0, ge=0, le=MAX_COUNT)
    """The number of attempts that have begun."""
    interruptions: int = Field(default=0, ge=0, le=MAX_COUNT)
    """The number of attempts that ended because the runtime stopped or died."""
    forgiven: int = Field(default=0, ge=0, le=MAX_COUNT)
    """The number of attempts before it was last run again on request; they count no more."""
    max_attempts: int = Field(default=3, ge=1, le=MAX_COUNT)
    """The number of failed attempts after which the task is ``dead``."""
    timeout_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The time limit of one attempt; None for no limit."""
    dedupe_key: str | None = None
    """A second submission with the same key returns this task."""
    dedupe_digest: str | None = None
    """A digest of what was submitted under the key."""
    dedupe_until: StoredTime | None = None
    """The time until which the key holds at least: cleanup keeps the task until then."""
    lease: Lease | None = None
    """The runtime that works on the task; None while no attempt runs."""
    progress: dict[str, Any] = Field(default_factory=dict)
    """The progress that the handler last reported."""
    steps: Annotated[dict[str, Step], BeforeValidator(_as_steps)] = Field(default_factory=dict)
    """The remembered steps by name."""
    result: Any = None
    """The handler's result, once the task is completed."""
    error: str | None = None
    """The error of the latest failed attempt."""
    traceback: str | None = None
    """Where that error was raised, as Python prints it; its end, if it is long."""
    cancel_requested: bool = False
    """The task is to be cancelled as soon as its runtime sees this."""
    sent_by: TaskReference | None = None
    """The task whose handler submitted this one; cleanup keeps this one as long as that one."""
    waits_for: list[TaskReference] = Field(default_factory=list)
    """The tasks whose ends its handler waits for; its next attempt begins once all have ended."""
    waits_until: StoredTime | None = None
    """The time at which its next attempt begins even if they have not."""
    wait_deadlines: dict[str, StoredTime] = Field(default_factory=dict)
    """The ends of its handler's waits with a limit: the next attempt is told the same."""
    trace: dict[str, str] = Field(default_factory=dict)
    """The trace context of its submission, such as W3C's ``traceparent``."""


class TaskQueueState(OpenModel):
    """All tasks of one agent. The lists hold tasks as they were given, in order."""

    agent_id: NonEmptyStr
    """The agent whose tasks these are."""
    pending_tasks: list[Any] = Field(default_factory=list)
    """The tasks that wait for an attempt."""
    in_progress_tasks: list[Any] = Field(default_factory=list)
    """The tasks that an attempt runs for."""
    completed_tasks: list[Any] = Field(default_factory=list)
    """The tasks that are completed, dead or cancelled."""


class SeenMail(OpenModel):
    """What unread mail an agent knew of when it fell asleep, in the order of its mailbox."""

    timestamp: str = ""
    """The time of the last of these messages."""
    message_id: str = ""
    """The id of the last of these messages."""
    digest: str = ""
    """A digest of all their ids."""


class SleepState(OpenModel):
    """The sleep of an agent: its reason, its end, and the events that end it."""

    agent_id: NonEmptyStr
    """The agent that sleeps."""
    is_sleeping: bool = True
    """False once the agent is awake."""
    sleep_started: StoredTime | None = None
    """The time at which it fell asleep."""
    sleep_until: StoredTime | None = None
    """The time at which it wakes; None for never, except by an event."""
    wake_events: StrList = Field(default_factory=list)
    """The events that wake it, such as a ``WakeEvent``."""
    reason: str | None = None
    """The reason, for people."""
    seen_mail: SeenMail | None = None
    """Unread mail that the agent knew of when it fell asleep; only other mail wakes it."""
    mail_seen: StrList = Field(default_factory=list)
    """Only older versions wrote it, in the place of ``seen_mail``: the ids of that mail."""


class MailMessage(OpenModel):
    """One message in one agent's mailbox."""

    message_id: NonEmptyStr
    """The message's id, unique in its mailbox."""
    from_agent: str = ""
    """The sender."""
    to_agent: str = ""
    """The agent whose mailbox holds the message."""
    subject: str = ""
    """The subject line."""
    body: Any = ""
    """The text, or any JSON value."""
    priority: str = "normal"
    """The priority, such as a ``Priority``; a word that is not one counts as ``normal``."""
    status: str = "unread"
    """The state of the message, such as a ``MailStatus``."""
    timestamp: StoredTime | None = None
    """The time at which it was sent."""
    read_at: StoredTime | None = None
    """The time at which the agent read it."""
    reply_to: str | None = None
    """The id of the message that this one answers."""
    replied_with: str | None = None
    """The id of the message that answered this one."""
    expects_reply: bool = False
    """The sender waits for an answer; the message is kept until then."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """The application's further data."""
    dedupe_key: str | None = None
    """A second message from the same sender with the same key is not delivered."""
    dedupe_digest: str | None = None
    """A digest of what was sent under the key."""
    dedupe_until: StoredTime | None = None
    """The time until which the key holds at least: cleanup keeps the message until then."""
    sent_by: TaskReference | None = None
    """The task whose handler sent it; cleanup keeps the message as long as that task."""


class MailboxState(OpenModel):
    """All mail of one agent."""

    agent_id: NonEmptyStr
    """The agent whose mail this is."""
    messages: list[Any] = Field(default_factory=list)
    """The messages, in order."""


class SystemState(OpenModel):
    """Data of the runtime or the application that belongs to no single agent; any fields."""


SCHEMAS: dict[str, type[OpenModel]] = {
    "agents": AgentState,
    "tasks": Task,
    "task_queues": TaskQueueState,
    "sleep": SleepState,
    "mail": MailMessage,
    "mailboxes": MailboxState,
    "system": SystemState,
}
"""The model of each schema; a document names its schema in ``_schema`` (``agents/1``)."""
