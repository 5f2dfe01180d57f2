# Every target makes its own virtual environment first. PYTHON and VENV may be set: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv

# What nothing imports need not be compiled, which for all of the packages takes half a minute.
pip := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
stamp := $(VENV)/.installed
bench_stamp := $(VENV)/.installed-bench

.PHONY: help demo test test-engines docs check check-packages fuzz bench bench-learning clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train the handwritten digits: 5 clients, 2 split servers, 1 aggregator, on this machine"
	@echo "make test    all checks and all tests"
	@echo "make test-engines"
	@echo "             what needs Ray or an S3 server, which it installs, or a name server, SLURM, Helm or"
	@echo "             a Kubernetes cluster, where they are at hand"
	@echo "make docs    a site of the documents, in build/site"
	@echo "make check   ruff (with its security rules), pyright, import-linter and the line budget"
	@echo "make check-packages"
	@echo "             whether known weaknesses are on record of the pinned packages; asks the vulnerability service"
	@echo "             of the package index, which has to be reachable"
	@echo "make fuzz    every reader of bytes from outside, ten minutes each, on Linux"
	@echo "make bench   the benchmarks, one table at the end, under ten minutes; ZSFL_DATA names the folder with MNIST"
	@echo "make bench-learning"
	@echo "             how well and how soon modes and baselines learn, about 25 minutes"
	@echo "make clean   remove the environment and the caches; runs/ stays"

demo: $(stamp)
	$(VENV)/bin/zsfl demo

test: $(stamp)
	VENV=$(VENV) tools/test
	@echo "make test: all checks and all tests passed"

# Ray is large, and wanted by few.
test-engines: $(stamp)
	$(pip) -e ".[engines,ray,store]"
	$(VENV)/bin/python -m pytest -rs tests/engines

docs: $(stamp)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build
	@echo "make docs: open build/site/index.html, or, with its search, and changes as you make them: $(VENV)/bin/mkdocs serve"

check: $(stamp)
	VENV=$(VENV) tools/check

# In an environment of its own, as it needs much that nothing else does.
check-packages:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --disable-pip-version-check -q pip-audit
	$(VENV)-audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt

fuzz: $(stamp)
	$(pip) -e ".[fuzz]"
	$(VENV)/bin/python tests/fuzz/run.py --seconds 600

bench: $(bench_stamp)
	$(VENV)/bin/python benchmarks/run.py

bench-learning: $(stamp)
	$(VENV)/bin/python benchmarks/learning.py

clean:
	rm -rf $(VENV) $(VENV)-audit build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
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
	@env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -m compileall -q zsfl
	@env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -c "import zsfl.roles, zsfl.demo, matplotlib.figure, rich.live"
	@touch $@

# What the benchmarks compare with is wanted by nobody else, so it comes when they run for the first time.
$(bench_stamp): $(stamp)
	$(pip) -e ".[bench]"
	@touch $@
