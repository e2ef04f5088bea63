"""What a secret looks like, as data: the patterns of ``redaction.toml``, and what hints at them.

A message without a secret is the common one: it should cost a few looks for single characters.


Secrets taken out of what is recorded, before anything of it is written.

What a secret looks like is data: ``redaction.toml`` beside this file, and a file of the user's
own. Where none of the patterns' hints occurs, nothing else is tried.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from agent_state.errors import StateValidationError, StorageError
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.message import REDACTED

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


class _KeywordGroup(NamedTuple):
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


def _occurs(group: _KeywordGroup, lowered: str) -> bool:
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


def _grouped(sign: str, hints: set[str], checked: list[tuple[str, Pattern]]) -> _KeywordGroup:
    # What holds another hint is found with it.
    least = [hint for hint in sorted(hints) if not any(o in hint for o in hints - {hint})]
    joined = [hint for hint in least if len(sign) == 1 and hint.find(sign) >= 2]
    joined = joined if len(joined) >= _WORTH_IT else []
    before = frozenset(hint[hint.find(sign) - 2 : hint.find(sign)] for hint in joined)
    others = [hint for hint in least if hint not in joined]
    return _KeywordGroup(sign, others, before, joined, checked)


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


_TEXTS = ("Message", "Id", "SpeakerName", "SpeakerRole", "ContextId", "ConversationType")
_MOST_KEYS = 4096
"""Keys whose kind is remembered: there are few, and each comes with every message."""
_LONGEST_KEY = 100
_ROUNDS = 8
_ESCAPE = re.compile(r"\\{1,8}u00([2-7][0-9a-fA-F])")
_BETWEEN = re.compile(r"[\s_.-]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class SecretRedactor:
    """Replaces secrets by ``[redacted:<name>]``. Doing it twice changes nothing more."""

    def __init__(self, patterns: Iterable[Pattern], keys: Iterable[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self._keys = frozenset(_plain_key(key) for key in keys)
        self._endings = tuple(f" {key}" for key in sorted(self._keys))
        self._known_keys: dict[str, bool] = {}
        self._hints = Hints(self.patterns, self._keys)

    @classmethod
    def default(cls, extra: str | PathLike[str] | None = None) -> SecretRedactor:
        """The patterns that come with this library, and those in a TOML file of the user's.

        Raises ``StateValidationError`` for a file that is not as ``redaction.toml`` says, and
        ``StorageError`` when it can't be read.
        """
        patterns, keys, _ = shipped()
        if extra is not None:
            path = Path(extra)
            more = in_file(path)
            patterns |= more.patterns
            keys |= more.keys
            if unknown := more.disabled - patterns.keys():
                names = ", ".join(sorted(unknown))
                raise StateValidationError(f"disable: there is no pattern {names}", path=path)
            patterns = {name: one for name, one in patterns.items() if name not in more.disabled}
        return cls(patterns.values(), keys)

    def redact(self, record: JsonObject) -> int:
        """Take the secrets out of a record, in place. Returns how many there were.

        All of it, the keys of ``Content`` and ``Metadata`` too; only the time is left as it is.
        """
        metadata, content = record["Metadata"], record.get("Content")
        texts = [str(record[name]) for name in _TEXTS]
        named = bool(metadata) and self._gather(metadata, texts)
        named = (content is not None and self._gather(content, texts)) or named
        if not named and not self._hints.occur("\n".join(texts).lower()):
            return 0
        count = 0
        for name in (*_TEXTS, "Metadata", "Content"):
            if name in record:
                record[name], found = self._redacted(record[name])
                count += found
        return count

    def redact_text(self, text: str) -> str:
        """The text without its secrets: of a line that is no record."""
        return self._text(text)[0] if self._hints.occur(text.lower()) else text

    def redact_raw(self, raw: bytes | str) -> str:
        r"""``redact_text`` of what may be no text: bytes that are not UTF-8 become ``\xff``.

        Lone surrogates become ``\ud800``, so that the text can be written.
        """
        text = raw.decode(errors="surrogateescape") if isinstance(raw, bytes) else raw
        text = self.redact_text(text)
        try:
            return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
        except UnicodeEncodeError:
            return text.encode(errors="backslashreplace").decode()

    def _gather(self, value: Any, texts: list[str]) -> bool:
        """Add every text in the value to the list. Whether a key in it names a secret."""
        named = False
        if type(value) is dict:
            for key, item in value.items():
                texts.append(key)
                if self._is_secret_key(key):
                    named = True
                if type(item) is str:
                    texts.append(item)
                elif type(item) is dict or type(item) is list:
                    named = self._gather(item, texts) or named
        else:
            for item in value:
                if type(item) is str:
                    texts.append(item)
                elif type(item) is dict or type(item) is list:
                    named = self._gather(item, texts) or named
        return named

    def _redacted(self, value: Any) -> tuple[Any, int]:
        """The value without its secrets, and how many there were."""
        if type(value) is str:
            return self._text(value)
        count = 0
        if type(value) is list:
            for index, item in enumerate(value):
                value[index], found = self._redacted(item)
                count += found
        elif type(value) is dict:
            for name in list(value):
                item = value.pop(name)
                key, found = self._text(name)
                count += found
                if self._is_secret_key(key):
                    item, found = _hidden(item, _plain_key(key).replace(" ", "_"))
                    count += found
                item, found = self._redacted(item)
                count += found
                while key in value:
                    key += "_"
                value[key] = item
        return value, count

    def _text(self, text: str) -> tuple[str, int]:
        count = 0
        for _ in range(_ROUNDS):  # what stood beside a secret may be one, now that it is alone
            text, found = self._once(text)
            count += found
            if not found:
                break
        return text, count

    def _once(self, text: str) -> tuple[str, int]:
        if text[:1] == "{" and (done := self._json(text)) is not None:
            return done
        result, count = self._sub(text)
        if ESCAPE in text:
            # A secret may be spelt with JSON's escapes; plain characters need none.
            plain, more = self._sub(_ESCAPE.sub(lambda match: chr(int(match[1], 16)), text))
            if more > count:
                return plain, more
        return result, count

    def _json(self, text: str) -> tuple[str, int] | None:
        """For an object written as text: without the secrets that its keys name."""
        try:
            value = orjson.loads(text)
            value, count = self._redacted(value)
            return (orjson.dumps(value).decode() if count else text), count
        except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):
            return None

    def _sub(self, text: str) -> tuple[str, int]:
        lowered = text.lower()
        count = 0
        for pattern in self.patterns:
            if pattern.may_match(lowered):
                text, found = pattern.regex.subn(_replacing(pattern.name), text)
                count += found
        return text, count

    def _is_secret_key(self, key: str) -> bool:
        known = self._known_keys.get(key)
        if known is None:
            plain = _plain_key(key)
            known = plain in self._keys or plain.endswith(self._endings)
            if len(self._known_keys) < _MOST_KEYS:
                self._known_keys[key] = known
        return known


def _replacing(name: str) -> Callable[[re.Match[str]], str]:
    mark = f"{REDACTED}{name}]"

    def replaced(match: re.Match[str]) -> str:
        for group in ("secret", "secret_2"):
            if group in match.re.groupindex and match[group] is not None:
                start, end = match.span(group)
                whole, begin = match[0], match.start()
                return whole[: start - begin] + mark + whole[end - begin :]
        return mark

    return replaced


def _hidden(value: Any, name: str) -> tuple[Any, int]:
    """What stands under a secret's key: a text, or a list of them."""
    if type(value) is str:
        return (value, 0) if not value or REDACTED in value else (f"{REDACTED}{name}]", 1)
    if type(value) is list:
        hidden = [_hidden(item, name) for item in value]
        return [item for item, _ in hidden], sum(count for _, count in hidden)
    return value, 0


def _plain_key(key: str) -> str:
    """``clientSecret``, ``CLIENT_SECRET`` and ``client-secret`` are all ``client secret``."""
    if len(key) > _LONGEST_KEY:
        return ""
    return _BETWEEN.sub(" ", _CAMEL.sub(" ", key)).lower().strip()
