"""A large JSON object with indents, made a part at a time.

``orjson`` parses and writes without letting another thread run: 20 MB would hold up the event loop
for a fifth of a second. Here the compact bytes are cut between members, and each part is parsed and
written alone. The result is that of ``orjson``, byte for byte.
"""

from __future__ import annotations

import re

import orjson

from agent_state.protocols import JsonObject

PART_BYTES = 256 * 1024
"""A part has so many bytes at most, unless a single text is longer."""

_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2


def _members_pattern(levels: int) -> bytes:
    """What members are made of that have so many levels of containers."""
    inner = rb'(?:%b|[^"\[\]{}]++)*+' % _TEXT
    for _ in range(levels):
        inner = rb'(?:%b|[^"\[\]{}]++|[\[{]%b[\]}])*+' % (_TEXT, inner)
    return rb'(?:%b|[^"\[\]{},]++|[\[{]%b[\]}])++' % (_TEXT, inner)


_MEMBER = _members_pattern(3)
_MEMBERS = re.compile(rb"(?:%b,)++" % _MEMBER, re.DOTALL)
_LAST = re.compile(rb"%b(?=[\]}])" % _MEMBER, re.DOTALL)
_NAME = re.compile(rb"(%b):" % _TEXT, re.DOTALL)
_LEAF = re.compile(rb'%b|[^",\[\]{}]++' % _TEXT, re.DOTALL)


def indent_object(body: bytes, added: JsonObject) -> bytes:
    """The canonical bytes of an object with indents, with the ``added`` members among its own.

    No member of the body has the name of an added one.
    """
    return _Indenter(body, added).indented()


class _Indenter:
    def __init__(self, body: bytes, added: JsonObject) -> None:
        self._body = body
        self._at = 0
        self._added = sorted(added.items(), key=_order, reverse=True)
        self._parts: list[bytes] = []

    def indented(self) -> bytes:
        self._container(1)
        return b"".join([*self._parts, b"\n"])

    def _container(self, level: int) -> None:
        """Take the container that begins here, which is in ``level - 1`` others."""
        body = self._body
        opening = body[self._at : self._at + 1]
        self._at += 1
        self._parts.append(opening)
        comma = b""
        while body[self._at] not in b"]}":
            until = self._at + PART_BYTES
            found = _MEMBERS.match(body, self._at, until) or _LAST.match(body, self._at, until)
            if found is None:
                self._large_member(opening, level, comma)
            else:
                self._at = found.end()
                self._members(opening, found[0].removesuffix(b","), level, comma)
            comma = b","
        if level == 1 and self._added:
            self._add(dict(self._added), level, comma)
            comma = b","
        if comma:  # it has members
            self._parts.append(b"\n" + b"  " * (level - 1))
        self._parts.append(body[self._at : self._at + 1])
        self._at += 1

    def _members(self, opening: bytes, text: bytes, level: int, comma: bytes) -> None:
        """Add some members as a part."""
        if opening == b"[":
            return self._add(orjson.loads(b"[%b]" % text), level, comma)
        members = orjson.loads(b"{%b}" % text)
        if level == 1:
            members |= self._added_before(next(reversed(members)))
        return self._add(members, level, comma)

    def _add(self, members: object, level: int, comma: bytes) -> None:
        lines = orjson.dumps(members, option=_OPTIONS)[1:-2]
        if level > 1:
            lines = lines.replace(b"\n", b"\n" + b"  " * (level - 1))
        self._parts += (comma, lines)

    def _large_member(self, opening: bytes, level: int, comma: bytes) -> None:
        """Take one member that is longer than a part, or has many levels."""
        body, name = self._body, b""
        if opening == b"{":
            named = _match(_NAME, body, self._at)
            self._at = named.end()
            if level == 1 and (before := self._added_before(orjson.loads(named[1]))):
                self._add(before, level, comma)
                comma = b","
            name = named[1] + b": "
        self._parts.append(b"%b\n%b%b" % (comma, b"  " * level, name))
        if body[self._at] in b"[{":
            self._container(level + 1)
        else:
            value = _match(_LEAF, body, self._at)
            self._parts.append(value[0])
            self._at = value.end()
        if body[self._at] in b",":
            self._at += 1

    def _added_before(self, name: str) -> JsonObject:
        """The added members that come before this name."""
        before: JsonObject = {}
        while self._added and _order(self._added[-1]) < name.encode():
            key, value = self._added.pop()
            before[key] = value
        return before


def _order(member: tuple[str, object]) -> bytes:
    return member[0].encode()


def _match(pattern: re.Pattern[bytes], body: bytes, at: int) -> re.Match[bytes]:
    found = pattern.match(body, at)
    if found is None:
        raise ValueError(f"no JSON at byte {at}")
    return found
