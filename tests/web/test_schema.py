"""schemathesis over the OpenAPI document, against a real server: no 5xx, nothing undocumented."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from agent_state import AsyncAgentSessionManager
from agent_state.web import LiveBackend
from tests.web.client import TOKEN, answering, working

pytestmark = pytest.mark.long("sends hundreds of generated requests")

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "ignored_auth",
    "negative_data_rejection",
)
LEFT_OUT = (
    "events",  # these two do not end
    "session_events",
    "ready",  # it says 503, since nobody is to wait for a task for longer than schemathesis does
)


@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
async def test_no_request_makes_the_server_fail_or_do_what_is_not_documented(
    tmp_path: Path, phase: str
) -> None:
    async with working(AsyncAgentSessionManager(tmp_path / "state")) as runtime:
        await runtime.agents.create("0", agent_type="worker")
        async with answering(LiveBackend(runtime=runtime)) as client:
            client.app.state.closing.set()
            run = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                str(client.base_url.join("/openapi.json")),
                f"--header=Authorization: Bearer {TOKEN}",
                f"--checks={','.join(CHECKS)}",
                f"--phases={phase}",
                *(f"--exclude-operation-id={name}" for name in LEFT_OUT),
                "--seed=5",
                "--max-examples=6",
                "--generation-database=none",
                "--no-color",
                cwd=tmp_path,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await run.communicate()

    assert run.returncode == 0, said.decode()
    selected, of = re.findall(r"Selected: (\d+)/(\d+)", said.decode())[0]
    assert int(selected) == int(of) - len(LEFT_OUT) > 50
