"""Merges a revision in one process, and settles what git left unmerged.

git starts a driver once for each file, and never for a deleted one, an octopus or ``-s resolve``.
Here the documents that both sides changed are merged first, and both sides get the outcome; then
git merges the rest, and finds nothing to do in the state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent_state_integrations.git.forks import forked_agents
from agent_state_integrations.git.history import paths_of
from agent_state_integrations.git.merge_rules import (
    TERMINAL,
    Outcome,
    UnmergeableError,
    merge,
    parse,
)
from agent_state_integrations.git.repository import Entry, GitError, GitRepository

_TEMPORARY = "refs/agent-state/merging"


@dataclass(slots=True)
class MergeReport:
    """What a merge, or ``resolve_unmerged``, did."""

    merged: list[str] = field(default_factory=list)
    """The documents and logs that both sides had changed."""
    told: list[str] = field(default_factory=list)
    """What a rule decided."""
    conflicts: list[str] = field(default_factory=list)
    """What is left for a person."""
    commit: str | None = None
    """The merge; None if there is nothing to merge, or if something is left."""

    def add(self, path: str, outcome: Outcome) -> None:
        """Note an outcome."""
        self.merged.append(path)
        self.told += [f"{path}: {line}" for line in outcome.told]
        self.conflicts += [f"{path}: {line}" for line in outcome.conflicts]


def merge_revision(
    repository: GitRepository,
    revision: str,
    *,
    prefer: str = "completed",
    message: str | None = None,
) -> MergeReport:
    """Merge a revision into the checked-out branch; needs git 2.38.

    Without conflicts the branch is fast-forwarded to the merge. With conflicts the worktree and
    the index have them as ``git merge`` leaves them, with valid JSON in the files. Raises
    ``GitError``, and changes nothing, when local changes are in the way.
    """
    repository.require(2, 38)
    if (what := repository.operation) is not None:
        raise GitError(f"{what} is in progress; finish it, or give it up, first")
    ours, theirs = repository.commit("HEAD"), repository.commit(revision)
    report = MergeReport()
    done = repository.attempt("merge-base", "--is-ancestor", theirs, ours)
    if done.returncode == 0:
        return report
    if repository.attempt("merge-base", "--is-ancestor", ours, theirs).returncode == 0:
        repository.run("merge", "--ff-only", "-q", theirs)
        report.commit = theirs
        return report
    base = _base(repository, _merge_bases(repository, ours, theirs), prefer)
    trees = [base, repository.tree(ours), repository.tree(theirs)]
    forked = _forked(repository, ours, theirs, trees)
    contents, stages = _merge_all(repository, trees, forked, report, prefer)
    left, right = _with(repository, ours, theirs, contents)
    try:
        tree, more = _merge_rest(repository, left, right, report)
    finally:
        for name in ("ours", "theirs"):
            repository.attempt("update-ref", "-d", f"{_TEMPORARY}/{name}")
    stages.update(more)
    text = message or f"Merge {revision} into {_branch(repository)}"
    if stages:
        _leave(repository, tree, theirs, stages, f"{text}\n\n# Conflicts:\n")
    else:
        commit = repository.commit_tree(tree, [ours, theirs], text, sign=True)
        repository.run("merge", "--ff-only", "-q", commit)
        report.commit = commit
    return report


def _branch(repository: GitRepository) -> str:
    done = repository.attempt("symbolic-ref", "--short", "-q", "HEAD")
    return done.stdout.decode().strip() or "HEAD"


def _merge_bases(repository: GitRepository, one: str, other: str) -> list[str]:
    return repository.attempt("merge-base", "--all", one, other).stdout.decode().split()


def _base(repository: GitRepository, commits: list[str], prefer: str) -> dict[str, Entry]:
    """The documents that both sides come from; branches that merged each other have several bases.

    These are merged first, as git does. What conflicts then has no base.
    """
    if not commits:
        return {}
    first, *others = commits
    tree = repository.tree(first)
    for other in others:
        theirs = repository.tree(other)
        root = _base(repository, _merge_bases(repository, first, other), prefer)
        for path in {*tree, *theirs}:
            sides = [found.get(path) for found in (root, tree, theirs)]
            if sides[2] == sides[0]:
                continue
            entry = sides[2]
            if sides[1] not in (sides[0], sides[2]):
                entry = _merged_base(repository, path, sides, prefer)
            if entry is not None:
                tree[path] = entry
            else:
                tree.pop(path, None)
    return tree


def _merged_base(
    repository: GitRepository, path: str, sides: list[Entry | None], prefer: str
) -> Entry | None:
    blobs = repository.blobs(side.oid for side in sides if side is not None)
    known = [None if side is None else blobs[side.oid] for side in sides]
    report = MergeReport()
    data = merge_sides(path, known, [], report, prefer)
    if data is None or report.conflicts:
        return None
    made = repository.run("hash-object", "-w", "--stdin", data=data)
    return Entry("100644", made.decode().strip())


Stages = dict[str, dict[int, Entry]]


def _merge_all(
    repository: GitRepository,
    trees: list[dict[str, Entry]],
    forked: list[str],
    report: MergeReport,
    prefer: str,
) -> tuple[dict[str, bytes | None], Stages]:
    """Merge the paths that both sides changed: the contents (None for none), and the conflicts.

    ``forked``: paths of which ours is kept.
    """
    base, ours, theirs = trees
    both = [
        path
        for path in sorted({*ours, *theirs, *base})
        if ours.get(path) != theirs.get(path)
        and ours.get(path) != base.get(path)
        and theirs.get(path) != base.get(path)
        and path not in forked
    ]
    blobs = repository.blobs(tree[path].oid for tree in trees for path in both if path in tree)
    kept = repository.blobs(ours[path].oid for path in forked)
    merged: dict[str, bytes | None] = {path: kept[ours[path].oid] for path in forked}
    logs = {
        path: [blobs[tree[path].oid] for tree in (ours, theirs) if path in tree]
        for path in both
        if path.endswith("archive.jsonl")
    }
    stages: Stages = {}
    for path in both:
        known = [blobs[tree[path].oid] if path in tree else None for tree in trees]
        archives = logs.get(f"{path.rpartition('/')[0]}/archive.jsonl") or [
            data
            for tree in (ours, theirs)
            if (data := _archive(repository, tree, path)) is not None
        ]
        clean = len(report.conflicts)
        merged[path] = merge_sides(path, known, archives, report, prefer)
        if len(report.conflicts) > clean:
            stages[repository.prefix + path] = {
                number: tree[path] for number, tree in enumerate(trees, 1) if path in tree
            }
    return merged, stages


def _forked(
    repository: GitRepository, ours: str, theirs: str, trees: list[dict[str, Entry]]
) -> list[str]:
    """Our paths of agents that their branch took away when it forked them: they stay."""
    agents = forked_agents(repository, ours, theirs)
    parts = [part for agent in agents for part in paths_of(agent)]
    return [
        path
        for path in (trees[1] if parts else ())
        if path not in trees[2]
        and any(path == part or path.startswith(f"{part}/") for part in parts)
    ]


def _archive(repository: GitRepository, tree: Mapping[str, Entry], path: str) -> bytes | None:
    entry = tree.get(f"{path.rpartition('/')[0]}/archive.jsonl")
    return None if entry is None else repository.blobs([entry.oid])[entry.oid]


def merge_sides(
    path: str,
    sides: list[bytes | None],
    archives: list[bytes],
    report: MergeReport,
    prefer: str,
) -> bytes | None:
    """Merge base, ours and theirs, of which any may be missing; None for a deleted document.

    ``archives``: the archive logs beside it. What is left to a person is in the report.
    """
    base, ours, theirs = sides
    if ours is not None and theirs is not None:
        try:
            outcome = merge(path, base or b"", ours, theirs, prefer=prefer)
        except UnmergeableError as error:
            report.conflicts.append(f"{path}: {error}")
            return ours
        report.add(path, outcome)
        return outcome.data
    kept = ours if ours is not None else theirs
    if kept is None:
        return None
    report.merged.append(path)
    who = "they" if theirs is None else "we"
    if _is_archived(path, kept, archives):
        report.told.append(f"{path}: archived, although it was changed")
        return None
    if _is_ended(kept):
        report.told.append(f"{path}: kept, since it has ended, although {who} deleted it")
        return kept
    report.conflicts.append(f"{path}: {who} deleted it, and it was changed")
    return kept


def _is_archived(path: str, data: bytes, archives: list[bytes]) -> bool:
    name = {"tasks": "task_id", "mail": "message_id"}.get(path.partition("/")[0], "agent_id")
    try:
        ident = parse(data).get(name)
    except UnmergeableError:
        return False
    for line in b"\n".join(archives).split(b"\n"):
        try:
            record = parse(line) if ident is not None and line.strip() else {}
        except UnmergeableError:
            continue
        if ident is not None and record.get(name) == ident:
            return True
    return False


def _is_ended(data: bytes) -> bool:
    try:
        return parse(data).get("status") in TERMINAL
    except UnmergeableError:
        return False


# -- the rest, by git ----------------------------------------------------------------------------


def _with(
    repository: GitRepository, ours: str, theirs: str, contents: Mapping[str, bytes | None]
) -> tuple[str, str]:
    """Two commits on top of the sides that have the same, merged state."""
    if not contents:
        return ours, theirs
    stream: list[bytes] = []
    for number, data in enumerate(contents.values(), 1):
        if data is not None:
            stream.append(b"blob\nmark :%d\ndata %d\n%b\n" % (number, len(data), data))
    for name, side in (("ours", ours), ("theirs", theirs)):
        stream.append(
            b"commit %b/%b\ncommitter agent_state <> 0 +0000\ndata 0\nfrom %b\n"
            % (_TEMPORARY.encode(), name.encode(), side.encode())
        )
        for number, (path, data) in enumerate(contents.items(), 1):
            quoted = repository.quote(path)
            if data is None:
                stream.append(b"D %b\n" % quoted)
            else:
                stream.append(b"M 100644 :%d %b\n" % (number, quoted))
    repository.run("fast-import", "--quiet", "--force", data=b"".join(stream))
    return repository.commit(f"{_TEMPORARY}/ours"), repository.commit(f"{_TEMPORARY}/theirs")


def _merge_rest(
    repository: GitRepository, left: str, right: str, report: MergeReport
) -> tuple[str, Stages]:
    """Git's own merge of what is no state: the tree, and its conflicts."""
    done = repository.attempt(
        "-c", "merge.directoryRenames=false", "merge-tree", "--write-tree", "-z", left, right
    )
    if done.returncode not in (0, 1):
        raise GitError(f"git merge-tree: {done.stderr.decode(errors='replace').strip()}")
    tree, *rest = done.stdout.split(b"\0")
    stages: Stages = {}
    for line in rest:
        if not line:
            break  # after the files come messages
        head, _, name = line.partition(b"\t")
        mode, oid, stage = head.decode().split(" ")
        path = os.fsdecode(name)
        stages.setdefault(path, {})[int(stage)] = Entry(mode, oid, int(stage))
    report.conflicts += [f"{path}: git could not merge it" for path in stages]
    return tree.decode(), stages


def _leave(repository: GitRepository, tree: str, theirs: str, stages: Stages, message: str) -> None:
    """Leave a merge with conflicts, as ``git merge`` does."""
    # A file that was written again as it was is no local change.
    repository.attempt("update-index", "-q", "--refresh")
    repository.run("read-tree", "-m", "-u", "HEAD", tree)
    lines = []
    for path, entries in stages.items():
        lines.append(b"0 %b\t%b\0" % (b"0" * 40, os.fsencode(path)))
        lines += [
            b"%b %b %d\t%b\0" % (entry.mode.encode(), entry.oid.encode(), stage, os.fsencode(path))
            for stage, entry in sorted(entries.items())
        ]
    repository.run("update-index", "-z", "--index-info", data=b"".join(lines))
    text = message + "".join(f"#\t{path}\n" for path in stages)
    repository.path("MERGE_MSG").write_text(text)
    repository.path("MERGE_MODE").write_text("")
    repository.path("MERGE_HEAD").write_text(f"{theirs}\n")


# -- afterwards ----------------------------------------------------------------------------------


def resolve_unmerged(
    repository: GitRepository,
    only: list[str] | None = None,
    *,
    take: str | None = None,
    prefer: str = "completed",
) -> MergeReport:
    """Settle the unmerged documents and logs of the worktree by the rules; stage what is settled.

    ``only``: these paths of the state directory alone. ``take``: ``ours`` or ``theirs`` for what
    no rule settles. Raises ``GitError``.
    """
    report = MergeReport()
    for full, entries in repository.unmerged().items():
        path = repository.below(full)
        if path is None or (only and path not in only):
            continue
        blobs = repository.blobs(entry.oid for entry in entries.values())
        sides = [blobs[entries[n].oid] if n in entries else None for n in (1, 2, 3)]
        archive = repository.state / path.rpartition("/")[0] / "archive.jsonl"
        archives = [archive.read_bytes()] if archive.exists() else []
        before = len(report.conflicts)
        data = merge_sides(path, sides, archives, report, prefer)
        if len(report.conflicts) > before:
            if take is None:
                continue
            del report.conflicts[before:]
            report.told.append(f"{path}: {take} was taken")
            data = sides[1 if take == "ours" else 2]
        _settle(repository, path, data)
    return report


def _settle(repository: GitRepository, path: str, data: bytes | None) -> None:
    file = repository.state / path
    if data is None:
        file.unlink(missing_ok=True)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".tmp-{file.name}")
        temporary.write_bytes(data)
        temporary.chmod(0o600)
        temporary.replace(file)
    repository.run("add", "-A", "--", f"{repository.prefix}{path}")
    repository.note(f"{repository.prefix}{path}").unlink(missing_ok=True)
