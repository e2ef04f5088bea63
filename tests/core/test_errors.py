"""The errors: one tree, drawn in the module, and nothing public outside it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest

import agent_state
from agent_state import AgentStateError, StorageError, errors


def defined_in(module: object) -> list[type[BaseException]]:
    """The public exceptions that a module defines."""
    return [
        found
        for name, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, BaseException)
        and found.__module__ == getattr(module, "__name__", "")
        and not name.startswith("_")
    ]


def test_the_tree_in_the_module_is_the_tree_of_classes() -> None:
    drawn: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(
            r"(?P<indent>[ │├└─]*)(?P<name>\w+Error)(?: \((?P<base>\w+)\))?(?:  |$)", line
        )
        if found is not None:
            path[(len(found["indent"]) - 4) // 4 :] = [found["name"]]
            parent = path[-2] if len(path) > 1 else "Exception"
            drawn[found["name"]] = (parent, *filter(None, [found["base"]]))

    classes = {
        found.__name__: tuple(base.__name__ for base in found.__bases__)
        for found in defined_in(errors)
    }
    assert drawn == classes


def test_every_public_error_is_in_the_tree() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(agent_state.__path__, "agent_state.")
        if not module.name.endswith("__main__")
    ]
    outside = {
        found.__name__
        for name in names
        for found in defined_in(importlib.import_module(name))
        if not issubclass(found, AgentStateError)
    }
    # The first two end a task and a test, not being failures; the third is a response of FastAPI;
    # the last fails a test, as an assertion does.
    assert outside == {"SuspendError", "Crash", "Problem", "ScriptEndedError"}


@pytest.mark.parametrize("made", defined_in(errors), ids=lambda made: made.__name__)
def test_every_error_ends_in_error_and_is_described(made: type[BaseException]) -> None:
    assert made.__name__.endswith("Error")
    assert issubclass(made, AgentStateError)
    assert made.__doc__


def test_an_error_names_its_document_and_file() -> None:
    error = StorageError("cannot write", number=28, kind="tasks", key=("a", "1"), path="/s/a.json")

    assert str(error) == "cannot write [tasks/a/1, /s/a.json]"
    assert (error.kind, error.key, error.path, error.errno) == (
        "tasks",
        ("a", "1"),
        "/s/a.json",
        28,
    )
