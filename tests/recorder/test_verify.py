"""``agent_state.verify`` knows a recording."""

from __future__ import annotations

from pathlib import Path

from agent_state.verify import verify
from agent_state_integrations.recorder import RecordWriter
from agent_state_integrations.recorder.archiver import RetentionPolicy, archive


async def test_a_recording_with_all_its_files_is_whole(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for number in range(3):
            writer.write([{"content": f"message {number}"}, "torn"])
            writer.checkpoint("one")
            writer.rotate()
        archive(tmp_path, RetentionPolicy(parquet_past=1000))
        writer.write([{"content": "the last"}])
    report = await verify(tmp_path)
    assert report.problems == []
    assert report.notices == []
    assert report.documents == {"record": 4}
    assert report.records["record"] > 0


async def test_numbers_left_out_within_a_segment_are_told(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write([{"content": "one"}])
        writer.rotate()
        writer.write([{"content": f"message {number}"} for number in range(3)])
    path = tmp_path / "record/current.jsonl"
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + last)
    [notice] = (await verify(tmp_path)).notices
    assert (notice.fault, notice.path) == ("gap", "record/current.jsonl")
    assert "line 2" in notice.why
