# make demo | examples | test | test-interpreted | test-full | test-tiles | bench | gpu | lint | sanitize | check-arm64
#   | docs | wheel | wheels | build | clean
#
# Needs Python 3.10 or newer (with venv) and a C++ compiler; the first target that runs makes the rest in $(VENV).
#   PYTHON=python3.12   the interpreter to make the environment from
#   VENV=path           another environment; a torch that is already in it is kept
#   JOBS=4              test processes
#   ARGS="..."          more arguments for the demo, the bench or pytest
# FASTSEQ_BUILD=cuda compiles the CUDA kernels where there is no GPU, too: export it, as every target builds first.
# CPU kernels are compiled for this processor alone, FASTSEQ_ISAS=all: for all of them, as wheels are.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.ready
export FASTSEQ_ISAS ?= native
wheel wheels: export FASTSEQ_ISAS = all
# Two threads, so that the kernels' teams are exercised on every machine. With two test processes on two cores a waiting
# thread had better sleep than spin.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(JOBS) --dist worksteal

.PHONY: demo examples test test-interpreted test-full test-tiles bench gpu lint sanitize check-arm64 docs wheel wheels build clean
.DELETE_ON_ERROR:

demo: build
	$(PY) -m fastseq demo $(ARGS)

# ARGS="tagger forecasting" runs these two.
examples: build
	$(PY) examples/run.py $(ARGS)

# Triton kernels are compiled in the first process and interpreted in the second: Triton cannot do both in one.
test: build
	$(PYTEST) $(ARGS)
	$(if $(findstring tests/,$(ARGS)),,$(MAKE) --no-print-directory test-interpreted)

# The Triton kernels under Triton's interpreter, on the CPU. Its products are numpy's: one thread each is fastest.
test-interpreted: build
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 $(PYTEST) $(if $(findstring tests/,$(ARGS)),,tests/*/test_triton_*_interpreted.py) $(ARGS)

test-full: build
	$(PYTEST) -m full $(ARGS)
	$(if $(findstring tests/,$(ARGS)),,$(MAKE) --no-print-directory test-interpreted ARGS="-m full $(ARGS)")

# Every tile of the Triton kernels for every machine: half an hour or more.
test-tiles: build
	$(PYTEST) -m tiles $(ARGS)

bench: build
	$(PY) -m bench $(ARGS)

# On a machine with a GPU: builds what can be built, tests on it, sanitizes, times; bench/results/<device>-*.json.
# Takes $(PYTHON) with the packages it has where there is no $(VENV): nothing is installed, nothing is fetched.
GPU_PY := $(if $(wildcard $(PY)),$(PY),$(PYTHON))
gpu:
	@$(GPU_PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch finds no GPU here")' || exit 2
	PATH="$$PATH:/usr/local/cuda/bin" FASTSEQ_BUILD=$(if $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null),cuda,auto) \
	  $(GPU_PY) setup.py --quiet build_ext --inplace || $(GPU_PY) setup.py --quiet build_ext --inplace \
	  || echo 'make gpu: the extension was not built; going on with the Triton kernels alone' >&2
	@PYTHONPATH=. $(GPU_PY) -c 'import fastseq.kernels' 2>/dev/null || ln -sfn ../kernels fastseq/kernels  # not installed
	PATH="$$PATH:/usr/local/cuda/bin" PYTHONPATH=. $(GPU_PY) -m bench gpu $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The native kernels as a plain C++ program, AMX's tiles by a software model: under AddressSanitizer with
# UndefinedBehaviorSanitizer, and under ThreadSanitizer; for arm64, cross-compiled, and run by an emulator where there is one.
sanitize: $(READY)
	$(PY) tests/sanitize/run.py address thread

check-arm64: $(READY)
	$(PY) tests/sanitize/run.py arm64

# The manual, site/index.html; a link or a name that leads nowhere is an error. Nothing is fetched.
docs: $(READY)
	PATH="$(abspath $(VENV))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --clean --site-dir site

wheel: $(READY)
	$(PIP) --quiet wheel . --no-deps --no-build-isolation --wheel-dir dist
	@ls dist/*.whl

# The wheel and the source distribution as they are published, in dist/. The wheel is installed beside the newest torch
# (about 3 GB the first time; ARGS="--torch oldest", "--torch pinned" or a version: another) and checked there.
wheels: wheel
	$(PY) setup.py --quiet sdist
	$(PY) tests/wheels/check.py $(ARGS)

# Brings the extension in fastseq/ up to date with csrc/; only what changed is compiled.
build: $(READY)
	@$(PY) setup.py --quiet build_ext --inplace

# torch first, and only if it is missing; the tools then leave it as it is.
$(READY): pyproject.toml constraints.txt setup.py
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed' >&2; exit 1; }
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || \
	  { echo 'Installing torch (about 3 GB the first time)'; $(PIP) install -c constraints.txt torch; }
	@grep -vE '^(torch|triton)==' constraints.txt >$(VENV)/constraints.txt
	$(PIP) --quiet install -c $(VENV)/constraints.txt setuptools wheel
	@$(PY) setup.py --quiet build_ext --inplace  # here, where it can be watched: pip would compile in silence
	$(PIP) --quiet install -c $(VENV)/constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -f fastseq/kernels
	rm -rf build dist site *.egg-info fastseq/*.so fastseq/_build.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
