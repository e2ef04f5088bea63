"""What is kept: one conversation of a user with a flow of some backend."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

from agent_state.clock import SystemClock


class BackendType(StrEnum):
    """What runs the flows."""

    FLOWISE = "flowise"
    LANGFLOW = "langflow"
    CUSTOM = "custom"


class FlowStatus(StrEnum):
    """How far the current flow is."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""An aware time in UTC. A naive one is read as UTC, one of another zone is converted."""

Count = Annotated[int, Field(ge=0, lt=2**53)]


class UniversalSession(BaseModel):
    """One conversation, whatever backend runs it. Every field is stored and comes back equal.

    ``context`` and ``history`` hold JSON. ``expires_at`` is when the *backend* forgets its
    session: it is kept as it is and has no say in how long Redis keeps this one. ``user_id``,
    the counters and ``total_response_time`` (seconds) are the caller's own. Unknown fields are
    kept, so that a program of an older version does not lose what a newer one wrote. Raises
    pydantic's ``ValidationError`` (a ``ValueError``), on assignment too.
    """

    model_config = ConfigDict(extra="allow", validate_assignment=True)

    id: Annotated[str, Field(min_length=1)]
    backend: BackendType
    backend_session_id: str = ""
    """The backend's own name for it; empty while it has none."""
    status: FlowStatus = FlowStatus.PENDING
    current_flow_id: str | None = None
    context: dict[str, Any] = Field(default_factory=dict)
    history: list[dict[str, Any]] = Field(default_factory=list)
    created_at: Moment = Field(default_factory=SystemClock().now)
    updated_at: Moment = Field(default_factory=SystemClock().now)
    expires_at: Moment | None = None
    user_id: str | None = None
    total_queries: Count = 0
    successful_queries: Count = 0
    total_response_time: Annotated[FiniteFloat, Field(ge=0)] = 0.0
