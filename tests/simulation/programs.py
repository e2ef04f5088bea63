"""Random programs for handlers, and the handler that carries one out.

Everything that a program changes leaves a token, ``<task id>/<place in the program>``: in the
agent's memory, data, configuration or conversation, or in what it sends. So a look at the store
shows what was done, what was undone, and what was done twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from agent_state import Task, TaskContext, TaskFailedError, TaskTimeoutError

if TYPE_CHECKING:
    from tests.simulation.store import Process, World

CHANGES = ("count", "list", "deep", "data", "conf", "conflist", "turn")
"""Where a change leaves its token; ``count`` only adds one."""
REMOVABLE = ("list", "deep", "data")
SUBMITS = ("submit", "child")
LEAVING_OUT = ("checkpoint", "sleep", "step", "gather", "read", "child")
"""Operations after which a later attempt may leave out what came before."""
VALUES = ("int", "dict", "list", "none", "tuple", "named", "point", "model")
UNTYPED = ("int", "dict", "list", "none", "tuple", "named")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a program; which fields count depends on its ``kind``."""

    kind: str
    how: str = ""
    """Where a change goes, what is done with mail, how a failure fails, what wakes a sleeper."""
    body: tuple[Op, ...] = ()
    """Of a step, what it does; of ``gather``, what overlaps."""
    times: int = 0
    """How often it fails or hangs before it goes well; how many messages it reads."""
    seconds: float = 0.0
    to: str = ""
    """The agent that mail or a task is for."""
    value: str = "int"
    """What a step returns."""
    typed: bool = False
    """Whether the step's function is annotated."""
    plain: bool = False
    """Whether the step is a plain function."""
    once: bool = False
    """Whether it is a step_at_most_once."""
    at: int = 0
    """Of ``remove``, the operation whose token goes; of ``submit`` and ``child``, the program."""
    limit: float | None = None
    """How long it waits for a child."""

    def __str__(self) -> str:
        shown = []
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "body":
                shown.append("[" + "; ".join(map(str, value)) + "]")
            elif value is True:
                shown.append(field.name)
            else:
                shown.append(value if field.name == "how" else f"{field.name}={value}")
        return " ".join([self.kind, *map(str, shown)])


@dataclass(frozen=True, slots=True)
class Program:
    """What the handler does for one task."""

    ops: tuple[Op, ...] = ()
    value: str = "int"
    """What the task returns."""
    timeout: float | None = None
    max_attempts: int = 12
    stubborn: bool = False
    """It ignores being cancelled while it waits."""
    replays: bool = False
    """A later attempt goes through what it did before its last commit point again: its steps are
    remembered, and what it sends was sent."""

    @property
    def keyed(self) -> bool:
        """Whether it gives keys to what it sends: an attempt may leave out what came before."""
        return any(op.kind in LEAVING_OUT for op in self.ops)

    def effects(self) -> Iterator[tuple[int, str, str, str | None]]:
        """Place, token's end, kind of change, and the step it is in, of every change."""
        for pc, op in enumerate(self.ops):
            for place, inner, step in _walk(str(pc), op, None):
                if inner.kind == "change":
                    yield pc, place, inner.how, step
                elif inner.kind == "remove":
                    yield pc, str(inner.at), "remove", step

    def sends(self) -> Iterator[tuple[int, str, Op, str | None]]:
        """Place, token's end, operation and step of everything that it sends."""
        for pc, op in enumerate(self.ops):
            for place, inner, step in _walk(str(pc), op, None):
                if inner.kind in ("send", *SUBMITS):
                    yield pc, place, inner, step


def _walk(place: str, op: Op, step: str | None) -> Iterator[tuple[str, Op, str | None]]:
    yield place, op, step
    inside = f"s{place}" if op.kind == "step" else step
    for index, inner in enumerate(op.body):
        yield from _walk(f"{place}.{index}", inner, inside)


# -- values of every kind --------------------------------------------------------------------


class Point(NamedTuple):
    x: int
    y: int


@dataclass(frozen=True)
class Place:
    name: str
    number: int


class Answer(BaseModel):
    text: str
    score: float


_VALUES: dict[str, Callable[[], Any]] = {
    "int": lambda: 7,
    "dict": lambda: {"a": [1, {"b": None}]},
    "list": lambda: [1, "two"],
    "none": lambda: None,
    "tuple": lambda: (1, "two"),
    "named": lambda: Point(1, 2),
    "point": lambda: Place("here", 3),
    "model": lambda: Answer(text="yes", score=0.5),
}
_TYPES: dict[str, Any] = {
    "int": int,
    "dict": dict[str, Any],
    "list": list[Any],
    "none": None,
    "tuple": tuple[int, str],
    "named": Point,
    "point": Place,
    "model": Answer,
}


# -- the handler that carries a program out --------------------------------------------------


class HandlerFailedError(Exception):
    """The program was to fail here."""


class HandlerBrokeError(BaseException):
    """The program was to fail here, with an error that ``except Exception`` does not see."""


_FAILURES: dict[str, Callable[[], BaseException]] = {
    "error": lambda: HandlerFailedError("as planned"),
    "base": lambda: HandlerBrokeError("as planned"),
    "exit": lambda: SystemExit(1),
    "cancel": asyncio.CancelledError,
    "timeout": lambda: TimeoutError("as planned"),
}


class Interpreter:
    """The handler of one runtime."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    async def handle(self, ctx: TaskContext, task: Task) -> object:
        number = task.payload["p"]
        if number < 0:
            return None  # it only shows that tasks are done
        program = self._world.history.programs[number]
        await _Attempt(self._world, self._process, ctx, task, program).run()
        return _VALUES[program.value]()


class _Attempt:
    def __init__(
        self, world: World, process: Process, ctx: TaskContext, task: Task, program: Program
    ) -> None:
        self._world = world
        self._process = process
        self._ctx = ctx
        self._id = task.task_id
        self._program = program
        self._pc = 0

    async def run(self) -> None:
        ctx = self._ctx
        slept = ctx.memory.get("pc", {}).get(self._id, 0)
        start = max(ctx.progress.get("pc", 0), slept)
        if self._program.replays:
            for pc, op in enumerate(self._program.ops[:start]):
                if op.kind in ("step", "send", "submit"):
                    await self._do(str(pc), op)
        for pc in range(start, len(self._program.ops)):
            self._pc = pc
            await self._do(str(pc), self._program.ops[pc])

    async def _do(self, place: str, op: Op) -> None:
        await getattr(self, f"_{op.kind}")(place, op)

    def _token(self, place: str) -> str:
        return f"{self._id}/{place}"

    # -- changes

    async def _change(self, place: str, op: Op) -> None:
        self._apply(place, op)

    async def _remove(self, place: str, op: Op) -> None:
        self._apply(place, op)

    def _apply(self, place: str, op: Op) -> None:
        ctx, token = self._ctx, self._token(place)
        if op.kind == "remove":
            gone = self._token(str(op.at))
            if gone in ctx.memory.get("list", ()):
                ctx.memory["list"].remove(gone)
            ctx.memory.get("deep", {}).get("er", {}).pop(gone, None)
            ctx.data.pop(gone, None)
        elif op.how == "count":
            ctx.memory["count"] = ctx.memory.get("count", 0) + 1
        elif op.how == "list":
            ctx.memory.setdefault("list", []).append(token)
        elif op.how == "deep":
            deeper = ctx.memory.setdefault("deep", {}).setdefault("er", {})
            deeper[token] = deeper.get(token, 0) + 1
        elif op.how == "data":
            ctx.data[token] = ctx.data.get(token, 0) + 1
        elif op.how == "conf":
            ctx.configuration[token] = ctx.configuration.get(token, 0) + 1
        elif op.how == "conflist":
            ctx.configuration.setdefault("tokens", []).append(token)
        else:
            ctx.add_turn("user", token)

    # -- steps

    async def _step(self, place: str, op: Op) -> None:
        name = f"s{place}"
        call = self._ctx.step_at_most_once if op.once else self._ctx.step
        returned = await call(name, self._body(place, name, op))
        self._world.laws.returned(self._id, name, returned)

    def _body(self, place: str, name: str, op: Op) -> Callable[[], Any]:
        function: Callable[[], Any]
        laws, agent = self._world.laws, self._ctx.agent_id

        def plain() -> Any:
            laws.step_runs(self._process, agent, self._id, name, op.once)
            try:
                for index, inner in enumerate(op.body):
                    if inner.kind in ("change", "remove"):
                        self._apply(f"{place}.{index}", inner)
                    elif inner.kind == "fail":
                        self._maybe_fail(f"{place}.{index}", inner)
            except Exception:
                laws.step_failed(self._id, name)
                raise
            return _VALUES[op.value]()

        async def coroutine() -> Any:
            laws.step_runs(self._process, agent, self._id, name, op.once)
            try:
                for index, inner in enumerate(op.body):
                    await self._do(f"{place}.{index}", inner)
            except Exception:
                laws.step_failed(self._id, name)
                raise
            return _VALUES[op.value]()

        function = plain if op.plain else coroutine
        function.__annotations__ = {"return": _TYPES[op.value]} if op.typed else {}
        return function

    async def _gather(self, place: str, op: Op) -> None:
        branches = [self._do(f"{place}.{index}", inner) for index, inner in enumerate(op.body)]
        await asyncio.gather(*branches)

    async def _checkpoint(self, place: str, op: Op) -> None:
        await self._ctx.checkpoint({"pc": self._pc + 1, "at": self._token(place)})

    # -- mail and tasks

    async def _send(self, place: str, op: Op) -> None:
        await self._ctx.send_mail(
            op.to,
            subject=self._token(place),
            body=[self._id],
            priority="high" if op.how == "high" else "normal",
            dedupe_key=place if self._program.keyed else None,
        )

    async def _submit(self, place: str, op: Op) -> Task:
        program = self._world.history.programs[op.at]
        return await self._ctx.submit(
            op.to,
            "sent",
            {"p": op.at, "token": self._token(place)},
            delay_seconds=op.seconds,
            max_attempts=program.max_attempts,
            timeout_seconds=program.timeout,
            dedupe_key=self._token(place) if self._program.keyed else None,
        )

    async def _child(self, place: str, op: Op) -> None:
        """Submit a task, and go on with its result, or with the news that it has none."""
        laws, ctx = self._world.laws, self._ctx
        limit = 0.0 if op.limit is None else op.limit
        until = laws.since(self._id, place) + limit
        child = await self._submit(place, op)
        key = (child.agent_id, child.task_id)
        ctx.memory.setdefault("pc", {})[self._id] = self._pc
        try:
            value = await ctx.result(key, timeout_seconds=op.limit)
            laws.returned(child.task_id, "result", value)
            how = "completed"
        except TaskFailedError as error:
            how = error.status
        except TaskTimeoutError:
            how = "late"
        early = op.limit is None or self._process.clock.monotonic() < until - 1e-3
        laws.waited(self._id, f"wait {place} of attempt {ctx.attempt}", key, how, early)

    async def _read(self, place: str, op: Op) -> None:
        ctx = self._ctx
        for message in (await ctx.inbox())[: op.times]:
            how = op.how
            if how == "mixed":
                how = ("read", "reply", "archive")[len(ctx.memory.get("mail", ())) % 3]
            if how == "reply" and message.from_agent not in self._world.history.agents:
                how = "read"
            if how == "read":
                await ctx.read_mail(message.message_id)
            elif how == "archive":
                await ctx.archive_mail(message.message_id)
            else:
                await ctx.reply(message, self._token(f"{place}/{message.message_id}"))
            ctx.memory.setdefault("mail", []).append([message.message_id, how])

    # -- time and failures

    async def _sleep(self, place: str, op: Op) -> None:
        self._ctx.memory.setdefault("pc", {})[self._id] = self._pc + 1
        await self._ctx.sleep(
            seconds=op.seconds or None,
            wake_on=(op.how,) if op.how else (),  # type: ignore[arg-type]  # one of WakeEvent
        )

    async def _wait(self, place: str, op: Op) -> None:
        try:
            await self._process.clock.sleep(op.seconds)
        except asyncio.CancelledError:
            if not self._program.stubborn:
                raise

    async def _hang(self, place: str, op: Op) -> None:
        if self._world.laws.reached(self._token(place)) <= op.times:
            await self._wait(place, Op("wait", seconds=1000.0))

    async def _fail(self, place: str, op: Op) -> None:
        self._maybe_fail(place, op)

    def _maybe_fail(self, place: str, op: Op) -> None:
        if self._world.laws.reached(self._token(place)) <= op.times:
            failure = _FAILURES[op.how]()
            raise failure


# -- drawing programs ------------------------------------------------------------------------


def draw_program(random: Random, agents: tuple[str, ...], later: range) -> Program:
    """A random program; ``later``: the programs that it may submit."""
    draw = _Drawing(random, agents, later)
    ops = [draw.op() for _ in range(random.choice((1, 2, 3, 3, 4, 5, 6)))]
    for index, op in enumerate(ops):
        old = [at for at in range(index) if ops[at].how in REMOVABLE]
        if op.kind == "remove":
            ops[index] = Op("remove", at=random.choice(old)) if old else Op("change", "count")
        elif op.kind == "step" and old and random.random() < 0.2:
            ops[index] = replace(op, body=(*op.body, Op("remove", at=random.choice(old))))
    hangs = any(op.kind == "hang" for op in ops)
    return Program(
        ops=tuple(ops),
        value=random.choice(VALUES[:6] if random.random() < 0.9 else VALUES),
        timeout=5.0 if hangs or random.random() < 0.1 else None,
        max_attempts=random.choice((12, 12, 12, 3, 2)),
        stubborn=hangs and random.random() < 0.4,
        replays=random.random() < 0.4,
    )


def with_child(random: Random, program: Program, agents: tuple[str, ...], later: range) -> Program:
    """The program, which then waits for another task, or for two."""
    ops = list(program.ops)
    for _ in range(random.choice((1, 1, 2))):
        ops += [
            Op(
                "child",
                to=random.choice(agents),
                at=random.choice(later),
                seconds=random.choice((0.0, 0.0, 3.0, 20.0)),
                limit=random.choice((None, None, 2.0, 30.0)),
            ),
            Op("change", random.choice(CHANGES)),
        ]
    return replace(program, ops=tuple(ops))


def _without_exit(op: Op) -> Op:
    """The same without ``SystemExit``, which asyncio lets end the process from a task."""
    body = tuple(map(_without_exit, op.body))
    return replace(op, body=body, how="base" if op.how == "exit" else op.how)


class _Drawing:
    def __init__(self, random: Random, agents: tuple[str, ...], later: range) -> None:
        self._random = random
        self._agents = agents
        self._later = later

    def op(self) -> Op:
        kind = self._random.choices(
            ("change", "step", "fail", "checkpoint", "read", "send", "wait", "gather", "sleep",
             "submit", "remove", "hang"),
            (30, 16, 10, 8, 9, 6, 6, 5, 4, 4, 4, 2),
        )[0]  # fmt: skip
        return getattr(self, f"_{kind}")()  # type: ignore[no-any-return]

    def _change(self) -> Op:
        return Op("change", self._random.choice(CHANGES))

    def _remove(self) -> Op:
        return Op("remove")  # what is removed is known when all is drawn

    def _step(self) -> Op:
        random = self._random
        typed = random.random() < 0.5
        plain = random.random() < 0.25
        kinds: list[Callable[[], Op]] = [self._change, self._change, self._change, self._fail]
        if not plain:
            kinds += [self._wait, self._send]
        return Op(
            "step",
            body=tuple(random.choice(kinds)() for _ in range(random.choice((0, 1, 1, 2, 3)))),
            value=random.choice(VALUES if typed else UNTYPED),
            typed=typed,
            plain=plain,
            once=random.random() < 0.1,
        )

    def _gather(self) -> Op:
        random = self._random
        count = random.choice((2, 2, 3))
        branches = [_without_exit(self._step()) for _ in range(count)]
        if random.random() < 0.3:
            branches[0] = self._change()
        return Op("gather", body=tuple(branches))

    def _checkpoint(self) -> Op:
        return Op("checkpoint")

    def _sleep(self) -> Op:
        how = self._random.choice(("", "", "mail_received", "system_event"))
        seconds = (
            self._random.choice((2.0, 20.0, 45.0))
            if not how or self._random.random() < 0.5
            else 0.0
        )
        return Op("sleep", how, seconds=seconds)

    def _send(self) -> Op:
        how = "high" if self._random.random() < 0.2 else ""
        return Op("send", how, to=self._random.choice(self._agents))

    def _submit(self) -> Op:
        if not self._later:
            return self._change()
        return Op(
            "submit",
            to=self._random.choice(self._agents),
            at=self._random.choice(self._later),
            seconds=self._random.choice((0.0, 0.0, 3.0)),
        )

    def _read(self) -> Op:
        how = self._random.choice(("read", "reply", "archive", "mixed"))
        return Op("read", how, times=self._random.choice((1, 2, 99)))

    def _wait(self) -> Op:
        return Op("wait", seconds=self._random.choice((0.0, 0.01, 0.5, 3.0, 12.0)))

    def _hang(self) -> Op:
        return Op("hang", times=1)

    def _fail(self) -> Op:
        how = self._random.choice(("error", "error", "error", "base", "exit", "cancel", "timeout"))
        return Op("fail", how, times=self._random.choice((1, 1, 1, 2)))
