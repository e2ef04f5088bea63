"""The rules that are used unless others are asked for."""

from __future__ import annotations

import copy
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state_integrations.recorder.enrichment import enrich, enrichment
from agent_state_integrations.recorder.message import ENRICHED
from agent_state_integrations.recorder.rules import Rules

STANDARD = Rules.load()


def tier(text: str) -> object:
    return enrichment(text, STANDARD)["ace_tier"]


def chain(text: str) -> object:
    return enrichment(text, STANDARD)["chain_type"]


@pytest.mark.parametrize(
    "text",
    [
        "Decide to use ZMQ",
        "Should we use Redis or Kafka?",
        "We decided to split the service in two",
        "Decision: one writer per log",
        "Let's use Postgres for the archive",
        "We will use a journal instead of locks.",
        "Adopt the event log as the source of truth",
        "After the talk we agreed to use gRPC",
        "Shall we move to a monorepo?",
        "The design decision is recorded in ADR 7",
        "Should the client choose its own ids?",
        "Thanks, both. We chose Kafka.",
        "Design the storage layer around one journal",
        "The decision about the architecture is final",
        "The long-term architecture has three layers",
    ],
)
def test_a_decision_about_architecture_is_a(text: str) -> None:
    assert tier(text) == "A"


@pytest.mark.parametrize(
    "text",
    [
        "What do you think about the architecture?",
        "What do you think of what I implemented?",
        "Should we meet again tomorrow?",
        "Do you agree with the plan?",
        "Let us discuss the database",
        "I disagree, the cache is too small",
        "How about a second opinion?",
        "Summarize what each of you found",
        "There is no consensus yet",
        "Please review the proposal",
        "Any thoughts?",
        "Sounds good",
        "Compare Redis and Kafka for me",
        "Should we implement the cache now?",
    ],
)
def test_dialogue_and_synthesis_are_c(text: str) -> None:
    assert tier(text) == "C"


@pytest.mark.parametrize(
    "text",
    [
        "Create the ACE definitions file",
        "Create the ACE definitions file per the framework",
        "Configure ZMQ sockets",
        "Implement the design decision of yesterday",
        "I have implemented the parser",
        "We are building the index",
        "Can you fix the broken link?",
        "Here is the summary of our discussion",
        "Delivered the review notes",
        "Deploy the strategy service",
        "Done: the architecture page is online",
        "The review is finished and the branch is merged",
        "Thanks. Now run the benchmark again.",
        "please update the changelog",
        "I am going to implement the new architecture",
        "Tests passed on all machines",
    ],
)
def test_carrying_out_and_delivering_are_e(text: str) -> None:
    assert tier(text) == "E"


@pytest.mark.parametrize(
    "text",
    ["", "Hello there", "ok, thanks", "42", "The weather is fine", "🙂", "Good morning, Bob"],
)
def test_what_says_nothing_has_no_tier_and_no_domain(text: str) -> None:
    found = enrichment(text, STANDARD)
    assert (found["ace_tier"], found["chain_type"], found["shl_tags"]) == ("none", "none", [])


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("this is important", "none"),
        ("a nice melody", "none"),
        ("build the latest guide", "none"),
        ("import the mesh into Unity", "unity_integration"),
        ("ONE TEST", "testing_validation"),
        ("all tests", "testing_validation"),
        ("two databases and their indices", "data_management"),
        ("our strategies", "system_architecture"),
        ("the f1-score", "quality_assessment"),
        ("a 3D  model", "reconstruction"),
        ("the model of 3d", "none"),
        ("user_interface", "none"),  # one word of another kind
    ],
)
def test_a_domain_is_told_by_whole_words(text: str, domain: str) -> None:
    assert chain(text) == domain


def test_the_domain_with_the_most_terms_wins_and_of_equal_ones_the_first_in_the_file() -> None:
    assert chain("a test of the database and the cache") == "data_management"
    assert chain("a test of the database") == "data_management"
    assert chain("test test test, database and cache") == "data_management"


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("It is ready.", ["@Status-Ready"]),
        ("It is not ready", []),
        ("blocked by an error", ["@Status-Blocked"]),
        ("no problem at all", []),
        ("approved", ["@Status-Ready", "@Decision-Made"]),
        ("Why?", ["@Question-Open"]),
        ("see http://example.org/?page=2", []),
        ("the file which I wrote", []),
        ("Which file?", ["@Question-Open"]),
        ("TODO: a test", ["@Action-Required", "@Chain-testing_validation"]),
    ],
)
def test_tags_come_in_the_order_of_the_file(text: str, tags: list[str]) -> None:
    assert enrichment(text, STANDARD)["shl_tags"] == tags


def test_keywords_are_the_most_frequent_words_of_the_text() -> None:
    found = enrichment(
        "The lease of the task: renew the lease, 2026 times, or lose the task", STANDARD
    )
    assert found["keywords"] == ["lease", "task", "renew", "times", "lose"]
    assert (
        len(enrichment(" ".join("abcd" + c for c in "abcdefghijklm"), STANDARD)["keywords"]) == 10
    )


def test_counts_and_the_hash_are_of_the_text() -> None:
    found = enrichment("Two  Words\n", STANDARD)
    assert (found["word_count"], found["char_count"]) == (2, 11)
    assert found["content_hash"] == hashlib.sha256(b"two words").hexdigest()[:32]
    assert found["content_hash"] == enrichment("two words", STANDARD)["content_hash"]


def test_a_record_gets_what_it_lacks_in_a_fixed_order() -> None:
    record = {"Message": "Fix the cache", "Metadata": {"mine": 1}}
    enrich(record, STANDARD)
    assert list(record["Metadata"]) == [
        "mine",
        "chain_type",
        "ace_tier",
        "shl_tags",
        "keywords",
        "word_count",
        "char_count",
        "content_hash",
    ]


def test_what_a_record_carries_is_never_replaced() -> None:
    record = {
        "Message": "Fix the cache",
        "Metadata": {"chain_type": "mine", "shl_tags": [], "keywords": None},
        "ace_tier": "C",
        "chain_type": "other",
    }
    enrich(record, STANDARD)
    metadata = record["Metadata"]
    assert isinstance(metadata, dict)
    assert (metadata["chain_type"], metadata["ace_tier"]) == ("mine", "C")
    assert metadata["shl_tags"] == []
    assert metadata["keywords"] == ["fix", "cache"]
    assert (record["chain_type"], record["ace_tier"]) == ("other", "C")


def test_the_tag_of_the_domain_follows_a_domain_that_is_carried() -> None:
    record = {"Message": "hello", "Metadata": None, "chain_type": "mine"}
    enrich(record, STANDARD)
    assert record["Metadata"]["shl_tags"] == ["@Chain-mine"]  # type: ignore[index]


def test_metadata_that_is_no_object_is_kept() -> None:
    record = {"Message": "hello", "Metadata": "v1"}
    enrich(record, STANDARD)
    assert record["Metadata"]["original"] == "v1"  # type: ignore[index]


@given(st.text(), st.text(max_size=20))
def test_any_text_is_enriched_once_and_for_all(text: str, role: str) -> None:
    for name in ("standard", "legacy", "legacy-broker"):
        rules = Rules.load(name)
        record = {"Message": text, "SpeakerRole": role, "Metadata": {}}
        enrich(record, rules)
        first = copy.deepcopy(record)
        enrich(record, rules)
        enrich(record, STANDARD if name != "legacy" else rules)
        assert record == first
        if name != "legacy":
            assert record["Metadata"].keys() == set(ENRICHED)  # type: ignore[attr-defined]


@given(st.text())
def test_a_text_of_ascii_and_any_other_are_cut_into_the_same_words(text: str) -> None:
    ascii_only = text.encode("ascii", "ignore").decode()
    with_other = ascii_only + " é"
    assert (
        enrichment(with_other, STANDARD)["keywords"] == enrichment(ascii_only, STANDARD)["keywords"]
    )


def test_what_stands_in_the_place_of_a_secret_says_nothing() -> None:
    found = enrichment("deploy with [redacted:github_token] now", STANDARD)
    assert found["keywords"] == ["deploy"]
    assert found["chain_type"] == "none"  # a token is no matter of tokens


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("The token of the login has expired.", "none"),
        ("Refresh tokens belong in a secret store.", "data_management"),
        ("The prompt takes 900 tokens, over the budget.", "token_optimization"),
        ("How many tokens is that?", "token_optimization"),
    ],
)
def test_a_token_of_security_is_no_token_of_a_model(text: str, chain: str) -> None:
    found = enrichment(text, STANDARD)["chain_type"]
    assert (found == "token_optimization") == (chain == "token_optimization")


@pytest.mark.parametrize("role", ["Tool", "System", "Notification", "Command", "Prompt"])
def test_what_nobody_said_means_nothing(role: str) -> None:
    text = "Decided: the database design is done."
    found = enrichment(text, STANDARD, role=role)
    assert (found["chain_type"], found["ace_tier"], found["shl_tags"]) == ("none", "none", [])
    assert (found["keywords"], found["word_count"]) == ([], 6)
    assert enrichment(text, STANDARD, role="Agent")["ace_tier"] == "A"
