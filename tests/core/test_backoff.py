"""The pauses between attempts."""

from __future__ import annotations

from random import Random

from agent_state.clock import Backoff


def test_pauses_double_up_to_the_longest_and_start_again() -> None:
    backoff = Backoff(0.05, 0.3)
    assert [backoff.pause() for _ in range(5)] == [0.05, 0.1, 0.2, 0.3, 0.3]
    assert backoff.attempts == 5
    backoff.reset()
    assert backoff.attempts == 0
    assert backoff.pause() == 0.05


def test_the_pause_does_not_overflow_after_many_attempts() -> None:
    backoff = Backoff(0.1, 2.0)
    assert [backoff.pause() for _ in range(3000)][-1] == 2.0


def test_jitter_takes_off_up_to_a_half() -> None:
    pauses = Backoff(1.0, 1.0, random=Random(1))
    drawn = [pauses.pause() for _ in range(1000)]
    assert all(0.5 <= pause <= 1.0 for pause in drawn)
    assert min(drawn) < 0.55
    assert max(drawn) > 0.95
