"""Terms are found as if each were looked for alone, with a regular expression of its own."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state_integrations.recorder.enrichment import enrichment, keywords
from agent_state_integrations.recorder.rules import Rules
from agent_state_integrations.recorder.terms import TermMatcher, plural, word_lines, words_of

TERMS = ("test", "go with", "3d model", "what if", "we ll use", "not yet", "yet", "done", "é", "i")
LEADS = frozenset({"test", "go with", "what if", "done", "é"})
SKIP = frozenset({"i", "please", "we", "ll", "über"})
COMMON = frozenset({"with", "what", "not"})
_WORDS = (*TERMS, *SKIP, *COMMON, "tests", "go  with", "models", "İ", "naïve", "_", "x" * 30)
_GLUE = (
    *" \t\n.?!:;,-—'\"\x1c\x85\u00a0\u2028\u3000",
    ". ", ".\n", "..", "... ", ". . ", ".\u00a0", " \n", "\ud800", " " * 40, "." * 60,
)  # fmt: skip
TEXTS = st.lists(
    st.one_of(st.sampled_from(_WORDS), st.sampled_from(_GLUE), st.text(max_size=3)), max_size=40
).map("".join)


def found_one_by_one(text: str) -> tuple[set[str], set[str]]:
    """The terms in a text, and those with which a sentence begins: the rule, word for word."""
    forms = {plural(term): term for term in TERMS} | {term: term for term in TERMS}
    words = re.findall(r"\w+", text)
    spaced = f" {' '.join(words)} "
    terms = {term for form, term in forms.items() if f" {form} " in spaced}
    leads = set()
    for sentence in re.split(r"\n|[.!?:;](?:\s|$)", text):
        head = re.findall(r"\w+", sentence[:120])
        while head and head[0] in SKIP:
            del head[0]
        for count in (1, 2, 3):
            term = forms.get(" ".join(head[:count]))
            if len(head) >= count and term in LEADS:
                leads.add(term)
    return terms, leads


def names(matcher: TermMatcher, bits: int) -> set[str]:
    return {term for term, bit in matcher.bits.items() if bits & bit}


@given(TEXTS)
def test_all_terms_at_once_are_those_that_are_found_one_by_one(text: str) -> None:
    matcher = TermMatcher(TERMS, leads=LEADS, skip=SKIP, common=COMMON, plurals=True)
    lowered = text.lower()
    found = matcher.find(lowered)
    terms, leads = found_one_by_one(lowered)
    assert found.words == re.findall(r"\w+", lowered)
    assert names(matcher, found.terms) == terms
    assert names(matcher, found.leads) == leads


@pytest.mark.parametrize("before", [80, 88, 89, 90, 114, 115, 116, 117, 118, 119, 120, 121])
@pytest.mark.parametrize("sign", ["-", "—"])
def test_a_sentence_begins_within_its_first_120_characters(before: int, sign: str) -> None:
    matcher = TermMatcher(TERMS, leads=LEADS, skip=SKIP, plurals=True)
    text = f"{sign * before}tests are green"
    assert names(matcher, matcher.find(text).leads) == found_one_by_one(text)[1]


@given(TEXTS)
def test_word_lines_keep_the_place_of_each_word(text: str) -> None:
    lines = word_lines(text)
    assert lines.split() == words_of(text) == re.findall(r"\w+", text)
    if not re.search(r"[.!?:;]\s", text):
        assert [at.start() for at in re.finditer(r"\w+", lines)] == [
            at.start() for at in re.finditer(r"\w+", text)
        ]


@given(TEXTS)
def test_substrings_are_found_wherever_they_stand(text: str) -> None:
    matcher = TermMatcher(TERMS, words=False)
    assert names(matcher, matcher.find(text).terms) == {term for term in TERMS if term in text}


@given(TEXTS)
def test_keywords_are_the_most_frequent_words_and_of_equal_ones_the_first(text: str) -> None:
    rules = Rules.load()
    rule = rules.keywords
    said = [
        word
        for word in re.findall(r"\w+", text.lower())
        if word not in rule.stop and len(word) >= rule.shortest and not word.isdigit()
    ]
    expected = [word for word, _ in Counter(said).most_common(rule.limit)]
    assert keywords(text, rules) == expected
    assert enrichment(text, rules)["keywords"] == expected


@given(TEXTS, st.sampled_from(["", "Agent", "Tool", "User"]))
def test_fields_without_counts_are_the_same_fields(text: str, role: str) -> None:
    rules = Rules.load()
    all_fields = enrichment(text, rules, role=role)
    about = enrichment(text, rules, role=role, counts=False)
    assert about == {name: all_fields[name] for name in about}
    assert all_fields.keys() - about.keys() == {"word_count", "char_count", "content_hash"}
