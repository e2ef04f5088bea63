"""The rules of the house: how large the core may be, and how its modules and classes are named."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

from tests.frameworks import ABSENT

ROOT = Path(__file__).parents[1]
CORE = ROOT / "agent_state"
INTEGRATIONS = ROOT / "integrations" / "agent_state_integrations"

MOST_MODULES = 170
MOST_LINES = 47_763
MOST_THIN_MODULES = 8
THIN_LINES = 80
LONGEST_MODULE = 650

NOUNS = {"string"}
"""Words that end in -ing and are no gerunds."""


def modules(*roots: Path) -> list[Path]:
    return sorted(path for root in roots for path in root.rglob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def classes(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            yield node.name


def test_the_core_is_small() -> None:
    core = modules(CORE)
    thin = [name(path) for path in core if path.stem != "__init__" and lines(path) < THIN_LINES]

    assert len(core) <= MOST_MODULES
    assert sum(map(lines, core)) <= MOST_LINES
    assert len(thin) <= MOST_THIN_MODULES, thin


def test_a_module_can_be_read_to_its_end() -> None:
    assert [
        f"{name(path)}: {lines(path)} lines"
        for path in modules(CORE, INTEGRATIONS)
        if lines(path) > LONGEST_MODULE
    ] == []


def test_no_class_name_is_defined_twice() -> None:
    found = Counter(each for path in modules(CORE, INTEGRATIONS) for each in classes(path))

    # Two frameworks call their contract SessionStore, and no program uses both.
    assert {each for each, count in found.items() if count > 1} == {"AgentStateSessionStore"}


def test_a_module_is_named_by_a_noun() -> None:
    assert [
        name(path)
        for path in modules(CORE, INTEGRATIONS)
        if any(word.endswith("ing") and word not in NOUNS for word in path.stem.split("_"))
    ] == []


@pytest.mark.parametrize("package", ["agent_state", "agent_state_integrations"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Imports under ``if TYPE_CHECKING`` and inside functions count too."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    imports = {
        module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules
    }

    # What imports nothing that is left is in no circle; nor is what only imports such modules.
    while free := {module for module, imported in imports.items() if not imported}:
        imports = {
            module: imported - free for module, imported in imports.items() if module not in free
        }

    # Nor is what no module that is left imports.
    while imports and (unused := imports.keys() - set().union(*imports.values())):
        imports = {module: each for module, each in imports.items() if module not in unused}
    assert sorted(imports) == []


def test_a_public_name_is_one_object() -> None:
    """No two packages export different things under one name."""
    found: dict[str, dict[int, str]] = {}
    for root in ("agent_state", "agent_state_integrations"):
        package = importlib.import_module(root)
        for module in pkgutil.walk_packages(package.__path__, f"{root}."):
            if module.ispkg and module.name.rpartition(".")[2] not in ABSENT:
                exported = importlib.import_module(module.name)
                for public in getattr(exported, "__all__", ()):
                    value = getattr(exported, public)
                    found.setdefault(public, {})[id(value)] = module.name
    several = {public: sorted(where.values()) for public, where in found.items() if len(where) > 1}

    assert len(found) > 50
    assert several == {}
