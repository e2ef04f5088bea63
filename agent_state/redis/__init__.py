"""What needs a Redis server: the extra ``agent-state[redis]``."""
