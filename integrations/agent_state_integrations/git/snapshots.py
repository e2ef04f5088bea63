"""Consistent commits of a running state directory.

The writers are held while git reads (``agent_state.storage.barrier``), so that no group is torn.
git reads into a copy of the user's index, which knows the files that have not changed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent_state.errors import LockTimeoutError
from agent_state.manager import StatePersistenceManager
from agent_state.storage import barrier, fileio, locks
from agent_state_integrations.git.repository import GitError, GitRepository

SNAPSHOTS = "refs/agent-state/snapshots"
_BATCH = ("-c", "core.fsyncMethod=batch")
"""git 2.36 and newer: one fsync for all objects, and not one each; older ones do none."""
_FEW = 250
"""So many changed files git reads while the writers wait."""
_ATTEMPTS = 5
"""How often a reading that took too long on a busy machine is made again."""


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
    if not repository.state.is_dir() or not any(repository.state.iterdir()):
        raise GitError("there is no state to commit", path=str(repository.state))
    if ref is None:
        if (what := repository.operation) is not None:
            raise GitError(f"{what} is in progress, which has the branch; nothing was committed")
        repository.wait_for_index()
    target = ref or "HEAD"
    _recover(repository)
    parent, parent_tree = _parent(repository, target)
    subtree, held = _write_tree(repository, ref, parent_tree)
    base = parent_tree if ref is None else None
    tree = _graft(repository, base, repository.prefix.rstrip("/"), subtree)
    if ref is not None:
        _own_index(repository, ref).with_suffix(".tree").write_text(tree)
    if tree == parent_tree:
        return SnapshotReport(None, held)
    parents = [parent] if parent is not None else []
    commit = repository.commit_tree(tree, parents, message, sign=ref is None)
    repository.run("update-ref", "-m", "agent-state snapshot", target, commit, parent or "0" * 40)
    if ref is None:
        _refresh_index(repository, commit)
    elif keep is not None:
        _retain(repository, ref, commit, keep)
    return SnapshotReport(commit, held)


def _refresh_index(repository: GitRepository, commit: str) -> None:
    """Give the user's index the state that was committed; else its next commit takes it back."""
    reset = ("reset", "-q", "--", repository.prefix or ".")
    while (done := repository.attempt(*reset)).returncode:
        if b"index.lock" not in done.stderr:
            raise GitError(f"{commit} was made; `git reset` first: {done.stderr.decode()}")
        repository.wait_for_index()


def stage(repository: GitRepository, index: str | None) -> None:
    """Stage one state of the directory for a commit, as a pre-commit hook; ``index``: git's.

    ``git commit PATH`` has an index of its own, and what a hook adds there would be undone by the
    next commit. So then nothing is staged, and ``GitError`` is raised unless all is there. No-op
    for a commit that has nothing of the state.
    """
    env = {"GIT_INDEX_FILE": str(Path(index).absolute())} if index else {}
    named = ("diff", "--cached", "--name-only", "--no-renames", "-z")
    staged = repository.run(*named, env=env).split(b"\0")[:-1]
    if not any(map(repository.below, map(os.fsdecode, staged))):
        return
    if not repository.state.is_dir():
        left = repository.run("ls-files", "-z", "--", repository.prefix or ".", env=env)
        if not left:
            return  # the commit removes all of it
    if index is None or not Path(index).name.startswith("next-index-"):
        _add_all(repository, env)
        return
    with tempfile.TemporaryDirectory(prefix="agent-state-") as folder:
        copy = {"GIT_INDEX_FILE": str(shutil.copy2(index, folder))}
        _add_all(repository, copy)
        if repository.run("write-tree", env=copy) != repository.run("write-tree", env=env):
            what = "`git commit PATH` would commit a part of the state"
            raise GitError(f"{what}; commit without a path, or `agent-state git snapshot`")


def _own_index(repository: GitRepository, ref: str) -> Path:
    """The index of a ref of snapshots; beside it stands the tree that it was committed as."""
    return repository.own_folder / "agent-state" / f"{ref.replace('/', '%2f')}.index"


def _write_tree(repository: GitRepository, ref: str | None, last: str | None) -> tuple[str, float]:
    """The tree of the state, as one moment had it, and for how many seconds writers waited.

    A ref of snapshots has an index of its own, so that each reads what has changed since the last
    one, and not since the user's last commit. ``last``: the tree that the ref has. The index counts
    while it is that one: what else it names may have been collected.
    """
    users = repository.own_folder / "index"
    if ref is None:
        return _write_tree_from(repository, users, None)
    own = _own_index(repository, ref)
    committed = own.with_suffix(".tree")
    if own.exists() and committed.exists() and committed.read_text() == last:
        return _write_tree_from(repository, own, own)
    return _write_tree_from(repository, users, own)


def _add_all(repository: GitRepository, env: Mapping[str, str]) -> float:
    """Read one state of the directory into an index; for how many seconds the writers waited.

    Nobody waits while git reads much that has changed; held, it reads what has changed since.
    """
    state = str(repository.state)
    acknowledged = barrier.request(state)
    where = ("--", repository.prefix or ".")
    add: tuple[str, ...] = (*_BATCH, "add", "-A")
    # Files that are removed meanwhile may stop these two; the last one says what is wrong.
    found = repository.attempt(*add, "--dry-run", *where, env=env)
    if b"sparse-checkout" in found.stderr:  # a server writes where git checks out nothing
        add = (*add, "--sparse")
    if found.returncode or found.stdout.count(b"\n") > _FEW:
        repository.attempt(*add, *where, env=env)
    add = (*add, *where)
    attempts = _ATTEMPTS
    while True:
        attempts -= 1
        try:
            with barrier.hold(state, acknowledged=acknowledged):
                began = time.monotonic()
                repository.run(*add, env=env)
                return time.monotonic() - began
        except LockTimeoutError:
            if not attempts:
                raise


def _write_tree_from(
    repository: GitRepository, start: Path, keep: Path | None
) -> tuple[str, float]:
    """Read the state into a copy of the index ``start``; the copy is kept as ``keep``."""
    folder = None if keep is None else keep.parent
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="agent-state-", dir=folder) as temporary:
        copy = Path(temporary) / "index"
        if start.exists():
            shutil.copy2(start, copy)
        env = {"GIT_INDEX_FILE": str(copy)}
        held = _add_all(repository, env)
        below = [f"--prefix={repository.prefix}"] if repository.prefix else []
        # Each object is in the index that this one is a copy of, or was added just now: git need
        # not look for all of them.
        write = (*_BATCH, "write-tree", "--missing-ok", *below)
        tree = repository.run(*write, env=env).decode().strip()
        if keep is not None:
            copy.replace(keep)
    return tree, held


def _recover(repository: GitRepository) -> None:
    """Bring the journal of a dead server to the files first."""
    state = str(repository.state)
    journal = fileio.list_folder(f"{state}/.journal")
    if journal and locks.owner_of(f"{state}/.locks") is None:
        asyncio.run(_open_and_close(state))


async def _open_and_close(state: str) -> None:
    async with StatePersistenceManager(state):
        pass


def _parent(repository: GitRepository, target: str) -> tuple[str | None, str | None]:
    """The commit at the end of a branch or ref, and its tree; None where there is none."""
    names = (f"{target}^{{commit}}", f"{target}^{{tree}}")
    done = repository.attempt("rev-parse", "-q", "--revs-only", *names)
    found = done.stdout.decode().split()
    return (found[0], found[1]) if len(found) == len(names) else (None, None)


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
    made = repository.run(
        "mktree", "--missing", "-z", data=b"".join(entry + b"\0" for entry in entries)
    )
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
