"""The files of keys, when a call of the system fails or is the last one of the process."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from agent_state.encryption import Keyring, MasterKeys
from agent_state.errors import AgentStateError, ErasedKeyError
from agent_state.protocols import DocumentId
from agent_state.storage.sealed_store import seal, unseal
from agent_state.testing import Crash, Fault, FaultyDisk
from agent_state.testing.faults import CHANGING
from tests.faults.tally import Tally

OLD, NEW = b"o" * 32, b"n" * 32
ALICE: DocumentId = ("notes", ("alice",))
BOB: DocumentId = ("notes", ("bob",))
CAROL: DocumentId = ("notes", ("carol",))
BODY = b'{"n":1}'

FAULTS = {
    "EIO once": Fault(1, CHANGING),
    "ENOSPC for good": Fault(1, CHANGING, error=errno.ENOSPC, persistent=True),
    "crash before": Fault(1, CHANGING, "crash before"),
    "crash after": Fault(1, CHANGING, "crash after"),
    "crash torn": Fault(1, "write", "crash torn"),
}


def keyring(folder: Path, *masters: bytes) -> Keyring:
    return Keyring(folder, MasterKeys(lambda: masters or (NEW, OLD)))


def make(ring: Keyring) -> object:
    return seal(ring, CAROL, BODY)


def erase(ring: Keyring) -> object:
    return ring.erase("alice")


def renew(ring: Keyring) -> object:
    return ring.renew("alice")


def rewrap(ring: Keyring) -> object:
    return ring.rewrap()


def is_readable(folder: Path, place: DocumentId, sealed: bytes) -> bool:
    """Whether it can be opened; False only if its key was erased."""
    try:
        return unseal(keyring(folder), place, sealed) == BODY
    except ErasedKeyError:
        return False


@pytest.mark.proof("T25", "files of keys: calls fail, tear or are the last")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("operation", [make, erase, renew, rewrap])
def test_no_key_is_lost_and_an_erased_one_stays_erased(
    operation: Callable[[Keyring], object], fault: Fault, tmp_path: Path, tally: Tally
) -> None:
    origin, folder = tmp_path / "origin", tmp_path / "keys"
    first = keyring(origin, OLD)
    alice, bob = seal(first, ALICE, BODY), seal(first, BOB, BODY)
    alices_keys = (origin / "owners/alice.json").read_bytes()
    number, fired = 0, True
    while fired:
        number += 1
        shutil.copytree(origin, folder)
        result: object = None
        faulty = Fault(number, fault.call, fault.action, fault.error, persistent=fault.persistent)
        with FaultyDisk(faulty) as disk, suppress(AgentStateError, Crash):
            result = operation(keyring(folder))
        fired = disk.fired > 0
        tally.points += 1
        tally.faults += disk.fired
        tally.acknowledged += result is not None

        assert is_readable(folder, BOB, bob)
        assert is_readable(folder, ALICE, alice) or operation is erase
        if result is not None and operation is erase:
            assert not is_readable(folder, ALICE, alice)
        if isinstance(result, bytes):
            assert is_readable(folder, CAROL, result)

        # Again, without the fault: it is done, whatever was left.
        assert operation(keyring(folder)) is not None
        if operation is rewrap:
            assert unseal(keyring(folder, NEW), ALICE, alice) == BODY
        if operation is erase:
            assert not is_readable(folder, ALICE, alice)
            wrapped = alices_keys.split(b"mk1.")[1].split(b'"')[0]
            left = [path for path in folder.rglob("*") if path.is_file()]
            assert not any(wrapped in path.read_bytes() for path in left)
        shutil.rmtree(folder)
    assert number > 1, "the fault was never met"
