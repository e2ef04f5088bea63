"""Sessions and results as JSON objects: the current schema, and the older ones that are read.

The written version is 2.0: flat, with every field of the session. Older versions are read:

- 1.0: times in ``metadata`` (``created_at``, ``last_active``), no user, no counters;
- without a version: flat, times without a zone, otherwise as 1.0; a result without anything
  around it.

Another minor version is read, and its unknown fields are kept. Another major version is refused.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
)

from agent_state.clock import SystemClock
from agent_state.errors import (
    SchemaTooNewError,
    SerializationError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.protocols import JsonObject
from agent_state.serializers import JSONStateSerializer

SCHEMA_VERSION = "2.0"
ENCODING = "gzip+base64"
_MOST_BYTES = 2**28
_FORMER_STATUSES = {
    "none": "pending",  # version 1 wrote null for a status it did not know
    "idle": "pending",
    "active": "running",
    "error": "failed",
    "success": "completed",
}
_serializer = JSONStateSerializer()
REDACTED = "[redacted]"

SECRET_NAMES = (
    "*api_key",
    "*apikey",
    "*access_key",
    "*secret_key",
    "*private_key",
    "*secret",
    "*password",
    "*passwd",
    "*passphrase",
    "*access_token",
    "*refresh_token",
    "*auth_token",
    "*bearer_token",
    "*api_token",
    "token",
    "*authorization",
    "*credentials",
    "cookie",
    "set_cookie",
)
"""Names of fields whose values are never stored, as patterns; ``apiKey`` is read as ``api_key``."""


class BackendType(StrEnum):
    """The system that runs the flows."""

    FLOWISE = "flowise"
    LANGFLOW = "langflow"
    CUSTOM = "custom"


class FlowStatus(StrEnum):
    """The progress of the current flow."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""An aware time in UTC. A naive time is read as UTC, one of another zone is converted."""

Count = Annotated[int, Field(ge=0, lt=2**53)]


class UniversalSession(BaseModel):
    """One conversation of a user with a flow. Every field is stored and restored unchanged.

    Unknown fields are kept, so an older program does not lose fields of a newer one. Raises
    pydantic's ``ValidationError`` (a ``ValueError``), on assignment too.
    """

    model_config = ConfigDict(extra="allow", validate_assignment=True)

    id: Annotated[str, Field(min_length=1)]
    """The name of the session, chosen by the caller."""
    backend: BackendType
    """The system that runs this session's flows."""
    backend_session_id: str = ""
    """The backend's name for the session; empty until it has one."""
    status: FlowStatus = FlowStatus.PENDING
    """The progress of the current flow."""
    current_flow_id: str | None = None
    """The flow that runs or ran last; None before the first."""
    context: dict[str, Any] = Field(default_factory=dict)
    """The flow's variables, as JSON."""
    history: list[dict[str, Any]] = Field(default_factory=list)
    """The messages so far, as JSON objects."""
    created_at: Moment = Field(default_factory=SystemClock().now)
    """The time of the session's creation."""
    updated_at: Moment = Field(default_factory=SystemClock().now)
    """The time of its last change, set by the caller."""
    expires_at: Moment | None = None
    """The time at which the backend ends its session; it does not limit the time in Redis."""
    user_id: str | None = None
    """The user; None if unknown."""
    total_queries: Count = 0
    """The number of queries, counted by the caller."""
    successful_queries: Count = 0
    """The number of successful queries, counted by the caller."""
    total_response_time: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    """The sum of response times in seconds, counted by the caller."""


class Redactor:
    """Replaces the values of fields that hold credentials, by their names, at any depth.

    A credential inside a text cannot be recognised and is stored with it.
    """

    def __init__(self, names: Iterable[str] = SECRET_NAMES) -> None:
        if isinstance(names, str):
            raise TypeError("secret_names is a collection of patterns, not one text")
        patterns = [translate(_words(name)) for name in names]
        secret = re.compile("|".join(patterns) or r"[^\s\S]")
        self._is_secret = lru_cache(4096)(lambda name: bool(secret.match(_words(name))))

    def __call__(self, value: JsonObject) -> tuple[JsonObject, list[str]]:
        """A copy without credentials, and where there were any."""
        found: list[str] = []
        return self._copied(value, "", found, 1), found

    def _copied(self, value: Any, where: str, found: list[str], level: int) -> Any:
        if level > 250:  # the serializer refuses it, and names the place
            return value
        if type(value) is dict:
            return {
                name: self._field(name, item, where, found, level) for name, item in value.items()
            }
        if type(value) is list or type(value) is tuple:
            return [
                self._copied(item, f"{where}[{index}]", found, level + 1)
                if type(item) in {dict, list, tuple}
                else item
                for index, item in enumerate(value)
            ]
        return value

    def _field(self, name: Any, item: Any, where: str, found: list[str], level: int) -> Any:
        if type(name) is str and item and item != REDACTED and self._is_secret(name):
            found.append(f"{where}.{name}".lstrip("."))
            return REDACTED
        if type(item) in {dict, list, tuple}:
            return self._copied(item, f"{where}.{name}".lstrip("."), found, level + 1)
        return item


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(" ", "_")


def is_bare_result(record: JsonObject) -> bool:
    """Whether a record is a result without anything around it, as an older program stored it."""
    return "_schema_version" not in record and not {"execution_id", "result"} <= record.keys()


def compressed(record: JsonObject, over: float) -> JsonObject:
    """The record, compressed if its JSON is larger than ``over`` bytes and that makes it smaller.

    The serializer refuses values that are not JSON later, by name.
    """
    try:
        text = _serializer.dumps(record) if over != math.inf else b""
    except SerializationError:
        return record
    if len(text) <= over:
        return record
    body = b64encode(gzip.compress(text, mtime=0)).decode()
    if len(body) >= len(text):
        return record
    return {"_schema_version": SCHEMA_VERSION, "_encoding": ENCODING, "_body": body}


def decompressed(record: JsonObject) -> JsonObject:
    """The record as it was before ``compressed``. Raises ``StateCorruptedError``."""
    if "_encoding" not in record:
        return record
    if record["_encoding"] != ENCODING:
        raise SchemaTooNewError(f"the encoding {str(record['_encoding'])[:40]!r} is not known")
    try:
        unpacking = zlib.decompressobj(wbits=31)
        text = unpacking.decompress(b64decode(str(record.get("_body")), validate=True), _MOST_BYTES)
        if not unpacking.eof:
            raise StateCorruptedError("a compressed record is cut off, or too large")
        return _serializer.loads(text)
    except (ValueError, zlib.error) as error:
        raise StateCorruptedError("a compressed record cannot be read") from error


def written(fields: JsonObject) -> JsonObject:
    """A record of the current version."""
    return {"_schema_version": SCHEMA_VERSION, **fields}


def checked_version(document: JsonObject) -> int:
    """The major version. Raises ``SchemaTooNewError``, ``StateCorruptedError``."""
    version = document.get("_schema_version", "1.0")
    major = re.match(r"\d{1,9}(?=\.|\Z)", version) if isinstance(version, str) else None
    if major is None:
        raise StateCorruptedError(f"_schema_version is {str(version)[:40]!r}")
    if int(major[0]) > int(SCHEMA_VERSION.partition(".")[0]):
        raise SchemaTooNewError(f"_schema_version is {version}, this program reads up to 2")
    return int(major[0])


def from_session(session: UniversalSession) -> JsonObject:
    """The session's fields, times as text. The serializer refuses values that are not JSON.

    Raises pydantic's ``ValidationError`` for a session that was made invalid.
    """
    fields = {name: getattr(session, name) for name in type(session).model_fields}
    fields |= session.model_extra or {}
    reserved = [name for name in fields if name.startswith("_")]
    if reserved:
        raise StateValidationError(f"names with an underscore are reserved: {reserved}")
    times = session.model_dump(
        mode="json", include={"created_at", "updated_at", "expires_at", "backend", "status"}
    )
    fields |= times
    UniversalSession.model_validate(fields)  # lists and dicts may have been changed in place
    return written(fields)


def to_session(document: JsonObject) -> UniversalSession:
    """The session of a record of any version that is known.

    Raises ``SchemaTooNewError`` and ``StateCorruptedError``; neither repeats what was stored.
    """
    major = checked_version(document)
    fields = {name: value for name, value in document.items() if not name.startswith("_")}
    if major < 2:
        fields = _from_v1(fields)
    try:
        return UniversalSession.model_validate(fields)
    except ValidationError as error:
        places = [".".join(map(str, each["loc"])) for each in error.errors()[:5]]
        raise StateCorruptedError(f"no session, see its {', '.join(places)}") from None


def _from_v1(fields: JsonObject) -> JsonObject:
    metadata = fields.pop("metadata", None)
    if isinstance(metadata, dict):
        created, active = metadata.get("created_at"), metadata.get("last_active")
        fields = {"created_at": created, "updated_at": active or created} | fields
    status = fields.get("status")
    word = _FORMER_STATUSES.get(str(status).lower(), str(status).lower())
    if word not in {each.value for each in FlowStatus}:
        fields["former_status"], word = status, FlowStatus.PENDING.value
    fields["status"] = word
    optional = {"current_flow_id", "expires_at", "user_id"}
    return {name: value for name, value in fields.items() if value is not None or name in optional}
