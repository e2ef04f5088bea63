"""What plugs agent_state under other frameworks, and systems for one domain; nothing is imported.

- ``demo``: agents that are killed again and again, and lose nothing (``agent-state demo``);
- ``journey``: conversations with their emotional journey, citations and exports;
- ``orchestration``: orchestrators, their workflows, enabling services and delegation chains;
- ``recorder``: a durable log of messages, with queries, archives and analytics;
- ``redis_state``: sessions of flow backends in Redis (``RedisSessionManager``,
  ``RedisExecutionCache``).

Each is a package of its own, with its extra; docs/ has a page on most of them.
"""
