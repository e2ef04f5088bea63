"""Analytics again and again: alerts, old reports, and the timer of systemd.

An alert says that a score fell below a limit. It runs a command, which gets the report as JSON on
its standard input, or posts that JSON to a URL.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path

import orjson

from agent_state.errors import AgentStateError, QueryError, storage_error
from agent_state_integrations.recorder.analytics.analysis import LogAnalysis

_SPAN = re.compile(r"(\d{1,6})\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_REPORT = re.compile(r"analytics_report_(\d{8}_\d{6})(?:_\d+)?\.(?:json|md|html)")
_TIMEOUT = 30.0
SERVICE, TIMER = "agent-state-analytics.service", "agent-state-analytics.timer"


class AlertFailedError(AgentStateError):
    """An alert could not be given."""


def span(text: str) -> timedelta:
    """The time that ``30s``, ``15m``, ``6h``, ``2d`` or ``1w`` is. Raises ``QueryError``."""
    found = _SPAN.fullmatch(text.strip())
    if found is None or int(found[1]) == 0:
        raise QueryError(f"{text!r:.40} is not a time; write 15m, 6h, 2d or 1w")
    return timedelta(seconds=int(found[1]) * _SECONDS[found[2]])


@dataclass(frozen=True, slots=True)
class ScoreAlert:
    """Where to say that a score is below ``below``. Without command and URL it is only printed."""

    below: float
    command: str | None = None
    webhook: str | None = None

    def is_due(self, analysis: LogAnalysis) -> bool:
        """Whether there is a score, and it is below the limit."""
        return analysis.score.value is not None and analysis.score.value < self.below

    def give(self, analysis: LogAnalysis) -> None:
        """Give the alert. Raises ``AlertFailedError``."""
        body = orjson.dumps({"alert": {"below": self.below}, **analysis.report()})
        if self.command is not None:
            self._run(self.command, body)
        if self.webhook is not None:
            self._post(self.webhook, body)

    def _run(self, command: str, body: bytes) -> None:
        try:
            subprocess.run(  # noqa: S603  # the command is the user's own
                shlex.split(command), input=body, check=True, timeout=_TIMEOUT
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise AlertFailedError(f"the alert's command failed: {error}") from error

    def _post(self, url: str, body: bytes) -> None:
        if not url.startswith(("http://", "https://")):
            raise AlertFailedError(f"{url!r:.80} is no http or https URL")
        try:
            request = urllib.request.Request(  # noqa: S310  # http or https, see above
                url, body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=_TIMEOUT):  # noqa: S310
                return
        except (OSError, HTTPException, ValueError) as error:
            raise AlertFailedError(f"the alert could not be posted: {error}") from error


def prune(folder: Path, older_than: timedelta, now: datetime) -> list[Path]:
    """Remove the reports in a folder that were made before; their names have the time.

    Other files stay. Returns what was removed. Raises ``StorageError``.
    """
    gone = []
    try:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            found = _REPORT.fullmatch(path.name)
            if found is None:
                continue
            try:
                made = datetime.strptime(found[1], "%Y%m%d_%H%M%S").replace(tzinfo=UTC)
            except ValueError:
                continue  # a name like ours, with digits that are no time
            if now - made > older_than:
                path.unlink(missing_ok=True)
                gone.append(path)
    except OSError as error:
        raise storage_error(error, "removing old reports", path=folder) from error
    return gone


def repeat(work: Callable[[], None], every: timedelta, wait: Callable[[float], bool]) -> None:
    """Do the work until ``wait``, which gets the seconds until the next time, returns True."""
    while True:
        work()
        if wait(min(every.total_seconds(), threading.TIMEOUT_MAX)):
            return


def install(arguments: Sequence[str], every: timedelta, folder: Path, work_in: Path) -> list[Path]:
    """Write the service and the timer of systemd that run analytics with these arguments.

    Files that are there are replaced. Nothing is started. Raises ``StorageError``.
    """
    command = [sys.executable, "-m", "agent_state", "analytics", *arguments]
    texts = {
        SERVICE: (
            "[Unit]\nDescription=Analytics of agent_state\n\n[Service]\nType=oneshot\n"
            f"WorkingDirectory={_escaped(str(work_in))}\n"
            f"ExecStart={' '.join(map(_quoted, command))}\n"
        ),
        TIMER: (
            f"[Unit]\nDescription=Analytics of agent_state\n\n[Timer]\nOnStartupSec=1min\n"
            f"OnUnitActiveSec={round(every.total_seconds())}s\n\n[Install]\nWantedBy=timers.target\n"
        ),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise storage_error(error, "writing a timer", path=folder) from error
    return [folder / name for name in texts]


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """A word of a command as systemd reads it."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"' if not word or re.search(r"[^\w@%+=:,./-]", word) else escaped
