"""The rules of the first recorder, to the letter."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from agent_state_integrations.recorder.enrichment import enrichment
from agent_state_integrations.recorder.rules import Rules

DAEMON = Rules.load("legacy")
BROKER = Rules.load("legacy-broker")


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("this is important", "unity_integration"),
        ("a nice melody", "unity_integration"),
        ("build the latest guide", "ui_ux"),
        ("hello", "system_architecture"),
        ("", "system_architecture"),
        ("photo of a mesh", "photo_capture"),  # a tie: the order of the rules
        ("the test of the database cache", "data_management"),
        ("F1 SCORE", "quality_assessment"),
        ("cache cache test", "data_management"),  # each word counts once
    ],
)
def test_a_domain_is_told_by_letters_wherever_they_stand(text: str, domain: str) -> None:
    assert enrichment(text, DAEMON)["chain_type"] == domain


@pytest.mark.parametrize(
    ("word", "daemon", "broker"),
    [
        ("training", "system_architecture", "reconstruction"),
        ("validation", "testing_validation", "quality_assessment"),
        ("material", "system_architecture", "unity_integration"),
        ("budget", "system_architecture", "token_optimization"),
        ("sync", "system_architecture", "agent_collaboration"),
        ("index", "system_architecture", "data_management"),
        ("interaction", "system_architecture", "ui_ux"),
        ("metrics", "system_architecture", "testing_validation"),
    ],
)
def test_the_broker_knows_more_words(word: str, daemon: str, broker: str) -> None:
    assert enrichment(word, DAEMON)["chain_type"] == daemon
    assert enrichment(word, BROKER)["chain_type"] == broker


@pytest.mark.parametrize(
    ("text", "daemon", "broker"),
    [
        ("Create the file per the framework", "A", "A"),
        ("a Strategy", "A", "A"),
        ("design", "E", "E"),
        ("Should we go?", "C", "C"),
        ("should we change the architecture", "A", "A"),
        ("what do you think", "C", "C"),
        ("CONSENSUS", "C", "C"),
        ("a long-term plan", "E", "A"),
        ("review needed", "E", "C"),
        ("hello", "E", "E"),
    ],
)
def test_the_tier_is_told_by_letters(text: str, daemon: str, broker: str) -> None:
    assert enrichment(text, DAEMON)["ace_tier"] == daemon
    assert enrichment(text, BROKER)["ace_tier"] == broker


def test_what_an_architect_says_to_the_broker_is_architecture() -> None:
    assert enrichment("hello", BROKER, role="Lead Architect")["ace_tier"] == "A"
    assert enrichment("hello", DAEMON, role="Lead Architect")["ace_tier"] == "E"


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("ready", ["@Status-Ready"]),
        ("already", []),
        ("Done, approved", ["@Status-Ready", "@Decision-Made"]),
        ("waiting", ["@Status-Blocked"]),
        ("really?", ["@Question-Open"]),
        ("the file whichever", ["@Question-Open"]),
        ("TODO", ["@Action-Required"]),
        ("builds", []),
        ("decided: build it; any problem?", [
            "@Status-Blocked", "@Decision-Made", "@Question-Open", "@Action-Required",
        ]),
    ],
)  # fmt: skip
def test_tags_are_given_by_regular_expressions_and_always_one_for_the_domain(
    text: str, tags: list[str]
) -> None:
    for rules in (DAEMON, BROKER):
        found = enrichment(text, rules)
        assert found["shl_tags"] == [*tags, f"@Chain-{found['chain_type']}"]


def test_the_daemon_hashes_the_raw_text_and_the_broker_what_case_and_spaces_leave() -> None:
    text = "  Two  Words\n"
    assert enrichment(text, DAEMON)["content_hash"] == hashlib.md5(text.encode()).hexdigest()
    assert enrichment(text, BROKER)["content_hash"] == hashlib.md5(b"two words").hexdigest()


def test_only_the_broker_tells_keywords_ten_at_most_in_the_order_of_the_alphabet() -> None:
    text = "photo image camera capture upload scan nerf gaussian mesh quality accuracy unity"
    assert "keywords" not in enrichment(text, DAEMON)
    assert enrichment(text, BROKER)["keywords"] == [
        "accuracy", "camera", "capture", "gaussian", "image", "mesh", "nerf", "photo", "quality",
        "scan",
    ]  # fmt: skip


def test_the_order_is_the_same_in_every_process() -> None:
    program = (
        "from agent_state_integrations.recorder.rules import Rules\n"
        "from agent_state_integrations.recorder.enrichment import enrichment\n"
        "for name in ('legacy', 'legacy-broker', 'standard'):\n"
        "    print(enrichment('Approved? No problem: build the test of the database', "
        "Rules.load(name)))\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(said) == 1
