"""What an installation holds, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import agent_state

ROOT = Path(__file__).parent.parent

EXTRAS = {
    "fastapi",
    "langgraph",
    "opentelemetry",
    "pyarrow",
    "redis",
    "rich",
    "typer",
    "uvicorn",
    "zmq",
}


def test_integrations_holds_one_python_package_and_the_typescript_packages() -> None:
    # A folder named like a framework would make `import <framework>` succeed as an empty namespace.
    directories = {path.name for path in (ROOT / "integrations").iterdir() if path.is_dir()}

    assert directories == {"agent_state_integrations", "typescript"}
    assert not [*(ROOT / "integrations" / "typescript").glob("*.py")]


def test_importing_agent_state_imports_no_extra() -> None:
    loaded = {each.partition(".")[0] for each in _loaded_by("from agent_state import *")}
    assert "agent_state" in loaded
    assert not loaded & (EXTRAS | {"agent_state_integrations", "pytest"})


def test_importing_agent_state_imports_what_is_asked_for() -> None:
    assert not _loaded_by("import agent_state") & {"pydantic", "orjson", "agent_state.manager"}
    stored = _loaded_by("from agent_state import StatePersistenceManager")
    assert "agent_state.manager" in stored
    assert "agent_state.runtime" not in stored
    assert {*agent_state.__all__} <= {*dir(agent_state)}
    for name in agent_state.__all__:
        assert getattr(agent_state, name) is not None
    with pytest.raises(AttributeError, match="'agent_state' has no attribute 'nothing'"):
        agent_state.nothing  # type: ignore[attr-defined]  # noqa: B018


def _loaded_by(statement: str) -> set[str]:
    """The modules that are there after a statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {*done.stdout.split()}


@pytest.mark.parametrize("package", ["agent_state", "agent_state_integrations"])
def test_types_are_shipped(package: str) -> None:
    assert resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    ("module", "extra", "missing"),
    [
        ("agent_state.encryption", "crypto", "cryptography"),
        ("agent_state.redis", "redis", "redis"),
        ("agent_state.redis.store", "redis", "redis"),
        ("agent_state.redis.client", "redis", "redis"),
        ("agent_state.web", "server", "fastapi"),
        ("agent_state.web.server", "server", "uvicorn"),
        ("agent_state_integrations.redis_state", "redis", "redis"),
        ("agent_state_integrations.redis_state.config", "redis", "redis"),
        ("agent_state_integrations.journey.redis_cache", "redis", "redis"),
        ("agent_state_integrations.journey.routes", "server", "fastapi"),
        ("agent_state_integrations.orchestration.routes", "server", "fastapi"),
        ("agent_state_integrations.recorder.routes", "server", "fastapi"),
        ("agent_state_integrations.recorder.network.daemon", "recorder", "zmq"),
        ("agent_state_integrations.recorder.network.client", "recorder", "zmq"),
    ],
)
def test_a_module_without_its_extra_says_what_to_install(
    module: str, extra: str, missing: str
) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import {module}"

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    last = done.stderr.strip().splitlines()[-1]
    advice = f"{missing} is missing; install it with: pip install 'agent-state[{extra}]'"
    assert last == f"agent_state.errors.MissingExtraError: {advice}"
