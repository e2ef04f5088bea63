"""A task queue and a mailbox, each one view over many documents.

Each task and each message is a file of its own, so that a transition is O(1) and its diff one
file. What belongs to the queue as a whole (its own fields, and which task stands where) is one
more document, written only for a queue that was saved as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agent_state.errors import StateValidationError
from agent_state.models import MailboxState, OpenModel, TaskQueueState
from agent_state.protocols import JsonObject


@dataclass(frozen=True, slots=True)
class View:
    """How one kind of member makes up one whole.

    ``schema`` is the whole's, ``item_schema`` that of a member that is not of our runtime's
    making. ``lists`` are the whole's fields that hold members; ``id_fields`` where a member may
    say its id; ``own_field`` marks a member that our runtime wrote, whose status says in which
    list it stands (``list_of``).
    """

    kind: str
    schema: str
    item_schema: str
    model: type[OpenModel]
    lists: tuple[str, ...]
    id_fields: tuple[str, ...]
    own_field: str
    list_of: Mapping[str, str]
    default_list: str


TASK_QUEUE = View(
    kind="tasks",
    schema="task_queues",
    item_schema="task_items",
    model=TaskQueueState,
    lists=("pending_tasks", "in_progress_tasks", "completed_tasks"),
    id_fields=("task_id", "id"),
    own_field="attempts",
    list_of={
        "in_progress": "in_progress_tasks",
        "completed": "completed_tasks",
        "dead": "completed_tasks",
        "cancelled": "completed_tasks",
    },
    default_list="pending_tasks",
)
MAILBOX = View(
    kind="mail",
    schema="mailboxes",
    item_schema="mail_items",
    model=MailboxState,
    lists=("messages", "unread", "unread_messages", "history", "mail_history", "pending_replies"),
    id_fields=("message_id", "id"),
    own_field="to_agent",
    list_of={},
    default_list="messages",
)

VIEWS = {TASK_QUEUE.kind: TASK_QUEUE, MAILBOX.kind: MAILBOX}


def take_apart(view: View, state: Mapping[str, Any]) -> tuple[JsonObject, dict[str, JsonObject]]:
    """The whole without its members, and the members by id.

    In the whole each list holds ids; a member that is not an object, or shares its id with a
    different one, stays in the list as it is. Members without an id are named by their place.
    """
    header = dict(state)
    members: dict[str, JsonObject] = {}
    for name in view.lists:
        items = header.get(name)
        if items is None:
            continue
        if not isinstance(items, list | tuple):
            raise StateValidationError(f"{name} is not a list", kind=view.schema)
        entries: list[Any] = []
        for index, item in enumerate(items):
            body = item.model_dump() if isinstance(item, OpenModel) else item
            if not isinstance(body, dict):
                entries.append({"inline": body})
                continue
            ident = _id_of(view, body) or f"{name}-{index:04d}"
            if ident in members and members[ident] != body:
                entries.append({"inline": body})
                continue
            members[ident] = body
            entries.append(ident)
        header[name] = entries
    return header, members


def item_schema(view: View, body: JsonObject) -> str:
    """The schema of a member: the kind's own for what our runtime wrote, else an open one."""
    return view.kind if view.own_field in body else view.item_schema


def put_together(
    view: View, owner: str, header: JsonObject | None, members: Iterable[tuple[str, JsonObject]]
) -> JsonObject | None:
    """The whole with its members; None when there is neither."""
    left = dict(members)
    if header is None and not left:
        return None
    whole: JsonObject = dict(header) if header is not None else {"agent_id": owner}
    placed: dict[str, list[Any]] = {}
    named: set[str] = set()
    for name in view.lists:
        entries = whole.get(name)
        if not isinstance(entries, list):
            continue
        items = placed.setdefault(name, [])
        for entry in entries:
            if isinstance(entry, dict):
                items.append(entry.get("inline"))
            elif entry in left:
                named.add(entry)
                home = _home(view, left[entry])
                if home is None or home == name:
                    items.append(left[entry])
                else:
                    placed.setdefault(home, []).append(left[entry])
    for ident, body in left.items():
        if ident not in named:
            placed.setdefault(_home(view, body) or view.default_list, []).append(body)
    return {**whole, **placed}


def _id_of(view: View, body: JsonObject) -> str | None:
    for field in view.id_fields:
        ident = body.get(field)
        if isinstance(ident, str) and ident:
            return ident
    return None


def _home(view: View, body: JsonObject) -> str | None:
    """The list our runtime's own words put a member in; None for other people's members."""
    if view.own_field not in body or not view.list_of:
        return None
    return view.list_of.get(str(body.get("status")), view.default_list)
