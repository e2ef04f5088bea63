"""What every adapter keeps, as tests to inherit."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from agent_state import MemoryStateStore, StatePersistenceManager

HOSTILE_IDS = ["", "..", "a/b", "a", "A", "con", "x" * 3000, "\u00e9", "e\u0301", "\0", "a.json"]
"""Ids that are no file names; no two of them may meet."""
_PROGRAM = """
import asyncio, importlib.util, sys
spec = importlib.util.spec_from_file_location("contract_of_an_adapter", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
asyncio.run(getattr(module, sys.argv[2])()._run_in_a_process(*sys.argv[3:]))
"""


class AdapterContract(ABC):
    """Tests of an adapter that adds values under ids and reads them in their order.

    Inherit it in a module of tests, as a class whose name begins with ``Test``, and define the
    three methods. The tests need pytest and no plugin of it. Values are small JSON objects.
    """

    refusal: ClassVar[type[Exception]] = Exception
    """What ``write`` raises for a value that could not be read again."""
    entries: ClassVar[int] = 2_000
    """How many values ``test_many_entries`` writes; 10,000 where the tests may take longer."""

    @abstractmethod
    def open(self, state: Any) -> AbstractAsyncContextManager[Any]:
        """The adapter on a state: a directory, an open manager, or a store."""

    @abstractmethod
    async def write(self, adapter: Any, ident: str, value: Any) -> None:
        """Add a value under an id."""

    @abstractmethod
    async def read(self, adapter: Any, ident: str) -> list[Any]:
        """The values under an id, in the order in which they were added; [] if there are none."""

    # -- the tests -----------------------------------------------------------------------------

    def test_every_kind_of_state(self, tmp_path: Path) -> None:
        async def check() -> None:
            for kind in ("directory", "shared", "exclusive", "memory"):
                async with (
                    _state_of(kind, tmp_path / kind) as state,
                    self.open(state) as adapter,
                ):
                    assert await self.read(adapter, "a") == []
                    for number in range(3):
                        await self.write(adapter, "a", {"n": number})
                    assert await self.read(adapter, "a") == [{"n": 0}, {"n": 1}, {"n": 2}]

        asyncio.run(check())

    def test_what_was_written_is_there_when_it_is_opened_again(self, tmp_path: Path) -> None:
        async def check() -> None:
            for number in range(3):
                async with self.open(tmp_path) as adapter:
                    await self.write(adapter, "a", {"n": number})
                    assert len(await self.read(adapter, "a")) == number + 1

        asyncio.run(check())

    def test_every_id_is_one_of_its_own(self, tmp_path: Path) -> None:
        async def check() -> None:
            async with self.open(tmp_path) as adapter:
                for ident in HOSTILE_IDS:
                    await self.write(adapter, ident, {"of": ident})
                for ident in HOSTILE_IDS:
                    assert await self.read(adapter, ident) == [{"of": ident}]

        asyncio.run(check())

    def test_what_is_written_and_read_is_a_copy(self, tmp_path: Path) -> None:
        async def check() -> None:
            async with self.open(MemoryStateStore()) as adapter:
                value: dict[str, list[int]] = {"n": [1]}
                await self.write(adapter, "a", value)
                value["n"].append(2)
                (await self.read(adapter, "a"))[0]["n"].append(3)
                assert await self.read(adapter, "a") == [{"n": [1]}]

        asyncio.run(check())

    def test_what_could_not_be_read_is_refused(self, tmp_path: Path) -> None:
        async def check() -> None:
            async with self.open(tmp_path) as adapter:
                refused = False
                try:
                    await self.write(adapter, "a", {"n": object()})
                except self.refusal:
                    refused = True
                assert refused
                assert await self.read(adapter, "a") == []

        asyncio.run(check())

    def test_a_cancelled_write_is_whole(self, tmp_path: Path) -> None:
        async def check() -> None:
            async with self.open(tmp_path) as adapter:
                await self.read(adapter, "a")
                writing = asyncio.create_task(self.write(adapter, "a", {"n": 1}))
                await asyncio.sleep(0)
                writing.cancel()
                with suppress(asyncio.CancelledError):
                    await writing
                before = await self.read(adapter, "a")
                assert before in ([], [{"n": 1}])
                await self.write(adapter, "a", {"n": 2})
                assert await self.read(adapter, "a") == [*before, {"n": 2}]

        asyncio.run(check())

    def test_eight_processes_write_at_once(self, tmp_path: Path) -> None:
        started = [self._start(tmp_path, str(name), "5") for name in range(8)]
        assert [process.wait() for process in started] == [0] * 8
        found = asyncio.run(self._read_all(tmp_path))
        assert sorted((each["by"], each["n"]) for each in found) == sorted(
            (str(name), number) for name in range(8) for number in range(5)
        )

    def test_what_was_acknowledged_survives_kill_9(self, tmp_path: Path) -> None:
        process = self._start(tmp_path, "one", "1000000")
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(10)]
        process.kill()
        lines += [line for line in process.stdout.readlines() if line.endswith("\n")]
        process.stdout.close()
        process.wait()
        assert [json.loads(line) for line in lines] == [*range(len(lines))]
        found = [each["n"] for each in asyncio.run(self._read_all(tmp_path))]
        assert found == [*range(len(found))]
        assert len(found) in (len(lines), len(lines) + 1)  # one may have been stored unsaid

    def test_many_entries(self, tmp_path: Path) -> None:
        async def check() -> None:
            async with self.open(tmp_path) as adapter:
                for start in range(0, self.entries, 100):
                    numbers = range(start, min(start + 100, self.entries))
                    await asyncio.gather(*(self.write(adapter, "a", {"n": n}) for n in numbers))
                found = await self.read(adapter, "a")
                assert sorted(each["n"] for each in found) == [*range(self.entries)]

        asyncio.run(check())

    # -- other processes -----------------------------------------------------------------------

    def _start(self, directory: Path, name: str, count: str) -> subprocess.Popen[str]:
        """A process that writes so many values under one id, and prints the number of each."""
        arguments = [inspect.getfile(type(self)), type(self).__name__, str(directory), name, count]
        return subprocess.Popen(  # noqa: S603  # this test itself
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdout=subprocess.PIPE if name == "one" else subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    async def _run_in_a_process(self, directory: str, name: str, count: str) -> None:
        async with self.open(directory) as adapter:
            for number in range(int(count)):
                await self.write(adapter, "shared", {"by": name, "n": number})
                sys.stdout.write(f"{number}\n")
                sys.stdout.flush()

    async def _read_all(self, directory: Path) -> list[Any]:
        async with self.open(directory) as adapter:
            return await self.read(adapter, "shared")


@asynccontextmanager
async def _state_of(kind: str, directory: Path) -> AsyncIterator[Any]:
    if kind == "directory":
        yield directory
    elif kind == "memory":
        yield MemoryStateStore()
    else:
        async with StatePersistenceManager(directory, exclusive=kind == "exclusive") as manager:
            yield manager
