#!/usr/bin/env bash
# google-adk 2.13.0: an event whose time is a little earlier is read before what was appended before it, and lets a stale session append.
#
# Guess before looking: `SqliteSessionService` gives the events of a session in the order in which they were appended, as
# `InMemorySessionService` does; and `append_event` raises `StaleSessionError` for a copy of the session that was read before another
# process had appended.
# Seen: the rows are sorted by the events' own times, and the session's `update_time` becomes that of the event, also when it goes
# back. A tool's result that comes from a machine whose clock is two seconds behind is read before its call, so the next request to
# the model begins with a result without a call. And the copy that had been read before that append counts as new: its event is
# stored, although it never saw the result. Of an event with a later time both are as guessed.
# Met: the import of such a database, which compares the events with what `get_session` gives.
#
# Output seen:
#   clock of the other machine   as appended      in memory        in SQLite        a stale copy appends
#   2 s ahead                    call result      call result      call result      StaleSessionError
#   2 s behind                   call result      call result      result call      accepted
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check google-adk==2.13.0
cd "$folder"
cat >sessions.py <<'PYTHON'
import asyncio
from importlib.metadata import version

from google.adk.errors._stale_session_error import StaleSessionError
from google.adk.events.event import Event
from google.adk.sessions.in_memory_session_service import InMemorySessionService
from google.adk.sessions.sqlite_session_service import SqliteSessionService
from google.genai import types

SESSION = {"app_name": "shop", "user_id": "ann", "session_id": "s"}


def event(name, time):
    if name == "call":
        part = types.Part(function_call=types.FunctionCall(id="1", name="pay", args={}))
    elif name == "result":
        part = types.Part(function_response=types.FunctionResponse(id="1", name="pay", response={"ok": True}))
    else:
        part = types.Part(text=name)
    return Event(id=name, author="clerk", timestamp=time, content=types.Content(role="model", parts=[part]))


async def append(service, skew):
    """The events of a session to which another machine appends the result of a call."""
    created = await service.create_session(**SESSION)
    now = created.last_update_time + 10
    await service.append_event(created, event("call", now))
    stale = await service.get_session(**SESSION)
    other = await service.get_session(**SESSION)
    await service.append_event(other, event("result", now + skew))
    found = await service.get_session(**SESSION)
    try:
        await service.append_event(stale, event("late", now + 5))
        outcome = "accepted"
    except StaleSessionError:
        outcome = "StaleSessionError"
    return " ".join(each.id for each in found.events), outcome


async def main():
    print("google-adk", version("google-adk"))
    print(f"{'clock of the other machine':28} {'as appended':16} {'in memory':16} {'in SQLite':16} a stale copy appends")
    seen = {}
    for title, skew in (("2 s ahead", 2), ("2 s behind", -2)):
        memory, _ = await append(InMemorySessionService(), skew)
        sqlite, outcome = await append(SqliteSessionService(f"{title}.db"), skew)
        print(f"{title:28} {'call result':16} {memory:16} {sqlite:16} {outcome}")
        seen[title] = (memory, sqlite, outcome)
    assert seen == {
        "2 s ahead": ("call result", "call result", "StaleSessionError"),
        "2 s behind": ("call result", "result call", "accepted"),
    }, seen


asyncio.run(main())
PYTHON
venv/bin/python sessions.py
