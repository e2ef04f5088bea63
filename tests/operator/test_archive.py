"""``agent-state export`` and ``import archive``: one file for a directory or an agent, and back."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys, generate_master_key, parse_master_keys
from agent_state.errors import StateDirectoryInUseError
from agent_state.storage import barrier, checkpoint
from agent_state.verify import verify
from agent_state_integrations.operator.archive import (
    FORMAT,
    ArchiveError,
    export_archive,
    import_archive,
)
from tests.cli.commands import Call, assert_one_line_of_error, owned_by_another_process
from tests.deadlines import until

_KEY = generate_master_key()


def contents(root: Path) -> dict[str, bytes]:
    """The files of a directory that belong to nobody's run."""
    found = (each for each in root.rglob("*") if each.is_file())
    named = {each.relative_to(root).as_posix(): each.read_bytes() for each in found}
    return {name: data for name, data in named.items() if not name.startswith(".")}


def keyring(folder: Path) -> Keyring:
    return Keyring(folder, MasterKeys(lambda: parse_master_keys(_KEY)))


# -- there and back ----------------------------------------------------------------------------


async def test_a_directory_comes_back_as_it_was(state: Path, tmp_path: Path, call: Call) -> None:
    async with StatePersistenceManager(state) as manager:
        await manager.save("notes", ("Ünï", "x" * 300), {"n": 1})  # a name that is hashed
    archive, moved = tmp_path / "state.zip", tmp_path / "moved"

    exported = await asyncio.to_thread(call, "export", archive, "--state", state, "--json")
    imported = await asyncio.to_thread(
        call, "import", "archive", archive, "--state", moved, "--json"
    )

    assert (exported.code, imported.code) == (0, 0), exported.err + imported.err
    assert contents(moved) == contents(state)
    assert (exported.json()["documents"], exported.json()["logs"]) == (9, 1)
    assert imported.json()["documents"] == 9
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    assert (await verify(moved)).ok
    async with StatePersistenceManager(moved) as manager:
        assert await manager.append("system", "events", {"number": 30}) == 31


def test_one_agent_is_moved_with_what_is_its_own(state: Path, tmp_path: Path, call: Call) -> None:
    archive, moved = tmp_path / "alice.zip", tmp_path / "moved"

    exported = call("export", archive, "alice", "--state", state)
    imported = call("import", "archive", archive, "--state", moved)

    assert exported.out.startswith(f"{archive}: 7 documents, 0 logs, ")
    assert imported.out.startswith(f"{moved}: 7 documents, 0 logs, ")
    there = contents(state)
    assert contents(moved) == {name: there[name] for name in there if "alice" in name}
    unknown = call("export", tmp_path / "x.zip", "nobody", "--state", state)
    assert_one_line_of_error(unknown, "there is no agent 'nobody'")
    assert not (tmp_path / "x.zip").exists()


def test_an_agent_that_is_not_there_is_answered_with_what_was_meant(
    state: Path, tmp_path: Path, call: Call
) -> None:
    misspelt = call("export", tmp_path / "x.zip", "alcie", "--state", state)
    swapped = call("export", "alice", "alice.zip", "--state", state)

    assert_one_line_of_error(misspelt, "there is no agent 'alcie'; did you mean 'alice'?")
    assert_one_line_of_error(swapped, "the file comes first: agent-state export alice.zip alice")


@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
async def test_no_group_of_a_running_server_is_torn(tmp_path: Path, exclusive: bool) -> None:
    state, saved, ended = tmp_path / "state", 0, False
    async with StatePersistenceManager(state, exclusive=exclusive) as manager:

        async def save() -> None:
            nonlocal saved
            while not ended:
                async with manager.group() as group:
                    for name in ("a", "b", "c"):
                        group.save("notes", name, {"n": saved})
                saved += 1
                await asyncio.sleep(0)

        saving = asyncio.create_task(save())
        await until(lambda: saved)
        for number in range(3):
            archive = tmp_path / f"{number}.zip"
            await asyncio.to_thread(export_archive, state, archive)
            with zipfile.ZipFile(archive) as zipped:
                found = {json.loads(zipped.read(f"notes/{name}.json"))["n"] for name in "abc"}
            assert len(found) == 1
        ended = True
        await saving


async def test_a_group_in_the_middle_is_waited_for(state: Path, tmp_path: Path) -> None:
    record = state / ".journal/intent-0123456789abcdef.jsonl"
    share, begun = barrier.Share(str(state / ".locks")), threading.Event()
    assert share.join()
    record.write_text("a group that its writer is about to finish\n")
    export = partial(export_archive, state, tmp_path / "1.zip", advance=lambda *_: begun.set())

    exported = asyncio.create_task(asyncio.to_thread(export))
    assert await asyncio.to_thread(begun.wait, 60)
    record.unlink()
    share.leave()

    assert (await exported).documents == 8


def test_what_is_there_stays_unless_told(state: Path, tmp_path: Path, call: Call) -> None:
    archive = tmp_path / "state.zip"
    call("export", archive, "--state", state)
    assert_one_line_of_error(call("export", archive, "--state", state), "exists already")
    assert call("export", archive, "--state", state, "--overwrite").code == 0
    file = state / "agents/alice.json"
    before = file.read_text()
    file.write_text(before.replace("researcher", "writer"))

    kept = call("import", "archive", archive, "--state", state, "--json")

    assert (kept.code, kept.json()["kept"]) == (1, ["agents/alice.json"])
    assert (kept.json()["documents"], len(kept.json()["unchanged"])) == (0, 8)
    assert "writer" in file.read_text()
    replaced = call("import", "archive", archive, "--state", state, "--overwrite")
    assert (replaced.code, file.read_text()) == (0, before)


def test_a_dry_run_writes_nothing(state: Path, tmp_path: Path, call: Call) -> None:
    archive, moved = tmp_path / "state.zip", tmp_path / "moved"
    call("export", archive, "--state", state)

    called = call("import", "archive", archive, "--state", moved, "--dry-run")

    assert called.code == 0
    assert "would be imported" in called.out
    assert not moved.exists()


async def test_the_journal_of_a_dead_server_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "WRITE_BACK_SECONDS", 3600.0)
    async with StatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
        await manager.save("notes", "a", {"n": 1})
        shutil.copytree(tmp_path / "state", tmp_path / "dead")
    with pytest.raises(ArchiveError, match="agent-state restore"):
        export_archive(tmp_path / "dead", tmp_path / "dead.zip")
    async with StatePersistenceManager(tmp_path / "dead"):
        pass
    assert export_archive(tmp_path / "dead", tmp_path / "dead.zip").documents == 1


def test_an_owned_directory_is_not_written_around_its_owner(state: Path, tmp_path: Path) -> None:
    archive = tmp_path / "state.zip"
    export_archive(state, archive)
    with owned_by_another_process(state), pytest.raises(StateDirectoryInUseError):
        import_archive(state, archive, overwrite=True)


# -- encrypted ---------------------------------------------------------------------------------


async def test_what_is_encrypted_stays_so_and_goes_nowhere_else(
    tmp_path: Path, state: Path
) -> None:
    keys, sealed, archive = keyring(tmp_path / "keys"), tmp_path / "sealed", tmp_path / "s.zip"
    async with StatePersistenceManager(sealed, encryption=keys) as manager:
        await manager.save_agent_state("zoe", {"agent_id": "zoe", "mood": "hidden"})

    report = export_archive(sealed, archive, "zoe")

    assert report.keyring == keys.ident
    with zipfile.ZipFile(archive) as zipped:
        assert b"hidden" not in zipped.read("agents/zoe.json")
    import_archive(tmp_path / "moved", archive)
    async with StatePersistenceManager(tmp_path / "moved", encryption=keys) as manager:
        assert (await manager.load("agents", "zoe")).model_extra["mood"] == "hidden"  # type: ignore[index, union-attr]
    with pytest.raises(ArchiveError, match="uses no keyring"):
        import_archive(state, archive)
    export_archive(state, tmp_path / "plain.zip")
    with pytest.raises(ArchiveError, match="the archive no keyring"):
        import_archive(sealed, tmp_path / "plain.zip")


# -- archives of others ------------------------------------------------------------------------

Entry = tuple[str | zipfile.ZipInfo, bytes]


def made(path: Path, *entries: Entry, manifest: object = None, lie: int = 0) -> Path:
    """An archive with these files; ``lie``: so many bytes less in the manifest."""
    files = {
        getattr(name, "filename", name): {
            "bytes": len(data) - lie,
            "sha256": sha256(data).hexdigest(),
        }
        for name, data in entries
    }
    told = {"format": FORMAT, "made_at": "", "agent": None, "keyring": None, "files": files}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
        archive.writestr("manifest.json", json.dumps(told if manifest is None else manifest))
    return path


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


NOTE = b'{"n": 1}'


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/tmp/evil.json", "no folder of a kind"),
        ("../evil.json", "no folder of a kind"),
        ("notes/../../evil.json", "no id has the file name"),
        ("notes\\..\\evil.json", "no folder of a kind"),
        ("notes/.hidden.json", "no id has the file name"),
        (".journal/00000001.jsonl", "no folder of a kind"),
        (".locks/owner.json", "no folder of a kind"),
        ("Notes/a.json", "no folder of a kind"),
        ("requests/a.json", "no folder of a kind"),
        ("notes/a.exe", "neither a document nor a log"),
        ("notes/A.json", "no id has the file name"),
        ("notes/con.json", "no id has the file name"),
        ("notes//a.json", "no id has the file name"),
        ("system/runtime.json", "no id has the file name"),
        ("record/../evil", "no file of the recorder"),
        (link("notes/a.json"), "no regular file"),
        ("notes/a/", "neither a document nor a log"),
    ],
    ids=str,
)
def test_a_path_that_no_export_writes_is_refused_and_nothing_is_written(
    name: str | zipfile.ZipInfo, said: str, tmp_path: Path, call: Call
) -> None:
    archive = made(tmp_path / "a.zip", ("notes/good.json", NOTE), (name, NOTE))
    before = sorted(tmp_path.rglob("*"))

    called = call("import", "archive", archive, "--state", tmp_path / "in/state")

    assert called.code == 2
    assert_one_line_of_error(called, said)
    assert sorted(tmp_path.rglob("*")) == before


def twice(path: Path) -> Path:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return made(path, ("notes/a.json", NOTE), ("notes/a.json", b'{"n": 2}'))


def changed(path: Path) -> Path:
    entry = {"bytes": len(NOTE), "sha256": sha256(b'{"n": 2}').hexdigest()}
    told = {"format": FORMAT, "agent": None, "keyring": None, "files": {"notes/a.json": entry}}
    return made(path, ("notes/a.json", NOTE), manifest=told)


def cut(path: Path) -> Path:
    whole = made(path, ("notes/a.json", NOTE)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


MAKERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "more bytes than told": (lambda p: made(p, ("notes/a.json", NOTE), lie=1), "not what the man"),
    "other content": (changed, "not what the manifest says"),
    "a name twice": (twice, "twice"),
    "an unknown format": (lambda p: made(p, manifest={"format": "zip/9"}), "its format is"),
    "a list": (lambda p: made(p, manifest=[1]), "manifest is damaged"),
    "no size": (
        lambda p: made(p, manifest={"format": FORMAT, "files": {"notes/a.json": {}}}),
        "manifest is damaged",
    ),
    "a missing file": (
        lambda p: made(
            p,
            manifest={
                "format": FORMAT, "agent": None, "keyring": None,
                "files": {"notes/a.json": {"bytes": 1, "sha256": ""}},
            },
        ),
        "not in both",
    ),
    "no document": (lambda p: made(p, ("notes/a.json", b"[1]")), "cannot be used"),
    "an invalid agent": (lambda p: made(p, ("agents/a.json", b'{"status": 7}')), "cannot be used"),
    "another's id": (
        lambda p: made(p, ("notes/a.json", b'{"_id": "b"}')), "cannot be used",
    ),
    "half an archive": (cut, "cannot be read"),
    "keys that are not named": (
        lambda p: made(p, ("system/encryption.json", b'{"keyring": "k"}')), "another keyring",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MAKERS)
def test_an_archive_that_is_not_whole_is_refused_and_nothing_is_written(
    what: str, tmp_path: Path, call: Call
) -> None:
    make, said = MAKERS[what]
    archive = make(tmp_path / "a.zip")

    called = call("import", "archive", archive, "--state", tmp_path / "state")

    assert called.code == 2
    assert_one_line_of_error(called, said)
    assert not (tmp_path / "state").exists()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, call: Call) -> None:
    archive = made(tmp_path / "a.zip", ("notes/a.jsonl", b"0" * 5_000_000))
    assert archive.stat().st_size < 20_000

    called = call("import", "archive", archive, "--state", tmp_path / "s", "--max-size", "1MB")

    assert called.code == 2
    assert_one_line_of_error(called, "more than 1,000,000 bytes")


def test_a_zip_of_something_else_and_no_zip_are_said_to_be_so(tmp_path: Path, call: Call) -> None:
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("notes/a.json", NOTE)
    text = tmp_path / "text"
    text.write_text("no zip")
    cases: list[tuple[Any, str]] = [
        (other, "did not make it"), (text, "cannot be read"), (tmp_path / "none", "no such archive")
    ]  # fmt: skip
    for file, said in cases:
        called = call("import", "archive", file, "--state", tmp_path / "state")
        assert called.code == 2
        assert_one_line_of_error(called, said)
        assert not (tmp_path / "state").exists()


def test_a_missing_directory_is_not_made_by_an_export(tmp_path: Path, call: Call) -> None:
    called = call("export", tmp_path / "a.zip", "--state", tmp_path / "misspelt")

    assert_one_line_of_error(called, "no such state directory")
    assert sorted(tmp_path.iterdir()) == []
