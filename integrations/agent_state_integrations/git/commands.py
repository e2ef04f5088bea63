"""``agent-state git``: state in git."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agent_state.cli.options import (
    OK,
    PROBLEM,
    WAIT_SECONDS,
    JsonOption,
    StateOption,
    WaitOption,
)
from agent_state.cli.output import counted, print_error, print_line, progress, show_json
from agent_state.errors import AgentStateError
from agent_state_integrations.git import (
    configuration,
    forks,
    history,
    merger,
    restoration,
    snapshots,
)
from agent_state_integrations.git.merger import MergeReport
from agent_state_integrations.git.repository import GitError, GitRepository

git = typer.Typer(
    help="State in git: merges by the rules of documents, history in words, snapshots.",
    no_args_is_help=True,
)
_STATE = Path("state")
PreferOption = Annotated[
    str | None,
    typer.Option(
        help="What becomes of a task that one side completed and the other cancelled; as `init` "
        "was told, else completed.",
        metavar="completed|cancelled",
    ),
]


def _checked(prefer: str | None, repository: GitRepository) -> str:
    if prefer is None:
        return configuration.preference(repository)
    if prefer not in ("completed", "cancelled"):
        raise typer.BadParameter(f"{prefer!r} is neither completed nor cancelled")
    return prefer


# -- setting up ------------------------------------------------------------------------------------


@git.command()
def init(
    state: StateOption = _STATE,
    prefer: PreferOption = None,
    hooks: Annotated[
        bool, typer.Option("--hooks", help="Also write a pre-commit hook: no torn groups.")
    ] = False,
) -> None:
    """Tell git how documents and logs are merged and shown.

    The driver is configured before the attributes name it: an attribute without its driver is
    fatal for every merge, or merges text without a word.

    Example: agent-state git init --hooks
    """
    repository = GitRepository(state)
    choice = _checked(prefer, repository)
    for line in configuration.configure(repository, prefer=choice, hooks=hooks):
        print_line(line)


@git.command()
def deinit(state: StateOption = _STATE) -> None:
    """Undo `init`, the attributes first.

    Example: agent-state git deinit
    """
    for line in configuration.unconfigure(GitRepository(state)):
        print_line(line)


@git.command()
def doctor(state: StateOption = _STATE, as_json: JsonOption = False) -> None:
    """Look for half a configuration, for unmerged state, and for what git should not have.

    Exit 1 if something was found.

    Example: agent-state git doctor --json
    """
    with progress("checking"):
        problems = configuration.check(GitRepository(state))
    if as_json:
        show_json({"ok": not problems, "problems": problems})
    else:
        for line in problems or ["nothing is wrong"]:
            print_line(line)
    raise typer.Exit(PROBLEM if problems else OK)


@git.command(hidden=True)
def hook(
    name: Annotated[str, typer.Argument(help="pre-commit")],
    state: StateOption = _STATE,
) -> None:
    """What a hook of git calls: it stages one state, and refuses unresolved conflicts.

    Example: agent-state git hook pre-commit
    """
    if name != "pre-commit":
        raise typer.BadParameter(f"{name!r} is no hook of ours")
    repository = GitRepository(state)
    for path in repository.unmerged():
        note = repository.note(path)
        said = f": {note.read_text().strip()}" if note.exists() else ""
        raise GitError(f"{path} was left in conflict{said}; look at it, and `git add` it")
    snapshots.stage(repository, os.environ.get("GIT_INDEX_FILE"))


# -- history ---------------------------------------------------------------------------------------


@git.command()
def diff(
    old: Annotated[str, typer.Argument(metavar="[REV]", help="The older revision.")] = "HEAD",
    new: Annotated[
        str | None, typer.Argument(metavar="[REV]", help="The newer one; else the files now.")
    ] = None,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Tell in words what changed: who did what, fell asleep, got mail.

    Example: agent-state git diff HEAD~3
    """
    repository = GitRepository(state)
    with progress("comparing"):
        older = repository.commit(old)
        newer = repository.commit(new) if new is not None else None
        words = history.in_words(history.changes_between(repository, older, newer))
    if as_json:
        show_json(words)
    else:
        for name, said in words.items():
            print_line(f"{name}: {said}")


@git.command()
def log(
    agent: Annotated[str, typer.Argument(help="The agent's id.")],
    state: StateOption = _STATE,
    limit: Annotated[int, typer.Option("--limit", help="So many commits at most.", min=1)] = 100,
    as_json: JsonOption = False,
) -> None:
    """Tell an agent's story, newest first, from the commits in which something happened to it.

    Example: agent-state git log alice --limit 10
    """
    with progress("reading"):
        stories = history.story(GitRepository(state), agent, most=limit)
    if as_json:
        show_json([story._asdict() for story in stories])
    else:
        for story in stories:
            print_line(f"{story.commit[:10]} {story.when} {story.author}: {story.words}")


@git.command()
def blame(
    agent: Annotated[str, typer.Argument(help="The agent's id.")],
    field: Annotated[str, typer.Argument(help="Such as context.working_memory.words.")],
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Show the values that a field has had, newest first, with the commits that gave them.

    Example: agent-state git blame alice context.working_memory.words
    """
    with progress("reading"):
        values = history.blame(GitRepository(state), agent, field)
    if as_json:
        show_json([value._asdict() for value in values])
    else:
        for value in values:
            print_line(f"{value.commit[:10]} {value.when} {value.author}: {value.value}")


# -- snapshots -------------------------------------------------------------------------------------


@git.command()
def snapshot(  # noqa: PLR0917  # typer gives them by name
    message: Annotated[str, typer.Option("-m", "--message", help="The message.")] = "state",
    ref: Annotated[
        str | None,
        typer.Option(
            "--ref", help=f"Commit to this ref; `own` is {snapshots.SNAPSHOTS}.", metavar="REF"
        ),
    ] = None,
    every: Annotated[
        float | None, typer.Option(help="Seconds between two snapshots; until stopped.", min=1)
    ] = None,
    keep: Annotated[int | None, typer.Option(help="So many stay on the ref.", min=1)] = None,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Commit one state of a running directory: no group is torn.

    The server is held while git reads, for two seconds at most. Without --ref the checked-out
    branch gets the commit; with it the user's branch and index are not touched. With --every, a
    snapshot that could not be made is told on stderr, and SIGTERM or Ctrl-C ends it.

    Example: agent-state git snapshot --ref own --every 60 --keep 100
    """
    repository = GitRepository(state)
    if every is not None and ref is None:
        ref = "own"
    target = snapshots.SNAPSHOTS if ref == "own" else ref

    def commit() -> None:
        with progress("committing"):
            report = snapshots.snapshot(repository, message, ref=target, keep=keep)
        if as_json:
            show_json({"commit": report.commit, "held_seconds": report.held_seconds})
        else:
            held = f"writers were held for {report.held_seconds * 1000:.0f} ms"
            print_line(f"{report.commit or 'nothing has changed'}; {held}")
        sys.stdout.flush()

    if every is None:
        commit()
    else:
        _repeat(commit, every)


def _repeat(commit: Callable[[], None], seconds: float) -> None:
    """Commit until SIGTERM or Ctrl-C, which end it between two snapshots, with exit code 0."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.is_set():
        try:
            commit()
        except AgentStateError as error:  # a merge is open, or a writer is slow: the next one
            if not stopped.is_set():
                print_error(f"no snapshot: {error}")
        stopped.wait(min(seconds, threading.TIMEOUT_MAX))


@git.command()
def restore(
    revision: Annotated[str, typer.Argument(metavar="REV")],
    agent: Annotated[str | None, typer.Argument(metavar="[AGENT]", help="Else all.")] = None,
    wait: WaitOption = WAIT_SECONDS,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Bring documents back as REV has them, each agent as one commit; all validated first.

    A running server does it, stops the agent's work and loads the agent anew. Tasks and mail made
    since stay, and logs stay as they are.

    Example: agent-state git restore HEAD~1 alice
    """
    with progress("restoring"):
        report = restoration.restore(GitRepository(state), revision, agent, wait=wait)
    if as_json:
        show_json(asdict(report))
        return
    print_line(f"{counted(len(report.restored), 'document')} restored from {revision}")
    if report.unchanged:
        print_line(f"{counted(len(report.unchanged), 'document')} as {revision} has them")
    for path in report.removed:
        print_line(f"{path} was removed")
    for path in report.stayed:
        print_line(f"{path} was made since, and stays")


# -- merging ---------------------------------------------------------------------------------------


@git.command()
def merge(
    revision: Annotated[str, typer.Argument(metavar="REV")],
    message: Annotated[str | None, typer.Option("-m", "--message", help="The message.")] = None,
    prefer: PreferOption = None,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Merge REV into the checked-out branch, in one process; needs git 2.38.

    Exit 1 if conflicts are left: valid JSON with our values, unmerged in git, listed here.

    Example: agent-state git merge other
    """
    repository = GitRepository(state)
    choice = _checked(prefer, repository)
    with progress("merging"):
        report = merger.merge_revision(repository, revision, prefer=choice, message=message)
    _show(report, as_json)


@git.command()
def resolve(
    only: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH]...", help="In the state directory.")
    ] = None,
    take: Annotated[
        str | None, typer.Option(help="For what no rule settles.", metavar="ours|theirs")
    ] = None,
    prefer: PreferOption = None,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Settle what a merge left unmerged, by the rules: also what git never gives to a driver.

    That is a deleted and changed document, an octopus, `-s resolve`, a repository without `init`.

    Example: agent-state git resolve --take ours
    """
    if take not in (None, "ours", "theirs"):
        raise typer.BadParameter(f"{take!r} is neither ours nor theirs")
    repository = GitRepository(state)
    choice = _checked(prefer, repository)
    with progress("merging"):
        report = merger.resolve_unmerged(repository, only, take=take, prefer=choice)
    _show(report, as_json)


def _show(report: MergeReport, as_json: bool) -> None:
    if as_json:
        fields = ("merged", "told", "conflicts", "commit")
        show_json({name: getattr(report, name) for name in fields})
    else:
        for line in report.told:
            print_line(line)
        for line in report.conflicts:
            print_error(f"CONFLICT {line}")
        print_line(f"{counted(len(report.merged), 'document')} merged, changed on both sides")
    raise typer.Exit(PROBLEM if report.conflicts else OK)


@git.command()
def fork(
    name: Annotated[str, typer.Argument(help="The branch, and the end of the new ids.")],
    agent: Annotated[
        list[str] | None, typer.Option("--agent", help="An agent's id; all without it.")
    ] = None,
    state: StateOption = _STATE,
    as_json: JsonOption = False,
) -> None:
    """Make a branch with agents under new ids, so that two copies of one agent never run.

    Example: agent-state git fork trial --agent alice
    """
    with progress("committing"):
        renamed = forks.fork(GitRepository(state), name, agent)
    if as_json:
        show_json(renamed)
    else:
        for old, new in renamed.items():
            print_line(f"{old} is {new} on {name}")
