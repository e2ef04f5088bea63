"""A query of a recording: a time range, a speaker, a domain, a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from agent_state.clock import instant, stamp
from agent_state.errors import QueryError

Record = Mapping[str, Any]
Test = Callable[[Record], bool]

_RELATIVE = re.compile(r"(\d{1,9})\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Selects the messages for which all given conditions hold.

    ``since`` ≤ time < ``until``; both aware. Text and ``tag`` apart, what is given is compared as
    it is: ``speaker``, ``role``, ``context``, ``chain_type`` (the domain), ``ace_tier``,
    ``message_type`` (a number may be given as text). ``tag`` is one of ``shl_tags``, with or
    without its ``@``; ``text`` occurs in the message, whatever its case. ``limit``: so many at
    most, the first ones, or with ``newest_first`` the last. Raises ``QueryError``.
    """

    since: datetime | None = None
    until: datetime | None = None
    speaker: str | None = None
    role: str | None = None
    context: str | None = None
    chain_type: str | None = None
    ace_tier: str | None = None
    tag: str | None = None
    text: str | None = None
    message_type: str | int | None = None
    limit: int | None = None
    newest_first: bool = False

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            moment = getattr(self, name)
            if moment is not None and moment.tzinfo is None:
                raise QueryError(f"{name} names no instant without a zone; give an aware datetime")
        for name in ("speaker", "role", "context", "chain_type", "ace_tier", "tag", "text"):
            check_unicode(name, getattr(self, name))
        if self.limit is not None and self.limit < 0:
            raise QueryError(f"a limit of {self.limit} messages cannot be meant")

    @property
    def first_stamp(self) -> str | None:
        """``since`` in the form of records."""
        return None if self.since is None else stamp(self.since)

    @property
    def end_stamp(self) -> str | None:
        return None if self.until is None else stamp(self.until)

    def may_be_in(self, first: str | None, last: str | None) -> bool:
        """Whether a message may be among those from one time to another; None: not known."""
        since, until = self.first_stamp, self.end_stamp
        return not (
            (since is not None and last is not None and last < since)
            or (until is not None and first is not None and first >= until)
        )

    def matches(self, record: Record) -> bool:
        """Whether everything but ``limit`` holds for a record."""
        test = self.test()
        return test is None or test(record)

    def test(self) -> Test | None:
        """``matches``, made once for many records; None when it holds for all."""
        tests = [*self._at_top(), *self._in_metadata()]
        if not tests:
            return None
        if len(tests) == 1:
            return tests[0]
        return lambda record: all(test(record) for test in tests)

    def _at_top(self) -> list[Test]:
        tests: list[Test] = []
        if (since := self.first_stamp) is not None:
            tests.append(lambda record: record["Timestamp"] >= since)
        if (until := self.end_stamp) is not None:
            tests.append(lambda record: record["Timestamp"] < until)
        for name, wanted in (
            ("SpeakerName", self.speaker),
            ("SpeakerRole", self.role),
            ("ContextId", self.context),
        ):
            if wanted is not None:
                tests.append(_equal(name, wanted))
        if self.message_type is not None:
            kind = str(self.message_type)
            tests.append(lambda record: str(record["ConversationType"]) == kind)
        if self.text is not None:
            words = self.text.lower()
            tests.append(lambda record: words in record["Message"].lower())
        return tests

    def _in_metadata(self) -> list[Test]:
        tests: list[Test] = []
        for name, wanted in (("chain_type", self.chain_type), ("ace_tier", self.ace_tier)):
            if wanted is not None:
                tests.append(_equal_in_metadata(name, wanted))
        if self.tag is not None:
            both = spellings(self.tag)
            tests.append(lambda record: has_tag(record["Metadata"].get("shl_tags"), both))
        return tests


def check_unicode(name: str, text: str | None) -> None:
    """Raises ``QueryError`` for what no recording holds, such as a terminal's other encoding."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"{name} is not Unicode text: {text!r:.60}") from error


def spellings(tag: str) -> frozenset[str]:
    """A tag with its ``@`` and without."""
    plain = tag.removeprefix("@")
    return frozenset({plain, f"@{plain}"})


def has_tag(tags: object, wanted: frozenset[str]) -> bool:
    """Whether a list contains one of these tags; False for anything but a list."""
    return isinstance(tags, list) and any(tag in wanted for tag in tags if isinstance(tag, str))


def _equal(name: str, wanted: str) -> Test:
    return lambda record: bool(record[name] == wanted)


def _equal_in_metadata(name: str, wanted: str) -> Test:
    return lambda record: bool(record["Metadata"].get(name) == wanted)


def moment(text: str, now: datetime) -> datetime:
    """The time a person names: ISO 8601 (without a zone: UTC), a day, or ``24h`` before now.

    The units are s, m, h, d, w. Raises ``QueryError``.
    """
    relative = _RELATIVE.fullmatch(text.strip())
    try:
        if relative:
            return now - timedelta(seconds=int(relative[1]) * _SECONDS[relative[2]])
        return instant(text.strip())
    except (ValueError, OverflowError) as error:
        raise QueryError(
            f"{text!r:.60} is not a time; write 2026-11-21, 2026-11-21T14:30:00Z or 24h"
        ) from error


def day(text: str) -> tuple[datetime, datetime]:
    """Where a UTC day begins and ends. Raises ``QueryError``."""
    try:
        first = datetime.combine(date.fromisoformat(text.strip()), datetime.min.time(), UTC)
        return first, first + timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise QueryError(f"{text!r:.60} is not a day; write 2026-11-21") from error
