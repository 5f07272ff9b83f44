# `make run` and `make test` do all of their own set-up, in .venv; `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/sh
BIN := .venv/bin

# The embedded engine has wheels for CPython 3.11 to 3.13, so the newest of these that runs is taken.
PYTHON ?= $(shell for each in python3.13 python3.12 python3.11 python3; do \
	$$each -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 \
	&& { echo $$each; break; }; done)
PIP_INSTALL = PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help run test bench compat check format lint types settings constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: .venv/.run ## start the service, on the embedded engine unless CHAT_MONGODB_URL is set
	@exec $(BIN)/chat-history serve

test: .venv/.dev ## lint, types and all tests
	$(MAKE) --no-print-directory lint types
	$(BIN)/python -m pytest -n 3 --dist loadfile

bench: .venv/.bench ## measure against the floor and against others, in less than ten minutes
	$(BIN)/python -m benchmarks $(BENCH)

compat: .venv/.compat ## run the tests of openai and of its Agents SDK, fetched now, against the service
	$(BIN)/python -m compat

check: lint types ## lint and types only

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.dev
	$(BIN)/mypy

format: .venv/.dev ## format the code, and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

settings: .venv/.run ## write docs/settings.md from the settings
	$(BIN)/python docs/generate_settings.py > docs/settings.md

constraints: .venv/.dev ## compile constraints.txt anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --group bench --group compat --universal --python-version 3.11 \
		--upgrade --no-emit-index-url --no-annotate --no-header --quiet --output-file constraints.txt
	$(BIN)/uv pip compile benchmarks/others.in --universal --python-version 3.11 \
		--upgrade --no-emit-index-url --no-annotate --no-header --quiet --output-file benchmarks/others.txt

clean: ## remove what make made (not ./data)
	rm -rf .venv .venv-others .compat .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.base: constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed (the embedded engine has no wheels for others)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) pip
	@touch $@

.venv/.run: .venv/.base pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[embedded]'
	@touch $@

.venv/.dev: .venv/.run pyproject.toml constraints.txt
	$(PIP_INSTALL) --group dev
	@touch $@

.venv/.compat: .venv/.dev
	$(PIP_INSTALL) --group compat
	@touch $@

.venv/.bench: .venv/.dev
	$(PIP_INSTALL) --group bench
	$(PYTHON) -m venv .venv-others
	.venv-others/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/others.txt
	@touch $@
