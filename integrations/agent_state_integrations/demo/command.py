"""``agent-state demo``: kill the team's server, start it again, and prove that nothing was lost."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

import agent_state
from agent_state.cli.options import OK, PROBLEM, JsonOption
from agent_state.errors import AgentStateError
from agent_state_integrations.demo import files, proof
from agent_state_integrations.demo.screen import Screen
from agent_state_integrations.demo.server_runs import KillTime, ServerRun, ServerRuns, kill_times
from agent_state_integrations.demo.team import READERS, Job

WORK_SECONDS = 6.0
"""The time for all files without a kill, pauses included."""
_PAUSE_SECONDS = (0.03, 1.0)


@dataclass(slots=True)
class DemoResult:
    """The runs of the server, and the claims that were checked."""

    job: Job
    seed: int
    runs: list[ServerRun] = field(default_factory=list)
    checks: list[proof.ClaimCheck] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def proved(self) -> bool:
        """Every claim holds, and there is at least one."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    @property
    def kills(self) -> int:
        """The number of kills that hit a server at work."""
        return sum(run.killed for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.proved,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "folder": str(self.job.folder),
            "state_dir": str(self.job.state),
            "report": str(self.job.report),
            "kills": self.kills,
            "lives": [asdict(run) for run in self.runs],
            "checks": [asdict(check) for check in self.checks],
        }


def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="The text files to read: by default those of the current folder, or the source "
            "of this program if that has none.",
            show_default=False,
        ),
    ] = None,
    kills: Annotated[int, typer.Option(help="How often to kill the server.", min=0, max=12)] = 4,
    seed: Annotated[
        int | None, typer.Option(help="Choose the same times of kills again.", show_default=False)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DIR",
            help="An empty or new directory for the state: by default a temporary one, "
            "which is kept.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a small team of agents get killed, and lose nothing.

    A planner, readers and a reporter analyse the text files of FOLDER in a server of their own,
    without any language model. The server is killed with SIGKILL several times and started
    again; at the end the result is compared with a run without kills. Takes less than half a
    minute.

    Example: agent-state demo --seed 7
    """
    began = time.monotonic()
    folder, names = _choose_folder(folder)
    home = _prepare_directory(state)
    pause = min(max(WORK_SECONDS * len(READERS) / len(names), _PAUSE_SECONDS[0]), _PAUSE_SECONDS[1])
    seed = Random().randrange(10_000) if seed is None else seed  # noqa: S311  # not a secret
    result = DemoResult(Job(folder, home, home / "report.md", pause), seed)
    screen = Screen(len(names), quiet=as_json)
    screen.begin(result.job, kills, seed)
    before = files.fingerprint(folder, names)
    plan = kill_times(kills, len(names), pause, Random(seed))  # noqa: S311
    try:
        _run_and_prove(result, plan, before, screen)
    except (AgentStateError, OSError, ValueError, LookupError, TypeError) as error:
        # An error that prevents the proof is a proof that failed.
        result.checks.append(proof.ClaimCheck("the team finished its work", False, str(error)))
    result.seconds = time.monotonic() - began
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        screen.prove(result.checks, missed=kills - result.kills, kills=kills)
        screen.end(result.job, proved=result.proved, seconds=result.seconds)
    raise typer.Exit(OK if result.proved else PROBLEM)


def _run_and_prove(
    result: DemoResult, plan: list[KillTime], before: dict[str, str], screen: Screen
) -> None:
    job = result.job
    with tempfile.TemporaryDirectory(prefix="agent-state-demo-") as scratch:
        log = Path(scratch, "server.log")
        calm = Job(job.folder, Path(scratch, "state"), Path(scratch, "report.md"), 0.0)
        with screen.bar() as on_event:
            runs = ServerRuns(job, log, on_event)
            damaged: list[str] = []
            for run in runs.run(plan):
                if run.killed:
                    run.in_journal, problems = proof.inspect_killed(job.state)
                    damaged += problems
                result.runs.append(run)
                screen.run(run)
            [undisturbed] = ServerRuns(calm, log, on_event).run([])
        screen.compare(undisturbed)
        seen = proof.gather(job.state, job.report)
        other = proof.gather(calm.state, calm.report)
        result.checks.extend(proof.prove(job.folder, before, seen, other, runs.stored))
    result.checks.append(proof.check_undamaged(damaged, result.kills))
    result.checks.append(proof.check_verified(job.state))


def _choose_folder(folder: Path | None) -> tuple[Path, list[str]]:
    """The folder and its files. Without one: the current folder, or the program's source."""
    if folder is not None and not folder.is_dir():
        raise AgentStateError("there is no such folder", path=folder)
    own = Path(agent_state.__file__).parent
    checkout = own.parent if (own.parent / "pyproject.toml").is_file() else own
    for candidate in [Path.cwd(), checkout] if folder is None else [folder]:
        chosen = candidate.resolve()
        names = files.text_files(chosen, chosen / ".agent-state-nothing")
        if names:
            return chosen, names
    raise AgentStateError("there are no text files to read", path=folder)


def _prepare_directory(state: Path | None) -> Path:
    if state is None:
        return Path(tempfile.mkdtemp(prefix="agent-state-demo-")).resolve()
    if state.exists() and (not state.is_dir() or any(state.iterdir())):
        raise AgentStateError("the demo needs a new or empty directory", path=state)
    state.mkdir(parents=True, exist_ok=True)
    return state.resolve()
