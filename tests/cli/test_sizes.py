"""``agent-state ls --sizes``: what a directory occupies, and a warning above a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state import StateValidationError
from agent_state.cli.sizes import parse_size, readable
from tests.cli.commands import Call


def bytes_below(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_size for path in files)


def test_the_sizes_are_those_of_the_files(state: Path, call: Call) -> None:
    (state / "agents/large.json").write_text('{"agent_id": "large", "x": "' + "y" * 50_000 + '"}')
    (state / "agents/link.json").symlink_to("/dev/zero")

    found = call("ls", "--sizes", "--state", state, "--json")

    sizes = found.json()
    folders = {each["folder"]: each for each in sizes["folders"]}
    for name in ("agents", "tasks", "mail", "system", ".journal", ".locks"):
        if name in folders:
            assert abs(folders[name]["bytes"] - bytes_below(state / name)) < 100  # a link's own
    assert folders["tasks"]["files"] == 3
    assert sizes["bytes"] == sum(each["bytes"] for each in sizes["folders"])
    assert sizes["largest"][0]["path"] == "agents/large.json"
    assert [name.startswith(".") for name in folders] == sorted(
        name.startswith(".") for name in folders
    )
    assert found.code == 0


def test_a_person_sees_a_table(state: Path, call: Call) -> None:
    found = call("ls", "--sizes", "--state", state)

    assert "tasks" in found.out
    assert "The largest files:" in found.out
    assert (found.code, found.err) == (0, "")


@pytest.mark.parametrize(("limit", "code"), [("1", 1), ("0.5kB", 1), ("1GB", 0), ("2 TiB", 0)])
def test_a_directory_above_the_limit_is_told(
    state: Path, call: Call, limit: str, code: int
) -> None:
    found = call("ls", "--sizes", "--max-size", limit, "--state", state)

    assert found.code == code
    assert ("more than" in found.err) is bool(code)


@pytest.mark.parametrize("args", [("--max-size", "1GB"), ("--sizes", "--max-size", "much")])
def test_a_limit_needs_sizes_and_is_one(state: Path, call: Call, args: tuple[str, ...]) -> None:
    assert call("ls", *args, "--state", state).code == 2


def test_a_directory_that_is_none_is_refused(tmp_path: Path, call: Call) -> None:
    assert call("ls", "--sizes", "--state", tmp_path / "none").code == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("10", 10), ("1kB", 1000), ("1KiB", 1024), ("1.5m", 1_500_000), ("2GiB", 2**31)],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e3", "nan", "1PB", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(StateValidationError):
        parse_size(text)


def test_a_size_is_readable() -> None:
    assert [readable(size) for size in (0, 1023, 1024, 5 * 2**30, 2**60)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "5.0 GiB",
        "1048576.0 TiB",
    ]
