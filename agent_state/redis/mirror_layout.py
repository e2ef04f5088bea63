"""The names and entries of a mirror in Redis.

The kind is the hash tag, as in ``app:state:{agents}:alice``: a cluster keeps all of a kind in one
slot, so that a script may change a document and the kind's index as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32

from agent_state.errors import Key, describe
from agent_state.protocols import Document
from agent_state.redis.keys import key_of, text_of

Place = tuple[str, Key]

STATUS: Place = ("system", ("mirror",))
"""Where the mirror's own state is stored; the one document that is not mirrored."""

MARK, WRITES, LOG = "/mark", "/writes", "/log/"
"""Fields of an index that are no document's: no document's text begins with a slash."""
_MARK, _WRITES, _LOG = MARK.encode(), WRITES.encode(), LOG.encode()


class Names:
    """The Redis keys of one mirror. Raises ``ValueError`` for a prefix with a brace in it."""

    def __init__(self, prefix: str) -> None:
        if "{" in prefix or "}" in prefix:
            raise ValueError("a prefix may hold no brace: braces mark the part that is hashed")
        self.prefix = prefix
        self.mirror = f"{prefix}mirror"
        """A hash: whose copy this is, and which kinds there are."""

    def index(self, kind: str) -> str:
        """A hash: an entry for each document and log."""
        return f"{self.prefix}index:{{{kind}}}"

    def changes(self, kind: str) -> str:
        """A stream: a notice for each change of a document."""
        return f"{self.prefix}changes:{{{kind}}}"

    def document(self, kind: str, text: str) -> str:
        """A hash: body, revision, saved_at, schema, checksum."""
        return f"{self.prefix}state:{{{kind}}}:{text}"

    def log(self, kind: str, text: str) -> str:
        """A stream; the id of a record is its number."""
        return f"{self.prefix}log:{{{kind}}}:{text}"


class Entry(NamedTuple):
    """What an index says of a document: its last write, and the version written then."""

    write: str
    """Counts the writes of the index; empty where nothing was ever written."""
    revision: str
    """Empty: the document is gone."""
    checksum: str

    @property
    def version(self) -> tuple[str, str]:
        return self.revision, self.checksum


NOTHING = Entry("", "", "")


class Index(NamedTuple):
    """What Redis has of one kind."""

    mark: str
    """Whose index this is, and since when: ``<instance> <random>``."""
    writes: int
    documents: dict[Place, Entry]
    logs: dict[Place, int]
    gone: dict[str, str]
    """What was deleted: field and entry."""


def entry_of(text: str) -> Entry:
    """An entry as it is written in an index; ``NOTHING`` for an empty one."""
    if not text:
        return NOTHING
    write, revision, rest = text.split(" ")
    return Entry(write, "", "") if revision == "gone" else Entry(write, revision, rest)


def version_of(document: Document | None) -> tuple[str, str]:
    """What tells one version of a document from another, an edit by hand included."""
    if document is None:
        return "", ""
    return str(document.revision), f"{crc32(document.body):08x}"


def take_in(index: Index, kind: str, fields: Mapping[bytes, bytes]) -> Index:
    """An index with a part more of what Redis gives. Fields that are nobody's are left out."""
    for name, value in fields.items():
        if name == _WRITES:
            index = index._replace(writes=int(value))
        elif name != _MARK:
            is_log = name.startswith(_LOG)
            key = key_of(name[len(_LOG) :] if is_log else name)
            if key is None:
                continue
            if is_log:
                index.logs[kind, key] = int(value)
                continue
            text = value.decode()
            index.documents[kind, key] = entry = entry_of(text)
            if not entry.revision:
                index.gone[name.decode()] = text
    return index


def field_of(place: Place) -> str:
    return text_of(*place)


def say(place: Place, *, log: bool = False) -> str:
    """``agents/alice``, for people; a log's ends in ``.jsonl`` as its file does."""
    return describe(*place) + (".jsonl" if log else "")
