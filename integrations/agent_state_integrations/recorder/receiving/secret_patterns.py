"""What a secret looks like, as data: the patterns of ``redaction.toml``, and what hints at them.

A message without a secret is the common one: it should cost a few looks for single characters.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from agent_state.errors import StateValidationError, StorageError
from agent_state_integrations.recorder.messages import REDACTED

ESCAPE = "\\u00"
"""How JSON may spell a plain character; a secret may be spelt so."""
_FIELDS = frozenset({"name", "regex", "hints", "signs", "within", "alone"})
_COMMON = ' etaoinshrdlucmfwypgvbk.,xjqz-:"/=_'
"""Characters, the most frequent ones first; one that is not here is rarer than all of these."""
_EVERYWHERE = 23
"""How many of them are in nearly every text."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One kind of secret.

    ``hints`` are texts in lower case, one of which is in every match, and so is one of
    ``signs``; with ``within``, at most so many characters after the hint, in the same word or
    after blanks. ``alone``: no letter or
    digit stands before the hint. Without hints the regex is tried on every text.
    """

    name: str
    regex: re.Pattern[str]
    hints: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    within: int = 0
    alone: bool = False

    def may_match(self, lowered: str) -> bool:
        """Whether a hint is in a text, which is in lower case."""
        if not self.hints:
            return True
        signs = self.signs or ("",)
        return any(
            hint in lowered and (not self._is_checked or self.is_at_hint(lowered, hint, signs))
            for hint in self.hints
        )

    @property
    def _is_checked(self) -> bool:
        return bool(self.within or self.alone)

    def is_at_hint(self, lowered: str, hint: str, signs: tuple[str, ...]) -> bool:
        """Whether the hint stands anywhere as ``within`` and ``alone`` ask for."""
        at = lowered.find(hint)
        while at >= 0:
            end = at + len(hint)
            if not (self.alone and at and lowered[at - 1].isalnum()) and (
                not self.within or any(_follows(lowered, sign, end, self.within) for sign in signs)
            ):
                return True
            at = lowered.find(hint, end)
        return False


def _follows(lowered: str, sign: str, end: int, within: int) -> bool:
    """Whether a sign comes soon, with no word of its own before it."""
    at = lowered.find(sign, end, end + within)
    return at >= 0 and " " not in lowered[end:at].rstrip()


class Patterns(NamedTuple):
    """What a file says: patterns by name, names of keys, names of patterns that are not wanted."""

    patterns: dict[str, Pattern]
    keys: set[str]
    disabled: set[str]


class _Group(NamedTuple):
    """Hints that need the same character, by what it takes to know that they are there.

    ``joined`` have that character after the two in ``before``, ``checked`` have to be looked at.
    """

    sign: str
    others: list[str]
    before: frozenset[str]
    joined: list[str]
    checked: list[tuple[str, Pattern]]


class Hints:
    """Tells quickly that no pattern can match."""

    def __init__(self, patterns: Iterable[Pattern], keys: Iterable[str]) -> None:
        plain: dict[str, set[str]] = {"\\": {ESCAPE}}
        checked: dict[str, list[tuple[str, Pattern]]] = {}
        self._always = False
        for pattern in patterns:
            self._always = self._always or not pattern.hints
            for hint in pattern.hints:
                for sign in pattern.signs or (_rarest(hint),):
                    if pattern.within or pattern.alone:
                        checked.setdefault(sign, []).append((hint, pattern))
                    else:
                        plain.setdefault(sign, set()).add(hint)
        for key in keys:
            for sign in '"\\':
                plain.setdefault(sign, set()).add(key.rpartition(" ")[2] + sign)
        self._groups = [
            _grouped(sign, plain.get(sign, set()), checked.get(sign, []))
            for sign in sorted(plain.keys() | checked.keys())
        ]

    def occur(self, lowered: str) -> bool:
        """Whether a hint is in a text, which is in lower case."""
        if self._always:
            return True
        for group in self._groups:  # noqa: SIM110 - a generator costs a third more
            if group[0] in lowered and _occurs(group, lowered):
                return True
        return False


def _occurs(group: _Group, lowered: str) -> bool:
    sign, others, before, joined, checked = group
    for hint in others:
        if hint in lowered:
            return True
    for hint, pattern in checked:
        if hint in lowered and pattern.is_at_hint(lowered, hint, (sign,)):
            return True
    if before and not before.isdisjoint([part[-2:] for part in lowered.split(sign)]):
        for hint in joined:
            if hint in lowered:
                return True
    return False


_WORTH_IT = 5
"""Hints for which a text is split, rather than searched for each of them."""


def _grouped(sign: str, hints: set[str], checked: list[tuple[str, Pattern]]) -> _Group:
    # What holds another hint is found with it.
    least = [hint for hint in sorted(hints) if not any(o in hint for o in hints - {hint})]
    joined = [hint for hint in least if len(sign) == 1 and hint.find(sign) >= 2]
    joined = joined if len(joined) >= _WORTH_IT else []
    before = frozenset(hint[hint.find(sign) - 2 : hint.find(sign)] for hint in joined)
    others = [hint for hint in least if hint not in joined]
    return _Group(sign, others, before, joined, checked)


def _rarest(hint: str) -> str:
    """The character of a hint that texts have least; nothing, where they have them all."""
    rarest = max(hint, key=lambda char: _COMMON.find(char) % (len(_COMMON) + 1))
    return rarest if rarest not in _COMMON[:_EVERYWHERE] else ""


def shipped() -> Patterns:
    """What comes with this library."""
    return _parse(resources.files(__package__).joinpath("redaction.toml").read_text("utf-8"), None)


def in_file(path: Path) -> Patterns:
    """What a user's file says. Raises ``StateValidationError`` and ``StorageError``."""
    return _parse(_read(path), path)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise StateValidationError("not UTF-8", path=path) from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", path=path) from error


def _parse(text: str, path: Path | None) -> Patterns:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StateValidationError(f"not TOML: {error}", path=path) from error
    if unknown := data.keys() - {"pattern", "keys", "disable"}:
        raise StateValidationError(f"unknown: {', '.join(sorted(unknown))}", path=path)
    tables = data.get("pattern", [])
    if type(tables) is not list:
        raise StateValidationError("pattern: a table is written [[pattern]]", path=path)
    patterns = [_pattern(table, path) for table in tables]
    return Patterns(
        {pattern.name: pattern for pattern in patterns},
        set(_texts(data, "keys", path)),
        set(_texts(data, "disable", path)),
    )


def _pattern(table: Mapping[str, Any], path: Path | None) -> Pattern:
    name, regex = table.get("name"), table.get("regex")
    if type(name) is not str or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise StateValidationError(
            f"pattern: the name {name!r:.80} is not of lower-case letters, digits and _", path=path
        )
    if unknown := table.keys() - _FIELDS:
        raise StateValidationError(f"{name}: unknown: {', '.join(sorted(unknown))}", path=path)
    if type(regex) is not str:
        raise StateValidationError(f"{name}: a pattern has a regex", path=path)
    try:
        compiled = re.compile(regex)
    except re.error as error:
        raise StateValidationError(f"{name}: no regex: {error}", path=path) from error
    if compiled.match("") or compiled.search(f"{REDACTED}{name}]"):
        raise StateValidationError(f"{name}: it matches nothing, or its own mark", path=path)
    hints = tuple(hint.lower() for hint in _texts(table, "hints", path))
    within, alone = table.get("within", 0), table.get("alone", False)
    if type(within) is not int or within < 0 or type(alone) is not bool:
        raise StateValidationError(f"{name}: within is a number, alone is true or false", path=path)
    signs = tuple(_texts(table, "signs", path))
    if within and not signs:
        raise StateValidationError(f"{name}: within needs signs", path=path)
    return Pattern(name, compiled, hints, signs, within, alone)


def _texts(table: Mapping[str, Any], name: str, path: Path | None) -> list[str]:
    values = table.get(name, [])
    if type(values) is not list or not all(type(value) is str and value for value in values):
        raise StateValidationError(f"{name}: a list of texts is expected", path=path)
    return values
