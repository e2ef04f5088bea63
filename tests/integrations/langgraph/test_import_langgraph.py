"""``agent-state import langgraph``: what a SqliteSaver has stored, in a state directory."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from agent_state.cli.app import run as main
from agent_state_integrations.langgraph import AgentStateSaver, AgentStateStore
from tests.integrations.langgraph.interrupted_graph import graph_on

sqlite = pytest.importorskip("langgraph.checkpoint.sqlite", reason="langgraph-checkpoint-sqlite")
sqlite_vec = pytest.importorskip("sqlite_vec", reason="langgraph-checkpoint-sqlite")
stores = pytest.importorskip("langgraph.store.sqlite", reason="langgraph-checkpoint-sqlite")


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Two threads, each interrupted."""
    path = tmp_path / "old.db"
    with sqlite.SqliteSaver.from_conn_string(str(path)) as old:
        for thread in ("a/b", "two"):
            work = {"messages": [HumanMessage(thread, id=thread)], "steps": 0}
            graph_on(old).invoke(work, config(thread))
    return path


def test_a_graph_goes_on_from_the_imported_database(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    with sqlite.SqliteSaver.from_conn_string(str(database)) as old:
        expected = len([*old.list(None)])
        before = graph_on(old).get_state(config("a/b"))
    content = database.read_bytes()
    command = ["import", "langgraph", str(database), "--state", str(state)]

    assert main([*command, "--dry-run"]) == 0
    assert "of 2 threads would be brought over" in capsys.readouterr().out
    assert not state.exists()
    for _ in range(2):  # the second run changes nothing
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {"threads": 2, "checkpoints": expected, "items": 0, "refused": {}}
    assert database.read_bytes() == content
    with AgentStateSaver(state) as saver:
        assert len([*saver.list(None)]) == expected
        after = graph_on(saver).get_state(config("a/b"))
        assert after.values == before.values
        assert [task.interrupts for task in after.tasks] == [
            task.interrupts for task in before.tasks
        ]


def test_a_file_that_is_no_database_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no database")
    for name in ("text", "missing"):
        assert main(["import", "langgraph", str(tmp_path / name), "--state", str(tmp_path)]) == 2
        assert "no checkpoints can be read" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def letters(texts: list[str]) -> list[list[float]]:
    """What a text means here: how many a and b it has."""
    return [[float(text.count("a")), float(text.count("b")) + 0.25] for text in texts]


def in_utc(item: dict[str, Any]) -> dict[str, Any]:
    """The item with the zone that the other store leaves out."""
    return item | {name: f"{item[name]}+00:00" for name in ("created_at", "updated_at")}


def add_vectors(database: Path) -> None:
    """What an index writes: this Python may be unable to load SQLite's extension for it."""
    with closing(sqlite3.connect(database)) as opened, opened:
        for statement in stores.base.VECTOR_MIGRATIONS:
            opened.executescript(statement)
        for key, name, vector in (
            ("one", "text", [3.0, 0.25]),
            ("two", "text", [0.0, 1.25]),
            ("two", "tags[*].0", [1.0, 1.25]),
        ):
            opened.execute(
                "INSERT INTO store_vectors (prefix, key, field_name, embedding)"
                " VALUES ('users.ann', ?, ?, ?)",
                (key, name, sqlite_vec.serialize_float32(vector)),
            )


def test_the_items_of_a_store_keep_their_times_and_vectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = tmp_path / "old.db", tmp_path / "state"
    index: Any = {"dims": 2, "embed": letters, "fields": ["text", "tags[*]"]}
    with stores.SqliteStore.from_conn_string(str(path)) as old:
        old.setup()
        old.put(("users", "ann"), "one", {"text": "aaa", "b": 1, "a": [None, 1.5]})
        old.put(("users", "ann"), "two", {"text": "b", "tags": ["ab", "bbb"]}, ttl=600)
        old.put(("users",), "a/b\nc", {"text": "ab"}, index=False)
        old.put(("users",), "gone", {"text": "b"}, ttl=-1)
        found = {
            (item.namespace, item.key): in_utc(item.dict())
            for item in old.search(("users",), refresh_ttl=False)
            if item.key != "gone"  # which the other store gives until it is swept
        }
    add_vectors(path)
    content = path.read_bytes()
    command = ["import", "langgraph", str(path), "--state", str(state)]

    assert main([*command, "--dry-run"]) == 0
    assert "0 checkpoints of 0 threads and 4 items would be" in capsys.readouterr().out
    assert not state.exists()
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {"threads": 0, "checkpoints": 0, "items": 4, "refused": {}}
    assert path.read_bytes() == content
    with AgentStateStore(state, index=index) as store:
        ours = {
            (item.namespace, item.key): item.dict()
            for item in store.search(("users",), refresh_ttl=False)
        }
        assert ours == found
        assert [*ours[("users", "ann"), "one"]["value"]] == ["text", "b", "a"]
        [best, *_] = store.search(("users",), query="bb")
        assert best.key == "two"
        store.put(("users",), "a/b\nc", {"text": "of this side"})
    assert main(command) == 1
    assert "not brought over: users/a/b" in capsys.readouterr().err


def test_a_database_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE notes (text)")
    command = ["import", "langgraph", str(tmp_path / "other.db"), "--state", str(tmp_path / "s")]
    assert main(command) == 2
    assert "it has neither checkpoints nor items" in capsys.readouterr().err
