"""The report of a recorded log over HTTP, as a page with charts needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.web import LiveBackend, ReadOnlyBackend
from agent_state_integrations.recorder import Recorder
from agent_state_integrations.recorder.analytics.analysis import analyse
from tests.web.client import answering

PATH = "/api/recorder/analytics"


def _said(number: int, **more: Any) -> dict[str, Any]:
    return {"message_id": f"m{number}", "sender_id": "ann", "content": f"message {number}", **more}


async def test_the_report_is_that_of_the_command(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        for number in range(3):
            await recorder.record(_said(number, conversation_id="c"))
        await recorder.record({"sender_id": "bob", "content": "and I"})
        async with ReadOnlyBackend(tmp_path) as backend, answering(backend) as client:
            answer = await client.get(PATH, params={"score": "spread"})
    report = answer.json()
    expected = analyse(tmp_path, score_name="spread").report()

    assert answer.status_code == 200
    assert report["speakers"] == {"ann": 3, "bob": 1}
    given = set(report) - {"timestamp"}
    assert {name: report[name] for name in given - {"tokens", "keywords"}} == {
        name: expected[name] for name in given - {"tokens", "keywords"}
    }
    assert report["score"]["name"] == "spread"
    assert [part["name"] for part in report["score"]["parts"]]


async def test_a_log_that_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        await recorder.record(_said(1))
        async with ReadOnlyBackend(tmp_path) as backend, answering(backend) as client:
            first = await client.get(PATH)
            known = {"If-None-Match": first.headers["ETag"]}
            again = await client.get(PATH, headers=known)  # another report has another time
            await recorder.record(_said(2))
            changed = await client.get(PATH, headers=known)

    assert [first.json()["total_messages"], again.status_code] == [1, 304]
    assert changed.json()["total_messages"] == 2


async def test_where_nothing_is_recorded_there_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    async with ReadOnlyBackend(tmp_path / "state") as backend, answering(backend) as client:
        assert (await client.get(PATH)).status_code == 404
    async with (
        StatePersistenceManager(store=MemoryStateStore()) as manager,
        answering(LiveBackend(manager=manager)) as client,
    ):
        assert (await client.get(PATH)).status_code == 404


async def test_a_page_knows_whether_the_recorder_is_there() -> None:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        backend = LiveBackend(manager=manager)
        async with answering(backend) as client:
            there = [(await client.get(path)).json() for path in ("/health", "/api/summary")]
        async with answering(backend, routers=[]) as client:
            alone = (await client.get("/health")).json()

    assert [one["added_routes"] for one in there] == [["journeys", "orchestrators", "recorder"]] * 2
    assert alone["added_routes"] == []
