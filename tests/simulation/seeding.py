"""Puts a fault into the running code, by a change of the source of one function."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

from tests.simulation.driver import simulate
from tests.simulation.histories import draw_history


@dataclass(frozen=True)
class SeededFault:
    """In a function, ``old`` (which occurs once in it) becomes ``new``.

    ``function``: ``module:name`` below ``agent_state``. ``law``: the law that is broken then.
    ``seed``: the first seed that shows it.
    """

    function: str
    old: str
    new: str
    law: str
    seed: int


@contextmanager
def seeded(fault: SeededFault) -> Iterator[None]:
    """The code with the fault, while the block runs."""
    function = find(fault.function)
    before = function.__code__
    function.__code__ = _changed(function, fault)
    try:
        yield
    finally:
        function.__code__ = before


def find(name: str) -> FunctionType:
    """The function of that name."""
    module, _, path = name.partition(":")
    found: Any = import_module(f"agent_state.{module}")
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "fget", found)
    found = inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(found, FunctionType), name
    return found


def _changed(function: FunctionType, fault: SeededFault) -> CodeType:
    source = textwrap.dedent(inspect.getsource(function))
    old = textwrap.dedent(fault.old) if fault.old.startswith("\n") else fault.old
    assert source.count(old) == 1, f"{fault.function} has changed; so must its fault"
    # With the decorators, a class around it for its private names, and the annotations as text.
    lines = ["from __future__ import annotations", "def _around():"]
    free = function.__code__.co_freevars
    if free:
        lines.append(f"    {' = '.join(free)} = None")
    lines += textwrap.indent(source.replace(old, fault.new), "    ").splitlines()
    module = compile("\n".join(lines), f"<{fault.function}, with a fault>", "exec")
    around = next(code for code in module.co_consts if isinstance(code, CodeType))
    for code in around.co_consts:
        if isinstance(code, CodeType) and code.co_name == function.__name__:
            assert code.co_freevars == free, f"{fault.function} is not to be changed like this"
            return code
    raise AssertionError(f"{fault.function} is no plain function")


def first_seed(fault: SeededFault, most: int) -> int | None:
    """The first seed that shows the fault by its law; None if none of so many does."""
    with seeded(fault):
        for seed in range(most):
            broken = simulate(draw_history(seed)).broken
            if broken is not None and broken.law == fault.law:
                return seed
    return None
