# Every target makes its own virtual environment first. PYTHON and VENV may be set: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv

pip := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt
stamp := $(VENV)/.installed
bench_stamp := $(VENV)/.installed-bench

.PHONY: help demo test check bench bench-learning clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train the handwritten digits: 5 clients, 2 split servers, 1 aggregator, on this machine"
	@echo "make test    all checks, then all tests"
	@echo "make check   ruff, pyright, import-linter and the line budget"
	@echo "make bench   the benchmarks, one table at the end, under ten minutes; ZSFL_DATA names the folder with MNIST"
	@echo "make bench-learning"
	@echo "             how well and how soon modes and baselines learn, about 25 minutes"
	@echo "make clean   remove the environment and the caches; runs/ stays"

demo: $(stamp)
	$(VENV)/bin/zsfl demo

test: check
	VENV=$(VENV) tools/test
	@echo "make test: all checks and all tests passed"

check: $(stamp)
	VENV=$(VENV) tools/check

bench: $(bench_stamp)
	$(VENV)/bin/python benchmarks/run.py

bench-learning: $(stamp)
	$(VENV)/bin/python benchmarks/learning.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again by the next make.
# torch comes first and alone, so that no other requirement decides which build of it is taken.
$(stamp): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "zsfl needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV): once, and it takes a few minutes"
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(pip) torch
	$(pip) -e ".[demo,test]"
	@touch $@

# What the benchmarks compare with is wanted by nobody else, so it comes when they run for the first time.
$(bench_stamp): $(stamp)
	$(pip) -e ".[bench]"
	@touch $@
