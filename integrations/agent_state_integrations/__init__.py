"""Adapters that plug agent_state under other frameworks, one module each."""
