"""The names under which a store keeps its things in Redis.

All begin with the hash tag ``{<prefix>store}``, so that a cluster keeps them in one slot, where
a script may change several of them as one. A key of several ids is joined by ``/``; what would
be ambiguous or unreadable (``%``, ``/``, control characters) is percent-encoded. Unlike a file
name it keeps case and every other character, and sorts below its prefix.
"""

from __future__ import annotations

import re

from agent_state.errors import InvalidKeyError, Key
from agent_state.storage import paths

_ESCAPED = re.compile(r"[%/\x00-\x1f\x7f]")
_ESCAPE = re.compile(r"%([0-9a-f]{2})")
_PLAIN = re.compile(r"[A-Za-z0-9._~:-]+")


def text_of(kind: str, key: Key) -> str:
    """``alice/42``. Raises ``InvalidKeyError`` for what is no kind or no key."""
    paths.relative(kind, key, paths.DOCUMENT)
    return _join(key)


def place_of(kind: str, text: str) -> str:
    """The name of the lock: one for all keys that begin with the same id."""
    return f"{kind}/{text.partition('/')[0]}"


def _join(key: Key) -> str:
    return "/".join(
        part
        if _PLAIN.fullmatch(part)
        else _ESCAPED.sub(lambda found: f"%{ord(found[0]):02x}", part)
        for part in key
    )


def key_of(text: bytes) -> Key | None:
    """The key that ``text_of`` gave; None when no key has that text."""
    try:
        parts = text.decode().split("/")
    except UnicodeDecodeError:
        return None
    key = tuple(_ESCAPE.sub(lambda found: chr(int(found[1], 16)), part) for part in parts)
    try:
        return (
            key
            if all(paths.encode(part) for part in key) and _join(key) == "/".join(parts)
            else None
        )
    except InvalidKeyError:
        return None


def below(prefix: Key) -> tuple[bytes, bytes]:
    """Between which members of a sorted index the keys below a prefix are, for ZRANGEBYLEX."""
    if not prefix:
        return b"-", b"+"
    text = _join(prefix).encode()
    return b"[" + text + b"/", b"(" + text + b"0"  # "0" comes right after "/"


class Names:
    """The Redis keys of one store. Raises ``ValueError`` for a prefix with a brace in it."""

    def __init__(self, prefix: str) -> None:
        if "{" in prefix or "}" in prefix:
            raise ValueError("a prefix may hold no brace: braces mark the part that is hashed")
        self.tag = f"{{{prefix}store}}"
        self.notices = f"{self.tag}:notices"
        self.kinds = f"{self.tag}:kinds"
        self.locks = f"{self.tag}:locks"
        self.fence = f"{self.tag}:fence"

    def document(self, kind: str, text: str) -> str:
        """A hash: body, revision, saved_at, schema, meta, checksum."""
        return f"{self.tag}:document:{kind}:{text}"

    def index(self, kind: str) -> str:
        """A sorted set: the keys of all documents of a kind."""
        return f"{self.tag}:documents:{kind}"

    def log(self, kind: str, text: str) -> str:
        """A stream; the id of a record is its number."""
        return f"{self.tag}:log:{kind}:{text}"

    def dedupe(self, kind: str, text: str) -> str:
        """A hash: the number of each dedupe id of a log."""
        return f"{self.tag}:dedupe:{kind}:{text}"

    def logs(self, kind: str) -> str:
        """A sorted set: the keys of all logs of a kind."""
        return f"{self.tag}:logs:{kind}"

    def writer(self, writer: str) -> str:
        """A hash: the last batch of one store object, and what came of it."""
        return f"{self.tag}:writer:{writer}"

    def quarantine(self, kind: str, text: str, ident: str) -> str:
        """What was put aside, as it was."""
        return f"{self.tag}:quarantine:{kind}:{ident.replace(':', '_')}:{text}"

    def reason(self, kind: str, text: str, ident: str) -> str:
        """A hash: why that was put aside, and when."""
        return f"{self.tag}:reason:{kind}:{ident.replace(':', '_')}:{text}"

    def text_in(self, name: str, kind: str) -> str | None:
        """The key that a document or something put aside is named after; None for other names."""
        family, _, rest = name.removeprefix(f"{self.tag}:").partition(":")
        if not rest.startswith(f"{kind}:"):
            return None
        text = rest[len(kind) + 1 :]
        if family in {"quarantine", "reason"}:
            return text.partition(":")[2]
        return text if family == "document" else None
