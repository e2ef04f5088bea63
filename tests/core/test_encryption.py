"""Encryption at rest: what is on the disk, whose keys open it, what an erased key takes along."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StateCorruptedError,
    StatePersistenceManager,
    StateValidationError,
    Task,
    TaskContext,
)
from agent_state import encryption as module
from agent_state.encryption import Keyring, MasterKeys, generate_master_key, parse_master_keys
from agent_state.errors import EncryptionKeyError, ErasedKeyError
from agent_state.storage import WALStateStore
from agent_state.testing import Crash, FaultyDisk
from agent_state.verify import verify

OLD, NEW = b"o" * 32, b"n" * 32
SECRET = "Rumpelstilzchen"
KINDS = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])


def ring(folder: Path, *masters: bytes, **options: Any) -> Keyring:
    return Keyring(folder / "keys", MasterKeys(lambda: masters or (OLD,)), **options)


def files(root: Path) -> dict[str, bytes]:
    """The bytes of every file, hidden ones included; locks hold nothing of anybody's."""
    found = (path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def readable(root: Path) -> list[str]:
    return [name for name, data in files(root).items() if SECRET.encode() in data]


def agent(name: str, **more: Any) -> dict[str, Any]:
    return {"agent_id": name, "context": {"secret": SECRET}, **more}


async def fill(manager: StatePersistenceManager, name: str) -> None:
    await manager.save_agent_state(name, agent(name))
    async with manager.group() as group:
        group.save("tasks", (name, "t1"), {"task_id": "t1", "agent_id": name, "note": SECRET})
        group.append("notes", name, {"text": SECRET}, dedupe_key="d1")
    await manager.append("notes", name, {"text": SECRET})


async def texts(manager: StatePersistenceManager, name: str) -> list[str]:
    return [entry.record["text"] async for entry in manager.read_log("notes", name)]


@pytest.fixture
def fresh_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyring looks at its files each time, and not at most once a second."""
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.05)


@KINDS
async def test_nothing_that_was_saved_is_readable_in_any_file(
    tmp_path: Path, exclusive: bool
) -> None:
    root = tmp_path / "state"
    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(root, **options) as manager:
        await fill(manager, "alice")
        assert readable(root) == []  # the journal has it, the files not yet
        await manager.flush()
        await manager.save_agent_state("alice", agent("alice", status="active"))
        await manager.flush()
        (root / "tasks/alice/t1.json").write_text('{"task_id": "t1", ')
        with contextlib.suppress(StateCorruptedError):
            await manager.load("tasks", ("alice", "t1"))
    found = files(root)
    assert readable(root) == []
    assert {name.partition("/")[0] for name in found} >= {".snapshots", ".quarantine", "agents"}
    document = orjson.loads(found["agents/alice.json"])
    assert document.pop("_sealed")
    assert sorted(document) == ["_checksum", "_revision", "_saved_at", "_schema", "_session_id"]


@KINDS
async def test_what_was_saved_comes_back(tmp_path: Path, exclusive: bool) -> None:
    for _ in range(2):
        options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
        async with StatePersistenceManager(tmp_path / "state", **options) as manager:
            await fill(manager, "alice")
            loaded = await manager.load_with_revision("agents", "alice")
            assert loaded is not None
            assert loaded.state.model_dump()["context"] == {"secret": SECRET}
            assert loaded.revision == 1, "a save that changes nothing writes nothing"
            assert (await manager.load("tasks", ("alice", "t1"))) is not None
            assert [found.key async for found in manager.scan("agents")] == [("alice",)]
    assert (await verify(tmp_path / "state", encryption=ring(tmp_path))).ok


async def test_equal_records_of_a_log_do_not_look_equal(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path / "state", encryption=ring(tmp_path)) as manager:
        for _ in range(3):
            await manager.append("notes", "alice", {"text": SECRET})
        assert await texts(manager, "alice") == [SECRET] * 3
    lines = (tmp_path / "state/notes/alice.jsonl").read_bytes().splitlines()
    assert len({orjson.loads(line)["_sealed"] for line in lines}) == 3


async def test_a_killed_server_finds_everything_again(tmp_path: Path) -> None:
    root = tmp_path / "state"
    store = WALStateStore(root)
    manager = StatePersistenceManager(store=store, encryption=ring(tmp_path))
    with FaultyDisk() as disk:
        await manager.open()
        await store._writing().stop()
        await fill(manager, "alice")
        disk.crash()
        with contextlib.suppress(Crash):
            await manager.close()
    assert not (root / "agents/alice.json").exists()
    async with StatePersistenceManager(root, exclusive=True, encryption=ring(tmp_path)) as again:
        assert (await again.load_agent_state("alice")) is not None
        assert await texts(again, "alice") == [SECRET] * 2


# -- wrong and missing keys ----------------------------------------------------------------------


def _other_keyring(folder: Path) -> Keyring:
    return Keyring(folder / "other keys", MasterKeys(lambda: [OLD]))


def _other_master(folder: Path) -> Keyring:
    return ring(folder, NEW)


def _no_master(folder: Path) -> Keyring:
    return Keyring(folder / "keys", MasterKeys.from_environment("NO_SUCH_VARIABLE"))


def _no_file(folder: Path) -> Keyring:
    return Keyring(folder / "keys", MasterKeys.from_file(folder / "missing"))


def _none(_: Path) -> None:
    return None


@KINDS
@pytest.mark.parametrize("given", [_other_keyring, _other_master, _no_master, _no_file, _none])
async def test_a_wrong_key_is_refused_and_changes_nothing(
    tmp_path: Path, exclusive: bool, given: Callable[[Path], Keyring | None]
) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await fill(manager, "alice")
    before = files(root)

    for _ in range(2):
        wrong = StatePersistenceManager(root, exclusive=exclusive, encryption=given(tmp_path))
        with pytest.raises(EncryptionKeyError):
            await wrong.open()
        with pytest.raises(EncryptionKeyError):
            async with AsyncAgentSessionManager(root, encryption=given(tmp_path)):
                pass
    assert files(root) == before

    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(root, **options) as manager:
        assert (await manager.load_agent_state("alice")) is not None
        assert await texts(manager, "alice") == [SECRET] * 2
        assert manager.incidents() == []


async def test_a_lost_data_key_is_an_error_and_no_damage(
    tmp_path: Path, fresh_at_once: None
) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await fill(manager, "alice")
        await fill(manager, "bob")
    lost = tmp_path / "keys/owners/alice.json"
    lost.rename(tmp_path / "alice.json")
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        for read in (manager.load("agents", "alice"), manager.load("tasks", ("alice", "t1"))):
            with pytest.raises(EncryptionKeyError, match="lacks"):
                await read
        with pytest.raises(EncryptionKeyError):
            await texts(manager, "alice")
        with pytest.raises(EncryptionKeyError):
            assert [found async for found in manager.scan("agents")]
        assert (await manager.load_agent_state("bob")) is not None
        (tmp_path / "alice.json").rename(lost)
        await asyncio.sleep(0.06)
        assert (await manager.load_agent_state("alice")) is not None
        assert manager.incidents() == []
    kept = {name for name in files(root) if name.startswith(".quarantine/")}
    assert kept <= {".quarantine/.gitignore"}


async def test_encrypted_content_is_not_taken_for_a_state_by_a_reader_without_keys(
    tmp_path: Path,
) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await fill(manager, "alice")
    (root / "system/encryption.json").unlink()  # as in a copy of a part
    before = files(root)
    async with StatePersistenceManager(root) as manager:
        with pytest.raises(EncryptionKeyError):
            await manager.load_agent_state("alice")
        with pytest.raises(EncryptionKeyError):
            await texts(manager, "alice")
    assert files(root) == before
    report = await verify(root)
    assert report.ok
    assert [each.fault for each in report.notices] == ["encrypted"]


async def test_a_state_may_not_look_encrypted(tmp_path: Path) -> None:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        with pytest.raises(StateValidationError, match="_sealed"):
            await manager.save("notes", "n", {"_sealed": "v1.x"})
        with pytest.raises(StateValidationError, match="_sealed"):
            await manager.append("notes", "n", {"_sealed": "v1.x"})


@pytest.mark.parametrize("folder", ["keys", "deep/er", ""])
def test_keys_in_the_state_directory_are_refused(tmp_path: Path, folder: str) -> None:
    keyring = Keyring(tmp_path / folder, MasterKeys(lambda: [OLD]))
    with pytest.raises(ValueError, match="may not be in the state directory"):
        StatePersistenceManager(tmp_path, encryption=keyring)


# -- damage --------------------------------------------------------------------------------------


@KINDS
async def test_damaged_ciphertext_is_quarantined_and_the_version_before_it_is_used(
    tmp_path: Path, exclusive: bool
) -> None:
    root, path = tmp_path / "state", tmp_path / "state/notes/n.json"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        for number in (1, 2):
            await manager.save("notes", "n", {"n": number})
            await manager.append("notes", "n", {"n": number})
    for file in (path, path.with_suffix(".jsonl")):
        data = file.read_bytes()
        at = data.index(b'"_sealed"') + 60
        file.write_bytes(data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :])

    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(root, **options) as manager:
        assert (await manager.load("notes", "n")).model_dump() == {"n": 1}  # type: ignore[union-attr]
        assert [entry.record["n"] async for entry in manager.read_log("notes", "n")] == [2]
        assert sorted(each.restored for each in manager.incidents()) == [False, True]


async def test_content_that_was_moved_to_another_place_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await manager.save("notes", ("alice", "one"), {"n": 1})
        await manager.save("notes", ("bob", "one"), {"n": 1})
        shutil.copy(root / "notes/alice/one.json", root / "notes/alice/two.json")
        shutil.copy(root / "notes/alice/one.json", root / "notes/bob/two.json")
        with pytest.raises(StateCorruptedError, match="another document's"):
            await manager.load("notes", ("alice", "two"))
        with pytest.raises(EncryptionKeyError):
            await manager.load("notes", ("bob", "two"))
    assert (root / "notes/bob/two.json").exists()


async def test_a_field_that_a_person_adds_to_an_encrypted_document_is_set_aside(
    tmp_path: Path,
) -> None:
    root, path = tmp_path / "state", tmp_path / "state/notes/n.json"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        for number in (1, 2):
            await manager.save("notes", "n", {"n": number})
        path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), "A": 1}))
        assert (await manager.load("notes", "n")).model_dump() == {"n": 2}  # type: ignore[union-attr]
    assert list((root / ".quarantine/notes").iterdir())


# -- plain content -------------------------------------------------------------------------------


@KINDS
async def test_a_directory_that_was_plain_opens_and_is_sealed_as_it_changes(
    tmp_path: Path, exclusive: bool
) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root) as manager:
        await fill(manager, "alice")
        await fill(manager, "bob")
    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(root, **options) as manager:
        assert await texts(manager, "alice") == [SECRET] * 2
        await manager.save_agent_state("alice", agent("alice", status="active"))
        (root / "mail/alice").mkdir(parents=True)
        (root / "mail/alice/m.json").write_text('{"from_agent": "a person", "subject": "hello"}')
        assert (await manager.load("mail", ("alice", "m"))).subject == "hello"  # type: ignore[union-attr]
    sealed = {name for name, data in files(root).items() if b'"_sealed"' in data}
    assert sealed == {"agents/alice.json"}


# -- erasing -------------------------------------------------------------------------------------


@KINDS
async def test_an_erased_key_takes_along_what_it_sealed_in_every_copy(
    tmp_path: Path, exclusive: bool, fresh_at_once: None
) -> None:
    root, backup = tmp_path / "state", tmp_path / "backup"
    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(root, **options) as manager:
        for name in ("alice", "bob"):
            await fill(manager, name)
        await manager.flush()
        shutil.copytree(root, backup, ignore=shutil.ignore_patterns(".locks"))

        assert ring(tmp_path).erase("alice") == 1
        await asyncio.sleep(0.06)

        for kind, key in (("agents", ("alice",)), ("tasks", ("alice", "t1"))):
            with pytest.raises(ErasedKeyError, match="erased at"):
                await manager.load(kind, key)
        with pytest.raises(ErasedKeyError):
            await manager.save_agent_state("alice", agent("alice", status="active"))
        assert [each.key async for each in manager.scan("agents")] == [("bob",)]
        assert await texts(manager, "alice") == []
        assert await texts(manager, "bob") == [SECRET] * 2

    for place in (root, backup):
        async with StatePersistenceManager(place, encryption=ring(tmp_path)) as manager:
            with pytest.raises(ErasedKeyError):
                await manager.load_agent_state("alice")
            assert (await manager.load_agent_state("bob")) is not None
        report = await verify(place, encryption=ring(tmp_path))
        assert report.ok
        assert {each.fault for each in report.notices} == {"erased"}

    async with AsyncAgentSessionManager(backup, encryption=ring(tmp_path)) as runtime:
        assert runtime.agents.list() == ["bob"]
    kept = b"".join(files(tmp_path / "keys").values())
    assert kept.count(b"mk1.") == 2, "bob's key, and the one that the kind system shares"


@KINDS
async def test_what_cleanup_archived_is_erased_with_its_agent(
    tmp_path: Path, exclusive: bool
) -> None:
    root = tmp_path / "state"
    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(root, **options) as manager:
        for name in ("ann@home", "bob"):
            await manager.save_agent_state(name, agent(name, status="stopped"))
            task = {"task_id": "t", "agent_id": name, "status": "completed", "note": SECRET}
            await manager.save("tasks", (name, "t"), task)
        report = await manager.cleanup_old_states(0)
    assert (len(report.agents), len(report.tasks)) == (2, 2)
    assert readable(root) == []

    ring(tmp_path).erase("ann@home")
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        archived = [
            entry.record["agent_id"] async for entry in manager.read_log("agents", "archive")
        ]
        assert archived == ["bob"]
        tasks = [e async for e in manager.read_log("tasks", ("ann@home", "archive"))]
        assert tasks == []
    assert (await verify(root, encryption=ring(tmp_path))).ok


async def test_an_owner_may_return_after_an_erasure_and_the_past_stays_erased(
    tmp_path: Path,
) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await fill(manager, "alice")
    keyring = ring(tmp_path)
    keyring.erase("alice")
    keyring.renew("alice")
    async with StatePersistenceManager(root, encryption=keyring) as manager:
        with pytest.raises(ErasedKeyError):
            await manager.load("tasks", ("alice", "t1"))
        await manager.save_agent_state("alice", {"agent_id": "alice", "status": "active"})
        assert (await manager.load_agent_state("alice")).status == "active"  # type: ignore[union-attr]
        await manager.append("notes", "alice", {"text": "new"})
        assert await texts(manager, "alice") == ["new"]
        assert await manager.erase("tasks", "alice") == 1
    found = {report.owner: (len(report.keys), len(report.erased)) for report in keyring.owners()}
    assert found == {"system": (1, 0), "alice": (1, 1)}


async def test_nobody_saves_for_an_owner_who_was_erased_before_having_a_key(
    tmp_path: Path,
) -> None:
    keyring = ring(tmp_path)
    assert keyring.erase("alice") == 0
    async with StatePersistenceManager(tmp_path / "state", encryption=keyring) as manager:
        with pytest.raises(ErasedKeyError):
            await fill(manager, "alice")


async def test_whose_key_seals_a_document_is_for_the_application_to_say(tmp_path: Path) -> None:
    def person(kind: str, key: tuple[str, ...]) -> str | None:
        return None if kind == "system" else key[0].partition(":")[0]

    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path, owner_of=person)) as manager:
        for session in ("ann:1", "ann:2", "ben:1"):
            await manager.save("talks", session, {"text": SECRET})
    keyring = ring(tmp_path, owner_of=person)
    keyring.erase("ann")
    async with StatePersistenceManager(root, encryption=keyring) as manager:
        assert [each.key async for each in manager.scan("talks")] == [("ben:1",)]


# -- rotation ------------------------------------------------------------------------------------


async def test_after_rewrapping_the_former_master_key_is_not_needed(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await fill(manager, "alice")
        await fill(manager, "Bob of Æ")
    before = files(root)
    assert ring(tmp_path, NEW, OLD).rewrap() == 3
    assert ring(tmp_path, NEW, OLD).rewrap() == 0
    assert files(root) == before
    async with StatePersistenceManager(root, encryption=ring(tmp_path, NEW)) as manager:
        assert await texts(manager, "Bob of Æ") == [SECRET] * 2
    with pytest.raises(EncryptionKeyError, match="is missing"):
        await StatePersistenceManager(root, encryption=ring(tmp_path, OLD)).open()


async def test_a_running_process_takes_a_new_master_key_from_its_file(
    tmp_path: Path, fresh_at_once: None
) -> None:
    file = tmp_path / "masters"
    first, second = generate_master_key(), generate_master_key()
    file.write_text(f"# the first\n{first}\n")
    keyring = Keyring(tmp_path / "keys", MasterKeys.from_file(file))
    async with StatePersistenceManager(tmp_path / "state", encryption=keyring) as manager:
        await fill(manager, "alice")
        file.write_text(f"{second}\n{first}\n")
        assert Keyring(tmp_path / "keys", MasterKeys.from_file(file)).rewrap() == 2
        await asyncio.sleep(0.06)
        assert (await manager.load_agent_state("alice")) is not None
        await fill(manager, "bob")
    file.write_text(second)
    again = Keyring(tmp_path / "keys", MasterKeys.from_file(file))
    async with StatePersistenceManager(tmp_path / "state", encryption=again) as manager:
        assert await texts(manager, "bob") == [SECRET] * 2


async def test_a_new_data_key_seals_and_the_former_one_still_opens(tmp_path: Path) -> None:
    root, keyring = tmp_path / "state", ring(tmp_path)
    async with StatePersistenceManager(root, encryption=keyring) as manager:
        await fill(manager, "alice")
        before = orjson.loads((root / "agents/alice.json").read_bytes())["_sealed"]
        ident = keyring.renew("alice")
        assert (await manager.load_agent_state("alice")) is not None
        await manager.append("notes", "alice", {"text": "new"})
        await manager.save_agent_state("alice", agent("alice", status="active"))
        after = orjson.loads((root / "agents/alice.json").read_bytes())["_sealed"]
        assert await texts(manager, "alice") == [SECRET, SECRET, "new"]
    assert before.split(".")[1] != ident == after.split(".")[1]


@pytest.mark.parametrize(
    "text", ["", "not base64!", "c2hvcnQ=", "ключ"], ids=["none", "words", "short", "no ASCII"]
)
def test_what_is_no_master_key_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(EncryptionKeyError):
        Keyring(tmp_path / "keys", MasterKeys(lambda: parse_master_keys(text))).prepare()


def _fail() -> list[bytes]:
    raise ConnectionError("the vault is sealed")


@pytest.mark.parametrize(
    "source", [_fail, lambda: None, lambda: OLD, lambda: ["o" * 32]], ids=["error", "", "one", "s"]
)
def test_a_source_of_keys_that_fails_is_an_error_of_the_keys(
    source: Callable[[], Any], tmp_path: Path
) -> None:
    with pytest.raises(EncryptionKeyError):
        Keyring(tmp_path / "keys", MasterKeys(source)).prepare()


def test_a_file_of_master_keys_may_have_a_byte_order_mark_and_comments(tmp_path: Path) -> None:
    text = f"  # the newest first\r\n {generate_master_key()}\r\n"
    (tmp_path / "masters").write_bytes(text.encode("utf-8-sig"))
    (tmp_path / "masters").chmod(0o600)
    assert Keyring(tmp_path / "keys", MasterKeys.from_file(tmp_path / "masters")).prepare()


@pytest.mark.parametrize(
    "data", [bytes(range(128, 160)), b"", None], ids=["raw", "empty", "folder"]
)
def test_a_file_that_holds_no_master_key_is_named(tmp_path: Path, data: bytes | None) -> None:
    file = tmp_path / "masters"
    file.mkdir() if data is None else file.write_bytes(data)
    keyring = Keyring(tmp_path / "keys", MasterKeys.from_file(file))
    with pytest.raises(EncryptionKeyError, match="masters"):
        keyring.prepare()
    assert not keyring.folder or not list((tmp_path / "keys").rglob("*.json"))


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_file_of_master_keys_that_everybody_can_read_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    (tmp_path / "masters").write_text(generate_master_key())
    (tmp_path / "masters").chmod(mode)
    master = MasterKeys.from_file(tmp_path / "masters")
    for name in ("one", "two"):
        Keyring(tmp_path / name, master).prepare()
    assert caplog.text.count("every user of this machine") == (mode == 0o644)


@KINDS
@pytest.mark.parametrize("damage", ["[]", '{"keys": {"ab": 5}, "erased": {}}', "folder", "symlink"])
async def test_a_damaged_file_of_keys_sets_no_document_aside(
    tmp_path: Path, damage: str, exclusive: bool
) -> None:
    root, file = tmp_path / "state", tmp_path / "keys/owners/alice.json"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await fill(manager, "alice")
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "symlink":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_text(damage)
    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(root, **options) as manager:
        with pytest.raises(EncryptionKeyError):
            await manager.load_agent_state("alice")
        with pytest.raises(EncryptionKeyError):
            await texts(manager, "alice")
        with pytest.raises(EncryptionKeyError):
            await manager.save_agent_state("alice", agent("alice", status="idle"))
        assert manager.incidents() == []
    file.rmdir() if damage == "folder" else file.unlink()
    file.write_bytes(whole)
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        assert (await manager.load_agent_state("alice")) is not None


async def test_a_keyring_is_made_by_who_seals_and_not_by_who_reads(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await fill(manager, "alice")
    with pytest.raises(EncryptionKeyError, match="has no keys"):
        await StatePersistenceManager(root, encryption=ring(tmp_path / "typo")).open()
    assert not (tmp_path / "typo").exists()


class _Service:
    """A stand-in for a key management service: it alone has the master key."""

    def __init__(self) -> None:
        self._keys = MasterKeys(lambda: [OLD])
        self.calls = 0

    def wrap(self, key: bytes, context: bytes) -> str:
        self.calls += 1
        return self._keys.wrap(key, context)

    def unwrap(self, wrapped: str, context: bytes) -> bytes:
        self.calls += 1
        return self._keys.unwrap(wrapped, context)

    def is_current(self, wrapped: str) -> bool:
        return True


async def test_a_key_service_is_asked_once_for_each_owner(tmp_path: Path) -> None:
    service = _Service()
    keyring = Keyring(tmp_path / "keys", service)
    async with StatePersistenceManager(tmp_path / "state", encryption=keyring) as manager:
        for _ in range(3):
            await fill(manager, "alice")
            await fill(manager, "bob")
    assert service.calls == 6, "wrapped and unwrapped: alice's, bob's, and that of system"


async def test_a_key_that_is_erased_right_after_a_look_is_noticed_by_the_next(
    tmp_path: Path, fresh_at_once: None
) -> None:
    """Two changes in one tick of the file system's clock leave the folder's time as it was."""
    keyring = ring(tmp_path)
    async with StatePersistenceManager(tmp_path / "state", encryption=keyring) as manager:
        await fill(manager, "alice")
        await fill(manager, "bob")
        await asyncio.sleep(0.06)
        assert (await manager.load_agent_state("bob")) is not None  # the look
        folder = tmp_path / "keys/owners"
        before = folder.stat()
        ring(tmp_path).erase("alice")
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
        await asyncio.sleep(0.06)
        with pytest.raises(ErasedKeyError):
            await manager.load_agent_state("alice")


# -- at once -------------------------------------------------------------------------------------

_MAKER = """
import asyncio, sys
from agent_state import StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys

async def main() -> None:
    keyring = Keyring(sys.argv[1] + "/keys", MasterKeys(lambda: [b"o" * 32]))
    async with StatePersistenceManager(sys.argv[1] + "/state", encryption=keyring) as manager:
        for number in range(20):
            await manager.append("notes", f"n{number}", {"by": sys.argv[2]})

asyncio.run(main())
"""


async def test_processes_that_make_the_same_keys_at_once_agree_on_them(tmp_path: Path) -> None:
    makers = [
        subprocess.Popen([sys.executable, "-c", _MAKER, str(tmp_path), str(number)])
        for number in range(3)
    ]
    assert [maker.wait(120) for maker in makers] == [0, 0, 0]
    async with StatePersistenceManager(tmp_path / "state", encryption=ring(tmp_path)) as manager:
        for number in range(20):
            found = [entry.record["by"] async for entry in manager.read_log("notes", f"n{number}")]
            assert sorted(found) == ["0", "1", "2"]


@KINDS
async def test_saves_are_made_in_their_order_while_keys_are_loaded(
    tmp_path: Path, exclusive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"exclusive": exclusive, "encryption": ring(tmp_path)}
    async with StatePersistenceManager(tmp_path / "state", **options) as manager:
        await manager.append("notes", "n", {"n": 0})
        monkeypatch.setattr(module, "FRESH_SECONDS", 0.0005)  # the keys are loaded all the time
        appends = [manager.append("notes", "n", {"n": number}) for number in range(1, 100)]
        assert await asyncio.gather(*appends) == [*range(2, 101)]
        monkeypatch.undo()
        found = [entry.record["n"] async for entry in manager.read_log("notes", "n")]
        assert found == [*range(100)]


# -- size and speed ------------------------------------------------------------------------------


async def test_a_large_body_is_compressed_before_it_is_sealed(tmp_path: Path) -> None:
    root = tmp_path / "state"
    large = {"text": SECRET * 20_000}
    async with StatePersistenceManager(root, encryption=ring(tmp_path)) as manager:
        await manager.save("notes", "large", large)
        await manager.append("notes", "large", large)
        assert (await manager.save("notes", "large", large)) == 1
        assert (await manager.load("notes", "large")).model_dump() == large  # type: ignore[union-attr]
        assert [entry.record async for entry in manager.read_log("notes", "large")] == [large]
    for name in ("large.json", "large.jsonl"):
        assert (root / "notes" / name).stat().st_size < 10_000


async def test_an_agent_goes_on_after_a_restart(tmp_path: Path) -> None:
    def runtime() -> AsyncAgentSessionManager:
        made = AsyncAgentSessionManager(tmp_path / "state", encryption=ring(tmp_path))

        @made.handler("worker")
        async def work(ctx: TaskContext, task: Task) -> object:
            ctx.memory["count"] = ctx.memory.get("count", 0) + 1
            return SECRET

        return made

    for number in (1, 2):
        async with runtime() as running:
            if number == 1:
                await running.agents.create("alice", agent_type="worker")
            task = await running.tasks.submit("alice", "work", {"secret": SECRET})
            assert await running.tasks.result(task) == SECRET
            await running.mail.send("alice", "alice", subject=SECRET, body=SECRET)
    assert readable(tmp_path / "state") == []


def test_the_core_does_not_import_the_library_of_the_extra() -> None:
    code = "import sys, agent_state, agent_state.cli.app; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
