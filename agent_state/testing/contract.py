"""The contract of a store, as tests that the author of a store inherits.

::

    from agent_state.testing import StateStoreContract

    class TestMyStore(StateStoreContract):
        def make_store(self, directory):
            return MyStateStore(directory, lock_timeout_seconds=self.lock_timeout_seconds)

Needs pytest and pytest-asyncio, in either mode.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import orjson
import pytest

from agent_state.errors import (
    AgentStateError,
    InvalidKeyError,
    LockTimeoutError,
    RevisionConflictError,
)
from agent_state.protocols import Change, LogRecord, Notice, NoticeStream, StateStore
from agent_state.testing.contract_base import (
    NASTY_IDS,
    append,
    body,
    content_of,
    delete,
    put,
    records_of,
    turns,
)
from agent_state.testing.contract_documents import DocumentContract


class StateStoreContract(DocumentContract):
    """The docstrings of ``agent_state.protocols.StateStore`` as tests.

    A subclass defines ``make_store``. It also defines ``reopen`` if a new store object would not
    find what an earlier one stored.
    """

    # -- logs ------------------------------------------------------------------------------

    async def test_records_are_numbered_from_one(self, store: StateStore) -> None:
        assert await store.commit([append("log", {"n": 1})]) == [1]
        assert await store.commit([append("log", {"n": 2}, "id")]) == [2]

        assert await records_of(store, "log") == [
            LogRecord(1, body({"n": 1})),
            LogRecord(2, body({"n": 2}), "id"),
        ]

    async def test_a_log_that_does_not_exist_has_no_records(self, store: StateStore) -> None:
        assert await records_of(store, "log") == []
        assert await records_of(store, ("log", "deeper"), last=3) == []
        assert await store.logs("notes") == []

    async def test_reading_after_a_number_or_only_the_last(self, store: StateStore) -> None:
        for n in range(1, 11):
            await store.commit([append("log", {"n": n})])

        async def numbers(after: int = 0, last: int | None = None) -> list[int]:
            return [record.seq for record in await records_of(store, "log", after=after, last=last)]

        assert await numbers() == list(range(1, 11))
        assert await numbers(after=7) == [8, 9, 10]
        assert await numbers(after=10) == []
        assert await numbers(after=99) == []
        assert await numbers(last=3) == [8, 9, 10]
        assert await numbers(last=99) == list(range(1, 11))
        assert await numbers(last=0) == []
        assert await numbers(after=8, last=5) == [9, 10]
        assert await numbers(after=2, last=2) == [9, 10]
        await store.flush()
        assert await numbers(after=4, last=3) == [8, 9, 10]

    async def test_a_known_dedupe_id_adds_nothing(self, store: StateStore, tmp_path: Path) -> None:
        await store.commit([append("log", {"n": 1}, "x")])
        await store.commit([append("log", {"n": 2})])

        assert await store.commit([append("log", {"n": 3}, "x")]) == [1]

        assert await store.commit([append("other", {"n": 3}, "x")]) == [1]
        store = await self.reopen(store, tmp_path)
        try:
            assert await store.commit([append("log", {"n": 3}, "x")]) == [1]
            assert await store.commit([append("log", {"n": 3}, "y")]) == [3]
            assert [record.seq for record in await records_of(store, "log")] == [1, 2, 3]
        finally:
            await store.close()

    async def test_one_dedupe_id_from_many_tasks_is_one_record(self, store: StateStore) -> None:
        numbers = await asyncio.gather(
            *(store.commit([append("log", {"n": n}, f"id-{n % 3}")]) for n in range(30))
        )

        assert len(await records_of(store, "log")) == 3
        assert {number for [number] in numbers} == {1, 2, 3}

    async def test_appends_of_many_tasks_are_all_there(self, store: StateStore) -> None:
        await asyncio.gather(*(store.commit([append("log", {"n": n})]) for n in range(100)))

        records = await records_of(store, "log")
        assert [record.seq for record in records] == list(range(1, 101))
        assert {orjson.loads(record.body)["n"] for record in records} == set(range(100))

    async def test_logs_are_listed_and_are_no_documents(self, store: StateStore) -> None:
        for key in [("b",), ("a", "2"), ("a", "1")]:
            await store.commit([append(key, {})])

        assert await store.logs("notes") == [("a", "1"), ("a", "2"), ("b",)]
        assert await store.logs("notes", ("a",)) == [("a", "1"), ("a", "2")]
        assert await store.keys("notes") == []
        assert await store.get("notes", ("b",)) is None

    async def test_odd_text_in_a_record_comes_back_as_it_was(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        odd = '\N{LINE SEPARATOR}\x85\n\r\0"\\ \N{SNOWMAN}'
        await store.commit([append("log", {odd: odd}, odd)])
        await store.commit([append("log", {})])

        store = await self.reopen(store, tmp_path)
        try:
            assert await records_of(store, "log") == [
                LogRecord(1, body({odd: odd}), odd),
                LogRecord(2, body({})),
            ]
        finally:
            await store.close()

    async def test_a_long_log_is_read_from_anywhere(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        text = "x" * 900
        for start in range(0, 1000, 100):
            group = [append("log", {"n": n, "text": text}) for n in range(start, start + 100)]
            await store.commit(group)

        store = await self.reopen(store, tmp_path)
        try:
            for after in (0, 1, 499, 500, 998, 999, 1000):
                records = await records_of(store, "log", after=after)
                assert [record.seq for record in records] == list(range(after + 1, 1001))
            assert [r.seq for r in await records_of(store, "log", last=2)] == [999, 1000]
            assert await store.commit([append("log", {})]) == [1001]
        finally:
            await store.close()

    @pytest.mark.parametrize("ident", ["", "x" * 4097, "\ud800"])
    async def test_what_is_no_id_is_no_log_either(self, store: StateStore, ident: str) -> None:
        with pytest.raises(InvalidKeyError):
            await store.commit([append(ident, {})])
        with pytest.raises(InvalidKeyError):
            await records_of(store, ident)

    # -- order, locks and cancellation -----------------------------------------------------

    async def test_saves_of_one_document_end_in_the_order_they_began(
        self, store: StateStore
    ) -> None:
        saves = [asyncio.create_task(store.commit([put("a", {"n": n})])) for n in range(50)]

        revisions = [revision for [revision] in await asyncio.gather(*saves)]

        assert revisions == list(range(1, 51))
        assert await content_of(store, "a") == {"n": 49}

    async def test_saves_that_begin_one_after_another_end_in_their_order(
        self, store: StateStore
    ) -> None:
        async def save(n: int) -> int:
            for _ in range(n):  # turns of the loop: the first saves may be reading meanwhile
                await asyncio.sleep(0)
            [revision] = await store.commit([put("a", {"n": n})])
            return revision

        assert await asyncio.gather(*map(save, range(50))) == list(range(1, 51))
        assert await content_of(store, "a") == {"n": 49}

    async def test_a_cancelled_save_lets_no_later_one_overtake(self, store: StateStore) -> None:
        saves = [asyncio.create_task(store.commit([put("a", {"n": n})])) for n in range(9)]
        await asyncio.sleep(0)
        saves[1].cancel()
        ended = await asyncio.gather(*saves, return_exceptions=True)

        revisions = [each[0] for each in ended if isinstance(each, list)]
        assert len(revisions) >= len(saves) - 1
        assert revisions == sorted(revisions)
        assert await content_of(store, "a") == {"n": 8}

    async def test_compare_and_set_lets_no_update_be_lost(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 0})])

        async def increment() -> None:
            while True:
                document = await store.get("notes", ("a",))
                assert document is not None
                content = await content_of(store, "a")
                try:
                    await store.commit([put("a", {"n": content["n"] + 1}, document.revision)])
                except RevisionConflictError:
                    continue
                return

        await asyncio.gather(*(increment() for _ in range(10)))

        assert await content_of(store, "a") == {"n": 10}

    async def test_groups_over_the_same_documents_do_not_block_each_other(
        self, store: StateStore
    ) -> None:
        await asyncio.gather(
            *(
                store.commit([put("a", {"n": n}), put("b", {"n": n})][:: 1 if n % 2 else -1])
                for n in range(20)
            )
        )

        assert await content_of(store, "a") == await content_of(store, "b")

    async def test_a_lock_lets_one_task_in_at_a_time(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 0})])
        inside = 0

        async def increment() -> None:
            nonlocal inside
            async with store.lock("notes", ("a",)):
                inside += 1
                assert inside == 1
                content = await content_of(store, "a")
                await store.commit([put("a", {"n": content["n"] + 1})])
                inside -= 1

        await asyncio.gather(*(increment() for _ in range(8)))

        assert await content_of(store, "a") == {"n": 8}

    async def test_the_holder_passes_its_own_lock_again(self, store: StateStore) -> None:
        async with store.lock("notes", ("a",)), store.lock("notes", ("a",)):
            await store.commit([put("a", {"n": 1}), append("a", {})])
            assert await content_of(store, "a") == {"n": 1}
        async with store.lock("notes", ("a",)):
            pass

    async def test_another_document_is_not_locked(self, store: StateStore) -> None:
        async with store.lock("notes", ("a",)):
            other = asyncio.create_task(store.commit([put("b", {"n": 1})]))
            assert await other == [1]

    async def test_a_lock_that_is_not_free_in_time_is_an_error(self, tmp_path: Path) -> None:
        self.lock_timeout_seconds = 0.2
        store = self.make_store(tmp_path)

        async def try_it() -> None:
            async with store.lock("notes", ("a",)):
                raise AssertionError("two tasks hold one lock")

        await store.open()
        async with store.lock("notes", ("a",)):
            with pytest.raises(LockTimeoutError):
                await asyncio.create_task(try_it())
        async with store.lock("notes", ("a",)):
            pass
        await store.close()

    async def test_a_commit_of_another_task_waits_for_the_lock(self, store: StateStore) -> None:
        async with store.lock("notes", ("a",)):
            other = asyncio.create_task(store.commit([put("a", {"n": "theirs"})]))
            await turns()
            await store.commit([put("a", {"n": "mine"}, expected=0)])
        assert await other == [2]

    async def test_a_lock_is_free_again_after_an_error(self, store: StateStore) -> None:
        with pytest.raises(ZeroDivisionError):
            async with store.lock("notes", ("a",)):
                raise ZeroDivisionError
        async with store.lock("notes", ("a",)):
            pass

    async def test_a_task_cancelled_while_it_waits_for_a_lock_does_not_hold_it(
        self, store: StateStore
    ) -> None:
        async def wait() -> None:
            async with store.lock("notes", ("a",)):
                raise AssertionError("it was cancelled before")

        async with store.lock("notes", ("a",)):
            waiting = asyncio.create_task(wait())
            await turns()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with store.lock("notes", ("a",)):
            pass

    @pytest.mark.parametrize("after", range(12))
    async def test_the_outcome_of_a_cancelled_commit_stands_when_it_ends(
        self, store: StateStore, after: int
    ) -> None:
        commit = asyncio.create_task(store.commit([put("a", {"n": 1}), put("b", {"n": 1})]))
        await turns(after)
        commit.cancel()
        await asyncio.wait([commit])

        then = [await content_of(store, "a"), await content_of(store, "b")]

        assert then in ([None, None], [{"n": 1}, {"n": 1}])
        await store.flush()
        assert [await content_of(store, "a"), await content_of(store, "b")] == then

    @pytest.mark.parametrize("after", range(12))
    async def test_a_save_that_timed_out_never_lands_on_a_newer_one(
        self, store: StateStore, after: int
    ) -> None:
        old = asyncio.create_task(store.commit([put("a", {"n": "old"})]))
        await turns(after)
        old.cancel()
        await asyncio.wait([old])

        await store.commit([put("a", {"n": "new"})])

        await store.flush()
        assert await content_of(store, "a") == {"n": "new"}

    async def test_a_watcher_is_told_of_every_document_that_changed(
        self, store: StateStore
    ) -> None:
        await store.commit([put("before", {"n": 1})])
        reported = {}
        async with aclosing(await store.watch()) as notices:
            await store.commit([put("a", {"n": 1}), append("a", {})])
            await store.commit([put(("a", "b"), {}), put("before", {"n": 2})])
            await store.commit([delete("a"), delete("nothing")])
            await store.commit([put("before", {"n": 2})])
            await store.commit([put("end", {})])
            async for notice in notices:
                reported[notice.key] = notice
                if notice.key == ("end",):
                    break

        assert reported == {
            ("a",): Notice("notes", ("a",), None),
            ("a", "b"): Notice("notes", ("a", "b"), 1),
            ("before",): Notice("notes", ("before",), 2),
            ("end",): Notice("notes", ("end",), 1),
        }

    async def test_a_slow_watcher_holds_nobody_up(self, store: StateStore) -> None:
        async with aclosing(await store.watch()) as notices:
            for n in range(50):
                await store.commit([put("a", {"n": n})])

            assert await anext(aiter(notices)) == Notice("notes", ("a",), 50)

    async def test_closing_ends_every_watch(self, store: StateStore) -> None:
        first, second = await store.watch(), await store.watch()
        await first.aclose()
        assert [notice async for notice in first] == []
        waiting = asyncio.create_task(_all_of(second))
        await turns()

        await store.close()

        assert await waiting == []
        assert [notice async for notice in second] == []

    async def test_a_closed_store_cannot_be_watched(self, store: StateStore) -> None:
        await store.close()

        with pytest.raises(AgentStateError, match="not open"):
            await store.watch()

    # -- erasure ---------------------------------------------------------------------------

    async def test_everything_under_a_key_goes_and_nothing_else(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        gone: list[Change] = [put("a", {"n": 1}), put(("a", "b"), {"n": 2}), append("a", {"n": 3})]
        gone += [append(("a", "b", "c"), {"n": 4}, "once")]
        kept: list[Change] = [
            put("ab", {"n": 5}),
            append("ab", {"n": 6}),
            put(("b", "a"), {"n": 7}),
        ]
        await store.commit([*gone, *kept])
        await store.commit([put("a", {"n": 8}, kind="others")])

        assert await store.erase("notes", ("a",)) == 4
        assert await store.erase("notes", ("a",)) == 0

        for _ in range(2):
            assert await content_of(store, "a") is None
            assert await content_of(store, ("a", "b")) is None
            assert await records_of(store, "a") == []
            assert await store.keys("notes") == [("ab",), ("b", "a")]
            assert await store.logs("notes") == [("ab",)]
            assert await content_of(store, "a", kind="others") == {"n": 8}
            store = await self.reopen(store, tmp_path)
        await store.close()

    async def test_what_was_erased_begins_anew(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1}), append("a", {"n": 1}, "once")])
        await store.commit([append("a", {"n": 2}, "twice")])
        await store.erase("notes", ("a",))

        [_, seq] = await store.commit([put("a", {"n": 1}, expected=0), append("a", {}, "twice")])

        assert seq == 1
        assert [record.dedupe_key for record in await records_of(store, "a")] == ["twice"]
        assert await content_of(store, "a") == {"n": 1}

    async def test_an_erased_key_can_have_been_deleted(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.commit([delete("a")])

        assert await store.erase("notes", ("a",)) == 0
        assert await store.commit([put("a", {"n": 2}, expected=0)])

    async def test_nasty_ids_are_erased_like_any_other(self, store: StateStore) -> None:
        await store.commit([put(ident, {"n": 1}) for ident in NASTY_IDS])
        for ident in NASTY_IDS:
            others = [other for other in NASTY_IDS if other != ident]
            await store.commit([append((ident, "x"), {"n": 1})])

            assert await store.erase("notes", (ident,)) == 2

            assert [key[0] for key in await store.keys("notes")] == sorted(others)
            assert await store.logs("notes") == []
            await store.commit([put(ident, {"n": 1})])

    async def test_a_whole_kind_is_not_erased_by_accident(self, store: StateStore) -> None:
        with pytest.raises(InvalidKeyError):
            await store.erase("notes", ())

    async def test_a_watcher_is_told_of_every_document_that_was_erased(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {}), put(("a", "b"), {})])
        async with aclosing(await store.watch()) as notices:
            await store.erase("notes", ("a",))
            await store.commit([put("end", {})])
            reported = {}
            async for notice in notices:
                reported[notice.key] = notice
                if notice.key == ("end",):
                    break
        assert reported == {
            ("a",): Notice("notes", ("a",), None),
            ("a", "b"): Notice("notes", ("a", "b"), None),
            ("end",): Notice("notes", ("end",), 1),
        }

    async def test_the_holder_of_the_lock_may_erase_and_others_wait(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {"n": 1})])
        async with store.lock("notes", ("a",)):
            other = asyncio.create_task(store.erase("notes", ("a",)))
            await asyncio.sleep(0.01)
            assert await store.erase("notes", ("a",)) == 1
            await store.commit([put("a", {"n": 2}, expected=0)])
        assert await other == 1

    async def test_what_is_written_meanwhile_comes_before_or_after(self, store: StateStore) -> None:
        """A log that is left starts at 1 and has no gap; a document is as a writer put it."""
        await store.commit([append("a", {"n": 0})])

        async def write(number: int) -> None:
            for _ in range(10):
                await store.commit([append("a", {"n": number}), put(("a", "b"), {"n": number})])

        writers = [asyncio.create_task(write(number)) for number in range(5)]
        for _ in range(4):
            await store.erase("notes", ("a",))
        await asyncio.gather(*writers)

        records = await records_of(store, "a")
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        await store.erase("notes", ("a",))
        assert await records_of(store, "a") == []


async def _all_of(notices: NoticeStream) -> list[Notice]:
    return [notice async for notice in notices]
