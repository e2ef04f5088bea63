"""Words, and the terms of rules that are found among them.

A set of terms is an integer with a bit for each of them, so that a rule is a few operations on
integers, and what a set of terms means can be remembered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import dropwhile, islice
from typing import NamedTuple

_LONGEST_LEAD = 3
_LEAD_SPAN = 120
"""Characters of a sentence in which its lead is looked for."""
_ASCII = [chr(code) for code in range(128)]
_BEYOND = bytes(range(128, 256))
_SPACED = "".join(char if char.isalnum() or char in "_\n" else " " for char in _ASCII)
_SPACES = _SPACED.encode() + _BEYOND
"""Spaces for what is neither part of a word nor the end of a line."""
_POINTED = "".join(
    "." if char in "!?:;" else " " if char.isspace() and char != "\n" else char for char in _ASCII
)
_POINTS = _POINTED.encode() + _BEYOND
"""Points for what ends a sentence before white space, and spaces for that."""
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")
_NO_WORD = re.compile(r"[^\w \n]")


def word_lines(text: str) -> str:
    r"""The words of a text, with spaces for all other characters, and a line for each sentence.

    Words are runs of letters, digits and underscores. A sentence ends at a newline, or at one of
    ``.!?:;`` before white space.
    """
    if text.isascii():
        points = text.encode().translate(_POINTS)
        lines = points.replace(b". ", b"\n").replace(b".\n", b"\n")
        return lines.translate(_SPACES).decode()
    points = _WIDE_SPACE.sub(" ", text).encode("utf-8", "surrogatepass").translate(_POINTS)
    lines = points.replace(b". ", b"\n").replace(b".\n", b"\n").translate(_SPACES)
    return _NO_WORD.sub(" ", lines.decode("utf-8", "surrogatepass"))


def words_of(text: str) -> list[str]:
    """The runs of letters, digits and underscores in a text."""
    return word_lines(text).split()


def lowered_words(text: str) -> str:
    """The words of a text, lower-cased, one space between them."""
    return " ".join(words_of(text.lower()))


class TermMatches(NamedTuple):
    """The terms found in a text, and its words (empty where substrings are matched)."""

    words: list[str]
    terms: int
    leads: int
    """Terms with which a sentence begins."""


class TermMatcher:
    """Looks up many terms in a text in one pass over its words, whatever the number of terms.

    ``words``: a term is found as consecutive complete words, otherwise as a substring. ``leads``:
    terms that are also looked for at the start of a sentence, after any words of ``skip``.
    ``plurals``: the plural of a term is found too. ``common``: words that are in most texts.
    """

    def __init__(
        self,
        terms: Iterable[str],
        *,
        leads: frozenset[str] = frozenset(),
        skip: frozenset[str] = frozenset(),
        common: frozenset[str] = frozenset(),
        words: bool = True,
        plurals: bool = False,
    ) -> None:
        self.bits = {term: 1 << at for at, term in enumerate(dict.fromkeys(terms))}
        """For each term its bit."""
        self._leads = self.set_of(leads)
        self._skip = skip
        self._by_words = words
        forms: dict[str, int] = {}
        for term, bit in self.bits.items() if words else ():
            if plurals:
                forms.setdefault(plural(term), bit)
            forms[term] = bit
        self._words = {form: bit for form, bit in forms.items() if " " not in form}
        self._phrases: dict[str, list[tuple[str, int]]] = {}
        """For the rarest word of a phrase: the phrase between spaces, and its bit."""
        for form, bit in forms.items():
            if " " in form:
                rarest = max(form.split(), key=lambda word: (word not in common, len(word)))
                self._phrases.setdefault(rarest, []).append((f" {form} ", bit))
        self._keys = frozenset(self._words) | frozenset(self._phrases)
        self._begins = {form: bit for form, bit in forms.items() if bit & self._leads}
        self._begin_firsts = frozenset(form.partition(" ")[0] for form in self._begins)
        # A word that begins so early is not cut at the end of the span, unless it is longer than
        # all of these; a space stands for one that begins later.
        self._first_words = self._begin_firsts | skip | {" "}
        early = max(0, _LEAD_SPAN - 1 - max(map(len, self._first_words)))
        self._find_firsts = re.compile(rf"\n {{0,{early}}}+(\w+| )").findall

    def set_of(self, terms: Collection[str]) -> int:
        """These terms as a set; all of them are terms of this matcher."""
        return sum(self.bits[term] for term in frozenset(terms))

    def find(self, lowered: str) -> TermMatches:
        """The terms in a text, which is given in lower case."""
        terms = 0
        if not self._by_words:
            for term, bit in self.bits.items():
                if term in lowered:
                    terms |= bit
            return TermMatches([], terms, 0)
        lines = word_lines(lowered)
        words = lines.split()
        single, phrases, padded = self._words, self._phrases, ""
        for word in self._keys.intersection(words):
            if word in single:
                terms |= single[word]
            if word in phrases:
                padded = padded or f" {' '.join(words)} "
                for phrase, bit in phrases[word]:
                    if phrase in padded:
                        terms |= bit
        return TermMatches(words, terms, self._leading(lines) if terms & self._leads else 0)

    def _leading(self, lines: str) -> int:
        if self._first_words.isdisjoint(self._find_firsts(f"\n{lines}")):
            return 0
        leads, skip = 0, self._skip
        for line in lines.split("\n"):
            head = line[:_LEAD_SPAN].split(None, _LONGEST_LEAD)
            if head and head[0] in skip:
                words = dropwhile(skip.__contains__, line[:_LEAD_SPAN].split())
                head = list(islice(words, _LONGEST_LEAD))
            if head and head[0] in self._begin_firsts:
                for count in range(1, min(len(head), _LONGEST_LEAD) + 1):
                    leads |= self._begins.get(" ".join(head[:count]), 0)
        return leads


def plural(term: str) -> str:
    """The term with its last word in the plural, as English mostly forms it."""
    if term.endswith(("s", "x", "z", "ch", "sh")):
        return term + "es"
    if term.endswith("y") and term[-2:-1] not in "aeiou":
        return term[:-1] + "ies"
    return term + "s"
