"""The states of a task, as pure functions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import RetryPolicy, StateValidationError, Task
from agent_state.runtime import transitions as rules

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make(**changes: object) -> Task:
    options = {"max_attempts": 3, **changes}
    return rules.new_task("t", "alice", "read", {"file": "a"}, now=NOW, **options)  # type: ignore[arg-type]


def test_a_claim_counts_the_attempt_and_gives_a_lease() -> None:
    task = rules.claim(make(), "me", NOW)
    assert (task.status, task.attempts) == ("in_progress", 1)
    assert task.model_dump()["lease"] == {"owner": "me"}


def test_a_claim_carries_the_fencing_token_of_its_owner() -> None:
    task = rules.claim(make(), "me", NOW, token=7)
    assert task.model_dump()["lease"] == {"owner": "me", "token": 7}


def test_a_lease_of_an_older_version_keeps_its_end() -> None:
    lease = {"owner": "x", "expires_at": "2026-01-01T00:00:00.000000Z"}
    task = Task.model_validate({"task_id": "t", "status": "in_progress", "lease": lease})
    assert task.model_dump()["lease"] == lease


def test_a_failure_waits_and_the_last_one_is_a_dead_letter() -> None:
    task, policy, random = make(), RetryPolicy(jitter=0), Random(0)
    for pause in (1, 2):
        task = rules.fail(rules.claim(task, "me", NOW), "no", NOW, policy, random)
        assert task.status == "failed"
        assert rules.due_at(task) == NOW + timedelta(seconds=pause)
    task = rules.fail(rules.claim(task, "me", NOW), "no", NOW, policy, random)
    assert (task.status, task.error, task.lease) == ("dead", "no", None)


def test_an_interruption_uses_up_no_attempt_but_many_end_it() -> None:
    task, policy = make(max_attempts=1), RetryPolicy(max_interruptions=2)
    for _ in range(2):
        task = rules.interrupt(rules.claim(task, "me", NOW), NOW, policy)
        assert task.status == "pending"
    failed = rules.fail(rules.claim(task, "me", NOW), "no", NOW, policy, Random(0))
    assert failed.status == "dead"
    task = rules.interrupt(rules.claim(task, "me", NOW), NOW, policy)
    assert task.status == "dead"
    assert "died 3 times" in (task.error or "")


def test_what_is_release_is_as_if_never_claimed() -> None:
    task = make()
    back = rules.release(rules.claim(task, "me", NOW))
    assert (back.status, back.attempts, back.lease) == ("pending", 0, None)


def test_priority_goes_before_age() -> None:
    tasks = [make(priority=word) for word in ("low", "urgent", "normal", "high")]
    assert [task.priority for task in sorted(tasks, key=rules.order)] == [
        "urgent",
        "high",
        "normal",
        "low",
    ]


def test_a_priority_that_is_no_word_of_ours_is_refused() -> None:
    with pytest.raises(StateValidationError, match="'huge' is not one of"):
        make(priority="huge")


@given(st.integers(1, 5000), st.floats(0, 1), st.integers())
def test_a_pause_is_never_longer_than_the_longest_with_its_jitter(
    failures: int, jitter: float, seed: int
) -> None:
    policy = RetryPolicy(jitter=jitter)
    pause = policy.delay(failures, Random(seed))
    assert 0 <= pause <= policy.max_seconds * (1 + jitter)


@given(st.lists(st.sampled_from(["fail", "interrupt", "release", "complete"]), max_size=40))
def test_no_way_leads_out_of_a_final_state_or_past_the_attempts(ways: list[str]) -> None:
    task, policy, random = make(), RetryPolicy(), Random(0)
    for way in ways:
        if rules.is_finished(task):
            break
        task = rules.claim(task, "me", NOW)
        if way == "fail":
            task = rules.fail(task, "no", NOW, policy, random)
        elif way == "interrupt":
            task = rules.interrupt(task, NOW, policy)
        elif way == "release":
            task = rules.release(task)
        else:
            task = rules.complete(task, 1, NOW)
        assert task.lease is None
    assert task.attempts - task.interruptions <= task.max_attempts
