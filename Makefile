# Needs python3 (3.11 or newer) with venv, and make. The rest is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
SIZES ?= 100 1000 10000 100000
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-rest test-all test-browser pictures screenshots test-mutants test-integrations check servers chromium coaia bench bench-growth faults release transcripts typescript docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo; echo "  PYTHON=python3.12 VENV=.venv-3.12 choose another interpreter and environment"

demo: $(VENV)/.cli ## see an agent survive a crash
	$(VENV)/bin/agent-state demo

test: check servers coaia ## checks, the quick tests, the blocks of the documents
	$(PY) -m pytest -n auto --in-memory --hypothesis-profile fast -m 'not long' tests
	$(PY) -m pytest README.md docs # the blocks of a document run in order, in one process

test-rest: servers coaia ## the long tests, and property tests with all examples; on the disk
	$(PY) -m pytest -n auto -m 'long or hypothesis' tests

test-all: check servers coaia ## everything at once, on the disk
	$(PY) -m pytest -n auto tests
	$(PY) -m pytest README.md docs

test-browser: $(VENV)/.browser chromium ## the dashboard in a real browser; minutes
	$(PY) -m pytest tests/browser

pictures: $(VENV)/.cli ## write the pictures of the README, from the real programs
	$(PY) -m tests.demo.pictures

screenshots: $(VENV)/.browser chromium ## write the pictures of docs/dashboard.md
	$(PY) -m tests.browser.screenshots

chromium:
	@.ci/install chromium

check: $(VENV)/.dev ## lint, formatting, types, layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

coaia: $(VENV)/.dev
	@$(PY) -m tests.redis_state.coaia # the coaia tools, in an environment of their own

servers:
	@.ci/install strace redis-server # tests kill and fail real system calls, and real servers

docs: $(VENV)/.dev ## the pages of docs/ and the reference as a site, in build/site; offline
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(VENV)/.bench servers coaia chromium ## how fast, beside other ways to do it
	$(PY) -m benchmarks

bench-growth: $(VENV)/.bench ## what an operation costs beside what is there: a table, and docs/growth.png; an hour with a million
	$(PY) -m benchmarks.growth --sizes $(SIZES) --png docs/growth.png

faults: $(VENV)/.faults servers ## the whole proof: every fault we can cause, and a table of what was lost
	@.ci/install fusermount3=fuse3 nbdkit nbdfuse=libnbd-bin mkfs.xfs=xfsprogs mkfs.ext4=e2fsprogs
	$(PY) -m pytest tests/faults --full -n 2 --dist load --maxschedchunk 1

test-mutants: $(VENV)/.mutants servers ## do the tests of MODULE=agent_state.manager notice a change in it? minutes to hours
	$(PY) -m tests.mutants $(MODULE)

release: servers ## build wheel and sdist into dist/, and test both on PYTHONS="python3.11 python3.13"; an hour
	.ci/release

test-integrations: $(VENV)/.dev servers ## the frameworks' adapters, each in the environment it needs; minutes
	$(PY) -m tests.integrations

transcripts: $(VENV)/.dev ## do the agents' tools still write what the recorder reads? needs npm; minutes
	$(PY) -m tests.recorder.real

typescript: $(VENV)/.dev ## the TypeScript packages: checks, tests, tarballs; needs npm with Node.js 20.19 or newer; minutes
	@.ci/install chromium # tabs of a real browser share a stream
	cd integrations/typescript && npm ci --no-audit --no-fund && npm run check && AGENT_STATE_PYTHON=$(abspath $(PY)) npm test

clean: ## remove the environment, caches and builds; never any state
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .baseline .mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp says what $(VENV) holds, and is made again when pyproject.toml changes.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cli: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[cli]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.cli

$(VENV)/.faults: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[dev,faults]'
	@touch $@ $(VENV)/.cli $(VENV)/.dev

$(VENV)/.browser: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[dev,browser]'
	@touch $@ $(VENV)/.cli $(VENV)/.dev

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[dev,bench]'
	@touch $@ $(VENV)/.cli $(VENV)/.dev

$(VENV)/.mutants: pyproject.toml | $(VENV)/bin/pip
	$(PIP) -e '.[dev,mutants]'
	@touch $@ $(VENV)/.cli $(VENV)/.dev
