"""Changes of a state directory: made here while no process owns it, else requested of the owner.

A request is a file below ``requests/`` that the owner carries out and answers. So a command never
writes around a running server.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import typer
from pydantic import BaseModel

from agent_state.cli.inspector import open_inspector
from agent_state.cli.options import given_keyring
from agent_state.cli.output import (
    OK,
    PROBLEM,
    counted,
    print_error,
    print_line,
    progress,
    show_json,
)
from agent_state.clock import instant
from agent_state.errors import (
    AgentStateError,
    Key,
    StateCorruptedError,
    StateDirectoryInUseError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import BodySealer
from agent_state.runtime.recovery import RUNTIME
from agent_state.runtime.requests import REQUESTS, StoredOperator, perform
from agent_state.serializers import canonical_json
from agent_state.storage import fileio, paths
from agent_state.storage.document import decode_document
from agent_state.storage.sealed_store import refuse_encrypted, seal, unseal

_POLL_SECONDS = 0.05
_START_SECONDS = 5.0
"""A runtime that starts has told so by then."""
_DEAF = (
    "it has no runtime, which alone answers: stop it and try again, "
    "or open the directory there with exclusive=False"
)


def carry_out(request: BaseModel, state: Path, wait: float, noun: str) -> dict[str, Any]:
    """Carry out a request on a directory; the report.

    ``noun``: what the request's file is named by. Raises ``AgentStateError`` when the owner refuses
    or does not answer, ``StateNotFoundError`` for a missing directory, which is not made.
    """
    with progress("working"):
        return asyncio.run(request_change(request, state, wait, noun))


async def request_change(request: BaseModel, state: Path, wait: float, noun: str) -> dict[str, Any]:
    """``carry_out`` for a caller that awaits."""
    dry_run = getattr(request, "dry_run", False)
    async with open_inspector(state) as inspector:  # a misspelt path creates no directory
        if dry_run:
            manager = inspector.manager
            return await perform(StoredOperator(manager, manager.clock), request, noun)
    try:
        async with StatePersistenceManager(state, encryption=given_keyring()) as manager:
            return await perform(StoredOperator(manager, manager.clock), request, noun)
    except StateDirectoryInUseError as in_use:
        root = os.path.abspath(state)  # noqa: PTH100, ASYNC240  # no file is touched
        return await _ask_owner(request, root, wait, in_use, noun)


async def _ask_owner(
    request: BaseModel, state: str, wait: float, in_use: StateDirectoryInUseError, noun: str
) -> dict[str, Any]:
    """Drop the request into the owner's directory, and wait for its answer.

    Raises ``AgentStateError`` when the owner refuses, or does not answer; the request is withdrawn.
    Raises ``EncryptionKeyError`` before it asks an owner who encrypts, without a keyring.
    """
    key = (f"{noun}-{secrets.token_hex(8)}",)
    path = paths.locate(state, REQUESTS, key).path
    body, keyring = canonical_json(request.model_dump(mode="json")), given_keyring()
    if keyring is not None:
        body = await asyncio.to_thread(seal, keyring, (REQUESTS, key), body)
    else:
        async with open_inspector(state) as inspector:
            await refuse_encrypted(inspector.manager.store)
    await asyncio.to_thread(_drop, state, path, body)
    answer: dict[str, Any] | None = None
    is_deaf = False
    try:
        for seconds in (min(wait, _START_SECONDS), wait - _START_SECONDS):
            if answer is not None or is_deaf or seconds <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while answer is None:
                        await asyncio.sleep(_POLL_SECONDS)
                        answer = await asyncio.to_thread(_answer, path, key, keyring)
            is_deaf = answer is None and not await _is_running(state)
    finally:
        await asyncio.to_thread(fileio.remove_file, path, sync=False)
    if answer is None:
        seconds = min(wait, _START_SECONDS) if is_deaf else wait
        message = f"the owner of the directory has not answered within {seconds:g} s"
        advice = _DEAF if is_deaf else "what it has begun, it may complete"
        raise AgentStateError(f"{message}: {in_use.message}; {advice}", path=state)
    report = answer.get("report")
    if not isinstance(report, dict):
        raise AgentStateError(f"the server refused: {answer.get('error')}", path=state)
    return report


async def _is_running(state: str) -> bool:
    """Whether the owner of a directory has a runtime, which answers requests."""
    lock = await asyncio.to_thread(fileio.stat_file, f"{state}/.locks/owner.lock")
    async with open_inspector(Path(state)) as inspector:
        found = await inspector.manager.load("system", RUNTIME)
    told = found.model_dump() if found is not None else {}
    try:
        since = instant(str(told.get("at"))).timestamp()
    except ValueError:
        return False
    # Else a runtime before this owner was killed.
    return told.get("status") == "running" and lock is not None and since >= lock.mtime_ns / 1e9 - 1


def _drop(state: str, path: str, body: bytes) -> None:
    folder = Path(path).parent
    fileio.make_directories(state, REQUESTS, sync=False)
    fileio.replace_file(path, body, sync=False)
    if os.name == "posix" and os.geteuid() == 0:
        owner = os.stat(state)  # noqa: PTH116  # root asks a server that is not root
        for mine in (folder, path):
            os.chown(mine, owner.st_uid, owner.st_gid)


def _answer(path: str, key: Key, keyring: BodySealer | None) -> dict[str, Any] | None:
    found = fileio.read_file(path)
    try:
        document, _ = decode_document(REQUESTS, key, found[0] if found is not None else b"{}")
    except StateCorruptedError:
        return None
    body = document.body
    if keyring is not None:
        body = unseal(keyring, (REQUESTS, key), body)
    answer: dict[str, Any] = orjson.loads(body)
    return answer if "answered_at" in answer else None


def end_with_report(
    report: Mapping[str, Any], noun: str, done: str, before: str, as_json: bool
) -> None:
    """Print what was done with each item, and exit: 1 if one was refused.

    ``done``: the word for it, such as ``woken``; ``before``: for what was so before, ``awake``.
    """
    if as_json:
        show_json(report)
    else:
        print_line(f"{counted(len(report['changed']), noun)} {done}")
        for name in report["unchanged"]:
            print_line(f"{name} was {before} before")
    for name, why in report["refused"].items():
        print_error(f"not {done}: {name}: {why}")
    raise typer.Exit(PROBLEM if report["refused"] else OK)
