"""What changed, in words: between two revisions, in an agent's life, in one field."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from agent_state.cli.words import (
    ABSENT,
    agent_words,
    field_words,
    is_same,
    sleep_words,
    task_words,
    value_words,
)
from agent_state.errors import StateNotFoundError
from agent_state.storage import paths
from agent_state_integrations.git.merge_rules import SEALED
from agent_state_integrations.git.repository import GitRepository

ENCRYPTED = "encrypted"
"""What stands for the content of an encrypted document: a word that differs when it does."""


class Change(NamedTuple):
    """One document or log, before and after; None where it is not there."""

    path: str
    before: bytes | None
    after: bytes | None


# -- between two revisions -----------------------------------------------------------------------


def changes_between(
    repository: GitRepository, old: str, new: str | None, below: str = ""
) -> list[Change]:
    """The documents and logs that differ; ``new`` None stands for the files as they are now."""
    before = repository.tree(old, below)
    if new is not None:
        after = repository.tree(new, below)
        differing = [
            path for path in sorted({*before, *after}) if before.get(path) != after.get(path)
        ]
        blobs = repository.blobs(
            tree[path].oid for tree in (before, after) for path in differing if path in tree
        )
        return [
            Change(
                path,
                blobs[before[path].oid] if path in before else None,
                blobs[after[path].oid] if path in after else None,
            )
            for path in differing
        ]
    files = _files(repository, below)
    blobs = repository.blobs(entry.oid for entry in before.values())
    changes = []
    for path in sorted({*before, *files}):
        was = blobs[before[path].oid] if path in before else None
        if was != files.get(path):
            changes.append(Change(path, was, files.get(path)))
    return changes


def _files(repository: GitRepository, below: str) -> dict[str, bytes]:
    found = {}
    for folder, folders, names in os.walk(repository.state / below):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not name.endswith((paths.DOCUMENT, paths.LOG)):
                continue
            with suppress(FileNotFoundError):  # a server has just removed it
                found[path.relative_to(repository.state).as_posix()] = path.read_bytes()
    return found


def in_words(changes: Iterable[Change]) -> dict[str, str]:
    """A sentence for each agent, or other thing, that changed: ``alice``, ``system/events``."""
    said: dict[str, list[str]] = {}
    tasks: dict[str, Counter[str]] = {}
    mail: dict[str, Counter[str]] = {}
    for change in changes:
        kind, _, rest = change.path.partition("/")
        name = rest.partition("/")[0]
        for ending in (paths.LOG, paths.DOCUMENT):
            name = name.removesuffix(ending)
        name = paths.decode(name, directory="/" in rest) or name
        before, after = _state(change.before), _state(change.after)
        if change.path.endswith(paths.LOG):
            _say_lines(said.setdefault(name if kind != "system" else change.path, []), change)
        elif kind == "agents":
            said.setdefault(name, [])[:0] = agent_words(before, after)
        elif kind == "sleep":
            said.setdefault(name, []).append(sleep_words(after))
        elif kind == "tasks" and "/" in rest:
            tasks.setdefault(name, Counter()).update([task_words(before, after)])
        elif kind == "mail" and "/" in rest:
            _mail(name, before, after, mail)
        else:
            said.setdefault(change.path, []).extend(field_words(before, after))
    for name, counted in tasks.items():
        said.setdefault(name, []).extend(
            f"{_count(number, 'task')} {what}" for what, number in counted.items()
        )
    for name, counted in mail.items():
        said.setdefault(name, []).extend(what.format(n) for what, n in counted.items())
    return {name: "; ".join(filter(None, said[name])) or "saved again" for name in sorted(said)}


def _state(data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return None
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        return {"_unreadable": True}
    if SEALED in state:
        state[ENCRYPTED] = sha256(str(state.pop(SEALED)).encode()).hexdigest()[:8]
    return state


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _mail(
    name: str,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    counted: dict[str, Counter[str]],
) -> None:
    if after is None:
        counted.setdefault(name, Counter()).update(["{} mail removed"])
    elif before is None:
        sender = str(after.get("from_agent") or name)
        words = f"{{}} mail to {name}" if sender != name else "{} mail to itself"
        counted.setdefault(sender, Counter()).update([words.replace("{}", "{0}")])
    else:
        status = after.get("status", "unread")
        what = f"{{0}} mail {status}" if before.get("status") != status else "{0} mail changed"
        counted.setdefault(name, Counter()).update([what])


def _say_lines(said: list[str], change: Change) -> None:
    before, after = ((data or b"").count(b"\n") for data in (change.before, change.after))
    name = change.path.rpartition("/")[2].removesuffix(paths.LOG)
    if change.after is None:
        said.append(f"the log {name} was removed")
    elif (change.after or b"").startswith(change.before or b""):
        said.append(f"{_count(after - before, 'line')} in {name}")
    else:
        said.append(f"the log {name} was changed")


# -- an agent's life -----------------------------------------------------------------------------


class Story(NamedTuple):
    """One commit in which something happened to an agent."""

    commit: str
    when: str
    author: str
    subject: str
    words: str


def paths_of(agent: str) -> list[str]:
    """The paths of an agent's documents, and of the folders of its conversation, tasks and mail."""
    folder = paths.encode(agent, directory=True)
    document = paths.encode(agent) + paths.DOCUMENT
    own = [f"agents/{document}", f"sleep/{document}"]
    return [*own, *(f"{kind}/{folder}" for kind in ("agents", "tasks", "mail"))]


def story(repository: GitRepository, agent: str, *, most: int = 100) -> list[Story]:
    """What happened to an agent, newest first, one entry for each commit.

    Raises ``StateNotFoundError`` for an agent that no commit of the branch has.
    """
    wanted = [f"{repository.prefix}{path}" for path in paths_of(agent)]
    listed = _log(repository, "%H%x00%P%x00%cI%x00%an%x00%s", wanted, f"-{most}", "--full-history")
    found = []
    for commit, parents, when, author, subject in listed:
        old = parents.partition(" ")[0] or repository.line("hash-object", "-t", "tree", "/dev/null")
        changes = [
            change
            for path in paths_of(agent)
            for change in changes_between(repository, old, commit, path)
        ]
        words = in_words(changes).get(agent, "")
        if words:
            found.append(Story(commit, when, author, subject, words))
    if not listed:
        what = f"{agent} is in no commit of this branch"
        raise StateNotFoundError(what, kind="agents", key=agent)
    return found


class FieldValue(NamedTuple):
    """Where a field got a value."""

    commit: str
    when: str
    author: str
    value: str


def blame(repository: GitRepository, agent: str, field: str) -> list[FieldValue]:
    """The values that a field of an agent's document has had, newest first, with their commits.

    ``field``: a path with dots, such as ``context.working_memory.words``. Raises
    ``StateNotFoundError`` for an agent that no commit of the branch has, and for a field that none
    of them has.
    """
    path = f"agents/{paths.encode(agent)}{paths.DOCUMENT}"
    wanted = [f"{repository.prefix}{path}"]
    listed = _log(repository, "%H%x00%cI%x00%an", wanted, "--reverse")
    found: list[FieldValue] = []
    last: Any = ABSENT
    encrypted = False
    for commit, when, author in listed:
        state: Any = _state(repository.show(commit, path)) or {}
        encrypted = encrypted or ENCRYPTED in state
        for name in field.split("."):
            state = state.get(name, ABSENT) if isinstance(state, dict) else ABSENT
        if not is_same(state, last):
            last = state
            found.append(FieldValue(commit, when, author, value_words(state)))
    if not found:
        what = f"{'is encrypted, so nobody sees' if encrypted else 'never had'} {field}"
        what = what if listed else "is in no commit of this branch"
        raise StateNotFoundError(f"{agent} {what}", kind="agents", key=agent)
    return found[::-1]


def _log(repository: GitRepository, form: str, wanted: list[str], *how: str) -> list[list[str]]:
    """What ``git log`` says of each commit that changed these paths, whatever the user has set."""
    set_back = ("-c", "log.showSignature=false", "-c", "log.follow=false")
    listed = repository.run(*set_back, "log", f"--format={form}", *how, "--", *wanted)
    # Of all that ``splitlines`` takes for the end of a line, a subject may have any but this.
    return [line.split("\0") for line in listed.decode(errors="replace").split("\n")[:-1]]
