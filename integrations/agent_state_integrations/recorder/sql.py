"""SQL over a recording: DuckDB, with everything there is in one view, ``messages``.

Parquet archives are read where they are. All other files (compressed and plain
segments, the live log, older logs) are written to a temporary one first, by the code that reads
them elsewhere; so a torn line, or an older form of record, gives the same result.

DuckDB is locked down: it opens these files alone, loads and installs no extension, and takes one
SELECT at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Self

from agent_state.clock import stamp
from agent_state.errors import QueryError, StateCorruptedError, StorageError
from agent_state_integrations.recorder import formats, parquet
from agent_state_integrations.recorder.files import AtomicFile, writing_failed
from agent_state_integrations.recorder.lazy_imports import arrow, duckdb
from agent_state_integrations.recorder.lines import LineParser, SkippedLines
from agent_state_integrations.recorder.parquet import ParquetLogWriter
from agent_state_integrations.recorder.query import check_unicode
from agent_state_integrations.recorder.reader import LogSource, sources

ROWS = 10_000
VIEW = "messages"


@dataclass(frozen=True, slots=True)
class SQLResult:
    """The result of a SELECT: the names of its columns, and its rows, of which memory holds a few.

    Times are aware datetimes in UTC. The rows can be gone through once, while the recording is
    open.
    """

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


class RecordingDatabase:
    """An open recording to be asked. Made by ``connect``."""

    def __init__(self, connection: Any, files: Sequence[Path]) -> None:
        self._connection = connection
        self._files = files

    def select(self, statement: str, parameters: Sequence[object] = ()) -> SQLResult:
        """The answer to one SELECT, whose ``?`` are the parameters.

        Raises ``QueryError`` for any other or failing statement, and
        ``StateCorruptedError`` naming a file that turns out to be damaged.
        """
        check_unicode("the statement", statement)
        db = duckdb()
        try:
            parts = self._connection.extract_statements(statement)
            if len(parts) != 1 or parts[0].type.name not in ("SELECT", "EXPLAIN"):
                raise QueryError("one SELECT is answered here, and nothing else")
            relation = self._connection.sql(parts[0].query, params=list(parameters) or None)
            reader = relation.to_arrow_reader(ROWS)
        except db.Error as error:
            self._look_for_damage(error)
            raise QueryError(" ".join(str(error).split())) from error
        return SQLResult(tuple(reader.schema.names), self._rows(reader))

    def _rows(self, reader: Any) -> Iterator[tuple[Any, ...]]:
        db, pa = duckdb(), arrow()
        try:
            for batch in reader:
                yield from zip(*(_values(column) for column in batch.columns), strict=True)
        except (db.Error, pa.ArrowException, OSError) as error:
            self._look_for_damage(error)
            raise QueryError(" ".join(str(error).split())) from error

    def _look_for_damage(self, error: Exception) -> None:
        """Find the file that DuckDB could not read. Raises ``StateCorruptedError`` naming it."""
        db = duckdb()
        if isinstance(error, db.ParserException | db.BinderException | db.CatalogException):
            return
        for file in self._files:
            try:
                parquet.check(formats.open_file(file), file)
            except FileNotFoundError:
                why = "this archive has gone while it was read"
                raise StateCorruptedError(why, path=file) from error


@contextmanager
def connect(
    path: str | PathLike[str], *, skipped: SkippedLines | None = None
) -> Iterator[RecordingDatabase]:
    """Open what ``read`` reads, for SQL. The view ``messages`` has the columns of ``columns``.

    Lines that hold no message are left out and counted in ``skipped``. Messages that are
    recorded later are not seen. Raises as ``read`` does.
    """
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-state-sql-"))
        ).resolve()
        found = stack.enter_context(sources(path))
        files = _parquet_of(found, folder, skipped if skipped is not None else SkippedLines())
        connection = duckdb().connect(":memory:")
        stack.callback(connection.close)
        _prepare(connection, files, folder)
        yield RecordingDatabase(connection, files)


def _parquet_of(found: Sequence[LogSource], folder: Path, skipped: SkippedLines) -> list[Path]:
    """The Parquet archives among the files, and one that holds all the others."""
    files, others = list[Path](), list[LogSource]()
    for source in found:
        opened = source.opened()
        if opened is None:
            continue
        file, path, kind = opened
        with file:
            if kind == "parquet":
                parquet.open_fragment(file, path)  # clearer than DuckDB's message
                files.append(path)
            else:
                others.append(source)
    rest = folder / "messages.parquet"
    try:
        with AtomicFile(rest) as out:
            with _Rest(out, skipped) as writer:
                for source in others:
                    writer.add(source)
            out.publish(replace=True)
    except StorageError:
        raise
    except OSError as error:
        raise writing_failed(error, rest) from error
    return [*files, rest]


class _Rest:
    """The temporary file. Each source has a parser of its own, which counts from its first line."""

    def __init__(self, out: AtomicFile, skipped: SkippedLines) -> None:
        self._skipped = skipped
        nothing = LineParser("", datetime.fromtimestamp(0, UTC), skipped)
        self._writer = ParquetLogWriter(out, nothing, with_lines=False)

    def add(self, source: LogSource) -> None:
        self._writer.change_parser(LineParser(source.path, source.received, self._skipped))
        for batch in source.batches():
            self._writer.add(batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.__exit__(kind)


def _prepare(connection: Any, files: Sequence[Path], folder: Path) -> None:
    listed = ", ".join(_quoted(file) for file in files)
    shown = ", ".join(
        f"{name}::JSON AS {name}" if name in ("metadata", "content") else f'"{name}"'
        for name in parquet.SHOWN
    )
    for setting in (
        "TimeZone = 'UTC'",
        f"temp_directory = {_quoted(folder)}",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "allow_community_extensions = false",
        "allow_persistent_secrets = false",
        f"allowed_paths = [{listed}]",
        "enable_external_access = false",
    ):
        connection.execute(f"SET {setting}")
    connection.execute(
        f"CREATE VIEW {VIEW} AS SELECT {shown} FROM read_parquet([{listed}]) "  # noqa: S608
        "WHERE id IS NOT NULL"
    )
    connection.execute("SET lock_configuration = true")


def _quoted(path: Path) -> str:
    return "'" + fspath(path).replace("'", "''") + "'"


def _values(column: Any) -> list[Any]:
    """The values of a column. Arrow itself would ask for a database of time zones."""
    pa = arrow()
    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        naive = column.cast(pa.timestamp("us")).to_pylist()
        return [None if moment is None else moment.replace(tzinfo=UTC) for moment in naive]
    return list(column.to_pylist())


def plain(value: object) -> object:
    """A value of an answer as JSON has it: times as text, what JSON lacks as text too."""
    if isinstance(value, datetime):
        return stamp(value) if value.tzinfo else value.isoformat()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return plain(int(value))  # the sum of a column of integers
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    return str(value)
