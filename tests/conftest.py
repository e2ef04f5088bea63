"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# A deadline per example measures the machine's disk, not our laws; pytest-timeout guards the rest.
settings.register_profile("agent_state", deadline=None, print_blob=True)
settings.load_profile("agent_state")
