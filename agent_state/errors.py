"""Everything that can go wrong, as one tree.

    AgentStateError
    ├── StateNotFoundError (LookupError)      nothing is stored under this key
    │   ├── SessionNotFoundError              the session never existed, or was destroyed
    │   └── UnknownTokenError                 the token opens no session
    ├── StateValidationError (ValueError)     the state is invalid for its kind
    │   ├── DedupeKeyReusedError              the dedupe key stands for other content
    │   ├── InvalidPayloadError               a task's payload is not what its handler takes
    │   ├── UnknownAgentTypeError             a conversation's agent type is not registered
    │   ├── UnknownRoleError                  a message's role is not registered
    │   └── InvalidConversationIdError        the conversation id has the wrong form
    ├── StateCorruptedError                   the stored document is unreadable or invalid
    ├── SchemaTooNewError                     written by a newer version of this library
    ├── UnmergedStateError                    git has left a merge of the document unresolved
    ├── EncryptionKeyError                    the key of what is encrypted is wrong or missing
    │   └── ErasedKeyError                    … because it was erased
    ├── RevisionConflictError                 another save came first
    ├── PreconditionFailedError               the document has another revision than was required
    ├── LockTimeoutError (TimeoutError)       a lock was not free in time
    ├── StateDirectoryInUseError              another process owns, or writes to, the directory
    ├── LeaseLostError                        another owner has taken over the agent or task
    ├── StorageError (OSError)                the operating system refused; nothing was changed
    │   ├── StorageFullError                  … because the disk is full
    │   └── DurabilityUnknownError            the change may or may not survive a power cut
    ├── SerializationError (TypeError)        the value cannot be stored as JSON
    ├── InvalidKeyError (ValueError)          the id is empty, too long, or not text
    ├── UnknownStepError                      a step may have run before the process died
    ├── TaskFailedError                       the task ended without a result
    ├── TaskTimeoutError (TimeoutError)       the task has not ended in time
    ├── RuntimeNotStartedError                the runtime has not started, or was stopped
    ├── SessionEndedError                     the session accepts no more writes
    │   ├── SessionExpiredError               … because it has expired
    │   └── SessionClosedError                … because it was closed
    ├── OffTheRecordError                     the session may not be written anywhere
    ├── UnreadableMessageError (ValueError)   the value to record is not a message
    ├── QueryError (ValueError)               the query of a recording is invalid
    ├── MirrorError                           the mirror could not follow
    └── MissingExtraError (ImportError)       an optional part is not installed

Each error carries ``kind``, ``key`` and ``path`` where it has them, and names them
in its message.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath

Key = tuple[str, ...]


class AgentStateError(Exception):
    """Something in agent_state went wrong."""

    def __init__(
        self,
        message: str = "",
        *,
        kind: str | None = None,
        key: Key | str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        self.kind = kind
        self.key: Key | None = (key,) if isinstance(key, str) else key
        self.path = None if path is None else fspath(path)
        self.message = message or (type(self).__doc__ or "").split("\n", 1)[0]
        super().__init__(self.message)

    def __str__(self) -> str:
        where = []
        if self.kind is not None:
            where.append(describe(self.kind, self.key))
        if self.path is not None:
            where.append(self.path)
        return f"{self.message} [{', '.join(where)}]" if where else self.message


class StateNotFoundError(AgentStateError, LookupError):
    """Nothing is stored under this key."""


class StateValidationError(AgentStateError, ValueError):
    """The state is invalid for its kind."""


class DedupeKeyReusedError(StateValidationError):
    """The dedupe key was used before, for other content. Nothing was changed."""


class InvalidPayloadError(StateValidationError):
    """The payload of a task is not what its handler takes; the task is not tried again."""


class SessionNotFoundError(StateNotFoundError):
    """The session does not exist: it never did, or it was destroyed."""


class UnknownTokenError(StateNotFoundError):
    """The token does not open the session that was asked for, or any session."""


class UnknownAgentTypeError(StateValidationError):
    """The agent type is malformed, or is not among those that the application registered."""


class UnknownRoleError(StateValidationError):
    """The role is not among the usual ones and those that the application registered."""


class InvalidConversationIdError(StateValidationError):
    """A conversation id has the form ``conv_<agent type>_<session id>``."""


class StateCorruptedError(AgentStateError):
    """The stored document is unreadable or invalid."""


class SchemaTooNewError(AgentStateError):
    """The document was written by a newer version of this library; it is left untouched."""


class UnmergedStateError(AgentStateError):
    """Git has left a merge of the document unresolved; until then it is read-only.

    The file is left alone, and the last good version is read.
    """


class EncryptionKeyError(AgentStateError):
    """The key of what is encrypted is wrong or missing; what is stored is left untouched."""


class ErasedKeyError(EncryptionKeyError):
    """The encryption key was erased, and with it what it had encrypted."""


class RevisionConflictError(AgentStateError):
    """Another save came first.

    ``expected`` is the revision the caller built on, ``actual`` the stored one
    (0: nothing is stored).
    """

    def __init__(
        self,
        message: str = "",
        *,
        expected: int = 0,
        actual: int = 0,
        kind: str | None = None,
        key: Key | str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        self.expected = expected
        self.actual = actual
        message = message or f"expected revision {expected}, found {actual}"
        super().__init__(message, kind=kind, key=key, path=path)


class PreconditionFailedError(AgentStateError):
    """The document has another revision than was required. Nothing was changed.

    ``actual`` is the stored one (0: nothing is stored). Unlike ``RevisionConflictError`` it is no
    reason to try again.
    """

    def __init__(
        self,
        message: str = "",
        *,
        actual: int = 0,
        kind: str | None = None,
        key: Key | str | None = None,
    ) -> None:
        self.actual = actual
        super().__init__(message or f"it is at revision {actual} now", kind=kind, key=key)


class LockTimeoutError(AgentStateError, TimeoutError):
    """A lock was not free in time."""


class StateDirectoryInUseError(AgentStateError):
    """Another process owns the directory, or writes to it.

    ``pid`` is the process that holds the lock, when it could be read.
    """

    def __init__(
        self, message: str = "", *, pid: int | None = None, path: str | PathLike[str] | None = None
    ) -> None:
        self.pid = pid
        if pid:
            message = f"{message} (pid {pid})"
        super().__init__(message, path=path)


class LeaseLostError(AgentStateError):
    """Another owner has taken over what this one held."""


class StorageError(AgentStateError, OSError):
    """The operating system refused; the stored version is unchanged.

    ``errno`` is the operating system's number, when there was one.
    """

    def __init__(
        self,
        message: str = "",
        *,
        number: int | None = None,
        kind: str | None = None,
        key: Key | str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__(message, kind=kind, key=key, path=path)
        self.errno = number


class StorageFullError(StorageError):
    """The disk (or a quota, or the table of inodes) is full; nothing was changed."""


class DurabilityUnknownError(StorageError):
    """The change was made, but the disk did not confirm it: it may or may not survive."""


class SerializationError(AgentStateError, TypeError):
    """The value cannot be stored as JSON without loss.

    ``field`` is the path inside the value, such as ``context.scores[3]``.
    """

    def __init__(
        self,
        message: str = "",
        *,
        field: str = "",
        kind: str | None = None,
        key: Key | str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        self.field = field
        super().__init__(message, kind=kind, key=key, path=path)


class InvalidKeyError(AgentStateError, ValueError):
    """The id is empty, longer than 4 KiB, or not valid Unicode."""


class UnknownStepError(AgentStateError):
    """A step had started when an earlier attempt ended; it is unknown whether it finished."""


class TaskFailedError(AgentStateError):
    """The task ended as ``dead`` or ``cancelled`` (``status``), with ``error`` as its reason."""

    def __init__(self, status: str, error: str | None, *, key: Key) -> None:
        self.status = status
        self.error = error
        super().__init__(
            f"the task is {status}: {error or 'no reason given'}", kind="tasks", key=key
        )


class TaskTimeoutError(AgentStateError, TimeoutError):
    """The task has not ended in time; it goes on."""


class RuntimeNotStartedError(AgentStateError):
    """The runtime has not started, or was stopped; use ``async with``, ``start`` or ``serve``."""


class SessionEndedError(AgentStateError):
    """The session has ended: nothing more is written to it."""


class SessionExpiredError(SessionEndedError):
    """The session has expired: nothing more is written to it."""


class SessionClosedError(SessionEndedError):
    """The session was closed: nothing more is written to it."""


class OffTheRecordError(AgentStateError):
    """The session is off the record: nothing of it may leave memory."""


class UnreadableMessageError(AgentStateError, ValueError):
    """The value to record is not a message."""


class QueryError(AgentStateError, ValueError):
    """The query of a recording is invalid."""


class MirrorError(AgentStateError):
    """The mirror could not follow the files."""


class MissingExtraError(AgentStateError, ImportError):
    """An optional part of agent-state is not installed."""

    def __init__(self, extra: str, package: str) -> None:
        self.extra = extra
        super().__init__(
            f"{package} is missing; install it with: pip install 'agent-state[{extra}]'"
        )


@contextmanager
def needs_extra(extra: str, *packages: str) -> Iterator[None]:
    """Around imports: raise ``MissingExtraError`` if one of the extra's packages is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        raise MissingExtraError(extra, package) from error


_FULL = frozenset(
    number
    for number in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG)
    if number is not None
)


def describe(kind: str, key: Key | None) -> str:
    """``tasks/alice/42``, for people. It is not a path: a key may contain any character."""
    return "/".join((kind, *(key or ())))


@contextmanager
def concerning(kind: str, key: Key) -> Iterator[None]:
    """Add the document to errors of files and locks that do not name it.

    Each caller gets its own error object, because one failed batch may have many callers.
    """
    try:
        yield
    except StorageError as error:
        if error.kind is not None:
            raise
        number, path = error.errno, error.path
        raise type(error)(error.message, number=number, kind=kind, key=key, path=path) from error
    except LockTimeoutError as error:
        if error.kind is not None:
            raise
        raise type(error)(error.message, kind=kind, key=key, path=error.path) from error


def storage_error(
    error: OSError,
    doing: str,
    *,
    kind: str | None = None,
    key: Key | str | None = None,
    path: str | PathLike[str] | None = None,
) -> StorageError:
    """The typed error for an ``OSError``, with the action that failed and its path."""
    cls = StorageFullError if error.errno in _FULL else StorageError
    where = path if path is not None else error.filename
    reason = error.strerror or str(error) or type(error).__name__
    return cls(f"{doing}: {reason}", number=error.errno, kind=kind, key=key, path=where)
