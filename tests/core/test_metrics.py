"""Figures in Prometheus' format, as Prometheus' own parser reads them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agent_state import (
    MemoryStateStore,
    RevisionConflictError,
    StatePersistenceManager,
    StateValidationError,
    WALStateStore,
)
from agent_state.metrics import LatencyHistogram, Metric, to_prometheus


def parsed(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The samples by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@given(
    labels=st.dictionaries(
        st.sampled_from(["a", "b", "agent_type"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ),
    value=st.floats(allow_nan=False),
    text=st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), max_size=20),
)
def test_labels_values_and_descriptions_are_read_back(
    labels: dict[str, str], value: float, text: str
) -> None:
    page = to_prometheus([Metric("some.thing", text, [(labels, value)], unit="s")])

    [family] = text_string_to_metric_families(page)

    assert [(s.name, s.labels, s.value) for s in family.samples] == [
        ("some_thing_seconds", labels, value)
    ]
    assert family.type == "gauge"
    assert family.documentation == text


def test_a_lone_surrogate_in_a_label_does_not_break_the_page() -> None:
    page = to_prometheus([Metric("x", "", [({"a": "\ud800"}, 1.0)])])

    assert parsed(page.encode().decode()) == {"x": [({"a": "\\ud800"}, 1.0)]}


def test_a_counter_is_a_total() -> None:
    [family] = text_string_to_metric_families(
        to_prometheus([Metric("saves", "All.", [({}, 3.0)], "counter")])
    )

    assert (family.type, family.samples[0].name, family.samples[0].value) == (
        "counter", "saves_total", 3.0,
    )  # fmt: skip


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = LatencyHistogram("took", "How long.", bounds=(0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(seconds)

    found = parsed(to_prometheus([], [histogram]))

    assert found["took_seconds_bucket"] == [
        ({"le": "0.1"}, 2.0), ({"le": "1"}, 3.0), ({"le": "+Inf"}, 4.0),
    ]  # fmt: skip
    assert found["took_seconds_count"] == [({}, 4.0)]
    [(_, total)] = found["took_seconds_sum"]
    assert total == pytest.approx(7.65)


async def test_a_manager_measures_its_saves_and_counts_what_raises() -> None:
    async with StatePersistenceManager(store=MemoryStateStore()) as manager:
        await manager.save_agent_state("a", {"agent_id": "a"})
        with pytest.raises(RevisionConflictError):
            await manager.save("agents", "a", {"agent_id": "a"}, expected=7)
        with pytest.raises(StateValidationError):
            await manager.save_agent_state("a", {"agent_id": 3})  # it never reaches the store

    assert sum(manager.saves.seconds.counts) == 2
    assert manager.saves.errors == {"RevisionConflictError": 1}
    assert manager.saves.seconds.total > 0


async def test_the_journal_lags_while_files_are_not_written(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
        assert isinstance(manager.store, WALStateStore)
        async with manager.store._writing().lock:  # nothing is written back meanwhile
            await manager.save_agent_state("a", {"agent_id": "a"})
            await manager.append("events", "log", {"n": 1})
            lag = manager.journal_lag()
            await asyncio.sleep(0.02)
            later = manager.journal_lag()
        await manager.flush()
        after = manager.journal_lag()

    assert lag is not None
    assert later is not None
    assert after is not None
    assert (lag.documents, later.documents, after.documents) == (2, 2, 0)
    assert later.seconds >= lag.seconds + 0.02
    assert after.seconds == 0
    assert manager.journal_lag() is not None  # also once it is closed


async def test_a_store_without_a_journal_has_no_lag(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path / "state") as manager:
        assert manager.journal_lag() is None
