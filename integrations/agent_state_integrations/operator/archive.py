"""Archives: the documents and logs of a directory, or of one agent, in one file, and back.

An archive is a zip of the files as they are, with ``manifest.json``: the format, the time, and of
each file its bytes and SHA-256. What runs of its own (journal, locks, snapshots, quarantine) is not
in it. An encrypted state stays encrypted: the archive holds no keys.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import orjson

from agent_state.cli.output import did_you_mean
from agent_state.cli.overview import KINDS
from agent_state.clock import SystemClock, stamp
from agent_state.codec import Codec
from agent_state.errors import AgentStateError, Key, LockTimeoutError, StateNotFoundError
from agent_state.storage import barrier, fileio, locks, paths
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document import SEALED, decode_document, key_of
from agent_state.storage.fileio import Stamp

FORMAT = "agent-state-archive/1"
MANIFEST = "manifest.json"
MARKER = "system/encryption.json"
"""The document that names the keyring of an encrypted directory."""
MOST_BYTES = 16 << 30
"""An archive whose files have more together is refused, unless another limit is given."""
_MOST_MANIFEST = 256 << 20
_MOST_DOCUMENT = fileio.MAX_BYTES
_ATTEMPTS = 5
_CHUNK = 1 << 20
_UNRESTORED = "its journal has changes that are in no file yet: `agent-state restore` first"
_LEFT_OUT = frozenset({"requests"})
_RECORDED_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._+=-]{0,200}")
_HASHED_NAME = re.compile(r"[A-Za-z0-9_%!-][A-Za-z0-9._%!~-]{0,200}")
_EPOCH = (1980, 1, 1, 0, 0, 0)

Advance = Callable[[int, int], None]


class ArchiveError(AgentStateError):
    """The archive is damaged, was not made by ``agent-state export``, or may not be used here."""


@dataclass(slots=True)
class TransferReport:
    """What was exported or imported."""

    file: str
    agent: str | None
    keyring: str | None
    """The id of the keyring that the content is encrypted with; None for plain content."""
    documents: int = 0
    logs: int = 0
    others: int = 0
    """Files of the recorder that are neither."""
    bytes: int = 0
    unchanged: list[str] = field(default_factory=list)
    """Files that were there, just as they are in the archive."""
    kept: list[str] = field(default_factory=list)
    """Files that were there with other content, and were not overwritten."""

    def count(self, name: str, size: int) -> None:
        """Count one file."""
        self.bytes += size
        if name.endswith(paths.DOCUMENT):
            self.documents += 1
        elif name.endswith(paths.LOG):
            self.logs += 1
        else:
            self.others += 1


# -- export ------------------------------------------------------------------------------------


def export_archive(
    state_dir: str | os.PathLike[str],
    file: str | os.PathLike[str],
    agent: str | None = None,
    *,
    overwrite: bool = False,
    advance: Advance = lambda _done, _total: None,
) -> TransferReport:
    """Write one state of a directory, or of one agent, to a new file. Blocks.

    A running server is held for a moment (``agent_state.storage.barrier``), so that no group is
    torn. Raises ``StateNotFoundError``, ``LockTimeoutError``; ``ArchiveError`` if the file exists,
    or if the journal of a dead server holds changes that are in no file yet.
    """
    root, target = paths.resolve_root(state_dir), Path(file)
    if not os.path.isdir(root):  # noqa: PTH112  # as text, as everywhere below
        raise StateNotFoundError("there is no such state directory", path=root)
    if target.exists() and not overwrite:
        raise ArchiveError("it exists already (--overwrite replaces it)", path=target)
    directory = StateDirectory(root, sync=False, now=str)
    with tempfile.TemporaryDirectory(prefix="agent-state-") as folder:
        copies = _Copies(directory, agent, Path(folder), advance)
        copies.take()
        names = sorted(copies.stamps)
        if agent is not None and not any(name != MARKER for name in names):
            hint = _meant(directory, agent, str(file))
            raise StateNotFoundError(f"there is no agent {agent!r:.200}{hint}", path=root)
        report = TransferReport(str(target), agent, _keyring_of(copies.read(MARKER)))
        _write(target, copies, names, report)
    return report


def _meant(directory: StateDirectory, agent: str, file: str) -> str:
    """What to say of an agent that is not there: the arguments the other way round, a like name."""
    tree = directory.tree
    ids = {key[0] for kind in KINDS for _, key in tree.files(kind, (), paths.DOCUMENT)}
    if file in ids:
        return f"; the file comes first: agent-state export {agent} {file}"
    return did_you_mean(agent, ids)


def _journaled(root: str) -> bool:
    names = fileio.list_folder(f"{root}/.journal")
    found = (fileio.stat_file(f"{root}/.journal/{name}") for name in names if name[:1] != ".")
    return any(stamp_.size for stamp_ in found if stamp_ is not None)


class _Copies:
    """Copies of the files of one moment, in a folder of their own."""

    def __init__(
        self, directory: StateDirectory, agent: str | None, folder: Path, advance: Advance
    ) -> None:
        self._directory, self._agent, self._folder = directory, agent, folder
        self._advance = advance
        self.stamps: dict[str, Stamp] = {}
        self._numbers: dict[str, int] = {}

    def take(self) -> None:
        """Copy what has changed since the last look, with the writers held the second time."""
        root, is_behind = self._directory.root, False
        self._copy()
        for attempt in range(_ATTEMPTS):
            try:
                with barrier.hold(root):
                    self._copy()
                    # Held, no living writer is in the middle of a group.
                    is_behind = locks.owner_of(self._directory.locks) is None and _journaled(root)
                break
            except LockTimeoutError:
                if attempt == _ATTEMPTS - 1:
                    raise
        if is_behind:
            raise ArchiveError(_UNRESTORED, path=root)

    def _copy(self) -> None:
        found: dict[str, Stamp] = {}
        for path in self._files():
            name = self._directory.tree.relative(path)
            stamp_ = fileio.stat_file(path)
            if stamp_ is None or (self.stamps.get(name) != stamp_ and not self._copy_file(path)):
                continue
            found[name] = stamp_
            self._advance(len(found), 0)
        self.stamps = found

    def _copy_file(self, path: str) -> bool:
        name = self._directory.tree.relative(path)
        copy = self.path(name)
        try:
            fd, _ = fileio.open_regular(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        with os.fdopen(fd, "rb") as source, copy.open("wb") as into:
            shutil.copyfileobj(source, into, _CHUNK)
        return True

    def path(self, name: str) -> Path:
        """Where the copy of a file is."""
        return self._folder / str(self._numbers.setdefault(name, len(self._numbers)))

    def read(self, name: str) -> bytes | None:
        """The content of a copied document; None if there is none."""
        return self.path(name).read_bytes() if name in self.stamps else None

    def _files(self) -> Iterator[str]:
        """The files that belong to an archive. A symlink is left out."""
        tree, agent = self._directory.tree, self._agent
        for kind in tree.kinds():
            if kind in _LEFT_OUT or (agent is not None and kind not in (*KINDS, "system")):
                continue
            if kind in paths.RECORDED:
                entries = tree.walk(f"{tree.root}/{kind}")
                yield from (each.path for each in entries if each.is_file(follow_symlinks=False))
                continue
            for ending in (paths.DOCUMENT, paths.LOG):
                for path, key in tree.files(kind, (), ending):
                    if _belongs(kind, key, agent):
                        yield path


def _belongs(kind: str, key: Key, agent: str | None) -> bool:
    if kind == "system":
        return key == ("encryption",) or (agent is None and key[0] not in paths.RUN_NAMES)
    return agent is None or key[0] == agent


def _write(target: Path, copies: _Copies, names: list[str], report: TransferReport) -> None:
    files: dict[str, dict[str, Any]] = {}
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        opener = lambda path, flags: os.open(path, flags, 0o600)  # noqa: E731
        with (
            open(temporary, "wb", opener=opener) as out,  # with its permissions
            zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for name in names:
                digest, size = sha256(), 0
                with copies.path(name).open("rb") as source, archive.open(_info(name), "w") as into:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        size += len(chunk)
                        into.write(chunk)
                files[name] = {"bytes": size, "sha256": digest.hexdigest()}
                report.count(name, size)
            manifest = {
                "format": FORMAT,
                "made_at": stamp(SystemClock().now()),
                "agent": report.agent,
                "keyring": report.keyring,
                "files": files,
            }
            archive.writestr(_info(MANIFEST), orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            archive.close()
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
        fileio.sync_directory(os.fspath(target.absolute().parent))
    finally:
        temporary.unlink(missing_ok=True)


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | 0o600) << 16
    return info


def _keyring_of(marker: bytes | None) -> str | None:
    if marker is None:
        return None
    found = orjson.loads(marker).get("keyring")
    return found if isinstance(found, str) else None


# -- import ------------------------------------------------------------------------------------


def import_archive(
    state_dir: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    most_bytes: int = MOST_BYTES,
    advance: Advance = lambda _done, _total: None,
) -> TransferReport:
    """Check an archive to its end, and then put its files into a directory. Blocks.

    The directory is made if it is missing. A file that is there with other content stays, unless
    ``overwrite``; then the import replaces it. Documents keep their revisions. ``dry_run`` checks
    and reports, and writes nothing. Raises ``ArchiveError`` before anything was written;
    ``StateDirectoryInUseError`` while a process has the directory open.
    """
    root = paths.resolve_root(state_dir)
    with tempfile.TemporaryDirectory(prefix="agent-state-") as folder:
        try:
            with zipfile.ZipFile(file) as archive:
                reader = _ArchiveReader(archive, Path(folder), most_bytes, advance)
                manifest = reader.read()
        except FileNotFoundError as error:
            raise StateNotFoundError("there is no such archive", path=file) from error
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
            zlib.error,
            EOFError,
        ) as error:
            raise ArchiveError(f"it cannot be read: {error}", path=file) from error
        except ArchiveError as error:
            raise ArchiveError(error.message, path=file) from error
        report = TransferReport(str(file), manifest["agent"], manifest["keyring"])
        _check_keys(root, reader, report)
        if dry_run:
            _place(root, reader, report, overwrite=overwrite, write=False)
            return report
        directory = StateDirectory(root, sync=True, now=lambda: stamp(SystemClock().now()))
        directory.prepare()
        owner = locks.acquire_exclusive(directory.locks)
        try:
            if _journaled(root):
                raise ArchiveError(_UNRESTORED, path=root)
            _place(root, reader, report, overwrite=overwrite, write=True)
        finally:
            owner.release()
    return report


class _ArchiveReader:
    """The files of an archive, each checked, in a folder of their own."""

    def __init__(
        self, archive: zipfile.ZipFile, folder: Path, most_bytes: int, advance: Advance
    ) -> None:
        self._archive, self._folder, self._left = archive, folder, most_bytes
        self._advance = advance
        self._codec = Codec()
        self.files: dict[str, Path] = {}

    def read(self) -> dict[str, Any]:
        """Check everything; the manifest. Raises ``ArchiveError``."""
        infos = {info.filename: info for info in self._archive.infolist()}
        if len(infos) != len(self._archive.infolist()):
            raise ArchiveError("a name is in it twice")
        manifest = self._manifest(infos.pop(MANIFEST, None))
        files = manifest["files"]
        for name in sorted({*files} ^ {*infos}):
            raise ArchiveError(f"{name!r:.200} is in the archive or in its manifest, not in both")
        if sum(entry["bytes"] for entry in files.values()) > self._left:
            raise ArchiveError(f"its files have more than {self._left:,} bytes (--max-size)")
        for number, (name, info) in enumerate(sorted(infos.items())):
            _check_name(name)
            _check_info(info)
            path = self._folder / str(number)
            self._extract(info, path, files[name])
            if name.endswith(paths.DOCUMENT) and _kind_of(name) not in paths.RECORDED:
                _check_document(name, path.read_bytes(), self._codec)
            self.files[name] = path
            self._advance(number + 1, len(infos))
        return manifest

    def _manifest(self, info: zipfile.ZipInfo | None) -> dict[str, Any]:
        if info is None:
            raise ArchiveError("it has no manifest: `agent-state export` did not make it")
        _check_info(info)
        with self._archive.open(info) as source:
            data = source.read(_MOST_MANIFEST + 1)
        return _parse_manifest(data if len(data) <= _MOST_MANIFEST else b"")

    def _extract(self, info: zipfile.ZipInfo, path: Path, entry: dict[str, Any]) -> None:
        """Write at most the bytes that the manifest says, and compare the checksum."""
        digest, left = sha256(), entry["bytes"]
        with self._archive.open(info) as source, path.open("wb") as into:
            while chunk := source.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                into.write(chunk)
        if left or digest.hexdigest() != entry["sha256"]:
            raise ArchiveError(f"{info.filename} is not what the manifest says")


def _parse_manifest(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("format") not in (None, FORMAT):
        raise ArchiveError(f"its format is {found['format']!r:.80}, and this reads {FORMAT}")
    files = found.get("files") if isinstance(found, dict) else None
    if not (
        isinstance(found, dict)
        and isinstance(files, dict)
        and all(map(_is_entry, files.values()))
        and all(isinstance(found.get(name), str | None) for name in ("agent", "keyring"))
    ):
        raise ArchiveError("its manifest is damaged")
    return {"agent": None, "keyring": None, **found}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    size = entry.get("bytes")
    return type(size) is int and size >= 0 and type(entry.get("sha256")) is str


def _kind_of(name: str) -> str:
    return name.partition("/")[0]


def _check_name(name: str) -> None:
    """Raises ``ArchiveError`` for a path that no export writes."""
    kind, _, rest = name.partition("/")
    if not rest or not paths.is_kind(kind) or kind in _LEFT_OUT:
        raise ArchiveError(f"{name!r:.200} is in no folder of a kind")
    parts = rest.split("/")
    if kind in paths.RECORDED:
        if not all(map(_RECORDED_NAME.fullmatch, parts)):
            raise ArchiveError(f"{name!r:.200} is no file of the recorder")
        return
    ending = next((each for each in (paths.DOCUMENT, paths.LOG) if name.endswith(each)), None)
    if ending is None:
        raise ArchiveError(f"{name!r:.200} is neither a document nor a log")
    *folders, last = rest.removesuffix(ending).split("/")
    segments = [
        *(paths.decode(folder, directory=True) for folder in folders), paths.decode(last)
    ]  # fmt: skip
    # Of a hashed name the file has the id; here it only has to be one name, and no way out.
    fits = all(
        segment is not None or ("~" in part and _HASHED_NAME.fullmatch(part))
        for segment, part in zip(segments, [*folders, last], strict=True)
    )
    if not fits or (kind == "system" and segments[0] in paths.RUN_NAMES):
        raise ArchiveError(f"no id has the file name {name!r:.200}")


def _check_info(info: zipfile.ZipInfo) -> None:
    mode = info.external_attr >> 16
    if info.is_dir() or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
        raise ArchiveError(f"{info.filename!r:.200} is no regular file")
    if info.filename.endswith(paths.DOCUMENT) and info.file_size > _MOST_DOCUMENT:
        raise ArchiveError(f"{info.filename!r:.200} is larger than a document may be")


def _check_document(name: str, data: bytes, codec: Codec) -> None:
    """Raises ``ArchiveError`` for one that would be set aside when it is read."""
    kind, _, rest = name.partition("/")
    *folders, last = rest.removesuffix(paths.DOCUMENT).split("/")
    decoded = [*(paths.decode(part, directory=True) for part in folders), paths.decode(last)]
    known = tuple(part for part in decoded if part is not None)
    try:
        key = known if len(known) == len(decoded) else key_of(data) or ()
        where = paths.relative(kind, key, paths.DOCUMENT)
        document = decode_document(kind, key, data)[0]
        if SEALED.encode() not in document.body:
            codec.check(document)
    except AgentStateError as error:
        raise ArchiveError(f"{name} cannot be used: {error.message}") from error
    if where != name:
        raise ArchiveError(f"{name} is not where its id belongs")


def _check_keys(root: str, reader: _ArchiveReader, report: TransferReport) -> None:
    """Encrypted content goes where its keyring is used, and plain content where none is."""
    found = fileio.read_file(f"{root}/{MARKER}")
    there = _keyring_of(found[0]) if found is not None else None
    marker = reader.files.get(MARKER)
    if _keyring_of(marker.read_bytes() if marker else None) != report.keyring:
        raise ArchiveError("its manifest names another keyring than its content")
    if there == report.keyring:
        return
    is_empty = not any(
        paths.is_kind(name) and not name.startswith(".") for name in fileio.list_folder(root)
    )
    if there is None and is_empty:
        return
    mine, theirs = (f"keyring {one}" if one else "no keyring" for one in (there, report.keyring))
    what = f"the directory uses {mine}, the archive {theirs}; import into an empty directory"
    raise ArchiveError(f"{what}, and `agent-state rekey` it", path=root)


def _place(
    root: str, reader: _ArchiveReader, report: TransferReport, *, overwrite: bool, write: bool
) -> None:
    for name, copy in reader.files.items():
        target = f"{root}/{name}"
        fileio.has_folders(root, target)  # raises for a symlink in the way
        there = fileio.stat_file(target)
        if there is not None and _is_equal(target, copy):
            report.unchanged.append(name)
            continue
        if there is not None and not overwrite:
            report.kept.append(name)
            continue
        report.count(name, copy.stat().st_size)
        if write:
            fileio.make_directories(root, os.path.dirname(name), sync=True)  # noqa: PTH120
            _put(copy, target)


def _is_equal(path: str, copy: Path) -> bool:
    fd, status = fileio.open_regular(path, os.O_RDONLY)
    with os.fdopen(fd, "rb") as one, copy.open("rb") as other:
        if status.st_size != copy.stat().st_size:
            return False
        return all(left == right for left, right in zip(_chunks(one), _chunks(other), strict=True))


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _put(copy: Path, target: str) -> None:
    """Replace a file durably: a temporary file, fsync, rename, fsync of the folder."""
    folder, name = os.path.split(target)
    temporary = f"{folder}/{fileio.TEMPORARY}{name}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as into, copy.open("rb") as source:
        shutil.copyfileobj(source, into, _CHUNK)
        into.flush()
        os.fsync(into.fileno())
    Path(temporary).replace(target)
    fileio.sync_directory(folder)
