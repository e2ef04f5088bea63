"""Sessions of flow backends in Redis, so that a conversation continues after a restart.

The transport is redis-py, or the tools of a coaia server. No method raises because Redis is away.
Needs the extra ``agent-state[redis]``. docs/specs/redis_state.spec.md has the decisions.
"""

from agent_state.errors import needs_extra

with needs_extra("redis", "redis"):
    from agent_state_integrations.redis_state.coaia import CoaiaTransport as CoaiaTransport
    from agent_state_integrations.redis_state.config import RedisConfig as RedisConfig
    from agent_state_integrations.redis_state.direct import DirectTransport as DirectTransport
    from agent_state_integrations.redis_state.keys import Keys as Keys
    from agent_state_integrations.redis_state.keys import escape_glob as escape_glob
    from agent_state_integrations.redis_state.manager import (
        RedisExecutionCache as RedisExecutionCache,
    )
    from agent_state_integrations.redis_state.manager import (
        RedisSessionManager as RedisSessionManager,
    )
    from agent_state_integrations.redis_state.records import BackendType as BackendType
    from agent_state_integrations.redis_state.records import FlowStatus as FlowStatus
    from agent_state_integrations.redis_state.records import UniversalSession as UniversalSession
    from agent_state_integrations.redis_state.transports import Transport as Transport
    from agent_state_integrations.redis_state.transports import TransportError as TransportError
