"""The directory and the way to call that the tests of the command line have."""

from __future__ import annotations

from tests.cli.conftest import call, damaged, state

__all__ = ["call", "damaged", "state"]
