"""The part of the contract about erasing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from agent_state.errors import InvalidKeyError
from agent_state.protocols import Change, Notice, StateStore
from agent_state.testing.contract_base import (
    NASTY_IDS,
    StoreTests,
    append,
    content_of,
    delete,
    put,
    records_of,
)


class ErasureContract(StoreTests):
    """Everything under a key is gone for good, and nothing else."""

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

    @pytest.mark.parametrize("ident", NASTY_IDS, ids=range(len(NASTY_IDS)))
    async def test_nasty_ids_are_erased_like_any_other(self, store: StateStore, ident: str) -> None:
        others = [each for each in NASTY_IDS if each != ident]
        await store.commit([put(each, {"n": 1}) for each in NASTY_IDS])
        await store.commit([append((ident, "x"), {"n": 1})])

        assert await store.erase("notes", (ident,)) == 2

        assert [key[0] for key in await store.keys("notes")] == sorted(others)
        assert await store.logs("notes") == []

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
            told = {}
            async for notice in notices:
                told[notice.key] = notice
                if notice.key == ("end",):
                    break
        assert told == {
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
        """A log that is left begins at 1 and has no gap; a document is as somebody put it."""
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
