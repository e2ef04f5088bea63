"""``agent-state tasks``: find tasks, run them again, cancel and delete them."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast

import orjson
import typer

from agent_state.cli import display
from agent_state.cli.inspector import open_inspector
from agent_state.cli.options import OK, PROBLEM, JsonOption, StateOption, given_keyring
from agent_state.cli.output import counted, print_error, print_line, progress, show_json
from agent_state.errors import (
    AgentStateError,
    StateDirectoryInUseError,
    StateNotFoundError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.models import Task, TaskStatus
from agent_state.runtime.operations import (
    Action,
    StoredTasks,
    TaskFilter,
    TaskOperator,
    TaskReport,
    TaskRequest,
    position,
)
from agent_state.runtime.requests import REQUESTS
from agent_state.storage import fileio, paths

_STATE = Path("state")
_POLL_SECONDS = 0.05
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DONE = {"retry": "run again", "cancel": "cancelled", "delete": "deleted"}

tasks = typer.Typer(
    help="The tasks of all agents: find them, run them again, cancel and delete them.",
    no_args_is_help=True,
)


def _seconds(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``15m``, ``2h`` or ``3d``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip(), re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 15m, 2h or 3d")
    return float(found[1]) * _UNITS[found[2] or "s"]


IdsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", help="Ids of tasks, or AGENT/ID.", show_default=False),
]
StatusOption = Annotated[
    list[str] | None,
    typer.Option(
        "--status",
        help="Of this status: pending, in_progress, failed, completed, dead or cancelled.",
        show_default=False,
    ),
]
DeadOption = Annotated[bool, typer.Option("--dead", help="As --status dead.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Of this name.", show_default=False)]
AgentOption = Annotated[
    str | None, typer.Option("--agent", help="Of this agent.", show_default=False)
]
ErrorOption = Annotated[
    str | None, typer.Option("--error", help="With this text in the error.", show_default=False)
]
OlderOption = Annotated[
    float | None,
    typer.Option(
        "--older-than",
        metavar="TIME",
        parser=_seconds,
        help="Submitted at least so long ago: 90s, 15m, 2h, 3d.",
        show_default=False,
    ),
]
NewerOption = Annotated[
    float | None,
    typer.Option(
        "--newer-than",
        metavar="TIME",
        parser=_seconds,
        help="Submitted less than so long ago.",
        show_default=False,
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="All tasks that it applies to.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Count them; change nothing.")]
WaitOption = Annotated[
    float,
    typer.Option("--wait", help="How many seconds a running server may take to answer.", min=0),
]


def _filter(
    *,
    status: Sequence[str] | None,
    dead: bool = False,
    name: str | None,
    agent: str | None,
    error: str | None,
    older_than: float | None,
    newer_than: float | None,
) -> TaskFilter:
    """Return the filter that the options make. Raises ``typer.BadParameter``."""
    states = [*(status or ()), *(["dead"] if dead else [])]
    try:
        return TaskFilter(
            status=cast("tuple[TaskStatus, ...]", tuple(states)),
            name=name,
            agent_id=agent,
            error=error,
            older_than_seconds=older_than,
            newer_than_seconds=newer_than,
        )
    except ValueError as wrong:
        raise typer.BadParameter(f"--status: {', '.join(states)} is not a status") from wrong


# -- looking -----------------------------------------------------------------------------------


@tasks.command("ls")
def list_tasks(
    *,
    status: StatusOption = None,
    dead: DeadOption = False,
    name: NameOption = None,
    agent: AgentOption = None,
    error: ErrorOption = None,
    older_than: OlderOption = None,
    newer_than: NewerOption = None,
    oldest: Annotated[bool, typer.Option("--oldest", help="The oldest first.")] = False,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1)] = 100,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="The next page: those behind this task.", show_default=False
        ),
    ] = None,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """List tasks of all agents, the newest first.

    Works while a server runs, and changes nothing.
    """
    wanted = _filter(
        status=status,
        dead=dead,
        name=name,
        agent=agent,
        error=error,
        older_than=older_than,
        newer_than=newer_than,
    )

    async def work() -> int:
        async with open_inspector(state) as inspector:
            operator = _operator(inspector.manager)
            behind = await operator.get(await operator.locate_named(after)) if after else None
            with progress("reading"):
                found = await operator.search(
                    wanted,
                    newest_first=not oldest,
                    limit=limit,
                    after=position(behind) if behind is not None else None,
                )
            if as_json:
                show_json([task.model_dump(mode="json") for task in found])
            else:
                display.show_tasks(found)
                if len(found) == limit:
                    last = found[-1]
                    print_line(f"more: --after {last.agent_id}/{last.task_id}", "dim")
            return display.report_unusable(inspector.unusable(), as_json=as_json)

    raise typer.Exit(asyncio.run(work()))


@tasks.command()
def show(
    ident: Annotated[str, typer.Argument(metavar="ID", help="A task's id, or AGENT/ID.")],
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Show one task: its file, its error with the traceback, and its document.

    It may be one that cleanup has archived. Works while a server runs, and changes nothing.
    """

    async def work() -> tuple[Task, str | None]:
        async with open_inspector(state) as inspector:
            operator = _operator(inspector.manager)
            try:
                key = await operator.locate_named(ident)
            except StateNotFoundError:
                return await operator.get(ident), None
            return await operator.get(key), paths.relative("tasks", key, paths.DOCUMENT)

    task, path = asyncio.run(work())
    if as_json:
        show_json({"path": path, "task": task.model_dump(mode="json")})
    else:
        display.show_task(task, path)


# -- changing ----------------------------------------------------------------------------------


@tasks.command()
def retry(
    *,
    ids: IdsArgument = None,
    status: StatusOption = None,
    dead: DeadOption = False,
    name: NameOption = None,
    agent: AgentOption = None,
    error: ErrorOption = None,
    older_than: OlderOption = None,
    newer_than: NewerOption = None,
    everything: AllOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = 60.0,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Run tasks again that are dead or failed, with all their attempts, as they are stored now.

    Cancelled ones with --status cancelled. On a directory at rest the next start does them; a
    running server takes the request from a file in its directory.
    """
    wanted = _filter(
        status=status,
        dead=dead,
        name=name,
        agent=agent,
        error=error,
        older_than=older_than,
        newer_than=newer_than,
    )
    _operate(_request("retry", ids, wanted, everything, dry_run), state, wait, as_json)


@tasks.command()
def cancel(
    *,
    ids: IdsArgument = None,
    status: StatusOption = None,
    name: NameOption = None,
    agent: AgentOption = None,
    error: ErrorOption = None,
    older_than: OlderOption = None,
    newer_than: NewerOption = None,
    everything: AllOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = 60.0,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Cancel unfinished tasks, running ones included."""
    wanted = _filter(
        status=status,
        name=name,
        agent=agent,
        error=error,
        older_than=older_than,
        newer_than=newer_than,
    )
    _operate(_request("cancel", ids, wanted, everything, dry_run), state, wait, as_json)


@tasks.command()
def delete(
    *,
    ids: IdsArgument = None,
    status: StatusOption = None,
    dead: DeadOption = False,
    name: NameOption = None,
    agent: AgentOption = None,
    error: ErrorOption = None,
    older_than: OlderOption = None,
    newer_than: NewerOption = None,
    everything: AllOption = False,
    dry_run: DryRunOption = False,
    wait: WaitOption = 60.0,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Remove finished tasks: completed, dead and cancelled ones. Cancel the others first."""
    wanted = _filter(
        status=status,
        dead=dead,
        name=name,
        agent=agent,
        error=error,
        older_than=older_than,
        newer_than=newer_than,
    )
    _operate(_request("delete", ids, wanted, everything, dry_run), state, wait, as_json)


def _request(
    action: Action, ids: list[str] | None, wanted: TaskFilter, everything: bool, dry_run: bool
) -> TaskRequest:
    """Return the request. Raises ``typer.BadParameter`` unless it says which tasks are meant."""
    chosen = everything or wanted != TaskFilter()
    if bool(ids) == chosen:
        raise typer.BadParameter("name tasks by their ids, or choose them by options (or --all)")
    return TaskRequest(
        action=action, tasks=ids or [], filter=wanted if chosen else None, dry_run=dry_run
    )


def _operate(request: TaskRequest, state: Path, wait: float, as_json: bool) -> None:
    with progress("working"):
        report = asyncio.run(_perform(request, state, wait))
    if as_json:
        show_json(report.to_dict())
    else:
        what = _DONE[request.action]
        if report.dry_run:
            print_line(f"{counted(report.matched, 'task')} would be {what}")
        else:
            print_line(f"{counted(report.changed, 'task')} {what}")
    for name, why in report.refused.items():
        print_error(f"not {_DONE[request.action]}: {name}: {why}")
    raise typer.Exit(PROBLEM if report.refused else OK)


async def _perform(request: TaskRequest, state: Path, wait: float) -> TaskReport:
    """Do it here if no process owns the directory; otherwise ask the owner."""
    async with open_inspector(state) as inspector:  # a misspelt path creates no directory
        if request.dry_run:
            return await _operator(inspector.manager).perform(request)
    try:
        async with StatePersistenceManager(state, encryption=given_keyring()) as manager:
            return await _operator(manager).perform(request)
    except StateDirectoryInUseError as in_use:
        return await _ask_owner(request, os.path.abspath(state), wait, in_use)  # noqa: PTH100, ASYNC240


async def _ask_owner(
    request: TaskRequest, state: str, wait: float, in_use: StateDirectoryInUseError
) -> TaskReport:
    """Drop the request into the owner's directory, and wait for its answer.

    Raises ``AgentStateError`` when the owner refuses, or does not answer; the request is withdrawn.
    """
    key = (f"tasks-{secrets.token_hex(8)}",)
    path = paths.locate(state, REQUESTS, key).path
    await asyncio.to_thread(_drop, state, path, orjson.dumps(request.model_dump(mode="json")))
    answer: dict[str, Any] | None = None
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while answer is None:
                    await asyncio.sleep(_POLL_SECONDS)
                    answer = await asyncio.to_thread(_answer, path)
    finally:
        await asyncio.to_thread(fileio.remove_file, path, sync=False)
    if answer is None:
        message = f"the owner of the directory has not answered within {wait:g} s: {in_use.message}"
        raise AgentStateError(f"{message}; what it has begun, it may complete", path=state)
    if "report" not in answer:
        raise AgentStateError(f"the server refused: {answer.get('error')}", path=state)
    return TaskReport(**answer["report"])


def _drop(state: str, path: str, body: bytes) -> None:
    folder = Path(path).parent
    fileio.make_directories(state, REQUESTS, sync=False)
    fileio.replace_file(path, body, sync=False)
    if os.name == "posix" and os.geteuid() == 0:
        owner = os.stat(state)  # noqa: PTH116  # root asks a server that is not root
        for mine in (folder, path):
            os.chown(mine, owner.st_uid, owner.st_gid)


def _answer(path: str) -> dict[str, Any] | None:
    found = fileio.read_file(path)
    try:
        body = orjson.loads(found[0]) if found is not None else {}
    except orjson.JSONDecodeError:
        return None
    return body if "answered_at" in body else None


def _operator(manager: StatePersistenceManager) -> TaskOperator:
    return TaskOperator(manager, manager.clock, StoredTasks(manager, manager.clock))
