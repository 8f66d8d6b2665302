# `make` lists the targets. Another interpreter or build of torch:
#   make test PYTHON=python3.12 TORCH="torch==2.13.0 --index-url URL"
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help simulate test test-all e2e images browser lint bench bench-gpu clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo,dev]"
	@touch $@

test test-all e2e images bench bench-gpu: export HF_HUB_OFFLINE := 1
test test-all e2e images bench bench-gpu: export HF_HUB_DISABLE_TELEMETRY := 1
test test-all e2e images bench bench-gpu: export FLWR_TELEMETRY_ENABLED := 0
test test-all e2e images bench bench-gpu: export TOKENIZERS_PARALLELISM := false

# A process a core, with one thread of torch each: tests share nothing but the files of a module.
WORKERS ?= 2
IN_PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

simulate: $(STAMP) ## Run a federation on this machine
	$(BIN)/fedlr simulate

test: $(STAMP) ## Run the tests that take seconds; WORKERS=4 for four processes
	$(IN_PARALLEL)

test-all: $(STAMP) browser ## Run every test, the long statistical ones and those in a browser too
	$(IN_PARALLEL) -m "not bench and not e2e and not images" -o faulthandler_timeout=1800

e2e: $(STAMP) ## Start a SuperLink, nodes and agents as processes, run the default job, break things
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e -m e2e -o faulthandler_timeout=1200

# What pip installs as torch in them is TORCH; see tests/images/conftest.py for the other settings.
images: export IMAGES_TORCH := $(TORCH)
images: $(STAMP) ## Build the images with buildah, as root, and start a federation on them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/images -m images -x -s -rs \
		-o faulthandler_timeout=3600

browser: $(STAMP) ## Install Chromium where there is none: reports are tested in it
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	command -v google-chrome >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } || \
	$(BIN)/python -m playwright install chromium || \
	echo "no Chromium could be installed: tests in a browser will be skipped"

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Run the benchmarks: one table, and build/bench.json
	$(BIN)/python -m pytest tests/benchmarks -m bench -s -o faulthandler_timeout=3600

bench-gpu: $(STAMP) ## Test the kernels on a GPU, then measure there: build/bench-gpu.json
	$(BIN)/python -m pytest tests/kernels -m gpu
	FEDLR_BENCH_JSON=build/bench-gpu.json $(BIN)/python -m pytest tests/benchmarks/test_gpu.py \
		tests/benchmarks/test_gpu_kernels.py -m bench -s -rs -o faulthandler_timeout=1800

clean: ## Remove the environment, caches and build output; runs are kept
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find fedlr server client tests -name __pycache__ -type d -prune -exec rm -rf {} +
