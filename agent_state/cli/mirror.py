"""``agent-state mirror``: the copy of a state directory in Redis."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_state.cli.options import OK, PROBLEM, JsonOption, StateOption, given_keyring
from agent_state.cli.output import print_line, progress, show_json
from agent_state.codec import Codec
from agent_state.errors import AgentStateError, MirrorError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import DocumentCodec
from agent_state.storage import ReadOnlyStateStore
from agent_state.storage.sealed_store import SealedCodec

if TYPE_CHECKING:
    from agent_state.redis.mirror_client import MirrorClient
    from agent_state.redis.mirror_sync import MirrorComparison, PullReport, RebuildReport

_STATE = Path("state")
_LOCAL = "redis://localhost:6379/0"
_MAX_NAMED = 20

mirror = typer.Typer(
    help="The mirror in Redis: its status, a comparison, a rebuild, and the way back.",
    no_args_is_help=True,
)

RedisOption = Annotated[
    str,
    typer.Option(
        "--redis",
        metavar="URL",
        envvar="AGENT_STATE_REDIS",
        help="The URL of Redis, with user and password.",
    ),
]
PrefixOption = Annotated[
    str,
    typer.Option(
        "--prefix", envvar="AGENT_STATE_REDIS_PREFIX", help="The prefix of the mirror's keys."
    ),
]
TakeOverOption = Annotated[
    bool, typer.Option("--take-over", help="Even if it is the copy of another state directory.")
]


@mirror.command()
def status(
    redis: RedisOption = _LOCAL,
    prefix: PrefixOption = "",
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Show the server's last report about its mirror, and the content of Redis.

    Exit 1 if the server's mirror was failing, or Redis does not answer.

    Example: agent-state mirror status
    """

    async def work() -> tuple[dict[str, Any] | None, dict[str, Any], str | None]:
        reported = await _last_report(state)
        async with _client(redis, prefix) as client:
            from agent_state.redis.mirror_sync import overview

            try:
                return reported, await overview(client), None
            except MirrorError as error:
                return reported, {}, error.message

    reported, content, error = asyncio.run(work())
    if as_json:
        show_json({"server": reported, "redis": content, "error": error})
    else:
        _show_status(reported, content, error)
    healthy = reported is None or reported.get("state") in ("following", "closed")
    raise typer.Exit(OK if healthy and error is None else PROBLEM)


async def _last_report(state: Path) -> dict[str, Any] | None:
    """The document ``system/mirror``; None if no server has had a mirror of this directory."""
    store = ReadOnlyStateStore(state)
    async with StatePersistenceManager(store=store, encryption=given_keyring()) as manager:
        report = await manager.load("system", "mirror")
        return None if report is None else report.model_dump()


def _show_status(
    reported: dict[str, Any] | None, content: dict[str, Any], error: str | None
) -> None:
    if reported is None:
        print_line("no server has had a mirror of this directory")
    else:
        _show_report(reported)
    if error is not None:
        print_line(error, "red")
    elif not content.get("instance"):
        print_line("in Redis: nothing")
    else:
        print_line(f"in Redis: instance {content['instance']}")
        for kind, counts in content["kinds"].items():
            print_line(f"  {kind}: {counts['documents']} documents, {counts['logs']} logs")


def _show_report(reported: dict[str, Any]) -> None:
    print_line(f"{reported.get('mirror')}: {reported.get('state')} since {reported.get('since')}")
    print_line(
        f"  {reported.get('waiting')} waiting, {reported.get('sent')} sent, "
        f"{reported.get('removed')} removed, {reported.get('records')} records, "
        f"as of {reported.get('at')}"
    )
    if reported.get("last_error"):
        print_line(f"  {reported['troubles']} troubles, the last at {reported['last_error_at']}:")
        print_line(f"  {reported['last_error']}")
    for what in (*reported.get("refused", ()), *reported.get("kept", ())):
        print_line(f"  {what}")


@mirror.command()
def verify(
    redis: RedisOption = _LOCAL,
    prefix: PrefixOption = "",
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Compare the revisions on both sides; exit 1 if one differs.

    Works while a server runs, and changes nothing. The server's latest changes may not be in
    Redis yet.

    Example: agent-state mirror verify --json
    """

    async def work() -> MirrorComparison:
        async with _client(redis, prefix) as client:
            from agent_state.redis import mirror_sync

            return await mirror_sync.verify(client, str(state))

    with progress("comparing"):
        compared = asyncio.run(work())
    if as_json:
        show_json(compared.to_dict())
    else:
        print_line(f"{compared.documents} documents and {compared.logs} logs compared")
        _show_places("not in the mirror", compared.missing)
        _show_places("different", compared.different)
        _show_places("only in the mirror", compared.extra)
        _show_places("gone by its TTL", compared.expired)
        print_line("both sides are equal" if compared.ok else "the mirror differs")
    raise typer.Exit(OK if compared.ok else PROBLEM)


@mirror.command()
def rebuild(
    redis: RedisOption = _LOCAL,
    prefix: PrefixOption = "",
    state: StateOption = _STATE,
    take_over: TakeOverOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write everything to Redis again, and remove what the directory does not have.

    Works while a server runs, and changes nothing in the state directory.

    Example: agent-state mirror rebuild --prefix app:
    """

    async def work() -> RebuildReport:
        async with _client(redis, prefix) as client:
            from agent_state.redis import mirror_sync

            return await mirror_sync.rebuild(client, str(state), take_over=take_over)

    with progress("writing"):
        rebuilt = asyncio.run(work())
    if as_json:
        show_json(asdict(rebuilt))
    else:
        print_line(
            f"{rebuilt.documents} documents and {rebuilt.records} log records written, "
            f"{rebuilt.removed} removed"
        )


@mirror.command()
def pull(
    redis: RedisOption = _LOCAL,
    prefix: PrefixOption = "",
    state: StateOption = _STATE,
    take_over: TakeOverOption = False,
    as_json: JsonOption = False,
) -> None:
    """Restore a state directory from Redis, on a new machine or after a loss.

    Every document is checked with the built-in models (an application's own validator is not
    known here), keeps its revision, and never replaces a newer one or a hand edit. Refused while
    a server owns the directory. Exit 1 if a document could not be used.

    Example: agent-state mirror pull --state restored
    """

    async def work() -> PullReport:
        async with _client(redis, prefix) as client:
            from agent_state.redis import mirror_sync

            codec: DocumentCodec = Codec()  # of the built-in models
            if (keyring := given_keyring()) is not None:
                codec = SealedCodec(codec, keyring)
            return await mirror_sync.pull(client, os.fspath(state), codec, take_over=take_over)

    with progress("restoring"):
        pulled = asyncio.run(work())
    if as_json:
        show_json(pulled.to_dict())
    else:
        print_line(f"{len(pulled.documents)} documents and {len(pulled.logs)} logs restored")
        _show_places("left as they are here", pulled.left)
        for place, reason in pulled.refused.items():
            print_line(f"not usable: {place}: {reason}", "red")
    raise typer.Exit(PROBLEM if pulled.refused else OK)


def _show_places(what: str, places: Sequence[str]) -> None:
    if places:
        more = ", …" if len(places) > _MAX_NAMED else ""
        print_line(f"{what}: {len(places)} ({', '.join(places[:_MAX_NAMED])}{more})")


@asynccontextmanager
async def _client(url: str, prefix: str) -> AsyncIterator[MirrorClient]:
    from agent_state.redis.mirror_client import MirrorClient  # needs the extra

    try:
        client = MirrorClient(url, prefix, timeout_seconds=5.0)
    except ValueError as error:
        raise AgentStateError(str(error)) from error
    try:
        yield client
    finally:
        await client.close()
