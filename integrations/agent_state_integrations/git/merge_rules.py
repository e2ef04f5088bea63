"""Merges two versions of a document or a log, field by field, by the rules of each kind.

git's merge driver runs this module alone, with ``python -I -S``, once for each file: it imports
nothing but two built-in modules of the standard library, and no other module of ours.

A field that one side changed is taken from it. A field that both changed is a conflict, unless
the kind has a rule: content is never chosen for being newer, since in a revert the other side is
older than the base. A conflict keeps our value in valid JSON, and is listed.
"""

from __future__ import annotations

from zlib import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    Json = dict[str, Any]

RESERVED = ("_checksum", "_revision", "_saved_at", "_schema", "_session_id", "_id")
SEALED = "_sealed"
"""The one field of an encrypted document."""
LOG_RESERVED = ("_crc", "_seq", "_dedupe", "_id")
IDENTITY = ("_id", "_session_id", "task_id", "agent_id", "message_id")
TIMES = ("created_at", "dedupe_until", "last_active", "read_at", "timestamp")
"""Time stamps of which the later one is right, whoever wrote it."""

TASK_BLOCK = (
    "status",
    "result",
    "error",
    "traceback",
    "started_at",
    "finished_at",
    "not_before",
    "lease",
    "progress",
    "steps",
)
"""The fields that tell what became of a task; they move together."""
TERMINAL = ("completed", "cancelled", "dead")
MAIL = ("unread", "read", "replied", "archived")
"""The states of a message, in the order in which it goes through them."""
AGENT = ("idle", "waiting", "active", "sleeping", "stopped")
"""An agent's states; a start works out all but the last from the rest."""
HISTORIES = (("context", "conversation_history"),)
"""Lists that only grow: what both sides added is kept, in the order of time."""
LOGGED = ("agents/1", "agents/2")
"""The schemas of an agent, without and with a log for its history."""


class UnmergeableError(Exception):
    """The two sides are no versions of one document, or cannot be read."""


class Missing:
    """No value: the field is not there."""

    def __repr__(self) -> str:
        return "nothing"


MISSING: Any = Missing()


class Outcome:
    """A merged document or log.

    ``conflicts`` lists the fields that both sides changed and no rule decides; ``told`` lists what
    was decided by a rule that a person may want to know of.
    """

    def __init__(self, data: bytes, conflicts: list[str], told: list[str]) -> None:
        self.data = data
        self.conflicts = conflicts
        self.told = told


# -- JSON ----------------------------------------------------------------------------------------


class Number(str):
    """A number with a fraction or an exponent, as it was written: its text is in the checksum."""

    __slots__ = ()


def _pairs(items: list[tuple[str, Any]]) -> Json:
    found = dict(items)
    if len(found) != len(items):
        raise UnmergeableError("a key stands there twice")
    return found


def _constant(name: str) -> Any:
    raise UnmergeableError(f"{name} is not JSON")


class _Context:
    """The settings of the scanner of the standard library."""

    strict = True
    object_hook = None
    object_pairs_hook = staticmethod(_pairs)
    parse_float = Number
    parse_int = int
    parse_constant = staticmethod(_constant)
    memo = None


try:
    # The C part of ``json`` alone: the package compiles regular expressions when it is imported,
    # which takes as long as all the rest of a merge.
    import _json

    _quote: Callable[[str], str] = _json.encode_basestring
    _scan: Any = _json.make_scanner(_Context())  # type: ignore[arg-type]  # any object with these fields
except (ImportError, AttributeError):  # another implementation of Python
    import json

    _quote = json.JSONEncoder(ensure_ascii=False).encode
    _scan = json.JSONDecoder(  # type: ignore[attr-defined]  # its own scanner
        object_pairs_hook=_pairs, parse_float=Number, parse_constant=_constant
    ).scan_once


def _load(text: str) -> Any:
    text = text.strip(" \t\r\n")
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        raise UnmergeableError("not JSON") from None
    if end != len(text):
        raise UnmergeableError("not JSON")
    return value


def parse(data: bytes) -> Json:
    """One JSON object. Raises ``UnmergeableError``."""
    try:
        value = _load(data.decode())
    except (ValueError, RecursionError, SystemError) as error:
        # The scanner has no words for an error unless all of ``json`` is imported.
        said = "" if isinstance(error, SystemError) else f": {error}"
        raise UnmergeableError(f"not JSON{said}") from None
    if type(value) is not dict:
        raise UnmergeableError("not a JSON object")
    return value


def dump(value: Any, indent: str | None = None) -> str:
    """Canonical JSON, or with ``indent`` (a newline and spaces) JSON as documents are written."""
    kind = type(value)
    if kind is str:
        return _quote(value)
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is int or kind is Number:
        return str(value)
    deeper = None if indent is None else indent + "  "
    if kind is dict:
        colon = ":" if deeper is None else ": "
        items = [f"{_quote(name)}{colon}{dump(value[name], deeper)}" for name in sorted(value)]
        return _enclosed("{", items, "}", indent, deeper)
    return _enclosed("[", [dump(item, deeper) for item in value], "]", indent, deeper)


def _enclosed(
    first: str, items: list[str], last: str, indent: str | None, deeper: str | None
) -> str:
    if not items:
        return first + last
    if indent is None or deeper is None:
        return first + ",".join(items) + last
    return first + deeper + ("," + deeper).join(items) + indent + last


def write(content: Json) -> bytes:
    """The bytes of a document, with its checksum anew."""
    body = {name: value for name, value in content.items() if name not in RESERVED}
    content = {**content, "_checksum": f"{crc32(dump(body).encode()):08x}"}
    return (dump(content, "\n") + "\n").encode()


# -- documents -------------------------------------------------------------------------------------


def merge(
    path: str, base: bytes, ours: bytes, theirs: bytes, *, prefer: str = "completed"
) -> Outcome:
    """Merge a document, or a log by the ending of ``path``; an empty ``base`` means none.

    ``prefer``: ``completed`` or ``cancelled``, the outcome of a task that has both. Raises
    ``UnmergeableError``.
    """
    try:
        if path.endswith(".jsonl"):
            return merge_logs(_begun(path, base, ours, theirs), ours, theirs)
        return _merge_documents(path, base, ours, theirs, prefer)
    except RecursionError:
        raise UnmergeableError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise UnmergeableError("a lone surrogate is not Unicode text") from None


def _merge_documents(path: str, base: bytes, ours: bytes, theirs: bytes, prefer: str) -> Outcome:
    left, right = parse(ours), parse(theirs)
    try:
        root = parse(base) if base.strip() else {}
    except UnmergeableError:
        root = {}  # a virtual base may hold markers: the merge has two sides then
    _check_identity(root, left, right)
    merging = _Merging(prefer)
    kind = _kind(path, left, right)
    names = ("_checksum", "_revision", "_saved_at", "_schema")
    bodies = [
        {name: side[name] for name in side if name not in names} for side in (root, left, right)
    ]
    if SEALED in left or SEALED in right:
        taken, body = {}, merging.whole(*bodies)
    else:
        taken = merging.block(kind, *bodies)
        body = merging.fields((), *({n: b[n] for n in b if n not in taken} for b in bodies))
    content = {name: value for name, value in {**body, **taken}.items() if value is not MISSING}
    for name in ("_schema", "_saved_at"):
        stamps = [side[name] for side in (left, right) if type(side.get(name)) is str]
        if stamps:
            content[name] = max(stamps)
    if content.get("_schema") in LOGGED:
        context = content.get("context")
        found = context.get("conversation_history") if type(context) is dict else None
        content["_schema"] = LOGGED[type(found) is dict]
    numbers = [side["_revision"] for side in (left, right) if type(side.get("_revision")) is int]
    content["_revision"] = max(numbers, default=0) + 1
    return Outcome(write(content), merging.conflicts, merging.told)


def _kind(path: str, *sides: Json) -> str:
    """The kind of a document, by its schema or by its folder."""
    for side in sides:
        if type(schema := side.get("_schema")) is str:
            return str(schema.partition("/")[0])
    parts = path.split("/")
    return next((name for name in parts if name in ("agents", "tasks", "mail", "sleep")), "")


def _check_identity(base: Json, *sides: Json) -> None:
    left, right = sides
    for name in IDENTITY:
        if name in left and name in right and left[name] != right[name]:
            raise UnmergeableError(f"two documents, not two versions of one: their {name} differs")
    schemas = {str(side.get("_schema") or base.get("_schema")) for side in sides}
    if len(schemas) > 1 and not schemas.issubset(LOGGED):
        raise UnmergeableError(f"their schemas differ: {', '.join(sorted(schemas))}")


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same; ``True`` is not 1."""
    if type(one) is not type(other):
        return False
    if type(one) is dict:
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if type(one) is list:
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class _Merging:
    """One merge of a document: what it has met."""

    def __init__(self, prefer: str) -> None:
        self._prefer = prefer
        self.conflicts: list[str] = []
        self.told: list[str] = []

    def fields(self, at: tuple[str, ...], base: Json, ours: Json, theirs: Json) -> Json:
        """Merge the fields of an object."""
        merged = {}
        for name in {**ours, **theirs}:
            value = self.value(
                (*at, name),
                base.get(name, MISSING),
                ours.get(name, MISSING),
                theirs.get(name, MISSING),
            )
            if value is not MISSING:
                merged[name] = value
        return merged

    def whole(self, base: Json, ours: Json, theirs: Json) -> Json:
        """Take one side, as an encrypted document can be merged with nothing."""
        if same(ours, base):
            return theirs
        if not same(ours, theirs) and not same(theirs, base):
            self.conflicts.append("it is encrypted, and changed on both sides")
        return ours

    def value(self, at: tuple[str, ...], base: Any, ours: Any, theirs: Any) -> Any:
        """Merge one value; ``MISSING`` stands for a field that is not there."""
        if same(ours, theirs) or same(theirs, base):
            return ours
        if same(ours, base):
            return theirs
        if at in HISTORIES and type(ours) is dict and type(theirs) is dict:
            place = merge_places(ours, theirs)
            if place is not None:
                return place
        elif type(ours) is dict and type(theirs) is dict:
            return self.fields(at, base if type(base) is dict else {}, ours, theirs)
        if at[-1] in TIMES and type(ours) is str and type(theirs) is str and len(at) == 1:
            return max(ours, theirs)
        if at == ("attempts",) and type(ours) is int and type(theirs) is int:
            return max(ours, theirs)
        if at in HISTORIES and type(ours) is list and type(theirs) is list:
            both = merge_histories(base if type(base) is list else [], ours, theirs)
            if both is not None:
                return both
        self.conflicts.append(f"{'.'.join(at)}: {_short(ours)} against {_short(theirs)}")
        return ours

    # -- what moves together ---------------------------------------------------------------

    def block(self, kind: str, base: Json, ours: Json, theirs: Json) -> Json:
        """The fields that a rule of the kind decides together; empty if the kind has none."""
        if kind == "tasks":
            return self._task(*(_part(side, TASK_BLOCK) for side in (base, ours, theirs)))
        ranks = {"mail": MAIL, "agents": AGENT}.get(kind)
        if ranks is not None:
            return self._ranked(ranks, *(_part(side, ("status",)) for side in (base, ours, theirs)))
        return {}

    def _task(self, base: Json, ours: Json, theirs: Json) -> Json:
        if same(ours, theirs) or same(theirs, base):
            return _kept(ours, base, theirs)
        if same(ours, base):
            return _kept(theirs, base, ours)
        left, right = ours.get("status"), theirs.get("status")
        ended = [side for side in (ours, theirs) if side.get("status") in TERMINAL]
        undone = base.get("status") in TERMINAL and len(ended) < 2
        if len(ended) == 1 and not undone:
            self.told.append(f"status: {ended[0]['status']}, which ends the task")
            return _kept(ended[0], ours, theirs)
        if len(ended) == 2 and left != right:
            order = [self._prefer, *(word for word in TERMINAL if word != self._prefer)]
            first = min(ended, key=lambda side: order.index(side["status"]))
            self.told.append(f"status: {first['status']}, although it was {left} and {right}")
            return _kept(first, ours, theirs)
        if len(ended) == 2 or undone or left != right:
            self.conflicts.append(
                f"status: {_short(left)} against {_short(right)}, with its result"
            )
            return _kept(ours, theirs)
        return self.fields((), base, ours, theirs)

    def _ranked(self, ranks: tuple[str, ...], base: Json, ours: Json, theirs: Json) -> Json:
        left, right = ours.get("status", MISSING), theirs.get("status", MISSING)
        before = base.get("status", MISSING)
        unchanged = same(left, right) or same(right, before) or same(left, before)
        places = [ranks.index(word) if word in ranks else -1 for word in (before, left, right)]
        if unchanged or min(places[1:]) < max(places[0] if ranks is MAIL else 0, 0):
            return {} if unchanged else self._conflicting_status(left, right)
        chosen = ranks[max(places[1:])]
        if ranks is AGENT:
            self.told.append(f"status: {chosen}, although it was {left} and {right}")
        return {"status": chosen}

    def _conflicting_status(self, ours: Any, theirs: Any) -> Json:
        self.conflicts.append(f"status: {_short(ours)} against {_short(theirs)}")
        return {} if ours is MISSING else {"status": ours}


def _part(side: Json, names: Iterable[str]) -> Json:
    return {name: side[name] for name in names if name in side}


def _kept(chosen: Json, *others: Json) -> Json:
    """The chosen block; a field that only another side has is ``MISSING`` from it, and removed."""
    return {**dict.fromkeys((name for other in others for name in other), MISSING), **chosen}


def _short(value: Any) -> str:
    if value is MISSING:
        return "nothing"
    text = dump(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- lists that grow -----------------------------------------------------------------------------


def merge_histories(base: list[Any], ours: list[Any], theirs: list[Any]) -> list[Any] | None:
    """The base, then what both sides added, in the order of time; equal items once.

    None unless both sides go on from the base, or have cut off its end, as a revert does.
    """
    kept = _common(base, ours, theirs)
    if kept is None:
        return None
    left, right = ours[len(base) :], theirs[len(base) :]
    base = base[:kept]
    merged: list[Any] = []
    while left and right:
        if same(left[0], right[0]):
            merged.append(left.pop(0))
            right.pop(0)
            continue
        one, other = _time(left[0]), _time(right[0])
        merged.append((right if one and other and other < one else left).pop(0))
    rest = left or right
    seen = {dump(item) for item in merged}
    return [*base, *merged, *(item for item in rest if dump(item) not in seen)]


def merge_places(ours: Json, theirs: Json) -> Json | None:
    """Where a history is after both sides have added lines to its log: to the end of the log.

    None when one side has done something else.
    """
    left, right = ours.get("ranges"), theirs.get("ranges")
    names = ours.keys() | theirs.keys()
    if not left or not right or names - {"check"} != {"log", "ranges"}:
        return None
    if not same(ours["log"], theirs["log"]) or not same(left[:-1], right[:-1]):
        return None
    if not same(left[-1][0], right[-1][0]):
        return None
    return {"log": ours["log"], "ranges": [*left[:-1], left[-1][:1]]}


def _begun(path: str, base: bytes, ours: bytes, theirs: bytes) -> bytes:
    """The base of a log; of a history that both sides have begun, the lines that are the same."""
    folder, _, name = path.rpartition("/")
    if base.strip() or not name.startswith("history") or "agents" not in folder.split("/"):
        return base
    left, right = _lines(ours), _lines(theirs)
    while left[: len(right)] != right[: len(left)]:
        (left if len(left) > len(right) else right).pop()
    return b"".join(line + b"\n" for line in left[: len(right)])


def _common(base: list[Any], *sides: list[Any]) -> int | None:
    """How many items of the base are in both sides; None if one has others in their place."""
    counts = [min(len(side), len(base)) for side in sides]
    if all(same(side[:n], base[:n]) for side, n in zip(sides, counts, strict=True)):
        return min(counts)
    return None


def _time(item: Any) -> str:
    found = item.get("timestamp") if type(item) is dict else None
    return found if type(found) is str else ""


# -- logs ----------------------------------------------------------------------------------------


def merge_logs(base: bytes, ours: bytes, theirs: bytes) -> Outcome:
    """Our log, then the lines that theirs adds, numbered anew; a dedupe key counts once.

    What one side has cut off the end of the base, as a revert does, is gone. Raises
    ``UnmergeableError`` unless both go on from the rest of the base.
    """
    root, left, right = (_lines(data) for data in (base, ours, theirs))
    kept = _common(root, left, right)
    told = []
    if kept is None:
        # Branches that merged each other have the same lines in two orders.
        added = _without(root, right)
        if _without(root, left) is None or added is None:
            raise UnmergeableError("a line that both sides had was changed or removed")
        root, right = [], added
        told.append("their lines stand in another order, and ours was kept")
    elif kept < len(root):
        right = [*root[:kept], *left[len(root) :], *right[len(root) :]]
        left = root = root[:kept]
    known = {line["_dedupe"] for line in map(parse, left) if type(line.get("_dedupe")) is str}
    last = 0
    for number, line in enumerate(map(parse, left), 1):
        last = line["_seq"] if type(line.get("_seq")) is int else max(last + 1, number)
    written = list(left)
    again = 0
    for raw in right[len(root) :]:
        line = parse(raw)
        key = line.get("_dedupe")
        if type(key) is str:
            if key in known:
                again += 1
                continue
            known.add(key)
        last += 1
        written.append(write_line(line, last))
    if again:
        told.append(f"{again} lines were there already, by their dedupe key")
    return Outcome(b"".join(line + b"\n" for line in written), [], told)


def _without(root: list[bytes], side: list[bytes]) -> list[bytes] | None:
    """The lines that a side has besides those of the base, in any order; None if it lacks one."""
    counts: dict[str, int] = {}
    for raw in root:
        counts[_text(raw)] = counts.get(_text(raw), 0) + 1
    added = []
    for raw in side:
        text = _text(raw)
        if counts.get(text):
            counts[text] -= 1
        else:
            added.append(raw)
    return None if any(counts.values()) else added


def _text(raw: bytes) -> str:
    """What a line says, whatever its number is."""
    return dump({name: value for name, value in parse(raw).items() if name not in ("_crc", "_seq")})


def write_line(line: Mapping[str, Any], seq: int) -> bytes:
    """A line with this number, without its newline."""
    body = {name: value for name, value in line.items() if name not in LOG_RESERVED}
    text = dump(body).encode()
    crc = f"{crc32(text, crc32(b'%d:' % seq)):08x}"
    head: dict[str, Any] = {"_crc": crc}
    head.update({name: line[name] for name in ("_dedupe", "_id") if name in line})
    head["_seq"] = seq
    reserved = ",".join(f"{_quote(name)}:{dump(head[name])}" for name in head)
    return b"{" + reserved.encode() + (b"," + text[1:] if body else b"}")


def _lines(data: bytes) -> list[bytes]:
    # An editor, or ``core.autocrlf``, may have ended them in its way.
    return [line.removesuffix(b"\r") for line in data.split(b"\n") if line.strip()]
