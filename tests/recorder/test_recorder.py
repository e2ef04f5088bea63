"""Recording in process: many tasks, one write; the caller's objects stay the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from agent_state.errors import StorageFullError, UnreadableMessageError
from agent_state.testing import FakeClock, FaultyDisk
from agent_state.testing.faults import Fault
from agent_state_integrations.recorder import Checkpoint, Recorder


def say(number: int) -> dict[str, Any]:
    return {"message_id": f"m{number}", "sender_id": "ann", "content": f"message {number}"}


def recorded(root: Path) -> list[str]:
    lines = (root / "record/current.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["Message"] for line in lines]


async def test_what_many_tasks_say_at_once_shares_few_syncs(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        await recorder.record(say(-1))
        with FaultyDisk() as disk:
            outcomes = await asyncio.gather(*(recorder.record(say(n)) for n in range(300)))
        assert disk.count("fdatasync") <= 3
    assert [each.seq for each in outcomes] == list(range(2, 302))
    assert recorded(tmp_path) == [f"message {n}" for n in range(-1, 300)]


async def test_a_message_may_be_changed_after_the_call(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        message = say(1)
        waiting = asyncio.ensure_future(recorder.record(message))
        await asyncio.sleep(0)
        message["content"] = "changed"
        await waiting
    assert recorded(tmp_path) == ["message 1"]


async def test_one_that_is_no_message_is_an_error_and_a_dead_letter(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        with pytest.raises(UnreadableMessageError):
            await recorder.record("no object")
        with pytest.raises(UnreadableMessageError, match="not JSON"):
            await recorder.record({"sender_id": "ann", "content": {1, 2}})
        outcomes = await recorder.record_many([say(1), b"torn", say(2)])
    assert [each.outcome for each in outcomes] == ["recorded", "dead-letter", "recorded"]
    letters = (tmp_path / "record/dead-letter.jsonl").read_bytes().split(b"\n")[:-1]
    assert len(letters) == 3
    assert recorded(tmp_path) == ["message 1", "message 2"]


async def test_a_full_disk_is_told_to_everyone_in_the_batch(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        await recorder.record(say(0))
        with FaultyDisk(Fault(at=1, call="write", error=errno.ENOSPC)):
            outcomes = await asyncio.gather(
                *(recorder.record(say(n)) for n in range(1, 4)), return_exceptions=True
            )
        assert [type(each) for each in outcomes] == [StorageFullError] * 3
        await recorder.record(say(1))
    assert recorded(tmp_path) == ["message 0", "message 1"]


async def test_a_cancelled_caller_waits_for_the_outcome(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        waiting = asyncio.ensure_future(recorder.record(say(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert recorded(tmp_path) == ["message 1"]


async def test_closing_writes_what_was_handed_over(tmp_path: Path) -> None:
    async with Recorder(tmp_path) as recorder:
        outcomes = [recorder.submit([say(n)]) for n in range(5)]
    assert all(outcome.done() for outcome in outcomes)
    assert recorded(tmp_path) == [f"message {n}" for n in range(5)]
    with pytest.raises(RuntimeError, match="not open"):
        await recorder.record(say(9))


async def test_checkpoints_are_made_by_time_and_at_the_end(tmp_path: Path) -> None:
    clock = FakeClock()
    async with Recorder(tmp_path, clock=clock, checkpoint_seconds=300.0) as recorder:
        await recorder.record(say(1))
        await clock.advance(301)
        await recorder.checkpoint("mine")  # the writer's one thread has made the other before
        await recorder.record(say(2))
        await recorder.checkpoint("mine")
        await recorder.record(say(3))
    names = sorted(path.stem for path in (tmp_path / "record/checkpoints").iterdir())
    assert [name.partition("_")[2] for name in names] == ["auto", "mine", "final"]


async def test_a_checkpoint_that_fails_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    async with Recorder(tmp_path, clock=clock, checkpoint_seconds=300.0) as recorder:
        await recorder.record(say(1))
        with FaultyDisk(Fault(at=1, call="rename", error=errno.ENOSPC)) as disk:
            await clock.advance(301)
            await recorder.record(say(2))
            assert disk.fired
        await recorder.record(say(3))
    assert "no checkpoint could be made" in caplog.text
    [path] = (tmp_path / "record/checkpoints").iterdir()
    assert json.loads(path.read_bytes())["last_seq"] == 3


async def test_what_comes_while_it_closes_is_recorded_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    await recorder.open()
    begun, go_on = threading.Event(), threading.Event()
    make = recorder.writer.checkpoint

    def slowly(label: str = "manual") -> Checkpoint | None:
        begun.set()
        assert go_on.wait(10)
        return make(label)

    monkeypatch.setattr(recorder.writer, "checkpoint", slowly)
    handed_over = [recorder.submit([say(0)])]
    closing = asyncio.create_task(recorder.close())
    assert await asyncio.to_thread(begun.wait, 10)
    for number in range(1, 4):
        with contextlib.suppress(RuntimeError):
            handed_over.append(recorder.submit([say(number)]))
        await asyncio.sleep(0)
    go_on.set()
    await closing
    assert all(outcome.done() for outcome in handed_over)
    assert len(recorded(tmp_path)) == len(handed_over)


async def test_closing_goes_on_when_it_is_cancelled(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    await recorder.open()
    outcome = recorder.submit([say(1)])
    closing = asyncio.create_task(recorder.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert outcome.done()
    assert recorded(tmp_path) == ["message 1"]
    assert list((tmp_path / "record/checkpoints").iterdir())
