"""Real file systems in image files, mounted for a test, whose power can be cut.

The cut is the file system's own shutdown (as xfstests does it): nothing that is not on the disk
comes to it any more, and the next mount recovers as after a power failure.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.ledger import Held, look, make_store

_SHUTDOWN = 0x8004587D
"""FS_IOC_SHUTDOWN (EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN)."""
LOSE_LOG, KEEP_LOG = 2, 1
"""With the cut, what the file system had logged but not written is lost, or it is kept."""
FILE_SYSTEMS = {"ext4": ("mkfs.ext4", "-qF"), "xfs": ("mkfs.xfs", "-qf")}
MEGABYTES = {"ext4": 64, "xfs": 320}
"""xfs refuses to be smaller than 300 MB; the images are sparse."""
_SECONDS = 10.0


def why_not(*programs: str) -> str | None:
    """What is missing for a mount, and for these programs."""
    if os.geteuid() != 0:
        return "needs root, to mount"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices (/dev/loop-control)"
    for program, package in (
        ("mkfs.ext4", "e2fsprogs"),
        ("mkfs.xfs", "xfsprogs"),
        ("nbdkit", "nbdkit"),
        ("nbdfuse", "nbdfuse (libnbd)"),
        ("fusermount3", "fuse3"),
    ):
        if program in programs and shutil.which(program) is None:
            return f"needs {program} (apt install {package})"
    return None


def run(*command: str | Path) -> str:
    """A command that has to succeed; what it printed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Volume:
    """A file system on an image file (or a device), mounted at ``root``."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source = source
        self.root = root

    def mount(self, *options: str) -> None:
        loop = [] if self.source.is_block_device() else ["loop"]
        chosen = ",".join([*loop, *options])
        run("mount", *(["-o", chosen] if chosen else []), self.source, self.root)

    def unmount(self) -> None:
        """Waits for what still has something open there."""
        deadline = time.monotonic() + _SECONDS
        while True:
            done = subprocess.run(
                ["umount", str(self.root)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.005)

    def cut(self, how: int) -> None:
        """The power is cut, now."""
        try:
            fd = os.open(self.root, os.O_RDONLY)
            try:
                fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", how))
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno != errno.EIO:  # it was cut before
                raise

    def restart(self) -> None:
        """Mount again, which recovers."""
        self.unmount()
        self.mount()

    def sync(self) -> None:
        """All there is comes to the disk."""
        run("sync", "-f", self.root)


@contextmanager
def volume(
    folder: Path, kind: str, *, make: tuple[str, ...] = (), megabytes: int = 0
) -> Iterator[Volume]:
    """A fresh file system of that kind; unmounted at the end, whatever happens.

    Skips the test where that cannot be.
    """
    program, *options = FILE_SYSTEMS[kind]
    if (missing := why_not(program)) is not None:
        pytest.skip(missing)
    root = folder / kind
    root.mkdir(parents=True)
    with image_file(megabytes or MEGABYTES[kind]) as image:
        run(program, *options, *make, image)
        mounted = Volume(image, root)
        try:
            mounted.mount()
            yield mounted
        finally:
            # Lazily: a test that failed may have left files open. The loop device goes with it.
            subprocess.run(["umount", "-l", str(root)], capture_output=True, check=False)


@contextmanager
def image_file(megabytes: int) -> Iterator[Path]:
    """An empty image, in memory where there is such a place: the machine's disk is not tested."""
    memory = Path("/dev/shm")
    with tempfile.NamedTemporaryFile(dir=memory if memory.is_dir() else None) as file:
        file.truncate(megabytes << 20)
        yield Path(file.name)


async def seen(kind: str, root: Path) -> Held:
    """What a store finds when it opens."""
    store = make_store(kind, root)
    await store.open()
    try:
        return await look(store)
    finally:
        await store.close()
