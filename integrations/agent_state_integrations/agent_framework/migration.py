"""``agent-state import agent-framework``: what the framework's own stores have in files."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import warnings
from base64 import b32decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from agent_state import (
    AgentStateError,
    MemoryStateStore,
    StateNotFoundError,
    StateValidationError,
)
from agent_state.access import StateLocation
from agent_state.cli.options import STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, show_import
from agent_state.errors import needs_extra

with needs_extra("agent-framework", "agent_framework"):
    from agent_framework import FileCheckpointStorage, FileHistoryProvider, FileSessionStore
    from agent_framework.exceptions import WorkflowCheckpointException

    from agent_state_integrations.agent_framework.checkpoints import AgentStateCheckpointStorage
    from agent_state_integrations.agent_framework.history import AgentStateHistoryProvider
    from agent_state_integrations.agent_framework.sessions import AgentStateSessionStore
    from agent_state_integrations.agent_framework.values import TypedJsonCodec

_CODEC = TypedJsonCodec(lambda _: True, lambda _: True)
"""To compare what the two storages gave; nothing is decoded with it."""
_ENCODED, _DIGEST = "~session-", "~session-sha256-"


@dataclass(slots=True)
class FileImport:
    """What was brought over from the files of Microsoft Agent Framework."""

    checkpoints: int = 0
    sessions: int = 0
    histories: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Files that could not be brought over whole, with the reason."""


async def import_files(
    directory: Path,
    state: StateLocation,
    *,
    allowed: Sequence[str] = (),
    source_id: str = AgentStateHistoryProvider.DEFAULT_SOURCE_ID,
) -> FileImport:
    """Bring over the checkpoints, sessions and histories that are files of a directory.

    The framework's ``FileCheckpointStorage``, ``FileSessionStore`` and ``FileHistoryProvider`` read
    each file in a copy, as its session store moves a damaged one away, and what is stored is
    compared with what they gave. What is stored here with another content is refused; a history
    that has gone on here stays. ``allowed``: the ``allowed_checkpoint_types`` of both storages.
    ``source_id``: that of the history provider that goes on.
    """
    report = FileImport()
    async with (
        AgentStateCheckpointStorage(state, allowed_checkpoint_types=allowed) as checkpoints,
        AgentStateSessionStore(state) as sessions,
        AgentStateHistoryProvider(state, source_id=source_id) as histories,
    ):
        for path in await asyncio.to_thread(_files, directory):
            try:
                with _copy_of(path) as copy:
                    kind = _kind_of(copy)
                    if kind == "history":
                        await _history(copy, histories)
                        report.histories += 1
                    elif kind == "session":
                        await _session(copy, sessions)
                        report.sessions += 1
                    else:
                        await _checkpoint(copy, allowed, checkpoints)
                        report.checkpoints += 1
            except (AgentStateError, TypeError, ValueError, WorkflowCheckpointException) as error:
                report.refused[path.name] = str(error)
    return report


@contextmanager
def _copy_of(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copyfile(path, Path(folder, path.name)))


def _files(directory: Path) -> list[Path]:
    """Checkpoints by their times, as they are listed in the order in which they are saved."""
    found = (path for path in directory.iterdir() if path.is_file())
    return sorted((path for path in found if not path.name.startswith(".")), key=_order)


def _order(path: Path) -> tuple[str, str]:
    try:
        return str(json.loads(path.read_bytes()).get("timestamp", "")), path.name
    except (AttributeError, OSError, ValueError):
        return "", path.name


def _kind_of(path: Path) -> str:
    if path.suffix == ".jsonl":
        return "history"
    if path.suffix == ".msgpack":  # a length comes before each message, and no map begins with it
        return "history" if path.read_bytes()[:1] < b"\x80" else "session"
    if path.suffix == ".json":
        body = json.loads(path.read_bytes())
        if isinstance(body, dict) and "checkpoint_id" in body:
            return "checkpoint"
        if isinstance(body, dict) and body.get("type") == "session":
            return "session"
    raise ValueError("this is no file of the framework's stores")


async def _checkpoint(
    path: Path, allowed: Sequence[str], storage: AgentStateCheckpointStorage
) -> None:
    source = FileCheckpointStorage(path.parent, allowed_checkpoint_types=[*allowed])
    old = await source.load(path.stem)
    name, checkpoint_id = old.workflow_name, old.checkpoint_id
    if checkpoint_id not in await storage.list_checkpoint_ids(workflow_name=name):
        await storage.save(old)
    found = await storage.load(checkpoint_id)
    if _CODEC.encode(found.to_dict()) != _CODEC.encode(old.to_dict()):
        raise StateValidationError("this checkpoint is stored here with another content")


async def _session(path: Path, store: AgentStateSessionStore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class is experimental
        source = FileSessionStore(path.parent, serialization_format=_format(path))
    session_id = _id_of(path.stem)
    old = await source.get(session_id)
    if old is None:
        raise ValueError("the framework looks for this session under another name")
    if await store.get(session_id) is None:
        await store.set(session_id, old)
    found = await store.get(session_id)
    if found is None or found.to_dict() != old.to_dict():
        raise StateValidationError("this session is stored here with another content")


async def _history(path: Path, provider: AgentStateHistoryProvider) -> None:
    source = FileHistoryProvider(path.parent, serialization_format=_format(path))
    session_id = _id_of(path.stem)
    old = await source.get_messages(session_id)
    if not await provider.get_messages(session_id):
        await provider.save_messages(session_id, old)  # all or none
    found = await provider.get_messages(session_id)
    if [each.to_dict() for each in found[: len(old)]] != [each.to_dict() for each in old]:
        raise StateValidationError("this history is stored here with other messages")


def _format(path: Path) -> Literal["json", "msgpack"]:
    return "msgpack" if path.suffix == ".msgpack" else "json"


def _id_of(stem: str) -> str:
    """The id of a session from the name of its file, as the framework makes that."""
    if stem.startswith(_DIGEST):
        raise ValueError("the name of the file has a digest in the place of the session's id")
    if not stem.startswith(_ENCODED):
        return stem
    encoded = stem.removeprefix(_ENCODED).upper()
    return b32decode(encoded + "=" * (-len(encoded) % 8)).decode()


def import_agent_framework(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The storage_path of one of the file stores.")
    ],
    *,
    state: StateOption = STATE,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="MODULE:NAME",
            help="A type of the application that checkpoints may have; as often as needed.",
            show_default=False,
        ),
    ] = None,
    source_id: Annotated[
        str, typer.Option("--source-id", help="The source_id of the provider of histories.")
    ] = AgentStateHistoryProvider.DEFAULT_SOURCE_ID,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over what Microsoft Agent Framework has stored in files, and compare both sides.

    Checkpoints of workflows, sessions and histories, each known by what it is. What is stored in
    --state already is not changed. Exit 1 if a file could not be brought over whole.

    Example: agent-state import agent-framework checkpoints --allow my_app.models:Order
    """
    if not directory.is_dir():
        raise StateNotFoundError("there is no such directory", path=directory)
    target = MemoryStateStore() if dry_run else state
    report = asyncio.run(import_files(directory, target, allowed=allow or (), source_id=source_id))
    what = ", ".join(
        (
            counted(report.checkpoints, "checkpoint"),
            counted(report.sessions, "session"),
            f"{report.histories} histor{'y' if report.histories == 1 else 'ies'}",
        )
    )
    raise typer.Exit(show_import(report, what, dry_run=dry_run, as_json=as_json))
