"""The collaboration score: two old formulas, and one that nothing empty or repeated raises."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.testing import FakeClock
from agent_state_integrations.recorder.analytics import summary as summary_module
from agent_state_integrations.recorder.analytics.score import SCORES, Score, ScoreName, score
from agent_state_integrations.recorder.analytics.summary import LARGEST, LogSummary
from agent_state_integrations.recorder.analytics.summary_builder import SummaryBuilder
from agent_state_integrations.recorder.lines import LineParser, SkippedLines
from agent_state_integrations.recorder.rules import Rules

STANDARD = Rules.load()


def summarize_part(records: list[dict[str, Any]]) -> LogSummary:
    fold = SummaryBuilder(
        STANDARD, LineParser("log", FakeClock().now(), SkippedLines()), 0, LARGEST
    )
    fold.add([orjson.dumps(record) for record in records])
    return fold.summary


def scored(records: list[dict[str, Any]], name: ScoreName = "spread") -> Score:
    return score(summarize_part(records), name)


def record(text: str, speaker: str = "ada", **other: Any) -> dict[str, Any]:
    return {
        "Id": "1",
        "Timestamp": "2026-01-01T10:00:00",
        "SpeakerName": speaker,
        "SpeakerRole": "Agent",
        "Message": text,
        "ConversationType": 0,
        "ContextId": "one",
        "Metadata": {},
    } | other


CHAINS = (
    "system_architecture", "ui_ux", "agent_collaboration", "testing_validation", "data_management",
    "photo_capture", "reconstruction", "quality_assessment", "unity_integration",
)  # fmt: skip


def real_composition() -> list[dict[str, Any]]:
    """2,367 consolidated rows, tagged at the top level too, and 10 live rows that are not."""
    rows = []
    for number in range(2377):
        found = {
            "chain_type": CHAINS[number % 9],
            "ace_tier": "E",
            "shl_tags": [f"@Chain-{CHAINS[number % 9]}"],
        }
        live = number >= 2367
        speaker = ("claude_code" if number % 2 else "gemini_cli") if live else "consolidated"
        top = {} if live else found
        consolidated = {} if live else {"consolidated": True}
        rows.append(record(f"row {number}", speaker, Metadata={**found, **consolidated}, **top))
    return rows


def test_the_old_formula_gives_what_it_gave() -> None:
    rows = real_composition()
    assert scored(rows, "legacy-flat").value == 99.92
    assert scored(rows, "legacy-nested").value == 98.0


def test_the_flat_lookup_takes_unknown_for_a_domain() -> None:
    parts = {part.name: part for part in scored(real_composition(), "legacy-flat").parts}
    assert parts["Domain Coverage"].points == 20
    assert "10 domains" in parts["Domain Coverage"].reason
    assert parts["SHL Tagging"].reason == "2367 of 2377 messages have tags"


def test_a_hundred_empty_messages_are_perfect_for_the_old_formula_and_nothing_for_ours() -> None:
    rows = [
        record(
            "{}",
            f"agent {number % 3}",
            Metadata={"chain_type": f"chain {number % 10}", "shl_tags": ["@Decision-Made"]},
        )
        for number in range(100)
    ]
    assert scored(rows, "legacy-nested").value == 100.0
    assert scored(rows).value == 0.0


def test_the_old_formula_is_of_what_records_carry_and_not_of_what_rules_add() -> None:
    rows = [record("fix the cache")]
    assert scored(rows, "legacy-nested").value == round(0.2 * (100 / 3 + 10 + 1), 2)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "none"])
def test_an_empty_log_scores_nothing_and_says_why(name: ScoreName) -> None:
    found = scored([], name)
    assert found.value == 0.0
    assert len(found.parts) == 5
    assert all(part.reason and part.most == 20 for part in found.parts)


def test_a_monologue_has_no_balance_and_no_exchange() -> None:
    rows = [record(f"we decided {number}") for number in range(50)]
    parts = {part.name: part.points for part in scored(rows).parts}
    assert (parts["Balance"], parts["Exchange"]) == (0, 0)
    assert parts["Resolution"] > 10


def test_names_that_are_nobody_do_not_count_as_speakers() -> None:
    rows = [
        record(f"say {number}", ("ada", "unknown", "Consolidated", "system")[number % 4])
        for number in range(80)
    ]
    parts = {part.name: part for part in scored(rows).parts}
    assert parts["Balance"].points == 0
    assert parts["Balance"].reason.startswith("only one speaker")


def test_people_who_talk_to_each_other_score_more_than_people_who_talk_past_each_other() -> None:
    texts = [f"{text} {n}" for n in range(30) for text in ("what do you think?", "we decided it")]
    together = [record(text, "ada" if n % 2 else "bob") for n, text in enumerate(texts)]
    apart = [row | {"ContextId": row["SpeakerName"]} for row in together]
    assert (scored(together).value or 0) > (scored(apart).value or 0)
    assert {p.name: p.points for p in scored(apart).parts}["Exchange"] == 0


def test_each_part_adds_up_to_the_score() -> None:
    rows = [record(f"should we test {n} or fix it?", f"agent {n % 3}") for n in range(40)]
    found = scored(rows)
    assert found.value == round(sum(part.points for part in found.parts), 2)
    assert found.to_object()["parts"][0].keys() == {"name", "points", "most", "reason"}


speakers = st.sampled_from(["ada", "bob", "cyd", "unknown", "dee"])
texts = st.one_of(
    st.sampled_from(["We decided to use ZMQ", "Which cache?", "Fix the database", "done", "ok"]),
    st.text(max_size=20),
)
metadata = st.fixed_dictionaries(
    {},
    optional={
        "chain_type": st.sampled_from(["ui_ux", "none", "mine"]),
        "ace_tier": st.sampled_from(["A", "C", "E", "none"]),
        "shl_tags": st.lists(st.sampled_from(["@Decision-Made", "@Question-Open"]), max_size=2),
        "keywords": st.just([]),
    },
)
rows = st.builds(
    lambda text, speaker, context, meta: record(text, speaker, ContextId=context, Metadata=meta),
    texts, speakers, st.sampled_from(["one", "two"]), metadata,
)  # fmt: skip
changes = st.sampled_from(
    [
        str.upper,
        str.lower,
        str.swapcase,
        str.title,
        lambda text: f"\n {text}\u00a0 ",
        lambda text: text.replace(" ", "\t\u2003 "),
        lambda text: f"{text}!",
        lambda text: text,
    ]
)
nothings = st.sampled_from(["", " ", "{}", "[]", "null", "...", "\u2003", "🙂", "?!", "NULL"])


@given(st.data())
def test_nothing_empty_or_repeated_changes_the_default_score(data: st.DataObject) -> None:
    log = data.draw(st.lists(rows, max_size=12))
    before = scored(log)
    grown = list(log)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(grown)))
        row = dict(data.draw(rows))
        if at and data.draw(st.booleans()):
            said = data.draw(st.sampled_from(grown[:at]))["Message"]
            row["Message"] = data.draw(changes)(said)
        else:
            row["Message"] = data.draw(nothings)
        row["Id"] = "another"
        grown.insert(at, row)
    assert scored(grown) == before


@given(st.lists(texts, min_size=1, max_size=60))
def test_a_sample_is_the_same_however_often_and_in_which_parts_texts_come(
    said: list[str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary_module, "SAMPLE", 8)
        whole = summarize_part([record(text) for text in said])
        once = summarize_part([record(text) for text in dict.fromkeys(said)])
        parts = LogSummary()
        for start in range(0, len(said), 7):
            fold = SummaryBuilder(
                STANDARD,
                LineParser("log", FakeClock().now(), SkippedLines()),
                start,
                parts.sample.limit,
            )
            fold.add([orjson.dumps(record(text)) for text in said[start : start + 7]])
            parts.merge(
                LogSummary.from_object(orjson.loads(orjson.dumps(fold.summary.to_object())))
            )
        assert len(whole.sample.said()) <= len(set(said))
        assert score(whole) == score(once) == score(parts)
        assert whole.sample.distinct(len(said)) == parts.sample.distinct(len(said))


def test_a_sample_of_a_long_log_is_bounded_and_tells_how_many_texts_there_are() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary_module, "SAMPLE", 256)
        found = summarize_part([record(f"message number {n % 4000}") for n in range(8000)])
        assert len(found.sample.said()) == 256
        assert found.sample.distinct(8000) == 4000


def test_by_default_there_is_no_score_that_randomness_could_raise() -> None:
    from random import Random

    random = Random(7)
    words = ("We decided on the cache.", "Should we test the design?", "The build is done.")
    rows = [
        record(f"{random.choice(words)} {number}", random.choice(("ada", "bob", "eve")))
        for number in range(300)
    ]
    assert score(summarize_part(rows)).value is None
    assert "random" in score(summarize_part(rows), "spread").to_object()["limits"]
