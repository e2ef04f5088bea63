"""The fixtures of sessions, for journeys too."""

from tests.sessions.conftest import clock, files

__all__ = ["clock", "files"]
