"""``agent-state demo``: kill the team, start it again, and prove that nothing was lost."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import agent_state
from agent_state.errors import AgentStateError
from agent_state_integrations.demo import files, proof
from agent_state_integrations.demo.lives import Life, Lives, Moment, moments
from agent_state_integrations.demo.screen import Screen
from agent_state_integrations.demo.team import READERS, Job

_WORK_SECONDS = 6.0
"""How long the reading takes altogether, pauses included, if nobody is killed."""
_PAUSE = (0.03, 1.0)


@dataclass(slots=True)
class Outcome:
    """What happened, and what was proved."""

    job: Job
    seed: int
    kills: int
    lives: list[Life] = field(default_factory=list)
    checks: list[proof.Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        return bool(self.checks) and all(check.holds for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.sound,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "folder": str(self.job.folder),
            "state_dir": str(self.job.state),
            "report": str(self.job.report),
            "kills": sum(life.killed for life in self.lives),
            "lives": [asdict(life) for life in self.lives],
            "checks": [asdict(check) for check in self.checks],
        }


def run(
    folder: Path | None, *, kills: int, seed: int | None, state: Path | None, as_json: bool
) -> bool:
    """Show the demo; whether everything it claims was proved.

    Raises ``AgentStateError`` when there is nothing to read, or nowhere to write.
    """
    began = time.monotonic()
    folder, names = _choose(folder)
    home = _home(state)
    pause = min(max(_WORK_SECONDS * len(READERS) / len(names), _PAUSE[0]), _PAUSE[1])
    seed = Random().randrange(10_000) if seed is None else seed  # noqa: S311  # nothing secret
    outcome = Outcome(Job(folder, home, home / "report.md", pause), seed, kills)
    screen = Screen(len(names), quiet=as_json)
    screen.begin(outcome.job, kills, seed)
    before = files.fingerprint(folder, names)
    plan = moments(kills, len(names), pause, Random(seed))  # noqa: S311
    try:
        _live_and_prove(outcome, plan, before, screen)
    except (AgentStateError, OSError, ValueError, LookupError, TypeError) as error:
        # Whatever keeps the proof from being made is a proof that failed.
        outcome.checks.append(proof.Check("the team finished its work", False, str(error)))
    outcome.seconds = time.monotonic() - began
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=2))
    else:
        screen.prove(outcome.checks, outcome.lives, kills)
        screen.end(outcome.job, sound=outcome.sound, seconds=outcome.seconds)
    return outcome.sound


def _live_and_prove(
    outcome: Outcome, plan: list[Moment], before: dict[str, str], screen: Screen
) -> None:
    job = outcome.job
    with tempfile.TemporaryDirectory(prefix="agent-state-demo-") as aside:
        log = Path(aside, "server.log")
        calm = Job(job.folder, Path(aside, "state"), Path(aside, "report.md"), 0.0)
        with screen.bar() as tell:
            lives = Lives(job, log, tell)
            damaged: list[str] = []
            for life in lives.run(plan):
                if life.killed:
                    life.in_journal, problems = proof.left_behind(job.state)
                    damaged += problems
                outcome.lives.append(life)
                screen.life(life)
            [undisturbed] = Lives(calm, log, tell).run([])
        screen.compare(undisturbed)
        seen = proof.gather(job.state, job.report)
        other = proof.gather(calm.state, calm.report)
        outcome.checks.extend(proof.prove(job.folder, before, seen, other, lives.stored))
    landed = sum(life.killed for life in outcome.lives)
    outcome.checks.append(proof.dead_wood(damaged, landed))
    outcome.checks.append(proof.whole(job.state))


def _choose(folder: Path | None) -> tuple[Path, list[str]]:
    """The folder and its files. Without one: the current folder, or this program's own."""
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


def _home(state: Path | None) -> Path:
    if state is None:
        return Path(tempfile.mkdtemp(prefix="agent-state-demo-")).resolve()
    if state.exists() and (not state.is_dir() or any(state.iterdir())):
        raise AgentStateError("the demo needs a new or empty directory", path=state)
    state.mkdir(parents=True, exist_ok=True)
    return state.resolve()
