"""How fast agent_state is, compared with other ways to keep an agent's state."""
