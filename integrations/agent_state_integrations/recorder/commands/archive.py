"""``agent-state record status``, ``archive`` and ``checkpoints``: the files of a recording."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_state.cli.options import JsonOption, StateOption
from agent_state.cli.output import counted, print_line, progress, show_json, show_table
from agent_state_integrations.recorder.commands.emptiness import stop_on_empty

if TYPE_CHECKING:
    from agent_state_integrations.recorder.archiver import ArchiveReport
    from agent_state_integrations.recorder.checkpoint import Checkpoint
    from agent_state_integrations.recorder.files import Recording
    from agent_state_integrations.recorder.status import FileTotals


FINE, WRONG = 0, 1


checkpoints = typer.Typer(
    help="What was recorded between two moments: list it, verify it, take it along.",
    no_args_is_help=True,
)


def archive(
    state: StateOption = Path("state"),
    *,
    parquet_past: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="The oldest segments become Parquet while all of them have more bytes than this.",
        ),
    ] = "50MB",
    compress_past: Annotated[
        str, typer.Option(metavar="DAYS", help="Older segments are compressed.")
    ] = "30d",
    keep_days: Annotated[
        int | None,
        typer.Option(
            help="Remove archives that are older.", min=0, max=1_000_000, show_default=False
        ),
    ] = None,
    keep_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Remove the oldest archives while all of them have more bytes than this.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only report what would be done.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all archives instead; exit 1 when one is damaged."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make archives of what was rotated: nothing goes before its archive has been read back.

    Works while a recorder runs. The live log is left alone.

    Example: agent-state record archive --dry-run
    """
    from agent_state_integrations.recorder import archiver

    stop_on_empty(state, logs=False)

    if verify:
        raise typer.Exit(_verify_archives(state, as_json))
    policy = archiver.RetentionPolicy(
        parquet_past=archiver.size_of(parquet_past),
        compress_past=archiver.age_of(compress_past),
        keep_for=None if keep_days is None else timedelta(days=keep_days),
        keep_bytes=None if keep_size is None else archiver.size_of(keep_size),
    )
    with progress("archiving") as advance:
        report = archiver.archive(state, policy, dry_run=dry_run, progress=advance)
    if as_json:
        show_json(report.to_dict())
    else:
        _show_archived(report)


def _show_archived(report: ArchiveReport) -> None:
    would = "would be " if report.dry_run else ""
    for what, names in (
        ("completed", report.finished),
        ("made Parquet", report.parquet),
        ("compressed", report.compressed),
        ("removed", report.removed),
    ):
        for name in names:
            print_line(f"{would}{what}: {name}")
    if not (report.finished or report.parquet or report.compressed or report.removed):
        print_line(f"nothing to do; {size(report.plain_bytes)} in plain segments")
    elif not report.dry_run:
        print_line(f"{size(report.freed_bytes)} freed")


def _verify_archives(state: Path, as_json: bool) -> int:
    from agent_state_integrations.recorder.archiver import verify_archives

    _recording(state)
    with progress("verifying") as advance:
        found = verify_archives(state, progress=advance)
    if as_json:
        show_json(found.to_dict())
    else:
        for problem in found.problems:
            print_line(problem, "red")
        print_line(f"archives read: {found.archives}, with {found.messages} messages")
        print_line("all archives are intact" if found.ok else "some archives are damaged")
    return FINE if found.ok else WRONG


@checkpoints.command("make")
def make_checkpoint(
    label: Annotated[str, typer.Argument(help="A word for it.")] = "manual",
    state: StateOption = Path("state"),
    as_json: JsonOption = False,
) -> None:
    """Make one now, of the messages since the last one; also while a daemon runs.

    Example: agent-state record checkpoints make "before the deploy"
    """
    from agent_state_integrations.recorder.status import status
    from agent_state_integrations.recorder.writer import RecordWriter

    stop_on_empty(state, logs=False)

    status(state)  # where nothing is recorded, none is made, and no folder either
    with RecordWriter(state, dedupe_window=0) as writer:
        made = writer.checkpoint(label)
    if as_json:
        show_json(made.model_dump(mode="json") if made is not None else None)
    elif made is None:
        print_line("nothing has come since the last checkpoint")
    else:
        print_line(f"{made.checkpoint_id}: {counted(made.message_count, 'message')}")


@checkpoints.command("ls")
def list_checkpoints(state: StateOption = Path("state"), as_json: JsonOption = False) -> None:
    """List the checkpoints, the newest first.

    Example: agent-state record checkpoints ls
    """
    found = _all(state)[::-1]
    if as_json:
        show_json([one.model_dump(mode="json") for one in found])
    elif not found:
        print_line("no checkpoint")
    else:
        show_table(
            ("checkpoint", "messages", "numbers", "size"),
            [
                (
                    one.checkpoint_id,
                    one.message_count,
                    f"{one.first_seq}-{one.last_seq}",
                    size(one.size_bytes),
                )
                for one in found
            ],
        )


@checkpoints.command("verify")
def verify_checkpoints(
    checkpoint_id: Annotated[
        str | None, typer.Argument(help="One of them; else all.", show_default=False)
    ] = None,
    state: StateOption = Path("state"),
    as_json: JsonOption = False,
) -> None:
    """Compare the messages of checkpoints with their SHA-256; exit 1 when some are not the same.

    Messages that retention has removed are gone: their checkpoints record it.

    Example: agent-state record checkpoints verify
    """
    from agent_state_integrations.recorder.checkpoint import digest_of
    from agent_state_integrations.recorder.files import Recording
    from agent_state_integrations.recorder.reader import raw_lines

    wanted = _all(state) if checkpoint_id is None else [_one(state, checkpoint_id)]
    problems = {}
    with progress("verifying") as advance:
        for number, one in enumerate(wanted, 1):
            found = digest_of(raw_lines(Recording(state), one.first_seq, one.last_seq))
            if found.sha256 != one.sha256:
                problems[one.checkpoint_id] = (
                    f"{found.message_count} of {one.message_count} messages are there"
                    if found.message_count != one.message_count
                    else "its messages have changed"
                )
            advance(number, len(wanted))
    if as_json:
        show_json({"checkpoints": len(wanted), "problems": problems, "ok": not problems})
    else:
        for name, problem in problems.items():
            print_line(f"{name}: {problem}", "red")
        print_line(f"{len(wanted) - len(problems)} of {len(wanted)} checkpoints are intact")
    raise typer.Exit(WRONG if problems else FINE)


@checkpoints.command("export")
def export_checkpoint(
    checkpoint_id: Annotated[str, typer.Argument(help="Which one; see list.")],
    out: Annotated[Path, typer.Argument(metavar="FILE", help="A new .json or .parquet file.")],
    state: StateOption = Path("state"),
    as_json: JsonOption = False,
) -> None:
    """Write the messages of a checkpoint to a file, which is never overwritten.

    Example: agent-state record checkpoints export 20250314 talk.json
    """
    from agent_state_integrations.recorder.export import export
    from agent_state_integrations.recorder.files import Recording
    from agent_state_integrations.recorder.lines import SkippedLines
    from agent_state_integrations.recorder.reader import records_between

    one = _one(state, checkpoint_id)
    skipped = SkippedLines()
    written = export(
        records_between(Recording(state), one.first_seq, one.last_seq, skipped=skipped),
        out,
        export_id=one.checkpoint_id,
        label=one.label,
        timestamp=one.timestamp,
    )
    if as_json:
        show_json(written.to_dict())
    else:
        print_line(f"{written.message_count} messages in {written.path}")


def _all(state: Path) -> list[Checkpoint]:
    from agent_state_integrations.recorder import checkpoint as kept

    directory = _recording(state).directory()
    found = (kept.read(directory, name) for name in kept.ids(directory))
    return [one for one in found if one is not None]


def _one(state: Path, checkpoint_id: str) -> Checkpoint:
    from agent_state.errors import StateNotFoundError
    from agent_state_integrations.recorder import checkpoint as kept
    from agent_state_integrations.recorder.files import KIND

    found = kept.read(_recording(state).directory(), checkpoint_id)
    if found is None:
        key = (kept.CHECKPOINTS, checkpoint_id)
        raise StateNotFoundError("there is no such checkpoint", kind=KIND, key=key)
    return found


def _recording(state: Path) -> Recording:
    from agent_state.errors import StateNotFoundError
    from agent_state_integrations.recorder.files import Recording

    stop_on_empty(state, logs=False)

    found = Recording(state)
    if not found.folder.is_dir():
        raise StateNotFoundError("there is no recording here", path=state)
    return found


def status(state: StateOption = Path("state"), *, as_json: JsonOption = False) -> None:
    """How much was recorded, and where it is.

    Example: agent-state record status --json
    """
    from agent_state_integrations.recorder.status import status as look

    stop_on_empty(state, logs=False)

    found = look(state)
    if as_json:
        show_json(asdict(found))
        return
    print_line(f"{found.state_dir}: {found.last_seq} messages so far")
    rows = [
        _row("live log", found.live),
        _row("segments", found.segments),
        _row("archives", found.archives),
    ]
    show_table(("", "files", "size"), rows)
    if found.removed_archives:
        print_line(f"archives removed by retention: {found.removed_archives}")
    if found.last_checkpoint is not None:
        print_line(f"checkpoints: {found.checkpoints}, the last one {found.last_checkpoint}")
    print_line(f"messages since the last checkpoint: {found.since_checkpoint}")
    if found.dead_letters:
        print_line(
            f"dead letters: {found.dead_letters}; record/dead-letter.jsonl has the reasons",
            "yellow",
        )


def _row(name: str, files: FileTotals) -> tuple[str, int, str]:
    return name, files.files, size(files.bytes)


def size(count: float) -> str:
    """Bytes, short."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
