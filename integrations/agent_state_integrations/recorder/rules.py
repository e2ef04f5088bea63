"""Rules of enrichment: data in a TOML file, checked completely before they are used.

``rulesets/standard.toml`` explains every key. The code holds no words of its own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
from agent_state_integrations.recorder.terms import TermMatcher, lowered_words

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


class TermMeaning(NamedTuple):
    """What the terms of a text mean."""

    chain: str
    tier: str
    tags: tuple[tuple[str, re.Pattern[str] | None], ...]
    """Tags, each with the pattern that has to be found in the text, if one has."""


class _CompiledRule(NamedTuple):
    """A rule with its terms as sets of a matcher."""

    gives: str
    lead: int
    any: int
    also: int
    unless: int
    role: tuple[str, ...]
    pattern: re.Pattern[str] | None

    def holds(self, terms: int, leads: int) -> bool:
        if not (self.any & terms or self.lead & leads):
            return False
        return (not self.also or self.also & terms != 0) and not self.unless & terms


def _compiled(
    rule: RuleCondition,
    matcher: TermMatcher,
    gives: str,
    role: tuple[str, ...] = (),
    pattern: re.Pattern[str] | None = None,
) -> _CompiledRule:
    lead, any_of, also, unless = map(matcher.set_of, (rule.lead, rule.any, rule.also, rule.unless))
    return _CompiledRule(gives, lead, any_of, also, unless, role, pattern)


class _TermRules(NamedTuple):
    """The rules that need nothing but the terms of a text."""

    chains: Sequence[tuple[str, int]]
    chain_unless: Sequence[tuple[int, int]]
    """Terms that do not count where one of others is in the text, too."""
    tiers: Sequence[_CompiledRule]
    tags: Sequence[_CompiledRule]
    defaults: tuple[str, str]

    def meaning(self, terms: int, leads: int, role: str) -> TermMeaning:
        """The chain with the most different terms, of equal ones the first; the first tier."""
        counted, (chain, tier), most = terms, self.defaults, 0
        for term, others in self.chain_unless:
            if terms & others:
                counted &= ~term
        for name, of_chain in self.chains:
            if (count := (counted & of_chain).bit_count()) > most:
                chain, most = name, count
        for rule in self.tiers:
            if rule.holds(terms, leads) or any(part in role for part in rule.role):
                tier = rule.gives
                break
        held = [(rule, rule.holds(terms, leads)) for rule in self.tags]
        tags = (
            (rule.gives, None if holds else rule.pattern)
            for rule, holds in held
            if holds or rule.pattern is not None
        )
        return TermMeaning(chain, tier, tuple(tags))


_REMEMBERED = 8192
"""Sets of terms whose meaning is remembered: a kilobyte each."""


@dataclass(frozen=True, slots=True)
class Rules:
    """One set of rules, compiled."""

    name: str
    matcher: TermMatcher
    chain_default: str
    tier_default: str
    unspoken: frozenset[str]
    """Roles, in lower case, of messages that nobody said."""
    chain_tag: str
    keywords: KeywordRule
    hash: HashRule
    meaning: Callable[[int, int, str], TermMeaning] = field(repr=False, compare=False)
    """What the terms in a text, those that begin its sentences, and its speaker's role mean."""
    chain_terms: Mapping[str, int] = field(repr=False, compare=False)
    """The terms of the chains in alphabetical order, with their bits."""
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
    chain_terms = sorted(set(terms))
    terms += sorted(term for rule in conditions for term in rule.terms)
    terms += sorted(term for of, others in file.chains.unless.items() for term in (of, *others))
    matcher = TermMatcher(
        terms,
        leads=frozenset().union(*(rule.lead for rule in conditions)),
        skip=file.tiers.skip,
        common=file.keywords.stop,
        words=words,
        plurals=file.plurals,
    )
    term_rules = _TermRules(
        [(name, matcher.set_of(chain)) for name, chain in chains.items()],
        [(matcher.bits[of], matcher.set_of(others)) for of, others in file.chains.unless.items()],
        [_compiled(rule, matcher, rule.tier, role=rule.role) for rule in file.tiers.rules],
        [_compiled(rule, matcher, rule.tag, pattern=rule.pattern) for rule in file.tags.rules],
        (file.chains.default, file.tiers.default),
    )
    return Rules(
        name=file.name,
        matcher=matcher,
        chain_default=file.chains.default,
        tier_default=file.tiers.default,
        unspoken=file.unspoken,
        chain_tag=file.tags.chain,
        keywords=file.keywords,
        hash=file.hash,
        meaning=lru_cache(maxsize=_REMEMBERED)(term_rules.meaning),
        chain_terms={term: matcher.bits[term] for term in chain_terms},
        content=content,
    )
