"""The output of the demo for a person."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from agent_state_integrations.demo.proof import ClaimCheck
from agent_state_integrations.demo.server_runs import AcknowledgedIds, ServerRun
from agent_state_integrations.demo.team import READERS, Job

OnEvent = Callable[[ServerRun, AcknowledgedIds], None]


class Screen:
    """Prints the progress and the result of a demo. ``quiet``: nothing on stdout."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total = total
        self._out = Console(highlight=False, quiet=quiet)

    def begin(self, job: Job, kills: int, seed: int) -> None:
        self._print_line(
            f"A planner, {len(READERS)} readers and a reporter read {self._total} files "
            f"of {job.folder}."
        )
        times = _count(kills, "time")
        self._print_line(
            f"Their server will be killed {times} (SIGKILL, seed {seed}). Each file takes "
            f"{job.pause:.2f} s at least: a pause, so that there is something to interrupt."
        )
        self._print_line(f"State, as plain JSON: {job.state}")
        self._print_line()

    @contextmanager
    def bar(self) -> Iterator[OnEvent]:
        """A progress bar while the servers work; nothing without a terminal."""
        # The console that draws the bar must print the lines above it, too.
        shared = self._out.is_terminal and not self._out.quiet
        console = self._out if shared else Console(stderr=True)
        if not console.is_terminal:
            yield lambda _run, _stored: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed} read"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task("", total=self._total)

            def on_event(run: ServerRun, stored: AcknowledgedIds) -> None:
                bars.update(bar, description=f"server {run.number}", completed=len(stored.read))

            yield on_event

    def run(self, run: ServerRun) -> None:
        """Print the run of a server after its end."""
        restored = run.restored
        if restored is None:
            self._print_line(
                f"server {run.number}  killed after {run.seconds:.2f} s, "
                "before it had restored anything",
                "yellow",
            )
            return
        if run.number > 1 or restored["agents"]:
            self._print_line(f"server {run.number}  {_restored(restored)}", "cyan")
        else:
            self._print_line(f"server {run.number}  starts with nothing", "cyan")
        done = f"{run.tasks} of {self._total} tasks queued, {run.read} files read"
        if run.killed:
            journal = f"; {run.in_journal} changes were in the journal"
            self._print_line(
                f"          killed after {run.seconds:.2f} s: {done}{journal}", "yellow"
            )
        else:
            self._print_line(
                f"          done after {run.seconds:.2f} s: {done}, the report written"
            )

    def compare(self, run: ServerRun) -> None:
        self._print_line()
        self._print_line(
            f"The same once more without a kill and without pauses: {run.seconds:.2f} s."
        )

    def prove(self, checks: Sequence[ClaimCheck], *, missed: int, kills: int) -> None:
        if missed:
            landed = kills - missed
            self._print_line(
                f"Only {landed} of {kills} kills came in time; the rest found the work done."
            )
        width = max(len(check.claim) for check in checks)
        self._print_line()
        for check in checks:
            mark = Text("yes " if check.holds else "NO  ", "green" if check.holds else "bold red")
            self._print(mark.append(f"{check.claim:<{width}}  {check.detail}", "default not bold"))
        self._print_line()

    def end(self, job: Job, *, proved: bool, seconds: float) -> None:
        if proved:
            self._print_line(f"{seconds:.1f} s, and nothing was lost.", "bold green")
        else:
            self._print_line(
                f"{seconds:.1f} s, and something was not proved: NO above.", "bold red"
            )
        program = _program()
        looks = {
            f"cat {job.report.name}": "what the team has made",
            f"cat agents/{READERS[0]}.json": "an agent, with its memory",
            f"ls tasks/{READERS[0]} mail/reporter": "a file for each task and message",
            f"{program} ls --state .": "all agents",
            f"{program} show reporter --state .": "one, with all that is its own",
            f"{program} verify --state .": "whether everything is intact",
        }
        width = max(map(len, looks))
        self._print_line("Look at it:")
        self._print_line(f"  cd {shlex.quote(str(job.state))}")
        for command, what in looks.items():
            self._print_line(f"  {command:<{width}}  # {what}")

    def _print_line(self, line: str = "", style: str = "") -> None:
        self._print(Text(line, style))

    def _print(self, text: Text) -> None:
        self._out.print(text, soft_wrap=True)
        sys.stdout.flush()  # the reader of a pipe sees each kill as it happens, too


def _program() -> str:
    """A command that calls this program from any folder."""
    called = Path(sys.argv[0])
    if called.stem != "agent-state":
        return f"{shlex.quote(sys.executable)} -m agent_state"
    return called.stem if shutil.which(called.stem) else shlex.quote(str(called.absolute()))


def _restored(report: dict[str, Any]) -> str:
    """The restore report of a start, in one line."""
    running = report["requeued"]
    said = [_count(len(report["agents"]), "agent"), f"{report['tasks_pending']} tasks to do"]
    if running:
        said.append(f"{len(running)} of them had begun and begin again")
    said.append(f"{_count(sum(report['unread_mail'].values()), 'message')} unread")
    if report["asleep"]:
        said.append(f"{' and '.join(report['asleep'])} asleep")
    if report["woken"]:
        said.append(f"{' and '.join(one['agent_id'] for one in report['woken'])} woken")
    unknown = sum(len(task["unknown_steps"]) for task in running)
    if unknown:
        said.append(f"{_count(unknown, 'step')} of unknown outcome")
    return f"restored in {report['seconds'] * 1000:.0f} ms: {', '.join(said)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
