"""What is counted in a log, whatever its lines look like and however many processes count."""

from __future__ import annotations

import gzip
from collections import Counter
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.errors import StateCorruptedError, StateNotFoundError, StateValidationError
from agent_state.testing import FakeClock
from agent_state_integrations.recorder.analytics import analysis as analytics_module
from agent_state_integrations.recorder.analytics import summary as summary_module
from agent_state_integrations.recorder.analytics import workers as workers_module
from agent_state_integrations.recorder.analytics.analysis import LogAnalysis, analyse
from agent_state_integrations.recorder.analytics.summary import BoundedCounter
from agent_state_integrations.recorder.analytics.tokens import Prices
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.rules import Rules

NOW = datetime(2026, 11, 21, 17, 9, 21, tzinfo=UTC)

_NUMBERS = count(1)


def record(text: object = "hello", **other: Any) -> dict[str, Any]:
    return {
        "Id": f"message-{next(_NUMBERS)}",
        "Timestamp": "2026-01-01T10:00:00.000000Z",
        "SpeakerName": "ada",
        "SpeakerRole": "Agent",
        "Message": text,
        "ConversationType": 0,
        "ContextId": "one",
        "Metadata": {},
    } | other


def told(**other: Any) -> dict[str, Any]:
    return {
        "chain_type": "ui_ux",
        "ace_tier": "A",
        "shl_tags": ["@T"],
        "keywords": ["k"],
    } | other


def write(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else orjson.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n" if lines else b"")
    return path


def report(path: Path, **options: Any) -> dict[str, Any]:
    return analyse(path, clock=FakeClock(NOW), **options).report()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_all_fields_are_there_for_an_empty_log(log: Path) -> None:
    found = report(write(log))
    assert {name: found[name] for name in list(found)[:13]} == {
        "total_messages": 0,
        "timestamp": "2026-11-21T17:09:21.000000Z",
        "total_items": 0,
        "total_messages_within_threads": 0,
        "is_defragmented": False,
        "collaboration_score": None,
        "speakers": {},
        "message_types": {},
        "chain_types": {},
        "ace_tiers": {},
        "keywords": [],
        "timeline": {},
        "metadata_insights": {
            "shl_tags_frequency": {},
            "consolidation_ratio": {
                "consolidated_count": 0,
                "total_count": 0,
                "consolidation_percentage": 0.0,
            },
            "content_hash_coverage": 0.0,
            "content_hash_count": 0,
            "content_hash_percentage": 0.0,
        },
    }


def test_everything_is_counted(log: Path) -> None:
    rows = [
        record("one", Metadata=told(consolidated=True, content_hash="x")),
        record("two", SpeakerName="bob", ConversationType=1, Metadata=told(keywords=["k", "l"])),
        record("two", Timestamp="2026-01-02T10:00:00.000000Z", Metadata=told(ace_tier="E")),
        record("", Metadata=told(shl_tags=["@S", "@T"])),
    ]
    found = report(write(log, *rows))
    assert found["total_items"] == found["total_messages_within_threads"] == 4
    assert found["speakers"] == {"ada": 3, "bob": 1}
    assert found["message_types"] == {"0": 3, "1": 1}
    assert found["chain_types"] == {"ui_ux": 4}
    assert found["ace_tiers"] == {"A": 3, "E": 1}
    assert found["keywords"] == [["k", 4], ["l", 1]]
    assert found["timeline"] == {"2026-01-01": 3, "2026-01-02": 1}
    assert found["metadata_insights"] == {
        "shl_tags_frequency": {"@T": 4, "@S": 1},
        "consolidation_ratio": {
            "consolidated_count": 1,
            "total_count": 4,
            "consolidation_percentage": 25.0,
        },
        "content_hash_coverage": 25.0,
        "content_hash_count": 1,
        "content_hash_percentage": 25.0,
    }
    assert (found["empty_messages"], found["distinct_messages"]) == (1, 2)
    assert (found["repeated_messages"], found["enriched_messages"]) == (1, 0)


def test_what_a_record_carries_is_used_and_rules_tell_the_rest(log: Path) -> None:
    write(
        log,
        record("fix the cache", Metadata=told(chain_type="mine")),
        record("fix the cache", chain_type="at the top", shl_tags=["@Top"]),
        record("fix the cache"),
        record("the latest guide"),
    )
    standard = report(log)
    assert standard["chain_types"] == {
        "at the top": 1, "data_management": 1, "mine": 1, "unknown": 1,
    }  # fmt: skip
    assert standard["enriched_messages"] == 3
    assert standard["metadata_insights"]["shl_tags_frequency"]["@Top"] == 1
    legacy = report(log, rules=Rules.load("legacy"))
    assert legacy["chain_types"]["ui_ux"] == 1
    assert legacy["rules"] == "legacy"
    assert legacy["keywords"] == [["k", 1]]


@pytest.mark.parametrize(
    ("given", "day"),
    [
        ("2026-01-01T23:59:59.999999Z", "2026-01-01"),
        ("2026-01-01T23:59:59", "2026-01-01"),
        ("2026-01-01 23:59:59", "2026-01-01"),
        ("2026-01-01T23:59:59.1234567Z", "2026-01-01"),
        ("2026-01-01T23:59:59.1234567", "2026-01-01"),
        ("2026-01-01T23:59:59-02:00", "2026-01-02"),
        ("2026-01-01T00:30:00.000+02:00", "2025-12-31"),
        ("2026-01-01T00:30:00.12345+02:00", "2025-12-31"),
        (1767312000, "2026-01-02"),
    ],
)
def test_the_timeline_is_of_utc_days(log: Path, given: object, day: str) -> None:
    for other in ([], [record(Timestamp="2020-01-01T00:00:00.000000Z", Metadata=told())]):
        write(log, record(Timestamp=given, Metadata=told()), *other)
        assert report(log)["timeline"].get(day) == 1


def test_the_timeline_is_sorted_where_the_log_is_not(log: Path) -> None:
    days = ["2026-03-01", "2026-01-01", "2026-02-01"]
    write(log, *(record(Timestamp=f"{day}T00:00:00Z") for day in days))
    assert list(report(log)["timeline"]) == sorted(days)


def test_lines_that_hold_no_message_are_left_out_and_counted(log: Path) -> None:
    write(log, b"garbage", record(), b'{"torn": ', b"[1]", b"5", b"", b'{"no": "content"}')
    with log.open("ab") as file:
        file.write(b'{"half a li')
    found = report(log)
    assert found["total_items"] == 1
    assert found["skipped_lines"]["count"] == 7
    assert found["skipped_lines"]["reasons"]["not JSON"] == 3


def test_the_last_line_counts_without_its_newline(log: Path) -> None:
    log.write_bytes(orjson.dumps(record()))
    assert report(log)["total_items"] == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"SpeakerName": 7},
        {"SpeakerName": None},
        {"ContextId": None},
        {"ContextId": 5},
        {"ConversationType": None},
        {"ConversationType": 1.5},
        {"Metadata": None},
        {"Metadata": "text"},
        {"Metadata": told(shl_tags="@T")},
        {"Metadata": told(shl_tags=[["@T"]])},
        {"Metadata": told(keywords=[1, "k"])},
        {"Metadata": told(keywords=None)},
        {"Metadata": told(chain_type=5)},
        {"Metadata": told(chain_type=["x"])},
        {"Metadata": told(ace_tier={})},
        {"Message": '{"message": "inside"}'},
        {"Message": {"message": "inside"}},
        {"Message": "{}"},
        {"Timestamp": "2026-02-31T00:00:00.000000Z"},
        {"Timestamp": "yesterday"},
        {"Timestamp": None},
        {"Timestamp": "2026-01-01T10:00:00\n0.00000Z"},
    ],
)
def test_one_odd_message_neither_stops_nor_spoils_the_others(
    log: Path, odd: dict[str, Any]
) -> None:
    plain = record("plain", Metadata=told())
    write(log, plain, record("odd") | odd, record("plain", Metadata=told()))
    found = report(log)
    assert found["total_items"] == 3
    assert found["speakers"]["ada"] >= 2
    assert found["chain_types"]["ui_ux"] >= 2
    assert sum(found["timeline"].values()) == 3
    assert sum(found["message_types"].values()) == 3


def test_the_text_inside_of_json_is_what_counts(log: Path) -> None:
    write(log, record('{"message": "hi"}', Metadata=told()), record("hi", Metadata=told()))
    assert report(log)["repeated_messages"] == 1


def test_conversations_count_with_their_messages(log: Path) -> None:
    thread = {"thread_id": "t", "message_count": 2, "messages": [record("a"), record("b")]}
    other = {**thread, "messages": [record("a"), record("b")]}
    found = report(write(log, thread, other))
    assert (found["is_defragmented"], found["total_items"]) == (True, 2)
    assert found["total_messages_within_threads"] == 4


def test_a_folder_of_logs_is_one_log(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", record("first", SpeakerName="bob"))
    write(tmp_path / "b.jsonl", record("first"), record("second"))
    found = report(tmp_path)
    assert (found["total_items"], found["distinct_messages"]) == (3, 2)


def test_packed_logs_count_like_plain_ones_also_in_children(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        folder.mkdir()
        for name in ("a", "b", "c"):
            _long_log(folder / f"{name}.jsonl", 300)
    for log in list(packed.iterdir()):
        log.with_name(f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes()))
        log.unlink()
    expected = _same(analyse(plain)) | {"source": str(packed)}
    assert expected["total_items"] == 891
    assert _same(analyse(packed, workers=1)) == expected
    assert _same(analyse(packed, workers=3)) == expected


def test_a_packed_log_that_is_damaged_is_named_also_by_children(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        _long_log(tmp_path / f"{name}.jsonl", 300)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-9])
    for workers in (1, 3):
        with pytest.raises(StateCorruptedError, match=r"d\.jsonl\.gz"):
            analyse(tmp_path, workers=workers)


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateNotFoundError):
        report(tmp_path / "nothing")


def _long_log(path: Path, count: int) -> None:
    write(
        path,
        *(
            record(
                f"what about {number % 1500}?",
                SpeakerName=f"agent {number % 7}",
                ContextId=f"context {number // 10}",
                Timestamp=f"2026-01-{1 + number * 27 // count:02d}T10:00:00.000000Z",
                Metadata=told(keywords=[f"word {number * number % 5003}"]) if number % 3 else {},
                **({"_seq": number} if number % 2 else {}),
            )
            if number % 100
            else b"garbage"
            for number in range(1, count + 1)
        ),
    )


def _same(analysis: LogAnalysis) -> dict[str, Any]:
    return analysis.report() | {"timestamp": ""}


def test_the_result_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics_module, "RANGE", 200_000)
    for name in ("a.jsonl", "b.jsonl"):
        _long_log(tmp_path / name, 3000)
    alone = _same(analyse(tmp_path, workers=1))
    assert alone["total_items"] == 5940
    assert alone["skipped_lines"] == {"count": 60, "reasons": {"not JSON": 60}}
    assert _same(analyse(tmp_path, workers=2)) == alone
    assert _same(analyse(tmp_path, workers=4)) == alone


def test_the_parts_of_a_file_are_cut_between_lines(log: Path, monkeypatch: Any) -> None:
    _long_log(log, 500)
    whole = _same(analyse(log))
    for size in (1, 700, 5000):
        monkeypatch.setattr(analytics_module, "RANGE", size)
        assert _same(analyse(log)) == whole


def test_what_a_child_could_not_do_is_done_here(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analytics_module, "RANGE", 50_000)
    _long_log(log, 2000)
    whole = _same(analyse(log, workers=1))
    monkeypatch.setattr(workers_module, "PROGRAM", "import sys; sys.stdin.readline(); sys.exit(1)")
    assert _same(analyse(log, workers=3)) == whole


def test_a_log_that_gets_another_name_meanwhile_is_read_on(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics_module, "RANGE", 50_000)
    _long_log(log, 2000)
    whole = _same(analyse(log, workers=1))
    parts = analytics_module._parts

    def renamed(found: Any, copies: Any) -> Any:
        for number, part in enumerate(parts(found, copies)):
            if number == 1:
                log.rename(log.with_name("moved"))
                write(log, record())
            yield part

    monkeypatch.setattr(analytics_module, "_parts", renamed)
    assert _same(analyse(log, workers=2)) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_a_packed_log_that_is_removed_meanwhile_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    for number in range(3):
        line = orjson.dumps(record(f"text {number}")) + b"\n"
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(line))
    parts = analytics_module._parts

    def removed(found: Any, copies: Any) -> Any:
        for part in parts(found, copies):
            part.path.unlink()
            yield part

    monkeypatch.setattr(analytics_module, "_parts", removed)
    assert analyse(tmp_path, workers=workers).summary.messages == 3


def test_counters_hold_so_many_names_and_put_the_rest_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(summary_module, "BOUND", 10)
    counter = BoundedCounter()
    for number in range(100):
        counter.add({f"name {number:02d}": 1, "often": 1})
        counter.trim()
        assert len(counter.counts) <= 10
    assert counter.counts["often"] == 100
    assert counter.total() + counter.other == 200
    counter.add({"x" * 1000: 1})
    counter.trim()
    assert max(map(len, counter.counts)) == summary_module.LONGEST_NAME


def test_many_speakers_are_shown_with_the_rest_as_other(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary_module, "BOUND", 10)
    write(log, *(record(SpeakerName=f"s{n % 40}") for n in range(1000)))
    speakers = report(log)["speakers"]
    assert "other" in speakers
    assert sum(speakers.values()) == 1000


speakers = st.sampled_from(["ada", "bob", "", None, 5])
stamps = st.sampled_from(
    ["2026-01-01T10:00:00.000000Z", "2026-01-02T23:00:00", "2026-01-02T23:00:00-02:00", 1767312000]
)
texts = st.sampled_from(["fix the cache", "Should we use Redis?", '{"text": "hi"}', "{}", "", "ok"])
carried = st.fixed_dictionaries(
    {},
    optional={
        "chain_type": st.sampled_from(["ui_ux", "mine", None]),
        "ace_tier": st.sampled_from(["A", "none"]),
        "shl_tags": st.lists(st.sampled_from(["@S", "@T"]), max_size=2),
        "keywords": st.lists(st.sampled_from(["k", "l"]), max_size=2),
        "content_hash": st.just("x"),
    },
)
whole = st.fixed_dictionaries(
    {
        "chain_type": st.sampled_from(["ui_ux", "mine"]),
        "ace_tier": st.sampled_from(["A", "none"]),
        "shl_tags": st.lists(st.sampled_from(["@S", "@T"]), max_size=2),
        "keywords": st.lists(st.sampled_from(["k", "l"]), max_size=2),
    }
)
top = st.fixed_dictionaries(
    {},
    optional={
        "SpeakerName": speakers,
        "Timestamp": stamps,
        "Metadata": st.one_of(carried, whole, st.none()),
        "chain_type": st.just("top"),
        "ConversationType": st.sampled_from([0, 1, "one", None]),
    },
)
ours = st.builds(lambda meta: {"Metadata": meta, "_seq": 1}, whole)
lacking = st.builds(lambda meta: {"Metadata": meta}, carried)


@given(
    st.one_of(
        *(
            st.lists(st.tuples(texts, kind), max_size=6)
            for kind in (ours, lacking, st.one_of(ours, lacking, top))
        )
    ),
    st.sampled_from(["standard", "legacy"]),
)
def test_what_is_counted_at_once_is_what_reading_finds(
    said: list[tuple[str, dict[str, Any]]], name: str
) -> None:
    rules = Rules.load(name)
    with TemporaryDirectory() as folder:
        log = write(Path(folder, "log.jsonl"), *(record(text, **other) for text, other in said))
        summary = analyse(log, rules=rules).summary
        found = [message for _, message in read_records(log, rules=rules)]
    metas = [message["Metadata"] for message in found]
    assert summary.messages == len(found)
    assert summary.speakers.counts == Counter(message["SpeakerName"] for message in found)
    assert summary.message_types.counts == Counter(str(m["ConversationType"]) for m in found)
    assert summary.days.counts == Counter(message["Timestamp"][:10] for message in found)
    assert summary.chain_types.counts == Counter(str(meta["chain_type"]) for meta in metas)
    assert summary.ace_tiers.counts == Counter(meta["ace_tier"] for meta in metas)
    assert summary.shl_tags.counts == Counter(tag for meta in metas for tag in meta["shl_tags"])
    assert summary.keywords.counts == Counter(k for m in metas for k in m.get("keywords", []))
    assert summary.empty == sum(not message["Message"].strip("{}") for message in found)


def test_tokens_by_agent_model_and_day_with_what_they_cost(log: Path, tmp_path: Path) -> None:
    used = {"input_tokens": 1_000_000, "output_tokens": 500_000, "cache_read_tokens": 0}
    rows = [
        record("a", Metadata={"usage": used, "model": "big-1"}),
        record("b", Metadata={"usage": used, "model": "big-2"}, SpeakerName="bob"),
        record("c", Metadata={"usage": {"output_tokens": 7}, "model": "small"}),
        record("d", Metadata={"usage": "much"}),
    ]
    write(log, *rows)
    plain = report(log)["tokens"]
    assert plain["total"]["output_tokens"] == 1_000_007
    assert (plain["currency"], plain["models_without_price"]) == (None, [])
    table = tmp_path / "prices.toml"
    table.write_text('currency = "EUR"\n["big-*"]\ninput = 3.0\noutput = 10.0\n')
    found = report(log, prices=Prices.load(table))["tokens"]
    assert found["by_model"]["big-1"]["cost"] == 8.0
    assert found["by_agent"]["ada"] == {
        "input_tokens": 1_000_000,
        "output_tokens": 500_007,
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "cost": 8.0,
    }
    assert list(found["by_day"]) == ["2026-01-01"]
    assert (found["total"]["cost"], found["currency"]) == (16.0, "EUR")
    assert found["models_without_price"] == ["small"]


@pytest.mark.parametrize("text", ['["big"]\ninput = "3"', '["big"]\nprice = 1', "currency = ["])
def test_a_table_of_prices_is_checked(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(StateValidationError):
        Prices.load(path)
