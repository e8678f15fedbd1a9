# Every target makes the virtual environment first if it is missing or older than the two files that define it.
# PYTHON=python3.12 make install    another interpreter
# make test ARGS="-k geometry -x"   more arguments for pytest
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.installed
# Unpacked here, never on sys.path by default: see tests/contracts/torchvision_present.py
TORCHVISION := $(VENV)/torchvision_present
OUT ?= outputs/demo
ARGS ?=

# Offline, and a cache for remote code that goes away with the run. Two workers of one thread each beat one of two threads on
# small models; the full-size tests run alone, with both.
TEST_ENV = HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$$cache"
WORKERS ?= 2
PYTEST = cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && $(TEST_ENV) $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check format types clean

help:
	@echo "make install    virtual environment in $(VENV), exact versions of constraints.txt"
	@echo "make demo       the shipped model on the shipped clip, the truth beside each result; files under $(OUT)"
	@echo "make test       tests on the CPU, offline, without the slow ones"
	@echo "make test-all   all tests (those marked gpu skip themselves where there is no GPU)"
	@echo "make check      ruff and the contract tests"
	@echo "make types      mypy"
	@echo "make format     let ruff rewrite the files"
	@echo "make clean      remove what the targets made, except $(VENV)"

# torch first and by itself, so that nothing else decides which build of it is taken. setuptools comes from the
# constraints too: the package is built with it, here and in the packaging test, without build isolation.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel torch
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[all]'
	rm -rf $(TORCHVISION)
	$(PIP) install -c constraints.txt --no-deps --target $(TORCHVISION) torchvision
	$(PIP) check
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/vidllm demo --out $(OUT)

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(PYTEST) -n $(WORKERS) --dist loadfile $(ARGS)

test-all: test
	$(PYTEST) -m "slow or gpu" $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) tests/contracts $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not follow the mapping of setuptools' editable finder, so it gets a tree of links in the shape of the package.
types: $(STAMP)
	rm -rf .typecheck && mkdir -p .typecheck/vidllm
	for file in vidllm/*; do case $$file in *__pycache__*) ;; *) ln -s ../../$$file .typecheck/vidllm/ ;; esac; done
	for folder in modeling_vidllm processing train eval; do \
		if test -n "$$(find $$folder -name '*.py' 2>/dev/null)"; then ln -s ../../$$folder .typecheck/vidllm/$$folder; fi; done
	cd .typecheck && ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p vidllm

clean:
	rm -rf .typecheck .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist vidllm.egg-info outputs
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
