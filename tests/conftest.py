"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# Tests that run beside each other are told of a terminal that nobody watches.
os.environ.pop("COLUMNS", None)

# A deadline per example measures the machine's disk, not our laws; pytest-timeout guards the rest.
settings.register_profile("agent_state", deadline=None, print_blob=True)
settings.load_profile("agent_state")
