"""Finds a smaller history that breaks the same law: leaves out, simplifies, and tries again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.simulation.driver import simulate
from tests.simulation.histories import History
from tests.simulation.programs import Op, Program

MOST_RUNS = 1500


def shrink(history: History, kind: str) -> History:
    """The smallest history that was found; it breaks the same law in the same way."""
    runs = 0
    smaller = True
    while smaller and runs < MOST_RUNS:
        smaller = False
        for candidate in _simpler(history):
            runs += 1
            broken = simulate(candidate).broken
            if broken is not None and broken.kind == kind:
                history = candidate
                smaller = True
                break
            if runs >= MOST_RUNS:
                break
    return history


def _simpler(history: History) -> Iterator[History]:
    for half in (2, 4):  # large pieces first
        for name in ("actions", "faults"):
            items = getattr(history, name)
            size = len(items) // half
            if size > 1:
                for start in range(0, len(items), size):
                    yield replace(history, **{name: items[:start] + items[start + size :]})
    for name in ("actions", "faults"):
        items = getattr(history, name)
        for index in range(len(items)):
            yield replace(history, **{name: items[:index] + items[index + 1 :]})
    for name in ("second_look", "two_loops", "leave_paused", "latency", "files"):
        if getattr(history, name):
            yield replace(history, **{name: False})
    if history.processes > 1:
        yield replace(history, processes=history.processes - 1)
    elif history.shared:
        yield replace(history, shared=False)
    yield from _fewer_agents(history)
    for number, program in enumerate(history.programs):
        for simpler in _simpler_programs(program):
            programs = (*history.programs[:number], simpler, *history.programs[number + 1 :])
            yield replace(history, programs=programs)
    for index, action in enumerate(history.actions):
        for changes in (
            {"at": 0.0},
            {"at": float(int(action.at))},
            {"seconds": 0.0},
            {"key": ""},
            {"process": 0},
        ):
            simpler_action = replace(action, **changes)
            if simpler_action != action and (action.kind == "submit" or "seconds" not in changes):
                actions = (*history.actions[:index], simpler_action, *history.actions[index + 1 :])
                yield replace(history, actions=tuple(sorted(actions, key=lambda one: one.at)))
    for index, fault in enumerate(history.faults):
        if fault.commit:
            earlier = replace(fault, commit=fault.commit - 1)
            yield replace(
                history, faults=(*history.faults[:index], earlier, *history.faults[index + 1 :])
            )


def _fewer_agents(history: History) -> Iterator[History]:
    if len(history.agents) > 1:
        agents = history.agents[:-1]
        if all(
            a.agent in ("", *agents) and a.sender != history.agents[-1] for a in history.actions
        ):
            programs = tuple(
                replace(program, ops=tuple(_to(op, agents) for op in program.ops))
                for program in history.programs
            )
            yield replace(history, agents=agents, programs=programs)
        actions = tuple(
            replace(
                a,
                agent=a.agent and agents[0],
                sender=a.sender if a.sender not in history.agents else agents[0],
            )
            for a in history.actions
        )
        if actions != history.actions:
            yield replace(history, actions=actions)


def _to(op: Op, agents: tuple[str, ...]) -> Op:
    to = op.to if op.to in ("", *agents) else agents[0]
    return replace(op, to=to, body=tuple(_to(inner, agents) for inner in op.body))


def _simpler_programs(program: Program) -> Iterator[Program]:
    ops = program.ops
    for index in range(len(ops)):
        # A removal names its operation by number, so what is left out becomes a wait of no time.
        rest = ops[:index] + ops[index + 1 :]
        if any(op.kind == "remove" for op in rest):
            rest = (*ops[:index], Op("wait"), *ops[index + 1 :])
        if rest != ops:
            yield replace(program, ops=rest)
    for index, op in enumerate(ops):
        for simpler in _simpler_ops(op):
            yield replace(program, ops=(*ops[:index], simpler, *ops[index + 1 :]))
    if program.value != "int":
        yield replace(program, value="int")
    if program.stubborn:
        yield replace(program, stubborn=False)
    if program.timeout is not None:
        yield replace(program, timeout=None)
    if program.max_attempts != 12:
        yield replace(program, max_attempts=12)


def _simpler_ops(op: Op) -> Iterator[Op]:
    for index in range(len(op.body)):
        yield replace(op, body=op.body[:index] + op.body[index + 1 :])
    for index, inner in enumerate(op.body):
        for simpler in _simpler_ops(inner):
            yield replace(op, body=(*op.body[:index], simpler, *op.body[index + 1 :]))
    if op.kind == "gather" and len(op.body) == 1:
        yield op.body[0]
    if op.kind == "step":
        if op.value != "int":
            yield replace(op, value="int")
        if op.typed:
            yield replace(op, typed=False)
        if op.once:
            yield replace(op, once=False)
    if op.kind == "change" and op.how != "count":
        yield replace(op, how="count")
    if op.kind == "fail" and op.how != "error":
        yield replace(op, how="error")
    if op.times > 1:
        yield replace(op, times=1)
