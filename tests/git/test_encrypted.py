"""Encrypted documents in git: they are whole, and nobody takes them for fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys
from agent_state.errors import StateNotFoundError
from agent_state_integrations.git import GitRepository
from agent_state_integrations.git.forks import fork
from agent_state_integrations.git.history import blame, changes_between, in_words
from agent_state_integrations.git.merge_rules import merge
from agent_state_integrations.git.repository import GitError
from tests.git.repositories import Repository

PATH = "agents/alice.json"


async def save(repository: Repository, mood: str) -> str:
    keyring = Keyring(repository.root.parent / "keys", MasterKeys(lambda: [b"o" * 32]))
    async with StatePersistenceManager(repository.state, encryption=keyring) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": mood})
    return repository.commit(mood)


def sides(base: str | None, ours: str | None, theirs: str | None) -> tuple[bytes, bytes, bytes]:
    """Three versions of a document with this ciphertext; None for a plain one."""
    base_, ours_, theirs_ = (
        json.dumps({"_revision": 3, **({"_sealed": text} if text else {"mood": "good"})}).encode()
        for text in (base, ours, theirs)
    )
    return base_, ours_, theirs_


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "taken"),
    [("a", "b", "a", "b"), ("a", "a", "b", "b"), (None, "b", None, "b"), ("a", "b", "b", "b")],
)
def test_what_one_side_changed_is_taken(
    base: str | None, ours: str, theirs: str, taken: str
) -> None:
    outcome = merge(PATH, *sides(base, ours, theirs))
    assert not outcome.conflicts
    assert json.loads(outcome.data)["_sealed"] == taken


def test_no_field_is_added_to_an_encrypted_document() -> None:
    base, ours, _ = sides(None, "b", None)
    outcome = merge(PATH, base, ours, b'{"_revision": 3, "mood": "good", "note": "n"}')
    assert outcome.conflicts == ["it is encrypted, and changed on both sides"]
    assert json.loads(outcome.data).keys() - {"_revision", "_checksum"} == {"_sealed"}
    assert merge(PATH, *sides("a", "b", "c")).conflicts == outcome.conflicts


async def test_the_past_of_an_encrypted_agent_says_so(repository: Repository) -> None:
    first = await save(repository, "good")
    second = await save(repository, "bad")
    git = GitRepository(repository.state)
    words = in_words(changes_between(git, first, second))
    assert words["alice"].startswith("encrypted ")
    assert "v1." not in words["alice"]
    with pytest.raises(StateNotFoundError, match="is encrypted"):
        blame(git, "alice", "mood")


async def test_an_encrypted_agent_is_not_forked_into_one_that_no_key_opens(
    repository: Repository, tmp_path: Path
) -> None:
    await save(repository, "good")
    with pytest.raises(GitError, match="encrypted"):
        fork(GitRepository(repository.state), "trial", ["alice"])
    assert "trial" not in repository.git("branch", "--list")
