"""``agent-state serve``: a state directory over HTTP."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_state.cli.options import STATE, StateOption, given_keyring, is_given
from agent_state.cli.output import announce
from agent_state.errors import AgentStateError, StateDirectoryInUseError, StateNotFoundError
from agent_state.runtime import AsyncAgentSessionManager

if TYPE_CHECKING:
    from agent_state.web import Backend, LiveBackend

TOKEN = "AGENT_STATE_TOKEN"  # noqa: S105  # the name of an environment variable


def serve(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="The same as --state.", show_default=False),
    ] = None,
    *,
    state: StateOption = STATE,
    host: Annotated[
        str,
        typer.Option(help="The address to listen at; one that other machines reach needs a token."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help=f"The operators' tokens, one a line, or their hashes (sha256:…). One more "
            f"may be in {TOKEN}.",
            show_default=False,
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="Your AsyncAgentSessionManager with its handlers, or an "
            "agent_state.web.LiveBackend, or a function that makes one of DIR. Without it, tasks "
            "stay pending.",
            show_default=False,
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Change nothing; another process may own DIR.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further host name that is answered.", show_default=False),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="An origin whose web pages may use the server from a browser.", show_default=False
        ),
    ] = None,
    public_sessions: Annotated[
        bool,
        typer.Option(
            "--public-sessions",
            help="Visitors without a token may create anonymous sessions, so many in an hour.",
        ),
    ] = False,
    sessions_per_address: Annotated[
        int, typer.Option(help="… from one network address.", min=1)
    ] = 30,
    sessions_in_all: Annotated[int, typer.Option(help="… from all addresses.", min=1)] = 3000,
    bytes_per_address: Annotated[
        int,
        typer.Option(
            help="With --public-sessions: what the owners of sessions may write in an hour, "
            "from one network address.",
            min=1,
        ),
    ] = 10485760,
    bytes_in_all: Annotated[int, typer.Option(help="… from all addresses.", min=1)] = 1073741824,
    visitor_task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AGENT/NAME",
            help="A task that the owner of a session may queue with a message.",
            show_default=False,
        ),
    ] = None,
    dashboard: Annotated[
        bool, typer.Option(help="Serve the dashboard at /, with a login for browsers.")
    ] = True,
    swagger_ui: Annotated[
        bool,
        typer.Option("--swagger-ui", help="Serve Swagger UI at /docs; needs the extra `swagger`."),
    ] = False,
    max_body: Annotated[int, typer.Option(help="The maximum bytes of a request.", min=1)] = 1048576,
) -> None:
    """Serve a state directory over HTTP, until SIGTERM or Ctrl-C.

    Owns DIR and runs its agents; with --read-only it only reads DIR, which another process may own.
    A missing DIR is an error, unless --runtime names an application, which makes its own.

    Example: agent-state serve /srv/app/state --port 8000
    """
    from agent_state import web  # needs the extra

    if runtime is not None and read_only:
        raise typer.BadParameter("--runtime runs agents, and --read-only changes nothing")
    if directory is not None:
        if is_given(context, "state"):
            raise typer.BadParameter("write DIR or --state, not both")
        state = directory
    tokens = web.read_tokens(token_file) if token_file is not None else []
    if os.environ.get(TOKEN):
        tokens.append(os.environ[TOKEN])
    web.check_exposure(host, len(tokens))  # before the directory is opened
    if runtime is None and not state.is_dir():
        raise StateNotFoundError("there is no such state directory", path=state.absolute())
    hosts = list(allow_host or ())

    async def run() -> None:
        backend = _backend(state, runtime, read_only=read_only)
        app = web.create_app(  # before the start, of which it sees what is read
            backend,
            tokens=tokens,
            hosts=[*web.LOOPBACK, *hosts] if web.is_loopback(host) else hosts or None,
            cors_origins=cors_origin or (),
            max_body=max_body,
            dashboard=dashboard,
            swagger_ui=swagger_ui,
            visitor_tasks=visitor_task or (),
            visitors=web.VisitorLimits(
                sessions_per_address, sessions_in_all, bytes_per_address, bytes_in_all
            )
            if public_sessions
            else None,
        )

        def started(address: str) -> None:
            access = "a token is needed" if tokens else "no token is needed on this machine"
            announce(f"{address} serves {state}; {access}")

        await web.serve(app, host=host, port=port, on_start=started, opening=_opened(backend))

    asyncio.run(run())


def _backend(state: Path, runtime: str | None, *, read_only: bool) -> Backend:
    from agent_state.web import LiveBackend, ReadOnlyBackend

    if read_only:
        return ReadOnlyBackend(state, encryption=given_keyring())
    if runtime:
        return _imported(runtime, state)
    return LiveBackend(runtime=AsyncAgentSessionManager(state, encryption=given_keyring()))


@asynccontextmanager
async def _opened(backend: Backend) -> AsyncIterator[None]:
    from agent_state.web import ReadOnlyBackend

    if isinstance(backend, ReadOnlyBackend):
        async with backend:
            yield
        return
    running = backend.runtime
    if running is None:
        raise AgentStateError("--runtime names a backend that has no runtime")
    try:
        report = await running.start()
    except StateDirectoryInUseError as error:
        raise AgentStateError(f"{error}; --read-only can read it all the same") from error
    try:
        for line in report.lines():
            announce(line)
        yield
    finally:
        await running.stop()


def _imported(name: str, state: Path) -> LiveBackend:
    """The backend that ``MODULE:NAME`` is, or returns. Raises ``AgentStateError``."""
    from agent_state.web import LiveBackend

    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise AgentStateError(f"--runtime {name}: {error}") from error
    if callable(found):
        make: Callable[[Path], object] = found
        found = make(state)
    if isinstance(found, AsyncAgentSessionManager):
        return LiveBackend(runtime=found)
    if not isinstance(found, LiveBackend):
        raise AgentStateError(
            f"--runtime {name} is neither an AsyncAgentSessionManager nor a LiveBackend"
        )
    return found
