# `make demo` and `make test` set up everything they need in a virtual environment beside this file.
#   JAX=0.11.2          use that version of JAX (default: the newest that Python allows), in a venv of its own
#   PYTHON=python3.12   use that interpreter (default: the first one on the PATH that is new enough)
#   ARGS="--preset gpu" arguments for the demo; TESTS="tests/shfl_jax -k linen" which tests to run

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JAX ?=
ARGS ?=
TESTS ?= tests
VENV := .venv$(addprefix -jax-,$(JAX))
PIN := $(if $(JAX),"jax==$(JAX)" "jaxlib==$(JAX)")
BIN := $(VENV)/bin

.PHONY: demo test lint pytest help clean
help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile; echo "targets: demo test lint pytest clean"

demo: $(VENV)/.demo
	$(BIN)/python -m training.demo $(ARGS)

test: lint pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# The tests' time is XLA's compile time. Its older emitter of fusions compiles a program in half of the time: the newer
# one makes and frees MLIR contexts for every program. A version of XLA that lacks the option ignores it.
pytest: $(VENV)/.test
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	XLA_FLAGS=--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true $(BIN)/python -m pytest -n 2 $(TESTS)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 on the PATH; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plot]' $(PIN)
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' $(PIN)
	@touch $@

clean:
	rm -rf .venv .venv-jax-* build *.egg-info
