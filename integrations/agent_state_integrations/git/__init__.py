"""State in git: a merge driver, differences in words, snapshots of a running directory.

git's own command does the work (2.30 and newer; what needs a newer one says so).
``agent-state git`` is the way in; docs/git.md has the rules.
"""

from __future__ import annotations

from agent_state_integrations.git.configuration import check, configure, unconfigure
from agent_state_integrations.git.history import Story, blame, changes_between, story
from agent_state_integrations.git.merger import MergeReport, merge_revision, resolve_unmerged
from agent_state_integrations.git.repository import GitRepository
from agent_state_integrations.git.restoration import restore
from agent_state_integrations.git.snapshots import snapshot

__all__ = [
    "GitRepository",
    "MergeReport",
    "Story",
    "blame",
    "changes_between",
    "check",
    "configure",
    "merge_revision",
    "resolve_unmerged",
    "restore",
    "snapshot",
    "story",
    "unconfigure",
]
