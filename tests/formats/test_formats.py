"""Directories of every format that was ever written open, with all that is in them.

``docs/compatibility.md`` is the policy. Each file here is a format, as its own code wrote it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys
from agent_state.verify import verify
from tests.core.test_legacy import ANCESTOR, PLANNED, write
from tests.formats.writer import HERE, unpack, written

FORMATS = sorted(HERE.glob("*.json"))
NEWEST = FORMATS[-1]
DIRECTORIES = [
    pytest.param(path, end, id=f"{path.stem}-{end}")
    for path in FORMATS
    for end in ("closed", "killed", "encrypted")
    if end in json.loads(path.read_bytes())
]


async def content_of(
    manager: StatePersistenceManager, stored: dict[str, Any]
) -> AsyncIterator[tuple[Any, Any]]:
    """What a directory has of each thing, and what was written."""
    for kind, key, state in stored["documents"]:
        loaded = await manager.load(kind, tuple(key))
        found = loaded.model_dump() if loaded is not None else None
        yield found, state
    for kind, key, records in stored["logs"]:
        yield [entry.record async for entry in manager.read_log(kind, tuple(key))], records


@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])
@pytest.mark.parametrize(("path", "end"), DIRECTORIES)
async def test_a_directory_of_every_format_opens_with_all_that_is_in_it(
    tmp_path: Path, path: Path, end: str, exclusive: bool
) -> None:
    stored = json.loads(path.read_bytes())
    state = tmp_path / "state"
    unpack(stored[end], state)
    keyring = None
    if end == "encrypted":
        unpack(stored["keys"], tmp_path)
        (tmp_path / "master-keys").chmod(0o600)
        keyring = Keyring(tmp_path / "keyring", MasterKeys.from_file(tmp_path / "master-keys"))

    for _ in ("as it was", "as today's code left it"):
        async with StatePersistenceManager(
            state, exclusive=exclusive, encryption=keyring
        ) as manager:
            assert manager.incidents() == []
            async for found, wanted in content_of(manager, stored):
                assert found == wanted
            expected = {(kind, tuple(key)) for kind, key, _ in stored["documents"]}
            kinds = {kind for kind, _ in expected} - {"system"}  # there the library has its own
            keys = {(kind, key) for kind in kinds for key in await manager.keys(kind)}
            assert keys == {each for each in expected if each[0] != "system"}
    assert (await verify(state, encryption=keyring)).ok
    assert not [*(state / ".quarantine").glob("[!.]*")]


@pytest.mark.parametrize("files", [ANCESTOR, PLANNED], ids=["ancestor", "planned"])
async def test_a_directory_of_an_ancestor_opens(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, files)

    async with AsyncAgentSessionManager(tmp_path) as runtime:
        eve = await runtime.manager.load_agent_state("eve")
        assert eve is not None
        assert runtime.manager.incidents() == []


def _shape(files: dict[str, str]) -> dict[str, Any]:
    """The names of files and of members, without what differs between two runs."""
    found: dict[str, Any] = {}
    for name, text in files.items():
        if name.startswith((".runtime", ".snapshots")):
            continue  # of one run; copies of documents
        if name.endswith(".json"):
            # A change that the journal has is in the file, too, when the machine is slow.
            found[name] = sorted(json.loads(text).keys() - {"edition"})
        elif name.endswith(".jsonl"):
            lines = [line[line.index("{") :] for line in text.splitlines()]
            found[name] = [_members(json.loads(line)) for line in lines]
        else:
            found[name] = text
    return found


def _members(value: Any) -> Any:
    """The names of members, and the types of what they have; what a person stored is left out."""
    if isinstance(value, dict):
        return {
            name: None if name in {"body", "record"} else _members(each)
            for name, each in value.items()
        }
    return [_members(each) for each in value] if isinstance(value, list) else type(value).__name__


def test_the_newest_of_these_is_what_is_written_today(tmp_path: Path) -> None:
    # If not, the format has changed: say so in docs/compatibility.md, and add a file to this folder
    # with `python tests/formats/writer.py 2027-01-what-changed`. Never change one that is there.
    stored = json.loads(NEWEST.read_bytes())
    today = written(tmp_path)

    for end in ("closed", "killed", "encrypted"):
        assert _shape(today[end]) == _shape(stored[end]), end
