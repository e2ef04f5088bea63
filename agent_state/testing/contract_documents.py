"""The contract of documents and groups: put, get, delete, keys, scan, revisions, atomicity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import pytest_asyncio

from agent_state.clock import instant
from agent_state.errors import InvalidKeyError, RevisionConflictError
from agent_state.protocols import Change, Document, Put, StateStore
from agent_state.testing.contract_base import (
    NASTY_IDS,
    SCHEMA,
    append,
    body,
    check,
    content_of,
    delete,
    put,
    records_of,
    scanned,
    turns,
)


class DocumentContract:
    """The half of ``StateStoreContract`` about documents and groups."""

    pytestmark = pytest.mark.asyncio

    lock_timeout_seconds = 60.0
    """Seconds after which ``make_store``'s stores stop waiting for a lock.

    It is long, so that no test misses it on a busy machine. The one test of the timeout itself
    makes a store with a short one.
    """

    def make_store(self, directory: Path) -> StateStore:
        """A store, not yet open, that keeps everything below ``directory``."""
        raise NotImplementedError("a subclass makes the store")

    async def reopen(self, store: StateStore, directory: Path) -> StateStore:
        """The store as a new process would open it."""
        await store.close()
        fresh = self.make_store(directory)
        await fresh.open()
        return fresh

    @pytest_asyncio.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[StateStore]:
        store = self.make_store(tmp_path)
        await store.open()
        yield store
        await store.close()

    # -- documents -------------------------------------------------------------------------

    async def test_what_was_put_is_got(self, store: StateStore) -> None:
        assert await store.commit([put("a", {"n": 1})]) == [1]

        document = await store.get("notes", ("a",))

        assert document is not None
        assert instant(document.saved_at).tzinfo is not None
        expected = Document("notes", ("a",), body({"n": 1}), 1, "", SCHEMA, edited=False)
        assert replace(document, saved_at="") == expected

    async def test_nothing_is_got_where_nothing_was_put(self, store: StateStore) -> None:
        assert await store.get("notes", ("a",)) is None
        assert await store.get("notes", ("a", "b")) is None
        assert await store.keys("notes") == []
        assert await scanned(store) == {}

    async def test_each_change_gives_a_higher_revision(self, store: StateStore) -> None:
        revisions = [(await store.commit([put("a", {"n": n})]))[0] for n in range(5)]

        assert revisions == sorted(set(revisions))
        document = await store.get("notes", ("a",))
        assert document is not None
        assert (document.revision, document.body) == (revisions[-1], body({"n": 4}))

    async def test_a_put_that_changes_nothing_writes_nothing(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        before = await store.get("notes", ("a",))

        assert await store.commit([put("a", {"n": 1})]) == [1]

        assert await store.get("notes", ("a",)) == before

    async def test_a_change_of_the_schema_or_of_reserved_keys_is_a_change(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {"n": 1})])

        assert await store.commit([Put("notes", ("a",), body({"n": 1}), "notes/2")]) == [2]
        meta = {"_session_id": "s"}
        changed = Put("notes", ("a",), body({"n": 1}), "notes/2", meta=meta)
        assert await store.commit([changed]) == [3]
        assert await store.commit([changed]) == [3]

    async def test_a_delete_gives_the_revision_that_was_removed(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.commit([put("a", {"n": 2})])

        assert await store.commit([delete("a")]) == [2]

        assert await store.get("notes", ("a",)) is None
        assert await store.keys("notes") == []

    async def test_a_delete_of_nothing_is_a_no_op(self, store: StateStore) -> None:
        assert await store.commit([delete("a")]) == [0]
        assert await store.commit([delete("a", expected=0)]) == [0]

    async def test_what_was_deleted_can_be_made_anew(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.commit([delete("a")])

        [revision] = await store.commit([put("a", {"n": 2}, expected=0)])

        assert revision > 0
        assert await content_of(store, "a") == {"n": 2}

    @pytest.mark.parametrize("stored", [0, 1, 3])
    @pytest.mark.parametrize("expected", [0, 1, 2, 3])
    async def test_compare_and_set(self, store: StateStore, stored: int, expected: int) -> None:
        for n in range(stored):
            await store.commit([put("a", {"n": n})])

        if stored == expected:
            await store.commit([put("a", {"n": "new"}, expected=expected)])
            assert await content_of(store, "a") == {"n": "new"}
            return
        for change in (put("a", {"n": "new"}, expected=expected), delete("a", expected=expected)):
            with pytest.raises(RevisionConflictError) as caught:
                await store.commit([change])
            assert (caught.value.expected, caught.value.actual) == (expected, stored)
            assert (caught.value.kind, caught.value.key) == ("notes", ("a",))
        assert await content_of(store, "a") == ({"n": stored - 1} if stored else None)

    async def test_a_conflict_is_told_even_when_nothing_would_change(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {"n": 1})])

        with pytest.raises(RevisionConflictError):
            await store.commit([put("a", {"n": 1}, expected=0)])

    async def test_keys_are_sorted_and_below_the_prefix(self, store: StateStore) -> None:
        keys = [("b",), ("a",), ("a", "2"), ("a", "1"), ("a", "1", "x"), ("ab", "1")]
        for key in keys:
            await store.commit([put(key, {})])
        await store.commit([put("other", {}, kind="others")])

        assert await store.keys("notes") == sorted(keys)
        assert await store.keys("notes", ("a",)) == [("a", "1"), ("a", "1", "x"), ("a", "2")]
        assert await store.keys("notes", ("a", "1")) == [("a", "1", "x")]
        await store.flush()
        assert await store.keys("notes", ("a",)) == [("a", "1"), ("a", "1", "x"), ("a", "2")]
        assert await store.keys("notes", ("c",)) == []
        assert await store.keys("others") == [("other",)]

    async def test_scan_gives_every_document_once(self, store: StateStore) -> None:
        for n in range(300):
            await store.commit([put(("a" if n % 2 else "b", str(n)), {"n": n})])

        found = [document async for document in store.scan("notes")]

        assert sorted(int(document.key[1]) for document in found) == list(range(300))
        assert all(document.body == body({"n": int(document.key[1])}) for document in found)
        assert len(await scanned(store, ("a",))) == 150

    async def test_a_scan_goes_on_while_documents_come_and_go(self, store: StateStore) -> None:
        for n in range(20):
            await store.commit([put(str(n), {"n": n})])

        seen = []
        async for document in store.scan("notes"):
            seen.append(document.key)
            await store.commit([delete("19"), put(str(100 + len(seen)), {})])

        assert len(seen) == len(set(seen))
        assert {(str(n),) for n in range(19)} <= set(seen)

    async def test_nasty_ids_are_ids_like_any_other(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        keys = [(ident,) for ident in NASTY_IDS] + [("in", ident) for ident in NASTY_IDS]
        keys += [(ident, "in") for ident in NASTY_IDS]
        for key in keys:
            assert await store.commit([put(key, {"id": key[-1]}, expected=0)]) == [1]

        assert await store.keys("notes") == sorted(keys)
        store = await self.reopen(store, tmp_path)
        try:
            assert {key: doc.body for key, doc in (await scanned(store)).items()} == {
                key: body({"id": key[-1]}) for key in keys
            }
            for key in keys:
                assert await content_of(store, key) == {"id": key[-1]}
        finally:
            await store.close()

    @pytest.mark.parametrize("ident", ["", "x" * 4097, "\ud800"])
    async def test_what_is_no_id_is_refused(self, store: StateStore, ident: str) -> None:
        for key in [(ident,), ("a", ident)]:
            with pytest.raises(InvalidKeyError):
                await store.commit([put(key, {})])
            with pytest.raises(InvalidKeyError):
                await store.get("notes", key)
        assert await store.keys("notes") == []

    async def test_an_empty_key_and_an_odd_kind_are_refused(self, store: StateStore) -> None:
        with pytest.raises(InvalidKeyError):
            await store.commit([put((), {})])
        with pytest.raises(InvalidKeyError):
            await store.get("notes", ())
        for kind in ("", "..", "a/b", "Notes", ".journal", "con", "\N{SNOWMAN}"):
            with pytest.raises(InvalidKeyError):
                await store.commit([put("a", {}, kind=kind)])
            with pytest.raises(InvalidKeyError):
                await store.get(kind, ("a",))

    async def test_everything_is_there_after_reopening(
        self, store: StateStore, tmp_path: Path
    ) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.commit([put("a", {"n": 2})])
        await store.commit([put(("a", "b"), {"n": 3}), put("gone", {})])
        await store.commit([delete("gone")])
        before = await scanned(store)

        store = await self.reopen(store, tmp_path)
        try:
            assert await scanned(store) == before
            assert await store.keys("notes") == [("a",), ("a", "b")]
            assert await store.commit([put("a", {"n": 4}, expected=2)]) == [3]
        finally:
            await store.close()

    async def test_opening_and_closing_twice_is_a_no_op(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.open()
        assert await content_of(store, "a") == {"n": 1}
        await store.close()
        await store.close()

    async def test_the_same_object_can_be_opened_again(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.close()
        await store.open()

        assert await content_of(store, "a") == {"n": 1}
        assert await store.commit([put("a", {"n": 2}, expected=1)]) == [2]

    async def test_flush_loses_nothing(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.flush()
        await store.commit([put("a", {"n": 2})])
        await store.flush()
        await store.flush()

        assert await content_of(store, "a") == {"n": 2}

    async def test_quarantine_moves_the_document_and_reports_it(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1})])
        await store.flush()

        earlier = await store.quarantine("notes", ("a",), "it has nonsense")

        assert await store.get("notes", ("a",)) == earlier
        [incident] = store.incidents()
        assert (incident.kind, incident.key) == ("notes", ("a",))
        assert "it has nonsense" in incident.what

    async def test_quarantine_of_a_version_spares_what_has_replaced_it(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {"n": 1})])
        first = await store.get("notes", ("a",))
        await store.commit([put("a", {"n": 2})])

        stored = await store.quarantine("notes", ("a",), "it has nonsense", version=first)

        assert stored is not None
        assert stored == await store.get("notes", ("a",))
        assert await content_of(store, "a") == {"n": 2}
        assert store.incidents() == []

    async def test_quarantine_of_a_version_that_is_not_in_its_file_yet(
        self, store: StateStore
    ) -> None:
        await store.commit([put("a", {"n": 1})])
        first = await store.get("notes", ("a",))

        assert await store.quarantine("notes", ("a",), "it has nonsense", version=first) is None

        assert await store.get("notes", ("a",)) is None
        [incident] = store.incidents()
        assert "it has nonsense" in incident.what
        await store.commit([put("a", {"n": 2})])
        assert await content_of(store, "a") == {"n": 2}

    # -- groups ----------------------------------------------------------------------------

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

    # -- checks ----------------------------------------------------------------------------

    async def test_a_check_writes_nothing_and_gives_the_revision(self, store: StateStore) -> None:
        await store.commit([put("a", {"n": 1}), put("gone", {})])
        await store.commit([put("a", {"n": 2}), delete("gone")])
        before = await store.get("notes", ("a",))

        group: list[Change] = [check("gone", 0), put("b", {}), check("a", 2), check("b", 1)]
        assert await store.commit(group) == [0, 1, 2, 1]

        assert await store.commit([check("a", 2)]) == [2]
        assert await store.get("notes", ("a",)) == before
        assert sorted(await scanned(store)) == [("a",), ("b",)]

    @pytest.mark.parametrize(("key", "expected"), [("x", 2), ("x", 0), ("y", 1), ("", 0)])
    async def test_a_check_that_fails_refuses_the_whole_group(
        self, store: StateStore, key: str, expected: int
    ) -> None:
        await store.commit([put("a", {"n": 1}), put("b", {}), put("x", {})])
        group: list[Change] = [put("a", {"n": 2}), delete("b"), append("log", {}, "once")]

        for place in range(4):
            with pytest.raises(RevisionConflictError if key else InvalidKeyError) as caught:
                await store.commit([*group[:place], check(key, expected), *group[place:]])
            if isinstance(caught.value, RevisionConflictError):
                assert caught.value.key == (key,)
                assert (caught.value.expected, caught.value.actual) == (expected, int(key == "x"))

        assert sorted(await scanned(store)) == [("a",), ("b",), ("x",)]
        assert await content_of(store, "a") == {"n": 1}
        assert await records_of(store, "log") == []

    async def test_only_the_owner_writes_under_its_check(self, store: StateStore) -> None:
        await store.commit([put("owner", {"n": 1})])

        async def write(revision: int) -> None:
            for _ in range(10):
                with suppress(RevisionConflictError):
                    await store.commit([append("log", {"by": revision}), check("owner", revision)])

        async def take() -> None:
            await turns()
            await store.commit([put("owner", {"n": 2}, 1), append("log", {"by": 0})])

        await asyncio.gather(*map(write, [1, 1, 1]), take(), *map(write, [2, 2, 2]))

        by = [orjson.loads(record.body)["by"] for record in await records_of(store, "log")]
        assert by == [1] * by.count(1) + [0] + [2] * by.count(2)
