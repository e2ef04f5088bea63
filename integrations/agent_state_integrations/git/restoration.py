"""Documents as a revision has them, brought back through whoever may write the directory.

A running owner is asked by a request, as by the other commands; a directory that nobody owns is
opened. Each agent comes back as one commit: its document with the conversation in it, its tasks,
sleep and mail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from agent_state.cli.options import WAIT_SECONDS, given_keyring
from agent_state.cli.owner import request_change
from agent_state.codec import Codec
from agent_state.conversation_log import join_file
from agent_state.errors import (
    AgentStateError,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    describe,
)
from agent_state.protocols import Document, DocumentId
from agent_state.runtime.requests import AGENT_KINDS, REQUESTS, DocumentFile, RestoreRequest
from agent_state.storage import paths
from agent_state.storage.document import decode_document, encode_document, key_of
from agent_state.storage.sealed_store import is_sealed, unseal
from agent_state_integrations.git.history import paths_of
from agent_state_integrations.git.repository import GitRepository

_BATCH_CHARACTERS = 256 * 1024
"""How much of other documents than those of agents is in one request."""


@dataclass(slots=True)
class RestoredStates:
    """What was restored: the paths of documents in the state directory."""

    restored: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    """They were as the revision has them."""
    removed: list[str] = field(default_factory=list)
    """The sleep of agents that do not sleep in the revision."""
    stayed: list[str] = field(default_factory=list)
    """What was made since."""


def restore(
    repository: GitRepository,
    revision: str,
    agent: str | None = None,
    *,
    wait: float = WAIT_SECONDS,
) -> RestoredStates:
    """Bring documents back as a revision has them: of one agent, or all.

    Each is validated before any is changed. ``wait``: how many seconds a running owner may take to
    answer for one agent; it stops the agent's attempt, and loads the agent anew. Tasks and mail
    that were made since stay, and logs stay as they are. Raises ``StateNotFoundError`` for an agent
    that the revision does not have, the errors of a document that must not be used, and those of
    ``request_change``; agents that were restored before stay so.
    """
    commit = repository.commit(revision)
    below = paths_of(agent) if agent is not None else [""]
    tree = {path: entry for part in below for path, entry in repository.tree(commit, part).items()}
    wanted = {path: entry for path, entry in tree.items() if path.endswith(paths.DOCUMENT)}
    blobs = repository.blobs(entry.oid for entry in wanted.values())
    places = {
        place: path
        for path, entry in sorted(wanted.items())
        if not _is_passing(place := _place(path, blobs[entry.oid]))
    }
    if not places:
        what = f"{revision} has no state" + (f" of agent {agent}" if agent else "")
        raise StateNotFoundError(what, path=str(repository.state))
    logs_there = {path: entry for path, entry in tree.items() if path.endswith(paths.LOG)}

    def log(path: str) -> bytes:
        entry = logs_there.get(path)
        return b"" if entry is None else repository.blobs([entry.oid])[entry.oid]

    texts = _checked({place: blobs[wanted[path].oid] for place, path in places.items()}, log)
    named = {describe(*place): path for place, path in places.items()}
    report = RestoredStates(stayed=_made_since(repository, below, wanted))
    repository.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    for request in _requests(texts):
        done = asyncio.run(request_change(request, repository.state, wait, "restore"))
        report.unchanged += [named[name] for name in done["unchanged"]]
        report.restored += [named[name] for name in done["changed"] if name in named]
        report.removed += [f"{name}.json" for name in done["changed"] if name not in named]
    report.stayed = [path for path in report.stayed if path not in report.removed]
    return report


def _place(path: str, data: bytes) -> DocumentId:
    kind, _, rest = path.partition("/")
    *folders, name = rest.removesuffix(paths.DOCUMENT).split("/")
    key = (*(paths.decode(part, directory=True) for part in folders), paths.decode(name))
    if all(part is not None for part in key):
        return kind, tuple(str(part) for part in key)
    carried = key_of(data)
    if carried is None:
        raise AgentStateError("the file has no key", path=path)
    return kind, carried


def _is_passing(place: DocumentId) -> bool:
    """Whether a document is of one run alone, and is in git by mistake."""
    kind, key = place
    return kind == REQUESTS or (kind == "system" and key[0] in paths.RUN_NAMES)


def _checked(
    files: Mapping[DocumentId, bytes], log: Callable[[str], bytes]
) -> dict[DocumentId, str]:
    """The texts of files that may be used; what is encrypted without keys here, the owner opens.

    ``log`` gives the bytes of a log by its path: an agent's text has its conversation.
    """
    codec, keyring, texts = Codec(), given_keyring(), {}
    for (kind, key), data in files.items():
        try:
            document, meta = decode_document(kind, key, data)
            document = _with_conversation(document, log)
            texts[kind, key] = encode_document(document, meta).decode()
            if keyring is not None:
                document = replace(document, body=unseal(keyring, (kind, key), document.body))
            if not is_sealed(document.body):
                codec.check(document)
        except (StateCorruptedError, SchemaTooNewError) as error:
            raise type(error)(f"not restored: {error.message}", kind=kind, key=key) from error
    return texts


def _with_conversation(document: Document, log: Callable[[str], bytes]) -> Document:
    whole, missing = join_file(document, log)
    if missing is not None:
        raise StateCorruptedError(missing)
    return whole


def _requests(texts: Mapping[DocumentId, str]) -> Iterator[RestoreRequest]:
    """One for each agent, and some for everything else."""
    agents: dict[str, list[DocumentFile]] = {}
    others: list[DocumentFile] = []
    size = 0
    for (kind, key), text in texts.items():
        file = DocumentFile(kind=kind, key=[*key], text=text)
        if kind in AGENT_KINDS:
            agents.setdefault(key[0], []).append(file)
            continue
        if others and size + len(text) > _BATCH_CHARACTERS:
            yield RestoreRequest(files=others)
            others, size = [], 0
        others.append(file)
        size += len(text)
    if others:
        yield RestoreRequest(files=others)
    for agent_id, own in agents.items():
        yield RestoreRequest(agent_id=agent_id, files=own)


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
