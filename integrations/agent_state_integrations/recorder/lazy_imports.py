"""The packages of the extra ``recorder``, imported only by the functions that need them."""

from __future__ import annotations

import importlib
from typing import Any

from agent_state.errors import MissingExtraError


def arrow() -> Any:
    """The module ``pyarrow``. Raises ``MissingExtraError``."""
    return _module("pyarrow")


def arrow_parquet() -> Any:
    """The module ``pyarrow.parquet``. Raises ``MissingExtraError``."""
    return _module("pyarrow.parquet")


def arrow_compute() -> Any:
    """The module ``pyarrow.compute``. Raises ``MissingExtraError``."""
    return _module("pyarrow.compute")


def arrow_dataset() -> Any:
    """The module ``pyarrow.dataset``. Raises ``MissingExtraError``."""
    return _module("pyarrow.dataset")


def duckdb() -> Any:
    """The module ``duckdb``. Raises ``MissingExtraError``."""
    return _module("duckdb")


def jinja2() -> Any:
    """The module ``jinja2``. Raises ``MissingExtraError``."""
    return _module("jinja2")


def has_arrow() -> bool:
    """Whether Parquet and Zstandard can be used."""
    try:
        arrow()
    except MissingExtraError:
        return False
    return True


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("recorder", name.partition(".")[0]) from error
