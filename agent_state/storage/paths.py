"""Keys to file names and back: readable, reversible, and safe on every file system.

``[a-z0-9._-]`` stands for itself. An upper-case letter is ``!`` and its lower case (the rule
of the Go module cache), so that ``Alice`` and ``alice`` stay two files on a disk that ignores
case. Everything else is percent-encoded UTF-8, byte for byte: NFC and NFD spellings are two
ids. A name that Windows reserves, or one over 150 bytes, becomes a readable stem, ``~`` and
16 hex digits of SHA-256; such a file has the complete id in ``_id``.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache, partial
from typing import NamedTuple

from agent_state.errors import InvalidKeyError, Key, StateNotFoundError

MAX_ID_BYTES = 4096
MAX_NAME_BYTES = 150
DOCUMENT = ".json"
LOG = ".jsonl"

_LITERAL = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789._-")
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9]|conin\$|conout\$)(?:\.|$)")
_OWN = re.compile(r"[a-z0-9_-](?:[a-z0-9._-]{0,148}[a-z0-9_-])?")
_BY_HAND = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9._-]{0,72}[A-Za-z0-9_-])?")
_HASHED = re.compile(r"~[0-9a-f]{16}$")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ESCAPE = re.compile(r"!([a-z])|%([0-9a-f]{2})")


RECORDED = frozenset({"record"})
"""Kinds whose files the recorder writes and renames: no mirror follows them."""

RUN = ".runtime"
"""The working folder of what ``system`` holds of the present runs alone."""
RUN_NAMES = frozenset({"runtime", "runtimes", "owners", "deleted_tasks", "mirror"})
"""The first segments of the keys of ``system`` that are there."""


class DocumentPath(NamedTuple):
    """Where the file of a document or a log is; made once for a change by ``locate``."""

    kind: str
    key: Key
    path: str
    """Absolute, with its ending."""
    parent: str
    """The folder of ``path``."""


def resolve_root(root: str | os.PathLike[str]) -> str:
    """The absolute path of a state directory: ``~`` expanded, symlinks to it followed, once.

    So ``state`` may be a link to another disk. A link below the directory is never followed.
    Raises ``StateNotFoundError`` for the home of an unknown user.
    """
    path = os.path.expanduser(root)
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise StateNotFoundError(f"{user} is nobody's home; write ./{path} for a name", path=path)
    return os.path.realpath(path)


def check_kind(kind: str) -> str:
    """A kind is a folder: lower-case letters, digits and ``_``. Raises ``InvalidKeyError``."""
    if not is_kind(kind):
        raise InvalidKeyError(f"{kind!r:.80} is not a kind; use lower-case letters, digits and _")
    return kind


@lru_cache(maxsize=1024)
def is_kind(name: str) -> bool:
    """Whether a folder's name is a kind's."""
    return _KIND.fullmatch(name) is not None and not _RESERVED.match(name)


@lru_cache(maxsize=65536)
def encode(segment: str, *, directory: bool = False) -> str:
    """The file name (without its ending) or directory name of one segment of a key.

    Raises ``InvalidKeyError`` when the segment is empty, over 4 KiB, or not Unicode.
    """
    if _is_its_own_name(segment):
        return segment
    if not isinstance(segment, str):
        raise InvalidKeyError(f"an id is text, not {type(segment).__name__}")
    if not segment:
        raise InvalidKeyError("an id may not be empty")
    try:
        raw = segment.encode()
    except UnicodeEncodeError as error:
        raise InvalidKeyError(f"the id {segment!r:.80} is not valid Unicode") from error
    if len(raw) > MAX_ID_BYTES:
        raise InvalidKeyError(f"an id has at most {MAX_ID_BYTES} bytes, this one {len(raw)}")
    last = len(raw) - 1
    # A directory that ends like a file would stand in the way of that file.
    dot = segment.rfind(".") if directory and segment.endswith((DOCUMENT, LOG)) else -1
    dot = len(segment[:dot].encode()) if dot >= 0 else -1
    parts = []
    for index, byte in enumerate(raw):
        if byte in _LITERAL and not (byte == 0x2E and index in (0, last, dot)):
            parts.append(chr(byte))
        elif 0x41 <= byte <= 0x5A:
            parts.append("!" + chr(byte + 0x20))
        else:
            parts.append(f"%{byte:02x}")
    name = "".join(parts)
    if len(name) <= MAX_NAME_BYTES and not _RESERVED.match(name):
        return name
    # Windows reserves a name together with whatever follows its first dot.
    stem = name.partition(".")[0] if _RESERVED.match(name) else name[:48]
    stem = re.sub(r"%[0-9a-f]?$|!$", "", stem)
    return f"{stem}~{hashlib.sha256(raw).hexdigest()[:16]}"


def _is_its_own_name(text: object) -> bool:
    """Whether an id needs no encoding, as most do; called for every file of a listing."""
    return (
        isinstance(text, str)
        and _OWN.fullmatch(text) is not None
        and not text.endswith((DOCUMENT, LOG))
        and not _RESERVED.match(text)
    )


def carries(name: str) -> bool:
    """Whether the name alone gives the id back; if not, the file holds it in ``_id``."""
    return not _HASHED.search(name)


def decode(name: str, *, directory: bool = False) -> str | None:
    """The id of a file name without its ending; None when no id has exactly that name."""
    if _is_its_own_name(name):
        return name
    if not carries(name):
        return None

    def character(match: re.Match[str]) -> bytes:
        letter, code = match.groups()
        return letter.upper().encode() if letter else bytes.fromhex(code)

    raw, end = b"", 0
    for match in _ESCAPE.finditer(name):
        raw += name[end : match.start()].encode(errors="replace") + character(match)
        end = match.end()
    raw += name[end:].encode(errors="replace")
    try:
        segment = raw.decode()
        canonical = encode(segment, directory=directory) == name
    except (UnicodeDecodeError, InvalidKeyError):
        return None
    return segment if canonical else None


def is_by_hand(name: str) -> bool:
    """Whether a person has written an id as a name as it is, with its capitals."""
    return _BY_HAND.fullmatch(name) is not None and not name.islower() and decode(name) is None


_encode_folder = partial(encode, directory=True)


def relative(kind: str, key: Key, ending: str) -> str:
    """``tasks/alice/42.json``: where a key lives below the state directory."""
    check_key(key)
    folders = map(_encode_folder, key[:-1])
    return "/".join((folder_of(check_kind(kind), key), *folders, encode(key[-1]) + ending))


def locate(root: str, kind: str, key: Key, ending: str = DOCUMENT) -> DocumentPath:
    """The path of a document, or with ``LOG`` of a log. Raises ``InvalidKeyError``."""
    if not isinstance(key, tuple) or not key:
        check_key(key)
    if not is_kind(kind):
        check_kind(kind)
    parent = "/".join((root, folder_of(kind, key), *map(_encode_folder, key[:-1])))
    path = f"{parent}/{encode(key[-1])}{ending}"
    return DocumentPath(kind, key, path, parent)


def folder_of(kind: str, prefix: Key) -> str:
    """The folder of a kind's keys that begin with ``prefix``."""
    return RUN if kind == "system" and prefix and prefix[0] in RUN_NAMES else kind


def check_key(key: Key) -> None:
    """Raises ``InvalidKeyError`` for anything but a tuple of ids, and for an empty one."""
    if not isinstance(key, tuple) or not key:
        raise InvalidKeyError(f"a key is a tuple of ids, not {key!r:.80}")


def directories(prefix: Key) -> list[str]:
    """The directory names of the leading segments of a key."""
    return [*map(_encode_folder, prefix)]


@lru_cache(maxsize=65536)
def self_describing(key: Key) -> bool:
    """Whether the path gives the complete key."""
    return carries(encode(key[-1])) and all(map(carries, map(_encode_folder, key[:-1])))


def is_below(key: Key, prefix: Key) -> bool:
    """Whether a key continues after ``prefix``; no key is below itself."""
    return len(key) > len(prefix) and key[: len(prefix)] == prefix
