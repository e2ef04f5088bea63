"""Looks up many terms in a text at once: one pass over its words, whatever the number of terms.

Rules of enrichment: data in a TOML file, checked as a whole before they are used.

``rulesets/standard.toml`` explains every key. The code holds no words of its own.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import dropwhile, islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from agent_state.errors import StateValidationError, storage_error

_any_words = re.compile(r"\w+").findall
_sentences = re.compile(r"[.!?:;\n](?:(?<=\n)|\s|$)").split
_LONGEST_LEAD = 3
_BEGINNING = 120
"""Characters of a sentence in which its lead is looked for."""
_BLANKED = bytes(byte if chr(byte).isalnum() or byte == ord("_") else 32 for byte in range(128))
_BLANKED += bytes(128)


def words_of(text: str) -> list[str]:
    """What stands between other things than letters, digits and underscores."""
    if text.isascii():  # the same, four times as fast
        return text.encode().translate(_BLANKED).decode().split()
    return _any_words(text)


def normalise(text: str) -> str:
    """The words of a text, lower-cased, one space between them."""
    return " ".join(words_of(text.lower()))


class TermMatches(NamedTuple):
    """What of a vocabulary a text has, beside its words (none where letters are matched)."""

    words: list[str]
    terms: AbstractSet[str]
    leads: AbstractSet[str]
    """Terms with which a sentence begins."""


class TermMatcher:
    """Terms, compiled.

    ``words``: whole words in a row, else wherever the letters stand. ``leads``: those that may
    begin a sentence, after any words of ``skip``. ``plurals``: also find the plural of each.
    """

    def __init__(
        self,
        terms: Iterable[str],
        *,
        leads: frozenset[str] = frozenset(),
        skip: frozenset[str] = frozenset(),
        words: bool = True,
        plurals: bool = False,
    ) -> None:
        self._terms = tuple(dict.fromkeys(terms))
        self._leads = leads
        self._skip = skip
        self._whole = words
        forms: dict[str, str] = {}
        for term in self._terms if words else ():
            if plurals:
                forms.setdefault(plural(term), term)
            forms[term] = term
        self._words = {form: term for form, term in forms.items() if " " not in form}
        self._phrases: dict[str, list[tuple[str, str]]] = {}
        """For the longest word of a phrase: the phrase between spaces, and its term."""
        for form, term in forms.items():
            if " " in form:
                longest = max(form.split(), key=len)
                self._phrases.setdefault(longest, []).append((f" {form} ", term))
        self._single, self._longest = frozenset(self._words), frozenset(self._phrases)
        self._telling = self._single | self._longest
        self._begins = {form: term for form, term in forms.items() if term in leads}
        self._begin_firsts = frozenset(form.partition(" ")[0] for form in self._begins)

    def find(self, lowered: str) -> TermMatches:
        """What a text has, of which this is the lower-cased form."""
        if not self._whole:
            return TermMatches([], {term for term in self._terms if term in lowered}, frozenset())
        words = words_of(lowered)
        telling = self._telling.intersection(words)
        if not telling:
            return TermMatches(words, telling, telling)
        terms = {self._words[word] for word in self._single.intersection(telling)}
        longest = self._longest.intersection(telling)
        if longest:
            padded = f" {' '.join(words)} "
            for word in longest:
                terms.update(term for phrase, term in self._phrases[word] if phrase in padded)
        leads = frozenset() if self._leads.isdisjoint(terms) else self._begun(lowered)
        return TermMatches(words, terms, leads)

    def _begun(self, lowered: str) -> AbstractSet[str]:
        leads = set()
        skipped = self._skip.__contains__
        for sentence in _sentences(lowered):
            words = words_of(sentence[:_BEGINNING])
            head = list(islice(dropwhile(skipped, words), _LONGEST_LEAD))
            if head and head[0] in self._begin_firsts:
                for count in range(1, len(head) + 1):
                    term = self._begins.get(" ".join(head[:count]))
                    if term is not None:
                        leads.add(term)
        return leads


def plural(term: str) -> str:
    """The term with its last word in the plural, as English mostly forms it."""
    if term.endswith(("s", "x", "z", "ch", "sh")):
        return term + "es"
    if term.endswith("y") and term[-2:-1] not in "aeiou":
        return term[:-1] + "ies"
    return term + "s"


RULESETS = ("standard", "legacy", "legacy-broker")
"""The rules that are shipped. ``standard`` is the default."""

_FOLDER = Path(__file__).parent / "rulesets"
_HASHES = {"md5": 32, "sha1": 40, "sha256": 64}


@dataclass(frozen=True, slots=True)
class RuleCondition:
    """When a tier or a tag is given. ``lead``, ``any``, ``also``, ``unless`` are terms."""

    gives: str
    lead: frozenset[str] = frozenset()
    any: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    unless: frozenset[str] = frozenset()
    role: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class KeywordRule:
    """Which words of a text are its keywords."""

    source: str
    limit: int
    shortest: int
    stop: frozenset[str]


@dataclass(frozen=True, slots=True)
class HashRule:
    """How the content hash is made; ``length`` in hexadecimal digits."""

    algorithm: str
    normalised: bool
    length: int


@dataclass(frozen=True, slots=True)
class Rules:
    """One set of rules, read and compiled."""

    name: str
    vocabulary: TermMatcher
    chains: tuple[str, ...]
    chain_default: str
    chains_of: Mapping[str, tuple[int, ...]]
    """For each term the numbers of its chains."""
    tiers: tuple[RuleCondition, ...]
    tier_default: str
    tags: tuple[RuleCondition, ...]
    chain_tag: str | None
    keywords: KeywordRule
    hash: HashRule
    content: Mapping[str, Any] = field(repr=False, compare=False)
    """The object as it stands in the file, of which ``rules_of`` makes the same rules again."""

    @staticmethod
    def load(source: str | PathLike[str] = "standard") -> Rules:
        """One of ``RULESETS`` by its name, or the rules in a TOML file.

        Raises ``StateValidationError`` for a file that is no rules, naming the key, and
        ``StorageError`` for one that cannot be read.
        """
        path = _FOLDER / f"{source}.toml" if source in RULESETS else Path(source)
        if not path.suffix and not path.exists():
            shipped = ", ".join(RULESETS)
            raise StateValidationError(f"no rules are called so; there are {shipped}", path=path)
        try:
            text = path.read_bytes().decode()
            return rules_of(tomllib.loads(text), path)
        except OSError as error:
            raise storage_error(error, "reading rules", path=path) from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StateValidationError(f"the rules are no TOML: {error}", path=path) from error


def rules_of(content: Mapping[str, Any], path: str | PathLike[str] | None = None) -> Rules:
    """The rules in an object. Raises ``StateValidationError``, naming ``path`` and the key."""
    top = _Table(content, "", path)
    matching = top.choice("matching", ("words", "substrings"))
    words = matching == "words"
    plurals = top.flag("plurals")
    if plurals and not words:
        raise top.wrong("plurals", 'only for matching = "words"')
    chains = top.table("chains")
    of_chains = chains.table("words")
    terms = {name: of_chains.terms(name, words) for name in of_chains.content}
    tiers = top.table("tiers")
    tags = top.table("tags")
    tier_rules = [_condition(rule, "tier", words) for rule in tiers.tables("rules")]
    tag_rules = [_condition(rule, "tag", words) for rule in tags.tables("rules")]
    skip = tiers.terms("skip", words, needed=False)
    rules = Rules(
        name=top.text("name"),
        vocabulary=TermMatcher(
            [*(term for found in terms.values() for term in found), *_terms(tier_rules, tag_rules)],
            leads=frozenset().union(*(rule.lead for rule in (*tier_rules, *tag_rules))),
            skip=frozenset(skip),
            words=words,
            plurals=plurals,
        ),
        chains=tuple(terms),
        chain_default=chains.text("default"),
        chains_of=_inverted(terms),
        tiers=tuple(tier_rules),
        tier_default=tiers.text("default"),
        tags=tuple(tag_rules),
        chain_tag=tags.text("chain", needed=False),
        keywords=_keywords(top.table("keywords")),
        hash=_hash(top.table("hash")),
        content=content,
    )
    for table in (top, chains, tiers, tags):
        table.done()
    return rules


def _terms(*groups: list[RuleCondition]) -> list[str]:
    return sorted(
        term
        for group in groups
        for rule in group
        for terms in (rule.lead, rule.any, rule.also, rule.unless)
        for term in terms
    )


def _inverted(terms: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for number, chain in enumerate(terms):
        for term in dict.fromkeys(terms[chain]):
            found[term] = (*found.get(term, ()), number)
    return found


def _condition(table: _Table, gives: str, words: bool) -> RuleCondition:
    if not words and "lead" in table.content:
        raise table.wrong("lead", 'only for matching = "words"')
    tag = gives == "tag"
    condition = RuleCondition(
        gives=table.text(gives),
        lead=frozenset(table.terms("lead", words, needed=False)),
        any=frozenset(table.terms("any", words, needed=False)),
        also=frozenset(table.terms("also", words, needed=False)),
        unless=frozenset(table.terms("unless", words, needed=False)),
        role=() if tag else tuple(part.lower() for part in table.texts("role", needed=False)),
        pattern=table.pattern("pattern") if tag else None,
    )
    if not (condition.lead or condition.any or condition.role or condition.pattern):
        raise table.wrong("any", "nothing says when the rule holds")
    table.done()
    return condition


def _keywords(table: _Table) -> KeywordRule:
    rule = KeywordRule(
        source=table.choice("source", ("words", "chains", "none")),
        limit=table.number("limit", 10),
        shortest=table.number("shortest", 1),
        stop=frozenset(word.lower() for word in table.texts("stop", needed=False)),
    )
    table.done()
    return rule


def _hash(table: _Table) -> HashRule:
    algorithm = table.choice("algorithm", tuple(_HASHES))
    longest = _HASHES[algorithm]
    rule = HashRule(
        algorithm=algorithm,
        normalised=table.choice("text", ("raw", "normalised")) == "normalised",
        length=table.number("length", longest),
    )
    if not 8 <= rule.length <= longest:
        raise table.wrong("length", f"from 8 to {longest}")
    table.done()
    return rule


class _Table:
    """One table of the file, whose keys are asked for by name and type."""

    def __init__(
        self, content: Mapping[str, Any], where: str, path: str | PathLike[str] | None
    ) -> None:
        self.content = content
        self._where = where
        self._path = None if path is None else os.fspath(path)
        self._asked: set[str] = set()

    def wrong(self, key: str, why: str) -> StateValidationError:
        return StateValidationError(f"{self._name(key)}: {why}", path=self._path)

    def done(self) -> None:
        """Raises for a key that nothing asked for."""
        unknown = self.content.keys() - self._asked
        if unknown:
            raise self.wrong(min(unknown), "there is no such key")

    def text(self, key: str, *, needed: bool = True) -> str:
        value = self._value(key, "" if not needed else None)
        if type(value) is not str or (needed and not value):
            raise self.wrong(key, "a text is needed")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self.wrong(key, f"one of {', '.join(choices)} is needed, not {value!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self._value(key, default=False)
        if type(value) is not bool:
            raise self.wrong(key, "true or false is needed")
        return value

    def number(self, key: str, default: int) -> int:
        value = self._value(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a whole number from 1 is needed")
        return value

    def texts(self, key: str, *, needed: bool = True) -> list[str]:
        value = self._value(key, [] if not needed else None)
        if type(value) is not list or not all(type(item) is str and item for item in value):
            raise self.wrong(key, "a list of texts is needed")
        return value

    def terms(self, key: str, words: bool, *, needed: bool = True) -> tuple[str, ...]:
        """Texts as they are looked for: lower-cased, and of whole words if those are matched."""
        texts = self.texts(key, needed=needed)
        found = tuple(normalise(text) if words else text.lower() for text in texts)
        if not all(found):
            raise self.wrong(key, f"{texts[found.index('')]!r} has no letters")
        return found

    def pattern(self, key: str) -> re.Pattern[str] | None:
        text = self.text(key, needed=False)
        if not text:
            return None
        try:
            return re.compile(text, re.IGNORECASE)
        except re.error as error:
            raise self.wrong(key, f"no regular expression: {error}") from error

    def table(self, key: str) -> _Table:
        value = self._value(key, None)
        if type(value) is not dict:
            raise self.wrong(key, "a table is needed")
        return _Table(value, self._name(key), self._path)

    def tables(self, key: str) -> list[_Table]:
        value = self._value(key, [])
        if type(value) is not list or not all(type(item) is dict for item in value):
            raise self.wrong(key, "a list of tables is needed")
        return [
            _Table(item, f"{self._name(key)}[{number}]", self._path)
            for number, item in enumerate(value, 1)
        ]

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _value(self, key: str, default: object) -> Any:
        self._asked.add(key)
        return self.content.get(key, default)
