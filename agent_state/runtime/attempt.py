"""The working copy of one attempt: what its handler changes, until a commit point stores it.

A handler changes a copy of the agent's memory, data, conversation and configuration, and marks
mail in it. A commit point (a checkpoint, a sleep, the end of the attempt) stores the copy together
with the task; an attempt that ends otherwise drops it.

A step's changes to the copy are stored with its result, as patches, so that a later attempt which
is given the result is given the changes too. They are found by comparing the copy before and after
each uninterrupted part of the step; so steps that run side by side each keep their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from threading import get_ident
from typing import Any, Protocol, TypeVar

import orjson

from agent_state.codec import Group
from agent_state.errors import StateValidationError
from agent_state.models import (
    AgentState,
    MailMessage,
    OpenModel,
    Patch,
    Task,
    dump_shared,
    plain_copy,
)
from agent_state.runtime.mailbox import Mailbox
from agent_state.storage.executor import run_in_thread

T = TypeVar("T")
M = TypeVar("M", bound=OpenModel)

Mark = Callable[[MailMessage], MailMessage]
"""A transition of a message, such as ``mark_read`` at a time."""

_running_step: ContextVar[StepChanges | None] = ContextVar("running_step", default=None)
_thread_of: ContextVar[StepChanges | None] = ContextVar("thread_of", default=None)
"""Set in the thread that runs a step."""
_CONFIGURATION = "configuration"
_HISTORY, _OFFSET = "conversation_history", "conversation_history_offset"
_CONTEXT = frozenset({"working_memory", "agent_data", _HISTORY})
_NOT_JSON = b"not JSON"
_ANY_VALUE = orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS


class CopiedAgent(Protocol):
    """The agent in memory that a working copy is made of."""

    agent_id: str
    state: AgentState
    """As it is stored."""
    mail: Mailbox


class StepChanges:
    """What one running step has changed in the working copy since the last commit point."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.patches: list[Patch] = []
        self.is_ambiguous = False
        """Another step ran in a thread at the same time, and either may have made a change."""
        self.parent = _running_step.get()
        """The step that this one runs inside; None for the handler itself."""
        self.thread_id: int | None = None
        """The thread that it runs in, if it does."""
        self.own: dict[str, Any] = {}
        """The step's own copies of the parts that its thread has asked for."""
        self.own_before: dict[tuple[str, str | None], bytes] = {}
        """Those as they were when their changes were last recorded."""

    def add(self, patches: Sequence[Patch]) -> None:
        """Record changes; they are also changes of the step that this one runs inside."""
        step: StepChanges | None = self
        while step is not None:
            step.patches.extend(patches)
            step = step.parent


class WorkingCopy:
    """The parts of an agent that a handler may change, and the marks that it gave its mail."""

    def __init__(self, agent: CopiedAgent) -> None:
        self._agent = agent
        self._parts: dict[str, Any] = {}
        """The parts that the handler has asked for, by field."""
        self._turns: list[dict[str, Any]] = []
        """Those to be added to the stored conversation, until the handler asks for that."""
        self._offset = 0
        """How many stored turns stand before the conversation that it has asked for."""
        self._marks: list[tuple[str, Mark]] = []
        self._marks_of: dict[str, list[Mark]] = {}
        self._contained: set[str] = set()
        """The steps whose changes are in the copy."""
        self._steps: list[StepChanges] = []
        """The steps that run."""
        self._threads: list[StepChanges] = []
        """Those of them that run in a thread now."""
        self._parts_of_steps: list[StepChanges] = []
        """The step whose coroutine runs at this moment, and the steps around it."""
        self._before: dict[tuple[str, str | None], bytes] = {}
        """The copy as it was when the owner of changes last changed."""

    # -- what the handler sees ---------------------------------------------------------------

    def part(self, name: str) -> Any:
        """Return ``configuration``, or a field of the agent's context, to be changed freely.

        The thread of a step gets a copy of its own, because others change theirs meanwhile.
        """
        step = _thread_of.get()
        if step is not None:
            return self._part_of_thread(step, name)
        if name not in self._parts:
            self._parts[name] = plain_copy(self._known_part(name))
            if name == _HISTORY:
                self._turns, self._offset = [], getattr(self._agent.state.context, _OFFSET)
            if self._steps:
                self._before |= _fingerprint({name: self._parts[name]})
        return self._parts[name]

    def _known_part(self, name: str) -> Any:
        """A part that the handler has not asked for."""
        state = self._agent.state
        if name == _HISTORY:
            return [*state.context.conversation_history, *self._turns]
        return state.configuration if name == _CONFIGURATION else getattr(state.context, name)

    def add_turn(self, turn: dict[str, Any]) -> None:
        """Add a turn, which nobody else has, to the conversation; that is not copied for it."""
        if _HISTORY in self._parts or self._steps:
            self.part(_HISTORY).append(turn)
        else:
            self._turns.append(turn)

    def _part_of_thread(self, step: StepChanges, name: str) -> Any:
        while name not in step.own:
            with suppress(RuntimeError):  # the event loop changed its size meanwhile
                known = self._parts[name] if name in self._parts else self._known_part(name)
                copy = plain_copy(known)
                step.own_before |= _fingerprint({name: copy})
                step.own[name] = copy
        return step.own[name]

    def mark(self, message_id: str, mark: Mark) -> None:
        """Change the state of a message at the next commit point."""
        self._marks.append((message_id, mark))
        self._marks_of.setdefault(message_id, []).append(mark)

    def message(self, message: MailMessage) -> MailMessage:
        """Return a message of the agent as the handler has marked it."""
        for mark in self._marks_of.get(message.message_id, ()):
            message = mark(message)
        return message

    def marked(self) -> Iterator[MailMessage]:
        """Yield the messages that the handler has marked, as it has marked them."""
        for message_id in self._marks_of:
            message = self._agent.mail.get(message_id)
            if message is not None:
                yield self.message(message)

    # -- commit points -----------------------------------------------------------------------

    def state(self) -> AgentState:
        """Return the agent's state as a commit point stores it."""
        state, parts = self._agent.state, dict(self._parts)
        if _HISTORY in parts:
            parts[_OFFSET] = self._offset
        elif self._turns:
            parts[_HISTORY] = self._known_part(_HISTORY)
        changes: dict[str, Any] = {}
        if _CONFIGURATION in parts:
            changes[_CONFIGURATION] = parts.pop(_CONFIGURATION)
        if parts:
            changes["context"] = _replaced(state.context, parts)
        return _replaced(state, changes) if changes else state

    def dump(self) -> dict[str, Any]:
        """Return ``state()`` as it is stored; the handler has nothing of it."""
        state = self.state()
        return state.model_dump() if _HISTORY in self._parts else dump_shared(state)

    def without_contained(self, task: Task) -> Task:
        """Return the task without those changes of steps that are stored with the agent now."""
        self._flush()
        if not task.steps:
            return task
        drops = self._contained if task.status != "completed" else task.steps.keys()
        steps = {
            name: step.model_copy(update={"memory": []}) if name in drops else step
            for name, step in task.steps.items()
        }
        for step in steps.values():
            if not step.memory:
                step.model_fields_set.discard("memory")
        return task.model_copy(update={"steps": steps})

    def add_marks(self, group: Group) -> dict[str, MailMessage]:
        """Add the marked mail to a commit, and return it.

        Mail that cleanup has archived since stays as it is.
        """
        marked = {}
        for message_id, _ in self._marks:
            message = self._agent.mail.get(message_id)
            if message is not None:
                marked[message_id] = self.message(message)
        for message_id, message in marked.items():
            group.save("mail", (self._agent.agent_id, message_id), message)
        return marked

    def committing(
        self, body: dict[str, Any], marked: dict[str, MailMessage]
    ) -> Callable[[], None]:
        """Return the function that is to be called once the commit point is stored.

        ``body``: the agent's state as it is stored. What the handler changes from now on is not
        in it.
        """
        agent, names = self._agent, [*self._parts]
        marks, turns = len(self._marks), len(self._turns)
        if turns:
            names.append(_HISTORY)
        if _HISTORY in names:
            names.append(_OFFSET)
        patches = [(step, len(step.patches)) for step in self._steps]

        def committed() -> None:
            stored = AgentState.model_validate(body)
            parts = {
                name: getattr(stored.context, name) for name in names if name != _CONFIGURATION
            }
            changes: dict[str, Any] = {"context": _replaced(agent.state.context, parts)}
            if _CONFIGURATION in names:
                changes[_CONFIGURATION] = stored.configuration
            agent.state = _replaced(agent.state, changes)
            agent.mail.update(marked)
            del self._turns[:turns]
            later = self._marks[marks:]
            self._marks, self._marks_of = [], {}
            for message_id, mark in later:
                self.mark(message_id, mark)
            for step, count in patches:
                del step.patches[:count]

        return committed

    # -- steps -------------------------------------------------------------------------------

    def apply(self, name: str, patches: Sequence[Patch]) -> None:
        """Make the changes that a step made in an earlier attempt; twice is a no-op."""
        if name in self._contained:
            return
        self._contained.add(name)
        self._flush()
        for patch in patches:
            _apply(patch, self.part(patch.path[0]))
        around = _running_step.get()
        if around is not None:
            around.add(patches)
            self._before = _fingerprint(self._parts)

    @contextmanager
    def running(self, name: str) -> Iterator[StepChanges]:
        """Record what a step changes while the block runs."""
        step = StepChanges(name)
        if not self._steps:
            self._before = _fingerprint(self._parts)
        self._steps.append(step)
        self._contained.add(name)
        inside = _running_step.set(step)
        try:
            yield step
        finally:
            _running_step.reset(inside)
            self._steps.remove(step)

    async def run(self, step: StepChanges, work: Coroutine[Any, Any, T]) -> T:
        """Await a step's coroutine, and record the changes that it makes."""
        result: T = await StepRun(work, partial(self._as_part, step))
        return result

    async def run_in_thread(self, step: StepChanges, function: Callable[[], T]) -> T:
        """Run a step's function in a thread, and record the changes that it makes.

        Raises ``StateValidationError`` when it changed memory that was asked for outside of it
        while another thread ran: nobody can tell which of the two changed it.
        """
        ended = False

        def inside() -> T:
            nonlocal ended
            _thread_of.set(step)  # in the thread's own context
            step.thread_id = get_ident()
            try:
                return function()
            finally:
                ended = True

        self._flush()
        self._threads.append(step)
        try:
            result = await run_in_thread(inside)
        finally:
            self._flush()
            self._threads.remove(step)
            if ended:
                self.take_over(step)
        if step.is_ambiguous:
            raise StateValidationError(
                f"step {step.name!r} and another one ran in threads at the same time, and memory"
                " was changed: let each ask the context for it"
            )
        return result

    def thread_ids(self) -> list[int]:
        """Return the threads in which steps run now."""
        return [step.thread_id for step in self._threads if step.thread_id is not None]

    def take_over(self, step: StepChanges) -> None:
        """Make the changes of the step's own copies in the copy that all share."""
        if not step.own:
            return
        self._flush()
        now = _fingerprint(step.own)
        patches = [*_differences(step.own_before, now, step.own)]
        step.own_before = now
        for patch in patches:
            _apply(patch, self.part(patch.path[0]))
        step.add(patches)
        self._before = _fingerprint(self._parts)

    @contextmanager
    def _as_part(self, step: StepChanges) -> Iterator[None]:
        self._flush()
        self._parts_of_steps.append(step)
        try:
            yield
        finally:
            self._flush()
            self._parts_of_steps.pop()

    def _flush(self) -> None:
        """Record what has changed since the last call, for the step that could change it."""
        if not self._steps:
            return
        now = _fingerprint(self._parts)
        if now != self._before:
            owners = self._parts_of_steps[-1:] or self._threads
            if owners:
                owners[0].add([*_differences(self._before, now, self._parts)])
            for step in owners[1:] and owners:
                step.is_ambiguous = True
        self._before = now


class StepRun:
    """Awaits a coroutine, with ``around`` entered for each of its uninterrupted parts."""

    def __init__(self, work: Coroutine[Any, Any, Any], around: Callable[[], Any]) -> None:
        self.work = work
        self._around = around

    def __await__(self) -> Generator[Any, Any, Any]:
        resume: Callable[[], Any] = partial(self.work.send, None)
        while True:
            with self._around():
                try:
                    awaited = resume()
                except StopIteration as end:
                    return end.value
            try:
                value = yield awaited
            except GeneratorExit:
                self.work.close()
                raise
            except BaseException as error:  # noqa: BLE001  # a cancellation, or the error awaited
                resume = partial(self.work.throw, error)
            else:
                resume = partial(self.work.send, value)


def _replaced(model: M, values: dict[str, Any]) -> M:
    """Return a copy with other values; a field that was not written stays so at its default."""
    copy = model.model_copy(update=values)
    copy.model_fields_set.difference_update(values.keys() - model.model_fields_set)
    return copy


# -- differences -----------------------------------------------------------------------------


def _fingerprint(parts: dict[str, Any]) -> dict[tuple[str, str | None], bytes]:
    """Return the bytes of each entry of each part; a list is one entry."""
    found: dict[tuple[str, str | None], bytes] = {}
    for name, part in parts.items():
        if isinstance(part, dict):
            for key, value in part.items():
                found[name, key] = _bytes(value)
        else:
            found[name, None] = _bytes(part)
    return found


def _bytes(value: Any) -> bytes:
    try:
        return orjson.dumps(value, default=repr, option=_ANY_VALUE)
    except orjson.JSONEncodeError:  # it is refused, by name, when it is stored
        return _NOT_JSON


def _differences(
    before: dict[tuple[str, str | None], bytes],
    after: dict[tuple[str, str | None], bytes],
    parts: dict[str, Any],
) -> Iterator[Patch]:
    for name, key in [*before, *(place for place in after if place not in before)]:
        old, new = before.get((name, key)), after.get((name, key))
        path = [name] if key is None else [name, key]
        if new is None:
            yield Patch(op="remove", path=path)
        elif old != new:
            value = parts[name] if key is None else parts[name][key]
            yield from _changes(None if old is None else _value(old), value, path)


def _value(data: bytes) -> Any:
    return None if data == _NOT_JSON else orjson.loads(data)


_MAX_DISCARDS = 100
"""A step that takes more items out of a list is stored with the list as it left it."""
_NOTHING = {dict: {}, list: [], int: 0}
"""Other tasks may run between two attempts, so a new value is a change of an empty one."""


def _changes(old: Any, new: Any, path: list[str]) -> Iterator[Patch]:
    """Give the changes from one value to another; numbers are counted, lists are continued."""
    if old is None:
        old = _NOTHING.get(type(new))
    if type(old) is dict and type(new) is dict:
        if not new and not old:
            yield Patch(op="append", path=path, value={})
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in new:
                yield Patch(op="remove", path=[*path, key])
            elif key not in old or _bytes(old[key]) != _bytes(new[key]):
                yield from _changes(old.get(key), new[key], [*path, key])
    elif type(old) is int and type(new) is int:
        yield Patch(op="add", path=path, value=new - old)
    elif type(old) is list and type(new) is list:
        yield from _list_changes(old, new, path)
    else:
        yield Patch(op="replace", path=path, value=plain_copy(new))


def _list_changes(old: list[Any], new: list[Any], path: list[str]) -> Iterator[Patch]:
    """Give what was taken out of a list, and put before and after it; else the list."""
    before, after = [*map(_bytes, old)], [*map(_bytes, new)]
    added = Counter(after) - Counter(before)
    first, last = 0, len(after)
    while last and added[after[last - 1]]:
        last -= 1
        added[after[last]] -= 1
    while first < last and added[after[first]]:
        added[after[first]] -= 1
        first += 1
    removed = [*(Counter(before) - Counter(after)).elements()]
    for item in removed:
        before.remove(item)
    if before != after[first:last] or len(removed) > _MAX_DISCARDS:
        yield Patch(op="replace", path=path, value=plain_copy(new))
        return
    for item in removed:
        yield Patch(op="discard", path=path, value=_value(item))
    if first:
        yield Patch(op="prepend", path=path, value=plain_copy(new[:first]))
    if last < len(new) or not new:
        yield Patch(op="append", path=path, value=plain_copy(new[last:]))


def _apply(patch: Patch, part: Any) -> None:
    """Make one change. A place that is missing by now is created."""
    value = plain_copy(patch.value)
    if len(patch.path) == 1:  # a list, as a whole
        if not _apply_to_container(patch.op, part, value):
            part[:] = value
        return
    *parents, key = patch.path[1:]
    for parent in parents:
        inner = part.get(parent)
        if not isinstance(inner, dict):
            inner = part[parent] = {}
        part = inner
    now = part.get(key)
    if patch.op == "remove":
        part.pop(key, None)
    elif patch.op == "add" and type(now) is int:
        part[key] = now + value
    elif not _apply_to_container(patch.op, now, value) and patch.op != "discard":
        part[key] = value


def _apply_to_container(op: str, now: Any, value: Any) -> bool:
    """Change a list or a dict in place, as a handler may hold it; False if it is none."""
    if op == "discard" and type(now) is list:
        item = _bytes(value)
        at = next((index for index, other in enumerate(now) if _bytes(other) == item), None)
        if at is not None:
            del now[at]
    elif op == "prepend" and type(now) is list:
        now[:0] = value
    elif op == "append" and type(now) is type(value) is list:
        now.extend(value)
    elif op == "append" and type(now) is type(value) is dict:
        now.update(value)
    else:
        return False
    return True
