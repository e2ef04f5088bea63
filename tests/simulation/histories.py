"""A history: everything that happens in one simulation, drawn from a seed, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random

from tests.simulation.programs import Op, Program, draw_program, with_child

DAY_AND_MORE = 90_000.0
"""Seconds; a key holds for a day."""
AGENTS = ("ann", "bob", "cat")
ENDS = ("latency", "leave_paused", "two_loops", "second_look", "scheduled", "limited")

COMMIT_FAULTS = (
    "full", "broken", "crash", "pause", "slow", "edit", "steal",
    "lost", "crash-after", "pause-after", "late",
)  # fmt: skip
"""Before a commit: the disk is full, the store fails as nobody foresaw, the process dies, stands
still, or waits, somebody edits a document of it, another runtime takes the agent. After it: the
reply is lost, the process dies, stands still, or gets its reply late."""


@dataclass(frozen=True, slots=True)
class Action:
    """What somebody outside a handler does at a time."""

    at: float
    kind: str
    agent: str = ""
    process: int = 0
    seconds: float = 0.0
    """How long a pause, an outage or a sleep lasts; until a restart; how old for cleaning up."""
    program: int = 0
    key: str = ""
    how: str = ""
    sender: str = ""

    def __str__(self) -> str:
        return f"{self.at:8.2f} s  {self.kind} " + _shown(self, ("at", "kind"))


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls one commit, counted from the first after the agents were created."""

    commit: int
    kind: str
    seconds: float = 0.0
    fresh: bool = False
    """Of each process that is started later, counted from its own first commit."""

    def __str__(self) -> str:
        return f"commit {self.commit}: {self.kind} " + _shown(self, ("commit", "kind"))


def _shown(value: Action | Fault, without: tuple[str, ...]) -> str:
    shown = []
    for field in fields(value):
        given = getattr(value, field.name)
        if field.name not in without and given not in (field.default, ""):
            shown.append(
                f"{field.name}={given:g}" if isinstance(given, float) else f"{field.name}={given}"
            )
    return " ".join(shown)


@dataclass(frozen=True, slots=True)
class History:
    """One simulation."""

    seed: int
    agents: tuple[str, ...]
    shared: bool
    """Several processes share the store; otherwise one at a time owns it."""
    processes: int
    programs: tuple[Program, ...]
    actions: tuple[Action, ...]
    faults: tuple[Fault, ...] = ()
    files: bool = False
    """The real shared files, instead of the store in memory."""
    latency: bool = True
    """Calls of the store take a little time, which differs."""
    leave_paused: bool = False
    """A process that stands still at the end stays so."""
    two_loops: bool = False
    """At the end the same runtimes run once more in a new event loop."""
    second_look: bool = False
    """At the end a new process restores everything, and finds nothing to repair."""
    scheduled: bool = False
    """The first agent has a schedule."""
    limited: bool = False
    """Attempts have a rate limit."""

    def lines(self) -> list[str]:
        """The history, for people."""
        kind = "shared " + ("files" if self.files else "memory") if self.shared else "one owner"
        ends = [name for name in ENDS if getattr(self, name)]
        of = f"{self.processes} processes, agents {', '.join(self.agents)}; {', '.join(ends)}"
        lines = [f"seed {self.seed}: {kind}, {of}"]
        for number, program in enumerate(self.programs):
            limits = f"timeout={program.timeout} " if program.timeout else ""
            limits += f"max_attempts={program.max_attempts} " if program.max_attempts != 12 else ""
            limits += "stubborn " if program.stubborn else ""
            limits += "replays " if program.replays else ""
            lines.append(f"  program {number}: {limits}returns {program.value}")
            lines += [f"    {place}  {op}" for place, op in enumerate(program.ops)]
        lines += [f"  {action}" for action in self.actions]
        lines += [f"  {fault}" for fault in self.faults]
        return lines


def draw_history(seed: int) -> History:
    """The history of a seed; always the same."""
    random = Random(seed)
    shared = random.random() < 0.55
    processes = random.choice((1, 2, 2, 2, 3)) if shared else 1
    agents = AGENTS[: random.choice((1, 1, 2, 2, 3))]
    count = random.choice((1, 2, 2, 3, 4))
    programs = tuple(
        draw_program(random, agents, range(number + 1, count)) for number in range(count)
    )
    draw = _Drawing(random, agents, count, processes, shared=shared)
    actions = draw.actions()
    if not shared and random.random() < 0.006:
        programs, actions = _long(agents, programs, actions)
    operated = Random(f"operations {seed}")  # so that the rest of a seed stays as it was
    if operated.random() < 0.3 and count > 1:
        number = operated.randrange(count - 1)
        parent = with_child(operated, programs[number], agents, range(number + 1, count))
        programs = (*programs[:number], parent, *programs[number + 1 :])
        submit = Action(0.0, "submit", operated.choice(agents), program=number)
        actions = [*actions, submit]
    if operated.random() < 0.3:
        draw = _Drawing(operated, agents, count, processes, shared=shared)
        actions = [*actions, *draw.operations()]
    return History(
        seed=seed,
        agents=agents,
        shared=shared,
        processes=processes,
        programs=programs,
        actions=tuple(sorted(actions, key=lambda action: action.at)),
        faults=tuple(draw.faults()),
        files=shared and random.random() < 0.05,
        leave_paused=shared and processes > 1 and random.random() < 0.3,
        two_loops=random.random() < 0.1,
        second_look=random.random() < 0.25,
        scheduled=operated.random() < 0.1,
        limited=operated.random() < 0.1,
    )


def _long(
    agents: tuple[str, ...], programs: tuple[Program, ...], actions: list[Action]
) -> tuple[tuple[Program, ...], list[Action]]:
    """A task that sends, sleeps for longer than keys are promised, and goes through it again."""
    count = len(programs)
    sends = (Op("submit", to=agents[-1], at=count + 1), Op("send", to=agents[-1]))
    sleeper = Program((*sends, Op("sleep", seconds=DAY_AND_MORE)), replays=True)
    receiver = Program((Op("change", "list"), Op("read", "archive", times=99)))
    tidy = [Action(DAY_AND_MORE - 60.0, "cleanup"), Action(DAY_AND_MORE - 30.0, "cleanup")]
    actions = [*actions, Action(0.0, "submit", agents[0], program=count), *tidy]
    return (*programs, sleeper, receiver), actions


class _Drawing:
    def __init__(
        self,
        random: Random,
        agents: tuple[str, ...],
        programs: int,
        processes: int,
        *,
        shared: bool,
    ) -> None:
        self._random = random
        self._agents = agents
        self._programs = programs
        self._processes = processes
        self._shared = shared

    def actions(self) -> list[Action]:
        random = self._random
        actions = [
            self._submit(random.choice((0.0, 0.0, 0.0, 1.0, 5.0, 20.0)))
            for _ in range(random.choice((1, 2, 2, 3, 4)))
        ]
        actions += [self._send() for _ in range(random.choice((0, 0, 1, 1, 2, 3)))]
        trouble: list[tuple[int, Callable[[], list[Action]]]] = [
            (10, lambda: self._one("crash", seconds=random.choice((0.5, 5.0, 50.0)))),
            (8, lambda: self._one("restart")),
            (6, self._cleanup),
            (6, self._cancel),
            (5, self._edit),
            (4, lambda: self._agent("stop")),
            (4, lambda: self._agent("sleep", seconds=random.choice((3.0, 40.0)))),
            (3, lambda: self._agent("wake")),
            (3, lambda: self._one("emit")),
            (4, self._same_key),
            (3, lambda: self._one("outage", seconds=random.choice((1.0, 15.0, 50.0)))),
            (3, lambda: self._one("restore")),
            (3, lambda: self._one("idle")),
            (2, lambda: self._one("deafen")),
            (2, self._stopped_by_hand),
            (4, self._tidy),
        ]
        if self._shared:
            trouble += [
                (12, lambda: self._one("pause", seconds=random.choice((5.0, 40.0, 90.0)))),
                (5, lambda: self._agent("steal", seconds=random.choice((10.0, 60.0)))),
                (3, self._lapse),
            ]
        kinds = [make for _, make in trouble]
        weights = [weight for weight, _ in trouble]
        for make in random.choices(kinds, weights, k=random.choice((0, 0, 1, 1, 2, 2, 3, 4))):
            actions += make()
        return actions

    def operations(self) -> list[Action]:
        """What people do with tasks: run them again, cancel and delete them."""
        random = self._random
        actions = []
        for _ in range(random.choice((1, 2, 3))):
            kind = random.choice(("retry", "retry", "delete", "discard", "discard"))
            number, at = random.randrange(4), self._when()
            if kind == "retry" and random.random() < 0.5:
                actions.append(Action(at, "cancel", process=self._process(), program=number))
                at = round(at + random.choice((0.0, 0.5, 5.0)), 3)
            actions.append(Action(at, kind, process=self._process(), program=number))
        return actions

    def faults(self) -> list[Fault]:
        random = self._random
        faults = []
        for _ in range(random.choice((0, 0, 1, 1, 1, 2, 2, 3, 5))):
            kind = random.choice(COMMIT_FAULTS)
            if not self._shared:
                kind = {"pause": "slow", "pause-after": "late", "steal": "edit"}.get(kind, kind)
            seconds = {
                "crash": random.choice((0.5, 5.0, 50.0)),
                "pause": random.choice((5.0, 40.0, 90.0)),
                "slow": random.choice((0.1, 1.0, 12.0)),
                "late": random.choice((0.1, 1.0, 12.0)),
                "steal": random.choice((10.0, 60.0)),
            }.get(kind.partition("-")[0], 0.0)
            fresh = random.random() < 0.2
            commit = random.randrange(6) if fresh else int(random.expovariate(1 / 15))
            faults.append(Fault(commit, kind, seconds, fresh))
        return sorted(faults, key=lambda fault: fault.commit)

    def _when(self) -> float:
        scale = self._random.choice((0.02, 0.5, 4.0, 25.0))
        return round(self._random.random() * scale, 3)

    def _process(self) -> int:
        return self._random.randrange(self._processes)

    def _submit(self, at: float) -> Action:
        random = self._random
        return Action(
            at,
            "submit",
            agent=random.choice(self._agents),
            process=self._process(),
            program=random.randrange(self._programs),
            key=random.choice(("", "", "", "k1", "k2")),
            seconds=random.choice((0.0, 0.0, 0.0, 10.0)),
        )

    def _send(self) -> Action:
        random = self._random
        return Action(
            self._when(),
            "send",
            agent=random.choice(self._agents),
            process=self._process(),
            key=random.choice(("", "", "1", "2")),
            sender=random.choice(("zoe", "yan", *self._agents)),
            how=random.choice(("normal", "normal", "high")),
        )

    def _one(self, kind: str, *, seconds: float = 0.0) -> list[Action]:
        return [Action(self._when(), kind, process=self._process(), seconds=seconds)]

    def _agent(self, kind: str, *, seconds: float = 0.0) -> list[Action]:
        agent = self._random.choice(self._agents)
        actions = [Action(self._when(), kind, agent, self._process(), seconds=seconds)]
        if kind == "stop" and self._random.random() < 0.7:
            later = actions[0].at + self._random.choice((0.1, 5.0, 70.0))
            actions.append(Action(round(later, 3), "start", agent, self._process()))
        return actions

    def _stopped_by_hand(self) -> list[Action]:
        """An agent that somebody stopped in another program's words, and a later task for it."""
        edit = self._edit()[0]
        submit = self._submit(round(edit.at + 45.0, 3))
        return [replace(edit, how="STOPPED"), replace(submit, agent=edit.agent, seconds=0.0)]

    def _lapse(self) -> list[Action]:
        """The store is away for longer than a lease, with work that is due meanwhile."""
        submit = replace(self._submit(self._when()), seconds=30.0)
        away = Action(round(submit.at + 2.0, 3), "outage", seconds=50.0)
        idle = Action(round(away.at + self._random.choice((45.0, 50.5)), 3), "idle")
        return [submit, away, idle]

    def _cleanup(self) -> list[Action]:
        """Cleaning up, often more than once: what is sent again only shows after it."""
        first = Action(self._when(), "cleanup", process=self._process())
        again = Action(
            round(first.at + self._random.choice((1.0, 8.0)), 3), "cleanup", process=self._process()
        )
        return [first, again]

    def _tidy(self) -> list[Action]:
        """Cleaning up all the time: nothing that is finished stays for an instant."""
        began = self._when()
        return [Action(round(began + 0.3 * number, 3), "cleanup") for number in range(8)]

    def _cancel(self) -> list[Action]:
        return [
            Action(
                self._when(), "cancel", process=self._process(), program=self._random.randrange(3)
            )
        ]

    def _edit(self) -> list[Action]:
        how = self._random.choice(("memory", "task", "STOPPED", "damage"))
        return [Action(self._when(), "edit", self._random.choice(self._agents), how=how)]

    def _same_key(self) -> list[Action]:
        """A key that is used again after cleaning up, by the same and by another sender."""
        random = self._random
        agent, at = random.choice(self._agents), self._when()
        kind = random.choice(("send", "submit"))
        program = random.randrange(self._programs)
        first = Action(at, kind, agent, self._process(), program=program, key="k3", sender="zoe")
        again = Action(
            round(at + 30, 3), kind, agent, self._process(), program=program, key="k3", sender="zoe"
        )
        other = Action(
            round(at + 31, 3), kind, agent, self._process(), program=program, key="k3", sender="yan"
        )
        return [first, Action(round(at + 20, 3), "cleanup"), again, other]
