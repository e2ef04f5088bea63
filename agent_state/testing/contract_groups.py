"""The contract of groups: several changes, all or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state.errors import InvalidKeyError, RevisionConflictError
from agent_state.protocols import Change, StateStore
from agent_state.testing.contract_base import (
    StoreTests,
    append,
    content_of,
    delete,
    put,
    records_of,
    scanned,
)


class GroupContract(StoreTests):
    """See ``StateStoreContract``."""

    async def test_no_changes_give_no_numbers(self, store: StateStore) -> None:
        assert await store.commit([]) == []

    async def test_a_group_gives_one_number_for_each_change_in_order(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {"n": 1}), put("b", {"n": 1})])
        await store.commit([put("b", {"n": 2})])

        group: list[Change] = [
            append("log", {"n": 1}),
            put("a", {"n": 1}),
            delete("b"),
            put("c", {"n": 1}),
            delete("nothing"),
            append("log", {"n": 2}),
        ]
        assert await store.commit(group) == [1, 1, 2, 1, 0, 2]

        assert sorted(await scanned(store)) == [("a",), ("c",)]
        assert [record.seq for record in await records_of(store, "log")] == [1, 2]

    async def test_two_documents_of_one_group_are_saved_together(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        assert await store.commit([put("a", {"n": 1}), put(("z", "b"), {"n": 1})]) == [1, 1]

        store = await self.reopen(store, tmp_path)
        try:
            assert sorted(await scanned(store)) == [("a",), ("z", "b")]
        finally:
            await store.close()

    @pytest.mark.parametrize("place", [0, 1, 2, 3])
    async def test_one_conflict_undoes_the_whole_group(self, store: StateStore, place: int) -> None:
        await store.commit([put("a", {"n": 1}), put("b", {"n": 1}), append("log", {"n": 1})])
        group: list[Change] = [put("a", {"n": 2}), delete("b"), append("log", {"n": 2}, "once")]
        group.insert(place, put("c", {"n": 1}, expected=7))

        with pytest.raises(RevisionConflictError) as caught:
            await store.commit(group)

        assert caught.value.key == ("c",)
        assert await content_of(store, "a") == {"n": 1}
        assert await content_of(store, "b") == {"n": 1}
        assert await content_of(store, "c") is None
        assert len(await records_of(store, "log")) == 1
        assert await store.commit([append("log", {"n": 2}, "once")]) == [2]

    async def test_one_wrong_id_undoes_the_whole_group(self, store: StateStore) -> None:
        with pytest.raises(InvalidKeyError):
            await store.commit([put("a", {"n": 1}), append("log", {}), put("", {})])

        assert await store.keys("notes") == []
        assert await records_of(store, "log") == []

    async def test_a_later_put_of_one_document_builds_on_the_earlier(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {"n": 1})])

        assert await store.commit([put("a", {"n": 2}, 1), put("a", {"n": 3}, 2)]) == [2, 3]

        assert await content_of(store, "a") == {"n": 3}
        document = await store.get("notes", ("a",))
        assert document is not None
        assert document.revision == 3

    async def test_a_put_after_a_delete_of_one_document_stays(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        await store.commit([put("a", {"n": 1})])

        removed, made = await store.commit([delete("a"), put("a", {"n": 2}, expected=0)])

        assert removed == 1
        assert made > removed
        assert await content_of(store, "a") == {"n": 2}
        store = await self.reopen(store, tmp_path)
        try:
            assert await content_of(store, "a") == {"n": 2}
        finally:
            await store.close()

    async def test_a_delete_after_a_put_of_one_document_stays(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        await store.commit([put("b", {}), put("a", {"n": 1}), delete("a")])

        assert await content_of(store, "a") is None
        store = await self.reopen(store, tmp_path)
        try:
            assert await store.keys("notes") == [("b",)]
        finally:
            await store.close()

    async def test_a_document_and_a_log_may_share_a_key(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1}), append("a", {"n": 2})])

        assert await content_of(store, "a") == {"n": 1}
        assert len(await records_of(store, "a")) == 1
        await store.commit([delete("a")])
        assert len(await records_of(store, "a")) == 1

    async def test_a_dedupe_id_given_twice_in_one_group_is_one_record(
        self, store: StateStore
    ) -> None:
        group = [append("log", {"n": 1}, "x"), append("log", {"n": 2}, "y")]

        assert await store.commit([*group, append("log", {"n": 3}, "x")]) == [1, 2, 1]
        assert await store.commit(group) == [1, 2]
        assert len(await records_of(store, "log")) == 2
