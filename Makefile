# The two commands of the README are `make run` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
PYTHON := python3
endif
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PROTO_VENV := .venv-proto
PROTO_OUT := src
PROTOS := $(wildcard protos/moe_debugger/v1/*.proto)
PYTEST := $(BIN)/python -m pytest
# Where make itself runs inside another make or a terminal's job control, `up` still gets its own Ctrl-C.
ARGS ?=

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-zA-Z_-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  make %-18s %s\n", $$1, $$2}'

# --- environment ---------------------------------------------------------------------------------------------

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || { echo "making the environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the packages (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools for tests and checks"
	@$(PIP) install -c constraints.txt -e '.[all,dev]'
	@touch $@

$(PROTO_VENV)/.installed: Makefile
	@$(PYTHON) -m venv $(PROTO_VENV)
	@# grpcio-tools 1.76 on purpose: its output runs on every protobuf from 6.31.1 on. It holds protobuf below 7, hence the own environment.
	@$(PROTO_VENV)/bin/python -m pip --disable-pip-version-check -q install grpcio-tools==1.76.0 mypy-protobuf==5.1.0
	@touch $@

.PHONY: install
install: $(VENV)/.installed web ## Make .venv with everything that `make run` needs, and build the page

.PHONY: dev
dev: $(VENV)/.installed-dev ## Add the tools for tests and checks to .venv

.PHONY: web
web: $(VENV)/.installed ## Build the page into the gateway's package (node on PATH, else the node wheel)
	@$(BIN)/python web/build.py

# --- run -----------------------------------------------------------------------------------------------------

.PHONY: run
run: install ## Start the whole fleet with the demo model and print the page's URL
	@exec $(BIN)/moe-debugger up $(ARGS)

.PHONY: doctor
doctor: $(VENV)/.installed ## Say what is installed and what is missing
	@$(BIN)/moe-debugger doctor

# --- checks --------------------------------------------------------------------------------------------------

.PHONY: lint
lint: dev proto-check web ## ruff, import-linter, buf, generated code is fresh, the page's linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against baseline.binpb
	@$(BIN)/python web/build.py lint

.PHONY: type
type: dev web ## mypy --strict, pyright, tsc
	@$(BIN)/mypy
	@$(BIN)/pyright
	@$(BIN)/python web/build.py typecheck

.PHONY: fmt
fmt: dev ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python web/build.py format

.PHONY: browser
browser:
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing Debian's chromium for the browser tests"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "the browser tests need Debian's chromium on PATH: as root, 'apt-get install chromium'" >&2; exit 1; fi; }

.PHONY: test
test: install dev browser ## All tests but the slow ones
	@$(BIN)/python web/build.py test
	@$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-unit
test-unit: dev ## Only the unit tests
	@$(PYTEST) tests/unit $(ARGS)

.PHONY: test-slow
test-slow: install dev browser ## The long form of fault cases and matrices
	@$(PYTEST) -m slow $(ARGS)

.PHONY: bench
bench: dev ## Benchmarks: ratios from one run, one JSON line each
	@for bench in tests/bench/bench_*.py; do echo "$$bench"; $(BIN)/python $$bench; done

# --- generated code ------------------------------------------------------------------------------------------

.PHONY: proto
proto: $(PROTO_VENV)/.installed ## Generate the Python code from protos/
	@$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I protos \
	  --plugin=protoc-gen-mypy=$(PROTO_VENV)/bin/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(PROTO_VENV)/bin/protoc-gen-mypy_grpc \
	  --python_out=$(PROTO_OUT) --grpc_python_out=$(PROTO_OUT) \
	  --mypy_out=quiet:$(PROTO_OUT) --mypy_grpc_out=quiet:$(PROTO_OUT) $(PROTOS)

.PHONY: proto-check
proto-check: $(PROTO_VENV)/.installed ## Fail where the committed generated code is not what protos/ gives
	@rm -rf build/proto && mkdir -p build/proto
	@$(MAKE) --no-print-directory proto PROTO_OUT=build/proto
	@diff -r -x __pycache__ -x __init__.py -x py.typed build/proto/moe_debugger/v1 src/moe_debugger/v1 \
	  || { echo "src/moe_debugger/v1 is stale: run 'make proto' and commit" >&2; exit 1; }

.PHONY: clean
clean: ## Remove the environments and everything that was built
	@rm -rf $(VENV) $(PROTO_VENV) build dist web/node_modules services/gateway/moe_gateway/static
