"""``Batcher``: the items of many tasks, worked on a batch at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from agent_state.storage.executor import Batcher, Executor


class Worker:
    """Keeps each batch until it is let go on."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go_on = asyncio.Event()

    async def __call__(self, items: list[int]) -> list[int | Exception]:
        self.batches.append(items)
        await self.go_on.wait()
        return [ValueError(f"{item}") if item < 0 else 10 * item for item in items]


async def test_items_of_one_turn_share_a_batch_and_later_ones_wait_for_the_next() -> None:
    work = Worker()
    batcher = Batcher(work)
    first = [batcher.submit(item) for item in (1, 2)]
    while not work.batches:
        await asyncio.sleep(0)
    later = [batcher.submit(item) for item in (3, 4)]
    work.go_on.set()
    assert await asyncio.gather(*first, *later) == [10, 20, 30, 40]
    assert work.batches == [[1, 2], [3, 4]]


async def test_an_item_that_fails_does_not_fail_its_neighbours() -> None:
    work = Worker()
    work.go_on.set()
    batcher = Batcher(work)
    results = await asyncio.gather(*map(batcher.submit, (1, -2, 3)), return_exceptions=True)
    assert results[0] == 10
    assert results[2] == 30
    assert isinstance(results[1], ValueError)


async def test_a_batch_has_at_most_so_many_items_and_bytes() -> None:
    work = Worker()
    work.go_on.set()
    batcher = Batcher(work, max_items=3, max_bytes=100, size_of=lambda item: item)
    items = [1, 1, 1, 1, 99, 2, 300, 5]
    assert await asyncio.gather(*map(batcher.submit, items)) == [10 * item for item in items]
    assert work.batches == [[1, 1, 1], [1, 99], [2], [300], [5]]


async def test_several_workers_share_what_waits_evenly() -> None:
    work = Worker()
    batcher = Batcher(work, workers=2, max_items=3)
    outcomes = [batcher.submit(item) for item in range(8)]
    while len(work.batches) < 2:
        await asyncio.sleep(0)
    assert work.batches == [[0, 1, 2], [3, 4, 5]]
    work.go_on.set()
    assert await asyncio.gather(*outcomes) == [10 * item for item in range(8)]
    assert sorted(map(len, work.batches)) == [2, 3, 3]


async def test_an_error_of_the_work_is_every_items_and_in_order_also_of_those_that_wait() -> None:
    asked: list[tuple[list[int], type[BaseException] | None]] = []
    started = asyncio.Event()

    async def work(items: list[int]) -> list[int]:
        started.set()
        await asyncio.sleep(0)
        raise OSError("no")

    def finished(items: Sequence[int], error: BaseException | None) -> None:
        asked.append((list(items), None if error is None else type(error)))

    batcher: Batcher[int, int] = Batcher(work, ordered=True, finished=finished)
    first = batcher.submit(1)
    await started.wait()
    second = batcher.submit(2)
    for outcome in (first, second):
        with pytest.raises(OSError, match="no"):
            await outcome
    assert asked == [([1, 2], OSError)]


async def test_a_failed_batch_may_be_tried_once_more() -> None:
    tries: list[str] = []

    async def work(items: list[int]) -> list[int]:
        tries.append("work")
        raise OSError("no")

    async def again(items: list[int]) -> list[int]:
        tries.append("again")
        if items == [7]:
            return [70]
        raise KeyError

    batcher: Batcher[int, int] = Batcher(
        work, retry=lambda items, error: again(items) if isinstance(error, OSError) else None
    )
    assert await batcher.submit(7) == 70
    with pytest.raises(KeyError):
        await batcher.submit(8)
    assert tries == ["work", "again", "work", "again"]


async def test_a_cancelled_caller_waits_for_the_outcome_unless_the_batcher_is_cancellable() -> None:
    work = Worker()

    async def ask(batcher: Batcher[int, int]) -> int:
        return await batcher.submit(1)

    waiting = asyncio.create_task(ask(Batcher(work)))
    impatient = asyncio.create_task(ask(Batcher(work, cancellable=True)))
    while len(work.batches) < 2:
        await asyncio.sleep(0)
    waiting.cancel()
    impatient.cancel()
    await asyncio.wait([impatient])
    assert impatient.cancelled()
    assert not waiting.done()
    work.go_on.set()
    await asyncio.wait([waiting])
    assert waiting.cancelled()


async def test_an_error_that_a_cancelled_caller_never_sees_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = Worker()
    batcher = Batcher(work)

    async def ask() -> int:
        return await batcher.submit(-1)

    asking = asyncio.create_task(ask())
    while not work.batches:
        await asyncio.sleep(0)
    asking.cancel()
    work.go_on.set()
    with caplog.at_level(logging.ERROR, logger="agent_state.storage"):
        await asyncio.wait([asking])
    assert asking.cancelled()
    assert "-1" in caplog.text


async def test_ended_waits_for_all_that_was_submitted() -> None:
    executor = Executor("test", 2)
    batcher: Batcher[int, int] = Batcher(
        lambda items: executor.run(lambda: [item + 1 for item in items]), max_items=1
    )
    outcomes = [batcher.submit(item) for item in range(5)]
    await batcher.ended()
    assert [outcome.result() for outcome in outcomes] == [1, 2, 3, 4, 5]
    await executor.ended()
    executor.close()
