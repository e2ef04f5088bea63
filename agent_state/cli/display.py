"""Tables and lines that show documents and reports to a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent_state.cleanup import CleanupReport
from agent_state.cli.glance import MAX_ROWS, owner_line, short_time, show_unusable
from agent_state.cli.inspector import COLUMNS, field_value
from agent_state.cli.output import counted, print_line, show_state, show_table
from agent_state.models import Task
from agent_state.protocols import Incident
from agent_state.runtime.recovery import RestoreReport
from agent_state.verify import Finding, VerifyReport


def show_tasks(tasks: Sequence[Task]) -> None:
    """A table of tasks, with what an operator needs to choose among them."""
    print_line(counted(len(tasks), "task"))
    if tasks:
        rows = (
            (
                task.task_id,
                task.agent_id,
                _short(task.name),
                task.status,
                task.attempts,
                _short(task.created_at),
                _short(task.error),
            )
            for task in tasks
        )
        show_table(("id", "agent", "name", "status", "attempts", "submitted", "error"), rows)


def show_task(task: Task, path: str | None) -> None:
    """One task; ``path``: its file in the state directory, None for an archived one."""
    print_line(f"{path or 'archived'}: {task.name}, {task.status}, attempts: {task.attempts}")
    if task.traceback:
        for line in task.traceback.splitlines():
            print_line(line, "red")
    elif task.error:
        print_line(task.error, "red")
    body = task.model_dump(mode="json")
    body.pop("traceback", None)
    show_state(body)


def show_documents(
    kind: str, documents: Sequence[Mapping[str, Any]], logs: Sequence[Mapping[str, Any]]
) -> None:
    print_line(f"{kind}: {counted(len(documents), 'document')}, {counted(len(logs), 'log')}")
    fields = COLUMNS.get(kind, ("schema",))
    if documents:
        rows = (
            ("/".join(row["key"]), *(_short(row[name]) for name in fields), _short(row["saved_at"]))
            for row in documents
        )
        names = [name.replace("_", " ") for name in fields]
        show_table(("id", *names, "saved at"), rows, most=MAX_ROWS)
    if logs:
        show_logs(logs)


def show_logs(logs: Sequence[Mapping[str, Any]]) -> None:
    """A table of logs; with their kinds, if they have several."""
    rows = ((row.get("kind"), "/".join(row["key"]), row["last"], row["path"]) for row in logs)
    if logs and "kind" in logs[0]:
        show_table(("kind", "log", "last record", "file"), rows, most=MAX_ROWS)
    else:
        show_table(("log", "last record", "file"), (row[1:] for row in rows), most=MAX_ROWS)


def show_agent(found: Mapping[str, Any]) -> None:
    agent, sleep = found["agent"], found["sleep"]
    words = [field_value(agent, name) for name in COLUMNS["agents"]] if agent else []
    said = ", ".join(str(word) for word in words if word) or "no such agent, or not a usable one"
    print_line(f"{found['agent_id']}: {said}")
    if sleep and sleep["state"].get("is_sleeping", True):
        slept = sleep["state"]
        events = ", ".join(slept.get("wake_events", ())) or "nothing but its time"
        print_line(f"asleep until {_short(slept.get('sleep_until') or 'woken')}; woken by {events}")
    if found["tasks"]:
        _show_members("tasks", found["tasks"], COLUMNS["tasks"])
    if found["mail"]:
        _show_members("mail", found["mail"], COLUMNS["mail"])
    for path in found["logs"]:
        print_line(f"log: {path}")
    if agent:
        print_line()
        show_document(agent)


def _show_members(kind: str, members: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> None:
    rows = (
        ("/".join((kind, *member["key"])), *(_short(field_value(member, name)) for name in fields))
        for member in members
    )
    show_table((kind, *(name.replace("_", " ") for name in fields)), rows, most=MAX_ROWS)


def show_document(document: Mapping[str, Any]) -> None:
    changed = ", changed outside since" if document["changed_outside"] else ""
    saved = (
        f"saved {_short(document['saved_at'])}"
        if document["saved_at"]
        else "with no time of saving"
    )
    print_line(f"{document['path']}: revision {document['revision']}, {saved}{changed}", "dim")
    show_state(document["state"])


def show_records(path: str, records: Sequence[Mapping[str, Any]]) -> None:
    print_line(f"{path}: the last {counted(len(records), 'record')}", "dim")
    for entry in records:
        print_line(f"record {entry['seq']}", "dim")
        show_state(entry["record"])


def show_verified(report: VerifyReport) -> None:
    print_line(f"{report.state_dir}: {owner_line(report.owner)}")
    rows = [
        (kind, report.documents.get(kind), report.logs.get(kind), report.records.get(kind))
        for kind in sorted({*report.documents, *report.logs})
    ]
    if rows:
        show_table(("kind", "usable documents", "logs", "records"), rows)
    _show_findings("Problems", report.problems, "red")
    _show_findings("Worth knowing", report.notices, "")
    if report.quarantine:
        print_line("Quarantined earlier (nothing here is used; look at it and remove it):", "bold")
        kept = ((kept.path, kept.was, _short(kept.at), kept.reason) for kept in report.quarantine)
        show_table(("kept at", "was", "when", "why"), kept, most=MAX_ROWS)
    if report.ok:
        print_line("Everything can be used.", "green")
    else:
        print_line(f"{counted(len(report.problems), 'problem')} found.", "red")


def show_restored(report: RestoreReport, *, dry_run: bool) -> None:
    for line in report.lines():
        print_line(line)
    if report.requeued:
        rows = (
            (f"tasks/{one.agent_id}/{one.task_id}", one.name, one.attempts, one.status)
            for one in report.requeued
        )
        show_table(("was running", "name", "attempts", "now"), rows, most=MAX_ROWS)
    if dry_run:
        print_line("This is what a start would do; nothing was changed.")


def show_cleaned(report: CleanupReport, unusable: Sequence[Incident]) -> None:
    moved = (("tasks", report.tasks), ("mail", report.mail), ("sleep", report.sleep))
    would = "would be " if report.dry_run else ""
    for kind, ids in (("agents", report.agents), *moved):
        if ids:
            how = "removed" if kind == "sleep" else "archived"
            named = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
            print_line(f"{kind}: {len(ids):,} {would}{how} ({named})")
    print_line(f"{report.total:,} {would}cleaned up, {report.spared:,} spared")
    if report.dead_letters:
        print_line(
            f"{counted(report.dead_letters, 'dead task')} stayed: see agent-state tasks ls --dead"
        )
    if unusable:
        show_unusable(unusable)


def _show_findings(title: str, findings: Sequence[Finding], style: str) -> None:
    if findings:
        print_line(f"{title}:", f"bold {style}".strip())
        rows = ((found.fault, found.path, found.why) for found in findings)
        show_table(("what", "where", "why"), rows, most=MAX_ROWS)


def _short(cell: object) -> object:
    """A cell of a table: numbers stay numbers, long text is cut."""
    if cell is None or isinstance(cell, bool):
        return None if cell is None else ("yes" if cell else "no")
    if isinstance(cell, int):
        return cell
    text = ", ".join(map(str, cell)) if isinstance(cell, list) else str(cell)
    text = short_time(text)
    return text if len(text) <= 60 else text[:59] + "…"
