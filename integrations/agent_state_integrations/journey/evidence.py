"""The fingerprint of a record, by which a citation is checked."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from agent_state.serializers import canonical_json


def fingerprint(record: Mapping[str, Any]) -> str:
    """SHA-256 of the record's canonical JSON (compact, sorted keys), in hex."""
    return sha256(canonical_json(dict(record))).hexdigest()
