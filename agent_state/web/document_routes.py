"""The routes of documents and logs as they are stored: read, edit, and what they were before."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import Query, Request

from agent_state.conversation_log import join_file
from agent_state.errors import AgentStateError, Key, StateCorruptedError, StateNotFoundError
from agent_state.protocols import Notice
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document import decode_document
from agent_state.storage.fileio import read_file
from agent_state.storage.paths import DOCUMENT, LOG, relative
from agent_state.storage.sealed_store import is_sealed
from agent_state.web.auth import operator
from agent_state.web.backend import Backend, BackendDep
from agent_state.web.models import (
    ChangedDocument,
    DocumentChange,
    DocumentVersion,
    DocumentView,
    LogLine,
    LogView,
    NonEmptyId,
    Page,
    PathId,
    SavedDocument,
)
from agent_state.web.operations import OperationRouter, Versioned
from agent_state.web.problems import Problem

router = OperationRouter(
    "/api", "documents", access=operator, about="Documents and logs as they are stored."
)

DocumentKey = Annotated[
    list[NonEmptyId],
    Query(min_length=1, max_length=16, description="The parts of the key, in order."),
]
_GIT_VERSIONS = 20
_GIT_SECONDS = 10


async def _document(given: Mapping[str, Any]) -> tuple[str, Key]:
    return given["kind"], tuple(given["key"])


@router.operation("GET", "/documents/{kind:id}")
async def get_document(
    backend: BackendDep, kind: PathId, key: DocumentKey
) -> Versioned[DocumentView]:
    """One document as it is stored. Its `ETag` is its revision."""
    place = tuple(key)
    async with backend.view() as view:
        found = await view.manager.document(kind, place)
        if found is None:
            raise StateNotFoundError("there is no such document", kind=kind, key=place)
        document = DocumentView(
            kind=kind,
            key=key,
            revision=found.revision,
            saved_at=found.saved_at or None,
            schema_name=found.schema,
            edited=found.edited,
            path=relative(kind, place, DOCUMENT),
            body=view.manager.serializer.loads(found.body),
        )
    return Versioned(document, found.revision)


@router.operation("PUT", "/documents/{kind:id}", changes=_document, must_match=True)
async def put_document(
    backend: BackendDep, kind: PathId, key: DocumentKey, change: DocumentChange
) -> Versioned[SavedDocument]:
    """Replace a document; it is validated, as an edit of its file is.

    `If-Match` is required (428), and refused if the document has changed since (412). The document
    of an agent that is working is refused (409): its handler would save over it.
    """
    manager, place = backend.writable().manager, tuple(key)
    found = await manager.document(kind, place)
    if found is None:
        raise StateNotFoundError("there is no such document", kind=kind, key=place)
    await _check_idle(backend, kind, place)
    revision = await manager.save(kind, place, change.body, expected=found.revision)
    await _tell(backend, kind, place)
    return Versioned(SavedDocument(revision=revision), revision)


async def _check_idle(backend: Backend, kind: str, key: Key) -> None:
    runtime = backend.runtime
    if runtime is None or kind not in {"agents", "tasks"}:
        return
    agent = runtime.state.agents.get(key[0])
    if agent is None or agent.current is None:
        return
    if kind == "agents" or agent.current.task.task_id == key[-1]:
        raise Problem(409, "conflict", "The agent is working, and would save over the change.")


async def _tell(backend: Backend, kind: str, key: Key) -> None:
    """Let the runtime take the change in, as it does with an edit of the file."""
    if backend.runtime is not None:
        await backend.runtime.reconciler.notice(Notice(kind, key, 0, outside=True))


# -- earlier versions --------------------------------------------------------------------------


@router.operation("GET", "/history/{kind:id}")
async def get_document_history(
    backend: BackendDep, kind: PathId, key: DocumentKey
) -> Page[DocumentVersion]:
    """The versions of a document that are still known, the newest first.

    Besides the current one: the snapshot, which is at most a minute older, and those of the latest
    commits, if the directory is in a git repository and `git` is installed.
    """
    place = tuple(key)
    async with backend.view() as view:
        manager = view.manager
        found = await manager.document(kind, place)
        items = []
        if found is not None:
            body = manager.serializer.loads(found.body)
            items.append(
                DocumentVersion(
                    source="current", revision=found.revision, at=found.saved_at or None, body=body
                )
            )
        directory = (await manager.store.origin()).state_dir
        if directory is not None:
            items += await asyncio.to_thread(_earlier, directory, kind, place)
    if not items:
        raise StateNotFoundError("there is no such document", kind=kind, key=place)
    return Page(items=items)


def _earlier(directory: str, kind: str, key: Key) -> list[DocumentVersion]:
    files = StateDirectory(directory, sync=False, now=str)
    data = files.documents.snapshots.bytes_of(files.tree.path(kind, key))

    def log(path: str) -> bytes:
        found = read_file(f"{directory}/{path}")
        return b"" if found is None else found[0]

    found = [] if data is None else [_version("snapshot", kind, key, data, log)]
    return found + _committed(directory, kind, key)


def _version(
    source: Any,
    kind: str,
    key: Key,
    data: bytes | None,
    log: Callable[[str], bytes],
    **more: str | None,
) -> DocumentVersion:
    """``log`` gives the bytes of a log by its path: a version of an agent has its conversation."""
    at, commit = more.pop("at", None), more
    try:
        if data is None:
            return DocumentVersion(source=source, revision=None, at=at, body=None, **commit)
        document = decode_document(kind, key, data)[0]
        if is_sealed(document.body):  # its key is not at hand here
            raise StateCorruptedError("it is encrypted", kind=kind, key=key)
        document, _ = join_file(document, log)
    except AgentStateError:
        return DocumentVersion(source=source, revision=None, at=at, body=None, **commit)
    return DocumentVersion(
        source=source,
        revision=document.revision,
        at=at or document.saved_at or None,
        body=json.loads(document.body),
        **commit,
    )


def _committed(directory: str, kind: str, key: Key) -> list[DocumentVersion]:
    """The versions in git; none without a repository or a ``git``."""
    path = relative(kind, key, DOCUMENT)
    form = "--format=%H%x1f%aI%x1f%an%x1f%s"
    listed = _git(directory, "log", f"-{_GIT_VERSIONS}", form, "--", f"./{path}") or b""
    found = []
    for line in listed.decode(errors="replace").split("\n")[:-1]:
        commit, at, author, message = line.split("\x1f", 3)
        data = _git(directory, "show", f"{commit}:./{path}")

        def log(path: str, commit: str = commit) -> bytes:
            return _git(directory, "show", f"{commit}:./{path}") or b""

        more = {"at": at, "commit": commit, "author": author, "message": message}
        found.append(_version("git", kind, key, data, log, **more))
    return found


def _git(directory: str, *arguments: str) -> bytes | None:
    """The output of git; None if it fails, or is not installed."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        ran = subprocess.run(  # noqa: S603  # no shell, and no argument that a client chose alone
            [git, *arguments], cwd=directory, capture_output=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None


# -- logs --------------------------------------------------------------------------------------


@router.operation("GET", "/logs", errors=[401, 403, 422, 503])
async def list_logs(
    backend: BackendDep,
    kind: Annotated[str, Query(min_length=1, max_length=64, description="Of this kind.")],
) -> Page[LogView]:
    """The names of the logs of a kind, such as `conversations`."""
    async with backend.view() as view:
        keys = await view.manager.store.logs(kind)
    return Page(
        items=[LogView(kind=kind, key=list(key), path=relative(kind, key, LOG)) for key in keys]
    )


@router.operation("GET", "/logs/{kind:id}", errors=[401, 403, 422, 503])
async def read_log(
    *,
    backend: BackendDep,
    kind: PathId,
    key: DocumentKey,
    after: Annotated[int, Query(ge=0, le=2**53, description="Only above this number.")] = 0,
    last: Annotated[int, Query(ge=1, le=1000, description="At most the last so many.")] = 100,
) -> Page[LogLine]:
    """The last records of a log, oldest first. A log that does not exist has none."""
    async with backend.view() as view:
        records = view.manager.read_log(kind, tuple(key), after=after, last=last)
        return Page(items=[LogLine(seq=one.seq, record=one.record) async for one in records])


# -- what changed last -------------------------------------------------------------------------


@router.operation("GET", "/changes", errors=[401, 403, 422, 503])
async def list_changes(
    request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 50
) -> Page[ChangedDocument]:
    """What changed last, the newest first, as far as the server has seen it since it started."""
    feed = request.app.state.feed
    await feed.start()
    return Page(
        items=[
            ChangedDocument(
                id=feed.id_of(one.number),
                kind=one.notice.kind,
                key=list(one.notice.key),
                revision=one.notice.revision,
                outside=one.notice.outside,
            )
            for one in feed.newest(limit)
        ]
    )
