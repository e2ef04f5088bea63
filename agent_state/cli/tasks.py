"""``agent-state tasks``: find tasks, submit one, run them again, cancel and delete them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import typer

from agent_state.cli import display
from agent_state.cli.agents import checked, parse_json
from agent_state.cli.glance import report_unusable
from agent_state.cli.nouns import run_inspection
from agent_state.cli.options import (
    OK,
    PROBLEM,
    STATE,
    WAIT_SECONDS,
    DryRunOption,
    JsonOption,
    PriorityOption,
    StateOption,
    WaitOption,
    parse_seconds,
)
from agent_state.cli.output import counted, print_error, print_line, progress, show_json
from agent_state.cli.owner import carry_out
from agent_state.errors import StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.models import TaskStatus
from agent_state.runtime.operations import (
    Action,
    StoredTasks,
    TaskFilter,
    TaskOperator,
    TaskReport,
    TaskRequest,
    position,
)
from agent_state.runtime.requests import SubmitRequest
from agent_state.storage import paths

_DONE = {"retry": "run again", "cancel": "cancelled", "delete": "deleted"}

tasks = typer.Typer(
    help="The tasks of all agents: find and submit them, run them again, cancel and delete them.",
    no_args_is_help=True,
)
IdsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", help="Ids of tasks, or AGENT/ID.", show_default=False),
]
AllOption = Annotated[bool, typer.Option("--all", help="All tasks that it applies to.")]


def _new_filter(
    *,
    status: Annotated[
        list[str] | None,
        typer.Option(
            "--status",
            help="Of this status: pending, in_progress, failed, completed, dead or cancelled.",
            show_default=False,
        ),
    ] = None,
    dead: Annotated[bool, typer.Option("--dead", help="As --status dead.")] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Of this name.", show_default=False)
    ] = None,
    agent: Annotated[
        str | None, typer.Option("--agent", help="Of this agent.", show_default=False)
    ] = None,
    error: Annotated[
        str | None, typer.Option("--error", help="With this text in the error.", show_default=False)
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            metavar="TIME",
            parser=parse_seconds,
            help="Submitted at least so long ago: 90s, 15m, 2h, 3d.",
            show_default=False,
        ),
    ] = None,
    newer_than: Annotated[
        float | None,
        typer.Option(
            "--newer-than",
            metavar="TIME",
            parser=parse_seconds,
            help="Submitted less than so long ago.",
            show_default=False,
        ),
    ] = None,
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


def _with_filter(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``_new_filter``, in the place of its parameter ``wanted``."""
    options = inspect.signature(_new_filter).parameters
    own = inspect.signature(command).parameters

    @wraps(command)
    def called(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in options}
        command(wanted=_new_filter(**chosen), **given)

    parameters = [each for name, each in own.items() if name != "wanted"]
    merged = [*parameters[:1], *options.values(), *parameters[1:]]
    hints = get_type_hints(_new_filter, include_extras=True)
    hints |= get_type_hints(command, include_extras=True)
    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer reads
        [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[each.name])
            for each in merged
        ]
    )
    called.__annotations__ = {each.name: hints[each.name] for each in merged}
    return called


# -- looking -----------------------------------------------------------------------------------


@tasks.command("ls")
@_with_filter
def list_tasks(
    *,
    oldest: Annotated[bool, typer.Option("--oldest", help="The oldest first.")] = False,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1)] = 100,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="ID",
            help="The next page: those behind this task.",
            show_default=False,
        ),
    ] = None,
    state: StateOption = STATE,
    as_json: JsonOption = False,
    wanted: TaskFilter,
) -> None:
    """List tasks of all agents, the newest first.

    Works while a server runs, and changes nothing.

    Example: agent-state tasks ls --dead --name index
    """

    async def work(inspector: Any) -> int:
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
        return report_unusable(inspector.unusable(), as_json=as_json)

    raise typer.Exit(run_inspection(state, work))


@tasks.command()
def show(
    ident: Annotated[str, typer.Argument(metavar="ID", help="A task's id, or AGENT/ID.")],
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """Show one task: its file, its error with the traceback, and its document.

    It may be one that cleanup has archived. Works while a server runs, and changes nothing.

    Example: agent-state tasks show 01a22f278d84-234f2a1cf9
    """

    async def work(inspector: Any) -> int:
        operator, path = _operator(inspector.manager), None
        try:
            key = await operator.locate_named(ident)
        except StateNotFoundError:
            task = await operator.get(ident)
        else:
            task, path = await operator.get(key), paths.relative("tasks", key, paths.DOCUMENT)
        if as_json:
            show_json({"path": path, "task": task.model_dump(mode="json")})
        else:
            display.show_task(task, path)
        about = [one for one in inspector.unusable() if one.path == path]
        return report_unusable(about, as_json=as_json)

    raise typer.Exit(run_inspection(state, work))


# -- changing ----------------------------------------------------------------------------------


@tasks.command()
def submit(
    *,
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="Who does it.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the task.")],
    payload: Annotated[
        str, typer.Option("--payload", metavar="JSON", help="The arguments for the handler.")
    ] = "{}",
    priority: PriorityOption = None,
    delay: Annotated[
        float,
        typer.Option(
            "--delay", metavar="TIME", parser=parse_seconds, help="Not before: 90s, 15m, 2h, 3d."
        ),
    ] = "0",  # type: ignore[assignment]  # typer parses it
    max_attempts: Annotated[
        int | None,
        typer.Option("--max-attempts", help="After so many it is dead.", min=1, show_default=False),
    ] = None,
    wait: WaitOption = WAIT_SECONDS,
    state: StateOption = STATE,
    as_json: JsonOption = False,
) -> None:
    """Queue a task for an agent.

    On a directory at rest the next start does it; a running server takes the request from a file in
    its directory, and its handler's options and payload's type hold.

    Example: agent-state tasks submit alice index --payload '{"doc": "two words"}'
    """
    request = checked(
        SubmitRequest,
        agent_id=agent,
        name=name,
        payload=parse_json("--payload", payload),
        priority=priority,
        delay_seconds=delay,
        max_attempts=max_attempts,
    )
    report = carry_out(request, state, wait, "tasks")
    if as_json:
        show_json(report)
    else:
        task = report["task"]
        print_line(f"queued: tasks/{task['agent_id']}/{task['task_id']}")


def _add_operation(action: Action, text: str) -> None:
    """Add the command of an action on tasks."""

    @tasks.command(action, help=text)
    @_with_filter
    def operate(
        *,
        ids: IdsArgument = None,
        everything: AllOption = False,
        dry_run: DryRunOption = False,
        wait: WaitOption = WAIT_SECONDS,
        state: StateOption = STATE,
        as_json: JsonOption = False,
        wanted: TaskFilter,
    ) -> None:
        _operate(_request(action, ids, wanted, everything, dry_run), state, wait, as_json)


_add_operation(
    "retry",
    """Run tasks again that are dead or failed, with all their attempts, as they are stored now.

    Cancelled ones with --status cancelled. On a directory at rest the next start does them; a
    running server takes the request from a file in its directory.

    Example: agent-state tasks retry --dead --name index --dry-run""",
)
_add_operation(
    "cancel",
    """Cancel unfinished tasks, running ones included.

    Example: agent-state tasks cancel --agent bob --older-than 2h""",
)
_add_operation(
    "delete",
    """Remove finished tasks: completed, dead and cancelled ones. Cancel the others first.

    Example: agent-state tasks delete --status completed --older-than 30d""",
)


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
    report = TaskReport(**carry_out(request, state, wait, "tasks"))
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


def _operator(manager: StatePersistenceManager) -> TaskOperator:
    return TaskOperator(manager, manager.clock, StoredTasks(manager, manager.clock))
