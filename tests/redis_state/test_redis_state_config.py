"""What the environment may say."""

from __future__ import annotations

import math

import pytest

from agent_state.errors import StateValidationError
from agent_state_integrations.redis_state import RedisConfig


def test_an_empty_environment_means_the_defaults() -> None:
    config = RedisConfig.from_env({"REDIS_PORT": " ", "REDIS_URL": ""})

    assert config == RedisConfig()
    assert dict(config) == {
        "enabled": True,
        "ttl_seconds": 86400,
        "execution_ttl_seconds": 3600,
        "key_prefix": "agentic_flywheel:",
        "host": "localhost",
        "port": 6379,
        "url": "redis://localhost:6379/0",
        "transport": "direct",
        "coaia_command": ("coaiapy-mcp",),
        "coaia_start_seconds": 30.0,
        "gzip_over_bytes": None,
        "instance": None,
        "server_id": None,
    }
    with pytest.raises(KeyError):
        config["keys"]


def test_every_variable_is_read() -> None:
    config = RedisConfig.from_env(
        {
            "REDIS_ENABLED": "False",
            "REDIS_TTL_SECONDS": "604800",
            "REDIS_EXECUTION_TTL_SECONDS": "never",
            "REDIS_KEY_PREFIX": "agentic_flywheel:prod",
            "REDIS_HOST": "redis.example",
            "REDIS_PORT": "6380",
            "REDIS_PASSWORD": "p@ss:/?#",
            "REDIS_DB": "3",
            "REDIS_STATE_TRANSPORT": "coaia",
            "REDIS_STATE_COAIA_COMMAND": "uvx --with 'mcp<2' coaiapy-mcp",
            "REDIS_STATE_INSTANCE": "desk",
            "REDIS_STATE_SERVER_ID": "prod-1",
        }
    )

    assert config == RedisConfig(
        enabled=False,
        ttl_seconds=604800,
        execution_ttl_seconds=math.inf,
        key_prefix="agentic_flywheel:prod:",
        host="redis.example",
        port=6380,
        url="redis://:p%40ss%3A%2F%3F%23@redis.example:6380/3",
        transport="coaia",
        coaia_command=("uvx", "--with", "mcp<2", "coaiapy-mcp"),
        instance="desk",
        server_id="prod-1",
    )
    assert "p%40ss" not in repr(config)


def test_the_longer_names_and_the_url_win() -> None:
    config = RedisConfig.from_env(
        {
            "REDIS_ENABLED": "true",
            "REDIS_STATE_ENABLED": "0",
            "REDIS_TTL_SECONDS": "1",
            "REDIS_SESSION_TTL_SECONDS": "2.5",
            "REDIS_URL": "rediss://user:pw@other.example:7000/2",
            "KV_URL": "redis://third.example",
            "REDIS_HOST": "unused.example",
        }
    )

    assert not config.enabled
    assert config["ttl_seconds"] == 2.5
    assert config.url == "rediss://user:pw@other.example:7000/2"
    assert (config.host, config.port) == ("other.example", 7000)
    assert RedisConfig.from_env({"KV_URL": "redis://third.example"}).host == "third.example"
    several = RedisConfig.from_env({"REDIS_URL": "redis+cluster://one.example:1,two.example:2"})
    assert several.url == "redis+cluster://one.example:1,two.example:2"
    assert RedisConfig.from_env({"REDIS_HOST": "::1"}).url == "redis://[::1]:6379/0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_ENABLED", "maybe"),
        ("REDIS_STATE_ENABLED", "2"),
        ("REDIS_TTL_SECONDS", "a day"),
        ("REDIS_TTL_SECONDS", "0"),
        ("REDIS_TTL_SECONDS", "-5"),
        ("REDIS_SESSION_TTL_SECONDS", "nan"),
        ("REDIS_EXECUTION_TTL_SECONDS", "1e300"),
        ("REDIS_PORT", "0"),
        ("REDIS_PORT", "65536"),
        ("REDIS_PORT", "six"),
        ("REDIS_DB", "-1"),
        ("REDIS_HOST", "redis://localhost"),
        ("REDIS_URL", "http://user:hunter2@localhost"),
        ("REDIS_URL", "redis://user:hunter2@localhost:port"),
        ("REDIS_KEY_PREFIX", ":"),
        ("REDIS_KEY_PREFIX", "x:session"),
        ("REDIS_STATE_TRANSPORT", "carrier pigeon"),
        ("REDIS_STATE_COAIA_COMMAND", "'coaiapy-mcp"),
    ],
)
def test_what_cannot_be_meant_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(StateValidationError, match=name) as caught:
        RedisConfig.from_env({name: value})

    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
