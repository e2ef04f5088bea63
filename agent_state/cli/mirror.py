"""``agent-state mirror``: the copy of a state directory that is in Redis."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import progress, say, show_json
from agent_state.codec import Codec
from agent_state.errors import AgentStateError, MirrorError, MissingExtraError
from agent_state.storage import ReadOnlyStateStore

if TYPE_CHECKING:
    from agent_state.redis.mirror_client import MirrorClient
    from agent_state.redis.mirror_sync import MirrorComparison, PullReport

FINE, WRONG = 0, 1
_SHOWN = 20

mirror = typer.Typer(
    help="The mirror in Redis: how it goes, whether it is whole, and the way back.",
    no_args_is_help=True,
)

RedisOption = Annotated[
    str,
    typer.Option(
        "--redis",
        metavar="URL",
        envvar="AGENT_STATE_REDIS",
        help="Where Redis is, with user and password.",
    ),
]
PrefixOption = Annotated[
    str,
    typer.Option(
        "--prefix", envvar="AGENT_STATE_REDIS_PREFIX", help="What the mirror's keys begin with."
    ),
]
TakeOverOption = Annotated[
    bool, typer.Option("--take-over", help="Also where it is another state directory's copy.")
]

_HERE = "redis://localhost:6379/0"


@mirror.command()
def status(
    redis: RedisOption = _HERE,
    prefix: PrefixOption = "",
    state: StateOption = Path("state"),
    as_json: JsonOption = False,
) -> None:
    """Show what the server said last of its mirror, and what Redis has.

    Exit 1 when the server's mirror was in trouble, or Redis does not answer.
    """
    raise typer.Exit(asyncio.run(_status(redis, prefix, state, as_json)))


async def _status(url: str, prefix: str, state: Path, as_json: bool) -> int:
    said = await _last_said(state)
    there: dict[str, Any] = {}
    error: str | None = None
    async with _client(url, prefix) as client:
        from agent_state.redis.mirror_sync import overview

        try:
            there = await overview(client)
        except MirrorError as failed:
            error = failed.message
    if as_json:
        show_json({"server": said, "redis": there, "error": error})
    else:
        _show_status(said, there, error)
    fine = error is None and (said is None or said.get("state") in ("following", "closed"))
    return FINE if fine else WRONG


async def _last_said(state: Path) -> dict[str, Any] | None:
    """What is in ``system/mirror``; None when no server has had a mirror here."""
    store = ReadOnlyStateStore(state)
    await store.open()
    try:
        document = await store.get("system", ("mirror",))
    finally:
        await store.close()
    return Codec().body(document) if document is not None else None


def _show_status(said: dict[str, Any] | None, there: dict[str, Any], error: str | None) -> None:
    if said is None:
        say("no server has had a mirror here")
    else:
        say(f"{said.get('mirror')}: {said.get('state')} since {said.get('since')}")
        say(
            f"  {said.get('waiting')} waiting, {said.get('sent')} sent, {said.get('removed')} "
            f"removed, {said.get('records')} records, as of {said.get('at')}"
        )
        if said.get("last_error"):
            say(f"  {said['troubles']} troubles, the last at {said['last_error_at']}:")
            say(f"  {said['last_error']}")
        for what in (*said.get("refused", ()), *said.get("kept", ())):
            say(f"  {what}")
    if error is not None:
        say(error, "red")
    elif not there.get("instance"):
        say("in Redis: nothing")
    else:
        say(f"in Redis: instance {there['instance']}")
        for kind, counts in there["kinds"].items():
            say(f"  {kind}: {counts['documents']} documents, {counts['logs']} logs")


@mirror.command()
def verify(
    redis: RedisOption = _HERE,
    prefix: PrefixOption = "",
    state: StateOption = Path("state"),
    as_json: JsonOption = False,
) -> None:
    """Compare the revisions on both sides; exit 1 when something differs.

    Works beside a running server, and changes nothing. What the server has saved within the
    last moment may not be there yet.
    """
    with progress("comparing"):
        compared = asyncio.run(_verify(redis, prefix, state))
    if as_json:
        show_json(compared.to_dict())
    else:
        _show_compared(compared)
    raise typer.Exit(FINE if compared.ok else WRONG)


async def _verify(url: str, prefix: str, state: Path) -> MirrorComparison:
    async with _client(url, prefix) as client:
        from agent_state.redis import mirror_sync

        return await mirror_sync.verify(client, str(state))


def _show_compared(compared: MirrorComparison) -> None:
    say(f"{compared.documents} documents and {compared.logs} logs compared")
    for what, places in (
        ("not in the mirror", compared.missing),
        ("different", compared.different),
        ("only in the mirror", compared.extra),
        ("gone by its TTL", compared.expired),
    ):
        _show_some(what, places)
    say("both sides are equal" if compared.ok else "the mirror differs")


def _show_some(what: str, places: list[str]) -> None:
    if places:
        more = ", …" if len(places) > _SHOWN else ""
        say(f"{what}: {len(places)} ({', '.join(places[:_SHOWN])}{more})")


@mirror.command()
def rebuild(
    redis: RedisOption = _HERE,
    prefix: PrefixOption = "",
    state: StateOption = Path("state"),
    take_over: TakeOverOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write everything to Redis again, and remove there what is not here.

    Works beside a running server. Nothing changes in the state directory.
    """
    with progress("writing"):
        rebuilt = asyncio.run(_rebuild(redis, prefix, state, take_over))
    if as_json:
        show_json(rebuilt)
    else:
        say(
            f"{rebuilt['documents']} documents and {rebuilt['records']} log records written, "
            f"{rebuilt['removed']} removed"
        )


async def _rebuild(url: str, prefix: str, state: Path, take_over: bool) -> dict[str, Any]:
    async with _client(url, prefix) as client:
        from agent_state.redis import mirror_sync

        return asdict(await mirror_sync.rebuild(client, str(state), take_over=take_over))


@mirror.command()
def pull(
    redis: RedisOption = _HERE,
    prefix: PrefixOption = "",
    state: StateOption = Path("state"),
    take_over: TakeOverOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a state directory back from Redis, on a new machine or after a loss.

    Every document is checked, keeps its revision, and never replaces a newer one or one that a
    person has edited. Refused while a server runs there. Exit 1 when something was not usable.
    """
    with progress("bringing back"):
        pulled = asyncio.run(_pull(redis, prefix, state, take_over))
    if as_json:
        show_json(pulled.to_dict())
    else:
        say(f"{len(pulled.documents)} documents and {len(pulled.logs)} logs brought back")
        _show_some("left as they are here", pulled.left)
        for place, why in pulled.refused.items():
            say(f"not usable: {place}: {why}", "red")
    raise typer.Exit(WRONG if pulled.refused else FINE)


async def _pull(url: str, prefix: str, state: Path, take_over: bool) -> PullReport:
    async with _client(url, prefix) as client:
        from agent_state.redis import mirror_sync

        return await mirror_sync.pull(client, os.fspath(state), Codec(), take_over=take_over)


@asynccontextmanager
async def _client(url: str, prefix: str) -> AsyncIterator[MirrorClient]:
    try:
        from agent_state.redis.mirror_client import MirrorClient  # needs the extra
    except ModuleNotFoundError as error:
        raise MissingExtraError("redis", str(error.name)) from error
    try:
        client = MirrorClient(url, prefix, timeout_seconds=5.0)
    except ValueError as error:
        raise AgentStateError(str(error)) from error
    try:
        yield client
    finally:
        await client.close()
