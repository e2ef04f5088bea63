"""Secrets are removed from messages before anything is written.

Rules describe the form of a secret, in the format of gitleaks: ``secret_rules.toml`` next to this
file, and a file of the user's. A message that contains none of the rules' keywords is not searched
any further.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, model_validator

from agent_state.errors import StateValidationError
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.message import REDACTED
from agent_state_integrations.recorder.rules import checked, load_toml

logger = logging.getLogger("agent_state_integrations.recorder")

_FIELDS = ("Message", "Id", "SpeakerName", "SpeakerRole", "ContextId", "ConversationType")
_MAX_KNOWN_KEYS = 4096
"""Object keys whose kind is cached: few exist, and each comes with every message."""
_MAX_KEY_LENGTH = 100
_MAX_ROUNDS = 8
_JSON_ESCAPE = "\\u00"
"""How JSON may spell an ASCII character; a secret may be spelt this way."""
_ESCAPED = re.compile(r"\\{1,8}u00([2-7][0-9a-fA-F])")
_SEPARATORS = re.compile(r"[\s_.-]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class SecretRedactor:
    """Replaces secrets by ``[redacted:<rule id>]``. Redacting twice changes nothing more."""

    def __init__(self, rules: Iterable[SecretRule], keys: Iterable[str] = ()) -> None:
        self.rules = tuple(rules)
        self._keys = frozenset(_normalized_key(key) for key in keys)
        self._endings = tuple(f" {key}" for key in sorted(self._keys))
        self._known_keys: dict[str, bool] = {}
        self._filter = KeywordFilter(self.rules, self._keys)

    @classmethod
    def default(cls, extra: str | PathLike[str] | None = None) -> SecretRedactor:
        """The shipped rules, and those in a TOML file of the user's, such as a ``gitleaks.toml``.

        Raises ``StateValidationError`` for a file that does not hold rules, or a regex that Python
        cannot run, and ``StorageError`` when the file cannot be read.
        """
        file = _read_rules(Path(__file__).with_name("secret_rules.toml"))
        rules, keys = file.compiled(), set(file.keys)
        if extra is not None:
            path = Path(extra)
            more = _read_rules(path)
            rules |= more.compiled(path)
            keys.update(more.keys)
            disabled = set(more.extend.disabledRules)
            if unknown := disabled - rules.keys():
                names = ", ".join(sorted(unknown))
                raise StateValidationError(f"disabledRules: no rule has the id {names}", path=path)
            rules = {name: rule for name, rule in rules.items() if name not in disabled}
        return cls(rules.values(), keys)

    def redact(self, record: JsonObject) -> int:
        """Remove the secrets from a record, in place. Returns how many there were.

        All fields are searched, and the keys of ``Content`` and ``Metadata``; only the time is not.
        """
        metadata, content = record["Metadata"], record.get("Content")
        texts = [str(record[name]) for name in _FIELDS]
        has_key = bool(metadata) and self._collect(metadata, texts)
        has_key = (content is not None and self._collect(content, texts)) or has_key
        if not has_key and not self._filter.may_match("\n".join(texts).lower()):
            return 0
        count = 0
        for name in (*_FIELDS, "Metadata", "Content"):
            if name in record:
                record[name], found = self._redacted(record[name])
                count += found
        return count

    def redact_text(self, text: str) -> str:
        """The text without its secrets; for a line that is not a record."""
        return self._text(text)[0] if self._filter.may_match(text.lower()) else text

    def redact_raw(self, raw: bytes | str) -> str:
        r"""``redact_text`` of data that may not be text: bytes that are not UTF-8 become ``\xff``.

        Lone surrogates become ``\ud800``, so that the text can be written.
        """
        text = raw.decode(errors="surrogateescape") if isinstance(raw, bytes) else raw
        text = self.redact_text(text)
        try:
            return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
        except UnicodeEncodeError:
            return text.encode(errors="backslashreplace").decode()

    def _collect(self, value: Any, texts: list[str]) -> bool:
        """Add every text in the value to the list. Returns whether a key names a secret."""
        has_key = False
        items = value
        if type(value) is dict:
            items = value.values()
            for key in value:
                texts.append(key)
                if self._is_secret_key(key):
                    has_key = True
        for item in items:
            if type(item) is str:
                texts.append(item)
            elif type(item) is dict or type(item) is list:
                has_key = self._collect(item, texts) or has_key
        return has_key

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
                    item, found = _hidden(item, _normalized_key(key).replace(" ", "_"))
                    count += found
                item, found = self._redacted(item)
                count += found
                while key in value:
                    key += "_"
                value[key] = item
        return value, count

    def _text(self, text: str) -> tuple[str, int]:
        # JSON may spell a keyword in ways that only show when it is read.
        if text[:1] != "{" and not self._filter.may_match(text.lower()):
            return text, 0
        count = 0
        for _ in range(_MAX_ROUNDS):  # text around a replaced secret may match now
            text, found = self._round(text)
            count += found
            if not found:
                break
        return text, count

    def _round(self, text: str) -> tuple[str, int]:
        if text[:1] == "{" and (done := self._json(text)) is not None:
            return done
        result, count = self._apply_rules(text)
        if _JSON_ESCAPE in text:
            # A secret may be spelt with JSON's escapes; ASCII characters need none.
            plain, more = self._apply_rules(_ESCAPED.sub(lambda at: chr(int(at[1], 16)), text))
            if more > count:
                return plain, more
        return result, count

    def _json(self, text: str) -> tuple[str, int] | None:
        """The JSON object in a text, without the secrets its keys name; None for other text."""
        try:
            value = orjson.loads(text)
            value, count = self._redacted(value)
            return (orjson.dumps(value).decode() if count else text), count
        except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):
            return None

    def _apply_rules(self, text: str) -> tuple[str, int]:
        lowered = text.lower()
        count = 0
        for rule in self.rules:
            if rule.may_match(lowered):
                text, found = rule.redact(text)
                count += found
        return text, count

    def _is_secret_key(self, key: str) -> bool:
        known = self._known_keys.get(key)
        if known is None:
            plain = _normalized_key(key)
            known = plain in self._keys or plain.endswith(self._endings)
            if len(self._known_keys) < _MAX_KNOWN_KEYS:
                self._known_keys[key] = known
        return known


def _hidden(value: Any, name: str) -> tuple[Any, int]:
    """The value under a secret's key: a text is replaced, and each text of a list."""
    if type(value) is str:
        return (value, 0) if not value or REDACTED in value else (f"{REDACTED}{name}]", 1)
    if type(value) is list:
        hidden = [_hidden(item, name) for item in value]
        return [item for item, _ in hidden], sum(count for _, count in hidden)
    return value, 0


def _normalized_key(key: str) -> str:
    """``clientSecret``, ``CLIENT_SECRET`` and ``client-secret`` all become ``client secret``."""
    if len(key) > _MAX_KEY_LENGTH:
        return ""
    return _SEPARATORS.sub(" ", _CAMEL.sub(" ", key)).lower().strip()


# -- rules ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SecretRule:
    """One kind of secret. ``secret_rules.toml`` explains the fields."""

    id: str
    regex: re.Pattern[str]
    group: int = 0
    """The group that is the secret; 0: the first that matched anything, else the complete match."""
    keywords: tuple[str, ...] = ()
    """In lower case. Without any, the regex is tried on every text."""
    entropy: float = 0.0
    allowlists: tuple[Allowlist, ...] = ()
    signs: tuple[str, ...] = ()
    within: int = 0
    alone: bool = False

    def may_match(self, lowered: str) -> bool:
        """Whether a keyword is in a text, which is given in lower case."""
        if not self.keywords:
            return True
        checks = bool(self.within or self.alone)
        signs = self.signs or ("",)
        return any(
            word in lowered and (not checks or self.has_keyword(lowered, word, signs))
            for word in self.keywords
        )

    def has_keyword(self, lowered: str, word: str, signs: tuple[str, ...]) -> bool:
        """Whether the keyword stands anywhere as ``within`` and ``alone`` require."""
        at = lowered.find(word)
        while at >= 0:
            end = at + len(word)
            if not (self.alone and at and lowered[at - 1].isalnum()) and (
                not self.within or any(_follows(lowered, sign, end, self.within) for sign in signs)
            ):
                return True
            at = lowered.find(word, end)
        return False

    def redact(self, text: str) -> tuple[str, int]:
        """The text without the secrets of this kind, and how many there were."""
        parts, at, count = list[str](), 0, 0
        for match in self.regex.finditer(text):
            start, end = match.span(self._group_of(match))
            if self._is_allowed(match, text[start:end]):
                continue
            parts += (text[at:start], REDACTED, self.id, "]")
            at = end
            count += 1
        return ("".join(parts) + text[at:], count) if count else (text, 0)

    def _group_of(self, match: re.Match[str]) -> int:
        if self.group:
            return self.group
        return next((n for n, found in enumerate(match.groups(), 1) if found), 0)

    def _is_allowed(self, match: re.Match[str], secret: str) -> bool:
        if self.entropy and _entropy(secret) <= self.entropy:
            return True
        return any(one.allows(match, secret) for one in self.allowlists)


def _follows(lowered: str, sign: str, end: int, within: int) -> bool:
    """Whether a sign comes soon, with no word in between."""
    at = lowered.find(sign, end, end + within)
    return at >= 0 and " " not in lowered[end:at].rstrip()


def _entropy(text: str) -> float:
    """Shannon entropy, in bits per character."""
    size = len(text)
    return -sum(n / size * log2(n / size) for n in Counter(text).values()) if size else 0.0


class _KeywordGroup(NamedTuple):
    """Keywords that need the same character.

    ``joined`` contain that character after the two characters in ``before``.
    """

    sign: str
    others: list[str]
    before: frozenset[str]
    joined: list[str]


class KeywordFilter:
    """Tells quickly that no rule can match: it looks for the rarest characters first.

    Most messages contain no secret, so this is what redaction costs: 1 µs for 100 characters, a
    third of a search for each keyword.
    """

    def __init__(self, rules: Iterable[SecretRule], keys: Iterable[str]) -> None:
        plain: dict[str, set[str]] = {"\\": {_JSON_ESCAPE}}
        checked: dict[str, list[SecretRule]] = {}
        self._always = False
        for rule in rules:
            self._always = self._always or not rule.keywords
            for word in rule.keywords:
                if rule.within or rule.alone:
                    checked.setdefault(word, []).append(rule)
                    continue
                for sign in rule.signs or (_rarest(word),):
                    plain.setdefault(sign, set()).add(word)
        for key in keys:
            for sign in '"\\':
                plain.setdefault(sign, set()).add(key.rpartition(" ")[2] + sign)
        self._groups = [_grouped(sign, plain[sign]) for sign in sorted(plain)]
        self._checked = sorted(checked.items())
        """Keywords whose position has to be looked at, each once, with their rules."""

    def may_match(self, lowered: str) -> bool:
        """Whether a keyword is in a text, which is given in lower case."""
        if self._always:
            return True
        for group in self._groups:
            if group[0] in lowered and _has_keyword(group, lowered):
                return True
        for word, rules in self._checked:
            if word in lowered:
                for rule in rules:
                    if rule.has_keyword(lowered, word, rule.signs or ("",)):
                        return True
        return False


def _has_keyword(group: _KeywordGroup, lowered: str) -> bool:
    sign, others, before, joined = group
    for word in others:
        if word in lowered:
            return True
    if before and not before.isdisjoint([part[-2:] for part in lowered.split(sign)]):
        for word in joined:
            if word in lowered:
                return True
    return False


_MIN_JOINED = 5
"""From this many keywords on, splitting the text is faster than searching for each of them."""
_BY_FREQUENCY = ' etaoinshrdlucmfwypgvbk.,xjqz-:"/=_'
"""Characters, the most frequent first; any other character is rarer than all of these."""
_COMMON = _BY_FREQUENCY[:23]
"""Characters that nearly every text contains."""


def _grouped(sign: str, words: set[str]) -> _KeywordGroup:
    # A keyword that contains another one is found with it.
    least = [word for word in sorted(words) if not any(o in word for o in words - {word})]
    joined = [word for word in least if len(sign) == 1 and word.find(sign) >= 2]
    joined = joined if len(joined) >= _MIN_JOINED else []
    before = frozenset(word[word.find(sign) - 2 : word.find(sign)] for word in joined)
    others = [word for word in least if word not in joined]
    return _KeywordGroup(sign, others, before, joined)


def _rarest(word: str) -> str:
    """The character of a keyword that is rarest in texts; empty if texts have all of them."""
    rarest = max(word, key=lambda char: _BY_FREQUENCY.find(char) % (len(_BY_FREQUENCY) + 1))
    return rarest if rarest not in _COMMON else ""


# -- the file ------------------------------------------------------------------------------------

_Text = Annotated[str, StringConstraints(min_length=1, strict=True)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Allowlist(_Table):
    """Matches that are not secrets. ``paths`` and ``commits`` never hold: a message has none."""

    description: str = ""
    condition: Literal["OR", "AND", "||", "&&"] = "OR"
    regexTarget: Literal["", "secret", "match", "line"] = ""  # noqa: N815 - gitleaks' name
    regexes: tuple[_Text, ...] = ()
    stopwords: tuple[_Text, ...] = ()
    paths: tuple[_Text, ...] = ()
    commits: tuple[_Text, ...] = ()
    targetRules: tuple[_Text, ...] = ()  # noqa: N815 - gitleaks' name

    def allows(self, match: re.Match[str], secret: str) -> bool:
        """Whether a match is not a secret after all."""
        target = secret
        if self.regexTarget == "match":
            target = match[0]
        elif self.regexTarget == "line":
            start = match.string.rfind("\n", 0, match.start()) + 1
            end = match.string.find("\n", match.end())
            target = match.string[start : end if end >= 0 else None]
        checks = list[bool]()
        if self.regexes:
            checks.append(any(python_regex(one).search(target) for one in self.regexes))
        if self.stopwords:
            lowered = secret.lower()
            checks.append(any(word.lower() in lowered for word in self.stopwords))
        if self.paths or self.commits:
            checks.append(False)
        return bool(checks) and (all(checks) if self.condition in ("AND", "&&") else any(checks))

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        for one in self.regexes:
            python_regex(one)
        return self


class _RuleEntry(_Table):
    id: Annotated[str, StringConstraints(pattern=r"^[\w-]{1,64}$", strict=True)]
    description: str = ""
    regex: Annotated[str, Field(strict=True)] = ""
    secretGroup: Annotated[int, Field(ge=0, strict=True)] = 0  # noqa: N815 - gitleaks' name
    entropy: Annotated[float, Field(ge=0)] = 0.0
    keywords: tuple[_Text, ...] = ()
    path: str = ""
    tags: tuple[str, ...] = ()
    skipReport: bool = False  # noqa: N815 - gitleaks' name
    required: tuple[dict[str, Any], ...] = ()
    allowlist: Allowlist | None = None
    allowlists: tuple[Allowlist, ...] = ()
    signs: tuple[_Text, ...] = ()
    within: Annotated[int, Field(ge=0, strict=True)] = 0
    alone: StrictBool = False

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not self.regex and not self.path:
            raise ValueError(f"{self.id}: a rule has a regex")
        if self.within and not self.signs:
            raise ValueError(f"{self.id}: within needs signs")
        return self

    def compiled(self, allowlists: tuple[Allowlist, ...]) -> SecretRule:
        """The rule, ready to run. Raises ``ValueError`` for a regex that cannot be used."""
        regex = python_regex(self.regex)
        if regex.match("") or regex.search(f"{REDACTED}{self.id}]"):
            raise ValueError("the regex matches the empty text, or its own replacement")
        if self.secretGroup > regex.groups:
            raise ValueError(f"secretGroup: the regex has {regex.groups} groups")
        own = (*self.allowlists, *((self.allowlist,) if self.allowlist is not None else ()))
        targeted = (one for one in allowlists if not one.targetRules or self.id in one.targetRules)
        return SecretRule(
            self.id,
            regex,
            self.secretGroup,
            tuple(word.lower() for word in self.keywords),
            self.entropy,
            (*own, *targeted),
            self.signs,
            self.within,
            self.alone,
        )


class _Extend(_Table):
    useDefault: bool = False  # noqa: N815 - gitleaks' name
    disabledRules: tuple[_Text, ...] = ()  # noqa: N815 - gitleaks' name


class _SecretRulesFile(_Table):
    title: str = ""
    description: str = ""
    minVersion: str = ""  # noqa: N815 - gitleaks' name
    extend: _Extend = _Extend()
    rules: tuple[_RuleEntry, ...] = ()
    allowlist: Allowlist | None = None
    allowlists: tuple[Allowlist, ...] = ()
    keys: tuple[_Text, ...] = ()

    def compiled(self, path: Path | None = None) -> dict[str, SecretRule]:
        """The rules by id. Raises ``StateValidationError`` for a regex that cannot be used."""
        everywhere = (*self.allowlists, *((self.allowlist,) if self.allowlist is not None else ()))
        rules = {}
        for entry in self.rules:
            if entry.path or entry.required:
                logger.warning("the rule %s is about files, and is not applied", entry.id)
                continue
            try:
                rules[entry.id] = entry.compiled(everywhere)
            except ValueError as error:
                raise StateValidationError(f"{entry.id}: {error}", path=path) from error
        return rules


def _read_rules(path: Path) -> _SecretRulesFile:
    return checked(_SecretRulesFile, load_toml(path), path)


# -- RE2's syntax --------------------------------------------------------------------------------

_POSIX = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": r"\x00-\x7f", "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f", "digit": "0-9", "graph": "!-~", "lower": "a-z", "print": " -~",
    "punct": r"!-/:-@\[-`{-~", "space": r"\t\n\v\f\r ", "upper": "A-Z", "word": r"\w",
    "xdigit": "0-9A-Fa-f",
}  # fmt: skip
_RE2_TOKEN = re.compile(
    r"""
    \[:(?P<posix>\^?\w+):\]              # [[:alpha:]]
    | \\x\{(?P<hex>[0-9A-Fa-f]{1,6})\}   # \x{10FFFF}
    | \\Q(?P<quoted>.*?)(?:\\E|$)        # \Q...\E
    | (?P<end>\\z)
    | (?P<unsupported>\\(?:[pP](?:\{\^?\w+\}|\w)|C))
    | \\.                                # any other escape
    | \(\?(?P<flags>[a-zA-Z]+)\)         # (?i) for the rest of the group
    | \(\?<(?P<name>\w+)>                # (?<name>...)
    | (?P<sign>[()|\[\]])
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


@lru_cache(maxsize=4096)
def python_regex(text: str) -> re.Pattern[str]:
    r"""A regex in RE2's syntax, or Python's, as Python runs it.

    RE2 allows ``(?i)`` in the middle, ``[[:alpha:]]``, ``\z``, ``\x{…}``, ``\Q…\E`` and
    ``(?<name>…)``, and its ``\d``, ``\w``, ``\s`` and ``\b`` are ASCII. Raises ``ValueError`` for
    a regex that Python cannot run.
    """
    parts, groups, class_start = list[str](), [""], -1
    for token in _RE2_TOKEN.finditer(text):
        piece = _python_token(token, class_start >= 0)
        if class_start >= 0:
            if piece == "]" and token.start() > class_start:
                class_start = -1
            elif piece in ("[", "&", "|", "~"):  # Python warns that it may give them a meaning
                piece = f"\\{piece}"
        elif piece == "[":  # a ] at the start of a class is a member of it
            class_start = token.end() + text.startswith("^", token.end())
        elif token["flags"] and token.start():
            # Python has such flags for a group only: one is opened here and closed with its parent.
            piece = f"(?{token['flags']}:"
            groups[-1] += piece
        elif piece == "(" or token["name"]:
            groups.append("")
        elif piece == ")" and len(groups) > 1:
            piece += ")" * groups.pop().count("(")
        elif piece == "|":
            piece = ")" * groups[-1].count("(") + "|" + groups[-1]
        parts.append(piece)
    parts.append(")" * groups[-1].count("("))
    try:
        return re.compile("".join(parts), re.ASCII)
    except re.error as error:
        raise ValueError(f"not a regex that Python can run: {error}") from error


def _python_token(token: re.Match[str], in_class: bool) -> str:
    """One token of RE2's as Python spells it."""
    match token.lastgroup:
        case "posix" if in_class and token["posix"] in _POSIX:
            return _POSIX[token["posix"]]
        case "posix" | "unsupported":
            raise ValueError(f"{token[0]} is not in the regexes that Python can run")
        case "hex":
            return f"\\U{int(token['hex'], 16):08x}"
        case "quoted":
            return re.escape(token["quoted"])
        case "end":
            return r"\Z"
        case "name":
            return f"(?P<{token['name']}>"
    return token[0]
