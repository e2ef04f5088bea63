"""What must hold after every commit, and at the end, whoever looks at the store.

Only the store is looked at: the documents as they are after each commit. From the tokens that
programs leave (see ``programs``) follows what must be in an agent's document, what may be there,
and what must not.

==  ========  ===================================================================================
L1  consume   a message is read, replied or archived if and only if the agent's memory says so
L2  once      what stands before a commit point that was reached is there once; nothing else is,
              except what a remembered step changed, at most once
L3  whole     a completed task has left everything, in the same commit
L4  sent once what a task sends exists once, and is there when the task is completed; the same
              for the keys of others, whatever cleaning up does
L5  fenced    only the owner of an agent changes it, its open tasks, its sleep and its mail marks
L6  alive     when nothing goes wrong any more everything that is due gets done, and calls return
L7  same      a step or a result is of one type, at once and later
==  ========  ===================================================================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from agent_state.clock import instant
from agent_state.protocols import Append, Change, Delete, Document, Key, Put
from tests.simulation.histories import History
from tests.simulation.loop import LoopClock
from tests.simulation.programs import SUBMITS, Program

if TYPE_CHECKING:
    from tests.simulation.store import Process

Body = dict[str, Any]
Place = tuple[str, Key]

FINISHED = frozenset({"completed", "dead", "cancelled"})
SETTLING_SECONDS = 40.0
"""How long after a hand edit of its status an agent may still begin a task."""
REVIVED_SECONDS = 20.0
"""How long after a late heartbeat another runtime, which saw it expired, may still take agents."""


class LawBroken(Exception):  # noqa: N818  # it is no error of the program
    """A law does not hold."""

    def __init__(self, law: str, text: str) -> None:
        super().__init__(f"{law}: {text}")
        self.law = law

    @property
    def kind(self) -> str:
        """What is wrong, without the names and numbers of this history."""
        return re.sub(r"'[^']*'|\[[^]]*\]|\([^)]*\)|\S*[\d/]\S*|\b(ann|bob|cat)\b", "", str(self))


class Laws:
    """The documents as the store has them, and what must be true of them."""

    def __init__(self, history: History, clock: LoopClock) -> None:
        self._history = history
        self._clock = clock
        self.docs: dict[Place, Body] = {}
        self.archived: dict[Place, Body] = {}
        """Tasks and mail that cleaning up has taken away, as they were."""
        self.broken: LawBroken | None = None
        """The first law that was broken."""
        self.on_break: Callable[[], object] = lambda: None
        self.committed_count = 0
        self.tasks: dict[str, set[Place]] = {agent: set() for agent in history.agents}
        self.mail: dict[str, set[Place]] = {agent: set() for agent in history.agents}
        self.edited: set[Place] = set()
        """Documents that were edited by hand, and are not judged any more."""
        self.cancels: set[Place] = set()
        """Tasks that somebody asked to cancel."""
        self.retries: set[Place] = set()
        """Tasks that somebody asked to do again."""
        self.deletes: set[Place] = set()
        """Tasks that somebody asked to delete."""
        self.deleted: dict[Place, object] = {}
        """The times of submission of the tasks that were deleted."""
        self._since: dict[tuple[str, str], float] = {}
        self._used: dict[str, float] = {}
        self._granted = 0.0
        self._attempts = 0
        self.touched: set[str] = set()
        """Agents that somebody stopped, started or woke, which any process may do."""
        self._created: dict[tuple[str, str], Place] = {}
        self._owner: dict[str, tuple[str, int]] = {}
        self._revived: dict[str, float] = {}
        """When runtimes last renewed a heartbeat that had expired."""
        self._stopped_at: dict[str, float] = {}
        self.undisturbed_since = 0.0
        """When a process stood still, or the store was away, for the last time."""
        self._returned: dict[tuple[str, str], tuple[type[Any], Any]] = {}
        self._runs: Counter[tuple[str, str]] = Counter()
        self._reached: Counter[str] = Counter()

    def break_law(self, law: str, text: str) -> None:
        self.break_law_at(law, text, self._clock.monotonic())

    def break_law_at(self, law: str, text: str, seconds: float) -> None:
        if self.broken is None:
            self.broken = LawBroken(law, f"{text} (at {seconds:.3f} s)")
            self.on_break()

    # -- what handlers tell

    def reached(self, token: str) -> int:
        """How often an operation was reached, this time included."""
        self._reached[token] += 1
        return self._reached[token]

    def step_runs(self, process: Process, agent: str, task: str, step: str, once: bool) -> None:
        """A step's function runs."""
        self._runs[task, step] += 1
        if once and self._runs[task, step] > 1:
            self.break_law("L2", f"step_at_most_once {step} of {task} ran again")
        stored = self.docs.get(("tasks", (agent, task)), {}).get("steps", {}).get(step, {})
        owner = self._owner.get(agent)
        holds = not self._history.shared or owner is None or owner[0] == process.owner
        if stored.get("status") == "done" and holds:
            self.break_law("L2", f"step {step} of {task} runs again though its result is stored")

    def step_failed(self, task: str, step: str) -> None:
        """A step's function has raised an error that is remembered: it may run again."""
        self._runs[task, step] -= 1

    def returned(self, task: str, step: str, value: object) -> None:
        """A step, or a whole task, has given this value to its caller."""
        first_type, first = self._returned.setdefault((task, step), (type(value), value))
        if type(value) is not first_type or value != first:
            self.break_law("L7", f"{step} of {task} gave {first!r} first and {value!r} later")

    # -- what the store tells

    def committed(
        self, name: str, owner: str | None, changes: Sequence[Change], numbers: Sequence[int]
    ) -> None:
        """These changes have just been made."""
        self.committed_count += 1
        agents: set[str] = set()
        archives = {change.kind for change in changes if isinstance(change, Append)}
        for change, number in zip(changes, numbers, strict=True):
            if isinstance(change, Put):
                changed = self._stored(name, owner, change)
            elif isinstance(change, Delete):
                changed = bool(number) and self._removed(name, owner, change, archives)
            else:
                continue
            if changed and change.key[0] in self.tasks:
                agents.add(change.key[0])
        for agent in sorted(agents):
            self._check_agent(agent)

    def _stored(self, name: str, owner: str | None, change: Put) -> bool:
        """Note a document; return whether it was changed."""
        place = (change.kind, change.key)
        before, body = self.docs.get(place), orjson.loads(change.body)
        if body == before:
            return False
        if owner is not None:
            self._check_owner(name, owner, place, before, body)
        self.docs[place] = body
        self._put(place, before, body)
        return True

    def _removed(self, name: str, owner: str | None, change: Delete, archives: set[str]) -> bool:
        """Note that a document is gone; return whether it was there."""
        place = (change.kind, change.key)
        before = self.docs.pop(place, None)
        if before is None:
            return False
        if owner is not None and change.kind == "sleep" and before.get("is_sleeping", True):
            self._check_owner(name, owner, place, before, None)
        if change.kind in archives:
            self.archived[place] = before
        elif place in self.deletes and before.get("status") in FINISHED:
            self.archived[place], self.deleted[place] = before, before.get("created_at")
        elif change.kind in ("tasks", "mail"):
            self.break_law("L3", f"{_name(place)} was removed and not archived")
        return True

    def quarantined(self, kind: str, key: Key, earlier: Document | None) -> None:
        """A damaged document was put aside."""
        self.docs.pop((kind, key), None)
        if earlier is not None:
            self.docs[kind, key] = orjson.loads(earlier.body)

    def _put(self, place: Place, before: Body | None, body: Body) -> None:
        kind, key = place
        if kind == "tasks" and key[0] in self.tasks and len(key) == 2:
            self.tasks[key[0]].add(place)
            if before is None and self.deleted.get(place, body) == body.get("created_at"):
                self.break_law("L4", f"{_name(place)} was deleted, and is there again")
            elif before is None:
                payload = body.get("payload", {})
                self._create("task", str(payload.get("token", "")), place)
            elif before.get("status") in FINISHED and not self._may_follow(place, before, body):
                self.break_law(
                    "L3", f"{_name(place)} was {before['status']} and is {body.get('status')}"
                )
            if (
                body.get("status") == "in_progress"
                and (before or {}).get("status") != "in_progress"
            ):
                self._claimed(key[0], place)
        elif kind == "mail" and key[0] in self.mail and len(key) == 2:
            self.mail[key[0]].add(place)
            if before is None:
                token = str(body.get("subject", ""))
                if body.get("reply_to"):
                    token = f"reply {body.get('body')}"
                self._create("mail", token, place)
        elif place == ("system", ("limits", "attempts")):
            self._charged(body)
        elif kind == "agents":
            stopped = str(body.get("status")).lower() == "stopped"
            if not stopped:
                self._stopped_at.pop(key[0], None)
            else:
                self._stopped_at.setdefault(key[0], self._clock.monotonic())

    def _may_follow(self, place: Place, before: Body, body: Body) -> bool:
        """Whether a finished task may become this: on request it is done again."""
        if before["status"] == body.get("status"):
            return True
        again = place in self.retries and before["status"] != "completed"
        return again and body.get("status") == "pending"

    def _create(self, what: str, token: str, place: Place) -> None:
        """Something that was sent is there for the first time."""
        if not token or place in self.edited:
            return
        known = self._created.setdefault((what, token), place)
        if known != place or place in self.archived:
            self.archived.pop(place, None)
            self.break_law(
                "L4", f"{what} {token!r} was sent again: {_name(known)} and {_name(place)}"
            )

    def _charged(self, body: Body) -> None:
        """What may be used of the rate limit is stored, before it is used."""
        used = {str(time): float(amount) for time, amount in body.get("used", {}).items()}
        self._granted += sum(max(0.0, used[time] - self._used.get(time, 0.0)) for time in used)
        self._used, now = used, self._clock.now()
        lately = [used[time] for time in used if (now - instant(time)).total_seconds() < 10.0]
        if sum(lately) > body.get("amount", 0):
            self.break_law("L6", f"{sum(lately):g} attempts are granted within 10 seconds")

    def waited(self, task: str, op: str, child: Key, how: str, early: bool) -> None:
        """A handler's wait for a child has ended. ``early``: sooner than its limit permits."""
        self.returned(task, op, how)
        body = self.docs.get(("tasks", child)) or self.archived.get(("tasks", child)) or {}
        if how != "late" and body.get("status") != how and ("tasks", child) not in self.retries:
            self.break_law("L6", f"{task} was told that {child} is {how}: it is {body}")
        if how == "late" and early:
            self.break_law("L6", f"{task} was told too early that {child} is late")

    def since(self, task: str, place: str) -> float:
        """When a handler came to this place for the first time."""
        return self._since.setdefault((task, place), self._clock.monotonic())

    def _claimed(self, agent: str, place: Place) -> None:
        self._attempts += 1
        if self._history.limited and self._attempts > self._granted:
            self.break_law("L6", f"{self._attempts} attempts have begun, {self._granted} may")
        stopped = self._stopped_at.get(agent)
        if stopped is None:
            return
        if self._clock.monotonic() > max(stopped, self.undisturbed_since) + SETTLING_SECONDS:
            self.break_law("L6", f"{_name(place)} was begun though {agent} is stopped")

    # -- L5

    def _check_owner(
        self, name: str, owner: str, place: Place, before: Body | None, body: Body | None
    ) -> None:
        """A runtime has changed a document."""
        kind, key = place
        if not self._history.shared:
            return
        if kind == "system":
            if key[0] == "runtimes" and before is not None and not self.is_valid(key[-1], None):
                self._revived[key[-1]] = self._clock.monotonic()
            if key[0] in ("owners", "leases") and len(key) == 2 and body is not None:
                self._owner_changes(owner, key[1], before, body)
            return
        agent = key[0]
        known = self._owner.get(agent)
        if known is None or known[0] == owner or agent not in self.tasks:
            return
        if kind in ("tasks", "mail"):
            if before is None:
                return  # it was sent to the agent
            if kind == "tasks" and place in self.cancels and _only(_CANCELS, before, body):
                return
            if kind == "tasks" and place in self.retries and _only(_RETRIES, before, body):
                return
        elif agent in self.touched:
            return
        what = "removes" if body is None else f"changes {_differences(before, body)} of"
        self.break_law(
            "L5", f"{name} ({owner}) {what} {_name(place)}, but {known[0] or 'nobody'} owns {agent}"
        )

    def _owner_changes(self, by: str, agent: str, before: Body | None, body: Body) -> None:
        new, token = str(body.get("owner", "")), body.get("token", 0)
        known = self._owner.get(agent)
        if known is not None:
            old, old_token = known
            if new and new != old and (type(token) is not int or token <= old_token):
                self.break_law("L5", f"the token of {agent} went from {old_token} to {token}")
            late = self._revived.get(old, -REVIVED_SECONDS) + REVIVED_SECONDS
            if new and old and new != old and self.is_valid(old, before, late):
                self.break_law("L5", f"{by} takes {agent} from {old}, whose lease has not expired")
        self._owner[agent] = (new, token if type(token) is int else 0)

    def is_valid(self, owner: str, lease: Body | None = None, since: float = 0.0) -> bool:
        """Whether the owner's heartbeat, or the agent's lease, has been valid since then."""
        if self._clock.monotonic() < since:
            return False
        beat = self.docs.get(("system", ("runtimes", owner)))
        until = (beat or {}).get("expires_at") or (lease or {}).get("expires_at")
        if until is None:
            return False
        try:
            return instant(str(until)) > self._clock.now()
        except ValueError:
            return False

    def owner_of(self, agent: str) -> str | None:
        """The runtime that owns the agent, by the store; None for nobody."""
        known = self._owner.get(agent)
        return known[0] or None if known is not None else None

    def stolen(self, agent: str, body: Body) -> None:
        """Somebody who is no runtime of ours has taken the agent."""
        self._owner[agent] = (str(body["owner"]), int(body["token"]))

    # -- L1 to L4, of one agent

    def _check_agent(self, agent: str) -> None:
        if self.broken is not None:
            return
        stored = self.docs.get(("agents", (agent,)))
        if stored is None or ("agents", (agent,)) in self.edited:
            return
        must: set[tuple[str, str]] = set()
        may: set[tuple[str, str]] = set()
        counts = [0, 0]
        context = stored.get("context", {})
        memory = context.get("working_memory", {})
        for place in sorted(self.tasks[agent]):
            task = self.docs.get(place) or self.archived.get(place)
            if task is not None and place not in self.edited:
                self._expect_of(place, task, memory, must, may, counts)
        there = _tokens(context, memory, stored.get("configuration", {}))
        self._compare(agent, must, may, there)
        count = memory.get("count", 0)
        if not counts[0] <= count <= counts[1]:
            self.break_law("L2", f"{agent} has counted {count}, not {_between(*counts)}")
        self._check_mail(agent, memory)

    def _expect_of(
        self,
        place: Place,
        task: Body,
        memory: Body,
        must: set[tuple[str, str]],
        may: set[tuple[str, str]],
        counts: list[int],
    ) -> None:
        number = task.get("payload", {}).get("p")
        if type(number) is not int or not 0 <= number < len(self._history.programs):
            return
        program: Program = self._history.programs[number]
        task_id = place[1][1]
        slept = memory.get("pc", {}).get(task_id, 0)
        reached = max(task.get("progress", {}).get("pc", 0), slept)
        whole = task.get("status") == "completed"
        steps = task.get("steps", {})
        for pc, end, how, step in program.effects():
            done = whole or pc < reached
            maybe = not done and step is not None and steps.get(step, {}).get("status") == "done"
            if not done and not maybe:
                continue
            token = f"{task_id}/{end}"
            if how == "count":
                counts[0] += done
                counts[1] += 1
            elif how == "remove":
                for where in ("list", "deep", "data"):
                    if done:
                        must.discard((where, token))
                        may.discard((where, token))
                    elif (where, token) in must:
                        must.discard((where, token))
                        may.add((where, token))
            else:
                (must if done else may).add((how, token))
        for pc, end, op, _ in program.sends():
            if whole or pc < reached:
                what = "task" if op.kind in SUBMITS else "mail"
                if (what, f"{task_id}/{end}") not in self._created:
                    self.break_law(
                        "L4", f"{_name(place)} is past {end}, and its {what} was never sent"
                    )

    def _compare(
        self,
        agent: str,
        must: set[tuple[str, str]],
        may: set[tuple[str, str]],
        there: Counter[tuple[str, str]],
    ) -> None:
        for found, times in there.items():
            if times > 1:
                self.break_law("L2", f"{agent} has {_token(found)} {times} times")
            elif found not in must and found not in may:
                self.break_law(
                    "L2", f"{agent} has {_token(found)}, whose attempt reached no commit point"
                )
        for wanted in sorted(must):
            if wanted not in there:
                task = self.docs.get(("tasks", (agent, wanted[1].rpartition("/")[0])), {})
                law = "L3" if task.get("status") == "completed" else "L2"
                status = task.get("status", "archived")
                self.break_law(law, f"{agent} lacks {_token(wanted)}, of a task that is {status}")

    def _check_mail(self, agent: str, memory: Body) -> None:
        said = Counter(message_id for message_id, _ in memory.get("mail", ()))
        how = dict(memory.get("mail", ()))
        for message_id, times in said.items():
            if times > 1:
                self.break_law("L1", f"{agent} has worked {times} times on message {message_id}")
        for place in sorted(self.mail[agent]):
            message = self.docs.get(place) or self.archived.get(place)
            message_id = place[1][1]
            if message is None or place in self.edited:
                continue
            status = message.get("status")
            if (status != "unread") != (message_id in said):
                knows = "knows" if message_id in said else "does not know"
                self.break_law(
                    "L1", f"message {message_id} to {agent} is {status}, and its memory {knows} it"
                )
            elif message_id in how:
                wanted = {"read": "read", "archive": "archived", "reply": "replied"}[
                    how[message_id]
                ]
                if status != wanted:
                    self.break_law(
                        "L1", f"message {message_id} to {agent} is {status}, not {wanted}"
                    )
            if status == "replied" and not self._is_answered(agent, message_id, message):
                self.break_law(
                    "L1", f"message {message_id} to {agent} is replied, and there is no reply"
                )

    def _is_answered(self, agent: str, message_id: str, message: Body) -> bool:
        place = ("mail", (str(message.get("from_agent")), str(message.get("replied_with"))))
        answer = self.docs.get(place) or self.archived.get(place)
        return answer is not None and answer.get("reply_to") == message_id

    # -- the end

    def created(self, what: str, token: str) -> bool:
        """Whether something with this token was ever stored."""
        return (what, token) in self._created

    def unfinished(self) -> list[str]:
        """The tasks that are not finished, with their status."""
        return [
            f"{_name(place)} is {self.docs[place].get('status')}"
            for agent in self._history.agents
            for place in sorted(self.tasks[agent])
            if place in self.docs
            and ("agents", (agent,)) in self.docs
            and self.docs[place].get("status") not in FINISHED
            and place not in self.edited
        ]

    def check_all(self) -> None:
        for agent in self._history.agents:
            self._check_agent(agent)


def _tokens(context: Body, memory: Body, configuration: Body) -> Counter[tuple[str, str]]:
    """Every token in an agent's document, with the number of its occurrences."""
    there: Counter[tuple[str, str]] = Counter()
    _add(there, "list", memory.get("list", ()))
    _add(there, "conflist", configuration.get("tokens", ()))
    _add(there, "turn", (turn.get("content") for turn in context.get("conversation_history", ())))
    for where, numbers in (
        ("deep", memory.get("deep", {}).get("er", {})),
        ("data", context.get("agent_data", {})),
        ("conf", configuration),
    ):
        for token, times in numbers.items():
            if "/" in token:
                there[where, token] += times
    return there


def _add(there: Counter[tuple[str, str]], where: str, tokens: Iterable[str]) -> None:
    for token in tokens:
        there[where, token] += 1


_CANCELS = frozenset({"cancel_requested", "status", "finished_at", "lease"})
_RETRIES = _CANCELS | {"forgiven", "interruptions", "not_before", "wait_deadlines"}


def _only(permitted: frozenset[str], before: Body, body: Body | None) -> bool:
    return body is not None and permitted.issuperset(_differences(before, body))


def _differences(before: Body | None, body: Body) -> list[str]:
    old = before or {}
    return sorted(name for name in {*old, *body} if old.get(name) != body.get(name))


def _name(place: Place) -> str:
    return "/".join((place[0], *place[1]))


def _token(found: tuple[str, str]) -> str:
    return f"{found[1]!r} ({found[0]})"


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
