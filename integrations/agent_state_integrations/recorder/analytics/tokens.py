"""Tokens by agent, model and day, and what they cost by a table that the user gives.

A table is TOML: a currency, and for each model, or a pattern of models, the price of a million
tokens.

    currency = "USD"
    ["claude-sonnet-*"]
    input = 3.0
    output = 15.0
    cache_read = 0.3
    cache_write = 3.75

Of several patterns that fit, the first one counts. A kind without a price costs nothing; a model
without one has no cost, and is named. Prices are not shipped: they change, and differ by contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, StrictFloat, StrictInt

from agent_state_integrations.recorder.analytics.summary import SEPARATOR
from agent_state_integrations.recorder.rules import checked, load_toml

KINDS = ("input", "output", "cache_read", "cache_write")
_MILLION = 1_000_000
_Price = Annotated[StrictInt | StrictFloat, Field(ge=0)]


class ModelPrice(BaseModel):
    """The price of a million tokens of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: _Price = 0.0
    output: _Price = 0.0
    cache_read: _Price = 0.0
    cache_write: _Price = 0.0


class _PriceTable(RootModel[dict[str, ModelPrice]]):
    pass


@dataclass(frozen=True, slots=True)
class Prices:
    """A table of prices."""

    currency: str
    models: Mapping[str, ModelPrice]

    @staticmethod
    def load(path: str | PathLike[str]) -> Prices:
        """Read a table. Raises ``StateValidationError``, naming the key, and ``StorageError``."""
        content = load_toml(Path(path))
        currency = str(content.pop("currency", ""))
        return Prices(currency, checked(_PriceTable, content, path).root)

    def of(self, model: str) -> ModelPrice | None:
        """The price of a model; None where no pattern fits."""
        for pattern, price in self.models.items():
            if fnmatchcase(model, pattern):
                return price
        return None


def tokens_of(counts: Mapping[str, int], prices: Prices | None) -> dict[str, Any]:
    """The part of a report: totals, and the same by agent, by model and by day (UTC)."""
    total, by = _Sum(), {name: dict[str, _Sum]() for name in ("by_day", "by_agent", "by_model")}
    unpriced = set[str]()
    for name, count in sorted(counts.items()):
        *parts, kind = name.split(SEPARATOR)
        if len(parts) != len(by):
            continue
        kind, cost = kind.removesuffix("_tokens"), 0.0
        if prices is not None:
            price = prices.of(parts[-1])
            if price is None:
                unpriced.add(parts[-1])
            else:
                cost = count * float(getattr(price, kind)) / _MILLION
        total.add(kind, count, cost)
        for group, part in zip(by.values(), parts, strict=True):
            group.setdefault(part, _Sum()).add(kind, count, cost)
    shown = prices is not None
    return {
        "total": total.to_dict(shown),
        **{name: _ranked(group, name, shown) for name, group in by.items()},
        "currency": prices.currency if prices is not None else None,
        "models_without_price": sorted(unpriced),
    }


class _Sum:
    """Tokens of each kind, and their cost."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.cost = 0.0

    def add(self, kind: str, count: int, cost: float) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.cost += cost

    def to_dict(self, with_cost: bool) -> dict[str, Any]:
        found: dict[str, Any] = {f"{kind}_tokens": count for kind, count in self.counts.items()}
        return {**found, "cost": round(self.cost, 6)} if with_cost else found


def _ranked(group: Mapping[str, _Sum], name: str, with_cost: bool) -> dict[str, Any]:
    def key(each: tuple[str, _Sum]) -> tuple[Any, ...]:
        return (each[0],) if name == "by_day" else (-sum(each[1].counts.values()), each[0])

    return {part: found.to_dict(with_cost) for part, found in sorted(group.items(), key=key)}
