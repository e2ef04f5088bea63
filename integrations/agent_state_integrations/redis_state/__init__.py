"""Sessions of flow backends in Redis, so that a conversation goes on after a restart.

By redis-py, or through the tools of a coaia server. Nothing here raises because Redis is away.
Needs the extra ``agent-state[redis]``; what is decided, and why: docs/specs/redis_state.spec.md.
"""

from agent_state_integrations.redis_state.cache import RedisExecutionCache as RedisExecutionCache
from agent_state_integrations.redis_state.coaia import CoaiaTransport as CoaiaTransport
from agent_state_integrations.redis_state.config import RedisConfig as RedisConfig
from agent_state_integrations.redis_state.direct import DirectTransport as DirectTransport
from agent_state_integrations.redis_state.keys import Keys as Keys
from agent_state_integrations.redis_state.keys import escape_glob as escape_glob
from agent_state_integrations.redis_state.manager import RedisSessionManager as RedisSessionManager
from agent_state_integrations.redis_state.models import BackendType as BackendType
from agent_state_integrations.redis_state.models import FlowStatus as FlowStatus
from agent_state_integrations.redis_state.models import UniversalSession as UniversalSession
from agent_state_integrations.redis_state.transports import Transport as Transport
from agent_state_integrations.redis_state.transports import TransportError as TransportError
