"""Copies of messages among logs: each counts once, and the owner's labels stay, in any order."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.testing import FakeClock
from agent_state_integrations.recorder.analytics.analysis import analyse
from agent_state_integrations.recorder.analytics.score import ScoreName
from agent_state_integrations.recorder.conversation import conversations
from agent_state_integrations.recorder.copies import CopyIndex
from agent_state_integrations.recorder.importers import import_logs
from agent_state_integrations.recorder.query import Query
from agent_state_integrations.recorder.reader import count, read, read_records
from agent_state_integrations.recorder.writer import RecordWriter

LABELS = {"chain_type": "ui_ux", "ace_tier": "A", "shl_tags": ["@Mine"], "keywords": ["lamp"]}


def plain(name: str = "m1", text: str = "The lamp is off.", **more: Any) -> dict[str, Any]:
    return {
        "Id": name,
        "Timestamp": "2026-05-01T10:00:00Z",
        "SpeakerName": "ada",
        "SpeakerRole": "Agent",
        "Message": text,
        "ConversationType": 0,
        "ContextId": "c",
        "Metadata": {},
        **more,
    }


def labelled(name: str = "m1", **more: Any) -> dict[str, Any]:
    return plain(name, Metadata=dict(LABELS), **more)


def at_the_top(name: str = "m1") -> dict[str, Any]:
    return {**plain(name), **LABELS}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def imported(state: Path, folder: Path) -> dict[str, dict[str, Any]]:
    with RecordWriter(state, clock=FakeClock()) as writer:
        assert import_logs([folder], writer).ok
    return {record["Id"]: record for _, record in read_records(state)}


@pytest.mark.parametrize("richer", [labelled, at_the_top])
@pytest.mark.parametrize("order", ["poor first", "rich first"])
@pytest.mark.parametrize("where", ["two files", "one file"])
def test_the_owners_labels_stay_whatever_comes_first(
    tmp_path: Path, richer: Any, order: str, where: str
) -> None:
    pair = [plain(), richer()] if order == "poor first" else [richer(), plain()]
    if where == "one file":
        write(tmp_path / "log" / "1.jsonl", *pair)
    else:
        for number, line in enumerate(pair):
            write(tmp_path / "log" / f"{number}.jsonl", line)
    (record,) = imported(tmp_path / "state", tmp_path / "log").values()
    assert {name: record["Metadata"][name] for name in LABELS} == LABELS


def test_copies_that_know_different_things_become_one_that_knows_all(tmp_path: Path) -> None:
    write(tmp_path / "log" / "1.jsonl", plain(Metadata={"chain_type": "ui_ux", "a": 1}))
    write(tmp_path / "log" / "2.jsonl", plain(Metadata={"ace_tier": "A"}, SpeakerName="unknown"))
    (record,) = imported(tmp_path / "state", tmp_path / "log").values()
    wanted = {"chain_type": "ui_ux", "a": 1, "ace_tier": "A"}
    assert wanted.items() <= record["Metadata"].items()
    assert record["SpeakerName"] == "ada"


def test_an_id_with_other_words_is_no_copy(tmp_path: Path) -> None:
    write(tmp_path / "log" / "1.jsonl", plain(), plain(text="The lamp is on."))
    assert len(imported(tmp_path / "state", tmp_path / "log")) == 2


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y"]), st.integers(0, 3))),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_lines_changes_nothing(
    lines: list[tuple[str, str, int]], random: Any
) -> None:
    def merged(order: list[tuple[str, str, int]]) -> set[bytes]:
        made = [
            orjson.dumps(plain(name, text, Metadata=dict(itertools.islice(LABELS.items(), known))))
            for name, text, known in order
        ]
        index = CopyIndex.of([(Path("a"), lambda: iter([made]))])
        (kept,) = index.without_copies(Path("a"), iter([made])) if made else ([],)
        return {
            orjson.dumps(each["Metadata"], option=orjson.OPT_SORT_KEYS) + each["Message"].encode()
            for each in map(orjson.loads, kept)
            if "Id" in each
        }

    shuffled = lines[:]
    random.shuffle(shuffled)
    assert merged(lines) == merged(shuffled)


def folder_with_copies(folder: Path) -> Path:
    """Three messages; two of them again, and all of them in a thread."""
    lines = [plain("a", "one"), plain("b", "two"), plain("c", "three")]
    write(folder / "1.jsonl", *lines)
    write(folder / "2.jsonl", labelled("a") | {"Message": "one"}, lines[1])
    write(folder / "3.jsonl", {"thread_id": "t", "messages": lines})
    return folder


def test_reading_a_folder_counts_what_importing_it_counts(tmp_path: Path) -> None:
    folder = folder_with_copies(tmp_path / "log")
    assert sorted(message.text for message in read(folder)) == ["one", "three", "two"]
    newest = [message.text for message in read(folder, Query(newest_first=True, limit=1))]
    assert len(newest) == 1
    assert count(folder) == 3
    assert {each.id: each.chain_type for each in read(folder)}["a"] == "ui_ux"
    (one,) = conversations(read_records(folder), shortest=timedelta(0))
    assert one.message_count == 3


def test_a_report_agrees_with_itself(tmp_path: Path) -> None:
    report = analyse(folder_with_copies(tmp_path / "log")).report()
    assert report["total_messages"] == report["total_items"] == 3
    for counts in ("speakers", "message_types", "chain_types", "ace_tiers", "timeline"):
        assert sum(report[counts].values()) == 3, counts
    assert report["copies_left_out"] == 5


def test_scores_and_counts_are_the_same_before_and_after_an_import(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    speakers = ["ada", "bob", "eve"]
    lines = [
        plain(f"m{n}", f"Should we test the cache {n}?", SpeakerName=speakers[n % 3], **top)
        for n in range(40)
        for top in [LABELS if n % 4 == 0 else {}]
    ]
    write(folder / "1.jsonl", *lines)
    write(folder / "2.jsonl", *lines[:20])
    imported(tmp_path / "state", folder)
    scores: tuple[ScoreName, ...] = ("spread", "legacy-nested")
    after: dict[str, Any] = {}
    for score in scores:
        before = analyse(folder, score_name=score).report()
        after = analyse(tmp_path / "state", score_name=score).report()
        same = ("total_messages", "speakers", "chain_types", "ace_tiers", "keywords", "timeline")
        assert {name: before[name] for name in same} == {name: after[name] for name in same}
        if score == "spread":
            assert before["score"] == after["score"]
    assert dict(after["keywords"])["lamp"] == 10
