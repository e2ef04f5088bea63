"""The clock for tests turns only when it is told to, and wakes in order."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta

import pytest

from agent_state.testing import FakeClock


async def test_time_stands_still_until_it_is_turned() -> None:
    clock = FakeClock(datetime(2030, 1, 1, tzinfo=UTC))
    assert clock.now() == clock.now() == datetime(2030, 1, 1, tzinfo=UTC)

    await clock.advance(1.5)

    assert clock.now() == datetime(2030, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC)
    assert clock.monotonic() == 1.5


async def test_sleepers_wake_at_their_own_moment_in_order() -> None:
    clock = FakeClock()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await clock.sleep(nap)
            woken.append((name, clock.monotonic()))

    tasks = [
        asyncio.create_task(sleeper("often", 10, 10, 10)),
        asyncio.create_task(sleeper("late", 25)),
        asyncio.create_task(sleeper("early", 5)),
        asyncio.create_task(sleeper("with late", 25)),
        asyncio.create_task(sleeper("not yet", 3601)),
    ]
    await clock.advance(3600)

    assert woken == [
        ("early", 5),
        ("often", 10),
        ("often", 20),
        ("late", 25),
        ("with late", 25),
        ("often", 30),
    ]
    assert clock.sleepers == 1
    await clock.advance(1)
    await asyncio.gather(*tasks)


async def test_a_loop_of_naps_goes_all_the_way() -> None:
    clock = FakeClock()
    count = 0

    async def nap() -> None:
        nonlocal count
        while True:
            await clock.sleep(30)
            count += 1

    task = asyncio.create_task(nap())
    await clock.advance(3600)
    task.cancel()

    assert count == 120


async def test_who_is_cancelled_is_not_woken() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(10))
    await clock.wait_for_sleepers()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert clock.sleepers == 0
    await clock.advance(20)


async def test_no_time_is_no_sleep() -> None:
    clock = FakeClock()
    await clock.sleep(0)
    await clock.sleep(-1)
    assert clock.sleepers == 0


async def test_the_wall_clock_may_jump_and_nobody_wakes() -> None:
    clock = FakeClock()
    before = clock.now()
    task = asyncio.create_task(clock.sleep(10))
    await clock.wait_for_sleepers()

    clock.jump(-3600)

    assert clock.now() == before - timedelta(hours=1)
    assert clock.monotonic() == 0
    assert not task.done()
    await clock.advance(10)
    await task


async def test_a_time_without_a_zone_and_time_backwards_are_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        FakeClock(datetime(2030, 1, 1))  # noqa: DTZ001  # that is the point
    for seconds in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="goes on by a number of seconds"):
            await FakeClock().advance(seconds)
