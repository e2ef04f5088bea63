"""Consistent commits of a running state directory, and the way back.

The writers are held while git reads (``agent_state.storage.barrier``), so that no group is torn.
git reads into a copy of the user's index, which knows the files that have not changed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agent_state.clock import SystemClock, stamp
from agent_state.codec import Codec
from agent_state.errors import AgentStateError, StateDirectoryInUseError, StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Document
from agent_state.storage import barrier, fileio, locks, paths
from agent_state.storage.document import decode_document, encode_document, key_of
from agent_state_integrations.git.history import paths_of
from agent_state_integrations.git.repository import GitError, GitRepository

SNAPSHOTS = "refs/agent-state/snapshots"


@dataclass(slots=True)
class SnapshotReport:
    """One snapshot."""

    commit: str | None
    """Its commit; None if nothing has changed since the last one."""
    held_seconds: float
    """How long writers had to wait."""


def snapshot(
    repository: GitRepository, message: str, *, ref: str | None = None, keep: int | None = None
) -> SnapshotReport:
    """Commit one state of the directory, while its server runs.

    ``ref``: to this ref, and nothing but the state; None for the checked-out branch, whose other
    files stay as they are committed. ``keep``: so many snapshots stay on the ref; older ones may be
    collected by ``git gc``. The user's index is not touched, but for the state's own entries after
    a commit to the branch. Raises ``GitError``, also while a merge is not resolved, and
    ``LockTimeoutError`` when the writers do not come to rest.
    """
    if repository.unmerged():
        raise GitError("a merge is not resolved; nothing was committed")
    target = ref or "HEAD"
    _recover(repository)
    with _copied_index(repository) as index:
        env = {"GIT_INDEX_FILE": str(index)}
        with _held(repository) as held:
            repository.run("add", "-A", "--", repository.prefix or ".", env=env)
        subtree = repository.run(
            "write-tree", *([f"--prefix={repository.prefix}"] if repository.prefix else []), env=env
        )
    parent = _parent(repository, target)
    base = f"{parent}^{{tree}}" if parent is not None and ref is None else None
    tree = _graft(repository, base, repository.prefix.rstrip("/"), subtree.decode().strip())
    if parent is not None and repository.line("rev-parse", f"{parent}^{{tree}}") == tree:
        return SnapshotReport(None, held[0])
    parents = ["-p", parent] if parent is not None else []
    commit = repository.line("commit-tree", tree, *parents, "-m", message)
    repository.run("update-ref", "-m", "agent-state snapshot", target, commit, parent or "0" * 40)
    if ref is None:
        repository.attempt("reset", "-q", "--", repository.prefix or ".")
    elif keep is not None:
        _retain(repository, ref, commit, keep)
    return SnapshotReport(commit, held[0])


def stage(repository: GitRepository, index: str | None) -> None:
    """Stage one state of the directory for a commit, as a pre-commit hook; ``index``: git's.

    ``git commit PATH`` has an index of its own, and what a hook adds there would be undone by the
    next commit. So then nothing is staged, and ``GitError`` is raised unless all is there. No-op
    for a commit that has nothing of the state.
    """
    env = {"GIT_INDEX_FILE": str(Path(index).absolute())} if index else {}
    staged = repository.run("diff", "--cached", "--name-only", "-z", env=env).split(b"\0")[:-1]
    if not any(map(repository.below, map(os.fsdecode, staged))):
        return
    add = ("add", "-A", "--", repository.prefix or ".")
    if index is None or not Path(index).name.startswith("next-index-"):
        with barrier.hold(str(repository.state)):
            repository.run(*add, env=env)
        return
    with tempfile.TemporaryDirectory(prefix="agent-state-") as folder:
        copy = {"GIT_INDEX_FILE": str(shutil.copy2(index, folder))}
        with barrier.hold(str(repository.state)):
            repository.run(*add, env=copy)
        if repository.run("write-tree", env=copy) != repository.run("write-tree", env=env):
            what = "`git commit PATH` would commit a part of the state"
            raise GitError(f"{what}; commit without a path, or `agent-state git snapshot`")


@contextmanager
def _held(repository: GitRepository) -> Iterator[list[float]]:
    """Hold the writers; the list gets the seconds."""
    seconds: list[float] = []
    with barrier.hold(str(repository.state)):
        began = time.monotonic()
        yield seconds
        seconds.append(time.monotonic() - began)


def _recover(repository: GitRepository) -> None:
    """Bring the journal of a dead server to the files first."""
    state = str(repository.state)
    journal = fileio.list_folder(f"{state}/.journal")
    if journal and locks.owner_of(f"{state}/.locks") is None:
        asyncio.run(_open_and_close(state))


async def _open_and_close(state: str) -> None:
    async with StatePersistenceManager(state):
        pass


@contextmanager
def _copied_index(repository: GitRepository) -> Iterator[Path]:
    index = repository.path("index")
    with tempfile.TemporaryDirectory(prefix="agent-state-") as folder:
        copy = Path(folder) / "index"
        if index.exists():
            shutil.copy2(index, copy)
        yield copy


def _parent(repository: GitRepository, target: str) -> str | None:
    done = repository.attempt("rev-parse", "--verify", "-q", f"{target}^{{commit}}")
    return done.stdout.decode().strip() or None


def _graft(repository: GitRepository, base: str | None, prefix: str, subtree: str) -> str:
    """The base's tree with one folder replaced; without a base nothing but that folder."""
    if not prefix:
        return subtree
    name, _, rest = prefix.partition("/")
    entries = []
    inner = None
    if base is not None:
        for line in repository.run("ls-tree", "-z", base).split(b"\0")[:-1]:
            head, _, entry = line.partition(b"\t")
            if os.fsdecode(entry) == name:
                inner = head.decode().split(" ")[2]
            else:
                entries.append(line)
    oid = _graft(repository, inner, rest, subtree)
    entries.append(b"040000 tree %b\t%b" % (oid.encode(), os.fsencode(name)))
    made = repository.run("mktree", "-z", data=b"".join(entry + b"\0" for entry in entries))
    return made.decode().strip()


def _retain(repository: GitRepository, ref: str, commit: str, keep: int) -> None:
    """Cut the chain of snapshots when it is twice as long as wanted, and let git collect."""
    chain = repository.line("rev-list", "--first-parent", f"--max-count={2 * keep + 1}", commit)
    commits = chain.split()
    if len(commits) <= 2 * keep:
        return
    parent: str | None = None
    for old in reversed(commits[:keep]):
        text = repository.run("log", "-1", "--format=%B", old)
        when = repository.line("log", "-1", "--format=%aI", old)
        parents = ["-p", parent] if parent else []
        made = repository.run(
            "commit-tree", f"{old}^{{tree}}", *parents, data=text, env={"GIT_AUTHOR_DATE": when}
        )
        parent = made.decode().strip()
    if parent is not None:
        repository.run("update-ref", "-m", "agent-state retention", ref, parent, commit)
        repository.attempt("gc", "--auto", "--quiet")


# -- back ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class RestoredStates:
    """What was restored: the paths of documents, and what stayed although the revision lacks it."""

    restored: list[str] = field(default_factory=list)
    stayed: list[str] = field(default_factory=list)


def restore(repository: GitRepository, revision: str, agent: str | None = None) -> RestoredStates:
    """Bring documents back as a revision has them: of one agent, or all.

    Each is validated before any is written. Where nobody owns the directory they are saved as one
    group; a running owner finds the files changed at once, and goes on from them. What was made
    since stays, and logs stay as they are. Raises ``StateNotFoundError`` for an agent that the
    revision does not have, and the errors of a document that must not be used.
    """
    below = paths_of(agent) if agent is not None else [""]
    tree = {
        path: entry for part in below for path, entry in repository.tree(revision, part).items()
    }
    wanted = {path: entry for path, entry in tree.items() if path.endswith(paths.DOCUMENT)}
    if not wanted:
        what = f"{revision} has no state" + (f" of agent {agent}" if agent else "")
        raise StateNotFoundError(what, path=str(repository.state))
    blobs = repository.blobs(entry.oid for entry in wanted.values())
    codec, documents = Codec(), []
    for path, entry in sorted(wanted.items()):
        document, meta = decode_document(*_place(path, blobs[entry.oid]), blobs[entry.oid])
        codec.check(document)
        documents.append((path, document, meta))
    report = RestoredStates(stayed=_made_since(repository, below, wanted))
    try:
        asyncio.run(_save_all(str(repository.state), codec, documents, report))
    except StateDirectoryInUseError:
        report.restored.clear()
        _drop_all(repository, documents, report)
    return report


def _place(path: str, data: bytes) -> tuple[str, tuple[str, ...]]:
    kind, _, rest = path.partition("/")
    *folders, name = rest.removesuffix(paths.DOCUMENT).split("/")
    key = (*(paths.decode(part, directory=True) for part in folders), paths.decode(name))
    if all(part is not None for part in key):
        return kind, tuple(str(part) for part in key)
    carried = key_of(data)
    if carried is None:
        raise AgentStateError("the file has no key", path=path)
    return kind, carried


def _made_since(
    repository: GitRepository, below: list[str], wanted: Mapping[str, object]
) -> list[str]:
    found = []
    for part in below:
        start = repository.state / part
        files = [start] if start.is_file() else sorted(start.rglob("*.json"))
        for file in files:
            path = file.relative_to(repository.state).as_posix()
            if path not in wanted and not path.startswith(".") and "/.tmp-" not in path:
                found.append(path)
    return found


Versions = list[tuple[str, Document, dict[str, str]]]


async def _save_all(state: str, codec: Codec, documents: Versions, report: RestoredStates) -> None:
    async with StatePersistenceManager(state) as manager, manager.group() as group:
        for path, document, _ in documents:
            schema = (document.schema or f"{document.kind}/1").partition("/")[0]
            group.put(document.kind, document.key, codec.body(document), schema=schema)
            report.restored.append(path)


def _drop_all(repository: GitRepository, documents: Versions, report: RestoredStates) -> None:
    """Replace the files beside their owner, while it is held: it reads what was changed outside."""
    now = stamp(SystemClock().now())
    with barrier.hold(str(repository.state)):
        for path, document, meta in documents:
            file = repository.state / path
            revision = document.revision
            if file.exists():
                present, _ = decode_document(document.kind, document.key, file.read_bytes())
                if present.body == document.body:
                    continue
                revision = max(revision, present.revision) + 1
            again = Document(
                document.kind, document.key, document.body, revision, now, document.schema
            )
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fileio.replace_file(str(file), encode_document(again, meta), sync=True)
            report.restored.append(path)
