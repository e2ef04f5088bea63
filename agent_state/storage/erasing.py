"""Erasing: a document, its log and all below them, with what is kept beside the documents.

Called under the lock of the place, with no intent or journal that could bring it back. A segment
or an intent that was put aside as damaged is not searched: it holds what many places held.
"""

from __future__ import annotations

import re
import stat

from agent_state.errors import Key, storage_error
from agent_state.storage import fileio, paths, syscalls
from agent_state.storage.directory import StateDirectory
from agent_state.storage.keeping import QUARANTINE, SNAPSHOTS


def erase(
    directory: StateDirectory, kind: str, key: Key, *, durable: bool | None = None
) -> tuple[list[Key], int]:
    """The keys of the documents that there were, and how many logs. Raises ``StorageError``.

    ``durable``: whether the removal is synced; by default as the directory syncs its writes.
    """
    sync = directory.sync if durable is None else durable
    documents = _there(directory, kind, key, paths.DOCUMENT)
    logs = _there(directory, kind, key, paths.LOG)
    for each in documents:
        directory.remove(kind, each, sync=False)
    for each in logs:
        directory.forget_log(kind, each)
    for base in (directory.root, f"{directory.root}/{SNAPSHOTS}", f"{directory.root}/{QUARANTINE}"):
        _remove_all(directory, base, kind, key, sync=sync)
    for each in documents:
        directory.snapshots.drop(directory.path(kind, each))
    return documents, len(logs)


def _there(directory: StateDirectory, kind: str, key: Key, ending: str) -> list[Key]:
    found = directory.keys(kind, key, ending)
    if fileio.has_folders(directory.root, path := directory.path(kind, key, ending)):
        own = fileio.stat_file(path)
        if own is not None:
            found.insert(0, key)
    return found


def _remove_all(directory: StateDirectory, base: str, kind: str, key: Key, *, sync: bool) -> None:
    """Remove what one tree has of it: the files with its name, and its folder."""
    names = [paths.encode(key[-1]) + ending for ending in (paths.DOCUMENT, paths.LOG)]
    parent = "/".join((base, kind, *paths.directories(key[:-1])))
    if not fileio.has_folders(directory.root, f"{parent}/"):
        return
    numbered = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:\.\d+(?:\.reason\.json)?)?")
    removed = False
    for entry in directory.entries(parent):
        if numbered.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
            fileio.remove_file(entry.path, sync=False)
            removed = True
    [folder] = paths.directories(key[-1:])
    if _remove_tree(directory, f"{parent}/{folder}"):
        removed = True
    if removed and sync:
        fileio.sync_directory(parent)


def _remove_tree(directory: StateDirectory, folder: str) -> bool:
    """Remove a folder with everything in it; whether there was one. Symlinks are not followed."""
    try:
        mode = syscalls.stat(folder).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error(error, "looking at a folder", path=folder) from error
    if not stat.S_ISDIR(mode):
        return fileio.remove_file(folder, sync=False)
    folders = [folder]
    for path in folders:  # which grows meanwhile
        for entry in directory.entries(path):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                fileio.remove_file(entry.path, sync=False)
    for path in reversed(folders):
        try:
            syscalls.rmdir(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise storage_error(error, "removing a folder", path=path) from error
    return True
