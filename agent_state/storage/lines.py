r"""Files of lines, read in pieces: forwards, and backwards from the end.

Lines end at ``\n`` alone. However long a line or a file is (a sparse one costs nobody anything to
make), memory is bounded: a line over ``MAX_LINE`` comes as an empty one, which nothing can read.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent_state.storage import atomic, syscalls

BLOCK = 64 * 1024
MAX_LINE = atomic.MAX_BYTES


class Splitter:
    """Cuts pieces of a file into whole lines."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.unended = 0
        """Bytes after the last whole line."""

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that end in this piece. ``str.splitlines`` would cut inside a record."""
        head, *others = piece.split(b"\n")
        self._add(head)
        if not others:
            return []
        whole = self.rest()
        self._parts, self.unended = [], 0
        self._add(others.pop())
        return [whole, *others]

    def rest(self) -> bytes:
        """What came after the last whole line."""
        return b"".join(self._parts)

    def _add(self, part: bytes) -> None:
        self.unended += len(part)
        if self.unended <= MAX_LINE:
            self._parts.append(part)
        else:
            self._parts.clear()


def forwards(fd: int, start: int, end: int) -> Iterator[bytes]:
    """The whole lines between two offsets, of which ``start`` is the beginning of one."""
    splitter = Splitter()
    while start < end and (piece := pread(fd, start, min(BLOCK, end - start))):
        yield from splitter.feed(piece)
        start += len(piece)


def backwards(fd: int, end: int) -> Iterator[bytes]:
    """The whole lines before ``end``, the last one first; ``end`` is just after a newline, or 0."""
    splitter = Splitter()
    position = end - 1
    while position > 0:
        start = max(0, position - BLOCK)
        # Turned round, a line ends where it begins.
        for line in splitter.feed(pread(fd, start, position - start)[::-1]):
            yield line[::-1]
        position = start
    if end > 0:
        yield splitter.rest()[::-1]


def last_newline(fd: int, end: int) -> int:
    """The offset just after the last newline before ``end``."""
    while end > 0:
        start = max(0, end - BLOCK)
        at = pread(fd, start, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def next_line(fd: int, offset: int, end: int) -> int:
    """The start of the first line at or after ``offset``."""
    while offset < end and (block := pread(fd, offset, min(BLOCK, end - offset))):
        at = block.find(b"\n")
        if at >= 0:
            return offset + at + 1
        offset += len(block)
    return end


def pread(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := syscalls.pread(fd, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)
