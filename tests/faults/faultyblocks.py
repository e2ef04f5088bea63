"""A block device whose reads and writes fail on demand, with ext4 on it.

nbdkit serves memory, nbdfuse makes a file of it, and a loop device a disk of that file.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.faults.mounting import Volume, run, why_not

MEGABYTES = 64


class FaultyVolume(Volume):
    """A volume whose device refuses to write, or to read, while it is told to."""

    def __init__(self, source: Path, root: Path, folder: Path) -> None:
        super().__init__(source, root)
        self._flags = {"write": folder / "no-writes", "read": folder / "no-reads"}

    def refuse(self, what: str) -> None:
        """From now on every ``write`` or ``read`` of a block is an I/O error."""
        self._flags[what].touch()

    def heal(self) -> None:
        for flag in self._flags.values():
            flag.unlink(missing_ok=True)


@contextmanager
def faulty_volume(root: Path) -> Iterator[FaultyVolume]:
    """An ext4 on such a device, mounted at ``root``; all of it is gone at the end.

    Skips the test where that cannot be.
    """
    if (missing := why_not("mkfs.ext4", "nbdkit", "nbdfuse", "fusermount3")) is not None:
        pytest.skip(missing)
    root.mkdir()
    with ExitStack() as stack:
        # A socket's path is short, and pytest's folders are not.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbd-")))
        socket, disk = folder / "socket", folder / "disk"
        disk.touch()
        serving = subprocess.Popen(
            [
                *("nbdkit", "-f", "-U", str(socket), "--filter=error", "memory"),
                *(f"{MEGABYTES}M", "error=EIO"),
                *("error-pwrite-rate=100%", f"error-pwrite-file={folder / 'no-writes'}"),
                *("error-pread-rate=100%", f"error-pread-file={folder / 'no-reads'}"),
            ],
            stderr=subprocess.DEVNULL,
        )
        stack.callback(end, serving)
        wait_for(socket.exists, serving)
        showing = subprocess.Popen(
            ["nbdfuse", str(disk), f"nbd+unix:///?socket={socket}"], stderr=subprocess.DEVNULL
        )
        stack.callback(end, showing)
        stack.callback(quietly, "fusermount3", "-u", "-z", str(disk))
        wait_for(lambda: disk.stat().st_size == MEGABYTES << 20, showing)
        device = run("losetup", "-f", "--show", disk).strip()
        stack.callback(quietly, "losetup", "-d", device)
        run("mkfs.ext4", "-qF", device)
        volume = FaultyVolume(Path(device), root, folder)
        stack.callback(quietly, "umount", "-l", str(root))
        stack.callback(volume.heal)
        volume.mount()
        yield volume


def quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, f"{process.args!r} ended"
        assert time.monotonic() < deadline, f"{process.args!r} does not come up"
        time.sleep(0.01)
