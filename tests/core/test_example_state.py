"""The format on disk can't change unseen: the committed example is written again and compared."""

from __future__ import annotations

from pathlib import Path

from tests.core import example_state

EXAMPLE = Path(__file__).parents[2] / "state"


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and path.name != "README.md")
    names = {path.relative_to(root).as_posix(): path.read_bytes() for path in found}
    hidden = (".journal/", ".locks/", ".quarantine/", ".runtime/", ".snapshots/")
    return {name: data for name, data in names.items() if not name.startswith(hidden)}


async def test_the_example_is_what_the_story_writes(tmp_path: Path) -> None:
    await example_state.write(tmp_path / "state")
    written, committed = files(tmp_path / "state"), files(EXAMPLE)
    assert written.keys() == committed.keys()
    for name, data in written.items():
        assert data == committed[name], name


def test_the_readme_explains_every_file() -> None:
    text = (EXAMPLE / "README.md").read_text()
    for name in files(EXAMPLE):
        assert f"`{name}`" in text, name
