"""Rules of enrichment: data in a TOML file, checked completely before they are used.

``rulesets/standard.toml`` explains every key. The code holds no words of its own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import dropwhile, islice
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.dataclasses import dataclass as validated

from agent_state.errors import StateValidationError, storage_error

RULESETS = ("standard", "legacy", "legacy-broker")
"""The rules that are shipped. ``standard`` is the default."""

_FOLDER = Path(__file__).parent / "rulesets"
_HASH_DIGITS = {"md5": 32, "sha1": 40, "sha256": 64}

_Model = TypeVar("_Model", bound=BaseModel)


def load_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises ``StateValidationError`` when it is not TOML, ``StorageError`` when it cannot be read.
    """
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise storage_error(error, "reading a TOML file", path=path) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StateValidationError(f"not TOML in UTF-8: {error}", path=path) from error


def checked(
    model: type[_Model],
    content: Mapping[str, Any],
    path: str | PathLike[str] | None,
    **context: Any,
) -> _Model:
    """The content as a model. Raises ``StateValidationError``, naming ``path`` and the key."""
    try:
        return model.model_validate(content, context=context)
    except ValidationError as error:
        first = error.errors()[0]
        name = ""
        for part in first["loc"]:
            name += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if name else part
        why = first["msg"].removeprefix("Value error, ")
        raise StateValidationError(f"{name}: {why}" if name else why, path=path) from error


# -- terms in a text -----------------------------------------------------------------------------

_any_words = re.compile(r"\w+").findall
_sentences = re.compile(r"[.!?:;\n](?:(?<=\n)|\s|$)").split
_LONGEST_LEAD = 3
_LEAD_SPAN = 120
"""Characters of a sentence in which its lead is looked for."""
_BLANKED = bytes(byte if chr(byte).isalnum() or byte == ord("_") else 32 for byte in range(128))
_BLANKED += bytes(128)


def words_of(text: str) -> list[str]:
    """The runs of letters, digits and underscores in a text."""
    if text.isascii():  # the same, four times as fast
        return text.encode().translate(_BLANKED).decode().split()
    return _any_words(text)


def lowered_words(text: str) -> str:
    """The words of a text, lower-cased, one space between them."""
    return " ".join(words_of(text.lower()))


class TermMatches(NamedTuple):
    """The terms found in a text, and its words (empty where substrings are matched)."""

    words: list[str]
    terms: AbstractSet[str]
    leads: AbstractSet[str]
    """Terms with which a sentence begins."""


class TermMatcher:
    """Looks up many terms in a text in one pass over its words, whatever the number of terms.

    ``words``: a term is found as consecutive complete words, otherwise as a substring. ``leads``:
    terms that are also looked for at the start of a sentence, after any words of ``skip``.
    ``plurals``: the plural of a term is found too.
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
        self._by_words = words
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
        self._keys = self._single | self._longest
        self._begins = {form: term for form, term in forms.items() if term in leads}
        self._begin_firsts = frozenset(form.partition(" ")[0] for form in self._begins)

    def find(self, lowered: str) -> TermMatches:
        """The terms in a text, which is given in lower case."""
        if not self._by_words:
            return TermMatches([], {term for term in self._terms if term in lowered}, frozenset())
        words = words_of(lowered)
        keys = self._keys.intersection(words)
        if not keys:
            return TermMatches(words, keys, keys)
        terms = {self._words[word] for word in self._single.intersection(keys)}
        longest = self._longest.intersection(keys)
        if longest:
            padded = f" {' '.join(words)} "
            for word in longest:
                terms.update(term for phrase, term in self._phrases[word] if phrase in padded)
        leads = frozenset() if self._leads.isdisjoint(terms) else self._leading(lowered)
        return TermMatches(words, terms, leads)

    def _leading(self, lowered: str) -> AbstractSet[str]:
        leads = set()
        skipped = self._skip.__contains__
        for sentence in _sentences(lowered):
            words = words_of(sentence[:_LEAD_SPAN])
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


# -- the file ------------------------------------------------------------------------------------

_Text = Annotated[str, StringConstraints(min_length=1, strict=True)]
_Texts = list[_Text]


def _as_term(text: Any, info: ValidationInfo) -> Any:
    """The text as it is looked for: its words where words are matched, else lower-cased."""
    if type(text) is not str:
        return text
    term = lowered_words(text) if _matches_words(info) else text.lower()
    if text and not term:
        raise ValueError(f"{text!r} has no letters")
    return term


def _matches_words(info: ValidationInfo) -> bool:
    return isinstance(info.context, dict) and info.context.get("words") is True


def _as_regex(text: Any) -> Any:
    try:
        return re.compile(text, re.IGNORECASE) if type(text) is str and text else None
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error


_Term = Annotated[_Text, BeforeValidator(_as_term)]
_Terms = frozenset[_Term]
_Lowered = Annotated[str, StringConstraints(min_length=1, to_lower=True, strict=True)]


_slots = validated(config=ConfigDict(extra="forbid"), frozen=True, slots=True, kw_only=True)
"""For what is read for each message: an attribute in a slot is found faster than in a model."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@_slots
class RuleCondition:
    """When a rule applies: a term of ``lead`` or ``any`` is in the text, and others are or are not.

    ``lead``: a sentence begins with one of the terms. ``also``: one of these terms must be present
    too. ``unless``: none of these may be present.
    """

    lead: _Terms = frozenset()
    any: _Terms = frozenset()
    also: _Terms = frozenset()
    unless: _Terms = frozenset()

    @model_validator(mode="after")
    def _has_a_condition(self, info: ValidationInfo) -> Self:
        if self.lead and not _matches_words(info):
            raise ValueError('lead: only for matching = "words"')
        if not (self.lead or self.any or self.other):
            raise ValueError("any: the rule has no condition")
        return self

    @property
    def other(self) -> object:
        """A further condition of its own kind of rule."""
        return None

    @property
    def terms(self) -> frozenset[str]:
        """All terms that the rule looks for."""
        return self.lead | self.any | self.also | self.unless


@_slots
class TierRule(RuleCondition):
    """Gives a tier. ``role``: substrings of the speaker's role that are sufficient too."""

    tier: _Text
    role: tuple[_Lowered, ...] = ()

    @property
    def other(self) -> object:
        return self.role


@_slots
class TagRule(RuleCondition):
    """Gives a tag. ``pattern``: a regular expression that is sufficient too."""

    tag: _Text
    pattern: Annotated[re.Pattern[str] | None, BeforeValidator(_as_regex)] = None

    @property
    def other(self) -> object:
        return self.pattern


class _Chains(_Section):
    default: _Text
    words: dict[str, tuple[_Term, ...]]
    unless: dict[str, _Terms] = {}


class _Tiers(_Section):
    default: _Text
    skip: _Terms = frozenset()
    rules: tuple[TierRule, ...] = ()


class _Tags(_Section):
    chain: Annotated[str, Field(strict=True)] = ""
    rules: tuple[TagRule, ...] = ()


@_slots
class KeywordRule:
    """Which words of a text are its keywords."""

    source: Literal["words", "chains", "none"]
    limit: Annotated[StrictInt, Field(ge=1)] = 10
    shortest: Annotated[StrictInt, Field(ge=1)] = 1
    stop: frozenset[_Lowered] = frozenset()


@_slots
class HashRule:
    """How the content hash is made; ``length`` in hexadecimal digits, None for all of them."""

    algorithm: Literal["md5", "sha1", "sha256"]
    text: Literal["raw", "normalised"]
    length: Annotated[StrictInt, Field(ge=8)] | None = None

    @model_validator(mode="after")
    def _has_the_digits(self) -> Self:
        longest = _HASH_DIGITS[self.algorithm]
        if self.length is not None and self.length > longest:
            raise ValueError(f"length: {self.algorithm} has {longest} digits")
        return self


class _RulesFile(_Section):
    name: _Text
    matching: Literal["words", "substrings"]
    plurals: StrictBool = False
    unspoken: frozenset[_Lowered] = frozenset()
    chains: _Chains
    tiers: _Tiers
    tags: _Tags
    keywords: KeywordRule
    hash: HashRule

    @model_validator(mode="after")
    def _plurals_are_of_words(self) -> Self:
        if self.plurals and self.matching != "words":
            raise ValueError('plurals: only for matching = "words"')
        return self


# -- the compiled rules --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """One set of rules, compiled."""

    name: str
    matcher: TermMatcher
    chains: tuple[str, ...]
    chain_default: str
    chains_of: Mapping[str, tuple[int, ...]]
    """For each term, the indexes of its chains."""
    chain_unless: Mapping[str, frozenset[str]]
    """Terms that do not count where one of these is in the text, too."""
    unspoken: frozenset[str]
    """Roles, in lower case, of messages that nobody said."""
    tiers: tuple[TierRule, ...]
    tier_default: str
    tags: tuple[TagRule, ...]
    chain_tag: str
    keywords: KeywordRule
    hash: HashRule
    content: Mapping[str, Any] = field(repr=False, compare=False)
    """The content of the file, from which ``rules_of`` makes equal rules in another process."""

    @staticmethod
    def load(source: str | PathLike[str] = "standard") -> Rules:
        """One of ``RULESETS`` by its name, or the rules in a TOML file.

        Raises ``StateValidationError``, naming the key, for a file that does not hold rules, and
        ``StorageError`` for one that cannot be read.
        """
        path = _FOLDER / f"{source}.toml" if source in RULESETS else Path(source)
        if not path.suffix and not path.exists():
            shipped = ", ".join(RULESETS)
            raise StateValidationError(f"no rules have this name; there are {shipped}", path=path)
        return rules_of(load_toml(path), path)


def rules_of(content: Mapping[str, Any], path: str | PathLike[str] | None = None) -> Rules:
    """The rules in the content of a file.

    Raises ``StateValidationError``, naming ``path`` and the key.
    """
    words = content.get("matching") == "words"
    file = checked(_RulesFile, content, path, words=words)
    chains, conditions = file.chains.words, (*file.tiers.rules, *file.tags.rules)
    terms = [term for chain in chains.values() for term in chain]
    terms += sorted(term for rule in conditions for term in rule.terms)
    terms += sorted(term for others in file.chains.unless.values() for term in others)
    chains_of: dict[str, tuple[int, ...]] = {}
    for number, chain in enumerate(chains.values()):
        for term in dict.fromkeys(chain):
            chains_of[term] = (*chains_of.get(term, ()), number)
    return Rules(
        name=file.name,
        matcher=TermMatcher(
            terms,
            leads=frozenset().union(*(rule.lead for rule in conditions)),
            skip=file.tiers.skip,
            words=words,
            plurals=file.plurals,
        ),
        chains=tuple(chains),
        chain_default=file.chains.default,
        chains_of=chains_of,
        chain_unless=file.chains.unless,
        unspoken=file.unspoken,
        tiers=file.tiers.rules,
        tier_default=file.tiers.default,
        tags=file.tags.rules,
        chain_tag=file.tags.chain,
        keywords=file.keywords,
        hash=file.hash,
        content=content,
    )
