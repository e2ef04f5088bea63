"""A file system in memory that forgets what was not synced, and fails as told.

Run as a program it serves itself by FUSE; commands come as JSON lines on its standard input.
It keeps the strictest reading of POSIX: ``fsync`` of a file makes its bytes durable, not its
name; ``fsync`` of a directory makes the names in it durable, not what they lead to; the order
of everything else is free. A rename is whole.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import sys
import threading
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

numbers = itertools.count(2)


@dataclass(eq=False)
class Node:
    """A file or a directory: as it is seen, and as it is on the disk."""

    mode: int
    number: int = field(default_factory=lambda: next(numbers))
    changed: int = field(default_factory=time.time_ns)
    links: int = 0
    data: bytearray = field(default_factory=bytearray)
    disk: bytearray = field(default_factory=bytearray)
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Not yet on the disk: bytes at a place, or (None) the end of the file."""
    names: dict[str, Node] = field(default_factory=dict)
    disk_names: dict[str, Node] = field(default_factory=dict)
    renames: list[NameChange] = field(default_factory=list)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


@dataclass(eq=False)
class NameChange:
    """One change of names, in one folder or two, whole or not at all."""

    steps: list[tuple[Node, str, Node | None]]
    done: bool = False

    def reach_the_disk(self) -> None:
        if not self.done:
            self.done = True
            for folder, name, node in self.steps:
                put_name(folder.disk_names, name, node)


def put_name(names: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def write_into(data: bytearray, offset: int, new: bytes | None) -> None:
    if new is None:
        del data[offset:]
        return
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(new)] = new


def new_folder() -> Node:
    return Node(stat.S_IFDIR | 0o700)


def new_file() -> Node:
    return Node(stat.S_IFREG | 0o600)


class Disk:
    """Trees of files by name, and what a cut leaves of them."""

    def __init__(self) -> None:
        self.root = new_folder()

    def settle(self, tree: str) -> None:
        """All of a tree is on the disk."""
        todo = [self.root.names[tree]]
        while todo:
            node = todo.pop()
            node.disk, node.disk_names = bytearray(node.data), dict(node.names)
            node.writes.clear()
            node.renames.clear()
            todo += node.names.values()

    def copy(self, tree: str, to: str) -> None:
        """A copy of a settled tree, as settled."""
        if tree in self.root.names:
            self.root.names[to] = _Left(Random(0), "settled").of(self.root.names[tree])

    def cut(self, tree: str, to: str, how: str, seed: int) -> None:
        """What a power cut at this moment would leave of a tree, as another one."""
        if tree in self.root.names:
            self.root.names[to] = _Left(Random(seed), how).of(self.root.names[tree])

    def remove(self, tree: str) -> None:
        self.root.names.pop(tree, None)


class _Left:
    """What is left after a cut.

    ``all`` that was not synced is lost; or only data is (``metadata``: the files have their
    names, and nothing or NULs for content); or ``some`` of it, by chance and in any order.
    """

    def __init__(self, random: Random, how: str) -> None:
        self._random = random
        self._how = how
        self._made: dict[Node, Node] = {}

    def of(self, node: Node) -> Node:
        if node in self._made:
            return self._made[node]
        made = self._made[node] = Node(node.mode, changed=node.changed)
        if node.is_folder:
            for name, child in self._names(node).items():
                left = self.of(child)
                left.links += 1
                made.names[name] = made.disk_names[name] = left
        else:
            made.data = self._data(node)
            made.disk = bytearray(made.data)
        return made

    def _names(self, node: Node) -> dict[str, Node]:
        if self._how == "some":
            for change in node.renames:
                if not change.done and self._random.random() < 0.5:
                    change.reach_the_disk()
        return node.names if self._how == "metadata" else node.disk_names

    def _data(self, node: Node) -> bytearray:
        data = bytearray(node.disk)
        if self._how == "some":
            for offset, new in node.writes:
                if self._random.random() < 0.5:
                    write_into(data, offset, new)
        if self._how != "all" and self._random.random() < 0.5:
            data.extend(bytes(max(0, len(node.data) - len(data))))
        return data


class FullError(OSError):
    """No room."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


class LossyFS:
    """The operations of FUSE. What it does wrong is in its attributes, set by commands."""

    use_ns = True

    def __init__(self) -> None:
        self.disk = Disk()
        self.fail_at = 0
        """The n-th call of ``fail_call`` from now fails with ``fail_errno``."""
        self.fail_call = ""
        self.fail_errno = errno.EIO
        self.lies = ""
        """``once``: a sync that fails drops the file's bytes, and the next one says yes;
        ``always``: none does anything."""
        self.slow = 0.0
        self.short = 0
        """So many bytes of a write are taken at most; 0: all of them."""
        self.room = -1
        """So many bytes and new names may still come; -1: any number."""
        self.folds = False
        self.links = True
        self.counts: Counter[str] = Counter()
        self._open: dict[int, Node] = {}
        self._handles = itertools.count(1)
        self._mutex = threading.Lock()

    def command(self, line: dict[str, Any]) -> object:
        """One command: set attributes, or call a method of the disk; ``counts`` is the answer."""
        with self._mutex:
            if line.get("do") == "set":
                for name, value in line["values"].items():
                    setattr(self, name, value)
            elif line.get("do") == "counts":
                counts, self.counts = self.counts, Counter()
                return counts
            else:
                getattr(self.disk, line["do"])(*line["args"])
        return None

    # -- names -----------------------------------------------------------------------------

    def _name(self, name: str) -> str:
        """As names are told apart: with ``folds`` as on a Mac."""
        return unicodedata.normalize("NFD", name).casefold() if self.folds else name

    def _find(self, path: str) -> Node:
        node = self.disk.root
        for name in path.split("/")[1:] if path != "/" else ():
            found = node.names.get(self._name(name))
            if found is None:
                raise OSError(errno.ENOENT if node.is_folder else errno.ENOTDIR, path)
            node = found
        return node

    def _place(self, path: str) -> tuple[Node, str]:
        parent, _, name = path.rpartition("/")
        return self._find(parent or "/"), self._name(name)

    def _change_names(self, *steps: tuple[Node, str, Node | None]) -> None:
        change = NameChange(list(steps))
        for folder, name, node in steps:
            put_name(folder.names, name, node)
            folder.changed = time.time_ns()
            folder.renames = [known for known in folder.renames if not known.done]
            folder.renames.append(change)

    def _fail(self, call: str) -> None:
        self.counts[call] += 1
        if self.fail_at and call in self.fail_call.split():
            self.fail_at -= 1
            if not self.fail_at:
                self.counts["failed"] += 1
                raise OSError(self.fail_errno, os.strerror(self.fail_errno))

    def _take_room(self, wanted: int) -> int:
        if self.room < 0:
            return wanted
        if self.room == 0:
            self.counts["failed"] += 1
            raise FullError
        taken = min(wanted, self.room)
        self.room -= taken
        return taken

    # -- what FUSE asks for ------------------------------------------------------------------

    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, int]:
        with self._mutex:
            node = self._open[fh] if fh else self._find(path or "/")
            return {
                "st_mode": node.mode,
                "st_ino": node.number,
                "st_nlink": max(1, node.links),
                "st_size": len(node.data),
                "st_mtime": node.changed,
                "st_ctime": node.changed,
                "st_atime": node.changed,
                "st_uid": os.getuid(),
                "st_gid": os.getgid(),
            }

    def _handle(self, node: Node) -> int:
        number = next(self._handles)
        self._open[number] = node
        return number

    def open(self, path: str, flags: int) -> int:
        with self._mutex:
            self._fail("open")
            return self._handle(self._find(path))

    def opendir(self, path: str) -> int:
        return self.open(path, os.O_RDONLY)

    def create(self, path: str, mode: int) -> int:
        with self._mutex:
            self._fail("create")
            self._take_room(1)
            folder, name = self._place(path)
            node = new_file()
            node.links = 1
            self._change_names((folder, name, node))
            return self._handle(node)

    def mkdir(self, path: str, mode: int) -> None:
        with self._mutex:
            self._fail("mkdir")
            self._take_room(1)
            folder, name = self._place(path)
            self._change_names((folder, name, new_folder()))

    def readdir(self, path: str | None, fh: int) -> list[tuple[str, dict[str, int], int]]:
        with self._mutex:
            self._fail("readdir")
            folder = self._open[fh]
            names = {".": folder, "..": folder, **folder.names}
            return [
                (name, {"st_mode": node.mode, "st_ino": node.number}, 0)
                for name, node in names.items()
            ]

    def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
        with self._mutex:
            self._fail("read")
            return bytes(self._open[fh].data[offset : offset + size])

    def write(self, path: str | None, data: bytes, offset: int, fh: int) -> int:
        with self._mutex:
            self._fail("write")
            taken = self._take_room(min(len(data), self.short or len(data)))
            node, data = self._open[fh], data[:taken]
            write_into(node.data, offset, data)
            node.writes.append((offset, data))
            node.changed = time.time_ns()
            return taken

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        with self._mutex:
            self._fail("truncate")
            node = self._open[fh] if fh else self._find(path)
            write_into(node.data, length, None)
            node.data.extend(bytes(length - len(node.data)))
            node.writes.append((length, None))
            node.changed = time.time_ns()

    def fsync(self, path: str | None, datasync: int, fh: int) -> None:
        if self.slow:
            time.sleep(self.slow)
        with self._mutex:
            node = self._open[fh]
            if self.lies == "always":
                return
            try:
                self._fail("fsync")
            except OSError:
                if self.lies == "once":  # as a kernel does that marks what it could not write clean
                    node.writes = []
                raise
            for offset, data in node.writes:
                write_into(node.disk, offset, data)
            for change in node.renames:
                change.reach_the_disk()
            node.writes, node.renames = [], []

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> None:
        self.fsync(path, datasync, fh)

    def unlink(self, path: str) -> None:
        with self._mutex:
            self._fail("unlink")
            folder, name = self._place(path)
            self._find(path).links -= 1
            self._change_names((folder, name, None))

    def rmdir(self, path: str) -> None:
        with self._mutex:
            self._fail("rmdir")
            if self._find(path).names:
                raise OSError(errno.ENOTEMPTY, path)
            self._change_names((*self._place(path), None))

    def rename(self, old: str, new: str) -> None:
        with self._mutex:
            self._fail("rename")
            node, source, target = self._find(old), self._place(old), self._place(new)
            if source == target:
                return
            self._change_names((*source, None), (*target, node))

    def link(self, target: str, source: str) -> None:
        with self._mutex:
            self._fail("link")
            if not self.links:
                raise OSError(errno.EPERM, source)
            node = self._find(source)
            node.links += 1
            self._change_names((*self._place(target), node))

    def chmod(self, path: str, mode: int) -> None:
        with self._mutex:
            node = self._find(path)
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        with self._mutex:
            self._find(path).changed = times[1] if times else time.time_ns()

    def statfs(self, path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_blocks": 1 << 20, "f_bavail": 1 << 19, "f_bfree": 1 << 19}

    def flush(self, path: str | None, fh: int) -> None:
        """Each descriptor's close."""

    def release(self, path: str | None, fh: int) -> None:
        with self._mutex:
            self._open.pop(fh, None)

    def releasedir(self, path: str | None, fh: int) -> None:
        self.release(path, fh)


def serve(mountpoint: str, *, caches: bool) -> None:
    """Until it is unmounted. With ``caches`` the kernel remembers names and attributes."""
    import mfusepy  # only who serves needs it

    lossy = LossyFS()

    def obey() -> None:
        for line in sys.stdin:
            answer = lossy.command(json.loads(line))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()

    threading.Thread(target=obey, daemon=True).start()
    seconds = 600 if caches else 0
    mfusepy.FUSE(
        lossy,
        mountpoint,
        foreground=True,
        hard_remove=True,
        use_ino=True,
        direct_io=not caches,
        attr_timeout=seconds,
        entry_timeout=seconds,
        negative_timeout=0,
    )


if __name__ == "__main__":
    serve(sys.argv[1], caches="caches" in sys.argv[2:])
