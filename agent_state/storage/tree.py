"""The files of a state directory: which file is which document. Everything here blocks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from itertools import chain, product
from operator import itemgetter

from agent_state.errors import AgentStateError, InvalidKeyError, Key, StorageError, storage_error
from agent_state.protocols import DocumentId, Incident
from agent_state.storage import fileio, logs, paths, syscalls
from agent_state.storage.document import key_of

_logger = logging.getLogger("agent_state.storage")


def is_forbidden(error: StorageError) -> bool:
    """Whether the error is about the permissions of one file; the others may be readable."""
    return error.errno in (errno.EACCES, errno.EPERM)


class DocumentTree:
    """The documents and logs below ``root``, by name.

    ``incidents`` collects damage; a file that has no key's name is reported there too.
    """

    def __init__(self, root: str) -> None:
        self.root = paths.resolve_root(root)
        self.renames = False
        """Whether a file that a person named by an id with capitals gets that id's file name."""
        self.incidents: list[Incident] = []

    def path(self, kind: str, key: Key, ending: str = paths.DOCUMENT) -> str:
        return f"{self.root}/{paths.relative(kind, key, ending)}"

    def relative(self, path: str) -> str:
        return path[len(self.root) + 1 :].replace(os.sep, "/")

    def id_of_path(self, path: str) -> DocumentId | None:
        """The kind and key of a document's path; None for any other path."""
        folder, _, rest = self.relative(path).partition("/")
        kind = "system" if folder == paths.RUN else folder
        if not rest.endswith(paths.DOCUMENT) or kind.startswith("."):
            return None
        *folders, name = rest.removesuffix(paths.DOCUMENT).split("/")
        key = (*(paths.decode(part, directory=True) for part in folders), paths.decode(name))
        if all(segment is not None for segment in key):
            # What an older version left in ``system`` is no document any more.
            return (kind, key) if paths.folder_of(kind, key) == folder else None  # type: ignore[arg-type, return-value]  # no segment is None here
        carried = self._carried_key(path, paths.DOCUMENT)
        if carried is None and paths.is_kind(kind):
            self._rename(path, kind, _key_by_hand(*folders, name), paths.DOCUMENT)
            return None  # the new name is another path
        return None if carried is None else (kind, carried)

    def kinds(self) -> list[str]:
        """The kinds that have a folder."""
        found = {*filter(paths.is_kind, self.folders())}
        if fileio.stat_file(f"{self.root}/{paths.RUN}") is not None:
            found.add("system")
        return sorted(found)

    def folders(self) -> list[str]:
        """All folders that are not hidden, whether their names are kinds' or not."""
        return sorted(
            entry.name
            for entry in self.entries(self.root)
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        )

    def walk(self, folder: str, *, hidden: bool = False) -> Iterator[os.DirEntry[str]]:
        """Everything below a folder that is not a folder itself, however deep it is nested.

        Hidden names are left out unless ``hidden``; a folder that cannot be read is left out.
        """
        folders = [folder]
        while folders:
            try:
                entries = self.entries(folders.pop())
            except StorageError:
                continue
            for entry in entries:
                if entry.name.startswith(".") and not hidden:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield entry

    def keys(self, kind: str, prefix: Key = (), ending: str = paths.DOCUMENT) -> list[Key]:
        """The keys of all files of a kind with that ending, sorted."""
        return sorted(map(itemgetter(1), self.files(kind, prefix, ending)))

    def files(
        self, kind: str, prefix: Key = (), ending: str = paths.DOCUMENT
    ) -> Iterator[tuple[str, Key]]:
        """The path and the key of each file, in no order."""
        top = paths.folder_of(paths.check_kind(kind), prefix)
        folder = "/".join((self.root, top, *paths.directories(prefix)))
        fileio.has_folders(self.root, f"{folder}/")
        found = self._files_below(folder, kind, prefix, ending)
        if kind != "system" or prefix:
            return found
        run = self._files_below(f"{self.root}/{paths.RUN}", kind, prefix, ending)
        return (
            (path, key) for path, key in chain(found, run) if self.path(kind, key, ending) == path
        )

    def _files_below(
        self, folder: str, kind: str, prefix: Key | None, ending: str
    ) -> Iterator[tuple[str, Key]]:
        folders = [(folder, prefix)]
        while folders:
            folder, prefix = folders.pop()
            for entry in self.entries(folder):
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    segment = paths.decode(name, directory=True)
                    # Below a name that does not give its id, each file has its complete key.
                    deeper = None if prefix is None or segment is None else (*prefix, segment)
                    folders.append((entry.path, deeper))
                elif name.endswith(ending):
                    key = self._key_of(entry.path, name[: -len(ending)], kind, prefix, ending)
                    if key is not None:
                        yield entry.path, key

    def _key_of(
        self, path: str, stem: str, kind: str, prefix: Key | None, ending: str
    ) -> Key | None:
        """The key of a file in a listing; None, and reported, when no key has this path."""
        segment = paths.decode(stem)
        if prefix is not None and segment is not None:
            return (*prefix, segment)
        key = self._carried_key(path, ending)
        try:
            if key is not None and self.path(kind, key, ending) == path:
                return key
        except InvalidKeyError:
            pass  # it carries no valid key
        *folders, _ = self.relative(path).split("/")[1:]
        key = _key_by_hand(*folders, stem)
        if not self._rename(path, kind, key, ending):
            self._report_unknown(path, stem)
            return None
        return key

    def take_by_hand(self, at: paths.DocumentPath, ending: str = paths.DOCUMENT) -> bool:
        """Whether a missing file was there with its ids' capitals as they are; it is renamed."""
        if not self.renames or "!" not in at.path[len(self.root) :] or os.path.lexists(at.path):
            return False
        last = len(at.key) - 1
        names = (
            {paths.encode(part, directory=place < last), part if paths.is_by_hand(part) else ""}
            for place, part in enumerate(at.key)
        )
        for each in product(*names):
            path = f"{self.root}/{at.kind}/{'/'.join(each)}{ending}"
            if "" not in each and path != at.path and fileio.has_folders(self.root, path):
                found = fileio.stat_file(path) is not None and self._is_spelled_so(path)
                if found and self._rename(path, at.kind, at.key, ending):
                    return True
        return False

    def _is_spelled_so(self, path: str) -> bool:
        """Whether folders list these very names: a disk that folds case finds others' files."""
        folder = self.root
        for name in self.relative(path).split("/"):
            if all(entry.name != name for entry in self.entries(folder)):
                return False
            folder = f"{folder}/{name}"
        return True

    def _rename(self, path: str, kind: str, key: Key | None, ending: str) -> bool:
        """Give a file the name of its id; whether it has it now. Another file is not replaced."""
        if not self.renames or key is None or kind in paths.RECORDED:
            return False
        try:
            target = self.path(kind, key, ending)
            fileio.make_directories(self.root, self.relative(os.path.dirname(target)), sync=False)
            syscalls.link(path, target)
            syscalls.unlink(path)
        except (OSError, AgentStateError) as error:
            _logger.warning("%s keeps its name: %s", self.relative(path), error)
            return False
        _logger.warning("%s is now %s", self.relative(path), self.relative(target))
        folder = os.path.dirname(path)
        with contextlib.suppress(OSError):  # until the first folder with something else in it
            while folder != f"{self.root}/{kind}":
                syscalls.rmdir(folder)
                folder = os.path.dirname(folder)
        return True

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        """The entries of a folder; empty when it does not exist."""
        try:
            with syscalls.scandir(folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return []  # no document is that deep
            raise storage_error(error, "listing a directory", path=folder) from error

    def _carried_key(self, path: str, ending: str) -> Key | None:
        """The key that a file contains; None when it contains none, or cannot be read."""
        try:
            if ending == paths.LOG:
                return key_of(logs.first_line(path))
            found = fileio.read_file(path)
            return None if found is None else key_of(found[0])
        except AgentStateError:
            return None

    def report_forbidden(self, kind: str, key: Key, error: StorageError) -> None:
        """Report a document that was left out of a listing, as it may not be read."""
        incident = Incident(error.message, kind, key, self.relative(self.path(kind, key)))
        if incident not in self.incidents:
            self.incidents.append(incident)

    def _report_unknown(self, path: str, stem: str) -> None:
        try:
            advice = f"no id has this file name; {stem!r} would be {paths.encode(stem)!r}"
        except InvalidKeyError:
            advice = "no id has this file name"
        relative = self.relative(path)
        if all(incident.path != relative for incident in self.incidents):
            self.incidents.append(Incident(advice, path=relative))


def _key_by_hand(*names: str) -> Key | None:
    """The key of a path in which a person has written ids with capitals as they are."""
    *folders, stem = names
    segments = [
        paths.decode(name, directory=place < len(folders))
        or (name if paths.is_by_hand(name) else None)
        for place, name in enumerate([*folders, stem])
    ]
    return None if None in segments else tuple(each for each in segments if each is not None)
