"""The Redis keys of a store and of a mirror.

A document's key of several ids is joined by ``/`` into one text; ambiguous and unreadable
characters (``%``, ``/``, control characters) are percent-encoded. Unlike a file name the text keeps
case and every other character, and sorts below its prefix.
"""

from __future__ import annotations

import re

from agent_state.errors import InvalidKeyError, Key
from agent_state.storage import paths

_ESCAPED = re.compile(r"[%/\x00-\x1f\x7f]")
_ESCAPE = re.compile(r"%([0-9a-f]{2})")
_PLAIN = re.compile(r"[A-Za-z0-9._~:-]+")


def text_of(kind: str, key: Key) -> str:
    """``alice/42``. Raises ``InvalidKeyError`` for an invalid kind or key."""
    paths.relative(kind, key, paths.DOCUMENT)
    return _join(key)


def lock_of(kind: str, text: str) -> str:
    """The name of a document's lock: all keys that begin with the same id share one."""
    return f"{kind}/{text.partition('/')[0]}"


def _join(key: Key) -> str:
    return "/".join(
        part
        if _PLAIN.fullmatch(part)
        else _ESCAPED.sub(lambda found: f"%{ord(found[0]):02x}", part)
        for part in key
    )


def key_of(text: bytes) -> Key | None:
    """The key that ``text_of`` encoded; None for a text that it never gives."""
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
    """The range of a sorted index that holds the keys below a prefix, for ZRANGEBYLEX."""
    if not prefix:
        return b"-", b"+"
    text = _join(prefix).encode()
    return b"[" + text + b"/", b"(" + text + b"0"  # "0" comes right after "/"


def escape_glob(text: str) -> str:
    """The glob pattern that matches exactly this text, for SCAN."""
    return re.sub(r"([*?\[\]\\^-])", r"\\\1", text)


def _without_braces(prefix: str) -> str:
    """The prefix. Raises ``ValueError`` for a brace: braces mark the part that a cluster hashes."""
    if "{" in prefix or "}" in prefix:
        raise ValueError("a prefix must not contain braces: they mark the part that is hashed")
    return prefix


class StoreKeys:
    """The Redis keys of one store. Raises ``ValueError`` for a prefix with a brace.

    All begin with the hash tag ``{<prefix>store}``: a cluster keeps them in one slot, where a
    script may change several of them atomically.
    """

    def __init__(self, prefix: str) -> None:
        self.tag = f"{{{_without_braces(prefix)}store}}"
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
        """A hash: the record number of each dedupe key of a log."""
        return f"{self.tag}:dedupe:{kind}:{text}"

    def logs(self, kind: str) -> str:
        """A sorted set: the keys of all logs of a kind."""
        return f"{self.tag}:logs:{kind}"

    def writer(self, writer: str) -> str:
        """A hash: the last batch of one store object, and its results."""
        return f"{self.tag}:writer:{writer}"

    def quarantine(self, kind: str, text: str, ident: str) -> str:
        """A quarantined document, as it was."""
        return f"{self.tag}:quarantine:{kind}:{ident.replace(':', '_')}:{text}"

    def reason(self, kind: str, text: str, ident: str) -> str:
        """A hash: why a document was quarantined, and when."""
        return f"{self.tag}:reason:{kind}:{ident.replace(':', '_')}:{text}"

    def text_in(self, name: str, kind: str) -> str | None:
        """The key, as text, in the name of a document or quarantined document; else None."""
        family, _, rest = name.removeprefix(f"{self.tag}:").partition(":")
        if not rest.startswith(f"{kind}:"):
            return None
        text = rest[len(kind) + 1 :]
        if family in {"quarantine", "reason"}:
            return text.partition(":")[2]
        return text if family == "document" else None


class MirrorKeys:
    """The Redis keys of one mirror. Raises ``ValueError`` for a prefix with a brace.

    The kind is the hash tag, as in ``app:state:{agents}:alice``: a cluster keeps all keys of a
    kind in one slot, where a script may change a document and the kind's index atomically.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = _without_braces(prefix)
        self.owner = f"{prefix}mirror"
        """A hash: the instance whose copy this is, and the mirrored kinds with their TTLs."""

    def index(self, kind: str) -> str:
        """A hash: an entry for each document and log."""
        return f"{self._prefix}index:{{{kind}}}"

    def changes(self, kind: str) -> str:
        """A stream: a notice for each change of a document."""
        return f"{self._prefix}changes:{{{kind}}}"

    def document(self, kind: str, text: str) -> str:
        """A hash: body, revision, saved_at, schema, checksum."""
        return f"{self._prefix}state:{{{kind}}}:{text}"

    def log(self, kind: str, text: str) -> str:
        """A stream; the id of a record is its number."""
        return f"{self._prefix}log:{{{kind}}}:{text}"
