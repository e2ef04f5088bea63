"""The commands for encryption at rest: the keys of owners, and new keys for what is stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_state.cli.options import OK, PROBLEM, JsonOption, StateOption, needed_keyring
from agent_state.cli.output import did_you_mean, print_error, print_line, progress, show_json
from agent_state.clock import SystemClock
from agent_state.errors import storage_error
from agent_state.protocols import Document, DocumentId, LogRecord
from agent_state.serializers import parse_object
from agent_state.storage.body_rewriter import BodyRewriter, RewriteReport
from agent_state.storage.sealed_store import MARKER, check_keyring, marker_body, unseal

if TYPE_CHECKING:
    from agent_state.encryption import Keyring

_NAMED = 5

keys = typer.Typer(
    help="The keys of encryption at rest: list, make and erase them.", no_args_is_help=True
)


def rekey(
    state: StateOption = Path("state"),
    new_data_keys: Annotated[
        bool, typer.Option("--new-data-keys", help="Give every owner a new data key, too.")
    ] = False,
    keys_only: Annotated[
        bool, typer.Option("--keys-only", help="Only the keyring; a server may run meanwhile.")
    ] = False,
    decrypt: Annotated[
        bool, typer.Option("--decrypt", help="Store everything unencrypted again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Wrap the data keys with the newest master key, and encrypt what is not yet.

    Also encrypts a directory that never was. What an earlier data key has sealed is sealed with
    the newest, in place: revisions and times stay, snapshots are removed. Former data keys stay in
    the keyring, for backups. Refused while a server owns the directory. Exit 1 if something could
    not be read.

    Example: agent-state rekey --new-data-keys
    """
    if decrypt and (new_data_keys or keys_only):
        raise typer.BadParameter("--decrypt goes with none of the other options")
    keyring, report, renewed = needed_keyring(exists=keys_only), RewriteReport(), 0
    wrapped = 0 if decrypt else keyring.rewrap()
    with progress("encrypting"):
        if not keys_only:
            report, renewed = _rewrite(keyring, state, new_data_keys, decrypt)
        elif new_data_keys:
            renewed = keyring.renew_all()
    found: dict[str, Any] = {"wrapped": wrapped, "new_data_keys": renewed, **report.to_dict()}
    if as_json:
        show_json(found)
    else:
        _show(found, decrypt=decrypt)
    raise typer.Exit(PROBLEM if report.damaged else OK)


class _Encryption:
    """Seals each body with the newest key of its owner."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def document(self, document: Document, /) -> bytes:
        return self._changed((document.kind, document.key), document.body)

    def record(self, log: DocumentId, record: LogRecord, /) -> bytes:
        place = self._keyring.place_of_record(log, record.dedupe_key)
        return self._changed(place, record.body, record=True)

    def _changed(self, place: DocumentId, body: bytes, *, record: bool = False) -> bytes:
        return self._keyring.reseal(place, body, record=record)


class _Decryption(_Encryption):
    """Opens each body."""

    def _changed(self, place: DocumentId, body: bytes, *, record: bool = False) -> bytes:
        return unseal(self._keyring, place, body, record=record)


def _rewrite(
    keyring: Keyring, state: Path, new_data_keys: bool, decrypt: bool
) -> tuple[RewriteReport, int]:
    rewriter = BodyRewriter(state, SystemClock())
    rewriter.open()
    try:
        marker = rewriter.get(*MARKER)
        if marker is not None:
            check_keyring(parse_object(marker.body), keyring.ident)
        renewed = keyring.renew_all() if new_data_keys else 0
        if decrypt:
            report = rewriter.rewrite(_Decryption(keyring), spared=MARKER)
            rewriter.remove(*MARKER)
            return report, renewed
        if marker is None:
            rewriter.put(*MARKER, marker_body(keyring.prepare()), "system/1")
        return rewriter.rewrite(_Encryption(keyring), spared=MARKER), renewed
    finally:
        rewriter.close()


def _show(found: dict[str, Any], *, decrypt: bool) -> None:
    if found["wrapped"]:
        print_line(f"{found['wrapped']} data keys wrapped with the newest master key")
    if found["new_data_keys"]:
        print_line(f"{found['new_data_keys']} owners have a new data key")
    done = "decrypted" if decrypt else "encrypted"
    print_line(f"{found['documents']} documents and {found['records']} records {done}")
    _show_some("not readable", found["damaged"])
    _show_some("left as they are", found["left"])


def _show_some(what: str, names: Sequence[str]) -> None:
    if names:
        more = ", …" if len(names) > _NAMED else ""
        print_line(f"{what}: {len(names)} ({', '.join(names[:_NAMED])}{more})")


@keys.command("new-master")
def new_master(
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A new file, mode 0600.", show_default=False),
    ] = None,
) -> None:
    """Print a new random master key, in base64; or write it to a file that others cannot read.

    Example: agent-state keys new-master --out master-keys
    """
    from agent_state.encryption import generate_master_key  # needs the extra

    if out is None:
        print_line(generate_master_key())
        return
    try:
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{generate_master_key()}\n")
    except OSError as error:
        raise storage_error(error, "writing a master key", path=out) from error


@keys.command("ls")
def list_keys(as_json: JsonOption = False) -> None:
    """List the owners that have a data key, and those whose keys were erased.

    Example: agent-state keys ls --json
    """
    found = [report._asdict() for report in needed_keyring(exists=True).owners()]
    if as_json:
        show_json({"owners": found})
        return
    for one in found:
        name = f"(kind {one['owner']})" if one["shared"] else one["owner"]
        state = f"{len(one['keys'])} of {len(one['keys']) + len(one['erased'])} keys"
        print_line(f"{name}: {state if one['keys'] else 'erased'}")


@keys.command("erase")
def erase_key(
    owner: Annotated[str, typer.Argument(help="An agent, a session, a person: as `ls` names it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase the data keys of an OWNER: all that is theirs is unreadable from then on, everywhere.

    That is every copy that these keys have sealed: files, journal, mirrors, Redis, backups. It
    cannot be undone. Running servers notice within a second, and save nothing more of the owner.
    Exit 1 if the owner never had one.

    Example: agent-state keys erase alice --yes
    """
    keyring = needed_keyring(exists=True)
    if not yes:
        typer.confirm(f"Erase the keys of {owner!r} for ever?", abort=True)
    known = {report.owner for report in keyring.owners() if not report.shared}
    print_line(f"{keyring.erase(owner)} data keys of {owner} erased")
    if owner not in known:
        hint = did_you_mean(owner, known)
        print_error(f"{owner} had none, so nothing has become unreadable{hint}")
        raise typer.Exit(PROBLEM)


@keys.command("renew")
def renew_key(owner: Annotated[str, typer.Argument(help="An agent, a session, a person.")]) -> None:
    """Give an OWNER a new data key, for what is saved from now on; also after an erasure.

    Example: agent-state keys renew alice
    """
    print_line(f"{owner} has the data key {needed_keyring(exists=True).renew(owner)}")
