"""One agent's mail in memory, with an index of the unread messages, and what a sleeper has seen.

A sleeper is woken by mail that it did not know of when it fell asleep. In memory that is known
exactly. Its document has the place of the last message that it knew of and a digest of them all,
whose size does not depend on their number. After a restart the same messages give the same digest;
if they do not, because something was changed by hand, every unread message counts as new: the
agent may wake once too often, and sleeps through nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, MutableMapping
from hashlib import sha256

from agent_state.clock import sort_text
from agent_state.models import MailMessage, SeenMail, SleepState, detached

OrderKey = tuple[str, str]

_SCALARS = (str, int, float, bool, type(None))


def order(message: MailMessage) -> OrderKey:
    """Return the sort key of a mailbox: the oldest first."""
    return (sort_text(message.timestamp), message.message_id)


def copied(message: MailMessage) -> MailMessage:
    """Return a deep copy. Several times as fast as pydantic's own, as most fields are text."""
    copy = message.model_copy()
    for fields in (copy.__dict__, copy.model_extra or {}):
        for name, value in fields.items():
            if not isinstance(value, _SCALARS):
                fields[name] = detached(value)
    return copy


def seen_mail(messages: Iterable[MailMessage]) -> SeenMail | None:
    """Return what a sleep stores of these messages, which are unread; None for no message."""
    places = sorted(map(order, messages))
    if not places:
        return None
    timestamp, message_id = places[-1]
    return SeenMail(timestamp=timestamp, message_id=message_id, digest=_digest(places))


def _digest(places: Iterable[OrderKey]) -> str:
    digest = sha256()
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
        self._sleep: SleepState | None = None
        self._seen: frozenset[str] = frozenset()
        """The mail that the agent knew of when that sleep began."""
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
            self._arrived[message_id] = None
            if self._sleep is not None and message_id not in self._seen:
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

    @property
    def unread_count(self) -> int:
        """How many messages are unread."""
        return len(self._unread)

    def _forget(self, message_id: str) -> None:
        """Take a message out of the index."""
        known = self._messages.get(message_id)
        if known is not None and known.status == "unread":
            del self._unread[bisect_left(self._unread, (sort_text(known.timestamp), message_id))]
            self._new.pop(message_id, None)
            self._arrived.pop(message_id, None)

    @property
    def has_arrived(self) -> bool:
        """Whether there is unread mail that ``take_arrived`` has not returned yet."""
        return bool(self._arrived)

    def take_arrived(self) -> list[MailMessage]:
        """Return the unread mail that came, or was changed, since the last call."""
        arrived, self._arrived = self._arrived, {}
        return [self._messages[message_id] for message_id in arrived]

    # -- what a sleeper has seen -------------------------------------------------------------

    def remember(self, sleep: SleepState, seen: Iterable[str]) -> None:
        """Note which mail the agent knew of when this sleep began, by id."""
        self._sleep, self._seen = sleep, frozenset(seen)
        ids = (message_id for _, message_id in self._unread)
        self._new = {message_id: None for message_id in ids if message_id not in self._seen}

    def new(self, sleep: SleepState) -> Iterator[MailMessage]:
        """Yield the unread mail that may wake this sleeper.

        A message after which the caller asks for the next one is not yielded again, unless it
        is changed.
        """
        if sleep is not self._sleep:
            self.remember(sleep, self._seen_before(sleep))
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
        return [name for _, name in places] if _digest(places) == seen.digest else ()
