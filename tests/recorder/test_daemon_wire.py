"""The protocol's laws: what is packed comes back, and nothing else is taken for it."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.network.wire import is_local

FRAMES = st.lists(st.binary(max_size=20), max_size=4)
NUMBERS = st.integers(0, 2**64 - 1)


@given(st.binary(min_size=1), st.booleans(), NUMBERS, st.lists(st.binary()))
def test_a_request_comes_back(
    sender: bytes, delimiter: bool, number: int, messages: list[bytes]
) -> None:
    envelope = [sender, b""] if delimiter else [sender]
    found = wire.parse_request([*envelope, *wire.request(number, messages)])
    assert found == wire.Request(envelope, number, messages)


@given(NUMBERS, st.lists(st.builds(wire.Receipt, st.just("recorded"), st.text(), NUMBERS)))
def test_an_answer_comes_back(number: int, receipts: list[wire.Receipt]) -> None:
    frames = wire.answer([b"sender"], number, receipts)
    assert frames[0] == b"sender"
    assert wire.parse_answer(frames[1:]) == (number, receipts)
    assert wire.parse_answer(wire.refusal([], number, "why")) == (number, "why")


@given(st.binary(min_size=1), FRAMES)
def test_anything_else_is_refused_by_its_name(sender: bytes, frames: list[bytes]) -> None:
    with suppress(wire.WireFormatError):
        wire.parse_answer(frames)
    with suppress(wire.WireFormatError):
        wire.parse_request([sender, *frames])
    assert wire.envelope_of([sender, *frames])[0] == sender


def test_which_endpoints_are_of_this_machine() -> None:
    for endpoint in ("tcp://127.0.0.1:1", "tcp://127.9.9.9:*", "tcp://[::1]:1", "ipc:///tmp/x"):
        assert is_local(endpoint), endpoint
    for endpoint in (
        "tcp://*:1",
        "tcp://0.0.0.0:*",
        "tcp://10.0.0.1:1",
        "tcp://eth0:1",
        "tcp://[x",
    ):
        assert not is_local(endpoint), endpoint
