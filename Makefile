# Every target does its own set-up and is quick the second time.
#
#   make            an editable install with the compiled kernels, in .venv
#   make test       the tests                     ARGS="-k pooling -x" goes to pytest, WORKERS=0 runs one by one
#   make bench      the benchmarks                ARGS=... goes to python -m benchmarks
#   make gpu        all there is to know of a GPU: LEG=tests one leg, OUT=folder, DRY=1 without a GPU; see tests/gpu.py
#   make plots      the README's tables and plots again, from benchmarks/results
#   make lint       ruff and mypy
#   make asan       the cases of the C++ backend with the address and undefined-behaviour sanitizers
#   make tsan       the scans on std::threads with the thread sanitizer
#   make wheel      dist/*.whl for this machine's torch
#   make clean      removes what was built, but not .venv
#
# VENV=none make ...  uses the interpreter at hand (PYTHON=python3) and downloads nothing.
# RNNATTN_BUILD=auto|none|cpu|cuda is described in setup.py.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

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

# Files go to processes whole, as their fixtures compile things, and in their order: few tests may take long.
HAS_XDIST = $(shell $(PY) -c "import xdist; print(True)" 2> /dev/null)

.PHONY: install test bench gpu plots lint asan tsan wheel clean

install: $(STAMPS)/installed

test: $(STAMPS)/installed
	RNNATTN_REQUIRE=$${RNNATTN_REQUIRE-cpp,triton} $(PY) -m pytest $(if $(HAS_XDIST),-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

bench: $(STAMPS)/installed
	OMP_PROC_BIND=true OMP_PLACES=cores $(PY) -m benchmarks $(ARGS)

# The extension is built in place by its first leg.
gpu: OUT ?= results/gpu
gpu: $(READY)
	$(PY) tests/gpu.py $(LEG) --out $(OUT) $(if $(DRY),--dry-run) $(ARGS)

plots: $(STAMPS)/installed
	$(PY) -m benchmarks --render benchmarks/results

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The sanitizers' libraries come before everything else in the process; torch itself leaks. The tests run
# from where the sanitized package lies, so that it is the one they import.
ASAN := build/asan
ASAN_CASES := tests/test_recurrent.py tests/test_attention_pool.py
asan: $(READY)
	RNNATTN_BUILD=cpu RNNATTN_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-lib $(ASAN)
	python=$$(realpath -s $$(command -v $(PY))) && cd $(ASAN) && RNNATTN_REQUIRE=cpp ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  $$python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider \
	  -k cpp $(ASAN_CASES:%=$(CURDIR)/%) $(ARGS)

tsan:
	$(MAKE) -C tests/cpp run OUT=$(CURDIR)/build/tsan FLAGS="-O1 -g -fsanitize=thread"

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
# With what stands in for instructions that this machine may lack, for the tests.
$(STAMPS)/installed: export RNNATTN_EMULATE = 1
$(STAMPS)/installed: $(READY) $(SOURCES)
	mkdir -p $(@D) && rm -f rnnattn/_C*.so
	$(PY) -m pip install --verbose --no-index --no-build-isolation --no-deps -e . > $(@D)/install.log 2>&1 \
	  || { tail -n 80 $(@D)/install.log; exit 1; }
	@grep -E '^ *rnnattn: |error: ' $(@D)/install.log || true
	touch $@
