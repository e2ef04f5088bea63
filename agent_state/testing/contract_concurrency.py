"""The contract between tasks: order, locks, cancellation, and who is told."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from agent_state.errors import LockTimeoutError, RevisionConflictError
from agent_state.protocols import Notice, NoticeStream, StateStore
from agent_state.testing.contract_base import StoreTests, append, content_of, delete, put, turns


class ConcurrencyContract(StoreTests):
    """See ``StateStoreContract``."""

    async def test_saves_of_one_document_end_in_the_order_they_began(
        self, store: StateStore
    ) -> None:
        saves = [asyncio.create_task(store.commit([put("a", {"n": n})])) for n in range(50)]

        revisions = [revision for [revision] in await asyncio.gather(*saves)]

        assert revisions == list(range(1, 51))
        assert await content_of(store, "a") == {"n": 49}

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
        told = {}
        async with aclosing(await store.watch()) as notices:
            await store.commit([put("a", {"n": 1}), append("a", {})])
            await store.commit([put(("a", "b"), {}), put("before", {"n": 2})])
            await store.commit([delete("a"), delete("nothing")])
            await store.commit([put("before", {"n": 2})])
            await store.commit([put("end", {})])
            async for notice in notices:
                told[notice.key] = notice
                if notice.key == ("end",):
                    break

        assert told == {
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


async def _all_of(notices: NoticeStream) -> list[Notice]:
    return [notice async for notice in notices]
