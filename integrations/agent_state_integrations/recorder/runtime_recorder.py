"""Records the runtime itself: changes of tasks, mail, sleep and agents, as messages.

    async with Recorder("state") as recorder:
        async with AsyncAgentSessionManager("state", observer=RuntimeRecorder(recorder)) as runtime:
            ...

An event's id is ``<kind>/<key>@<revision>.<8 hex digits of the document>``, so that a change is
recorded once, however often it is reported, and a document that is created again is another event.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import Key
from agent_state.protocols import Append, Change, Delete, Document, JsonObject, Put
from agent_state.serializers import parse_object
from agent_state_integrations.recorder.files import Recording
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.recorder import Recorder
from agent_state_integrations.recorder.writer import RecordResult

ROLE = "Runtime"
EVENTS = ("system", ("events",))
"""The log that ``runtime.emit`` writes."""
_MAX_TRACKED = 100_000
_BATCH = 1000

logger = logging.getLogger("agent_state_integrations.recorder")


class ScannableStore(Protocol):
    """The method of a store that ``RuntimeRecorder.catch_up`` needs."""

    def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]: ...


class RuntimeRecorder:
    """An ``Observer`` that records the changes it is called with.

    Mail is recorded as a message from one agent to another; a task, a sleep or an agent when its
    status changes; an emitted event unchanged. A message that could not be recorded is logged and
    counted in ``failed``; saving the state goes on.
    """

    def __init__(self, recorder: Recorder, *, clock: Clock | None = None) -> None:
        self._recorder = recorder
        self._clock = clock or SystemClock()
        self._last: OrderedDict[tuple[str, Key], object] = OrderedDict()
        self.failed = 0
        """Messages that could not be recorded."""

    def committed(self, changes: Sequence[Change], numbers: Sequence[int]) -> None:
        """Record messages about these changes."""
        now = stamp(self._clock.now())
        messages = list[JsonObject]()
        for change, number in zip(changes, numbers, strict=True):
            if isinstance(change, Put):
                messages += self._messages_of(change.kind, change.key, change.body, number, now)
            elif isinstance(change, Delete) and change.kind == "sleep" and number:
                messages.append(self._woken(change.key, number, now))
            elif isinstance(change, Append) and (change.kind, change.key) == EVENTS:
                messages.append(_emitted(change, number, now))
        if messages:
            self._submit(messages)

    async def catch_up(self, store: ScannableStore) -> int:
        """Record the documents whose last change is not recorded, because the process died.

        Call it after a start; it reads the recording once. Returns the number of messages recorded.
        A document is skipped if its last message has its present status.
        """
        last = await asyncio.to_thread(_last_recorded, self._recorder.writer.recording)
        waiting, count = list[JsonObject](), 0
        for kind in _DESCRIBE:
            async for document in store.scan(kind):
                key, number = document.key, document.revision
                for message in self._messages_of(
                    kind, key, document.body, number, document.saved_at
                ):
                    if last.get(_place(kind, key)) != _status_of(message["Metadata"]):
                        waiting.append(message)
                if len(waiting) >= _BATCH:
                    count += await self._record(waiting)
                    waiting = []
        return count + await self._record(waiting)

    async def _record(self, messages: Sequence[JsonObject]) -> int:
        recorded = await self._recorder.record_many(messages)
        return sum(each.outcome == "recorded" for each in recorded)

    def _messages_of(
        self, kind: str, key: Key, body: bytes, number: int, at: str
    ) -> Iterator[JsonObject]:
        """The message about a document, if its status has changed."""
        describe = _DESCRIBE.get(kind)
        if describe is None:
            return
        state = parse_object(body)
        place = kind, key
        status = (state.get("status", state.get("is_sleeping")), state.get("attempts"))
        known = self._last.get(place)
        self._last[place] = status
        self._last.move_to_end(place)
        if len(self._last) > _MAX_TRACKED:
            self._last.popitem(last=False)
        message = describe(key, state, known is None) if known != status else None
        if message is not None:
            digest = hashlib.sha256(body).hexdigest()[:8]
            message["Id"] = f"{_place(kind, key)}@{number}.{digest}"
            message["Timestamp"] = at
            yield message

    def _woken(self, key: Key, number: int, at: str) -> JsonObject:
        self._last.pop(("sleep", key), None)
        metadata = {"message_type": "sleep", "status": "awake"}
        message = _message(key[0], "wakes up", f"agent/{key[0]}", metadata)
        return {**message, "Id": f"{_place('sleep', key)}@{number}/woken/{at}", "Timestamp": at}

    def _submit(self, messages: Sequence[JsonObject]) -> None:
        try:
            outcome = self._recorder.submit(messages)
        except RuntimeError as error:  # it is closed already
            self._missed(len(messages), error)
        else:
            outcome.add_done_callback(partial(self._ended, len(messages)))

    def _ended(self, count: int, outcome: asyncio.Future[list[RecordResult]]) -> None:
        error = outcome.exception()
        if error is not None:
            self._missed(count, error)

    def _missed(self, count: int, error: BaseException) -> None:
        self.failed += count
        logger.error("%d of the runtime's messages could not be recorded: %s", count, error)


def _task(key: Key, state: JsonObject, _: bool) -> JsonObject:
    status = state.get("status", "pending")
    text = f"task {state.get('name') or key[-1]}: {status}"
    if state.get("error"):
        text += f" ({state['error']})"
    metadata: JsonObject = {"message_type": "task", "status": status}
    if state.get("attempts"):
        metadata["attempt"] = state["attempts"]
    return _message(key[0], text, "/".join(("task", *key)), metadata)


def _mail(key: Key, state: JsonObject, new: bool) -> JsonObject:
    sender, receiver = state.get("from_agent") or "unknown", state.get("to_agent") or key[0]
    context = f"mail/{state.get('reply_to') or key[-1]}"
    metadata: JsonObject = {"message_type": "mail", "status": state.get("status", "unread")}
    if not new or metadata["status"] != "unread":
        subject = state.get("subject") or key[-1]
        return _message(receiver, f"mail {subject}: {metadata['status']}", context, metadata)
    metadata["receiver"] = receiver
    message = _message(sender, "", context, metadata)
    body = state.get("body")
    said = {"subject": state.get("subject"), "body": body}
    words = [word for word in said.values() if isinstance(word, str) and word]
    message["Message"] = ": ".join(words)
    message["SpeakerRole"] = "Agent"
    if not isinstance(body, str):
        message["Content"] = said
    return message


def _sleep(key: Key, state: JsonObject, new: bool) -> JsonObject | None:
    text = "wakes up"
    metadata: JsonObject = {"message_type": "sleep", "status": "awake"}
    if state.get("is_sleeping", True):
        metadata |= {"status": "asleep", "since": state.get("sleep_started")}
        until = state.get("sleep_until")
        text = f"sleeps until {until}" if until else "sleeps until an event"
        if state.get("reason"):
            text += f": {state['reason']}"
    elif new:
        return None
    return _message(key[0], text, f"agent/{key[0]}", metadata)


def _agent(key: Key, state: JsonObject, _: bool) -> JsonObject:
    status = state.get("status", "idle")
    metadata: JsonObject = {"message_type": "state", "status": status}
    if state.get("agent_type"):
        metadata["agent_type"] = state["agent_type"]
    return _message(key[0], f"agent is {status}", f"agent/{key[0]}", metadata)


_DESCRIBE: dict[str, Callable[[Key, JsonObject, bool], JsonObject | None]] = {
    "agents": _agent,
    "tasks": _task,
    "mail": _mail,
    "sleep": _sleep,
}


def _place(kind: str, key: Key) -> str:
    return "/".join((kind, *key))


def _status_of(metadata: JsonObject) -> tuple[object, ...]:
    """The status in the metadata of a message."""
    return tuple(metadata.get(name) for name in ("status", "attempt", "since"))


def _last_recorded(recording: Recording) -> dict[str, tuple[object, ...]]:
    """The last recorded status of each document."""
    last: dict[str, tuple[object, ...]] = {}
    if recording.has_begun():
        for _, record in read_records(recording.state_dir):
            place, _, revision = record["Id"].rpartition("@")
            if revision and place.partition("/")[0] in _DESCRIBE:
                last[place] = _status_of(record["Metadata"])
    return last


def _emitted(change: Append, number: int, now: str) -> JsonObject:
    event = parse_object(change.body)
    name = str(event.get("event", "event"))
    message = _message("runtime", name, "runtime", {"message_type": "event"})
    message["Id"] = f"{change.kind}/{'/'.join(change.key)}#{number}"
    message["Timestamp"] = event.get("at", now)
    if event.get("data"):
        message["Content"] = {"event": name, "data": event["data"]}
    return message


def _message(speaker: str, text: str, context: str, metadata: JsonObject) -> JsonObject:
    return {
        "SpeakerName": speaker,
        "SpeakerRole": ROLE,
        "Message": text,
        "ConversationType": 0,
        "ContextId": context,
        "Metadata": metadata,
    }
