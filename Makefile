# Every target sets up what it needs. `make help` lists them.
SHELL := /bin/bash
# Empty: the first suitable one of python3, python3.12, python3.13 and pyenv's versions.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MUTATE := $(BIN)/python tools/mutate.py --minutes 1.2
DEMO ?= demo
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help setup demo check check-constraints format test newest oldest faults mutate test-gpu bench bench-gpu docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install m1 with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@sh tools/set_up.sh $(VENV) $(PYTHON)

demo: setup ## the main job on a tiny model: text, five stages, fine-tuning, export, report
	@echo "== an end-to-end run on this machine's CPU; results go to $(DEMO)/"
	$(BIN)/m1 demo --dir $(DEMO)

check: setup ## format, lint, spelling, types and import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

check-constraints: setup ## constraints.txt resolves for every supported Python, with the index's torch and with a CPU build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check_constraints.py

format: setup ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup ## all tests that need no GPU
	@echo "== running the tests (a few minutes; none needs a GPU or a network)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu and not faults"

newest: ## the suite with the newest versions that pyproject.toml allows, in an environment of its own
	VERSIONS=newest sh tools/set_up.sh $(VENV)-newest $(PYTHON)
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n auto --dist worksteal -m "not gpu and not faults"

oldest: ## the suite with the oldest versions that pyproject.toml allows
	VERSIONS=oldest sh tools/set_up.sh $(VENV)-oldest $(PYTHON)
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n auto --dist worksteal -m "not gpu and not faults"

faults: setup ## fault campaigns: flipped bits, kills, full disks, second commands (about two hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults

mutate: setup ## change the sources one place at a time; says which changes no test notices (about 20 minutes)
	$(MUTATE) m1_stages.curriculum tests/unit/test_schedules.py
	$(MUTATE) m1_stages.decay tests/unit/test_decay_values.py
	$(MUTATE) m1_stages.guard tests/unit/test_guard_values.py
	$(MUTATE) m1_stages.config.load tests/unit/test_config_values.py tests/unit/test_config_load.py
	$(MUTATE) m1_data.sampling.fitting tests/unit/test_data_mix_values.py
	$(MUTATE) m1_data.sampling.mix tests/unit/test_data_mix_values.py
	$(MUTATE) m1_data.sampling.mix_report tests/unit/test_data_mix_values.py
	$(MUTATE) m1_data.sampling.packing tests/unit/test_data_packing_values.py
	$(MUTATE) m1_data.sampling.pieces tests/unit/test_data_packing_values.py
	$(MUTATE) m1_data.chat.encoder tests/unit/test_chat_values.py
	$(MUTATE) m1_data.chat.sandbox tests/unit/test_chat_values.py
	$(MUTATE) m1_data.chat.template_form tests/unit/test_chat_formats.py

test-gpu: setup ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: setup ## benchmarks on this machine; the figures of record are in docs/LOG.md
	$(BIN)/python benchmarks/prepare_data.py
	$(BIN)/python benchmarks/kernels_cpu.py

bench-gpu: setup ## kernel benchmarks; need a CUDA device (and fla-core, liger-kernel for their columns)
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/cross_entropy.py
	$(BIN)/python benchmarks/kernel_training.py

docs: setup ## API pages from the docstrings, and the guides, in build/docs
	$(BIN)/python tools/build_docs.py

clean: ## remove the environment, caches, builds and the demo
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache $(DEMO)
