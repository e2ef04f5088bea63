"""What an installation holds, and what it costs to import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

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

    # `make release` takes the sources away, and tests what is installed.
    assert directories - {"agent_state_integrations"} == {"typescript"}
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


WITHOUT_EXTRAS = """
import importlib, json, re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

core, waiting = set(), ["agent-state"]
while waiting:
    name = waiting.pop()
    if name in core:
        continue
    core.add(name)
    try:
        needs = requires(name) or []
    except PackageNotFoundError:  # for another system
        needs = []
    waiting += [re.match(r"[\\w.-]+", each)[0] for each in needs if "extra ==" not in each]
core = {re.sub(r"[-_.]+", "-", name).lower() for name in core}
ours = ("agent_state", "agent_state_integrations")
there = {*sys.stdlib_module_names, *ours} | {
    module
    for module, names in packages_distributions().items()
    if core & {re.sub(r"[-_.]+", "-", name).lower() for name in names}
}


class NothingElse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in there and not top.startswith("_sysconfigdata"):  # of this build of Python
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NothingElse)
found = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        found[name] = None
    except Exception as error:
        found[name] = [type(error).__name__, getattr(error, "extra", None), str(error)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_extras() -> dict[str, Any]:
    """How the import of each module ends where only the dependencies of the core are installed."""
    names = []
    for package in ("agent_state", "agent_state_integrations"):
        root = Path(str(resources.files(package)))
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            names.append(".".join(parts).removesuffix(".__init__"))
    asked = [name for name in names if name.rpartition(".")[2] != "__main__"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_module_without_its_extra_says_what_to_install(
    without_extras: dict[str, Any],
) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert len(without_extras) > 200
    for module, failure in without_extras.items():
        if failure is None:
            continue
        kind, extra, text = failure
        if text == "No module named 'pytest'":
            assert module.startswith("agent_state.testing") or "pytest" in module
            continue  # fixtures and contracts are for those who have it
        assert kind == "MissingExtraError", f"{module}: {text}"
        assert extra in extras, module
        assert text.endswith(f"install it with: pip install 'agent-state[{extra}]'"), module


@pytest.mark.parametrize(
    ("module", "extra", "missing"),
    [
        ("agent_state.encryption", "crypto", "cryptography"),
        ("agent_state.redis", "redis", "redis"),
        ("agent_state.redis.client", "redis", "redis"),
        ("agent_state.telemetry", "otel", "opentelemetry"),
        ("agent_state.web", "server", "fastapi"),
        ("agent_state_integrations.a2a", "a2a", "a2a"),
        ("agent_state_integrations.agent_framework", "agent-framework", "agent_framework"),
        ("agent_state_integrations.claude_agent_sdk", "claude-agent-sdk", "claude_agent_sdk"),
        ("agent_state_integrations.google_adk", "google-adk", "google"),
        ("agent_state_integrations.journey.redis_cache", "redis", "redis"),
        ("agent_state_integrations.journey.routes", "server", "fastapi"),
        ("agent_state_integrations.key_value", "key-value", "key_value"),
        ("agent_state_integrations.langgraph", "langgraph", "langchain_core"),
        ("agent_state_integrations.mcp", "mcp", "mcp"),
        ("agent_state_integrations.openai_agents", "openai-agents", "agents"),
        ("agent_state_integrations.pydantic_ai", "pydantic-ai", "pydantic_ai"),
        ("agent_state_integrations.recorder.routes", "server", "fastapi"),
        ("agent_state_integrations.recorder.network.daemon", "recorder", "zmq"),
        ("agent_state_integrations.redis_state", "redis", "redis"),
        ("agent_state_integrations.strands", "strands", "strands"),
    ],
)
def test_a_module_names_its_extra_and_the_package(
    without_extras: dict[str, Any], module: str, extra: str, missing: str
) -> None:
    advice = f"{missing} is missing; install it with: pip install 'agent-state[{extra}]'"
    assert without_extras[module] == ["MissingExtraError", extra, advice]


def test_the_page_of_a_package_index_has_absolute_links() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "README.md").read_text()
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for each in hook["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)

    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 30
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert {"Homepage", "Source", "Issues", "Changelog"} <= project["project"]["urls"].keys()


def test_an_sdist_has_every_file_that_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is an sdist, or no checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = {*project["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]}
    always = {".gitignore", "LICENSE", "pyproject.toml"}  # hatchling adds these

    tracked = {line.partition("/")[0] for line in done.stdout.splitlines()}
    assert tracked - always == included
