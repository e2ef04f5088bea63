"""Encryption at rest: data keys, one for each owner of documents, wrapped by a master key.

A ``Keyring`` given as ``encryption=`` seals the body of every document and record before a store
gets it: files, journal, snapshots, quarantine, Redis and mirrors have ciphertext. Kind, key,
revision, times, schema and dedupe key stay readable. ``docs/encryption.md`` has the format.

Each owner (by default the first segment of a key: an agent, a session, a person) has data keys of
its own, in a folder outside the state directory. Erasing them makes everything of that owner
unreadable, in every copy. Needs the extra ``crypto``.
"""

from __future__ import annotations

import hmac
import logging
import math
import os
import re
import secrets
import stat
import threading
import time
import zlib
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import (
    EncryptionKeyError,
    ErasedKeyError,
    Key,
    StateCorruptedError,
    needs_extra,
    storage_error,
)
from agent_state.models import ARCHIVE
from agent_state.protocols import DocumentId
from agent_state.serializers import parse_file
from agent_state.storage import fileio, locks, paths
from agent_state.storage.fileio import Stamp
from agent_state.storage.lru_cache import LRUCache
from agent_state.storage.sealed_store import is_sealed, seal, unseal

with needs_extra("crypto", "cryptography"):
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MASTER_KEY_BYTES = 32
DATA_KEY_BYTES = 64
"""Half is the AES-256 key, half the key of the nonces."""
FRESH_SECONDS = 1.0
"""How long loaded keys are used before the keyring is looked at again."""
REREAD_SECONDS = 60.0
"""After this time the files of keys are looked at, too, and not their folders alone."""
COMPRESS_OVER_BYTES = 64 * 1024
_NONCE_BYTES = 12
_LOCK_SECONDS = 10.0
_OWNERS_LOADED = 100_000
_MOST_BYTES = fileio.MAX_BYTES
_PLAIN, _DEFLATED = b"v1", b"v1z"
_ENVELOPE = re.compile(rb'\{"_sealed":"(v1z?)\.([0-9a-f]{16})\.([A-Za-z0-9+/]+={0,2})"\}')
_WRAPPED = "mk1"

_logger = logging.getLogger("agent_state.encryption")

OwnerOf = Callable[[str, Key], str | None]
"""The owner of a document or log, by its kind and key; None for the key that its kind shares."""


_SHARED_KINDS = frozenset({"system", "tokens"})
"""What these hold is nobody's: records of the runtimes, and which token leads to which session."""


def owner_by_first_segment(kind: str, key: Key) -> str | None:
    """The first segment of the key; the kinds ``system`` and ``tokens`` share a key each."""
    return None if kind in _SHARED_KINDS else key[0]


# -- master keys -------------------------------------------------------------------------------


class KeyWrapper(Protocol):
    """Encrypts data keys, such as a key management service does. It may block: a thread calls it.

    ``context`` must be given again to unwrap. Both raise ``EncryptionKeyError``.
    """

    def wrap(self, key: bytes, context: bytes) -> str:
        """The encrypted data key, as text."""

    def unwrap(self, wrapped: str, context: bytes) -> bytes:
        """The data key."""

    def is_current(self, wrapped: str) -> bool:
        """Whether ``wrap`` would use the same master key; if not, ``rewrap`` wraps it anew."""


class MasterKeys:
    """Master keys of 32 bytes: the first wraps data keys, the others only unwrap them.

    ``source`` returns them. It is called when a key is needed for the first time, and again for a
    wrapped key that none of them opens, so that a rotation needs no restart.
    """

    def __init__(self, source: Callable[[], Sequence[bytes]]) -> None:
        self._source = source
        self._keys: dict[str, AESGCM] = {}

    @classmethod
    def from_environment(cls, name: str = "AGENT_STATE_MASTER_KEYS") -> MasterKeys:
        """The keys in an environment variable: base64, separated by spaces or commas."""
        return cls(lambda: parse_master_keys(os.environ.get(name, ""), f" in the variable {name}"))

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> MasterKeys:
        """The keys in a file: base64, one a line; lines that begin with ``#`` are comments."""
        is_told = False

        def read() -> list[bytes]:
            nonlocal is_told
            real = os.path.realpath(path)  # a mounted secret is a symlink
            found = fileio.read_file(real)
            if found is None:
                raise EncryptionKeyError("the file of the master keys is missing", path=path)
            if not is_told and Path(real).stat().st_mode & stat.S_IROTH:
                _logger.warning("every user of this machine can read the master keys in %s", path)
                is_told = True
            lines = map(str.strip, found[0].decode("utf-8-sig", "replace").splitlines())
            text = "\n".join(one for one in lines if one[:1] != "#")
            return parse_master_keys(text, f" in {path}")

        return cls(read)

    def wrap(self, key: bytes, context: bytes) -> str:
        """The data key, encrypted with the first master key."""
        ident, cipher = next(iter(self._loaded().items()))
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return f"{_WRAPPED}.{ident}.{_base64(nonce + cipher.encrypt(nonce, key, context)).decode()}"

    def unwrap(self, wrapped: str, context: bytes) -> bytes:
        """The data key, decrypted with the master key that it names."""
        form, _, rest = wrapped.partition(".")
        ident, _, text = rest.partition(".")
        if form != _WRAPPED:
            raise EncryptionKeyError(f"a data key is wrapped as {form!r:.20}, which is unknown")
        cipher = self._loaded().get(ident)
        if cipher is None:
            self._keys = {}
            cipher = self._loaded().get(ident)
        if cipher is None:
            given = ", ".join(self._loaded())
            raise EncryptionKeyError(f"the master key {ident:.16} is missing; given: {given}")
        try:
            data = a2b_base64(text)
            return cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError) as error:
            raise EncryptionKeyError("a wrapped data key is damaged") from error

    def is_current(self, wrapped: str) -> bool:
        """Whether the first master key has wrapped it."""
        return wrapped.split(".")[1:2] == [next(iter(self._loaded()))]

    def _loaded(self) -> dict[str, AESGCM]:
        if not self._keys:
            with _asking("the master keys cannot be read"):
                found = [bytes(memoryview(key)) for key in self._source()]
            if not found:
                raise EncryptionKeyError("no master key is given")
            if other := [len(key) for key in found if len(key) != MASTER_KEY_BYTES]:
                what = f"a master key has {MASTER_KEY_BYTES} bytes, and not {other[0]}"
                raise EncryptionKeyError(what)
            self._keys = {_fingerprint(b"master key", key): AESGCM(key) for key in found}
        return self._keys


def parse_master_keys(text: str, where: str = "") -> list[bytes]:
    """The keys in base64, separated by white space or commas. Raises ``EncryptionKeyError``.

    ``where`` the text was found, for the error, which never has the text.
    """
    try:
        keys = [a2b_base64(word, strict_mode=True) for word in text.replace(",", " ").split()]
    except ValueError as error:  # also for what is no ASCII
        raise EncryptionKeyError(f"a master key is not base64{where}") from error
    if not keys:
        raise EncryptionKeyError(f"there is no master key{where}")
    return keys


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Any failure of whoever has the master keys is an ``EncryptionKeyError``, never damage."""
    try:
        yield
    except EncryptionKeyError:
        raise
    except Exception as error:
        raise EncryptionKeyError(f"{what}: {type(error).__name__}: {error}") from error


def generate_master_key() -> str:
    """A new random master key, in base64."""
    return _base64(secrets.token_bytes(MASTER_KEY_BYTES)).decode()


# -- data keys ---------------------------------------------------------------------------------


class _DataKey(NamedTuple):
    ident: bytes
    cipher: AESGCM
    nonces: bytes


@dataclass(slots=True)
class _OwnerKeys:
    """The contents of an owner's file, and those of its keys that were unwrapped."""

    wrapped: dict[str, str] = field(default_factory=dict)
    """The wrapped keys by id, the newest last: it seals."""
    erased: dict[str, str] = field(default_factory=dict)
    """The ids of erased keys, and when each was."""
    unwrapped: dict[str, _DataKey] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    """Ids that were looked for in this version of the file, which lacks them."""
    file: Stamp | None = None
    turn: int = -1
    """The keyring's ``_turn`` when the file was looked at last."""

    @property
    def active(self) -> str | None:
        return next(reversed(self.wrapped), None)


_Place = tuple[str, str]
"""The folder of a file of keys, ``owners`` or ``kinds``, and whose keys they are."""
_FIRST: _Place = ("kinds", "system")
"""The place of the key that names the keyring."""


class OwnerReport(NamedTuple):
    """The data keys of one owner."""

    owner: str
    """The owner; or the kind that shares the keys."""
    shared: bool
    """Whether a kind shares the keys."""
    keys: list[str]
    """Their ids, the newest last."""
    erased: dict[str, str]
    """The ids of erased keys, and when each was."""


class Keyring:
    """Data keys in a folder, and the sealing of bodies with them. A ``BodySealer``.

    ``folder``: one file for each owner, made when it is first needed. It must be outside the state
    directory, and in none of that directory's backups: they could not be erased. Several processes
    may use it. ``master`` wraps the data keys. ``owner_of``: whose key seals a document or log; it
    must give the same answer for ever. ``compress_over``: longer bodies are compressed before they
    are sealed; None: none is. ``clock``: the time of erasures. Every method may block, and any
    thread may call it.

    Raises ``EncryptionKeyError`` when a key is wrong or missing, ``ErasedKeyError`` when it was
    erased, ``StorageError`` when the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        master: KeyWrapper,
        *,
        owner_of: OwnerOf = owner_by_first_segment,
        compress_over: int | None = COMPRESS_OVER_BYTES,
        clock: Clock | None = None,
    ) -> None:
        self.folder = paths.resolve_root(folder)
        """The folder, as an absolute path."""
        self._master = master
        self._owner_of = owner_of
        self._compress_over = compress_over
        self._clock = clock or SystemClock()
        self._mutex = threading.RLock()
        self._loaded: LRUCache[_Place, _OwnerKeys] = LRUCache(_OWNERS_LOADED)
        self._ident: str | None = None
        self._turn = 0
        """Loaded keys of an earlier turn are looked at again before they are used."""
        self._looked = self._reread = -math.inf
        self._folders: list[Stamp | None] = []
        self._was_changed = False

    @property
    def ident(self) -> str | None:
        """The id of the keyring; None before it has a key. It proves the master key."""
        with self._mutex:
            if self._ident is None and (keys := self._read(_FIRST)) is not None:
                self._prove(keys)
            return self._ident

    def prepare(self) -> str:
        """The id of the keyring, made with its first key if it has none."""
        with self._mutex:
            return self.ident or self._prove(self._make(_FIRST))

    def _prove(self, keys: _OwnerKeys) -> str:
        ident = next(iter(keys.wrapped), None)
        if ident is None:
            raise EncryptionKeyError("a file of keys is damaged", path=self._path(_FIRST))
        self._unwrap(_FIRST, keys, ident)
        self._ident = ident
        return ident

    # -- sealing -------------------------------------------------------------------------------

    def seal(self, place: DocumentId, body: bytes, *, record: bool = False) -> bytes | None:
        """The sealed body; None if ``load`` must be called first.

        Equal bodies of one document give equal bytes, so that a save that changes nothing writes
        nothing; with ``record`` they differ.
        """
        keys = self._fresh(self._place_of(place))
        if keys is None:
            return None
        if keys.active is None:
            raise self._missing(place, keys, None)
        key = keys.unwrapped.get(keys.active)
        if key is None:
            return None
        form, text = _PLAIN, body
        if self._compress_over is not None and len(body) > self._compress_over:
            packed = zlib.compress(body, 6)
            if len(packed) < len(body):
                form, text = _DEFLATED, packed
        context = _context(form, place, record=record)
        nonce = (
            secrets.token_bytes(_NONCE_BYTES)
            if record
            else hmac.digest(key.nonces, context + text, "sha256")[:_NONCE_BYTES]
        )
        data = _base64(nonce + key.cipher.encrypt(nonce, text, context))
        return b'{"_sealed":"%b.%b.%b"}' % (form, key.ident, data)

    def open(self, place: DocumentId, sealed: bytes, *, record: bool = False) -> bytes | None:
        """The body that was sealed; None if ``load`` must be called first.

        Raises ``StateCorruptedError`` when it is damaged, or another document's.
        """
        form, ident, data = _parse_envelope(sealed)
        keys = self._fresh(self._place_of(place))
        if keys is None:
            return None
        key = keys.unwrapped.get(ident)
        if key is None:
            if ident not in keys.absent:
                return None
            raise self._missing(place, keys, ident)
        try:
            context = _context(form, place, record=record)
            text = key.cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], context)
            return _inflate(text) if form == _DEFLATED else text
        except (InvalidTag, ValueError, zlib.error) as error:
            raise StateCorruptedError(
                "the encrypted content is damaged, or another document's",
                kind=place[0],
                key=place[1],
            ) from error

    def place_of_record(self, log: DocumentId, dedupe_key: str | None) -> DocumentId:
        """The log; for what cleanup archived, the document that was archived in it.

        Agents of every owner are archived in one log, with the key ``("archive",)``: a record there
        counts as one of ``(agent, "archive")``, which ``owner_of`` is asked for.
        """
        kind, key = log
        if key == (ARCHIVE,) and dedupe_key is not None:
            name, found, _ = dedupe_key.rpartition("@")
            return (kind, (name, ARCHIVE)) if found and name else log
        return log

    def load(self, place: DocumentId, sealed: bytes | None) -> None:
        """Load the key that opens ``sealed``; None: the one that seals, made if there is none."""
        at = self._place_of(place)
        ident = None if sealed is None else _parse_envelope(sealed)[1]
        with self._mutex:
            self._look()
            keys = self._read(at)
            if keys is None:
                keys = self._make(at) if sealed is None else _OwnerKeys()
            keys.turn = self._turn
            self._loaded.set(at, keys)
            ident = ident or keys.active
            if ident in keys.wrapped:
                self._unwrap(at, keys, ident)
            elif ident is not None:
                keys.absent.add(ident)

    def _fresh(self, at: _Place) -> _OwnerKeys | None:
        keys = self._loaded.get(at)
        fresh = time.monotonic() - self._looked < FRESH_SECONDS
        return keys if keys and fresh and keys.turn == self._turn else None

    def _look(self) -> None:
        """Look, once in ``FRESH_SECONDS``, whether a file of keys was added, replaced or removed.

        A second change in the same tick of the file system's clock would not show: after a change
        the files are looked at for two turns.
        """
        now = time.monotonic()
        if now - self._looked < FRESH_SECONDS:
            return
        found = [fileio.stat_file(f"{self.folder}/{group}") for group in ("kinds", "owners")]
        changed = found != self._folders
        if changed or self._was_changed or now - self._reread > REREAD_SECONDS:
            self._turn, self._reread = self._turn + 1, now
        self._looked, self._folders, self._was_changed = now, found, changed

    def _missing(
        self, place: DocumentId, keys: _OwnerKeys, ident: str | None
    ) -> EncryptionKeyError:
        about: dict[str, Any] = {"kind": place[0], "key": place[1]}
        if keys.erased and (ident is None or ident in keys.erased):
            at = keys.erased[ident] if ident else max(keys.erased.values())
            return ErasedKeyError(f"its encryption key was erased at {at}", **about)
        return EncryptionKeyError(f"the keyring lacks its encryption key {ident}", **about)

    def reseal(self, place: DocumentId, body: bytes, *, record: bool = False) -> bytes:
        """The body sealed with the owner's newest key, also one that is not sealed.

        The same bytes if that key has sealed it, or if its key was erased.
        """
        plain = body
        if is_sealed(body):
            self.load(place, body)
            keys = self._loaded[self._place_of(place)]
            if _parse_envelope(body)[1] in (keys.active, *keys.erased):
                return body
            plain = unseal(self, place, body, record=record)
        return seal(self, place, plain, record=record)

    # -- keys ----------------------------------------------------------------------------------

    def owners(self) -> Iterator[OwnerReport]:
        """Every owner that has, or had, a key."""
        for group in ("kinds", "owners"):
            for name in fileio.list_folder(f"{self.folder}/{group}"):
                if name.endswith(paths.DOCUMENT) and not name.startswith("."):
                    content = self._content(f"{self.folder}/{group}/{name}")
                    if content is not None:
                        keys, owner = _parse_owner(content), str(content.get("owner"))
                        yield OwnerReport(owner, group == "kinds", [*keys.wrapped], keys.erased)

    def erase(self, owner: str) -> int:
        """Erase the data keys of an owner, durably; how many there were.

        Nothing that they have sealed can be read again, and nothing more can be saved for the
        owner until ``renew``. Other processes notice within a second.
        """
        at = ("owners", owner)
        with self._changing(at) as keys:
            count = len(keys.wrapped)
            now = stamp(self._clock.now())
            keys.erased.update(dict.fromkeys(keys.wrapped, now) or {"": now})
            keys.wrapped.clear()
            keys.unwrapped.clear()
            self._sweep()
        return count

    def renew(self, owner: str) -> str:
        """Give an owner a new data key, which seals from now on; its id.

        The former ones still open what they have sealed, unless they were erased.
        """
        return self._renew(("owners", owner))

    def renew_all(self) -> int:
        """``renew`` for all that have a key, and for the kinds that share one; how many."""
        places = [_place_of_report(report) for report in self.owners() if report.keys]
        for at in places:
            self._renew(at)
        return len(places)

    def rewrap(self) -> int:
        """Wrap every data key anew that an earlier master key has wrapped; how many."""
        count = 0
        for at in [*map(_place_of_report, self.owners())]:
            with self._changing(at) as keys:
                for ident, wrapped in keys.wrapped.items():
                    if not self._master.is_current(wrapped):
                        context = _key_context(at, ident)
                        with _asking("the master key cannot be used"):
                            plain = self._master.unwrap(wrapped, context)
                            keys.wrapped[ident] = self._master.wrap(plain, context)
                        count += 1
        return count

    # -- files ---------------------------------------------------------------------------------

    def _place_of(self, place: DocumentId) -> _Place:
        owner = self._owner_of(*place)
        return ("kinds", place[0]) if owner is None else ("owners", owner)

    def _path(self, at: _Place) -> str:
        return f"{self.folder}/{at[0]}/{paths.encode(at[1])}{paths.DOCUMENT}"

    def _content(self, path: str) -> dict[str, Any] | None:
        try:
            found = fileio.read_file(path)
            return parse_file(found[0]) if found is not None else None
        except StateCorruptedError as error:
            raise EncryptionKeyError(f"a file of keys is damaged: {error}", path=path) from error

    def _read(self, at: _Place) -> _OwnerKeys | None:
        """The keys in the file, as they were loaded if it has not changed; None without one."""
        path = self._path(at)
        found = fileio.stat_file(path)
        known = self._loaded.get(at)
        if known is not None and found is not None and found == known.file:
            return known
        content = self._content(path) if found is not None else None
        if content is None:
            return None
        keys = _parse_owner(content)
        keys.file = found
        return keys

    def _unwrap(self, at: _Place, keys: _OwnerKeys, ident: str) -> None:
        if ident not in keys.unwrapped:
            with _asking("the master key cannot be used"):
                data = self._master.unwrap(keys.wrapped[ident], _key_context(at, ident))
            if len(data) != DATA_KEY_BYTES or _fingerprint(b"data key", data) != ident:
                raise EncryptionKeyError(f"the data key {ident} is not the one it was")
            keys.unwrapped[ident] = _DataKey(ident.encode(), AESGCM(data[:32]), data[32:])

    def _add_key(self, at: _Place, keys: _OwnerKeys) -> str:
        data = secrets.token_bytes(DATA_KEY_BYTES)
        ident = _fingerprint(b"data key", data)
        with _asking("the master key cannot be used"):
            keys.wrapped[ident] = self._master.wrap(data, _key_context(at, ident))
        return ident

    def _make(self, at: _Place) -> _OwnerKeys:
        """The owner's first key; another process's if that was first."""
        with self._locked():
            keys = self._read(at)
            if keys is None:
                keys = _OwnerKeys()
                self._add_key(at, keys)
                self._write(at, keys)
            return keys

    def _renew(self, at: _Place) -> str:
        with self._changing(at) as keys:
            return self._add_key(at, keys)

    @contextmanager
    def _changing(self, at: _Place) -> Iterator[_OwnerKeys]:
        """The owner's keys, to be changed in the block and written after it."""
        with self._mutex, self._locked():
            keys = self._read(at) or _OwnerKeys()
            self._loaded.drop(at)  # if it fails, the file counts
            before = dict(keys.wrapped), dict(keys.erased)
            yield keys
            if before != (keys.wrapped, keys.erased):
                self._write(at, keys)

    def _sweep(self) -> None:
        """Remove what killed processes left half written: it may have keys that were erased."""
        for group in ("kinds", "owners"):
            for name in fileio.list_folder(f"{self.folder}/{group}"):
                if name.startswith(fileio.TEMPORARY):
                    fileio.remove_file(f"{self.folder}/{group}/{name}", sync=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        parent, name = os.path.split(self.folder)
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = "making the folder of the keys"
            raise storage_error(error, what, path=parent) from error
        for each in (name, f"{name}/kinds", f"{name}/owners"):
            fileio.make_directories(parent, each, sync=True)
        with locks.holding(f"{self.folder}/.lock", _LOCK_SECONDS):
            yield

    def _write(self, at: _Place, keys: _OwnerKeys) -> None:
        content = {"owner": at[1], "keys": keys.wrapped, "erased": keys.erased}
        options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
        keys.file = fileio.replace_file(
            self._path(at), orjson.dumps(content, None, options), sync=True
        )


def _parse_owner(content: Mapping[str, Any]) -> _OwnerKeys:
    found = [content.get("keys"), content.get("erased")]
    whole = [dict(each) for each in found if isinstance(each, dict)]
    texts = [text for each in whole for text in each.values()]
    if len(whole) < len(found) or not all(isinstance(text, str) for text in texts):
        raise EncryptionKeyError("a file of keys is damaged")
    return _OwnerKeys(whole[0], whole[1])


def _parse_envelope(sealed: bytes) -> tuple[bytes, str, bytes]:
    """The form, the id of the key, and the nonce with the ciphertext."""
    found = _ENVELOPE.fullmatch(sealed)
    if found is None:
        raise StateCorruptedError("the encrypted content is damaged")
    form, ident, text = found.groups()
    try:
        return form, ident.decode(), a2b_base64(text)
    except ValueError as error:
        raise StateCorruptedError("the encrypted content is damaged") from error


def _context(form: bytes, place: DocumentId, *, record: bool) -> bytes:
    """What a ciphertext belongs to: moved elsewhere, it cannot be opened."""
    kind, key = place
    return orjson.dumps([form.decode(), "record" if record else "document", kind, *key])


def _place_of_report(report: OwnerReport) -> _Place:
    return "kinds" if report.shared else "owners", report.owner


def _key_context(at: _Place, ident: str) -> bytes:
    return orjson.dumps(["data key", *at, ident])


def _fingerprint(what: bytes, key: bytes) -> str:
    return sha256(b"agent_state %b " % what + key).hexdigest()[:16]


def _inflate(data: bytes) -> bytes:
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(data, _MOST_BYTES)
    if not unpacking.eof:
        raise ValueError("the compressed content is too large")
    return text


def _base64(data: bytes) -> bytes:
    return b2a_base64(data, newline=False)
