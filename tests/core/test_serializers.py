"""What the serialiser takes comes back as it was; what would not is refused, by name."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_state import JSONStateSerializer, SerializationError, StateCorruptedError
from agent_state.serializers import MAX_DEPTH, check_strict_json, parse_object

serializer = JSONStateSerializer()

text = st.text(st.characters(exclude_categories=["Cs"]))
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
states = st.dictionaries(
    text,
    st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=8
    ),
    max_size=5,
)


def nested(levels: int) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for _ in range(levels - 1):
        state = {"deeper": state}
    return state


class Colour(StrEnum):
    RED = "red"


class Number(IntEnum):
    ONE = 1


class Words(str):
    __slots__ = ()


@given(states)
@example(
    {"zero": -0.0, "big": 2**64 - 1, "small": -(2**63), "tiny": 5e-324, "text": "\u2028\x85\0"}
)
def test_a_state_comes_back_as_it_was(state: dict[str, Any]) -> None:
    back = serializer.loads(serializer.dumps(state))

    assert back == state
    # 1 is not 1.0 is not True
    assert json.dumps(back, sort_keys=True) == json.dumps(state, sort_keys=True)


@given(states)
def test_equal_states_have_equal_bytes(state: dict[str, Any]) -> None:
    turned = dict(reversed(list(state.items())))

    assert serializer.dumps(turned) == serializer.dumps(state)
    assert serializer.dumps(serializer.loads(serializer.dumps(state))) == serializer.dumps(state)


@given(states)
def test_the_bytes_are_json_as_everybody_reads_it(state: dict[str, Any]) -> None:
    assert json.loads(serializer.dumps(state)) == state


def test_a_tuple_is_stored_as_an_array() -> None:
    assert serializer.loads(serializer.dumps({"pair": (1, (2, 3))})) == {"pair": [1, [2, 3]]}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "inf"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        (2**200, "64 bits"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (bytearray(b"x"), "bytearray"),
        ("\ud800", "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        ({1: "one"}, "int"),
        ({None: 1}, "NoneType"),
        ({True: 1}, "bool"),
        ({(1,): 1}, "tuple"),
        ({Words("key"): 1}, "Words"),
        (object(), "object"),
        (datetime.now(UTC), "datetime"),
        (Colour.RED, "Colour"),
        (Number.ONE, "Number"),
        (Words("text"), "Words"),
        (1 + 2j, "complex"),
        (iter([]), "iterator"),
    ],
)
def test_what_would_not_come_back_is_refused_by_name(value: Any, word: str) -> None:
    for state, field in [
        ({"context": {"list": [0, value]}}, "context.list[1]"),
        ({"context": {"list": [0, {"deep": (value,)}]}}, "context.list[1].deep[0]"),
    ]:
        with pytest.raises(SerializationError) as caught:
            serializer.dumps(state)
        assert caught.value.field == field
        assert word.lower() in str(caught.value).lower()
        assert isinstance(caught.value, TypeError)


def test_an_odd_key_at_the_top_is_refused_too() -> None:
    with pytest.raises(SerializationError, match="JSON keys are text"):
        serializer.dumps({1: "one"})  # type: ignore[dict-item]


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 254, 255, 1024, 10_000, 200_000])
def test_nesting_that_could_not_be_read_again_is_refused(levels: int) -> None:
    with pytest.raises(SerializationError, match="deeper than 200"):
        serializer.dumps(nested(levels))


def test_nesting_within_the_limit_comes_back() -> None:
    assert serializer.loads(serializer.dumps(nested(MAX_DEPTH))) == nested(MAX_DEPTH)


def test_a_state_that_holds_itself_is_refused() -> None:
    state: dict[str, Any] = {}
    state["self"] = [state]

    with pytest.raises(SerializationError):
        serializer.dumps(state)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"text"',
        b"7",
        b"{",
        b'{"a":1',
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e400}',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b"{}{}",
        b"{}\0",
        b"\0" * 64,
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_bytes_that_are_no_object_are_said_to_be_damaged(data: bytes) -> None:
    with pytest.raises(StateCorruptedError):
        parse_object(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',
        b'{"b":[{"a":1,"a":2}]}',
        b'{"a":18446744073709551616}',
        b'{"a":-9223372036854775809}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' * 250 + b"1" + b"}" * 250,
    ],
)
def test_what_a_person_wrote_and_we_would_change_silently_is_refused(data: bytes) -> None:
    with pytest.raises(StateCorruptedError):
        check_strict_json(data)


@given(states)
def test_what_we_wrote_passes_as_written_by_hand(state: dict[str, Any]) -> None:
    check_strict_json(serializer.dumps(state))


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_damaged(data: bytes) -> None:
    with suppress(StateCorruptedError):
        assert isinstance(parse_object(data), dict)
