"""What a power cut may leave: a trace of real system calls, and every state it allows.

A trace becomes events: names that change, bytes that are written, syncs, and lines of the ledger.
For each moment between two events there are many states in which a file system may be found
afterwards, since what was not synced may be there, or not, or in part. Two models:

``journal``, like ext4 or xfs: names persist in the order in which they changed, up to some moment;
an fsync makes durable every name that changed before what it syncs last changed.
``weakest``, what POSIX promises: each change of a name that was not synced with its directory may
be there or not, whatever became of the others.

In both, bytes that were not synced may be missing, half there, or zeros in a file of the new size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from random import Random
from typing import Literal

from tests.faults.tracing import LOCKING, NAMING, SYNCING, Call

Model = Literal["journal", "weakest"]
MODELS: tuple[Model, ...] = ("journal", "weakest")

Place = tuple[int, str]
"""A name: the inode of its directory, and what it is called there."""
TOP = 0
"""The inode of the directory above the state directory."""
ROOT = "state"


@dataclass(frozen=True)
class Named:
    """Names that changed, in one piece: these went, these came."""

    number: int
    gone: tuple[Place, ...]
    come: tuple[tuple[Place, int], ...]

    @property
    def directories(self) -> set[int]:
        return {place[0] for place in chain(self.gone, (place for place, _ in self.come))}

    def concerns(self, inode: int) -> bool:
        return inode in self.directories or any(inode == new for _, new in self.come)


@dataclass(frozen=True)
class Written:
    """Bytes of a file that changed. ``data`` is None where it was cut to ``offset`` bytes."""

    number: int
    inode: int
    offset: int
    data: bytes | None

    def on(self, content: bytes) -> bytes:
        if self.data is None:
            return content[: self.offset].ljust(self.offset, b"\0")
        start = content[: self.offset].ljust(self.offset, b"\0")
        return start + self.data + content[self.offset + len(self.data) :]


@dataclass(frozen=True)
class Synced:
    """An inode (None: everything) as it was when event ``upto`` had not happened yet."""

    number: int
    inode: int | None
    upto: int


@dataclass(frozen=True)
class Told:
    """A line of the ledger. It is outside, and durable at once."""

    number: int
    data: bytes


Event = Named | Written | Synced | Told


@dataclass(frozen=True)
class State:
    """A tree of files as it may be found: bytes by path, and None for a directory."""

    files: frozenset[tuple[str, bytes | None]]
    told: bytes
    about: str = field(compare=False)

    @staticmethod
    def of(folder: Path, told: bytes) -> State:
        """What is there."""
        files = {
            (str(path.relative_to(folder)), None if path.is_dir() else path.read_bytes())
            for path in folder.rglob("*")
        }
        return State(frozenset(files), told, "as it is")

    def put_into(self, folder: Path) -> None:
        """Make it real. All of it is old: nobody is writing it at this moment."""
        for path, content in sorted(self.files):
            target = f"{folder}/{path}"
            if content is None:
                Path(target).mkdir()
                continue
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(descriptor, content)
            finally:
                os.close(descriptor)
            os.utime(target, (1, 1))


# -- from a trace to events --------------------------------------------------------------------


class Recorder:
    """Follows a trace: which inode each name and each descriptor is at any moment."""

    def __init__(self, before: Path, folder: Path, ledger: Path) -> None:
        """``before`` is how the state directory was; the trace is about ``folder/state``."""
        self._folder, self._ledger = str(folder), str(ledger)
        self.contents: dict[int, bytes | None] = {TOP: None}
        """What was there before, by inode; None for a directory."""
        self.names: dict[Place, int] = {}
        self._now: dict[Place, int] = {}
        self._sizes: dict[int, int] = {}
        self._open: dict[int, tuple[int, bool, int]] = {}
        self.events: list[Event] = []
        self.begun = 0
        """How many events there were before the last process."""
        self._ended: list[int] = []
        if before.exists():
            self._load(before, (TOP, ROOT))
        self._now = dict(self.names)

    def _load(self, path: Path, place: Place) -> None:
        inode = self._new(None if path.is_dir() else path.read_bytes())
        self.names[place] = inode
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self._load(child, (inode, child.name))

    def _new(self, content: bytes | None) -> int:
        inode = len(self.contents)
        self.contents[inode] = content
        self._sizes[inode] = len(content or b"")
        return inode

    def follow(self, calls: Sequence[Call]) -> list[Event]:
        """What a process did; the next one may be followed afterwards.

        Calls count in the order in which they ended: what follows from one began later. But a
        descriptor is free for another thread as soon as its ``close`` has begun.
        """
        self._open.clear()
        self.begun = len(self.events)
        done = (call for call in calls if call.result is not None and call.result >= 0)
        for call in sorted(done, key=lambda c: c.began if c.name == "close" else c.ended):
            before = len(self.events)
            if call.name == "openat":
                self._opened(call)
            elif call.name in NAMING:
                self._renamed(call)
            else:
                self._on_descriptor(call)
            self._ended += [call.ended] * (len(self.events) - before)
        self._ended = [-1] * len(self.events)
        return self.events

    def _place(self, path: str) -> Place | None:
        """Where a path is, if it is below the folder and its directory is there."""
        if not path.startswith(f"{self._folder}/"):
            return None
        *folders, name = path[len(self._folder) + 1 :].split("/")
        inode: int | None = TOP
        for folder in folders:
            inode = None if inode is None else self._now.get((inode, folder))
        return None if inode is None else (inode, name)

    def _name(self, gone: tuple[Place, ...], come: tuple[tuple[Place, int], ...]) -> None:
        self.events.append(Named(len(self.events), gone, come))
        for place in gone:
            self._now.pop(place, None)
        self._now.update(come)

    def _write(self, inode: int, offset: int, data: bytes | None) -> None:
        self.events.append(Written(len(self.events), inode, offset, data))
        end = offset + len(data or b"")
        self._sizes[inode] = end if data is None else max(end, self._sizes[inode])

    def _opened(self, call: Call) -> None:
        path = call.paths[0]
        assert call.result is not None
        if path == self._folder:
            self._open[call.result] = (TOP, False, 0)
            return
        if path == self._ledger:
            self._open[call.result] = (-1, True, 0)
            return
        place = self._place(path)
        if place is None or (place[0] == TOP and place[1] != ROOT):
            return
        if place not in self._now:
            assert "O_CREAT" in call.args, call
            self._name((), ((place, self._new(b"")),))
        inode = self._now[place]
        if "O_TRUNC" in call.args and self._sizes[inode]:
            self._write(inode, 0, None)
        self._open[call.result] = (inode, "O_APPEND" in call.args, 0)

    def _renamed(self, call: Call) -> None:
        places = [self._place(path) for path in call.paths]
        if any(place is None for place in places):
            return
        known = [place for place in places if place is not None]
        if call.name.startswith("mkdir"):
            self._name((), ((known[0], self._new(None)),))
        elif call.name.startswith("rename"):
            self._name((known[0],), ((known[1], self._now[known[0]]),))
        elif call.name.startswith("link"):
            self._name((), ((known[1], self._now[known[0]]),))
        else:
            self._name((known[0],), ())

    def _on_descriptor(self, call: Call) -> None:
        descriptor, _ = call.descriptor
        opened = self._open.get(descriptor)
        if opened is None:
            return
        inode, appends, at = opened
        if call.name == "close":
            del self._open[descriptor]
        elif call.name in SYNCING:
            upto = sum(ended < call.began for ended in self._ended)
            whole = None if call.name == "syncfs" else inode
            self.events.append(Synced(len(self.events), whole, upto))
        elif call.name == "lseek":
            assert call.result is not None
            self._open[descriptor] = (inode, appends, call.result)
        elif call.name == "ftruncate":
            self._write(inode, int(call.args.rpartition(",")[2]), None)
        elif call.name == "write":
            assert call.result is not None
            data = call.strings[0][: call.result]
            if inode < 0:
                self.events.append(Told(len(self.events), data))
                return
            offset = self._sizes[inode] if appends else at
            self._write(inode, offset, data)
            self._open[descriptor] = (inode, appends, offset + len(data))
        else:
            assert call.name in LOCKING, f"not understood: {call}"


# -- from events to states ---------------------------------------------------------------------

Variant = Callable[[bytes, Sequence[Written]], bytes]
"""From what a file surely holds, and what was written since, to what may be found."""


def _none(base: bytes, _: Sequence[Written]) -> bytes:
    return base


def _whole(base: bytes, written: Sequence[Written]) -> bytes:
    for one in written:
        base = one.on(base)
    return base


def _new_part(base: bytes, written: Sequence[Written]) -> tuple[bytes, int]:
    """The whole, and where it begins to be new."""
    return _whole(base, written), min(len(base), *(one.offset for one in written))


def _half(base: bytes, written: Sequence[Written]) -> bytes:
    whole, start = _new_part(base, written)
    return whole[: (start + len(whole) + 1) // 2]


def _zeros(base: bytes, written: Sequence[Written]) -> bytes:
    whole, start = _new_part(base, written)
    return whole[:start].ljust(len(whole), b"\0")


def _torn(base: bytes, written: Sequence[Written]) -> bytes:
    """The first half of what is new is zeros, the second half is there."""
    whole, start = _new_part(base, written)
    middle = (start + len(whole) + 1) // 2
    return whole[:start].ljust(middle, b"\0") + whole[middle:]


def _first(base: bytes, written: Sequence[Written]) -> bytes:
    return _whole(base, written[:1])


def _but_last(base: bytes, written: Sequence[Written]) -> bytes:
    return _whole(base, written[:-1])


VARIANTS: dict[str, Variant] = {
    "none": _none,
    "whole": _whole,
    "half": _half,
    "zeros": _zeros,
    "torn": _torn,
    "first": _first,
    "but last": _but_last,
}


class Moment:
    """A power cut after so many events, in one model."""

    def __init__(self, recorder: Recorder, cut: int, model: Model) -> None:
        self._recorder = recorder
        self._cut = cut
        self._model = model
        events = recorder.events[:cut]
        self._syncs = [event for event in events if isinstance(event, Synced)]
        self.told = b"".join(event.data for event in events if isinstance(event, Told))
        names = [event for event in events if isinstance(event, Named)]
        sure = self._sure(names)
        self._surely = [name for name in names if name.number in sure]
        self.names = [name for name in names if name.number not in sure]
        """Changes of names that may be lost."""
        self._sure_bytes: dict[int, bytes] = {}
        self.files: dict[int, list[Written]] = {}
        """What was written and may be lost, by inode."""
        for event in events:
            if isinstance(event, Written):
                self._note(event)

    def _sure(self, names: Sequence[Named]) -> set[int]:
        def covers(sync: Synced, name: Named) -> bool:
            if name.number >= sync.upto:
                return False
            if sync.inode is None:
                return True
            if self._model == "journal":
                return name.concerns(sync.inode)
            return sync.inode in name.directories

        sure = {n.number for n in names if any(covers(sync, n) for sync in self._syncs)}
        if self._model == "journal" and sure:
            sure = {name.number for name in names if name.number <= max(sure)}
        return sure

    def _note(self, event: Written) -> None:
        inode = event.inode
        if any(s.upto > event.number and s.inode in (None, inode) for s in self._syncs):
            pending = self.files.pop(inode, [])
            base = self._bytes(inode)
            self._sure_bytes[inode] = _whole(base, [*pending, event])
        else:
            self.files.setdefault(inode, []).append(event)

    def _bytes(self, inode: int) -> bytes:
        return self._sure_bytes.get(inode, self._recorder.contents[inode] or b"")

    def state(self, names: Sequence[Named], variants: dict[int, str], default: str) -> State:
        """The state with these names changed, and each file as told."""
        tree = dict(self._recorder.names)
        chosen = sorted([*self._surely, *names], key=lambda name: name.number)
        for name in chosen:
            for place in name.gone:
                tree.pop(place, None)
            tree.update(name.come)
        children: dict[int, list[tuple[str, int]]] = {}
        for (folder, called), inode in tree.items():
            children.setdefault(folder, []).append((called, inode))
        found: list[tuple[str, bytes | None]] = []
        todo = [("", TOP)]
        while todo:
            path, folder = todo.pop()
            for called, inode in children.get(folder, ()):
                below = f"{path}/{called}" if path else called
                if self._recorder.contents[inode] is None:
                    found.append((below, None))
                    todo.append((below, inode))
                else:
                    found.append((below, self._found(inode, variants.get(inode, default))))
        about = (
            f"{self._model} model, cut after event {self._cut}; names lost: "
            f"{[n.number for n in self.names if n not in names]}, files {default}, but {variants}"
        )
        return State(frozenset(found), self.told, about)

    def _found(self, inode: int, variant: str) -> bytes:
        written = self.files.get(inode)
        base = self._bytes(inode)
        return VARIANTS[variant](base, written) if written else base

    def last(self) -> State:
        """Nothing is lost."""
        return self.state(self.names, {}, "whole")

    def with_names_lost(self) -> Iterator[State]:
        """Every file that can be found is whole."""
        for names in self._choices():
            yield self.state(names, {}, "whole")

    def states(self) -> Iterator[State]:
        """The bounded part: none, all, all but one, only one, prefixes."""
        for names in self._choices():
            for default in ("whole", "none", "zeros", "half"):
                yield self.state(names, {}, default)
        for inode in self.files:
            for variant in VARIANTS:
                for default in ("whole", "none"):
                    yield self.state(self.names, {inode: variant}, default)

    def _choices(self) -> Iterator[Sequence[Named]]:
        names = self.names
        for size in range(len(names) + 1):
            yield names[:size]
        if self._model == "weakest":
            for index, name in enumerate(names):
                yield [*names[:index], *names[index + 1 :]]
                yield [name]

    def random_state(self, random: Random) -> State:
        names = self.names
        if self._model == "journal":
            chosen: Sequence[Named] = names[: random.randint(0, len(names))]
        else:
            chosen = [name for name in names if random.random() < 0.5]
        variants = {inode: random.choice(list(VARIANTS)) for inode in self.files}
        return self.state(chosen, variants, "whole")


IN_VAIN = 200
"""After so many states one after the other that are known already, these are all there are."""


def crash_states(recorder: Recorder, limit: int, random: Random) -> list[State]:
    """Distinct states of both models, ``limit`` of them or all that are found.

    They are from all moments of the last process that was followed.
    """
    cuts = range(recorder.begun, len(recorder.events) + 1)
    moments = [Moment(recorder, cut, model) for model in MODELS for cut in cuts]
    plain = dict.fromkeys(state for moment in moments for state in moment.with_names_lost())
    found = plain | dict.fromkeys(state for moment in moments for state in moment.states())
    undecided = [moment for moment in moments if moment.names or moment.files]
    in_vain = 0
    while undecided and len(found) < limit and in_vain < IN_VAIN:
        state = random.choice(undecided).random_state(random)
        in_vain = in_vain + 1 if state in found else 0
        found.setdefault(state)
    if len(found) <= limit:
        return list(found)
    # Where so many are left out, half are of the kind in which only names are lost.
    chosen = random.sample(list(plain), min(len(plain), limit // 2))
    others = [state for state in found if state not in plain]
    return chosen + random.sample(others, min(len(others), limit - len(chosen)))
