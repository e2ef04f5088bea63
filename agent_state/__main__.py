"""``python -m agent_state`` is the command ``agent-state``."""

from __future__ import annotations

from agent_state.cli import main

if __name__ == "__main__":
    main()
