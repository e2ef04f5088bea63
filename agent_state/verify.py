"""Checks every file of a state directory, changes nothing, and needs no server.

The directory may belong to a running server or a dead one, or be a copy. *Problems* are files that
cannot be used as they are. *Notices* are facts for a person that the next start handles by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any, Literal

from agent_state.agent_documents import AgentDocuments
from agent_state.codec import Codec
from agent_state.errors import (
    AgentStateError,
    EncryptionKeyError,
    ErasedKeyError,
    InvalidKeyError,
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    StateValidationError,
    UnmergedStateError,
)
from agent_state.models import ARCHIVE
from agent_state.protocols import BodySealer, Document, StateSerializer, StateValidator
from agent_state.storage import ReadOnlyStateStore, inspection, paths
from agent_state.storage.inspection import JournalCheck, LogCheck
from agent_state.storage.quarantine import QuarantinedFile, quarantined
from agent_state.storage.sealed_store import is_sealed, unseal

Fault = Literal[
    "damaged",  # it cannot be read
    "invalid",  # it can be read, but the validator refuses it
    "unmerged",  # git has left a merge of it unresolved
    "newer schema",  # written by a newer version of this library
    "unreachable",  # the operating system refused
    "unknown file",  # its name is not that of an id, or it is not a document
    "changed outside",  # a person, or another program, wrote it
    "torn",  # the end of a write that never finished
    "gap",  # numbers are missing
    "unfinished",  # recorded in the journal, and not yet in its file
    "temporary",  # a file that a writer left, or is writing
    "encrypted",  # and the key is wrong or missing
    "erased",  # its encryption key was erased, and with it the content
]
Progress = Callable[[int, int], None]
"""Called with the number of documents and logs checked so far, and of all of them."""

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault."""

    fault: Fault
    """The type of fault."""
    why: str
    """The details, for people."""
    path: str | None = None
    """The file, relative to the state directory."""
    kind: str | None = None
    """The kind of the document or log; None for other files."""
    key: Key = ()
    """The key of the document or log."""


@dataclass(slots=True)
class VerifyReport:
    """The contents of a state directory and their faults."""

    state_dir: str
    """The directory that was checked."""
    owner: int | None = None
    """The pid of the process that owns the directory; 0 if unknown, None without an owner."""
    documents: dict[str, int] = field(default_factory=dict)
    """Usable documents of each kind."""
    logs: dict[str, int] = field(default_factory=dict)
    """Logs of each kind."""
    records: dict[str, int] = field(default_factory=dict)
    """Readable records in the logs of each kind."""
    journal: JournalCheck = field(default_factory=JournalCheck)
    """Changes that are in the journal and not yet in their files."""
    quarantine: list[QuarantinedFile] = field(default_factory=list)
    """Files that were quarantined earlier."""
    problems: list[Finding] = field(default_factory=list)
    """Files that cannot be used as they are."""
    notices: list[Finding] = field(default_factory=list)
    """Facts that the next start handles by itself."""

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {"ok": self.ok, **asdict(self)}


async def verify(
    state_dir: str | PathLike[str],
    *,
    serializer: StateSerializer | None = None,
    validator: StateValidator | None = None,
    encryption: BodySealer | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check everything in a state directory.

    ``serializer``, ``validator`` and ``encryption`` are those of the manager that writes there;
    None stands for the default ones. Without ``encryption`` encrypted content is counted, and only
    its checksums are checked. Raises ``StateNotFoundError`` when the directory is missing.
    """
    store = ReadOnlyStateStore(state_dir)
    await store.open()
    try:
        codec = Codec(serializer, validator)
        return await _Verification(store, codec, encryption, progress).run()
    finally:
        await store.close()


class _Verification:
    """One run of ``verify``."""

    def __init__(
        self,
        store: ReadOnlyStateStore,
        codec: Codec,
        encryption: BodySealer | None,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._codec = codec
        self._agent_documents = AgentDocuments(store)
        self._encryption = encryption
        self._unopened = 0
        self._progress = progress
        self._report = VerifyReport(store.root)
        self._seen = 0
        self._total = 0

    async def run(self) -> VerifyReport:
        report = self._report
        documents, logs = await self._list()
        self._total = sum(map(len, documents.values())) + sum(map(len, logs.values()))
        for kind, keys in documents.items():
            if keys:
                report.documents[kind] = 0
            for batch in self._batches(keys):
                found = await self._store.get_each(kind, batch)
                for key, document in zip(batch, found, strict=True):
                    await self._document(kind, key, document)
        for kind, keys in logs.items():
            if keys:
                report.logs[kind] = report.records[kind] = 0
            for batch in self._batches(keys):
                for key in batch:
                    await self._log(kind, key)
        for unknown in await self._store.look(inspection.unknown_files):
            report_it = self._problem if unknown.hides else self._notice
            report_it("unknown file", unknown.why, unknown.path)
        for incident in self._store.incidents():
            # An incident with a kind was reported when its document was read.
            if incident.kind is None and not (incident.path or "").startswith("."):
                self._problem("unknown file", incident.what, incident.path)
        self._report_unopened()
        await self._check_journal()
        report.problems.sort(key=_place)
        report.notices.sort(key=_place)
        return report

    async def _list(self) -> tuple[dict[str, list[Key]], dict[str, list[Key]]]:
        documents: dict[str, list[Key]] = {}
        logs: dict[str, list[Key]] = {}
        for kind in await self._store.kinds():
            try:
                documents[kind] = await self._store.keys(kind)
                logs[kind] = await self._store.logs(kind)
            except InvalidKeyError:
                continue  # it is not a kind: it is reported as an unknown file
            except AgentStateError as error:
                self._problem("unreachable", error.message, kind)
        return documents, logs

    def _batches(self, keys: list[Key]) -> Iterator[list[Key]]:
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            yield batch
            self._seen += len(batch)
            if self._progress is not None:
                self._progress(self._seen, self._total)

    # -- documents and logs ----------------------------------------------------------------

    async def _document(
        self, kind: str, key: Key, document: Document | AgentStateError | None
    ) -> None:
        path = paths.relative(kind, key, paths.DOCUMENT)
        try:
            if isinstance(document, AgentStateError):
                raise document
            if document is None:
                return  # gone since it was listed
            body = await self._opened((kind, key), document.body)
            if body is not None:
                self._codec.check(replace(document, body=body))
                await self._agent_documents.whole(replace(document, body=body), strict=True)
        except EncryptionKeyError as error:
            self._report_key(error, path, kind, key)
        except SchemaTooNewError as error:
            self._problem("newer schema", error.message, path, kind, key)
        except StateValidationError as error:
            why = error.message + await self._kept_revision_note(kind, key)
            self._problem("invalid", why, path, kind, key)
        except UnmergedStateError as error:
            self._problem("unmerged", f"{error.message}; no version is known", path, kind, key)
        except StateCorruptedError as error:
            why = error.message + await self._kept_revision_note(kind, key)
            self._problem("damaged", why, path, kind, key)
        except AgentStateError as error:
            self._problem("unreachable", error.message, path, kind, key)
        else:
            self._read_document(document, path)

    def _read_document(self, document: Document, path: str) -> None:
        """Count a document that can be read, and tell what is wrong with its file."""
        kind, key = document.kind, document.key
        self._report.documents[kind] += 1
        damage = self._store.damage(kind, key)
        if damage is not None:
            why = f"{damage}; revision {document.revision} in the journal replaces it"
            self._problem("damaged", why, path, kind, key)
        elif (unmerged := self._store.unmerged(kind, key)) is not None:
            why = f"{unmerged}; until then revision {document.revision} is read"
            self._problem("unmerged", why, path, kind, key)
        elif document.edited:
            self._notice("changed outside", "the checksum does not fit", path, kind, key)

    async def _opened(
        self, place: tuple[str, Key], body: bytes, *, record: bool = False
    ) -> bytes | None:
        """The body, opened if it is encrypted; None if it is, and no keys were given."""
        if not is_sealed(body):
            return body
        if self._encryption is None:
            self._unopened += 1
            return None
        opened = self._encryption.open(place, body, record=record)
        if opened is None:
            opened = await asyncio.to_thread(unseal, self._encryption, place, body, record=record)
        return opened

    async def _records(self, kind: str, key: Key, path: str) -> None:
        """Open every record of a log that is encrypted, or compressed."""
        damaged, sealer, place = 0, self._encryption, (kind, key)
        async for record in self._store.read_log(kind, key):
            try:
                if sealer is None and is_sealed(record.body):
                    continue
                if sealer is not None:
                    place = sealer.place_of_record((kind, key), record.dedupe_key)
                body = await self._opened(place, record.body, record=True)
                self._codec.record(kind, key, body or b"{}")
            except StateCorruptedError:
                damaged += 1
            except EncryptionKeyError as error:
                self._report_key(error, path, kind, key)
                break
        if damaged:
            why = f"{damaged} records cannot be decrypted, or decompressed"
            self._problem("damaged", why, path, kind, key)

    def _report_key(self, error: EncryptionKeyError, path: str, kind: str, key: Key) -> None:
        if isinstance(error, ErasedKeyError):
            self._notice("erased", error.message, path, kind, key)
        else:
            self._problem("encrypted", error.message, path, kind, key)

    def _report_unopened(self) -> None:
        if self._unopened:
            why = f"{self._unopened} documents, not looked into: their keys were not given"
            self._notice("encrypted", why, None)

    async def _kept_revision_note(self, kind: str, key: Key) -> str:
        earlier = await self._store.look(
            lambda directory: inspection.earlier_revision(directory, kind, key)
        )
        if earlier is None:
            return "; no earlier version is kept"
        return f"; revision {earlier} is kept, and the next start restores it"

    async def _log(self, kind: str, key: Key) -> None:
        path = paths.relative(kind, key, paths.LOG)
        try:
            check = await self._store.look(
                lambda directory: inspection.check_log(
                    directory.tree.path(kind, key, paths.LOG), goes_on=kind in paths.RECORDED
                )
            )
        except AgentStateError as error:
            self._problem("unreachable", error.message, path, kind, key)
            return
        unmerged = await self._store.look(
            lambda directory: directory.worktree.conflict(directory.tree.path(kind, key, paths.LOG))
        )
        self._report.logs[kind] += 1
        self._report.records[kind] += check.records
        if unmerged is not None:  # markers are no damage, and numbers come twice
            self._problem("unmerged", unmerged, path, kind, key)
            return
        for fault, why in _log_problems(check):
            self._problem(fault, why, path, kind, key)
        for fault, why in _log_notices(check):
            self._notice(fault, why, path, kind, key)
        opens = self._encryption is not None and kind not in paths.RECORDED
        if opens or key[-1] == ARCHIVE:
            await self._records(kind, key, path)

    # -- journal, quarantine and temporary files -------------------------------------------

    async def _check_journal(self) -> None:
        report = self._report
        try:
            report.owner = await self._store.look(lambda _: self._store.owner())
        except AgentStateError as error:
            self._notice("unreachable", f"its owner is unknown: {error.message}", ".locks")
        report.journal = check = await self._store.look(inspection.check_journal)
        for path, why in check.damaged:
            self._problem("damaged", why, path)
        running = report.owner is not None
        who = "its server" if running else "the next start"
        if check.changes:
            why = f"{check.changes} changes in {check.records} records; {who} applies them"
            self._notice("unfinished", why, ".journal")
        if check.intents:
            why = f"{check.intents} groups are recorded and incomplete; {who} completes them"
            self._notice("unfinished", why, ".journal")
        if check.torn and not running:
            why = f"{check.torn} bytes at the end are an incomplete record, never acknowledged"
            self._notice("torn", why, ".journal")
        report.quarantine = await self._store.look(lambda directory: quarantined(directory.tree))
        for path in await self._store.look(inspection.temporaries):
            self._notice("temporary", "left by a writer that died, or in use this moment", path)

    def _problem(
        self, fault: Fault, why: str, path: str | None, kind: str | None = None, key: Key = ()
    ) -> None:
        self._report.problems.append(Finding(fault, why, path, kind, key))

    def _notice(
        self, fault: Fault, why: str, path: str | None, kind: str | None = None, key: Key = ()
    ) -> None:
        self._report.notices.append(Finding(fault, why, path, kind, key))


def _log_problems(check: LogCheck) -> Iterable[tuple[Fault, str]]:
    if check.unreadable:
        yield "damaged", f"{check.unreadable.count} cannot be read: {check.unreadable}"
    if check.disordered:
        yield "damaged", f"a number comes twice, or out of order: {check.disordered}"


def _log_notices(check: LogCheck) -> Iterable[tuple[Fault, str]]:
    if check.gaps:
        yield "gap", f"numbers are left out before {check.gaps}"
    if check.changed:
        yield "changed outside", f"the checksum does not fit: {check.changed}"
    if check.torn:
        yield "torn", f"{check.torn} bytes at the end are no record, and were never acknowledged"
    if check.unended:
        yield "torn", "the last record lacks its newline; the next append adds it"


def _place(finding: Finding) -> tuple[str, str]:
    return finding.path or "", finding.fault
