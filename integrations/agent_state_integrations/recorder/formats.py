"""The lines of one file in any format: plain, gzip, Zstandard, Parquet, one JSON document.

Everything comes in batches of lines without their newlines, in bounded memory: a piece of
64 KiB, or one row group of a Parquet file. A line over 256 MiB comes as an empty one.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import orjson

from agent_state.errors import StateCorruptedError, storage_error
from agent_state.serializers import parse_foreign
from agent_state.storage import fileio, logs, syscalls
from agent_state_integrations.recorder import parquet
from agent_state_integrations.recorder.files import ENDINGS, Format
from agent_state_integrations.recorder.lazy_imports import arrow
from agent_state_integrations.recorder.query import Query

PIECE = 64 * 1024
_BACKWARDS = 1000


class SupportsWrite(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes, /) -> object: ...


AnyFormat = Format | Literal["json"]
Batch = list[bytes]


def format_of(path: Path) -> AnyFormat | None:
    """The format by a file's name; None for one that cannot be read."""
    for ending in (".jsonl.zst", ".jsonl.gz", ".jsonl", ".parquet"):
        if path.name.endswith(ending):
            return ENDINGS[ending]
    return "json" if path.suffix == ".json" else None


def open_file(path: Path) -> BinaryIO:
    """A regular file for reading.

    Raises ``StateCorruptedError`` for anything else in its place, ``FileNotFoundError`` where
    there is nothing, ``StorageError`` when it cannot be opened.
    """
    try:
        fd, _ = fileio.open_regular(os.fspath(path), syscalls.READ)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_error(error, "opening a file", path=path) from error
    return os.fdopen(fd, "rb", buffering=0)


class GzipWriter:
    """Packs what is written into a file; equal bytes give equal bytes. ``close`` ends the stream.

    One that was not closed is left as it is. ``gzip.GzipFile`` of Python 3.12 and newer writes when
    it is collected what it could not write before, and its error is printed.
    """

    def __init__(self, out: SupportsWrite) -> None:
        self._out = out
        self._packer = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)

    def write(self, data: bytes) -> None:
        self._out.write(self._packer.compress(data))

    def close(self) -> None:
        self._out.write(self._packer.flush())


def batches(
    file: BinaryIO,
    path: Path,
    kind: AnyFormat,
    query: Query | None = None,
    *,
    backwards: bool = False,
) -> Iterator[Batch]:
    """The lines of an open file, which is closed afterwards.

    With a ``query``, lines that do not match it may be left out, if the format shows that.
    ``backwards``: the last line first. Raises ``StateCorruptedError`` naming a file that is damaged
    as such, ``StorageError``, and ``MissingExtraError`` for Zstandard and Parquet.
    """
    with file:
        try:
            if kind == "parquet":
                yield from parquet.batches(file, path, query, backwards=backwards)
            elif kind == "jsonl" and backwards:
                yield from _plain_backwards(file)
            elif kind == "json":
                documents = _in_document(file, path)
                yield from _reversed(documents) if backwards else documents
            else:
                found = split(_pieces(file, path, kind))
                yield from _reversed(found) if backwards else found
        except OSError as error:
            raise storage_error(error, "reading a file", path=path) from error


def contents(file: BinaryIO, path: Path, kind: Format) -> Iterator[bytes]:
    """The bytes of the plain segment that a file is, or was made of. Raises as ``batches``."""
    if kind == "parquet":
        for batch in batches(file, path, kind):
            yield b"\n".join(batch) + b"\n"
        return
    with file:
        try:
            yield from _pieces(file, path, kind)
        except OSError as error:
            raise storage_error(error, "reading a file", path=path) from error


def split(pieces: Iterable[bytes]) -> Iterator[Batch]:
    """Pieces of a file as batches of lines; text after the last newline is a line too."""
    splitter = logs.Splitter()
    for piece in pieces:
        if lines := splitter.feed(piece):
            yield lines
    if splitter.unended:
        yield [splitter.rest()]


def _pieces(file: BinaryIO, path: Path, kind: AnyFormat) -> Iterator[bytes]:
    """The bytes of a file, unpacked."""
    if kind == "jsonl":
        while piece := syscalls.read(file.fileno(), PIECE):
            yield piece
        return
    try:
        with _unpacked(file, kind) as stream:
            while piece := stream.read(PIECE):
                yield piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StateCorruptedError(f"this archive is damaged: {error}", path=path) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise StateCorruptedError(f"this archive is damaged: {error}", path=path) from error


def _unpacked(file: BinaryIO, kind: AnyFormat) -> Any:  # both read like a file
    if kind == "gz":
        return gzip.GzipFile(fileobj=io.BufferedReader(_SyscallReader(file)), mode="rb")
    return arrow().CompressedInputStream(arrow().PythonFile(_SyscallReader(file), mode="r"), "zstd")


class _SyscallReader(io.RawIOBase):
    """A file read by the calls of the stores, so that a test can make them fail."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return syscalls.read(self._file.fileno(), size if size >= 0 else PIECE)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _plain_backwards(file: BinaryIO) -> Iterator[Batch]:
    """The lines of a log, the last one first."""
    fd = file.fileno()
    size = os.fstat(fd).st_size
    end = logs.last_newline(fd, size)
    if end < size:
        rest = logs.pread(fd, end, size - end) if size - end <= logs.MAX_LINE else b""
        yield [rest]
    found = logs.backwards(fd, end)
    while batch := list(islice(found, _BACKWARDS)):
        yield batch


def in_order(found: Iterable[Batch], *, backwards: bool) -> Iterator[Batch]:
    """These lines, or the last one first; then all of them are held."""
    yield from _reversed(found) if backwards else found


def _reversed(found: Iterable[Batch]) -> Iterator[Batch]:
    """Packed files can only be read forwards, so that one of them is held at a time."""
    yield list(chain.from_iterable(found))[::-1]


HEAD = b'"messages":['
"""How the first line of our exports ends; a message a line follows, and a line with ``]``."""


def _in_document(file: BinaryIO, path: Path) -> Iterator[Batch]:
    """The messages in a checkpoint's export: ours line by line, others in one piece."""
    found = split(_pieces(file, path, "jsonl"))
    first = next(found, [])
    if first and first[0].startswith(b"{") and first[0].endswith(HEAD):
        yield from _line_by_line(chain([first[1:]], found))
        return
    total, parts = 0, [b"\n".join(first)]
    for batch in found:
        parts.extend(batch)
        total += sum(map(len, batch))
        if total > logs.MAX_LINE:
            raise StateCorruptedError(f"over the limit of {logs.MAX_LINE} bytes", path=path)
    try:
        document, _ = parse_foreign(b"\n".join(parts))
    except StateCorruptedError as error:
        raise StateCorruptedError(error.message, path=path) from error
    messages = document.get("messages") if isinstance(document, dict) else document
    if not isinstance(messages, list):
        raise StateCorruptedError("this JSON document holds no messages", path=path)
    yield [orjson.dumps(message) for message in messages]


def _line_by_line(found: Iterable[Batch]) -> Iterator[Batch]:
    for batch in found:
        yield [line.removesuffix(b",") for line in batch if not line.startswith(b"]")]
