"""``agent-state watch``: what happens in a directory, in words, while it happens.

File events tell of documents that changed. A server that owns the directory brings its changes to
the files up to half a second later, so its journal is read, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from zlib import crc32

import orjson
import typer

from agent_state.cli.glance import owner_line, short_time
from agent_state.cli.options import OK, STATE, JsonOption, StateOption, given_keyring
from agent_state.cli.output import is_utf8, printable, printable_json, progress
from agent_state.cli.overview import KINDS, PlainReader
from agent_state.cli.words import State, agent_words, field_words, sleep_words, task_words
from agent_state.clock import SystemClock, stamp
from agent_state.errors import AgentStateError, Key, LockTimeoutError
from agent_state.models import UNFINISHED
from agent_state.protocols import BodySealer, Document, DocumentId, NoticeStream
from agent_state.storage import JournalFollower, ReadOnlyStateStore, fileio, paths
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document import decode_document
from agent_state.storage.executor import end_task
from agent_state.storage.sealed_store import unseal

LOOK_SECONDS = 0.05
"""The journal is looked at so often."""
_LEFT_OUT = frozenset({"requests", *paths.RECORDED})
_SHORT = 60


class Event(NamedTuple):
    """One change of one document."""

    at: str
    """When it was noticed."""
    kind: str
    key: Key
    revision: int | None
    """None once the document is removed."""
    words: list[str]

    @property
    def subject(self) -> str:
        """The agent whose document it is; else the document."""
        return self.key[0] if self.kind in KINDS else "/".join((self.kind, *self.key))

    def to_dict(self) -> dict[str, Any]:
        """The event as a line of JSON."""
        name = "gone" if self.revision is None else "change"
        return {"event": name, **self._asdict()}


def watch(
    agent: Annotated[
        str | None, typer.Argument(help="Of this agent alone.", show_default=False)
    ] = None,
    state: StateOption = STATE,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="End after so many changes.", min=1, show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say in words what changes, while it changes, until Ctrl-C.

    Who did what, fell asleep, got mail, was edited by hand. Lines of logs are left out. With
    --json it prints an object a line; the first one says that it is ready. Works while a server
    runs, and changes nothing.

    Example: agent-state watch alice --limit 10
    """
    try:
        asyncio.run(_watch(state, agent, limit, as_json))
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # as of ``| head -1``
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # a device
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    raise typer.Exit(OK)


async def _watch(state: Path, agent: str | None, limit: int | None, as_json: bool) -> None:
    sealer = given_keyring()
    reader = PlainReader(state, sealer)  # raises if it is missing, or encrypted with other keys
    left = limit or sys.maxsize
    async with aclosing(follow(state, sealer)) as batches:
        _show_ready(reader, as_json=as_json, at=(await anext(batches))[0])
        async for _, events in batches:
            wanted = [
                event
                for event in events
                if agent is None or (event.kind in KINDS and event.key[0] == agent)
            ][:left]
            if as_json:
                for event in wanted:
                    _print_json(event.to_dict())
            else:
                for line in in_lines(wanted):
                    sys.stdout.write(f"{printable(line)}\n")  # rich would exit for a closed pipe
            sys.stdout.flush()
            left -= len(wanted)
            if not left:
                return


def _show_ready(reader: PlainReader, *, as_json: bool, at: str) -> None:
    owner = reader.owner()
    if as_json:
        _print_json({"event": "ready", "at": at, "state_dir": reader.root, "owner": owner})
    else:
        sys.stdout.write(f"{printable(reader.root)}: {owner_line(owner)}; Ctrl-C ends\n")
    sys.stdout.flush()


def _print_json(value: object) -> None:
    """Print JSON on stdout in one line."""
    try:
        line = orjson.dumps(value).decode()
    except TypeError:  # half a surrogate pair
        line = ""
    if not line or not is_utf8(sys.stdout):
        line = json.dumps(value)
    sys.stdout.write(f"{printable_json(line)}\n")


def in_lines(events: Iterable[Event]) -> list[str]:
    """A line for each agent, or other thing, that changed."""
    said: dict[str, list[str]] = {}
    at: dict[str, str] = {}
    for event in events:
        at.setdefault(event.subject, event.at[11:19])
        words = said.setdefault(event.subject, [])
        if event.kind == "sleep" and words and words[-1].endswith(" to sleeping"):
            words[-1] += f" {event.words[0]}"
        else:
            words += event.words
    return [f"{at[subject]}  {subject}: {'; '.join(words)}" for subject, words in said.items()]


# -- following ---------------------------------------------------------------------------------


async def follow(
    state: Path, sealer: BodySealer | None = None
) -> AsyncGenerator[tuple[str, list[Event]], None]:
    """The changes of a directory, batch by batch, with the time; an empty batch when it is ready.

    Raises ``StateNotFoundError`` for a missing directory.
    """
    store, clock = ReadOnlyStateStore(state), SystemClock()
    await store.open()
    try:
        notices, documents = await store.watch(), _Documents(sealer)
        hints = _Hints(notices)
        gathering = asyncio.create_task(hints.gather(), name="agent-state watch")
        try:
            await store.look(documents.read_all)
            yield stamp(clock.now()), []
            while not gathering.done():
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await hints.arrived.wait()
                places, now = hints.take(), stamp(clock.now())
                events = await store.look(lambda each: documents.look(each, places, now))  # noqa: B023
                if events:
                    yield now, events
            gathering.result()
        finally:
            await end_task(gathering)
            await notices.aclose()
    finally:
        await store.close()


class _Hints:
    """The documents that file events name, until somebody takes them."""

    def __init__(self, notices: NoticeStream) -> None:
        self._notices = notices
        self._places: dict[DocumentId, None] = {}
        self.arrived = asyncio.Event()

    async def gather(self) -> None:
        async for notice in self._notices:
            self._places[notice.kind, notice.key] = None
            self.arrived.set()

    def take(self) -> list[DocumentId]:
        places, self._places = [*self._places], {}
        self.arrived.clear()
        return places


class _Version(NamedTuple):
    """What is remembered of a document, to say what became of it."""

    revision: int
    checksum: int
    body: bytes
    """Its state; of what is done with, only the status."""


class _Documents:
    """The documents of a directory as they were when they were looked at last. It blocks."""

    def __init__(self, sealer: BodySealer | None) -> None:
        self._sealer = sealer
        self._known: dict[DocumentId, _Version] = {}
        self._damage: dict[DocumentId, str] = {}
        self._half_written: list[DocumentId] = []
        self._journal: JournalFollower

    def read_all(self, directory: StateDirectory) -> None:
        """Remember every document there is."""
        self._journal = JournalFollower(directory)
        journaled = {place for place, _ in self._journal.read()}
        with progress("reading") as advance:
            for kind in directory.tree.kinds():
                for path, key in directory.tree.files(kind) if kind not in _LEFT_OUT else ():
                    document = None
                    with suppress(AgentStateError):
                        found = fileio.read_file(path)
                        document = decode_document(kind, key, found[0])[0] if found else None
                    self._note((kind, key), self._journal.over((kind, key), document), "")
                    advance(len(self._known), 0)
        for place in journaled - self._known.keys():
            self._note(place, self._journal.over(place, None), "")

    def look(self, directory: StateDirectory, places: list[DocumentId], now: str) -> list[Event]:
        """What has changed: in the journal, and in the files of ``places``."""
        events: list[Event] = []
        for place, document in self._journal.read():
            known = self._known.get(place)
            # A new segment of the journal may repeat what an older one has.
            if document is None or known is None or known.revision < document.revision:
                events += self._note(place, document, now)
        places, self._half_written = [*dict.fromkeys([*self._half_written, *places])], []
        for place in places:
            try:
                stored = directory.documents.read(directory.locate(*place))
            except LockTimeoutError:
                self._half_written.append(place)
                continue
            except AgentStateError as error:
                events += self._note_damage(place, error.message, now)
                continue
            filed = stored.document if stored is not None else None
            events += self._note(place, self._journal.over(place, filed), now)
        return events

    def _note(self, place: DocumentId, document: Document | None, now: str) -> list[Event]:
        """Remember a version; what that changes."""
        if place[0] in _LEFT_OUT:
            return []
        known = self._known.get(place)
        mended = self._damage.pop(place, None) is not None
        before = orjson.loads(known.body) if known is not None else None
        if document is None:
            self._known.pop(place, None)
            return _events(now, place, None, before, None) if known is not None else []
        body, checksum = document.body, crc32(document.body)
        if known is not None and known.checksum == checksum:
            self._known[place] = known._replace(revision=document.revision)
            return [Event(now, *place, document.revision, ["can be read again"])] if mended else []
        if self._sealer is not None:
            body = unseal(self._sealer, place, body)
        after = orjson.loads(body)
        kept = _remembered(place[0], after, body)
        self._known[place] = _Version(document.revision, checksum, kept)
        return _events(now, place, document.revision, before, after)

    def _note_damage(self, place: DocumentId, why: str, now: str) -> list[Event]:
        if self._damage.get(place) == why:
            return []
        self._damage[place] = why
        known = self._known.get(place)
        name = "/".join((place[0], *place[1]))
        return [Event(now, *place, known.revision if known else 0, [f"{name}: {why}"])]


def _remembered(kind: str, state: dict[str, Any], body: bytes) -> bytes:
    done = kind == "mail" or (kind == "tasks" and state.get("status") not in UNFINISHED)
    return orjson.dumps({"status": state.get("status")}) if done and "status" in state else body


# -- words -------------------------------------------------------------------------------------


def _events(
    now: str, place: DocumentId, revision: int | None, before: State, after: State
) -> list[Event]:
    """The event of a change; none if it tells a person nothing."""
    words = _words(*place, before, after)
    return [Event(now, *place, revision, words)] if words else []


def _words(kind: str, key: Key, before: State, after: State) -> list[str]:
    if kind == "agents":
        return agent_words(before, after)
    if kind == "sleep":
        return [_with_short_time(sleep_words(after))]
    if kind == "tasks" and len(key) > 1:
        return _words_of_task("/".join(key[1:]), before, after)
    if kind == "mail" and len(key) > 1:
        return _words_of_mail("/".join(key[1:]), before, after)
    if kind == "system" and key[0] in paths.RUN_NAMES:
        return _words_of_run(key, before, after)
    return field_words(before, after)


def _words_of_task(ident: str, before: State, after: State) -> list[str]:
    word = task_words(before, after)
    if word == "changed":
        fields = field_words(before, after, ("lease",))
        return [f"task {ident}: {', '.join(fields)}"] if fields else []
    state = after or {}
    if word.startswith("queued") and state.get("name"):
        ident += f" ({_cut(state['name'])})"
    why = state.get("error") if state.get("status") in ("failed", "dead") else None
    return [f"task {ident} {word}" + (f": {_cut(why)}" if why else "")]


def _words_of_mail(ident: str, before: State, after: State) -> list[str]:
    if after is None:
        return [f"mail {ident} removed"]
    if before is None:
        subject = f" ({_cut(after['subject'])})" if after.get("subject") else ""
        return [f"mail {ident} from {after.get('from_agent') or 'nobody'}{subject}"]
    status = after.get("status", "unread")
    return [f"mail {ident} {'changed' if before.get('status') == status else status}"]


def _words_of_run(key: Key, before: State, after: State) -> list[str]:
    """What the documents of a running server tell: a start, a stop, the mirror's state."""
    name = {"runtime": "status", "mirror": "state"}.get("/".join(key))
    if name is None or after is None or (before or {}).get(name) == after.get(name):
        return []
    return [str(after.get(name))]


def _with_short_time(words: str) -> str:
    return f"until {short_time(words[6:])}" if words.startswith("until ") else words


def _cut(text: object) -> str:
    words = str(text)
    return words if len(words) <= _SHORT else f"{words[: _SHORT - 1]}…"
