"""The judge of the laws finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.judging import Documents, Judge, Place, Stored, documents_in
from tests.faults.serving import LedgerReader, LedgerWriter, Plan

PLAN = Plan("shared", "/nowhere", "/nowhere", seed=1, servers=2, lease_seconds=1.0)
TASK: Place = ("tasks", ("ann", "t"))
AGENT: Place = ("agents", ("ann",))
MAIL: Place = ("mail", ("ann", "m"))

Line = dict[str, Any]


def commit(life: str, place: Place, number: int, **fences: int) -> Line:
    puts = [[place[0], list(place[1]), number]]
    return {"is": "commit", "life": life, "puts": puts, "deletes": [], "fences": fences}


def gave(life: str, value: str) -> Line:
    return {"is": "gave", "life": life, "task": "t", "step": "s1", "value": value}


def runs(attempt: int, *, once: bool = False) -> Line:
    return {"is": "runs", "life": "a", "task": TASK[1], "step": "s1", "once": once} | {
        "attempt": attempt
    }


def step(attempt: int) -> Line:
    return {"is": "step", "life": "a", "task": TASK[1], "step": "s1", "attempt": attempt}


def stored() -> dict[Place, Stored]:
    """An agent that has done one task, which changed nothing and reached a checkpoint."""
    task = {"agent_id": "ann", "task_id": "t", "status": "completed", "progress": {"pc": 2}}
    mail = {"to_agent": "ann", "message_id": "m", "status": "unread", "subject": "x1"}
    return {
        AGENT: Stored(6, {"agent_id": "ann", "context": {}}),
        TASK: Stored(3, task),
        MAIL: Stored(2, mail),
    }


def judged(*lines: Line, found: Documents | None = None) -> Judge:
    judge = Judge(PLAN)
    for line in lines:
        judge.take(line)
    judge.end(stored() if found is None else found)
    return judge


GOOD: list[Line] = [
    commit("a", AGENT, 1),
    commit("a", TASK, 1),
    commit("a", TASK, 2, ann=1),
    runs(1),
    step(1),
    gave("a", "int 1"),
    commit("b", TASK, 3, ann=2),
    gave("b", "int 1"),
    {"is": "checkpoint", "life": "b", "task": TASK[1], "pc": 2},
    commit("b", AGENT, 4, ann=2),
    {"is": "sent", "life": "b", "place": ["mail", list(MAIL[1])]},
    {"is": "answer", "life": "b", "n": 1, "place": ["tasks", list(TASK[1])]},
]


def test_what_is_as_the_laws_want_it_is_not_refused() -> None:
    judge = judged(*GOOD)

    assert judge.violations == []
    assert judge.tally.clean()
    assert judge.tally.acknowledged == 8
    assert judge.work_of == {"a": 3, "b": 2}


WRONG: dict[str, tuple[str, str, Line]] = {
    "an agent is changed without a look at its owner": ("L5", "twice", commit("a", AGENT, 3)),
    "so is a task": ("L5", "twice", commit("a", TASK, 2)),
    "so is its mail": ("L5", "twice", commit("a", MAIL, 2)),
    "so is its sleep": ("L5", "twice", commit("a", ("sleep", ("ann",)), 1)),
    "two servers use one ownership": ("L5", "twice", commit("b", TASK, 2, ann=1)),
    "a former owner comes later": ("L5", "twice", commit("a", AGENT, 5, ann=1)),
    "an acknowledged commit is gone": ("L3", "lost", commit("b", TASK, 7, ann=2)),
    "an acknowledged document is gone": ("L3", "lost", commit("b", ("tasks", ("ann", "u")), 1)),
    "a checkpoint is gone": (
        "L3",
        "lost",
        {"is": "checkpoint", "life": "b", "task": TASK[1], "pc": 3},
    ),
    "what was sent is not there": (
        "L4",
        "lost",
        {"is": "sent", "life": "b", "place": ["mail", ["ann", "n"]]},
    ),
    "what was asked for is not there": (
        "L4",
        "lost",
        {"is": "answer", "life": "b", "n": 2, "place": ["tasks", ["ann", "u"]]},
    ),
    "a step gives another value": ("L7", "lost", gave("b", "float 1.0")),
    "a remembered step runs again": ("L2", "twice", runs(2)),
    "a step for once runs again": ("L2", "twice", runs(1, once=True)),
    "a server broke": ("L6", "stuck", {"is": "broken", "life": "a", "error": "KeyError"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_the_ledger_shows_to_be_wrong_is_found(what: str) -> None:
    law, column, line = WRONG[what]

    judge = judged(*GOOD, line)

    assert {text.partition(":")[0] for text in judge.violations} == {law}
    assert getattr(judge.tally, column) == len(judge.violations)


def completed(changes: dict[str, Any]) -> Callable[[dict[Place, Stored]], None]:
    def change(found: dict[Place, Stored]) -> None:
        found[TASK] = replace(found[TASK], body={**found[TASK].body, **changes})

    return change


def marked(found: dict[Place, Stored]) -> None:
    found[MAIL] = replace(found[MAIL], body={**found[MAIL].body, "status": "read"})


def remembered(*tokens: str) -> Callable[[dict[Place, Stored]], None]:
    def change(found: dict[Place, Stored]) -> None:
        context = {"working_memory": {"list": [*tokens]}}
        found[AGENT] = replace(found[AGENT], body={"agent_id": "ann", "context": context})

    return change


def sent_again(found: dict[Place, Stored]) -> None:
    again = {**found[MAIL].body, "message_id": "again"}
    found["mail", ("ann", "again")] = Stored(1, again)


UNLAWFUL: dict[str, tuple[str, Callable[[dict[Place, Stored]], None]]] = {
    "mail is read, and its agent does not know": ("L1", marked),
    "what no commit point was reached for is there": ("L2", remembered("t/0")),
    "a message was sent twice": ("L4", sent_again),
    "a task is not finished": ("L6", completed({"status": "pending"})),
    "a task died of nothing known": ("L6", completed({"status": "dead", "error": "KeyError: 1"})),
}


@pytest.mark.parametrize("what", UNLAWFUL)
def test_what_the_documents_show_to_be_wrong_is_found(what: str) -> None:
    law, change = UNLAWFUL[what]
    found = stored()
    change(found)

    judge = judged(*GOOD, found=found)

    assert [text.partition(":")[0] for text in judge.violations] == [law]


def test_a_completed_task_without_its_memory_is_found() -> None:
    history = PLAN.history()
    number = next(
        number
        for number, program in enumerate(history.programs)
        if any(kind == "list" for _, _, kind, _ in program.effects())
        and not any(True for _ in program.sends())
    )
    found = stored()
    completed({"payload": {"p": number}})(found)

    judge = judged(*GOOD, found=found)

    assert [text.partition(":")[0] for text in judge.violations] == ["L3"]


def test_a_ledger_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    reader = LedgerReader(ledger)
    assert list(reader.lines()) == []
    LedgerWriter(ledger, "a").tell("up", index=0)
    with ledger.open("ab") as file:
        file.write(b'{"is":')
    assert list(reader.lines()) == [{"is": "up", "life": "a", "index": 0}]
    with ledger.open("ab") as file:
        file.write(b'"told"}\n')
    assert list(reader.lines()) == [{"is": "told"}]


def test_documents_are_read_as_any_program_reads_them(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "ann").mkdir(parents=True)
    (tmp_path / "tasks" / "ann" / "t.json").write_text(
        '{"_revision": 3, "_schema": "tasks/1", "agent_id": "ann", "task_id": "t"}'
    )
    (tmp_path / "tasks" / "ann" / "archive.jsonl").write_text(
        '{"_seq": 1, "agent_id": "ann", "task_id": "u"}\n'
    )

    assert documents_in(tmp_path) == {
        TASK: Stored(3, {"agent_id": "ann", "task_id": "t"}),
        ("tasks", ("ann", "u")): Stored(0, {"agent_id": "ann", "task_id": "u"}),
    }
