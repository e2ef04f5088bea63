"""opencode's sessions: ``~/.local/share/opencode/opencode.db``, or what its ``export`` prints.

The database is SQLite with a write-ahead log, in which most of it may be. Table ``session`` has a
row for each session with ``id``, ``parent_id`` (of a sub-agent's session), ``directory``,
``title``; ``message`` and ``part`` have their content as JSON in ``data``. The export is ``{info,
messages: [{info, parts}]}`` with the same content.

A message has ``role``, ``time.created`` (milliseconds) and, as an answer, ``modelID``, ``tokens``,
``finish`` and ``error``. A part has ``type``: ``text`` (``synthetic``: put in by the program),
``reasoning``, ``tool`` with the call and, in ``state``, its result, ``step-finish`` with the tokens
of one response, ``compaction``. A line is one part here; a message without parts is one too.

A fork repeats messages under new ids with the same times, and names no original. Where the original
is in the same database, what it repeats is left out. This is what version 1.18.33 writes.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import orjson

from agent_state.errors import StateCorruptedError, storage_error
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_foreign
from agent_state_integrations.recorder.importers.transcript import (
    NOTIFICATION,
    PROMPT,
    SYNTHETIC,
    SYSTEM,
    Outcome,
    SkippedLineError,
    TranscriptFile,
    TranscriptFormat,
    call_of,
    message_of,
    number_in,
    object_in,
    put_in,
    result_of,
    texts_in,
    usage_of,
    without_empty,
)

_OPENCODE = "opencode"
_SQLITE = b"SQLite format 3\0"
_EXPORTED = re.compile(rb'\s*\{\s*"info"\s*:\s*\{\s*"id"\s*:\s*"ses_')
_FORKED = re.compile(r"\(fork #\d+\)$")
_TASK = re.compile(
    r"\s*<task [^>]*>\s*<task_result>\s*(.*?)\s*</task_result>\s*</task>\s*", re.DOTALL
)
_TABLES = {"session", "message", "part"}


def _mark(line: JsonObject) -> str | None:
    return "an info and a part" if {"session", "info", "part"} <= line.keys() else None


def _document(path: Path, head: bytes) -> str | None:
    if _EXPORTED.match(head):
        return "a document with info.id and messages"
    if not head.startswith(_SQLITE):
        return None
    try:
        with _opened(path) as base:
            found = base.execute("select name from sqlite_master where type = 'table'")
            tables = {name for (name,) in found}
    except sqlite3.Error:
        return None
    return "the tables session, message and part" if tables >= _TABLES else None


class OpenCode:
    """The parts of all sessions of a file."""

    def __init__(self, file: TranscriptFile) -> None:
        self._response = ""
        self._held: list[tuple[int, JsonObject]] = []
        """The parts of a response, of which the first gets its tokens."""

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        session, info, part = (object_in(line, name) for name in ("session", "info", "part"))
        if copied := line.get("copy_of"):
            raise SkippedLineError(f"a fork repeats a message of {copied}")
        response = texts_in(info, "id")
        if response != self._response:
            self._response = response
            yield from self.rest()
        if texts_in(part, "type") == "step-finish":
            used = _usage(part)
            first = next((said for _, said in self._held if said["SpeakerRole"] == "Agent"), None)
            if first is not None and used:
                first["Metadata"]["usage"] = used
            yield from self.rest()
            raise SkippedLineError("step-finish is kept with its response")
        for nth, said in enumerate(self._said(session, info, part)):
            created = number_in(object_in(info, "time"), "created")
            time = object_in(part, "time") or object_in(object_in(part, "state"), "time")
            name = texts_in(part, "id") or response
            said["Id"] = f"{name}/result" if nth else name
            said["Timestamp"] = number_in(time, "end" if nth else "start") or created
            said["ContextId"] = texts_in(session, "id")
            parent = texts_in(session, "parent_id") or texts_in(session, "parentID")
            said["Metadata"] = {
                **without_empty(
                    source=FORMAT.name,
                    turn=texts_in(info, "parentID") or response,
                    cwd=texts_in(session, "directory"),
                    version=texts_in(session, "version"),
                    sub_agent=texts_in(info, "agent") if parent else None,
                    forked_from=line.get("forked_from"),
                    parent_context=parent or line.get("forked_from"),
                ),
                **said["Metadata"],
            }
            self._held.append((number, said))

    def rest(self) -> Iterator[Outcome]:
        held, self._held = self._held, []
        yield from held

    def _said(
        self, session: JsonObject, info: JsonObject, part: JsonObject
    ) -> Iterator[JsonObject]:
        kind, is_answer = texts_in(part, "type"), info.get("role") == "assistant"
        agent = texts_in(info, "agent")
        is_agent = bool(session.get("parent_id") or session.get("parentID"))
        speaker = f"{_OPENCODE}/{agent}" if is_agent else _OPENCODE
        if not part:
            yield _failure(info)
        elif kind == "text" and not is_answer:
            text = texts_in(part, "text")
            if part.get("synthetic") is True:
                yield put_in(NOTIFICATION, text, "synthetic")
            elif is_agent:
                said = message_of(_OPENCODE, PROMPT, text, "prompt")
                said["Metadata"]["receiver"] = speaker
                yield said
            else:
                yield message_of("user", "User", text, "message")
        elif kind in ("text", "reasoning"):
            text = texts_in(part, "text")
            said = message_of(speaker, "Agent", text, "message" if kind == "text" else "thinking")
            said["Metadata"] |= without_empty(model=info.get("modelID"))
            if not text:
                raise SkippedLineError(f"{kind} parts without text")
            yield said
        elif kind == "tool":
            yield from _tool(speaker, info, part)
        elif kind == "compaction":
            yield put_in(SYSTEM, "compacted", kind)
        else:
            raise SkippedLineError(f"{kind:.60} parts hold no message")


def _failure(info: JsonObject) -> JsonObject:
    error = object_in(info, "error")
    if not error:
        raise SkippedLineError("messages without parts")
    data = object_in(error, "data")
    said = put_in(SYNTHETIC, texts_in(data, "message") or texts_in(error, "name"), "api_error")
    said["Metadata"] |= without_empty(
        is_error=True, status=data.get("statusCode"), reason=error.get("name")
    )
    return said


def _tool(speaker: str, info: JsonObject, part: JsonObject) -> Iterator[JsonObject]:
    state, tool, call = object_in(part, "state"), part.get("tool"), part.get("callID")
    said = call_of(speaker, "", [without_empty(id=call, name=tool, input=state.get("input"))])
    said["Metadata"] |= without_empty(model=info.get("modelID"))
    yield said
    status = state.get("status")
    if status not in ("completed", "error"):
        return
    text = texts_in(state, "output") or texts_in(state, "error")
    if (task := _TASK.fullmatch(text)) is not None:
        text = task[1]
    about = without_empty(status=status)
    exit_code = object_in(state, "metadata").get("exit")
    if type(exit_code) is int:
        about["exit_code"] = exit_code
    failed = status == "error" or bool(exit_code)
    result = without_empty(call=call, tool=tool, is_error=failed or None, about=about)
    yield result_of(text, [result])


def _usage(part: JsonObject) -> JsonObject:
    """The tokens of one response, which have a part of their own after its texts and calls."""
    tokens = object_in(part, "tokens")
    cache = object_in(tokens, "cache")
    return usage_of(
        given=number_in(tokens, "input"),
        output=number_in(tokens, "output") + number_in(tokens, "reasoning"),
        cache_read=number_in(cache, "read"),
        cache_write=number_in(cache, "write"),
        reasoning_tokens=number_in(tokens, "reasoning"),
    )


# -- the two kinds of files ------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[JsonObject]:
    with path.open("rb") as file:
        is_base = file.read(len(_SQLITE)) == _SQLITE
    if not is_base:
        yield from _exported(path)
        return
    try:
        with _opened(path) as base:
            yield from _stored(base)
    except sqlite3.Error as error:
        raise StateCorruptedError(f"not a readable SQLite file: {error}", path=path) from error


def _exported(path: Path) -> Iterator[JsonObject]:
    try:
        document, _ = parse_foreign(path.read_bytes())
    except OSError as error:
        raise storage_error(error, "reading an export", path=path) from error
    except StateCorruptedError as error:
        raise StateCorruptedError(error.message, path=path) from error
    session = object_in(document, "info")
    messages = document.get("messages")
    for message in messages if type(messages) is list else []:
        info, parts = object_in(message, "info"), message.get("parts")
        for part in (parts if type(parts) is list else []) or [{}]:
            yield {"session": session, "info": info, "part": part}


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database for reading, with its write-ahead log; nothing is written beside it.

    While a program has it open, its shared memory is there, and reading takes part in its locks.
    Otherwise a copy is read, as opening a log without its shared memory would make one.
    """
    log = path.with_name(path.name + "-wal")
    if path.with_name(path.name + "-shm").exists():
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as base:
            yield base
        return
    if not log.exists():
        source = f"file:{quote(str(path))}?mode=ro&immutable=1"
        with closing(sqlite3.connect(source, uri=True)) as base:
            yield base
        return
    with tempfile.TemporaryDirectory() as folder:
        for each in (path, log):
            shutil.copyfile(each, Path(folder) / each.name)
        with closing(sqlite3.connect(Path(folder) / path.name)) as base:
            yield base


def _stored(base: sqlite3.Connection) -> Iterator[JsonObject]:
    base.row_factory = sqlite3.Row
    for row in base.execute("select * from session order by time_created, id").fetchall():
        session = {name: row[name] for name in row.keys() if row[name] is not None}  # noqa: SIM118
        copies = _copies(base, session)
        original = next(iter(copies.values()), None)
        asked = (
            "select m.id as message, m.data as info, p.id as part, p.data as content "
            "from message m left join part p on p.message_id = m.id where m.session_id = ? "
            "order by m.time_created, m.id, p.id"
        )
        for found in base.execute(asked, (session["id"],)):
            info = {"id": found["message"], **_json(found["info"])}
            part = {"id": found["part"], **_json(found["content"])} if found["part"] else {}
            yield {
                "session": session,
                "info": info,
                "part": part,
                "forked_from": original,
                "copy_of": copies.get(found["message"]),
            }


def _copies(base: sqlite3.Connection, session: JsonObject) -> dict[str, str]:
    """The messages of a fork that an older session has too, and which session that is."""
    if not _FORKED.search(str(session.get("title"))):
        return {}
    asked = (
        "select mine.id, theirs.session_id from message mine "
        "join message theirs on theirs.time_created = mine.time_created and theirs.id <> mine.id "
        "join session s on s.id = theirs.session_id and s.time_created < ? "
        "where mine.session_id = ? and mine.time_created < ? order by s.time_created desc"
    )
    began = session["time_created"]
    return {str(mine): str(of) for mine, of in base.execute(asked, (began, session["id"], began))}


def _json(text: object) -> JsonObject:
    try:
        found = orjson.loads(text) if type(text) is str else None
    except orjson.JSONDecodeError:
        return {}
    return found if type(found) is dict else {}


FORMAT = TranscriptFormat(
    name=_OPENCODE,
    title="opencode",
    mark=_mark,
    reader=OpenCode,
    document=_document,
    lines=_lines,
)
