"""What is kept: agents, tasks, sleep, mail, and what the system as a whole must remember.

The models are open. Only the id is required, unknown fields are kept, and the words for a
status or a priority are the writer's own, since other people's session managers are stored
too. Times are text as it was written; what this library writes is UTC with microseconds and
``Z`` (``agent_state.clock.stamp``). A model is stored as what was set or changed: a default
that nobody touched is not written, so that reading a document and saving it leaves no diff.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)

T = TypeVar("T")
NonEmptyStr = Annotated[str, StringConstraints(min_length=1)]


def _only_strings(value: Any) -> Any:
    """Each wrong item of a list is an error to pydantic; of a file of millions one is told."""
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(item, str):
            raise ValueError(f"item {index} is not text")  # noqa: TRY004  # pydantic asks for it
    return value


StrList = Annotated[list[str], BeforeValidator(_only_strings)]
MAX_COUNT = 2**53
"""No count is higher. A person may write one as text, where it could be beyond 64 bits."""

AgentStatus = Literal["idle", "active", "sleeping", "waiting", "stopped"]
TaskStatus = Literal["pending", "in_progress", "completed", "failed", "dead", "cancelled"]
MailStatus = Literal["unread", "read", "replied", "archived"]
Priority = Literal["low", "normal", "high", "urgent"]
WakeEvent = Literal["mail_received", "high_priority_mail", "system_event", "manual_wake"]

UNFINISHED = frozenset({"pending", "in_progress", "failed"})
"""Task states that will still be worked on; ``failed`` waits for its next attempt."""

PRIORITIES = {"low": 0, "normal": 1, "medium": 1, "high": 2, "urgent": 3}
"""Rank of the priorities; a word that is not here counts as normal."""


def detached(value: T) -> T:
    """A copy that shares nothing with the caller's value, which may change from here on.

    What cannot be copied is no JSON; it is refused, by name, where it is to be stored.
    """
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001  # a foreign object may raise anything
        return value


class OpenModel(BaseModel):
    """A model that keeps the fields it does not know, and stores only what was set or changed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    defaults: ClassVar[dict[str, Any]] = {}
    """What each optional field is when nobody has touched it; to compare with, never to change."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        cls.defaults = {
            name: field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }

    @model_serializer(mode="wrap")
    def _as_stored(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = whole(self)
        given = self.model_fields_set
        for name, default in self.defaults.items():
            if name not in given and getattr(self, name) == default:
                data.pop(name, None)
        return data


class ConversationMessage(OpenModel):
    """One turn, as the runtime writes it; a history may also hold plain strings."""

    role: str
    content: Any = ""
    timestamp: str | None = None


class AgentMemory(OpenModel):
    """What the agent knows: its prompt, what was said, what it is working on."""

    system_prompt: str | None = None
    conversation_history: list[Any] = Field(default_factory=list)
    working_memory: dict[str, Any] = Field(default_factory=dict)
    agent_data: dict[str, Any] = Field(default_factory=dict)


class AgentState(OpenModel):
    """One agent session."""

    agent_id: NonEmptyStr
    agent_name: str | None = None
    agent_type: str | None = None
    status: str = "idle"
    created_at: str | None = None
    last_active: str | None = None
    configuration: dict[str, Any] = Field(default_factory=dict)
    context: AgentMemory = Field(default_factory=AgentMemory)
    tool_sets: list[Any] | dict[str, Any] = Field(default_factory=list)
    counters: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)


class Lease(OpenModel):
    """Who works on a task, and until when nobody else may. ``owner`` is a runtime's random id."""

    owner: NonEmptyStr
    expires_at: str


class Step(OpenModel):
    """One remembered step of a task: ``started``, ``done`` with its result, or ``failed``."""

    status: str
    attempt: int = Field(default=1, ge=-MAX_COUNT, le=MAX_COUNT)
    result: Any = None
    error: str | None = None


def _as_steps(value: Any) -> Any:
    """Steps one by one: the first that is none is told, and a file of millions told as one."""
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
    agent_id: str = ""
    name: str = ""
    payload: dict[str, Any] = Field(default_factory=dict)
    status: str = "pending"
    priority: str = "normal"
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    not_before: str | None = None
    attempts: int = Field(default=0, ge=0, le=MAX_COUNT)
    interruptions: int = Field(default=0, ge=0, le=MAX_COUNT)
    max_attempts: int = Field(default=3, ge=1, le=MAX_COUNT)
    timeout_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    dedupe_key: str | None = None
    lease: Lease | None = None
    progress: dict[str, Any] = Field(default_factory=dict)
    steps: Annotated[dict[str, Step], BeforeValidator(_as_steps)] = Field(default_factory=dict)
    result: Any = None
    error: str | None = None
    cancel_requested: bool = False


class TaskQueueState(OpenModel):
    """All tasks of one agent. The lists hold tasks as they were given, in order."""

    agent_id: NonEmptyStr
    pending_tasks: list[Any] = Field(default_factory=list)
    in_progress_tasks: list[Any] = Field(default_factory=list)
    completed_tasks: list[Any] = Field(default_factory=list)


class SleepState(OpenModel):
    """Why and until when an agent sleeps. No ``sleep_until``: until an event wakes it."""

    agent_id: NonEmptyStr
    is_sleeping: bool = True
    sleep_started: str | None = None
    sleep_until: str | None = None
    wake_events: StrList = Field(default_factory=list)
    reason: str | None = None
    mail_seen: StrList = Field(default_factory=list)
    """Unread mail that the agent knew of when it fell asleep; only other mail wakes it."""


class MailMessage(OpenModel):
    """One message in one agent's mailbox."""

    message_id: NonEmptyStr
    from_agent: str = ""
    to_agent: str = ""
    subject: str = ""
    body: Any = ""
    priority: str = "normal"
    status: str = "unread"
    timestamp: str | None = None
    read_at: str | None = None
    reply_to: str | None = None
    replied_with: str | None = None
    expects_reply: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)


class MailboxState(OpenModel):
    """All mail of one agent, as one view over its messages."""

    agent_id: NonEmptyStr
    messages: list[Any] = Field(default_factory=list)


class SystemState(OpenModel):
    """What the runtime, or an application, must remember as a whole; any fields."""


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
