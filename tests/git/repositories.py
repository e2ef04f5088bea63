"""A real git repository with a state directory in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CLEAN = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ann",
    "GIT_AUTHOR_EMAIL": "ann@example.org",
    "GIT_COMMITTER_NAME": "Ann",
    "GIT_COMMITTER_EMAIL": "ann@example.org",
    "GIT_EDITOR": "true",
    "LC_ALL": "C",
}
"""The environment of git in tests: nothing of the user's own configuration."""


class Repository:
    """A git repository; the state directory is ``state`` below its root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        root.mkdir(parents=True, exist_ok=True)
        if not (root / ".git").exists():
            self.git("init", "-q", "-b", "main")
        self.state.mkdir(exist_ok=True)

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run git, whatever its exit code is."""
        return subprocess.run(
            ["git", *args],
            cwd=self.root,
            env={**CLEAN, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def git(self, *args: str, **env: str) -> str:
        """What git printed; its exit code must be 0."""
        done = self.run(*args, **env)
        assert done.returncode == 0, f"git {args}: {done.stdout}{done.stderr}"
        return done.stdout

    def commit(self, message: str = "state") -> str:
        """Commit everything; the commit's id."""
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD").strip()

    @property
    def status(self) -> str:
        """What ``git status --porcelain`` says."""
        return self.git("status", "--porcelain", "--untracked-files=all")


def agent_state(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "agent_state", *args],
        cwd=folder,
        env={**CLEAN, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
