"""The store and the mirror in Redis; they need the extra ``agent-state[redis]``."""

from agent_state.errors import needs_extra

with needs_extra("redis", "redis"):
    from agent_state.redis.mirror import RedisMirror as RedisMirror
    from agent_state.redis.store import RedisStateStore as RedisStateStore
