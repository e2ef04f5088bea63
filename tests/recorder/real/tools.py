"""The tools of agents that npm has, at fixed versions, and what each is asked to do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SESSION = "5b0c2f7e-1111-4222-8333-9a4d5e6f7a01"
ASKED = ("Where is the lighthouse?", "RUN echo a lamp AND ls /nowhere", "FAIL", "ASK Is it open?")
"""A question, two commands of which one fails, a request that is refused, a sub-agent."""
_SECONDS = 120


@dataclass(frozen=True)
class RealTool:
    """One tool: its package, what it needs to find the server, and its runs."""

    name: str
    package: str
    version: str
    program: str
    runs: tuple[tuple[str, ...], ...]
    """The arguments of each run. ``{last}`` is the id of the newest session."""
    written: str
    """Where the sessions are, below its home."""
    variables: Callable[[str], dict[str, str]] = lambda _: {}
    settings: Callable[[str], dict[str, str]] = lambda _: {}
    """Files below its home that are there before the first run."""
    newest: Callable[[Path], str] = lambda _: ""
    saved: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Files that the output of a last run goes to."""

    def drive(self, packages: Path, home: Path, url: str) -> None:
        """Do all runs, one after another, in a home of its own."""
        work = home / "work"
        work.mkdir(parents=True)
        for name, text in self.settings(url).items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
        variables = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", "TZ": "UTC"}
        variables |= self.variables(url)
        program = str(packages / "node_modules" / ".bin" / self.program)
        for run in self.runs:
            last = self.newest(home)
            self._run([program, *(each.replace("{last}", last) for each in run)], work, variables)
        for name, run in self.saved.items():
            last = self.newest(home)
            arguments = [each.replace("{last}", last) for each in run]
            (home / name).write_bytes(self._run([program, *arguments], work, variables))

    def _run(self, command: list[str], work: Path, variables: dict[str, str]) -> bytes:
        done = subprocess.run(
            command,
            cwd=work,
            env=variables,
            input=b"",
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        (work.parent / "output.log").open("ab").write(
            b"%r\n%b%b\n" % (command, done.stdout, done.stderr)
        )
        return done.stdout


def _session_in_name(pattern: str) -> Callable[[Path], str]:
    def newest(home: Path) -> str:
        found = sorted(home.glob(pattern), key=lambda path: path.stat().st_mtime)
        return found[-1].stem[-36:] if found else ""

    return newest


def _opencode_session(home: Path) -> str:
    import sqlite3

    path = home / ".local/share/opencode/opencode.db"
    if not path.exists():
        return ""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
        asked = "select id from session where parent_id is null order by time_created limit 1"
        return str(base.execute(asked).fetchone()[0])


_CLAUDE = ("--model", "claude-sonnet-4-5", "--allowedTools", "Bash Agent")
_CODEX = ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
_GEMINI = ("-m", "gemini-2.5-flash", "--yolo")
_QWEN = ("--auth-type", "openai", "--yolo")
_PI = ("-p", "--provider", "local", "--model", "m1")

CLAUDE_CODE = RealTool(
    name="claude-code",
    package="@anthropic-ai/claude-code",
    version="2.1.332",
    program="claude",
    written=".claude/projects",
    variables=lambda url: {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    },
    runs=(
        ("-p", ASKED[0], "--session-id", SESSION, *_CLAUDE),
        *(("-p", asked, "--resume", SESSION, *_CLAUDE) for asked in ASKED[1:]),
        ("-p", "RUN seq 1 30000", "--resume", SESSION, *_CLAUDE),
        ("-p", "BUSY one", "--resume", SESSION, *_CLAUDE),
        ("-p", "ASK Look later.", "--resume", SESSION, *_CLAUDE),
        ("-p", "/cost", "--resume", SESSION, *_CLAUDE),
        ("-p", "And the door?", "--resume", SESSION, "--fork-session", *_CLAUDE),
        ("-p", "/compact", "--resume", SESSION, *_CLAUDE),
        ("-p", "Go on.", "--resume", SESSION, *_CLAUDE),
    ),
)

CODEX = RealTool(
    name="codex",
    package="@openai/codex",
    version="0.171.0",
    program="codex",
    written=".codex/sessions",
    newest=_session_in_name(".codex/sessions/*/*/*/*.jsonl"),
    variables=lambda _: {"LOCAL_KEY": "none"},
    settings=lambda url: {
        ".codex/config.toml": f"""
model = "gpt-5-codex"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "LOCAL_KEY"
request_max_retries = 1
stream_max_retries = 1
"""
    },
    runs=(
        (*_CODEX, ASKED[0]),
        *((*_CODEX, "resume", "--last", asked) for asked in ASKED[1:3]),
        (*_CODEX, "fork", "{last}", "And the door?"),
        (*_CODEX, ASKED[3]),
    ),
)

GEMINI = RealTool(
    name="gemini",
    package="@google/gemini-cli",
    version="0.61.0",
    program="gemini",
    written=".gemini/tmp",
    variables=lambda url: {
        "GEMINI_API_KEY": "none",
        "GOOGLE_GEMINI_BASE_URL": url,
        "GEMINI_CLI_TRUST_WORKSPACE": "true",
    },
    settings=lambda _: {
        ".gemini/settings.json": json.dumps(
            {
                "security": {"auth": {"selectedType": "gemini-api-key"}},
                "privacy": {"usageStatisticsEnabled": False},
                "general": {"disableAutoUpdate": True},
            }
        )
    },
    runs=(
        # A new session after one that was resumed would delete it.
        ("-p", ASKED[3], *_GEMINI),
        ("-p", ASKED[0], *_GEMINI),
        *(("-p", asked, *_GEMINI, "--resume", "latest") for asked in ASKED[1:3]),
    ),
)

QWEN = RealTool(
    name="qwen",
    package="@qwen-code/qwen-code",
    version="0.24.4",
    program="qwen",
    written=".qwen/projects",
    variables=lambda url: {
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_MODEL": "qwen3-coder",
    },
    runs=(
        ("-p", ASKED[0], *_QWEN),
        *(("-p", asked, *_QWEN, "--continue") for asked in ASKED[1:3]),
        ("-p", "And the door?", *_QWEN, "--continue", "--fork-session"),
        ("-p", ASKED[3], *_QWEN),
    ),
)

OPENCODE = RealTool(
    name="opencode",
    package="opencode-ai",
    version="1.18.33",
    program="opencode",
    written=".local/share/opencode",
    newest=_opencode_session,
    settings=lambda url: {
        ".config/opencode/opencode.json": json.dumps(
            {
                "autoupdate": False,
                "share": "disabled",
                "model": "local/m1",
                "small_model": "local/m1",
                "provider": {
                    "local": {
                        "npm": "@ai-sdk/openai-compatible",
                        "name": "local",
                        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
                        "models": {"m1": {"name": "m1", "tool_call": True}},
                    }
                },
            }
        )
    },
    runs=(
        ("run", ASKED[0]),
        *(("run", "--continue", asked) for asked in ASKED[1:]),
        ("run", "--session", "{last}", "--fork", "Door?"),
    ),
    saved={"exported.json": ("export", "{last}")},
)

PI = RealTool(
    name="pi",
    package="@mariozechner/pi-coding-agent",
    version="0.73.1",
    program="pi",
    written=".pi/agent/sessions",
    newest=_session_in_name(".pi/agent/sessions/*/*.jsonl"),
    variables=lambda _: {"PI_OFFLINE": "1", "PI_TELEMETRY": "0"},
    settings=lambda url: {
        ".pi/agent/models.json": json.dumps(
            {
                "providers": {
                    "local": {
                        "baseUrl": f"{url}/v1",
                        "apiKey": "none",
                        "api": "openai-completions",
                        "models": [
                            {
                                "id": "m1",
                                "name": "m1",
                                "reasoning": False,
                                "input": ["text"],
                                "contextWindow": 100000,
                                "maxTokens": 8000,
                                "cost": dict.fromkeys(
                                    ("input", "output", "cacheRead", "cacheWrite"), 1
                                ),
                            }
                        ],
                    }
                }
            }
        )
    },
    runs=(
        (*_PI, ASKED[0]),
        *((*_PI, "--continue", asked) for asked in ASKED[1:3]),
        (*_PI, "--fork", "{last}", "And the door?"),
    ),
)

TOOLS = (CLAUDE_CODE, CODEX, GEMINI, QWEN, OPENCODE, PI)
