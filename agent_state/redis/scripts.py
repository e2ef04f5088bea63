"""The scripts that run inside Redis; their files, in ``lua/``, say what they take and give."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """The text, and the name under which a server remembers it."""

    text: str
    sha: str


def _script(name: str) -> Script:
    text = files("agent_state.redis").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


COMMIT = _script("commit")
LOCK = _script("lock")
KEEP_LOCK = _script("keep_lock")
OPEN = _script("open")
ERASE = _script("erase")
QUARANTINE = _script("quarantine")
