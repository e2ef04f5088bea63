"""The process in which the team lives, and which gets killed.

Started as ``python -m agent_state_integrations.demo.server``. What it has stored it tells on
stdout, one JSON object a line. It ends when the report is written, or when its parent is gone.
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


def tell(event: str, **facts: object) -> None:
    """One line for the parent, written at once."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


async def serve(job: team.Job, tell: team.Tell = tell) -> None:
    """Restore, work until the report is written, and close in good order."""
    runtime = AsyncAgentSessionManager(job.state)
    team.assemble(runtime, job, tell)
    async with runtime:
        tell("restored", report=runtime.report.to_dict() if runtime.report else {})
        last = await team.set_up(runtime)
        await runtime.tasks.result(last)
        await runtime.wait_idle()
    tell("done")


def _end_with_parent() -> None:
    """A server that nobody watches any more must not work on for ever."""
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
