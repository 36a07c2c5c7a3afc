# Two commands do all the set-up on a fresh machine:
#   make export   install, export the built-in model to ONNX, compare it with PyTorch, fill a mask with the bundle
#   make test     install, run the tests
# Both are quick when repeated: an installation is redone when pyproject.toml changes, the export when the code does.

PYTHON ?= python3
VENV   ?= .venv
# A version that is at hand as a CPU build in many places; a newer one from PyPI brings gigabytes of CUDA libraries.
TORCH  ?= torch==2.13.0
WORKERS ?= 2

BIN    := $(VENV)/bin
BUNDLE := build/gte-en-mlm-tiny-onnx-fp32
SOURCES := $(shell find -L gte_deploy -type f -not -name "*.pyc")

.PHONY: help export test test-slow test-gpu test-arm64 test-consumers lint audit build format docs site clean

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile

INSTALL := $(BIN)/python tools/install.py

$(VENV)/.torch:
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) "up to 3 GB, less as a CPU build" $(TORCH)
	@touch $@

$(VENV)/.export: $(VENV)/.torch pyproject.toml
	@$(INSTALL) "some 500 MB" '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@$(INSTALL) "160 packages, some 2.5 GB with what they bring" '.[dev]'
	@touch $@ $(VENV)/.export

$(BUNDLE)/manifest.json: pyproject.toml $(SOURCES) | $(VENV)/.export
	@mkdir -p build
	$(BIN)/gte-export --output $(BUNDLE) --force > build/parity.txt

export: $(BUNDLE)/manifest.json
	@cat build/parity.txt
	$(BIN)/gte-deploy fill-mask --model $(BUNDLE) "The president of the united [MASK] of America."

# A test that outlives pytest-timeout hangs in native code: its worker ends, with the stacks in the log. pytest-xdist
# waits for ever for the tests of a worker that it has replaced (3.8); without a replacement the run ends, and names it.
NO_HANG := --max-worker-restart 0 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

test: $(VENV)/.dev
	@echo "Setting up a Triton server, an environment of other libraries, and one of the lowest versions (some 1 GB, once)"
	@$(BIN)/python tests/support/triton_server.py > /dev/null || true
	@$(BIN)/python tests/support/environments.py light lowest > /dev/null || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow" $(NO_HANG)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --timeout 0

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu --timeout 0

test-arm64: $(VENV)/.dev
	$(BIN)/python tests/support/arm64.py
	$(BIN)/python -m pytest -m arm64 --timeout 0

# An environment that pip or npm cannot make has a test that is skipped by name.
test-consumers: $(VENV)/.dev
	$(BIN)/python tests/support/environments.py || true
	$(BIN)/python tests/support/javascript.py || true
	$(BIN)/python -m pytest -m consumers --timeout 0

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p gte_deploy
	$(BIN)/mypy tools
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tools/check_files.py

# Known vulnerabilities of all that is installed; it fails, too, where their data cannot be reached.
audit: $(VENV)/.dev
	$(BIN)/python tools/audit.py

# The source distribution, the wheel, and the wheel's bill of materials (SBOM, CycloneDX), in dist.
build: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tools/sbom.py dist/*.whl

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What is generated of the documents; tests/test_docs.py says when that is out of date.
docs: $(VENV)/.dev
	@mkdir -p build
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python tools/readme_images.py
	$(BIN)/python -m gte_deploy.models.field_tables > build/checkpoints.md && mv build/checkpoints.md docs/checkpoints.md

# The documents as a site, in build/site.
site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
