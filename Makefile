# Every target does its own set-up and is quick the second time.
#
#   make            an editable install with the compiled kernels, in .venv
#   make test       the tests                     ARGS="-k pooling -x" goes to pytest
#   make bench      the benchmarks                ARGS=... goes to python -m benchmarks
#   make plots      the README's tables and plots again, from benchmarks/results
#   make lint       ruff and mypy
#   make wheel      dist/*.whl for this machine's torch
#   make clean      removes what was built, but not .venv
#
# VENV=none make ...  uses the interpreter at hand (PYTHON=python3) and downloads nothing.
# RNNATTN_BUILD=auto|none|cpu|cuda is described in setup.py.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=

ifeq ($(VENV),none)
  PY := $(PYTHON)
  STAMPS := build/stamps$(subst /,-,$(shell $(PYTHON) -c "import sys; print(sys.prefix)"))
  READY :=
else
  PY := $(VENV)/bin/python
  STAMPS := $(VENV)/stamps
  READY := $(STAMPS)/requirements
endif

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
export PYTHONUNBUFFERED = 1
REQUIREMENTS := $(filter-out requirements/build.txt,$(wildcard requirements/*.txt))
SOURCES := setup.py pyproject.toml rnnattn/_version.py $(shell find csrc -not -name '.*')

.PHONY: install test bench plots lint wheel clean

install: $(STAMPS)/installed

test: $(STAMPS)/installed
	RNNATTN_REQUIRE=$${RNNATTN_REQUIRE-cpp,triton} $(PY) -m pytest $(ARGS)

bench: $(STAMPS)/installed
	OMP_PROC_BIND=true OMP_PLACES=cores $(PY) -m benchmarks $(ARGS)

plots: $(STAMPS)/installed
	$(PY) -m benchmarks --render benchmarks/results

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# build/lib would carry files over that are no longer in the tree.
wheel: $(READY)
	rm -rf build/lib* build/bdist*
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info rnnattn/_C*.so $(STAMPS)/installed .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/stamps/requirements: requirements/build.txt $(REQUIREMENTS)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'rnnattn needs Python 3.10, this is ' + sys.version)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements/build.txt
	$(PY) -m pip install --quiet $(REQUIREMENTS:%=-r %)
	mkdir -p $(@D) && touch $@

# An old module must not pass for one that did not compile. pip is silent about a build that succeeds,
# so what setup.py has to say (and the compiler, where setup.py goes on without it) is taken from the log.
$(STAMPS)/installed: $(READY) $(SOURCES)
	mkdir -p $(@D) && rm -f rnnattn/_C*.so
	$(PY) -m pip install --verbose --no-index --no-build-isolation --no-deps -e . > $(@D)/install.log 2>&1 \
	  || { tail -n 80 $(@D)/install.log; exit 1; }
	@grep -E '^ *rnnattn: |error: ' $(@D)/install.log || true
	touch $@
