"""The bodies, parameters and responses of the routes, except the stored documents themselves."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Header, Path, Query
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from agent_state.models import Priority, Task, TaskStatus, WakeEvent
from agent_state.runtime.operations import Action
from agent_state.sessions import AddedMessage, Conversation, Session, SessionMessage, WorkflowState

T = TypeVar("T")

MAX_ID_LENGTH = 4096
MAX_PAGE_ITEMS = 1000
MAX_WAIT_SECONDS = 60.0
_TEN_YEARS = 10 * 366 * 86_400.0

# -- parameters --------------------------------------------------------------------------------

PathId = Annotated[str, Path(min_length=1, max_length=MAX_ID_LENGTH)]
After = Annotated[
    str | None,
    Query(max_length=MAX_ID_LENGTH, description="Start after this id: `next` of the page before."),
]
Cursor = Annotated[
    str | None,
    Query(max_length=4 * MAX_ID_LENGTH, description="Start after the page that had it as `next`."),
]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE_ITEMS, description="At most so many.")]
Wait = Annotated[
    float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for the task to end.")
]
IdempotencyKey = Annotated[
    str | None,
    Header(max_length=255, description="A request that is repeated with its key is done once."),
]
IfMatch = Annotated[
    str | None,
    Header(max_length=1000, description="The ETag of the version that may be changed, or several."),
]
LastEventId = Annotated[
    str | None,
    Header(max_length=64, description="The id of the last event that the client received."),
]
Include = Annotated[
    Literal["body"] | None, Query(description="`body`: each change has the document, too.")
]
RecordNumber = Annotated[int | None, Query(ge=0, le=2**53)]
Moment = Annotated[AwareDatetime | None, Field(description="A time with its UTC offset.")]

# -- parts of bodies ---------------------------------------------------------------------------

NonEmptyId = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Seconds = Annotated[float, Field(ge=0, le=_TEN_YEARS, allow_inf_nan=False)]
MergeMode = Literal["merge", "replace"]


class RequestModel(BaseModel):
    """The body of a request. An unknown field is an error, and 0 is not a boolean."""

    model_config = ConfigDict(extra="forbid", strict=True)


def example(body: dict[str, Any]) -> ConfigDict:
    """The settings of the model of a body that the OpenAPI document shows an example of."""
    return ConfigDict(json_schema_extra={"examples": [body]})


class Page(BaseModel, Generic[T]):
    """Some of many items, in the order of their ids."""

    items: list[T]
    next: str | None = Field(
        default=None, description="The `after` of the next page; null on the last one."
    )
    unusable: list[str] = Field(
        default_factory=list, description="Ids of documents that cannot be read."
    )


# -- the server --------------------------------------------------------------------------------


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"] = "ok"
    service: Literal["agent_state"] = "agent_state"
    version: str
    mode: Literal["runtime", "manager", "read-only"]
    session_manager_available: bool = True
    added_routes: list[str] = Field(description="The tags of the routes that packages add.")


class Ready(BaseModel):
    """The state can be read."""

    status: Literal["ready"] = "ready"
    agents_here: int = Field(description="The number of agents that run in this server.")
    writable: bool = Field(description="The server can change the state.")


class StartReport(BaseModel):
    """The result of the last start; see ``RestoreReport``."""

    model_config = ConfigDict(extra="allow")

    after_crash: bool
    agents: list[str]
    requeued: list[dict[str, Any]]
    contained: list[dict[str, Any]]
    seconds: float


# -- agents, tasks, mail -----------------------------------------------------------------------


class NewAgent(RequestModel):
    """An agent to create."""

    model_config = example({"agent_id": "alice", "agent_type": "researcher"})

    agent_id: NonEmptyId
    agent_type: NonEmptyId
    name: str | None = None
    configuration: dict[str, Any] = Field(default_factory=dict)
    system_prompt: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class SleepRequest(RequestModel):
    """The sleep of an agent: for ``seconds``, or ``until``, or until an event wakes it."""

    model_config = example({"seconds": 3600, "reason": "waits for the review"})

    seconds: Seconds | None = None
    until: Annotated[AwareDatetime, Field(strict=False)] | None = None
    wake_on: list[WakeEvent] = Field(default_factory=list, max_length=16)
    reason: str | None = None


class WakeResult(BaseModel):
    """The result of waking an agent."""

    woken: bool = Field(description="The agent was asleep.")


class NewTask(RequestModel):
    """A task to queue."""

    model_config = example({"name": "summarize", "payload": {"url": "https://example.org"}})

    name: NonEmptyId
    payload: dict[str, Any] = Field(default_factory=dict)
    priority: Priority = "normal"
    delay_seconds: Seconds = 0.0
    max_attempts: int = Field(default=3, ge=1, le=1000)
    timeout_seconds: Annotated[float, Field(gt=0, le=_TEN_YEARS, allow_inf_nan=False)] | None = None


class CancelResult(BaseModel):
    """The result of cancelling a task."""

    cancelled: bool = Field(description="The task had not ended before.")


class RetryResult(BaseModel):
    """The result of running a task again."""

    retried: bool = Field(description="The task was dead, failed or cancelled before.")


class TaskSelection(RequestModel):
    """Which tasks are meant: those to which everything applies that is given."""

    status: list[TaskStatus] = Field(default_factory=list, max_length=6)
    name: str | None = None
    agent_id: str | None = None
    error: str | None = Field(default=None, description="Text that the error contains.")
    older_than_seconds: Seconds | None = None
    newer_than_seconds: Seconds | None = None


class TaskOperation(RequestModel):
    """An operation on tasks: on those that are named, or on all that a filter matches."""

    model_config = example({"action": "retry", "filter": {"status": ["dead"]}, "dry_run": True})

    action: Action
    tasks: list[NonEmptyId] = Field(
        default_factory=list, max_length=MAX_PAGE_ITEMS, description="Ids, or agent/id."
    )
    filter: TaskSelection | None = None
    dry_run: bool = Field(default=False, description="Count the tasks, and change nothing.")


class WakeRequest(RequestModel):
    """Which sleepers are to wake."""

    model_config = example({"text": "waits for the review", "dry_run": True})

    text: str | None = Field(
        default=None, max_length=200, description="Only with this in their ids or reasons."
    )
    dry_run: bool = Field(default=False, description="Count them, and change nothing.")


class OperationReport(BaseModel):
    """What an operation has done."""

    matched: int = Field(description="The number of tasks or agents that it applies to.")
    changed: int
    refused: dict[str, str] = Field(description="Those that were left, with the reason.")
    dry_run: bool


class NewMail(RequestModel):
    """A message to deliver."""

    model_config = example({"from_agent": "bob", "subject": "done", "body": "It is in the file."})

    from_agent: NonEmptyId
    subject: str = ""
    body: Any = ""
    priority: Priority = "normal"
    expects_reply: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)


class ReplyRequest(RequestModel):
    """The reply to a message."""

    model_config = example({"body": "The first three pages."})

    body: Any = ""
    priority: Priority = "normal"


# -- sessions ----------------------------------------------------------------------------------


class NewSession(RequestModel):
    """A session to create; without a user it is anonymous."""

    model_config = example({"user_id": "ann", "context": {"page": "upload"}})

    user_id: Annotated[str, Field(max_length=MAX_ID_LENGTH)] | None = None
    session_type: str | None = Field(default=None, description="Kept in the context.")
    context: dict[str, Any] = Field(default_factory=dict)


class SessionChange(RequestModel):
    """A change of a session's state, its context, or both."""

    model_config = example({"state": {"step": "choose"}})

    state: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    mode: MergeMode = "merge"


class ConversationView(Conversation):
    """A conversation with its latest messages, oldest first."""

    messages: list[SessionMessage] = Field(default_factory=list)


class SessionView(BaseModel):
    """A session with everything that a page needs to show it.

    Its document's unknown fields and those of installed extensions are further fields.
    """

    model_config = ConfigDict(extra="allow")

    session_id: str
    session_token: str | None = Field(
        default=None, description="Only in the response that creates the session."
    )
    user_id: str | None
    status: Literal["active"]
    created_at: str
    updated_at: str
    last_activity: str
    expires_at: str
    context: dict[str, Any]
    state: dict[str, Any]
    workflow_states: dict[str, WorkflowState]
    conversations: dict[str, ConversationView]

    @classmethod
    def of(cls, session: Session, conversations: dict[str, ConversationView]) -> SessionView:
        """The view of a session, without its token."""
        shared = cls.model_fields.keys() & Session.model_fields.keys() - {"conversations"}
        fields = {name: getattr(session, name) for name in shared}
        return cls(**{**(session.model_extra or {}), **fields}, conversations=conversations)


class SessionToken(BaseModel):
    """The new token of a session; only its hash is stored."""

    session_token: str


class RevokeResult(BaseModel):
    """The result of revoking a session's token."""

    revoked: bool = Field(description="The session had a token before.")


class MessageTask(RequestModel):
    """A task that is queued with a message. Its payload also gets the ids of the message."""

    agent_id: NonEmptyId
    name: NonEmptyId
    payload: dict[str, Any] = Field(default_factory=dict)
    priority: Priority = "normal"


class NewSessionMessage(RequestModel):
    """A message to add to a conversation. ``content``: text, or any JSON."""

    model_config = example({"content": "Help me upload a file."})

    role: NonEmptyId = "user"
    content: Any
    orchestrator_context: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    task: MessageTask | None = None


class AnsweredMessage(AddedMessage):
    """A message that is stored, and the task that was queued with it."""

    model_config = ConfigDict(json_schema_extra={"title": "AddedMessage"})

    task: Task | None = None


class ContextChange(RequestModel):
    """A change of the workflow context of a conversation."""

    model_config = example({"context": {"workflow_id": "upload-1"}})

    context: dict[str, Any]
    mode: MergeMode = "merge"


class StateChange(RequestModel):
    """A state that replaces the stored one of the same id."""

    model_config = example({"state_data": {"files": 1}, "workflow_id": "upload-1"})

    state_data: dict[str, Any]
    orchestrator: NonEmptyId | None = None
    workflow_id: NonEmptyId | None = None
    delegation_chain: list[NonEmptyId] | None = Field(default=None, max_length=100)
    metadata: dict[str, Any] | None = None
    ttl: Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)] | None = None


class ConversationOwner(BaseModel):
    """The session and the agent type of a conversation."""

    session_id: str
    agent_type: str


# -- looking over all agents -------------------------------------------------------------------


class QueueSummary(BaseModel):
    """The open tasks of all agents of one type."""

    agent_type: str
    waiting: int = Field(description="Tasks that wait for an attempt, at any time.")
    running: int
    oldest_seconds: float = Field(description="How long the oldest has been due; 0 if none is.")


class MirrorSummary(BaseModel):
    """The mirror of the store."""

    state: str
    waiting: int = Field(description="Documents and logs that have changed and are not copied.")
    lag_seconds: float


class JournalSummary(BaseModel):
    """The write-ahead log: what is durable, and not yet in its file."""

    documents: int
    oldest_seconds: float


class Summary(BaseModel):
    """What a person wants to see first."""

    version: str
    mode: Literal["runtime", "manager", "read-only"]
    writable: bool
    now: str = Field(description="The server's time.", json_schema_extra={"format": "date-time"})
    directory: str | None = Field(description="Null if the store has no directory.")
    owner_pid: int | None = Field(description="The process that owns the directory; null if none.")
    agents: int
    agents_here: int = Field(description="Those that run in this server.")
    agents_by_status: dict[str, int]
    tasks: int
    tasks_by_status: dict[str, int]
    queues: list[QueueSummary]
    sleepers: int
    mail: int
    unread_mail: int
    sessions: int
    dead_letters: int
    quarantined: int
    journal: JournalSummary | None
    mirror: MirrorSummary | None
    added_routes: list[str] = Field(description="The tags of the routes that packages add.")


class QuarantinedDocument(BaseModel):
    """A file that could not be used, and the reason. Paths are relative to the directory."""

    path: str
    was: str | None
    reason: str
    at: str | None
    kind: str | None
    key: list[str]


class DocumentView(BaseModel):
    """A document as it is stored."""

    kind: str
    key: list[str]
    revision: int
    saved_at: str | None = Field(json_schema_extra={"format": "date-time"})
    schema_name: str = Field(description="Such as `agents/1`; empty if a person left it out.")
    edited: bool = Field(description="A person, or another program, wrote this version.")
    path: str = Field(description="The file, relative to the state directory.")
    body: dict[str, Any]


class DocumentChange(RequestModel):
    """The new content of a document."""

    model_config = example({"body": {"agent_id": "alice", "agent_type": "researcher"}})

    body: dict[str, Any]


class DocumentVersion(BaseModel):
    """One version of a document."""

    source: Literal["current", "snapshot", "git"]
    revision: int | None
    at: str | None = Field(json_schema_extra={"format": "date-time"})
    commit: str | None = Field(default=None, description="The commit in git that has it.")
    author: str | None = None
    message: str | None = None
    body: dict[str, Any] | None = Field(
        description="Null if it was removed, is damaged, or is encrypted."
    )


class LogView(BaseModel):
    """The name of a log."""

    kind: str
    key: list[str]
    path: str = Field(description="The file, relative to the state directory.")


class LogLine(BaseModel):
    """One record of a log."""

    seq: int
    record: dict[str, Any]


class ChangedDocument(BaseModel):
    """A document that changed lately."""

    id: str = Field(description="The id of the event.")
    kind: str
    key: list[str]
    revision: int | None
    outside: bool


class SavedDocument(BaseModel):
    """A document that was saved."""

    revision: int


# -- logging in --------------------------------------------------------------------------------


class Login(RequestModel):
    """The token to turn into a cookie."""

    model_config = example({"token": "a-token-of-the-server"})

    token: NonEmptyId


class LoginState(BaseModel):
    """Who the client is."""

    role: Literal["operator", "session", "nobody"]
    session_id: str | None = None
    writable: bool = Field(description="The server can change the state.")
    csrf_token: str | None = Field(
        default=None, description="For the header `X-CSRF-Token` of requests without an `Origin`."
    )
