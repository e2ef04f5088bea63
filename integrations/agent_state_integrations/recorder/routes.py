"""The route of the recorder: what is counted in the log that the served directory has."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from agent_state.errors import needs_extra
from agent_state.web.auth import operator
from agent_state.web.backend import BackendDep
from agent_state.web.operations import OperationRouter
from agent_state.web.problems import Problem
from agent_state_integrations.recorder.analytics.analysis import analyse
from agent_state_integrations.recorder.analytics.score import ScoreName
from agent_state_integrations.recorder.reader import recording_at, sources

with needs_extra("server", "fastapi"):
    from fastapi import Depends, Query, Request

router = OperationRouter(
    "/api/recorder",
    "recorder",
    access=operator,
    about="Who said what about what, and what it took.",
)

Counts = Annotated[dict[str, int], Field(description="The largest first.")]

# -- answers -----------------------------------------------------------------------------------


class TokenCounts(BaseModel):
    """Tokens of each kind."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int


class TokenUse(BaseModel):
    """Tokens in all, and by day (UTC), agent and model."""

    total: TokenCounts
    by_day: dict[str, TokenCounts]
    by_agent: dict[str, TokenCounts]
    by_model: dict[str, TokenCounts]


class RecordedContexts(BaseModel):
    """The contexts of messages, and the largest of them with their messages."""

    session_count: int
    messages_by_session: Counts


class PointsOfScore(BaseModel):
    """One part of a score, and why."""

    name: str
    points: float
    most: float
    reason: str


class ReportedScore(BaseModel):
    """A score from 0 to 100, what it cannot say, and its parts."""

    name: ScoreName
    value: float | None
    limits: str
    parts: list[PointsOfScore]


class LinesLeftOut(BaseModel):
    """How many lines are no messages, and why."""

    count: int
    reasons: Counts


class LogReport(BaseModel):
    """What is counted in a log. The names are those of ``agent-state analytics --json``."""

    timestamp: str = Field(description="When it was counted.")
    total_messages: int
    distinct_messages: int
    distinct_is_estimate: bool
    repeated_messages: int
    empty_messages: int
    enriched_messages: int = Field(description="Messages that the rules had to enrich for this.")
    copies_left_out: int
    rules: str
    speakers: Counts
    message_types: Counts
    chain_types: Counts
    ace_tiers: Counts
    keywords: list[tuple[str, int]] = Field(description="The most frequent first.")
    timeline: dict[str, int] = Field(description="Messages by day (UTC), the oldest first.")
    sessions: RecordedContexts
    tokens: TokenUse
    score: ReportedScore
    skipped_lines: LinesLeftOut


# -- the report --------------------------------------------------------------------------------

_Files = tuple[tuple[str, int, int, int], ...]


class LogReports:
    """The latest report of each score; a log that has not changed is not read again."""

    def __init__(self) -> None:
        self._reading = asyncio.Lock()
        self._known: dict[tuple[Path, ScoreName], tuple[_Files, LogReport]] = {}

    async def of(self, state_dir: Path, score: ScoreName) -> LogReport:
        """The report of what a directory has recorded; one log is read at a time.

        Raises ``Problem`` (404) if nothing was recorded there, and as ``analyse``.
        """
        async with self._reading:
            files = await asyncio.to_thread(_files_in, state_dir)
            known = self._known.get((state_dir, score))
            if known is not None and known[0] == files:
                return known[1]
            report = await asyncio.to_thread(_report, state_dir, score)
            self._known[state_dir, score] = files, report
            return report


def _files_in(state_dir: Path) -> _Files:
    """The files of the recording, as they were before it is read."""
    if recording_at(state_dir) is None:
        raise _nothing()
    found = []
    with sources(state_dir) as files:
        for source in files:
            try:
                stat = source.path.stat()
            except FileNotFoundError:  # moved since; the next request sees where it is
                continue
            found.append((str(source.path), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _report(state_dir: Path, score: ScoreName) -> LogReport:
    made: dict[str, Any] = analyse(state_dir, score_name=score).report()
    return LogReport.model_validate(made)


def _nothing() -> Problem:
    return Problem(404, "not_found", "Nothing has been recorded here.")


async def _log_reports(request: Request) -> LogReports:
    state = request.app.state
    if not hasattr(state, "log_reports"):
        state.log_reports = LogReports()
    found: LogReports = state.log_reports
    return found


@router.operation("GET", "/analytics", errors=[401, 403, 404, 422, 503])
async def get_log_report(
    *,
    backend: BackendDep,
    reports: Annotated[LogReports, Depends(_log_reports)],
    score: Annotated[ScoreName, Query(description="A score to add.")] = "none",
) -> LogReport:
    """What is counted in the messages that this directory recorded.

    The log is read when it has changed since the last report.
    """
    async with backend.view() as view:
        origin = await view.manager.store.origin()
    if origin.state_dir is None:
        raise _nothing()
    return await reports.of(Path(origin.state_dir), score)
