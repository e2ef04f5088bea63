"""What flows answered, for a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from agent_state.clock import stamp
from agent_state.errors import SchemaTooNewError, StateCorruptedError
from agent_state.protocols import JsonObject
from agent_state_integrations.redis_state.attempts import Attempts
from agent_state_integrations.redis_state.records import checked_version, written


class RedisExecutionCache(Attempts):
    """Keeps results under ``{prefix}execution:<id>``, histories under ``{prefix}history:…``.

    An hour if not told otherwise. Its methods answer as those of ``RedisSessionManager`` do.
    """

    _ttl_name: ClassVar[str] = "execution_ttl_seconds"

    async def cache_result(
        self, execution_id: str, result: dict[str, Any], *, ttl_seconds: float | None = None
    ) -> bool:
        """Store the result of one execution; whether that was done."""
        if not isinstance(result, dict):
            raise TypeError(f"a result is a dict, not {type(result).__name__}")
        key = self._keys.execution(execution_id)
        record = self._written(execution_id=execution_id, result=result)
        return await self._put(f"execution {execution_id!r}", key, record, ttl_seconds)

    async def get_result(self, execution_id: str) -> dict[str, Any] | None:
        """The result; None when there is none, or none that can be had now."""
        what = f"execution {execution_id!r}"
        held = await self._held(what, self._keys.execution(execution_id), "result")
        return held if isinstance(held, dict) else None

    async def cache_flow_history(
        self,
        session_id: str,
        flow_id: str,
        executions: Sequence[dict[str, Any]],
        *,
        ttl_seconds: float | None = None,
    ) -> bool:
        """Store the executions of a flow in a session, in place of those stored before."""
        if not isinstance(executions, list | tuple):
            raise TypeError(f"executions are a list of dicts, not {type(executions).__name__}")
        wrong = next((each for each in executions if not isinstance(each, dict)), None)
        if wrong is not None:
            raise TypeError(f"an execution is a dict, not {type(wrong).__name__}")
        key = self._keys.history(session_id, flow_id)
        record = self._written(session_id=session_id, flow_id=flow_id, executions=list(executions))
        return await self._put(f"history {session_id!r}, {flow_id!r}", key, record, ttl_seconds)

    async def get_flow_history(self, session_id: str, flow_id: str) -> list[dict[str, Any]] | None:
        """The executions; None when none are stored, or none that can be had now."""
        what = f"history {session_id!r}, {flow_id!r}"
        held = await self._held(what, self._keys.history(session_id, flow_id), "executions")
        return held if isinstance(held, list) else None

    def _written(self, **fields: Any) -> JsonObject:
        return written({**fields, "cached_at": stamp(self._clock.now())})

    async def _held(self, what: str, key: str, name: str) -> Any:
        record = await self._get(what, key)
        try:
            if record is None:
                return None
            checked_version(record)
            if name not in record:
                raise StateCorruptedError(f"the record has no {name}", key=key)  # noqa: TRY301
        except (SchemaTooNewError, StateCorruptedError) as error:
            self._note(f"{what} is not loaded", error)
            return None
        return record[name]
