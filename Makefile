# `make run` and `make test` do all of their own set-up, in .venv; `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/sh
BIN := .venv/bin

# The embedded engine has wheels for CPython 3.11 to 3.13, so the newest of these that runs is taken. A newer
# one works with CHAT_MONGODB_URL. Where there is none of them, uv fetches one.
PYTHON ?= $(shell for each in python3.13 python3.12 python3.11 python3.14 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$each; break; }; done)
# Compiled Python is kept, also where the environment says otherwise: without it each start of the service takes
# two to three times as long, and the tests start hundreds.
export PYTHONDONTWRITEBYTECODE :=
# uv installs in a tenth of the time of pip. Both show what they do, and take their versions from constraints.txt.
UV ?= $(shell command -v uv)
ifeq ($(UV),)
VENV = $(PYTHON) -m venv
INSTALL = PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check
else
VENV = $(UV) venv --quiet --allow-existing --python $(or $(PYTHON),3.13)
INSTALL = UV_COMPILE_BYTECODE=1 UV_CONSTRAINT=constraints.txt UV_BUILD_CONSTRAINT=constraints.txt $(UV) pip install --python $(BIN)/python
endif

.PHONY: help run test test-browser wheels bench compat check format lint types client settings openapi constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: .venv/.run ## start the service, on the embedded engine unless CHAT_MONGODB_URL is set
	@exec $(BIN)/chat-history serve

test: .venv/.dev ## lint, types and all tests (those in a browser where a Chromium is found)
	$(MAKE) --no-print-directory lint types
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test-browser: .venv/.dev ## only the tests of the console in a browser; fails without a Chromium
	TEST_BROWSER_REQUIRED=1 $(BIN)/python -m pytest tests/browser

wheels: .venv/.dev ## build both wheels, install each in an environment of its own, and call one with the other
	$(BIN)/python .ci/wheels.py

bench: .venv/.bench ## measure against the floor, the plain design and others, in about ten minutes
	$(BIN)/python -m benchmarks $(BENCH)

compat: .venv/.compat ## run the tests of openai and of its Agents SDK, fetched now, against the service
	$(BIN)/python -m tests.ecosystem

check: lint types ## lint and types only

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

types: .venv/.dev
	$(BIN)/mypy

format: .venv/.dev ## format the code, and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

client: .venv/.dev ## generate the synchronous client, and copy the modules that the client shares with the service
	$(BIN)/python clients/python/generate_sync.py

settings: .venv/.run ## write docs/settings.md from the settings
	$(BIN)/python docs/generate_settings.py > docs/settings.md

openapi: .venv/.run ## write docs/openapi.json, after a change of the API that is meant
	$(BIN)/python docs/generate_openapi.py > docs/openapi.json

constraints: .venv/.dev ## compile constraints.txt anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml clients/python/pyproject.toml --all-extras --group dev --group bench --group compat --universal --python-version 3.11 \
		--upgrade --no-emit-index-url --no-annotate --no-header --quiet --output-file constraints.txt
	$(BIN)/uv pip compile benchmarks/others.in --universal --python-version 3.11 \
		--upgrade --no-emit-index-url --no-annotate --no-header --quiet --output-file benchmarks/others.txt

clean: ## remove what make made (not ./data)
	rm -rf .venv .venv-others .compat .screenshots .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.base: constraints.txt
	@test -n "$(PYTHON)$(UV)" || { echo "Python 3.11 or newer is needed, or uv, which fetches one." >&2; exit 1; }
	@echo "Installing into .venv. The first time takes up to a minute." >&2
	$(VENV) .venv
	$(INSTALL) pip
	@touch $@

.venv/.run: .venv/.base pyproject.toml constraints.txt
	$(INSTALL) --editable '.[embedded]'
	@touch $@

.venv/.dev: .venv/.run pyproject.toml clients/python/pyproject.toml constraints.txt
	$(INSTALL) --editable clients/python --editable '.[embedded]' --group dev
	@touch $@

.venv/.compat: .venv/.dev
	$(INSTALL) --group compat
	@touch $@

.venv/.bench: .venv/.dev
	$(INSTALL) --group bench
	$(VENV) .venv-others
	.venv-others/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/others.txt
	@touch $@
