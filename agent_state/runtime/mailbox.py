"""One agent's mail in memory, with an index of the unread messages, and what a sleeper has seen.

A sleeper is woken by mail that it did not know of when it fell asleep. In memory that is known
exactly. Its document has the place of the last message that it knew of and a digest of them all,
whose size does not depend on their number, and which is kept up with each message: falling asleep
costs the same however much is unread. After a restart the same messages give the same digest;
if they do not, because something was changed by hand, every unread message counts as new: the
agent may wake once too often, and sleeps through nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from hashlib import sha256

from agent_state.clock import sort_text
from agent_state.models import MailMessage, SeenMail, SleepState

OrderKey = tuple[str, str]

_SUM = "sum:"
"""The beginning of a digest that is a sum."""


def order(message: MailMessage) -> OrderKey:
    """Return the sort key of a mailbox: the oldest first."""
    return (sort_text(message.timestamp), message.message_id)


def _number(message_id: str) -> int:
    """Return a number of 128 bits for an id. The sum of these stands for a set of messages."""
    return int.from_bytes(sha256(message_id.encode("utf-8", "surrogatepass")).digest()[:16], "big")


def _digest_of(total: int) -> str:
    return f"{_SUM}{total % 2**128:032x}"


def _digest(places: Iterable[OrderKey], like: str) -> str:
    """Return the digest of these messages, in the form of another one."""
    if like.startswith(_SUM):
        return _digest_of(sum(_number(message_id) for _, message_id in places))
    digest = sha256()  # older versions; it takes the order into account
    for _, message_id in places:
        name = message_id.encode("utf-8", "surrogatepass")
        digest.update(b"%d:%b" % (len(name), name))
    return digest.hexdigest()[:32]


class Mailbox(MutableMapping[str, MailMessage]):
    """The messages of one agent by id.

    A message in it is not to be changed: a changed one is put in its place.
    """

    def __init__(self) -> None:
        self._messages: dict[str, MailMessage] = {}
        self._unread: list[OrderKey] = []
        self._total = 0
        """The sum of the numbers of the unread messages."""
        self._sleep: SleepState | None = None
        self._arrivals: dict[str, int] = {}
        """By unread message how many had arrived when it did."""
        self._arrival, self._seen_until = 0, 0
        """Unread mail that arrived later was not known when the sleep began."""
        self._seen_gone: set[str] = set()
        """The mail that was known then, and is no longer unread."""
        self._new: dict[str, None] = {}
        """Unread mail that may wake it."""
        self._arrived: dict[str, None] = {}
        """Unread mail that ``take_arrived`` has not returned yet."""

    def __getitem__(self, message_id: str) -> MailMessage:
        return self._messages[message_id]

    def __setitem__(self, message_id: str, message: MailMessage) -> None:
        self._forget(message_id)
        self._messages[message_id] = message
        if message.status == "unread":
            insort(self._unread, (sort_text(message.timestamp), message_id))
            self._total += _number(message_id)
            self._arrived[message_id] = None
            self._arrival += 1
            if message_id in self._seen_gone:
                self._seen_gone.discard(message_id)
                self._arrivals[message_id] = self._seen_until
                return
            self._arrivals[message_id] = self._arrival
            if self._sleep is not None:
                self._new[message_id] = None

    def __delitem__(self, message_id: str) -> None:
        self._forget(message_id)
        del self._messages[message_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    def unread(self) -> Iterator[MailMessage]:
        """Yield the unread messages, oldest first."""
        for _, message_id in self._unread:
            yield self._messages[message_id]

    def unread_except(self, message_ids: Sequence[str]) -> list[str]:
        """Return the ids of the unread messages but these, oldest first."""
        known = self._among_unread(message_ids)
        if len(known) == len(self._unread):
            return []
        return [message_id for _, message_id in self._unread if message_id not in known]

    @property
    def unread_count(self) -> int:
        """How many messages are unread."""
        return len(self._unread)

    def _forget(self, message_id: str) -> None:
        """Take a message out of the index."""
        known = self._messages.get(message_id)
        if known is not None and known.status == "unread":
            del self._unread[bisect_left(self._unread, (sort_text(known.timestamp), message_id))]
            self._total -= _number(message_id)
            self._new.pop(message_id, None)
            self._arrived.pop(message_id, None)
            if self._arrivals.pop(message_id) <= self._seen_until and self._sleep is not None:
                self._seen_gone.add(message_id)

    @property
    def has_arrived(self) -> bool:
        """Whether there is unread mail that ``take_arrived`` has not returned yet."""
        return bool(self._arrived)

    def take_arrived(self) -> list[MailMessage]:
        """Return the unread mail that came, or was changed, since the last call."""
        arrived, self._arrived = self._arrived, {}
        return [self._messages[message_id] for message_id in arrived]

    # -- what a sleeper has seen -------------------------------------------------------------

    def seen(self, unseen: Iterable[str] = ()) -> SeenMail | None:
        """Return what a sleep stores of the unread messages without these; None for no message."""
        left_out = self._among_unread(unseen)
        last = next((place for place in reversed(self._unread) if place[1] not in left_out), None)
        if last is None:
            return None
        total = self._total - sum(map(_number, left_out))
        return SeenMail(timestamp=last[0], message_id=last[1], digest=_digest_of(total))

    def begin_sleep(self, sleep: SleepState, unseen: Iterable[str] = ()) -> None:
        """Note that the agent knew of all unread mail but this when this sleep began."""
        left_out = self._among_unread(unseen)
        self._sleep, self._seen_until, self._new = sleep, self._arrival, {}
        self._seen_gone.clear()
        for message_id in left_out:
            self._arrival += 1
            self._arrivals[message_id] = self._arrival
            self._new[message_id] = None

    def _among_unread(self, message_ids: Iterable[str]) -> dict[str, None]:
        return {each: None for each in message_ids if each in self._arrivals}

    def _remember(self, sleep: SleepState) -> None:
        """Take over a sleep that is stored."""
        seen = frozenset(self._seen_before(sleep))
        self.begin_sleep(sleep, [name for _, name in self._unread if name not in seen])
        self._seen_gone.update(seen - self._arrivals.keys())

    def new(self, sleep: SleepState) -> Iterator[MailMessage]:
        """Yield the unread mail that may wake this sleeper.

        A message after which the caller asks for the next one is not yielded again, unless it
        is changed.
        """
        if sleep is not self._sleep:
            self._remember(sleep)
        for message_id in list(self._new):
            yield self._messages[message_id]
            self._new.pop(message_id, None)

    def _seen_before(self, sleep: SleepState) -> Iterable[str]:
        """Return the ids of the mail that the agent knew of, by what is stored of the sleep."""
        seen, began = sleep.seen_mail, sort_text(sleep.sleep_started)
        if seen is None:
            return sleep.mail_seen
        last = (seen.timestamp, seen.message_id)
        # What was read since it fell asleep was unread then.
        places = sorted(
            order(message)
            for message in self._messages.values()
            if order(message) <= last
            and (message.status == "unread" or sort_text(message.read_at) > began)
        )
        return [name for _, name in places] if _digest(places, seen.digest) == seen.digest else ()
