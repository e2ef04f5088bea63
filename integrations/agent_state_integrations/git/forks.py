"""A branch of an agent's life, under a new id, so that two copies of one agent never run.

The branch has the new agent and no longer the old one: a server there does not run it. When the
branch is merged back by ``merge_revision``, the old one stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agent_state.clock import new_id
from agent_state.conversation_log import is_history
from agent_state.errors import StateCorruptedError, StateNotFoundError
from agent_state.storage import paths
from agent_state_integrations.git.history import paths_of
from agent_state_integrations.git.merge_rules import (
    SEALED,
    UnmergeableError,
    parse,
    write,
    write_line,
)
from agent_state_integrations.git.repository import GitError, GitRepository

TRAILER = "Agent-State-Fork"
"""The trailer of a fork's commit: the id of each agent that it took away."""


def fork(repository: GitRepository, name: str, agents: list[str] | None = None) -> dict[str, str]:
    """Make the branch ``name`` on top of HEAD; the new id of each forked agent.

    ``agents``: these alone; None for all. The new id is ``<agent>-<name>``. Tasks, mail and sleep
    get new ids too; a task that an attempt runs for is queued again. Raises ``GitError`` when the
    branch exists, or can have no such name, ``StateNotFoundError``, and ``StateCorruptedError``.
    """
    head = repository.commit("HEAD")
    named = repository.attempt("check-ref-format", "--branch", name)
    if named.stdout != f"{name}\n".encode():
        raise GitError(f"{name!r} is no name for a branch")
    if repository.attempt("rev-parse", "-q", "--verify", f"refs/heads/{name}").returncode == 0:
        raise GitError(f"the branch {name} exists")
    stored = repository.tree("HEAD", "agents")
    blobs = repository.blobs(entry.oid for entry in stored.values())
    known = set[str]()
    for path, entry in stored.items():
        if path.endswith(paths.DOCUMENT):
            try:
                ident = _parsed(path, blobs[entry.oid]).get("agent_id")
            except StateCorruptedError:
                if agents is None:
                    raise
                continue  # it is no agent that was asked for, or is missed below
            known.add(str(ident or path.removeprefix("agents/").removesuffix(".json")))
    chosen = agents if agents is not None else sorted(known)
    if missing := [agent for agent in chosen if agent not in known] or not chosen:
        raise StateNotFoundError(f"HEAD has no agent {missing if chosen else ''}".strip())
    renamed = {agent: f"{agent}-{name}" for agent in chosen}
    contents: dict[str, bytes | None] = {}
    for agent, new in renamed.items():
        contents.update(_renamed(repository, agent, new))
    text = f"Fork {', '.join(map(_line, chosen))} as {name}\n\n"
    text += "".join(f"{TRAILER}: {_line(agent)}\n" for agent in chosen)
    repository.run("fast-import", "--quiet", data=_stream(repository, name, head, contents, text))
    return renamed


def _parsed(path: str, data: bytes) -> dict[str, Any]:
    try:
        return parse(data)
    except UnmergeableError as error:
        raise StateCorruptedError(f"HEAD has a damaged document: {error}", path=path) from error


def _line(agent: str) -> str:
    """An id on one line, as ``forked_agents`` reads it: JSON unless it is plain."""
    return agent if agent.isprintable() and agent.strip(' "') == agent else json.dumps(agent)


def _renamed(repository: GitRepository, agent: str, new: str) -> Mapping[str, bytes | None]:
    contents: dict[str, bytes | None] = {}
    ids: dict[str, str] = {}
    documents: list[tuple[str, dict[str, Any]]] = []
    for part in paths_of(agent):
        tree = repository.tree("HEAD", part)
        blobs = repository.blobs(entry.oid for entry in tree.values())
        for path, entry in tree.items():
            contents[path] = None
            log = path.removeprefix(f"agents/{paths.encode(agent, directory=True)}/")
            name = log.removesuffix(paths.LOG)
            if name != path and log.endswith(paths.LOG) and is_history((agent, name)):
                lines = _renamed_lines(blobs[entry.oid], (new, name))
                contents[paths.relative("agents", (new, name), paths.LOG)] = lines
            if not path.endswith(paths.DOCUMENT):
                continue  # the past of its tasks and mail stays with the old agent
            state = _parsed(path, blobs[entry.oid])
            if SEALED in state:
                raise GitError(f"{path} is encrypted for the id that it has, and cannot be forked")
            for field in ("task_id", "message_id"):
                if isinstance(state.get(field), str):
                    ids[state[field]] = new_id()
            documents.append((path.partition("/")[0], state))
    ids[agent] = new
    for kind, state in documents:
        changed: dict[str, Any] = {
            name: _with_new_ids(name, value, ids) for name, value in state.items()
        }
        changed.pop("_id", None)
        if kind == "tasks" and changed.get("status") == "in_progress":
            changed["status"] = "pending"
        changed.pop("lease", None)
        changed["_revision"] = 1
        own = changed.get("task_id") or changed.get("message_id")
        key = (new,) if own is None else (new, own)
        if not paths.self_describing(key):
            changed["_id"] = key[0] if len(key) == 1 else list(key)
        contents[paths.relative(kind, key, paths.DOCUMENT)] = write(changed)
    return contents


def _renamed_lines(data: bytes, key: tuple[str, str]) -> bytes:
    """The lines of a conversation, for another agent."""
    lines: list[bytes] = []
    for raw in filter(bytes.strip, data.split(b"\n")):
        line = parse(raw)
        line.pop("_id", None)
        if not paths.self_describing(key):
            line["_id"] = [*key]
        number = line.get("_seq")
        lines.append(write_line(line, number if type(number) is int else len(lines) + 1) + b"\n")
    return b"".join(lines)


_IDS = frozenset(
    {"agent_id", "_session_id", "task_id", "message_id", "to_agent", "reply_to", "replied_with"}
)


def _with_new_ids(name: str, value: Any, ids: Mapping[str, str]) -> Any:
    if name in _IDS and isinstance(value, str):
        return ids.get(value, value)
    if name == "sent_by" and isinstance(value, dict):
        return {field: _with_new_ids(field, item, ids) for field, item in value.items()}
    return value


def _stream(
    repository: GitRepository,
    name: str,
    head: str,
    contents: Mapping[str, bytes | None],
    text: str,
) -> bytes:
    who = repository.line("var", "GIT_COMMITTER_IDENT")
    message = text.encode()
    parts = [
        b"commit refs/heads/%b\ncommitter %b\ndata %d\n%b\nfrom %b\n"
        % (name.encode(), who.encode(), len(message), message, head.encode())
    ]
    for path, data in contents.items():
        quoted = repository.quote(path)
        if data is None:
            parts.append(b"D %b\n" % quoted)
        else:
            parts.append(b"M 100644 inline %b\ndata %d\n%b\n" % (quoted, len(data), data))
    return b"".join(parts)


def forked_agents(repository: GitRepository, ours: str, theirs: str) -> list[str]:
    """The agents that forks took away in ``theirs``, which ``ours`` does not have."""
    form = f"%(trailers:key={TRAILER},valueonly)"
    said = repository.line(
        "-c", "log.showSignature=false", "log", f"--format={form}", f"{ours}..{theirs}"
    )
    return [json.loads(line) if line[0] == '"' else line for line in said.split("\n") if line]
