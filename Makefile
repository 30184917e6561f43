# Needs git, make and python3 >= 3.10 with venv; everything else is installed into .venv.
#
#   make demo PYTHON=python3.12        choose the interpreter
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                      PyTorch's CPU build: a small fraction of the default download, no CUDA libraries
#
# Both choices are read when .venv is made: `make clean` first to change them.

PYTHON ?= python3
PIP_FLAGS ?=
# A worker for each core, with one thread each; tests that need torch's own threads are marked `threads`.
PYTEST_FLAGS ?= -n auto --dist loadgroup

HUNT_SECONDS ?= 3600
HUNT_SEED ?= 0

VENV := .venv
OLDER := .venv-triton-3.6
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all durations test-older-triton lint fuzz hunt tables kernels soak bench bench-toy docs report-check check clean python
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/installed  ## install what attnc needs and train the small byte-level model of examples/
	$(BIN)/python examples/byte_lm.py

test: $(VENV)/installed-dev  ## install with the development tools and run the short tier of the tests: below 8 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS) --tier short

test-all: $(VENV)/installed-dev  ## every test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS) --tier all

durations: $(VENV)/installed-dev  ## every test and the short tier, best alone on the machine; their times go to tests/durations.json
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS) --tier all --write-durations
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS) --tier short --write-durations

test-older-triton: $(OLDER)/installed  ## the kernels in the interpreter of Triton 3.6, which needs an older numpy
	PYTHONPATH=src:tests/support $(OLDER)/bin/python -m pytest $(PYTEST_FLAGS) -m "not slow" tests/runtime/executors/triton/test_kernels.py tests/runtime/executors/triton/test_weights.py tests/runtime/executors/triton/test_random_kernels.py tests/runtime/executors/triton/test_binaries.py tests/runtime/executors/triton/test_decode_kernels.py
	PYTHONPATH=src:tests/support $(OLDER)/bin/python -m pytest $(PYTEST_FLAGS) tests/stdlib_patterns/test_every_file.py -k interpreter

lint: $(VENV)/installed-dev  ## ruff, its formatter, mypy --strict and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

fuzz: $(VENV)/installed-dev  ## 100,000 texts that are nearly right: no crash, no hang, a place for every message
	PYTHONPATH=src:tests/support $(BIN)/python tests/support/fuzzing.py

hunt: $(VENV)/installed-dev  ## an hour of random patterns against Python closures, in the interpreter too, plans and hostile texts
	$(BIN)/python tests/support/hunting --seconds $(HUNT_SECONDS) --seed $(HUNT_SEED)

tables: $(VENV)/installed-dev  ## write the parser's tables anew, after a change of spec/attn.lark or of lark's version
	$(BIN)/python -m attnc.spec.reading.parser_tables

kernels: $(VENV)/installed-dev  ## compile the library's kernels for every target and read their machine code: more than an hour
	$(BIN)/python benchmarks/kernels.py; of_masks=$$?; $(BIN)/python benchmarks/recurrent_kernels.py --library; of_states=$$?; \
	$(BIN)/python benchmarks/chosen_kernels.py --library && exit $$((of_masks + of_states))

soak: $(VENV)/installed-dev  ## sixteen processes on one cold cache, 500 killed in the middle, 10,000 calls of random shapes: a quarter of an hour
	PYTHONPATH=src:tests/support $(BIN)/python benchmarks/soak.py

bench: $(VENV)/installed-dev  ## measure every suite on this CPU and write docs/performance.md: three quarters of an hour, best alone on the machine
	PYTHONPATH=src $(BIN)/python benchmarks/run.py cpu
	PYTHONPATH=src $(BIN)/python benchmarks/report.py

bench-toy: $(VENV)/installed-dev  ## every line of the benchmarks for a CPU at toy sizes: two minutes, the figures mean nothing
	PYTHONPATH=src $(BIN)/python benchmarks/run.py cpu --toy

# Not with --quiet, under which --strict counts no warnings.
docs: $(VENV)/installed-docs  ## build the documentation into build/site; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html; to search as well: $(BIN)/python -m http.server --directory build/site"

report-check: $(VENV)/installed-dev  ## move the sliders of a report in headless Chromium, where one is installed
	PYTHONPATH=src:tests/support $(BIN)/python tests/support/report_check.py

check: lint test-all  ## everything that must pass before a change goes in

clean:  ## remove .venv, caches and build output
	rm -rf $(VENV) $(OLDER) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis byte_lm.svg
	find src spec compiler runtime stdlib_patterns tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: made again when what they install from has changed.
$(VENV)/installed: pyproject.toml constraints.txt | python
	@echo "installing into $(VENV); PyTorch is a large download, this takes minutes"
	@$(PYTHON) -m venv $(VENV) || { echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing the development tools into $(VENV)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	@echo "installing mkdocs into $(VENV)"
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

# Triton 3.6 belongs to torch 2.11: pip would refuse it beside torch 2.13, so it comes by itself.
$(OLDER)/installed: pyproject.toml constraints.txt | python
	@echo "installing into $(OLDER)"
	@$(PYTHON) -m venv $(OLDER)
	@grep -v '^triton==\|^numpy==' constraints.txt > $(OLDER)/constraints.txt
	@$(OLDER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDER)/constraints.txt $(PIP_FLAGS) --editable '.[dev]' 'numpy<2.4'
	@$(OLDER)/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps triton==3.6.0
	@touch $@

python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' on PATH; attnc needs Python 3.10 or newer (choose one with make PYTHON=…)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit("error: $(PYTHON) is Python %d.%d; attnc needs 3.10 or newer (choose one with make PYTHON=...)" % v)'
