"""Short ways to make changes of a store and to read them back."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from agent_state.errors import Key
from agent_state.protocols import Append, Check, Delete, Document, LogRecord, Put, StateStore

SCHEMA = "notes/1"

NASTY_IDS = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    ".",
    "..",
    ".hidden",
    "trailing.",
    "trailing ",
    "CON",
    "nul.json",
    "a:b",
    "a\\b",
    "*?<>|\"'",
    "%41",
    "!a",
    "line\nbreak",
    "with\0nul",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "e\N{COMBINING ACUTE ACCENT}",
    "alice",
    "Alice",
    "ALICE",
    "x.json",
    "x.jsonl",
    "x~0123456789abcdef",
    "archive",
    "\N{RIGHT-TO-LEFT OVERRIDE}txt",
    "\N{PILE OF POO}" * 1024,
    "x" * 4096,
    "x" * 4095 + "y",
)
"""Ids that escape, collide or break somewhere; to a store they are ids like any other."""


def body(content: object) -> bytes:
    """Canonical JSON."""
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


def put(key: str | Key, content: object, expected: int | None = None, kind: str = "notes") -> Put:
    return Put(kind, as_key(key), body(content), SCHEMA, expected)


def delete(key: str | Key, expected: int | None = None) -> Delete:
    return Delete("notes", as_key(key), expected)


def append(key: str | Key, content: object, dedupe_key: str | None = None) -> Append:
    return Append("notes", as_key(key), body(content), dedupe_key)


def check(key: str | Key, expected: int) -> Check:
    return Check("notes", as_key(key), expected)


def as_key(key: str | Key) -> Key:
    return (key,) if isinstance(key, str) else key


async def content_of(store: StateStore, key: str | Key, kind: str = "notes") -> Any:  # any JSON
    """The content of a document; None if it is not stored."""
    document = await store.get(kind, as_key(key))
    return None if document is None else orjson.loads(document.body)


async def scanned(store: StateStore, prefix: Key = ()) -> dict[Key, Document]:
    return {document.key: document async for document in store.scan("notes", prefix)}


async def records_of(
    store: StateStore, key: str | Key, *, after: int = 0, last: int | None = None
) -> list[LogRecord]:
    return [record async for record in store.read_log("notes", as_key(key), after=after, last=last)]


async def turns(count: int = 50) -> None:
    """Give the other tasks of the loop their turn."""
    for _ in range(count):
        await asyncio.sleep(0)
