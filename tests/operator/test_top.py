"""``agent-state top``: who works, who waits, and how fast, on a terminal that is drawn again."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

from agent_state import StatePersistenceManager
from agent_state.cli.overview import AgentOverview
from agent_state_integrations.operator.top import Rates, order
from tests.cli.commands import Call, assert_one_line_of_error
from tests.deadlines import SECONDS, until_in_thread


def agent(name: str, **tasks: int) -> AgentOverview:
    return AgentOverview(name, stored=True, tasks=tasks)


def test_who_works_comes_first_then_whose_task_waits_longest() -> None:
    waits, longer = agent("a", pending=1), agent("b", failed=1)
    waits.oldest_due, longer.oldest_due = "2026-12-01T10:00:00Z", "2026-11-01T10:00:00Z"
    dead, works, idle = agent("c", dead=1), agent("z", in_progress=1), agent("0")
    found = order([idle, dead, waits, longer, works])
    assert [one.agent_id for one in found] == ["z", "b", "a", "c", "0"]


def test_the_rate_counts_from_the_first_look_and_anew_after_an_archive() -> None:
    rates = Rates()
    assert rates.look([agent("a", completed=10)], 100.0) == {}
    assert rates.look([agent("a", completed=13), agent("b")], 130.0) == {"a": 6.0}
    assert rates.look([agent("a", completed=2), agent("b", completed=1)], 160.0) == {"b": 2.0}
    assert rates.look([agent("a", completed=3), agent("b", completed=1)], 190.0) == {
        "a": 2.0,
        "b": 1.0,
    }


def test_once_draws_every_agent(state: Path, call: Call) -> None:
    done = call("top", "--once", "--state", state)
    assert done.code == 0
    for text in ("alice", "Bob", "no server owns it"):
        assert text in done.out


def test_json_has_the_agents_of_the_table(state: Path, call: Call) -> None:
    done = call("top", "--json", "--state", state)
    assert {agent["agent_id"] for agent in done.json()["agents"]} == {"alice", "Bob"}


def test_a_directory_that_is_missing_is_an_error_in_one_line(tmp_path: Path, call: Call) -> None:
    done = call("top", "--once", "--state", tmp_path / "none")
    assert_one_line_of_error(done)
    assert "there is no such state directory" in done.err
    assert not (tmp_path / "none").exists()


async def test_it_is_drawn_again_while_things_change(state: Path) -> None:
    leader, follower = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "agent_state", "top", "--every", "0.1s", "--state", str(state)],
        stdout=follower,
        stderr=follower,
        env={**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm"},
    )
    os.close(follower)
    drawn = bytearray()

    def shows(text: bytes) -> bool:
        while select.select([leader], [], [], 0.05)[0]:
            drawn.extend(os.read(leader, 65536))
        return text in drawn

    try:
        until_in_thread(lambda: shows(b"alice"))
        async with StatePersistenceManager(state) as manager:
            await manager.save_agent_state("zoe", {"agent_id": "zoe", "agent_type": "writer"})
        until_in_thread(lambda: shows(b"writer"))
        program.send_signal(signal.SIGINT)
        until_in_thread(lambda: shows(b"\x1b[?1049l"))  # the screen of before is back
        assert program.wait(SECONDS) == 0
    finally:
        program.kill()
        program.wait()
        os.close(leader)
