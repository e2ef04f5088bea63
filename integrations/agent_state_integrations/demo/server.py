"""The process that runs the team, and that is killed.

It is started as ``python -m agent_state_integrations.demo.server``, and reports on stdout what it
has stored, one JSON object a line. It ends once the report is written, or without its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from pathlib import Path

from agent_state.runtime import AsyncAgentSessionManager
from agent_state_integrations.demo import team


def notify_parent(event: str, **facts: object) -> None:
    """Write one line for the parent, at once."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


async def serve(job: team.Job, notify: team.Notify = notify_parent) -> None:
    """Restore, work until the report is written, and close."""
    runtime = AsyncAgentSessionManager(job.state)
    team.register_handlers(runtime, job, notify)
    async with runtime:
        notify("restored", report=runtime.report.to_dict() if runtime.report else {})
        last = await team.set_up(runtime)
        await runtime.tasks.result(last)
        await runtime.wait_idle()
    notify("done")


def _end_with_parent() -> None:
    """End this process once its parent has ended."""
    while os.read(0, 1024):
        pass
    os._exit(3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m agent_state_integrations.demo.server")
    for name in ("folder", "state", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--pause", type=float, required=True)
    job = team.Job(**vars(parser.parse_args()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(serve(job))


if __name__ == "__main__":
    main()
