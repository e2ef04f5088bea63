"""How fast agent_state is, beside other ways to keep an agent's state."""
