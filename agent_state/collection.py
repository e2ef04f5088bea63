"""Collections: a task queue and a mailbox, each stored as many documents.

Each task and each message is a document of its own, so that a transition is O(1) and its diff is
one file. The collection's own fields, and the order of its items, are one more document, the
header. It is written only for a collection that was saved through ``save_task_queue_state`` or
``save_mailbox_state``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agent_state.errors import StateValidationError
from agent_state.models import OpenModel
from agent_state.protocols import JsonObject

INLINE = "inline"
"""The one key of an entry that stays in its list: ``{"inline": item}``."""


@dataclass(frozen=True, slots=True)
class Collection:
    """How the items of one kind make up one collection."""

    kind: str
    """The kind of the items, and of the header."""
    schema: str
    """The schema of the collection."""
    item_schema: str
    """The schema of an item that another program wrote."""
    lists: tuple[str, ...]
    """The fields of the collection that hold items."""
    id_fields: tuple[str, ...]
    """The fields of an item that may hold its id; the first one set counts."""
    own_field: str
    """The field that only items written by our runtime have; they have the kind's own schema."""
    list_of: Mapping[str, str]
    """The list for each status of an item that our runtime wrote."""
    default_list: str
    """The list for every other status, and for an item that the header does not name."""

    def schema_of(self, item: JsonObject) -> str:
        """The schema of an item."""
        return self.kind if self.own_field in item else self.item_schema

    def id_of(self, item: JsonObject) -> str | None:
        """The id that an item has in its fields; None without one."""
        for field in self.id_fields:
            item_id = item.get(field)
            if isinstance(item_id, str) and item_id:
                return item_id
        return None

    def inline_item(self, entry: Any) -> JsonObject | None:
        """The item that a list of the header holds itself, as a person or an ancestor wrote it.

        None for a reference, and for what ``split_collection`` left in the list.
        """
        is_item = isinstance(entry, dict) and entry.keys() != {INLINE}
        return entry if is_item else None

    def list_for(self, item: JsonObject) -> str | None:
        """The list that an item's status puts it in; None for items of other programs."""
        if self.own_field not in item or not self.list_of:
            return None
        return self.list_of.get(str(item.get("status")), self.default_list)


TASK_QUEUE = Collection(
    kind="tasks",
    schema="task_queues",
    item_schema="task_items",
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
MAILBOX = Collection(
    kind="mail",
    schema="mailboxes",
    item_schema="mail_items",
    lists=("messages", "unread", "unread_messages", "history", "mail_history", "pending_replies"),
    id_fields=("message_id", "id"),
    own_field="to_agent",
    list_of={},
    default_list="messages",
)

COLLECTIONS = {collection.kind: collection for collection in (TASK_QUEUE, MAILBOX)}
"""The collection whose items are of a kind."""


def split_collection(
    collection: Collection, state: Mapping[str, Any]
) -> tuple[JsonObject, dict[str, JsonObject]]:
    """The header of a collection, and its items by id.

    In the header each list holds ids. An item that is not an object, or that shares its id with a
    different item, stays in the list, as ``{"inline": item}``. An item without an id is named by
    its list and position. Raises ``StateValidationError`` for a list that is not a list.
    """
    header = dict(state)
    items: dict[str, JsonObject] = {}
    for name in collection.lists:
        given = header.get(name)
        if given is None:
            continue
        if not isinstance(given, list | tuple):
            raise StateValidationError(f"{name} is not a list", kind=collection.schema)
        entries: list[Any] = []
        for index, item in enumerate(given):
            body = item.model_dump() if isinstance(item, OpenModel) else item
            if not isinstance(body, dict):
                entries.append({INLINE: body})
                continue
            item_id = collection.id_of(body) or f"{name}-{index:04d}"
            if items.setdefault(item_id, body) == body:
                entries.append(item_id)
            else:
                entries.append({INLINE: body})
        header[name] = entries
    return header, items


def join_collection(
    collection: Collection,
    owner: str,
    header: JsonObject | None,
    items: Iterable[tuple[str, JsonObject]],
    *,
    edited: bool = False,
) -> JsonObject | None:
    """The collection of a header and the items by id; None when both are missing.

    An item that the header holds itself is in its list, as it is written. ``edited``: the header
    is not as this library wrote it, so that a text which names no item is one itself; in ours it
    names an item that is gone.
    """
    by_id = dict(items)
    if header is None and not by_id:
        return None
    lists: dict[str, list[Any]] = {}
    named: set[str] = set()
    state: JsonObject = {"agent_id": owner, **(header or {})}
    for name in collection.lists:
        entries = state.get(name)
        if not isinstance(entries, list):
            continue
        lists.setdefault(name, [])
        for entry in entries:
            if isinstance(entry, str) and entry in by_id:
                named.add(entry)
                item = by_id[entry]
                lists.setdefault(collection.list_for(item) or name, []).append(item)
            elif isinstance(entry, dict) and collection.inline_item(entry) is None:
                lists[name].append(entry[INLINE])
            elif edited or not isinstance(entry, str):
                lists[name].append(entry)
    for item_id, item in by_id.items():
        if item_id not in named:
            lists.setdefault(collection.list_for(item) or collection.default_list, []).append(item)
    return {**state, **lists}
