"""T19: any value at all, through ``save``, ``append`` and ``group``.

It comes back equal, or is refused before any file is touched; and what a save refuses, a load
refuses when somebody writes it by hand.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_state import (
    AgentStateError,
    SerializationError,
    StateCorruptedError,
    StatePersistenceManager,
    StateValidationError,
    codec,
)
from agent_state.storage import changes, document, fileio, logs
from agent_state.storage.document import RESERVED
from tests.faults.damage import age
from tests.faults.tally import Tally

pytestmark = pytest.mark.proof("T19", "any content: equal when read back, or refused untouched")
STORES = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])

TEXT = (
    st.text() | st.text(st.characters(), min_size=1) | st.sampled_from(["\ud800", "\0", "\u2028"])
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 10**400])
    | st.floats(allow_nan=True, allow_infinity=True)
    | TEXT
)
OTHERS = st.sampled_from([b"bytes", {1, 2}, object, 1 + 2j, range(3)])
VALUES = st.recursive(
    LEAVES | OTHERS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXT | st.integers(), inner, max_size=4)
        | st.tuples(inner)
    ),
    max_leaves=12,
)
STATES = st.dictionaries(
    st.sampled_from(["a", "b", "_id", "_seq", "_x"]) | TEXT, VALUES, max_size=4
)


def nested(levels: int) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for _ in range(levels - 1):
        state = {"deeper": state}
    return state


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def same(one: Any, other: Any) -> bool:
    """Equal in type too: 1 is not 1.0, 0.0 is not -0.0, and true is not 1."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def picture(root: Path) -> dict[str, tuple[int, int]]:
    """All files but the locks, which hold nothing."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


class Ways:
    """The three ways into a store, and how each is read back."""

    def __init__(self, manager: StatePersistenceManager, root: Path) -> None:
        self.manager = manager
        self.root = root
        self.count = 0

    async def all(self, state: dict[str, Any], tally: Tally) -> bool:
        """Whether the state was taken; all three ways agree, apart from their reserved keys."""
        taken = [await self.one(way, state, tally) for way in (self.save, self.append, self.group)]
        if RESERVED.isdisjoint(state) and logs.RESERVED.isdisjoint(state):
            assert len(set(taken)) == 1, taken
        return taken[0]

    async def one(
        self, way: Callable[[dict[str, Any]], Awaitable[Any]], state: dict[str, Any], tally: Tally
    ) -> bool:
        self.count += 1
        tally.points += 1
        await self.manager.flush()
        before = picture(self.root)
        try:
            back = await way(state)
        except (SerializationError, StateValidationError):
            await self.manager.flush()
            assert picture(self.root) == before, f"refused, and a file was touched: {state!r}"
            assert self.manager.incidents() == []
            tally.faults += 1
            return False
        assert same(back, plain(state)), f"{state!r} came back as {back!r}"
        tally.acknowledged += 1
        return True

    async def save(self, state: dict[str, Any]) -> Any:
        await self.manager.save("notes", "a", state)
        return await self.load("a")

    async def load(self, key: str) -> Any:
        loaded = await self.manager.load("notes", key)
        assert loaded is not None
        return loaded.model_dump()

    async def append(self, state: dict[str, Any]) -> Any:
        seq = await self.manager.append("notes", "log", state)
        return await self.last(seq)

    async def last(self, seq: int) -> Any:
        [entry] = [entry async for entry in self.manager.read_log("notes", "log", after=seq - 1)]
        assert entry.seq == seq
        return entry.record

    async def group(self, state: dict[str, Any]) -> Any:
        """The bad one comes last: what was good before it must not be done either."""
        async with self.manager.group() as group:
            group.save("notes", "b", {"n": self.count})
            group.append("notes", "other", {"n": self.count})
            group.save("notes", "c", state)
        return await self.load("c")


@pytest.mark.timeout(200)
@STORES
def test_any_value_comes_back_equal_or_is_refused_untouched(
    exclusive: bool, full: bool, tmp_path: Path, tally: Tally
) -> None:
    root = tmp_path / "state"
    with asyncio.Runner() as runner:
        manager = StatePersistenceManager(root, exclusive=exclusive, durability="os")
        runner.run(manager.open())
        ways = Ways(manager, root)

        @settings(
            max_examples=1_000 if full else 60,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(STATES)
        def check(state: dict[str, Any]) -> None:
            runner.run(ways.all(state, tally))

        check()
        runner.run(manager.close())
    assert tally.faults > 0
    assert tally.acknowledged > 0


LIMITS: dict[str, tuple[Any, bool]] = {
    "200 levels": (nested(200), True),
    "201 levels": (nested(201), False),
    "100,000 levels": (nested(100_000), False),
    "the highest integer": ({"n": 2**64 - 1}, True),
    "one more": ({"n": 2**64}, False),
    "the lowest integer": ({"n": -(2**63)}, True),
    "one less": ({"n": -(2**63) - 1}, False),
    "an integer of 5,000 digits": ({"n": 10**5000}, False),
    "NaN": ({"n": math.nan}, False),
    "infinity": ({"n": [math.inf]}, False),
    "the smallest float": ({"n": 5e-324}, True),
    "minus zero": ({"n": -0.0}, True),
    "a float with all its digits": ({"n": 0.1 + 0.2}, True),
    "a lone surrogate": ({"n": "\ud800"}, False),
    "a lone surrogate as a key": ({"\udfff": 1}, False),
    "a pair": ({"n": "\U0001f600"}, True),
    "controls and separators": ({"n": "\0\x1f\x7f\x85\u2028\u2029\ufeff\n"}, True),
    "NFC and NFD": ({"é": 1, "e\u0301": 2}, True),
    "the empty key": ({"": {"": [""]}}, True),
}


@STORES
@pytest.mark.parametrize("name", LIMITS)
async def test_each_limit_is_where_it_is_said_to_be_in_save_and_in_load(
    exclusive: bool, name: str, tmp_path: Path, tally: Tally
) -> None:
    state, good = LIMITS[name]
    root = tmp_path / "state"
    async with StatePersistenceManager(root, exclusive=exclusive) as manager:
        ways = Ways(manager, root)
        assert await ways.all(state, tally) == good
        # The same by hand.
        by_hand = root / "notes" / "hand.json"
        by_hand.parent.mkdir(exist_ok=True)
        by_hand.write_bytes(as_json(state))
        age(by_hand)
        if good:
            assert same(await ways.load("hand"), state)
        else:
            with pytest.raises(StateCorruptedError):
                await manager.load("notes", "hand")
        tally.points += 1


def as_json(value: Any) -> bytes:
    """Deeper than ``json`` can go, as a person's program might write it."""
    levels = 0
    while isinstance(value, dict) and list(value) == ["deeper"]:
        value, levels = value["deeper"], levels + 1
    digits = isinstance(value.get("n"), int) and abs(value["n"]) > 10**400
    inside = '{"n":1' + "0" * 5000 + "}" if digits else json.dumps(value)
    return ('{"deeper":' * levels + inside + "}" * levels).encode()


@STORES
async def test_what_would_be_too_large_to_be_read_is_not_saved(
    exclusive: bool, tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits brought down to where a test can reach them; the file is what counts.

    Deep down each line of it has 400 spaces in front, which the state itself has not.
    """
    limit = 1_000_000
    monkeypatch.setattr(fileio, "MAX_BYTES", limit)
    monkeypatch.setattr(fileio.read_file, "__kwdefaults__", {"limit": limit})
    monkeypatch.setattr(document, "_MAX_BODY", limit - 2_000)
    monkeypatch.setattr(codec, "SMALL_BODY", 0)
    monkeypatch.setattr(logs, "MAX_LINE", limit)
    monkeypatch.setattr(logs, "_MAX_RECORD", limit - 2_000)
    monkeypatch.setattr(changes, "_MAX_RECORD", limit - 64)
    deep = nested(199)
    innermost = deep
    while innermost:
        innermost = innermost["deeper"]
    innermost["many"] = [0] * 3_000
    root = tmp_path / "state"
    async with StatePersistenceManager(root, exclusive=exclusive) as manager:
        ways = Ways(manager, root)
        assert await ways.all({"text": "x" * (limit - 5_000)}, tally)
        assert not await ways.all({"text": "x" * limit}, tally)
        assert not await ways.one(ways.save, deep, tally)
        assert await ways.one(ways.append, deep, tally)  # a line has no indent
        await manager.flush()
        before = picture(root)
        with pytest.raises(SerializationError, match="group"):
            async with manager.group() as group:
                for n in range(3):
                    group.save("notes", f"third{n}", {"text": "x" * (limit // 2)})
        await manager.flush()
        assert picture(root) == before
        assert await manager.keys("notes") == [("a",), ("b",), ("c",)]
        assert await manager.save("notes", "third0", {"n": 1}) == 1


@STORES
@pytest.mark.parametrize("dedupe_key", ["\ud800", 5, b"x"], ids=["surrogate", "integer", "bytes"])
async def test_a_dedupe_key_that_could_not_be_read_back(
    exclusive: bool, dedupe_key: Any, tmp_path: Path, tally: Tally
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.append("notes", "log", {"n": 1}, dedupe_key="good")
        await manager.flush()
        before = picture(tmp_path)
        with pytest.raises(SerializationError):
            await manager.append("notes", "log", {"n": 2}, dedupe_key=dedupe_key)
        with pytest.raises(SerializationError):
            async with manager.group() as group:
                group.save("notes", "a", {"n": 1})
                group.append("notes", "log", {"n": 2}, dedupe_key=dedupe_key)
        await manager.flush()
        assert picture(tmp_path) == before
        assert await manager.append("notes", "log", {"n": 3}, dedupe_key="good") == 1
        assert await manager.append("notes", "log", {"n": 3}) == 2
    tally.points += 2
    tally.faults += 2


@pytest.mark.full
@pytest.mark.timeout(300)
@STORES
async def test_a_document_of_fifty_megabytes(exclusive: bool, tmp_path: Path, tally: Tally) -> None:
    state = {"text": ["é" * 1000] * 25_000}
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        assert await Ways(manager, tmp_path).all(state, tally)
        damaged = tmp_path / "notes" / "hand.json"
        damaged.write_bytes((tmp_path / "notes" / "a.json").read_bytes()[:-9])
        age(damaged)
        with pytest.raises(AgentStateError):
            await manager.load("notes", "hand")
