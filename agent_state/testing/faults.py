"""A disk that fails on demand: every system call of the stores, counted and breakable.

    with FaultyDisk(Fault(at=3, call="fsync", error=errno.EIO)) as disk:
        ...
    assert disk.fired

Whole processes are killed elsewhere; here one call is the last of a *pretended* process, at
any place and in any thread, which is exact and takes microseconds.
"""

from __future__ import annotations

import contextlib
import errno as errno_module
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from agent_state.storage import syscalls

CALLS = (
    "open",
    "close",
    "read",
    "pread",
    "write",
    "ftruncate",
    "fsync",
    "fdatasync",
    "fsync_directory",
    "syncfs",
    "rename",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
    "stat",
    "fstat",
    "scandir",
)
"""The names a ``Fault`` may be limited to: the functions of ``agent_state.storage.syscalls``."""

CHANGING = frozenset(
    {"open", "write", "ftruncate", "fsync", "fdatasync", "fsync_directory", "syncfs"}
    | {"rename", "link", "unlink", "mkdir", "rmdir"}
)
"""The calls that may change the disk, or confirm a change."""

Action = Literal["fail", "short", "crash before", "crash after", "crash torn"]


def check_ordinal(number: object) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what is no number counted from 1."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"calls and commits are counted by an integer, not by {number!r}")
    if number < 1:
        raise ValueError("calls and commits are counted from 1")


class Crash(BaseException):  # not an error: the process is gone
    """The pretended process died here; nothing after this reaches the disk."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of the disk, and its time.

    ``at``: the n-th call, counted from 1 among those named ``call`` (None: among all; a set: among
    these). ``action``: ``fail`` raises ``OSError(error)`` with nothing done; ``short`` writes half
    of what a write was given, and leaves other calls alone; ``crash before`` / ``crash after`` the
    call, or ``crash torn`` in the middle of a write (before any other call). ``persistent``: every
    later such call fails too. Raises ``ValueError`` for a call or an action that there is not.
    """

    at: int
    call: str | frozenset[str] | None = None
    action: Action = "fail"
    error: int = errno_module.EIO
    persistent: bool = False

    def __post_init__(self) -> None:
        calls = {self.call} if isinstance(self.call, str) else self.call or frozenset()
        if unknown := sorted(calls - {*CALLS}):
            raise ValueError(f"no such system call: {unknown[0]}; there are {', '.join(CALLS)}")
        if self.action not in get_args(Action):
            actions = ", ".join(get_args(Action))
            raise ValueError(f"no such action: {self.action!r}; there are {actions}")
        check_ordinal(self.at)

    def concerns(self, name: str) -> bool:
        """Whether a call of this name is counted."""
        if self.call is None:
            return True
        return name == self.call if isinstance(self.call, str) else name in self.call


class FaultyDisk:
    """A context in which the stores' system calls are counted, and fail on demand.

    After a crash every later call raises ``Crash``, except ``close``: what a dead process had
    open, the kernel closes, and so does leaving the context. ``at_crash`` is called first, in
    the thread that made the call: it can end the process for real, or cut the power.
    ``under``: only calls about this directory and what is below it count, and fail; None: all.
    """

    def __init__(
        self,
        *faults: Fault,
        at_crash: Callable[[], object] | None = None,
        under: str | os.PathLike[str] | None = None,
    ) -> None:
        self._faults = faults
        self._at_crash = at_crash
        self._under = None if under is None else os.path.realpath(under)
        self._inside: dict[int, bool] = {}
        """Whether a descriptor is of a file below ``under``."""
        self._counted = [0] * len(faults)
        # Entered again where a finalizer closes a file in the midst of a call.
        self._mutex = threading.RLock()
        self._real: dict[str, Callable[..., Any]] = {}
        self._descriptors: set[int] = set()
        self.calls: list[tuple[str, str]] = []
        """Every call so far: its name, and the path or descriptor it was about."""
        self.fired = False
        """Whether any fault has happened."""
        self.crashed = False

    def count(self, name: str | None = None) -> int:
        """How many calls there were, of this name or of any."""
        return sum(1 for called, _ in self.calls if name is None or called == name)

    def __enter__(self) -> Self:
        for name in CALLS:
            self._real[name] = getattr(syscalls, name)
            setattr(syscalls, name, self._wrapped(name, self._real[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(syscalls, name, real)
        if self.crashed:
            for descriptor in self._descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            self._descriptors.clear()

    def heal(self) -> None:
        """From now on nothing fails any more."""
        self._faults = ()

    def crash(self) -> None:
        """From now on nothing reaches the disk."""
        self.crashed = True

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # any system call
            concerned = self._under is None or self._is_inside(self._under, args[0])
            if name == "close":
                self._descriptors.discard(args[0])
                self._inside.pop(args[0], None)
            if not concerned:
                return real(*args, **kwargs)
            fault = self._next(name, str(args[0]))
            if fault is None:
                result = real(*args, **kwargs)
            else:
                result = self._break(fault, name, real, args)
            if name == "open":
                self._descriptors.add(result)
                self._inside[result] = True
            return result

        return call

    def _is_inside(self, under: str, about: str | int) -> bool:
        """Whether a path, or the file of a descriptor, is below a directory."""
        if isinstance(about, int):
            known = self._inside.get(about)
            if known is None:  # it was open before
                known = self._inside[about] = _is_below(under, _path_of(about))
            return known
        return _is_below(under, about)

    def _next(self, name: str, about: str) -> Fault | None:
        """Count the call; the fault that is due now. Raises ``Crash`` once it is over."""
        with self._mutex:
            if self.crashed:
                if name == "close":
                    return None
                raise Crash(f"{name} after the end")
            self.calls.append((name, about))
            due = None
            for index, fault in enumerate(self._faults):
                if fault.concerns(name):
                    self._counted[index] += 1
                    over = self._counted[index] - fault.at
                    if over == 0 or (over > 0 and fault.persistent):
                        due = due or fault
            if due is not None:
                self.fired = True
                self.crashed = due.action.startswith("crash")
            return due

    def _break(
        self, fault: Fault, name: str, real: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:  # what the call returns
        if name == "close":
            real(*args)  # a descriptor whose close fails is gone all the same
        if fault.action == "fail":
            raise OSError(fault.error, os.strerror(fault.error))
        if name == "write" and fault.action in ("short", "crash torn"):
            result = real(args[0], bytes(args[1])[: (len(args[1]) + 1) // 2])
            if fault.action == "short":
                return result
        elif fault.action == "short":
            return real(*args)
        elif fault.action == "crash after" and name != "close":
            result = real(*args)
            if name == "open":
                os.close(result)
        if self._at_crash is not None:
            self._at_crash()
        raise Crash(f"at {name}")


def _is_below(directory: str, path: str) -> bool:
    return path == directory or path.startswith(directory + os.sep)


def _path_of(descriptor: int) -> str:
    """The path of an open file, where the system tells it; else one that is nowhere."""
    try:
        target = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115  # a text to compare
        return target.removesuffix(" (deleted)")
    except OSError:
        return ""
