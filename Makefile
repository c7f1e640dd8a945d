# Every target makes .venv when it is missing or older than pyproject.toml and constraints.txt.
PYTHON ?= python3
WORKERS ?= 2
MARKS ?= not slow and not network and not gpu

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EDITABLE := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-kernels test-processes test-cluster lint typecheck bench wheel-test clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --editable '.[all]'
	touch $@

install: $(READY) ## the environment in .venv, with everything that pyra can use

demo: $(READY) ## adapt the demo backbone four times, write demo/ (about 5 minutes on 2 cores)
	$(BIN)/pyra demo --overwrite

test: $(READY) ## the quick tests; MARKS="..." selects others
	$(BIN)/pytest -q -n $(WORKERS) -m "$(MARKS)"

test-all: $(READY) ## every test this machine can run, slow ones too (gpu tests skip without a GPU)
	$(BIN)/pytest -q -n $(WORKERS) -m "not network"

test-kernels: $(READY) ## Triton's kernels in its interpreter, and compiled ahead of time: no GPU needed
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n $(WORKERS) tests/kernels
	$(BIN)/pytest -q -rP tests/kernels/test_ahead_of_time.py

lint: $(READY) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The ordinary editable install finds adapters/, tasks/ and scripts/ through an import hook, which a type checker does not
# run: it would skip them in silence. The strict install is a tree of links. It runs from build/, because in the root
# mypy would take ./pyra instead of that tree; the test counts the files it has seen.
typecheck: $(READY) ## mypy over the whole package, mapped folders included
	rm -rf build/__editable__* build/mypy && mkdir -p build/mypy
	$(EDITABLE) --config-settings editable_mode=strict
	status=0; (cd build/mypy && ../../$(BIN)/mypy --config-file ../../pyproject.toml --linecount-report . -p pyra) || status=$$?; \
	$(EDITABLE) && exit $$status
	PYRA_MYPY_REPORT=build/mypy/linecount.txt $(BIN)/pytest -q tests/test_typecheck.py

test-processes: $(READY) ## trainings and models that two processes share, and sweeps that end early
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m slow -k "processes or distributed or sweep_that" tests/backbones/test_matrix.py \
		tests/tasks/fitting tests/tasks/language tests/tasks/sweeps/test_drive.py tests/posttraining

test-cluster: $(READY) ## a sweep on a Ray cluster of two nodes, one of which is killed, and as jobs
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m slow tests/tasks/sweeps/test_cluster.py

bench: $(READY) ## measured speed and memory against the unwrapped model
	$(BIN)/pyra benchmark

wheel-test: $(READY) ## build wheel and sdist, install each into an empty folder, look inside
	$(BIN)/pytest -q -m slow tests/test_wheel.py

clean: ## remove .venv, build output and caches; results (demo/, runs/) stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage htmlcov
	find pyra adapters tasks scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
