"""Python values as JSON that says their types."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from agent_framework import AgentResponse, Message
from hypothesis import given
from hypothesis import strategies as st

from agent_state_integrations.agent_framework.values import TYPE, TypedJsonCodec
from tests.integrations.agent_framework import letters
from tests.integrations.agent_framework.letters import Colour, Draft, Letter, Mark

CODEC = TypedJsonCodec(
    lambda name: name in letters.ALLOWED or name.startswith(("agent_framework.", "builtins:Value"))
)


def round_trip(value: Any) -> Any:
    return CODEC.decode(json.loads(json.dumps(CODEC.encode(value), allow_nan=False)))


VALUES: list[Any] = [
    *(None, True, 1, -(2**80), 0.5, float("inf"), "ä\n"),
    *(b"\x00\xff", bytearray(b"x"), (1, (2,)), {1, 2}, frozenset({"a"}), complex(1, 2)),
    *(range(1, 9, 2), slice(1, None), Decimal("1.10"), Fraction(1, 3)),
    UUID(int=5),
    *(date(2026, 1, 2), time(3, 4, 5, 6), timedelta(days=-1, microseconds=3), UTC),
    *(datetime(2026, 1, 2, 3, 4, 5, 6, UTC), datetime(2026, 1, 2)),  # noqa: DTZ001  # a naive one too
    datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2), "X")),
    *(deque([1, 2], 3), OrderedDict(b=1, a=2), Counter("aab"), defaultdict(list, a=[1])),
    *({"b": 1, "a": {"d": 1, "c": 2}}, {1: "a", "1": "b", (2,): "c"}, {TYPE: "builtins:int"}),
    *([], {}, (), set()),
    *(Colour.RED, Draft("a", tags={"x"}), Mark(1, (2, 3)), Letter(to="a", draft=Draft("b"))),
    *(int, list[str], dict[str, list[int]], int | None, list[str] | None, Draft, type(None)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back(value: Any) -> None:
    found = round_trip(value)

    assert found == value
    assert type(found) is type(value)
    assert repr(found) == repr(value)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.just(TYPE), inner)
    ),
    max_leaves=20,
)


@given(_JSON)
def test_any_value_comes_back(value: Any) -> None:
    found = round_trip(value)

    assert found == value
    assert repr(found) == repr(value)  # also the order of keys, and 0.0 beside -0.0


def test_objects_of_the_framework_and_exceptions_come_back() -> None:
    response = AgentResponse(messages=[Message("assistant", ["hi"])], response_id="r")
    assert round_trip(response).to_dict() == response.to_dict()
    error = round_trip({"error": ValueError})["error"]
    assert error is ValueError


def test_what_was_decoded_shares_nothing() -> None:
    value = {"drafts": [Draft("a", tags={"x"})]}
    encoded = CODEC.encode(value)
    before = copy.deepcopy(encoded)
    value["drafts"][0].tags.add("y")
    CODEC.decode(encoded)["drafts"][0].tags.add("z")

    assert encoded == before
    assert CODEC.decode(encoded)["drafts"][0].tags == {"x"}


@pytest.mark.parametrize(
    "value",
    [
        letters.Secret(),
        letters.Secret,
        letters.Chained(),
        letters.Sealed("x"),
        lambda: 1,
        os.system,
        os,
        iter(()),
        [[letters.Secret()]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_restored_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        CODEC.encode(value)


def test_a_value_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)

    with pytest.raises(TypeError, match="contains itself"):
        CODEC.encode(value)


@pytest.mark.parametrize(
    "stored",
    [
        {TYPE: "os:system"},
        {TYPE: "subprocess:Popen", "call": [["true"]]},
        {TYPE: f"{letters.__name__}:Secret"},
        {TYPE: "builtins:type", "value": "subprocess:Popen"},
        {TYPE: "agent_framework._workflows._checkpoint_encoding:pickle.Unpickler"},
        {TYPE: "agent_framework._workflows._checkpoint:os.system"},
        {TYPE: "agent_framework._workflows._checkpoint:Path"},
        {TYPE: "agent_framework._workflows._checkpoint_encoding:encode_checkpoint_value"},
        {TYPE: "agent_framework.no_module:X"},
        {TYPE: "builtins:eval", "call": ["1"]},
        {TYPE: "builtins:ValueLess"},
        {TYPE: f"{letters.__name__}:Colour", "value": "blue"},
        {TYPE: "datetime:datetime", "value": "noon"},
        {TYPE: "builtins:bytes", "base64": "%"},
        {TYPE: "builtins:dict"},
        {TYPE: "|", "items": []},
        {TYPE: 5},
    ],
    ids=lambda stored: str(stored[TYPE]),
)
def test_what_nobody_has_encoded_makes_nothing(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        CODEC.decode([stored])
