"""The contract of logs: append, read from anywhere, and every id once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest

from agent_state.errors import InvalidKeyError
from agent_state.protocols import LogRecord, StateStore
from agent_state.testing.contract_base import StoreTests, append, body, records_of


class LogContract(StoreTests):
    """See ``StateStoreContract``."""

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
