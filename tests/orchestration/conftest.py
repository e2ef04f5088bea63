"""The fixtures of sessions, for orchestration too."""

from tests.sessions.conftest import clock, files

__all__ = ["clock", "files"]
