"""The packages of the extra ``recorder``, imported by those alone who need them."""

from __future__ import annotations

import importlib
from typing import Any

from agent_state.errors import MissingExtraError

EXTRA = "recorder"


def arrow() -> Any:
    """The module ``pyarrow``. Raises ``MissingExtraError``."""
    return _module("pyarrow")


def arrow_parquet() -> Any:
    """The module ``pyarrow.parquet``. Raises ``MissingExtraError``."""
    return _module("pyarrow.parquet")


def arrow_compute() -> Any:
    """The module ``pyarrow.compute``. Raises ``MissingExtraError``."""
    return _module("pyarrow.compute")


def duckdb() -> Any:
    """The module ``duckdb``. Raises ``MissingExtraError``."""
    return _module("duckdb")


def has_arrow() -> bool:
    """Whether Parquet and Zstandard are there."""
    try:
        arrow()
    except MissingExtraError:
        return False
    return True


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(EXTRA, name.partition(".")[0]) from error
