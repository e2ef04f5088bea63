"""Files of large documents are made by parts, and are those that are made at once."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_state.protocols import Document
from agent_state.storage import document, indented_json
from agent_state.storage.document import decode_document, encode_document
from agent_state.storage.indented_json import indent_object
from agent_state.testing.contract_base import body

ADDED = {"_checksum": "00000000", "_revision": 7, "_id": ["a", "é"]}
OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
TEXTS = st.text() | st.sampled_from(['"', "\\", '\\"', "]},{[", '",', "é€😀", "\n", "x" * 70, ""])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=50,
)
OBJECTS = st.dictionaries(TEXTS, JSON)


def nested(levels: int) -> Any:
    value: Any = {"a": [1, "x"], "b": {}}
    for level in range(levels):
        value = [value, level] if level % 2 else {"key": value, "other": [], "z": level}
    return value


def at_once(state: dict[str, Any]) -> bytes:
    return orjson.dumps({**state, **ADDED}, option=OPTIONS)


@pytest.mark.parametrize("size", [1, 16, 100])
@given(state=OBJECTS)
@example(state={})
@example(state={"": {}, "Z": [], "_a": [[]], "z": ""})
@example(state={"a": nested(12), "b": "x" * 300, "c": [-1.5e300] * 40})
def test_by_parts_is_as_at_once(size: int, state: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indented_json, "PART_BYTES", size)
        assert indent_object(body(state), ADDED) == at_once(state)


def test_a_document_of_many_parts_is_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        "deep": nested(190),
        "long": "é\\" * 300_000,
        "many": {f"{n:06}": {"n": n, "text": f'"{n}"'} for n in range(20_000)},
        "numbers": list(range(100_000)),
    }
    made = Document("notes", ("A b",), body(state), 3, "2026-01-01T00:00:00Z", "notes/1")
    by_parts = encode_document(made, {})
    monkeypatch.setattr(document, "_LARGE_BODY", 10**9)
    assert by_parts == encode_document(made, {})
    assert decode_document("notes", ("A b",), by_parts) == (made, {})
