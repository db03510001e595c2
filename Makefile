# Everything runs in a virtual environment that the first command makes.
# make PYTHON=python3.12 test   uses another interpreter (its own environment).
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv/$(VERSION)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= configs/tiny.py
WORKDIR ?= runs/tiny
ARGS ?=
EXTRAS ?= dev
SCHEMA := $(BIN)/check-jsonschema --quiet --builtin-schema vendor.
THEIRS := $(if $(TORCH_PYTHON),--torch_python $(TORCH_PYTHON))
# uv, where it is installed, takes seconds instead of minutes (UV= for pip).
UV ?= $(shell command -v uv)
INSTALL := $(if $(UV),$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

.PHONY: train check fast test oldest lint format docs wheel bench clean setup help

help:                     ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

train: $(READY)           ## train the tiny tapered model (WORKDIR=..., ARGS="--training.num_steps 1200")
	$(BIN)/python train.py --config $(CONFIG) --workdir $(WORKDIR) $(ARGS)

check: $(READY)           ## lint, and at the same time the tests that are fast (tests/fast.txt)
	@$(MAKE) --no-print-directory --jobs 2 lint fast

fast: $(READY)            ## only those tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations=5 $(ARGS) @tests/fast.txt

test: $(READY)            ## run all tests on 8 simulated devices (ARGS="-k name" to choose)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

oldest:                   ## the tests with the oldest versions that pyproject.toml allows (needs uv)
	uv venv --quiet --allow-existing --python $(PYTHON) .venv/oldest
	uv pip install --quiet --python .venv/oldest --resolution lowest-direct --editable '.[dev]'
	.venv/oldest/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(READY)            ## ruff, types, import rules, workflows, launch files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run
	$(BIN)/hadolint launch/Dockerfile
	$(SCHEMA)github-workflows .github/workflows/*.yml
	$(SCHEMA)github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA)github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA)citation-file-format --default-filetype yaml CITATION.cff

format: $(READY)          ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)            ## the site, in build/site; warnings and broken links are errors
	$(BIN)/mkdocs build --strict

wheel: $(READY)           ## build the wheel, check it, and train with it in a clean environment
	rm -rf build/dist build/clean build/empty
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/twine check --strict build/dist/*
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --quiet --disable-pip-version-check build/dist/*.whl
	mkdir build/empty
	cd build/empty && ../clean/bin/tlm --version && ../clean/bin/tlm plan --config tlm_440m >/dev/null
	cd build/empty && ../clean/bin/tlm train --config tiny --training.num_steps 10 --training.eval_batches 2
	cd build/empty && ../clean/bin/tlm generate --checkpoint runs/tiny --prompt "It is" --num_tokens 8

bench: $(READY)           ## the tables of docs/speed*.md (TORCH_PYTHON=..., RUN=..., DATA_DIR=... for comparisons)
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.step_time tiny
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.start_up
	$(BIN)/python -m benchmarks.neural_memory $(THEIRS)
	$(BIN)/python -m benchmarks.data
ifdef TORCH_PYTHON
	$(BIN)/python -m benchmarks.step_time others $(THEIRS)
ifdef RUN
	$(BIN)/python -m benchmarks.decoding --checkpoint $(RUN) $(THEIRS)
	$(BIN)/python -m benchmarks.evaluation --checkpoint $(RUN) --data_dir $(DATA_DIR) $(THEIRS)
endif
endif

clean:                    ## remove the environment and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

setup: $(READY)           ## only make the environment

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "tlm-jax needs Python 3.11 to 3.13, and $(PYTHON) is $(VERSION): make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV) ($(if $(UV),with uv,a few minutes), once)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@
