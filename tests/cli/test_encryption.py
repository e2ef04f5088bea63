"""The command line on an encrypted directory: reading it with its keys, and giving it new ones."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from agent_state import StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys, generate_master_key
from agent_state.errors import EncryptionKeyError
from tests.cli.commands import Call, Called, assert_one_line_of_error

T = TypeVar("T")
KEYS = ("--keyring", "keys", "--master-keys", "masters")


@pytest.fixture
def masters(state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the master keys, beside the plain directory ``state``."""
    monkeypatch.chdir(state.parent)
    for name in ("DIR", "KEYRING", "MASTER_KEYS", "MASTER_KEYS_FILE"):
        monkeypatch.delenv(f"AGENT_STATE_{name}", raising=False)
    file = state.parent / "masters"
    file.touch(0o600)
    file.write_text(generate_master_key())
    return file


@pytest.fixture
def sealed(masters: Path, call: Call) -> Path:
    """``masters``, and the directory beside it is encrypted."""
    assert call(*KEYS, "rekey").code == 0
    return masters


def keyring(masters: Path) -> Keyring:
    return Keyring(masters.parent / "keys", MasterKeys.from_file(masters))


def do(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def everything(root: Path, encryption: Keyring | None) -> list[Any]:
    async with StatePersistenceManager(root, encryption=encryption) as manager:
        kinds = ("agents", "tasks", "mail", "sleep")
        found: list[Any] = [await _sorted(manager, kind) for kind in kinds]
        return [*found, [entry async for entry in manager.read_log("system", "events")]]


async def _sorted(manager: StatePersistenceManager, kind: str) -> list[Any]:
    return sorted([each async for each in manager.scan(kind)], key=lambda each: each.key)


def state_files(masters: Path) -> dict[str, bytes]:
    root = masters.parent / "state"
    working = {".locks", ".gitignore"}
    found = (each for each in root.rglob("*") if each.is_file() and not working & {*each.parts})
    return {str(each.relative_to(root)): each.read_bytes() for each in found}


def having(masters: Path, words: bytes) -> list[str]:
    return [name for name, data in state_files(masters).items() if words in data]


def test_a_plain_directory_is_encrypted_and_decrypted_again(masters: Path, call: Call) -> None:
    root = masters.parent / "state"

    async def again() -> None:
        async with StatePersistenceManager(root) as manager:
            alice = {"agent_id": "alice", "agent_type": "researcher", "status": "active"}
            await manager.save_agent_state("alice", alice)

    do(again())
    before = do(everything(root, None))
    assert any(name.startswith(".snapshots/") for name in having(masters, b"researcher"))

    done = call(*KEYS, "rekey", "--json").json()
    assert (done["documents"], done["records"]) == (8, 30)
    assert having(masters, b"researcher") == having(masters, b'"number"') == []
    done = call(*KEYS, "rekey", "--json").json()
    assert (done["documents"], done["records"]) == (0, 0), "there was nothing left to do"
    assert do(everything(root, keyring(masters))) == before

    done = call(*KEYS, "rekey", "--decrypt", "--json").json()
    assert (done["documents"], done["records"]) == (8, 30)
    assert having(masters, b'"_sealed"') == []
    assert do(everything(root, None)) == before


def test_every_command_works_with_the_key(sealed: Path, call: Call) -> None:
    assert "researcher" in call(*KEYS, "ls").out
    shown = call(*KEYS, "show", "alice", "--json").json()
    assert shown["agent"]["state"]["agent_type"] == "researcher"
    assert call(*KEYS, "show", "system/events", "--json").json()["records"][-1]["record"] == {
        "number": 29
    }
    assert call(*KEYS, "tasks", "ls", "--json").json()
    verified = call(*KEYS, "verify", "--json").json()
    assert (verified["ok"], verified["notices"]) == (True, [])
    assert call(*KEYS, "restore").code == 0
    assert call(*KEYS, "cleanup", "--max-age-hours", "0").code == 0
    assert call(*KEYS, "tasks", "retry", "alice/t2").code in (0, 1)
    assert having(sealed, b"researcher") == []


@pytest.mark.parametrize(
    "words",
    [["ls"], ["show", "alice"], ["rekey"], ["cleanup"], ["restore"], ["tasks", "ls"]],
    ids=" ".join,
)
def test_without_the_key_a_command_says_so_and_changes_nothing(
    sealed: Path, call: Call, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_files(sealed)
    assert_one_line_of_error(without := call(*words))
    assert without.code == 2
    assert "encrypted" in without.err or "keyring" in without.err

    monkeypatch.setenv("AGENT_STATE_KEYRING", "keys")
    monkeypatch.setenv("AGENT_STATE_MASTER_KEYS", generate_master_key())
    wrong: Called = call(*words)
    assert_one_line_of_error(wrong, "master key")
    assert wrong.code == 2
    assert state_files(sealed) == before

    monkeypatch.setenv("AGENT_STATE_MASTER_KEYS", sealed.read_text())
    assert call(*words).code == 0


def test_verify_tells_what_it_could_not_look_into(sealed: Path, call: Call) -> None:
    verified = call("verify", "--json").json()
    assert verified["ok"]
    [notice] = verified["notices"]
    assert notice["fault"] == "encrypted"
    assert "8 documents" in notice["why"]


def test_verify_finds_damage_below_the_encryption(sealed: Path, call: Call) -> None:
    root = sealed.parent / "state"
    for path in (root / "agents/alice.json", root / "system/events.jsonl"):
        data = path.read_bytes()
        at = data.rindex(b'"_sealed"') + 60
        path.write_bytes(data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :])
    assert {each["fault"] for each in call("verify", "--json").json()["problems"]} == set()
    verified = call(*KEYS, "verify", "--json").json()
    assert [(each["path"], each["fault"]) for each in verified["problems"]] == [
        ("agents/alice.json", "damaged"),
        ("system/events.jsonl", "damaged"),
    ]


def test_new_data_keys_seal_everything_anew(sealed: Path, call: Call) -> None:
    root = sealed.parent / "state"
    before = do(everything(root, keyring(sealed)))
    former = {ident for owner in keyring(sealed).owners() for ident in owner.keys}
    done = call(*KEYS, "rekey", "--new-data-keys", "--json").json()
    assert (done["new_data_keys"], done["documents"], done["records"]) == (3, 8, 30)
    found = {name for ident in former for name in having(sealed, ident.encode())}
    assert found == {"system/encryption.json"}, "it names the keyring by its first key"
    assert do(everything(root, keyring(sealed))) == before


def test_a_new_master_key_is_taken_while_a_server_runs(sealed: Path, call: Call) -> None:
    root, former = sealed.parent / "state", sealed.read_text()

    async def serve() -> None:
        async with StatePersistenceManager(root, exclusive=True, encryption=keyring(sealed)):
            sealed.write_text(f"{generate_master_key()}\n{former}\n")
            assert "owns" in call(*KEYS, "rekey").err
            assert call(*KEYS, "rekey", "--keys-only").code == 0

    do(serve())
    sealed.write_text(sealed.read_text().splitlines()[0])
    assert do(everything(root, keyring(sealed)))[0]


def test_an_erased_owner_is_told_and_the_others_are_read(sealed: Path, call: Call) -> None:
    assert "1 data keys of alice erased" in call(*KEYS, "keys", "erase", "alice", "--yes").out
    assert "alice: erased" in call(*KEYS, "keys", "ls").out
    listed = call(*KEYS, "ls", "agents", "--json")
    assert [row["key"] for row in listed.json()["documents"]] == [["Bob"]]
    assert "erased" in listed.err + call(*KEYS, "ls", "agents").out + listed.out
    verified = call(*KEYS, "verify", "--json").json()
    assert verified["ok"]
    assert {each["fault"] for each in verified["notices"]} == {"erased"}
    assert call(*KEYS, "rekey", "--new-data-keys").code == 0
    assert "alice: erased" in call(*KEYS, "keys", "ls").out
    assert call(*KEYS, "keys", "renew", "alice").code == 0
    assert "alice: 1 of 2 keys" in call(*KEYS, "keys", "ls").out


def test_rekey_tells_damage_and_leaves_it(sealed: Path, call: Call) -> None:
    (sealed.parent / "state/agents/alice.json").write_text("{")
    called = call(*KEYS, "rekey", "--new-data-keys")
    assert called.code == 1
    assert "agents/alice" in called.out
    assert (sealed.parent / "state/agents/alice.json").read_text() == "{"


def test_rekey_with_another_keyring_is_refused(sealed: Path, call: Call) -> None:
    before = state_files(sealed)
    called = call("--keyring", "other", "--master-keys", "masters", "rekey")
    assert_one_line_of_error(called, "encrypted with keyring")
    assert state_files(sealed) == before
    with pytest.raises(EncryptionKeyError):
        do(everything(sealed.parent / "state", None))


@pytest.mark.parametrize(
    "words",
    [["ls"], ["keys", "ls"], ["keys", "erase", "alice", "--yes"], ["keys", "renew", "alice"],
     ["rekey", "--keys-only"], ["rekey"], ["verify"], ["tasks", "retry", "alice/t2"]],
    ids=" ".join,
)  # fmt: skip
def test_a_keyring_that_is_not_there_is_not_made(
    sealed: Path, call: Call, words: list[str]
) -> None:
    called = call("--keyring", "kyes", "--master-keys", "masters", *words)
    assert called.code == (1 if words == ["verify"] else 2)
    assert not (sealed.parent / "kyes").exists()


def test_an_owner_who_has_no_key_cannot_be_erased_in_silence(sealed: Path, call: Call) -> None:
    called = call(*KEYS, "keys", "erase", "alcie", "--yes")
    assert called.code == 1
    assert "did you mean 'alice'?" in called.err
    assert call(*KEYS, "keys", "erase", "alice", "--yes").code == 0
    assert call(*KEYS, "keys", "erase", "alice", "--yes").code == 0, "once more is no fault"


def test_what_a_dead_writer_left_half_written_is_not_left_readable(
    masters: Path, call: Call
) -> None:
    (masters.parent / "state/agents/.tmp-0123").write_text("researcher")
    called = call(*KEYS, "rekey", "--json").json()
    assert called["left"] == []
    assert having(masters, b"researcher") == []


@pytest.mark.parametrize("content", [bytes(range(128, 160)), b"", b"c2hvcnQ="])
def test_a_file_without_a_master_key_is_one_line_of_error(
    sealed: Path, call: Call, content: bytes
) -> None:
    sealed.write_bytes(content)
    called = call(*KEYS, "ls")
    assert_one_line_of_error(called, "master key")
    assert called.code == 2


def test_a_new_master_key_goes_to_a_file_that_others_cannot_read(sealed: Path, call: Call) -> None:
    file = sealed.parent / "more"
    assert call("keys", "new-master", "--out", str(file)).out == ""
    assert file.stat().st_mode & 0o777 == 0o600
    assert_one_line_of_error(call("keys", "new-master", "--out", str(file)), "more")
    assert call("--keyring", "new", "--master-keys", str(file), "rekey", "--decrypt").code == 2


def test_a_new_master_key_is_printed(call: Call) -> None:
    first, second = (call("keys", "new-master").out.strip() for _ in range(2))
    assert len(first) == len(second) == 44
    assert first != second
