"""Secrets taken out of what is recorded, before anything of it is written.

What a secret looks like is data: ``redaction.toml`` beside this file, and a file of the user's
own. Where none of the patterns' hints occurs, nothing else is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import orjson

from agent_state.errors import StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.messages import REDACTED
from agent_state_integrations.recorder.receiving.secret_patterns import (
    ESCAPE,
    Hints,
    Pattern,
    in_file,
    shipped,
)

_TEXTS = ("Message", "Id", "SpeakerName", "SpeakerRole", "ContextId", "ConversationType")
_MOST_KEYS = 4096
"""Keys whose kind is remembered: there are few, and each comes with every message."""
_EVERYWHERE = 23
"""How many of them are in nearly every text."""
_LONGEST_KEY = 100
_ROUNDS = 8
_ESCAPE = re.compile(r"\\{1,8}u00([2-7][0-9a-fA-F])")
_BETWEEN = re.compile(r"[\s_.-]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Redactor:
    """Replaces secrets by ``[redacted:<name>]``. Doing it twice changes nothing more."""

    def __init__(self, patterns: Iterable[Pattern], keys: Iterable[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self._keys = frozenset(_plain_key(key) for key in keys)
        self._endings = tuple(f" {key}" for key in sorted(self._keys))
        self._known_keys: dict[str, bool] = {}
        self._hints = Hints(self.patterns, self._keys)

    @classmethod
    def default(cls, extra: str | PathLike[str] | None = None) -> Redactor:
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
