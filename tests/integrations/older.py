"""States that older versions of a framework and of this library wrote, kept beside the tests.

A test module of an adapter (``test_older_NAME.py``) has ``write(directory, turn)``,
``read(directory)`` and ``VERSIONS``, the distributions that matter. In an environment with older
ones, and with an older commit of this library,

    python -m tests.integrations.older openai_agents 2026-12-01-openai-agents-0.10

calls ``write`` with the turn 1 and keeps the files, and what ``read`` gave there, in
``tests/integrations/openai_agents/older``. A file that is there is never changed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class OlderState:
    """The files that an older version has left, and what it read of them."""

    name: str
    versions: dict[str, str]
    files: dict[str, str]
    content: Any

    def unpack(self, directory: Path) -> None:
        """Write the files into a directory."""
        for name, text in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def older_states(adapter: str) -> list[OlderState]:
    """What older versions have written through an adapter."""
    return [
        OlderState(path.stem, **json.loads(path.read_bytes()))
        for path in sorted((HERE / adapter / "older").glob("*.json"))
    ]


def name_of(state: OlderState) -> str:
    """The name of a state, for the parameters of a test."""
    return state.name


async def check(
    state: OlderState,
    directory: Path,
    write: Callable[[Path, int], Awaitable[None]],
    read: Callable[[Path], Awaitable[Any]],
) -> None:
    """Read what an older version wrote, go on with it, and find all as if today's had begun it."""
    older, fresh = directory / "older", directory / "fresh"
    state.unpack(older)
    assert as_json(await read(older)) == state.content
    await write(older, 2)
    await write(fresh, 1)
    await write(fresh, 2)
    assert as_json(await read(older)) == as_json(await read(fresh))


def as_json(value: Any) -> Any:
    """A value as it is when it was kept in a file of JSON."""
    return json.loads(json.dumps(value))


def keep(adapter: str, name: str) -> None:
    """Write a state with the versions that are installed, and keep it."""
    module = import_module(f"tests.integrations.{adapter}.test_older_{adapter}")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "state"
        asyncio.run(module.write(directory, 1))
        files = {
            str(path.relative_to(directory)): path.read_text()
            for path in sorted(directory.rglob("*"))
            if path.is_file() and not {".locks", ".runtime"} & {*path.parts}
        }
        content = asyncio.run(module.read(directory))
    versions = {each: version(each) for each in module.VERSIONS}
    kept = {"versions": versions, "files": files, "content": content}
    path = HERE / adapter / "older" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    with path.open("x") as file:
        json.dump(kept, file, indent=1, ensure_ascii=False)
        file.write("\n")


if __name__ == "__main__":
    keep(*sys.argv[1:])
