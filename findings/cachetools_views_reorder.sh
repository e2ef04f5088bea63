#!/usr/bin/env bash
# cachetools 8.0.2: looking at an LRUCache changes what it evicts.
#
# Guess before looking: `items()`, `values()`, `dict(cache)` and `==` only look; the entry that was used last stays.
# Seen: `Cache` inherits these from `collections.abc.Mapping`, which reads each key with `cache[key]`, and that
# is a use. After one pass over all entries the order of use is the order of insertion: the entry that was used last goes first.
# `keys()`, `in`, `len()` and `repr()` do not touch the order.
# Met: a status page that lists a cache beside the code that fills it.
#
# Output seen:
#   nothing                evicts b
#   keys()                 evicts b
#   repr()                 evicts b
#   items()                evicts a
#   values()               evicts a
#   dict(cache)            evicts a
#   cache == other         evicts a
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check cachetools==8.0.2
"$folder/venv/bin/python" - <<'PYTHON'
from collections.abc import Callable
from typing import Any

from cachetools import LRUCache

LOOKS: dict[str, tuple[Callable[[Any], object], str]] = {
    "nothing": (lambda cache: None, "b"),
    "keys()": (lambda cache: list(cache.keys()), "b"),
    "repr()": (repr, "b"),
    "items()": (lambda cache: list(cache.items()), "a"),
    "values()": (lambda cache: list(cache.values()), "a"),
    "dict(cache)": (dict, "a"),
    "cache == other": (lambda cache: cache == {"q": 0}, "a"),
}
for name, (look, expected) in LOOKS.items():
    cache = LRUCache(maxsize=3)
    cache.update(a=1, b=2, c=3)
    cache["a"]  # used last: `b` is the next to go
    look(cache)
    cache["d"] = 4
    (evicted,) = {"a", "b", "c"} - set(cache)
    print(f"{name:22} evicts {evicted}")
    assert evicted == expected, f"{name}: {expected} was evicted by version 8.0.2"
PYTHON
