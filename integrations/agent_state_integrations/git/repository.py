"""The git repository around a state directory, by git's own command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from agent_state.errors import AgentStateError
from agent_state.storage import worktree

OLDEST = (2, 30)
TOO_OLD = "git {0}.{1} is too old for this; it needs {2}.{3}"


class GitError(AgentStateError):
    """git refused; ``code`` is its exit code, and the message what it printed."""

    def __init__(self, message: str, *, code: int = 1, path: str | None = None) -> None:
        self.code = code
        super().__init__(message, path=path)


class Entry(NamedTuple):
    """One file in a tree or an index."""

    mode: str
    oid: str
    stage: int = 0


class GitRepository:
    """The repository of a state directory. Methods block, and raise ``GitError``."""

    def __init__(self, state: str | os.PathLike[str]) -> None:
        self.state = Path(state).absolute()
        """The state directory."""
        if shutil.which("git") is None:
            raise GitError("git is not installed", path=str(self.state))
        folder = self.state
        while not folder.is_dir():
            folder = folder.parent
        self._folder = folder
        self.env = {
            **{name: value for name, value in os.environ.items() if name not in _LOCAL},
            "GIT_OPTIONAL_LOCKS": "0",
            "LC_ALL": "C",
        }
        try:
            found = self.run("rev-parse", "--absolute-git-dir", "--show-toplevel")
        except GitError as error:
            what = f"{self.state} is in no git worktree: {error.message}"
            raise GitError(what, code=error.code) from error
        own, top = map(os.fsdecode, found.removesuffix(b"\n").split(b"\n", 1))
        self.top = Path(top)
        """The top of the worktree."""
        self.own_folder = Path(own)
        """What the repository keeps for this worktree alone: its index, what it has in work."""
        self._folder = self.top
        prefix = os.path.relpath(self.state.resolve(), self.top.resolve())
        self.prefix = "" if prefix == "." else f"{prefix}/"
        """The state directory's path in the tree, with a slash at its end; empty for the top."""

    # -- running git -------------------------------------------------------------------------

    def run(
        self, *args: str, data: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> bytes:
        """What git prints. Raises ``GitError`` for any exit code but 0."""
        done = self.attempt(*args, data=data, env=env)
        if done.returncode != 0:
            said = _reason(done.stderr or done.stdout)
            raise GitError(f"git {_command(args)}: {said or 'failed'}", code=done.returncode)
        return done.stdout

    def attempt(
        self, *args: str, data: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run git, whatever its exit code is."""
        # A name is a name, whatever it begins with; a hook of the user's gets no such setting.
        literal = ["--literal-pathspecs"] if "--" in args else []
        return subprocess.run(  # noqa: S603  # git, with arguments of ours
            ["git", "-C", str(self._folder), *literal, *args],  # noqa: S607
            input=data,
            env={**self.env, **(env or {})},
            capture_output=True,
            check=False,
        )

    def line(self, *args: str) -> str:
        """The one line that git prints."""
        return self.run(*args).decode(errors="replace").strip()

    @cached_property
    def version(self) -> tuple[int, int]:
        """Git's version, such as (2, 39)."""
        found = re.search(r"(\d+)\.(\d+)", self.line("version"))
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def commit_tree(self, tree: str, parents: Iterable[str], message: str, *, sign: bool) -> str:
        """Make a commit. ``sign``: if the user's commits are signed, as `git commit` does."""
        named = [option for parent in parents for option in ("-p", parent)]
        configured = self.attempt("config", "--type=bool", "commit.gpgSign").stdout.strip()
        signed = ["-S"] if sign and configured == b"true" else []
        return self.line("commit-tree", *signed, tree, *named, "-m", message)

    def require(self, major: int, minor: int) -> None:
        """Raises ``GitError`` for an older git."""
        if self.version < (major, minor):
            raise GitError(TOO_OLD.format(*self.version, major, minor))

    # -- where things are --------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A file in the repository's own folder, such as ``MERGE_HEAD``."""
        return self.top / self.line("rev-parse", "--git-path", name)

    @property
    def operation(self) -> str | None:
        """What the worktree is in the midst of, such as ``a merge``; None for nothing."""
        return worktree.find_operation(str(self.own_folder))

    def wait_for_index(self) -> None:
        """Wait for another git command that has the index. Raises ``GitError`` if it keeps it."""
        lock, until = self.own_folder / "index.lock", time.monotonic() + _BUSY_SECONDS
        while lock.exists():
            if time.monotonic() > until:
                raise GitError(f"another git command has the index, or has left {lock}")
            time.sleep(0.05)

    def commit(self, revision: str) -> str:
        """The id of a commit. Raises ``GitError`` for an unknown one."""
        named = ("rev-parse", "-q", "--verify", "--end-of-options", f"{revision}^{{commit}}")
        done = self.attempt(*named)
        if done.returncode:
            raise GitError(f"{revision} is no commit {_reason(done.stderr)}".rstrip())
        return done.stdout.decode().strip()

    def below(self, path: str) -> str | None:
        """A path in the tree as a path in the state directory; None for one outside."""
        below = path.removeprefix(self.prefix)
        if not path.startswith(self.prefix) or below.startswith("."):
            return None
        return below if below.endswith((".json", ".jsonl")) else None

    def note(self, path: str) -> Path:
        """The note about a conflict of a path in the tree, as the merge driver writes it."""
        name = path.replace("%", "%25").replace("/", "%2f")
        return self.state / ".runtime" / "conflicts" / name

    def quote(self, path: str) -> bytes:
        """A path of the state directory as ``git fast-import`` reads it."""
        raw = os.fsencode(self.prefix + path)
        for char, escape in ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n")):
            raw = raw.replace(char, escape)
        return b'"%b"' % raw

    # -- contents ----------------------------------------------------------------------------

    def tree(self, revision: str, below: str = "") -> dict[str, Entry]:
        """The state's documents and logs in a revision, by their paths in the state directory."""
        listed = self.run(
            "ls-tree", "-r", "-z", "--full-tree", revision, "--", f"{self.prefix}{below}" or "."
        )
        found = {}
        for line in listed.split(b"\0")[:-1]:
            head, _, name = line.partition(b"\t")
            mode, _, oid = head.decode().split(" ")
            if (path := self.below(os.fsdecode(name))) is not None and mode.startswith("100"):
                found[path] = Entry(mode, oid)  # no symlink
        return found

    def unmerged(self) -> dict[str, dict[int, Entry]]:
        """Every unmerged path of the worktree, with what the index has of it, by stage."""
        found: dict[str, dict[int, Entry]] = {}
        for line in self.run("ls-files", "-u", "-z").split(b"\0")[:-1]:
            head, _, name = line.partition(b"\t")
            mode, oid, stage = head.decode().split(" ")
            found.setdefault(os.fsdecode(name), {})[int(stage)] = Entry(mode, oid, int(stage))
        return found

    def blobs(self, oids: Iterable[str]) -> dict[str, bytes]:
        """The contents of many blobs, in one process."""
        wanted = sorted(set(oids))
        if not wanted:
            return {}
        data = self.run("cat-file", "--batch", data="".join(f"{oid}\n" for oid in wanted).encode())
        return dict(_split_blobs(data))

    def show(self, revision: str, path: str) -> bytes | None:
        """A file of the state in a revision; None if it is not there."""
        done = self.attempt("cat-file", "blob", f"{revision}:{self.prefix}{path}")
        return done.stdout if done.returncode == 0 else None


def _command(args: Sequence[str]) -> str:
    """The command among git's arguments."""
    at = 0
    while args[at] == "-c":
        at += 2
    return args[at]


def _reason(said: bytes) -> str:
    """Why git refused, in one line: it adds advice, and the paths that it is about."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("fatal: ", "error: "))]
    return "; ".join(named or lines)


def _split_blobs(data: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        oid, kind, *size = data[at:end].decode().split(" ")
        if kind != "blob":
            raise GitError(f"{oid} is {kind}")
        start = end + 1
        at = start + int(size[0])
        yield oid, data[start:at]
        at += 1


_BUSY_SECONDS = 10.0
_LOCAL = frozenset(
    {
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_PREFIX",
        "GIT_COMMON_DIR",
        "GIT_OBJECT_DIRECTORY",
        "GIT_NAMESPACE",
        "GIT_LITERAL_PATHSPECS",
        "GIT_GLOB_PATHSPECS",
    }
)
"""What a hook inherits, and what would lead git elsewhere; the author stays."""
