"""Finds a smaller history that breaks the same law: leaves out, simplifies, and tries again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from tests.simulation.driver import simulate
from tests.simulation.histories import Action, History
from tests.simulation.programs import Op, Program

T = TypeVar("T")

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
    for actions in _fewer(history.actions):
        yield replace(history, actions=actions)
    for faults in _fewer(history.faults):
        yield replace(history, faults=faults)
    yield from _plainer(history)
    yield from _fewer_agents(history)
    for number, program in enumerate(history.programs):
        for simpler in _simpler_programs(program):
            yield replace(history, programs=_with(history.programs, number, simpler))
    for number, action in enumerate(history.actions):
        for simpler_action in _simpler_actions(action):
            actions = _with(history.actions, number, simpler_action)
            yield replace(history, actions=tuple(sorted(actions, key=lambda one: one.at)))
    for number, fault in enumerate(history.faults):
        if fault.commit:
            earlier = replace(fault, commit=fault.commit - 1)
            yield replace(history, faults=_with(history.faults, number, earlier))


def _fewer(items: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    """Without a half of them, without a quarter, without one."""
    size = len(items) // 2
    while size > 1:
        for start in range(0, len(items), size):
            yield items[:start] + items[start + size :]
        size //= 2
    for index in range(len(items)):
        yield items[:index] + items[index + 1 :]


def _with(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _plainer(history: History) -> Iterator[History]:
    plain = (
        replace(history, second_look=False),
        replace(history, two_loops=False),
        replace(history, leave_paused=False),
        replace(history, latency=False),
        replace(history, files=False),
        replace(history, processes=max(1, history.processes - 1)),
        replace(history, shared=history.shared and history.processes > 1),
    )
    yield from (candidate for candidate in plain if candidate != history)


def _fewer_agents(history: History) -> Iterator[History]:
    first, agents = history.agents[0], history.agents[:-1]
    everybody = {action.agent for action in history.actions}
    everybody |= {action.sender for action in history.actions}
    if agents and history.agents[-1] not in everybody:
        programs = tuple(
            replace(program, ops=tuple(_to(op, agents) for op in program.ops))
            for program in history.programs
        )
        yield replace(history, agents=agents, programs=programs)
    actions = tuple(
        replace(
            action,
            agent=action.agent and first,
            sender=first if action.sender in history.agents else action.sender,
        )
        for action in history.actions
    )
    if actions != history.actions:
        yield replace(history, actions=actions)


def _to(op: Op, agents: tuple[str, ...]) -> Op:
    to = op.to if op.to in ("", *agents) else agents[0]
    return replace(op, to=to, body=tuple(_to(inner, agents) for inner in op.body))


def _simpler_actions(action: Action) -> Iterator[Action]:
    simpler = [
        replace(action, at=0.0),
        replace(action, at=float(int(action.at))),
        replace(action, key=""),
        replace(action, process=0),
    ]
    if action.kind == "submit":
        simpler.append(replace(action, seconds=0.0))
    yield from (candidate for candidate in simpler if candidate != action)


def _simpler_programs(program: Program) -> Iterator[Program]:
    ops = program.ops
    for index in range(len(ops)):
        rest = ops[:index] + ops[index + 1 :]
        if any(op.kind == "remove" or op.body for op in rest):
            # A removal names its operation by number, so a wait of no time keeps the place.
            rest = _with(ops, index, Op("wait"))
        if rest != ops:
            yield replace(program, ops=rest)
    for index, op in enumerate(ops):
        for simpler in _simpler_ops(op):
            yield replace(program, ops=_with(ops, index, simpler))
    plain = (
        replace(program, value="int"),
        replace(program, stubborn=False),
        replace(program, replays=False),
        replace(program, timeout=None),
        replace(program, max_attempts=12),
        replace(program, ops=ops[:-1] if ops and ops[-1] == Op("wait") else ops),
    )
    yield from (candidate for candidate in plain if candidate != program)


def _simpler_ops(op: Op) -> Iterator[Op]:
    for index in range(len(op.body)):
        yield replace(op, body=op.body[:index] + op.body[index + 1 :])
    for index, inner in enumerate(op.body):
        for simpler in _simpler_ops(inner):
            yield replace(op, body=_with(op.body, index, simpler))
    if op.kind == "gather" and len(op.body) == 1:
        yield op.body[0]
    plain = [replace(op, value="int", typed=False), replace(op, once=False)]
    if op.kind == "change":
        plain.append(replace(op, how="count"))
    if op.kind == "fail":
        plain.append(replace(op, how="error"))
    if op.times > 1:
        plain.append(replace(op, times=1))
    yield from (candidate for candidate in plain if candidate != op)
