"""What needs a Redis server: the extra ``agent-state[redis]``."""

from agent_state.redis.mirror import RedisMirror as RedisMirror
from agent_state.redis.store import RedisStateStore as RedisStateStore
