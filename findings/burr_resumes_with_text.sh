#!/usr/bin/env bash
# apache-burr 0.43.0: a persisted state comes back with every value that it does not know turned into its text.
#
# Guess before looking: a tuple comes back as a list, as with other JSON stores; a set or a dataclass is refused when it is stored,
# or comes back as itself.
# Seen: all of them become `str(value)`, stored and loaded without an error or a warning, inside lists too. At once the actions see
# the values as they were set; only after a resume they see texts, on which `len`, `in`, indexing and `for` work. An empty set
# becomes "set()", which is true.
# Met: asking whether a step's result has the same type after a restart.
#
# Output seen:
#   at once                                    after a resume
#   ('a', 'b')                                 "('a', 'b')"
#   set()                                      'set()'
#   Item(name='a')                             "Item(name='a')"
#   [('a', 1)]                                 ["('a', 1)"]
#   datetime.datetime(2026, 11, 30, 0, 0)      '2026-11-30 00:00:00'
#   b'a'                                       "b'a'"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check apache-burr==0.43.0
cd "$folder"
venv/bin/python -W error - <<'PYTHON'
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from burr.core import ApplicationBuilder, State, action
from burr.core.application import Application
from burr.core.persistence import SQLitePersister


@dataclass
class Item:
    name: str


SEEN: list[tuple[Any, Any]] = [
    (("a", "b"), "('a', 'b')"),
    (set(), "set()"),
    (Item("a"), "Item(name='a')"),
    ([("a", 1)], ["('a', 1)"]),
    (datetime(2026, 11, 30), "2026-11-30 00:00:00"),
    (b"a", "b'a'"),
]
persister = SQLitePersister("states.db")
persister.initialize()
for number, (value, expected) in enumerate(SEEN):
    found = []

    @action(reads=[], writes=["value"])
    def work(state: State) -> State:
        return state.update(value=value)

    @action(reads=["value"], writes=[])
    def look(state: State) -> State:
        found.append(state["value"])
        return state

    def application() -> Application:
        return (
            ApplicationBuilder()
            .with_actions(work, look)
            .with_transitions(("work", "look"), ("look", "look"))
            .initialize_from(persister, resume_at_next_action=True, default_state={}, default_entrypoint="work")
            .with_state_persister(persister)
            .with_identifiers(app_id=str(number))
            .build()
        )

    application().run(halt_after=["look"])  # `look` runs in the process that made the value
    application().run(halt_after=["look"])  # and once more after a resume from the database
    if number == 0:
        print(f"{'at once':42} after a resume")
    print(f"{found[0]!r:42} {found[1]!r}")
    assert found == [value, expected], f"version 0.43.0 gave {expected!r} back"
PYTHON
