#!/usr/bin/env bash
# mutmut 3.8.1: a decorated function gets no mutants, and nothing says so.
#
# Guess before looking: each function with an operator gets a mutant; one that cannot be mutated is listed as skipped.
# Seen: a function under `@contextmanager`, `@lru_cache` or `@property` gets none, nor does a module constant or a class
# attribute. They are in no list: not survived, not skipped, not "no tests". `@staticmethod` and `@classmethod` are
# mutated. So in a code base of context managers and properties "all mutants killed" is about the rest.
# Met: a mutation run over a library whose locks and files are context managers.
#
# Output seen:
#   mutated:     plain coroutine method static
#   not mutated: LIMIT managed cached attribute prop
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check mutmut==3.8.1 pytest==8.4.2
mkdir -p src/sample tests
: >src/sample/__init__.py
cat >src/sample/code.py <<'PYTHON'
from contextlib import contextmanager
from functools import lru_cache

LIMIT = 10


def plain(n):
    return n + 1


async def coroutine(n):
    return n + 1


@contextmanager
def managed(n):
    yield n + 1


@lru_cache
def cached(n):
    return n + 1


class Sample:
    attribute = 3

    def method(self, n):
        return n + 1

    @staticmethod
    def static(n):
        return n + 1

    @property
    def prop(self):
        return 5 + 1
PYTHON
cat >tests/test_code.py <<'PYTHON'
from sample import code


def test_all_is_run():
    assert code.plain(1) == 2
    assert code.cached(1) == 2
    with code.managed(1) as value:
        assert value == 2
    assert (code.Sample().method(1), code.Sample.static(1), code.Sample().prop) == (2, 2, 6)
PYTHON
cat >pyproject.toml <<'TOML'
[project]
name = "sample"
version = "0"
[tool.mutmut]
source_paths = ["src/"]
TOML
venv/bin/mutmut run >run.txt 2>&1 || { cat run.txt; exit 1; }
venv/bin/mutmut results --all true >results.txt 2>&1
venv/bin/python - <<'PYTHON'
names = ["LIMIT", "plain", "coroutine", "managed", "cached", "attribute", "method", "static", "prop"]
text = open("results.txt").read()
mutated = [name for name in names if f"x_{name}__mutmut" in text or f"ǁ{name}__mutmut" in text]
skipped = [name for name in names if name not in mutated]
print("mutated:    ", *mutated)
print("not mutated:", *skipped)
assert mutated == ["plain", "coroutine", "method", "static"], "version 3.8.1 mutated others"
assert not any(name in text for name in skipped), "version 3.8.1 does not mention them"
PYTHON
