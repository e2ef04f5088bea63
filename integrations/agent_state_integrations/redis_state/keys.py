"""The Redis keys.

    {prefix}session:<session id>
    {prefix}execution:<execution id>
    {prefix}history:<session id>:<flow id>
    {prefix}meta:server_id               the user of this prefix, if it is checked
    {prefix}lease:<one of the above>     coaia tools only: a later expiry than the value's own
    {prefix}index                        coaia tools only: the names of the instances
    {prefix}index:<instance>             coaia tools only: the keys which that instance wrote

The prefix is ``agentic_flywheel:`` or one for each deployment, ``agentic_flywheel:prod:``.
"""

from __future__ import annotations

import re

from agent_state.errors import InvalidKeyError, StateValidationError
from agent_state.redis.keys import escape_glob as escape_glob

DEFAULT_PREFIX = "agentic_flywheel:"
MAX_ID_BYTES = 4096

_SHAPES = frozenset({"session", "execution", "history", "meta", "lease", "index"})


class Keys:
    """The keys below one prefix. A prefix without a colon at its end gets one.

    Raises ``StateValidationError`` for a prefix that is empty, or that has a part such as
    ``session``: its keys would be another prefix's sessions.
    """

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        if not isinstance(prefix, str):
            raise TypeError(f"a key prefix is text, not {type(prefix).__name__}")
        self.prefix = prefix if prefix.endswith(":") else f"{prefix}:"
        parts = set(self.prefix.split(":"))
        if not prefix.strip(":") or _SHAPES & parts:
            words = ", ".join(sorted(_SHAPES))
            raise StateValidationError(
                f"the key prefix {prefix!r} must not be empty, nor have a part named {words}"
            )
        checked("prefix", self.prefix)
        self.sessions = f"{self.prefix}session:"
        self.server_id = f"{self.prefix}meta:server_id"
        self.index = f"{self.prefix}index"

    def session(self, session_id: str) -> str:
        return self.sessions + checked("session", session_id)

    def execution(self, execution_id: str) -> str:
        return f"{self.prefix}execution:{checked('execution', execution_id)}"

    def history(self, session_id: str, flow_id: str) -> str:
        """Colons in the session's id are escaped, so that no two pairs share a key."""
        checked("session", session_id)
        checked("flow", flow_id)
        session_id = session_id.replace("%", "%25").replace(":", "%3A")
        return f"{self.prefix}history:{session_id}:{flow_id}"

    def lease(self, key: str) -> str:
        return f"{self.prefix}lease:{key.removeprefix(self.prefix)}"

    def index_of(self, instance: str) -> str:
        return f"{self.index}:{instance}"


def checked(kind: str, name: str) -> str:
    """The id as it is. Raises ``InvalidKeyError``, and ``TypeError`` when it is not text."""
    if not isinstance(name, str):
        raise TypeError(f"the id of a {kind} is text, not {type(name).__name__}")
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidKeyError(f"the id is not valid Unicode: {name!r}", kind=kind) from error
    if not 0 < length <= MAX_ID_BYTES:
        raise InvalidKeyError(
            f"an id has 1 to {MAX_ID_BYTES} bytes, this one has {length}", kind=kind
        )
    return name


_GLOB = re.compile(
    r"\\(?P<plain>.)|(?P<any>\*+)|(?P<one>\?)|\[(?P<not>\^?)(?P<set>(?:\\.|[^\]\\])*)(?:\]|\Z)|(?P<other>.)",
    re.DOTALL,
)


def glob(pattern: str) -> re.Pattern[str]:
    r"""Redis's patterns (``SCAN``) for complete ids: ``*``, ``?``, ``[a-z]``, ``[^a]``, ``\``.

    The same for both transports, since the coaia tools cannot match anything.
    """
    return re.compile("".join(map(_piece, _GLOB.finditer(pattern))) + r"\Z", re.DOTALL)


def _piece(match: re.Match[str]) -> str:
    if match["any"]:
        return ".*"
    if match["one"]:
        return "."
    if match["set"] is not None:
        return _choice(match["set"], negated=bool(match["not"]))
    return re.escape(match["plain"] or match["other"])


def _choice(members: str, *, negated: bool) -> str:
    choices = []
    for plain, low, high, single in re.findall(r"\\(.)|(.)-(.)|(.)", members, re.DOTALL):
        if low:
            first, last = sorted((low, high))  # as Redis does
            choices.append(f"{re.escape(first)}-{re.escape(last)}")
        else:
            choices.append(re.escape(plain or single))
    if not choices:
        return "." if negated else r"[^\s\S]"
    return f"[{'^' if negated else ''}{''.join(choices)}]"
