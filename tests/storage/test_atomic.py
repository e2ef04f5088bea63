"""Whole files or none, whatever stands in their place."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agent_state import (
    DurabilityUnknownError,
    StateCorruptedError,
    StorageError,
    StorageFullError,
)
from agent_state.storage import fileio
from agent_state.testing import Fault, FaultyDisk


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in (b"", b"one", b"x" * 300_000):
        stamp = fileio.replace_file(str(path), data, sync=True)
        assert path.read_bytes() == data
        assert stamp == fileio.stat_file(str(path))
        assert fileio.read_file(str(path)) == (data, stamp)
    assert names(tmp_path) == ["a.json"]


def test_the_bytes_and_then_the_name_are_made_durable_in_this_order(tmp_path: Path) -> None:
    with FaultyDisk() as disk:
        fileio.replace_file(str(tmp_path / "a"), b"data", sync=True)
    order = [
        name
        for name, _ in disk.calls
        if name in ("write", "fdatasync", "rename", "fsync_directory")
    ]
    assert order == ["write", "fdatasync", "rename", "fsync_directory"]

    with FaultyDisk() as disk:
        fileio.remove_file(str(tmp_path / "a"), sync=True)
    assert [name for name, _ in disk.calls] == ["unlink", "fsync_directory"]


@pytest.mark.parametrize("call", ["open", "write", "fdatasync", "rename"])
@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, StorageError)],
)
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, call: str, number: int, error: type[StorageError]
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    with FaultyDisk(Fault(at=1, call=call, error=number)), pytest.raises(error) as caught:
        fileio.replace_file(str(path), b"new", sync=True)

    assert type(caught.value) is error
    assert (caught.value.errno, caught.value.path) == (number, str(path))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_a_name_that_the_disk_did_not_confirm_is_neither_saved_nor_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    with FaultyDisk(Fault(at=1, call="fsync_directory")), pytest.raises(DurabilityUnknownError):
        fileio.replace_file(str(path), b"new", sync=True)

    assert path.read_bytes() == b"new"


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with FaultyDisk(Fault(at=1, call="write", action="short", persistent=True)) as disk:
        fileio.replace_file(str(path), b"0123456789" * 100, sync=True)

    assert path.read_bytes() == b"0123456789" * 100
    assert disk.count("write") > 5


def test_a_symlink_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "a.json"
    victim.write_bytes(b"precious")
    link.symlink_to(victim)

    with pytest.raises(StateCorruptedError, match="symlink"):
        fileio.read_file(str(link))
    fileio.replace_file(str(link), b"ours", sync=False)

    assert victim.read_bytes() == b"precious"
    assert not link.is_symlink()


def test_a_folder_a_pipe_and_a_giant_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(fileio.MAX_BYTES + 1)  # sparse: takes no room on the disk

    for name in ("folder", "pipe", "giant"):
        with pytest.raises(StateCorruptedError):
            fileio.read_file(str(tmp_path / name))


def test_what_is_not_there_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "a", tmp_path / "b" / "c", tmp_path / "file" / "a"):
        assert fileio.read_file(str(path)) is None
        assert fileio.stat_file(str(path)) is None
        assert fileio.remove_file(str(path), sync=False) is False


def test_directories_are_made_below_the_root_and_through_nothing_else(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / "link").symlink_to(elsewhere, target_is_directory=True)
    (root / "file").write_bytes(b"")

    fileio.make_directories(str(root), "a/b/c", sync=True)
    fileio.make_directories(str(root), "a/b/c", sync=True)

    assert (root / "a/b/c").is_dir()
    for name in ("link/d", "file/d"):
        with pytest.raises(StorageError):
            fileio.make_directories(str(root), name, sync=True)
    assert names(elsewhere) == []


def test_nobody_else_may_read_what_is_written(tmp_path: Path) -> None:
    fileio.make_directories(str(tmp_path), "a", sync=False)
    fileio.replace_file(str(tmp_path / "a/b"), b"", sync=False)

    assert (tmp_path / "a").stat().st_mode & 0o077 == 0
    assert (tmp_path / "a/b").stat().st_mode & 0o077 == 0
