"""A document as bytes: flat JSON, the state's own fields below the reserved ones.

Reserved are ``_checksum`` (CRC-32 of the canonical body, eight hex digits), ``_revision``,
``_saved_at``, ``_schema``, ``_session_id`` on agents, and ``_id`` where the file name cannot
carry the key. Keys sorted, two-space indent, UTF-8 unescaped, final newline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import orjson

from agent_state.errors import (
    Key,
    SerializationError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.protocols import Document, JsonObject
from agent_state.serializers import MAX_DEPTH, canonical_json, check_strict_json, parse_file
from agent_state.storage import fileio, paths
from agent_state.storage.indented_json import indent_object

RESERVED = frozenset({"_checksum", "_revision", "_saved_at", "_schema", "_session_id", "_id"})
SEALED = "_sealed"
"""The one key of an encrypted body; no state and no record may have it."""
MAX_REVISION = 2**63 - 1

REFUSED = RESERVED | {SEALED}
"""The keys that a state may not have."""

_INDENT = 2 * (MAX_DEPTH + 1)
_MAX_BODY = fileio.MAX_BYTES - 1024 * 1024
"""Room is left for the reserved keys."""
SMALL_BODY = _MAX_BODY // (_INDENT + 2)
"""A body of so many bytes fits in any case, however its lines are indented."""

_FOREIGN = frozenset({b"\xef", b"\xff", b"\xfe", b"\0"})
"""The first byte of a file that begins with a byte order mark or a NUL."""

_LARGE_BODY = 1024 * 1024
"""A longer body is made into a file by parts."""
_PRETTY = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


def checksum(body: bytes) -> str:
    """CRC-32 of the bytes, as eight hex digits."""
    return f"{crc32(body):08x}"


def check_reserved(state: Mapping[str, Any], kind: str, key: Key) -> None:
    """Raises ``StateValidationError`` when a state uses one of our keys."""
    if not REFUSED.isdisjoint(state):
        names = ", ".join(sorted(REFUSED.intersection(state)))
        raise StateValidationError(f"reserved for the library: {names}", kind=kind, key=key)


def check_size(body: bytes, kind: str, key: Key, lines: int | None = None) -> None:
    """Raises ``SerializationError`` for a state whose file would be too large to be read.

    ``lines``: how many it has at most; None to count, which takes long.
    """
    if len(body) * (_INDENT + 2) <= _MAX_BODY:
        return
    # Each line has its indent; only what may not fit is written to see.
    most = lines
    if most is None:
        most = body.count(b",") + 2 * (body.count(b"{") + body.count(b"["))
    if len(body) + most * (_INDENT + 2) > _MAX_BODY:
        size = len(body)
        if size <= _MAX_BODY:
            size = len(orjson.dumps(orjson.loads(body), option=_PRETTY))
        if size > _MAX_BODY:
            raise SerializationError(
                f"its file would have {size} bytes, of {_MAX_BODY} at most", kind=kind, key=key
            )


def encode_document(document: Document, meta: Mapping[str, str]) -> bytes:
    """The bytes of the file. ``meta`` adds reserved keys such as ``_session_id``."""
    is_large = len(document.body) > _LARGE_BODY
    content: JsonObject = {} if is_large else orjson.loads(document.body)
    content.update(meta)
    content["_checksum"] = f"{crc32(document.body):08x}"
    content["_revision"] = document.revision
    content["_saved_at"] = document.saved_at
    content["_schema"] = document.schema
    if not paths.self_describing(document.key):
        content["_id"] = document.key[0] if len(document.key) == 1 else list(document.key)
    if is_large:
        return indent_object(document.body, content)
    return orjson.dumps(content, option=_PRETTY)


def unedited_content(data: bytes) -> JsonObject | None:
    """The body in a file with its ``_revision``, ``_saved_at``, ``_schema`` and ``_id``.

    None unless the checksum says that this library wrote the file, and nobody changed it since:
    it needs no other check. For readers of many documents.
    """
    try:
        content = orjson.loads(data)
        stated = content.pop("_checksum", None)
        reserved = {name: content.pop(name) for name in RESERVED if name in content}
        if stated != f"{crc32(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)):08x}":
            return None
    except (ValueError, TypeError, AttributeError):  # no JSON, no object, or too deep
        return None
    content.update(reserved)
    return content  # type: ignore[no-any-return]  # an object, as it has a checksum


def decode_document(kind: str, key: Key, data: bytes) -> tuple[Document, dict[str, str]]:
    """The document in a file, and its further reserved keys.

    A missing or invalid reserved key, as a hand edit may leave it, is filled in.
    Raises ``StateCorruptedError`` when the file is not a JSON object or belongs to another key.
    """
    content = parse_file(data)
    stated = content.pop("_checksum", None)
    revision = content.pop("_revision", None)
    saved_at = content.pop("_saved_at", None)
    schema = content.pop("_schema", None)
    session = content.pop("_session_id", None)
    own = content.pop("_id", None)
    if own is not None and _key(own) != key:
        reason = f"the file names {own!r:.80}" if _key(own) else "its _id is not a key"
        raise StateCorruptedError(reason, kind=kind, key=key)
    body = canonical_json(content)
    # A byte order mark, or NULs, are gone at the next save, even if it changes nothing else.
    edited = stated != f"{crc32(body):08x}" or data[:1] in _FOREIGN or data[-1:] == b"\0"
    if edited:
        check_strict_json(data)
    document = Document(
        kind,
        key,
        body,
        revision if type(revision) is int and 0 < revision <= MAX_REVISION else 1,
        saved_at if type(saved_at) is str else "",
        schema if type(schema) is str else "",
        edited,
    )
    return document, {"_session_id": session} if type(session) is str else {}


def key_of(data: bytes) -> Key | None:
    """The key that a file with a hashed name contains; None when it contains none."""
    return _key(parse_file(data).get("_id"))


def _key(own: object) -> Key | None:
    if type(own) is str:
        return (own,)
    if type(own) is list and own and all(type(part) is str for part in own):
        return tuple(own)
    return None
