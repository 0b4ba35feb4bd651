# Everything runs from .venv, which each target makes by itself when it is absent or the lock changed.
#
#   make demo       train a draft head for the embedded target, serve it, measure it (runs/demo)
#   make test       lint and every test
#   make test-fast  the tests that start no server
#   make lint       ruff and mypy
#   make env        what this machine has, and what it lacks for best speed
#   make lock       work out requirements-cpu.lock again
#   make clean      remove .venv, runs and caches

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCK := requirements-cpu.lock
# Modules side by side, each on cores of its own: the fast tests on one core each, those that start servers, which need
# memory, on a half of them. A server's start is mostly imports, and those use one core.
SIDE_BY_SIDE := .venv/bin/python -m pytest --dist loadfile --numprocesses
PIP := .venv/bin/python -m pip install --disable-pip-version-check --no-deps

# Stamps hold what was installed, and where: comparing contents catches what file times miss (a changed branch, a
# moved checkout). They are written last, so an interrupted install leaves none.
LOCK_KEY := $(shell (pwd; cat $(LOCK)) | cksum)
PROJECT_KEY := $(shell (pwd; cat $(LOCK) pyproject.toml) | cksum)
ifneq ($(LOCK_KEY),$(shell cat .venv/.locked 2>/dev/null))
.venv/.locked: FORCE
endif
ifneq ($(PROJECT_KEY),$(shell cat .venv/.installed 2>/dev/null))
.venv/.installed: FORCE
endif

.PHONY: help demo test test-fast lint lock env clean FORCE

help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/.installed
	@.venv/bin/specdec demo

test: lint test-fast
	@$(SIDE_BY_SIDE) 2 -m vllm

test-fast: .venv/.installed
	@OMP_NUM_THREADS=1 $(SIDE_BY_SIDE) auto -m "not vllm"

lint: .venv/.installed
	@.venv/bin/ruff check .
	@.venv/bin/mypy

lock: # any pip will do: the present lock need not install
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	@.venv/bin/python .ci/lock.py
	@echo "$(LOCK) is written; the next make installs it"

env: .venv/.installed
	@.venv/bin/specdec env

clean:
	rm -rf .venv runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: .venv/.locked
	@rm -f $@
	@$(PIP) --quiet --no-build-isolation -e .
	@echo '$(PROJECT_KEY)' >$@

.venv/.locked:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "specdec needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "making .venv with $(LOCK): about 190 packages, once (a few minutes)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) --no-compile --progress-bar off --log .venv/install.log -r $(LOCK) 2> >(grep -v '^WARNING:' >&2) | \
	  awk '/^(Collecting|Processing)/ && ++n % 25 == 0 { print "  fetched " n; fflush() } /^Installing/ { print "  unpacking"; fflush() }' || \
	  { if grep -q 'No matching distribution found for torch=' .venv/install.log; then \
	      echo "pip cannot find PyTorch's CPU build: name PyTorch's CPU wheel index in PIP_EXTRA_INDEX_URL and run make again" >&2; \
	    fi; exit 1; }
	@# on every core, which pip doesn't; a file that is no Python of this version (a template) only stays as it is
	@echo "  compiling"; .venv/bin/python -W ignore -m compileall -qq -j 0 .venv/lib || true
	@echo '$(LOCK_KEY)' >$@
