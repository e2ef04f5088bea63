"""No secret in any file, wherever it stood, whichever way it came."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state_integrations.recorder import Recorder, RecordWriter, import_logs
from agent_state_integrations.recorder.network.spool import Spool

SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
CAME = [
    b'{"message_id": "%s", "content": "as an id"}',
    b'{"ConversationType": "%s", "content": "as a type"}',
    b'{"timestamp": "%s", "content": "as a time"}',
    b'{"metadata": {"chain_type": "%s"}, "content": "as a domain"}',
    b'{"content": {"%s": 1}}',
    b'{"message_id": {"%s": 1}, "content": "no message"}',
    b'{"content": "torn %s',
    b"\xff%s is no JSON",
]


def check(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("came", CAME)
async def test_no_secret_is_in_any_file(tmp_path: Path, came: bytes) -> None:
    data = came % SECRET.encode()
    async with Recorder(tmp_path / "recorder") as recorder:
        await recorder.record_many([data])
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"content": "a log"}\n' + data + b"\n")
    with RecordWriter(tmp_path / "imported") as writer:
        import_logs([log], writer)
    Spool(tmp_path / "spool").append([data])
    for folder in ("recorder", "imported", "spool"):
        check(tmp_path / folder)


def test_one_message_with_two_secrets_is_one_message(tmp_path: Path) -> None:
    other = SECRET.replace("a1B2", "Z9y8")
    with RecordWriter(tmp_path) as writer:
        one, two = writer.write(
            [{"message_id": "m1", "content": f"use {secret}"} for secret in (SECRET, other)]
        )
    assert (one.outcome, two.outcome) == ("recorded", "duplicate")
    check(tmp_path)


def test_two_messages_whose_ids_are_secrets_are_two(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        outcomes = writer.write([{"message_id": SECRET, "content": text} for text in ("a", "b")])
    assert [one.seq for one in outcomes] == [1, 2]
