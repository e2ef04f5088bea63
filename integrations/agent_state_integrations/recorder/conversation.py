"""Conversations: the messages of one context, or those between two silences.

Messages that name a context are one conversation, however long it is silent. All others are put
in the order of time, over all of the recording, and cut where more than five minutes pass.

For each message 21 bytes are kept until the end (time, place, speaker, domain, status), and each
name once; the messages themselves only when they are asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from agent_state.clock import instant, stamp
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.lines import Numbered
from agent_state_integrations.recorder.message import UNKNOWN

GAP = timedelta(minutes=5)
SHORTEST = timedelta(seconds=5)
FEWEST = 2
STABLE = 2
"""So many messages in a row make a topic."""

READY, BLOCKED = "@Status-Ready", "@Status-Blocked"
_STATUSES = ("Completed", "Ready", "Blocked")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class TopicShift:
    """The conversation turned from one domain to another, with this message of it (from 0)."""

    from_topic: str
    to_topic: str
    message_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedConversation:
    """One conversation, with its messages in the order of time."""

    thread_id: str
    """The context; without one, ``gap-`` and the time of the first message."""
    start_time: str
    end_time: str
    duration_seconds: float
    message_count: int
    participants: tuple[str, ...]
    """The speakers, in the order of their first messages."""
    final_status: str
    """``Blocked`` or ``Ready``, by the last message with either tag; else ``Completed``."""
    context_shifts: tuple[TopicShift, ...]
    parent: str | None = None
    """The conversation that this one was forked from, or whose agent began it."""
    messages: tuple[JsonObject, ...] | None = field(default=None, repr=False)
    """The records, where they were asked for."""

    def to_dict(self) -> JsonObject:
        """As JSON; ``messages`` only where they were asked for."""
        body = asdict(self)
        if self.messages is None:
            del body["messages"]
        return body


def conversations(
    records: Iterable[Numbered],
    *,
    gap: timedelta = GAP,
    fewest: int = FEWEST,
    shortest: timedelta = SHORTEST,
    with_messages: bool = False,
) -> list[RecordedConversation]:
    """The conversations among these messages, as ``read_records`` gives them, by their start.

    Left out are those of less than ``fewest`` messages, and those that take less time than
    ``shortest``. The messages may come in any order.
    """
    names = _NameTable()
    groups: dict[str | None, _ContextMessages] = {}
    for _, record in records:
        context = _named(record["ContextId"])
        group = groups.get(context)
        if group is None:
            group = groups[context] = _ContextMessages(names, with_messages)
        group.add(record)
    found = []
    for context, group in groups.items():
        for places in group.parts(gap if context is None else None):
            one = group.conversation(context, places)
            if one.message_count >= fewest and one.duration_seconds >= shortest.total_seconds():
                found.append(one)
    return sorted(found, key=lambda one: (one.start_time, one.thread_id))


def _named(context: str) -> str | None:
    return context if context != UNKNOWN and context else None


class _NameTable:
    """Each name once, by number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []

    def number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._names)
            self._names.append(name)
        return number

    def name(self, number: int) -> str:
        return self._names[number]


class _ContextMessages:
    """The messages of one context, in columns."""

    def __init__(self, names: _NameTable, with_messages: bool) -> None:
        self._names = names
        self._times = array("q")
        self._speakers = array("i")
        self._topics = array("i")
        self._statuses = array("b")
        self._messages: list[JsonObject] | None = [] if with_messages else None
        self._parent: str | None = None

    def add(self, record: JsonObject) -> None:
        meta = record["Metadata"]
        topic = meta.get("chain_type")
        self._times.append((instant(record["Timestamp"]) - _EPOCH) // _MICROSECOND)
        self._speakers.append(self._names.number(record["SpeakerName"]))
        self._topics.append(self._names.number(topic) if type(topic) is str else -1)
        self._statuses.append(_status(meta.get("shl_tags")))
        parent = meta.get("parent_context")
        if self._parent is None and type(parent) is str and parent != record["ContextId"]:
            self._parent = parent
        if self._messages is not None:
            self._messages.append(record)

    def parts(self, gap: timedelta | None) -> Iterator[array[int]]:
        """The places of the messages in the order of time, cut at each gap if there is one.

        Messages of the same moment keep their order.
        """
        times = self._times
        places = array("I", sorted(range(len(times)), key=times.__getitem__))
        if gap is None:
            yield places
            return
        longest, begin = gap // _MICROSECOND, 0
        for at in range(1, len(places)):
            if times[places[at]] - times[places[at - 1]] > longest:
                yield places[begin:at]
                begin = at
        yield places[begin:]

    def conversation(self, context: str | None, places: array[int]) -> RecordedConversation:
        first, last = (
            _EPOCH + self._times[place] * _MICROSECOND for place in (places[0], places[-1])
        )
        speakers = dict.fromkeys(self._speakers[place] for place in places)
        statuses = (self._statuses[place] for place in reversed(places))
        messages = self._messages
        return RecordedConversation(
            thread_id=context if context is not None else f"gap-{stamp(first)}",
            start_time=stamp(first),
            end_time=stamp(last),
            duration_seconds=(last - first).total_seconds(),
            message_count=len(places),
            participants=tuple(map(self._names.name, speakers)),
            final_status=_STATUSES[next(filter(None, statuses), 0)],
            context_shifts=tuple(self._shifts(places)),
            parent=self._parent if context is not None else None,
            messages=None if messages is None else tuple(messages[place] for place in places),
        )

    def _shifts(self, places: array[int]) -> Iterator[TopicShift]:
        """Where another domain begins, and lasts for two messages at least.

        Messages without a domain change nothing. The first domain to last is where it starts.
        """
        topic = candidate = -1
        since = lasted = 0
        for index, place in enumerate(places):
            found = self._topics[place]
            if found < 0:
                continue
            if found != candidate:
                candidate, since, lasted = found, index, 0
            lasted += 1
            if lasted == STABLE and candidate != topic:
                if topic >= 0:
                    yield TopicShift(self._names.name(topic), self._names.name(candidate), since)
                topic = candidate


def _status(tags: Any) -> int:
    """The status in the tags of a message: 2 blocked, 1 ready, 0 none."""
    if type(tags) is not list:
        return 0
    return 2 if BLOCKED in tags else 1 if READY in tags else 0
