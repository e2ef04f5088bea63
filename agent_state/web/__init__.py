"""The HTTP face: the extra ``agent-state[server]``."""
