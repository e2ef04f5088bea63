"""Rules are data: a file that is checked as a whole."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent_state.errors import StateValidationError, StorageError
from agent_state_integrations.recorder import rules as rules_module
from agent_state_integrations.recorder.enrichment import enrichment
from agent_state_integrations.recorder.rules import RULESETS, Rules, rules_of

FOLDER = Path(rules_module.__file__).parent / "rulesets"
MINE = """
name = "mine"
matching = "words"
[chains]
default = "other"
[chains.words]
cooking = ["soup", "pan"]
[tiers]
default = "E"
[tags]
[[tags.rules]]
tag = "@Hot"
any = ["hot"]
[keywords]
source = "none"
[hash]
algorithm = "sha1"
text = "raw"
"""


@pytest.mark.parametrize("name", RULESETS)
def test_shipped_rules_are_files_beside_the_code(name: str) -> None:
    assert Rules.load(name).name == name
    assert Rules.load(FOLDER / f"{name}.toml").name == name


def test_a_user_brings_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    found = enrichment("A hot soup, two pans", Rules.load(path))
    assert found["chain_type"] == "cooking"
    assert found["shl_tags"] == ["@Hot"]
    assert found["ace_tier"] == "E"
    assert enrichment("pans", Rules.load(str(path)))["chain_type"] == "other"  # no plurals asked
    assert len(str(found["content_hash"])) == 40


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"matching": "letters"}, "matching: Input should be 'words' or 'substrings'"),
        ({"name": None}, "name: Input should be a valid string"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"plurals": "yes"}, "plurals: Input should be a valid boolean"),
        ({"matching": "substrings", "plurals": True}, "plurals: only for"),
        ({"chains.words.cooking": "soup"}, "chains.words.cooking: Input should be a valid tuple"),
        ({"chains.words.cooking": [1]}, "chains.words.cooking[1]: Input should be a valid string"),
        ({"chains.words.cooking": ["!"]}, "chains.words.cooking[1]: '!' has no letters"),
        ({"chains.default": ""}, "chains.default: String should have at least 1 char"),
        ({"chains": []}, "chains: Input should be a valid dictionary"),
        ({"tiers.rules": [{"tier": "A"}]}, "tiers.rules[1]: any: the rule has no condition"),
        ({"tiers.rules": [{"any": ["x"]}]}, "tiers.rules[1].tier: Field required"),
        ({"tiers.rules": {"tier": "A"}}, "tiers.rules: Input should be a valid tuple"),
        ({"tiers.rules": [{"tier": "A", "pattern": "x"}]}, "tiers.rules[1].pattern: Unexpected"),
        ({"tags.rules": [{"tag": "@T", "pattern": "("}]}, "tags.rules[1].pattern: not a regular"),
        (
            {"matching": "substrings", "tags.rules": [{"tag": "@T", "lead": ["x"]}]},
            "tags.rules[1]: lead: only for",
        ),
        ({"keywords.limit": 0}, "keywords.limit: Input should be greater"),
        ({"keywords.limit": True}, "keywords.limit: Input should be a valid integer"),
        ({"keywords.words": []}, "keywords.words: Unexpected keyword argument"),
        ({"hash.algorithm": "crc"}, "hash.algorithm: Input should be 'md5', 'sha1' or 'sha256'"),
        ({"hash.length": 41}, "hash: length: sha1 has 40 digits"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_file(change: dict[str, Any], where: str) -> None:
    content: dict[str, Any] = copy.deepcopy(tomllib.loads(MINE))
    for name, value in change.items():
        *parents, key = name.split(".")
        table = content
        for parent in parents:
            table = table[parent]
        table[key] = value
    with pytest.raises(StateValidationError) as caught:
        rules_of(content, "mine.toml")
    assert str(caught.value).startswith(where)
    assert caught.value.path == "mine.toml"


def test_a_file_that_is_no_toml_or_no_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(StorageError, match=r"mine\.toml"):
        Rules.load(path)
    path.write_text("name = ")
    with pytest.raises(StateValidationError, match=r"not TOML.*mine\.toml"):
        Rules.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(StateValidationError, match=r"not TOML"):
        Rules.load(path)
    with pytest.raises(StateValidationError, match="there are standard, legacy, legacy-broker"):
        Rules.load("strict")
