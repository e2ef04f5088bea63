"""Looks up many terms in a text at once: one pass over its words, whatever the number of terms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from itertools import dropwhile, islice
from typing import NamedTuple

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


class Found(NamedTuple):
    """What of a vocabulary a text has, beside its words (none where letters are matched)."""

    words: list[str]
    terms: AbstractSet[str]
    leads: AbstractSet[str]
    """Terms with which a sentence begins."""


class Vocabulary:
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

    def find(self, lowered: str) -> Found:
        """What a text has, of which this is the lower-cased form."""
        if not self._whole:
            return Found([], {term for term in self._terms if term in lowered}, frozenset())
        words = words_of(lowered)
        telling = self._telling.intersection(words)
        if not telling:
            return Found(words, telling, telling)
        terms = {self._words[word] for word in self._single.intersection(telling)}
        longest = self._longest.intersection(telling)
        if longest:
            padded = f" {' '.join(words)} "
            for word in longest:
                terms.update(term for phrase, term in self._phrases[word] if phrase in padded)
        leads = frozenset() if self._leads.isdisjoint(terms) else self._begun(lowered)
        return Found(words, terms, leads)

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
