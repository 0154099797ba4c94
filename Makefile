# What a newcomer and CI both use. `make` alone lists the targets.

VENV  := .venv
BIN   := $(VENV)/bin
MLET  := $(BIN)/mlet
STAMP := $(VENV)/.complete
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' mlet_dist/__init__.py)

# The first interpreter that runs, is 3.11 or 3.12 and can make virtual environments. A name may exist and still not
# run (pyenv shims), and python3 comes first because it is the one a machine's wheels are usually laid out for.
USABLE := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# tests/conftest.py says how many workers there are, and which files come first. A worker keeps rank processes of its
# own, and the tests of a file share them. ARGS="-n 0" runs all tests in one process.
TEST_WORKERS := -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test setup check lint types imports format bench docs linkcheck wheel soak gpu slurm cluster-test clean

##@ To begin with (each makes .venv first if it is missing)

demo: ## prepare synthetic data, train MLET and its baselines and compare them; a few minutes, in demo/
	@echo 'This demo writes 200,000 synthetic click logs, prepares them as a data set, trains three models on two local'
	@echo 'ranks (an MLET model, a single-layer model of the same size, and a control), exports and verifies each, and'
	@echo 'prints a table that compares them. It needs no GPU and no data of yours. On two CPU cores it takes a few minutes'
	@echo 'after the set-up, which takes about two minutes the first time. Everything is written to demo/.'
	@echo
	@$(MAKE) -s setup
	rm -rf demo
	$(MLET) synth --out demo/raw --rows 200000 --format tsv
	$(MLET) prepare criteo demo/raw/*.tsv.gz --out demo/data
	$(MLET) compare configs/demo.yaml data.path=demo/data run.dir=demo/runs --nproc 2

test: $(STAMP) ## run the tests (about 20 minutes on two cores; ARGS="-k collapse -x" selects some of them)
	@$(BIN)/python -m pytest $(TEST_WORKERS) $(ARGS)

##@ For development

help: ## list these targets
	@awk -F ':.*## ' '/^##@ / { print blank substr($$0, 5) ":"; blank = "\n" } \
	  /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv (for the GPU if torch sees one, else for the CPU), or bring it up to date; PYTHON=… picks Python

# The stamp is written last: without it .venv is incomplete and created again.
$(STAMP): pyproject.toml constraints.txt
	@'$(PYTHON)' -c '$(USABLE)' 2>/dev/null || { \
	  echo 'error: none of these is a Python 3.11 or 3.12 with ensurepip: $(or $(PYTHON),python3 python3.12 python3.11)' >&2; \
	  echo '       install one (Debian: python3.11 python3.11-venv), or name yours: PYTHON=/path/to/python3.11' >&2; \
	  exit 1; }
	@if test -f $@; then echo 'setup: bringing $(VENV) up to date'; \
	  else echo "setup: making $(VENV) with $$('$(PYTHON)' --version)"; '$(PYTHON)' -m venv --clear $(VENV); fi
	@rm -f $@
	@echo 'setup: 1/2 torch (200 MB for a CPU build, several GB and minutes for a CUDA build)'
	@$(PIP_INSTALL) torch==2.13.0
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  echo 'setup: 2/2 torch sees a GPU: mlet_dist, TorchRec for CUDA (500 MB) and the development tools'; \
	  $(PIP_INSTALL) -e '.[cuda,launch,dev,docs,bench]'; \
	else \
	  echo 'setup: 2/2 torch sees no GPU: mlet_dist, TorchRec for CPUs and the development tools'; \
	  $(PIP_INSTALL) -e '.[cpu,launch,dev,docs,bench]' && $(PIP_INSTALL) --no-deps torchrec==1.8.0; \
	fi
	@touch $@
	@echo 'setup: done; try $(MLET) --help'

check: lint types imports docs test ## what every change must pass; CI also builds and installs the wheel

lint: $(STAMP) ## look for mistakes and wrong formatting
	@found=0; $(BIN)/ruff check || found=1; $(BIN)/ruff format --check || found=1; exit $$found

types: $(STAMP) ## check the type hints
	@$(BIN)/mypy

imports: $(STAMP) ## check that dependencies between packages point one way
	@$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP) ## fix formatting and whatever else can be fixed by machine
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(STAMP) ## run every benchmark at its smallest size and print its figures (about a minute; ARGS=exchange selects one)
	@$(BIN)/python benchmarks/run_all.py $(ARGS)

docs: $(STAMP) ## build the documentation into docs/_build/html; warnings and broken references are errors
	@$(BIN)/python -m sphinx -b html -E -W --keep-going -q docs docs/_build/html
	@echo 'docs: open docs/_build/html/index.html'

linkcheck: $(STAMP) ## check the links of the documentation to other sites (needs the network)
	@$(BIN)/python -m sphinx -b linkcheck -q docs docs/_build/linkcheck

wheel: $(STAMP) ## build the sdist and the wheel in dist/, and check their metadata and contents
	rm -rf dist
	$(BIN)/python -m build --no-isolation --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/packaging/check_distributions.py dist

soak: $(STAMP) ## kill training 20 times at random moments; stop, abort and kill ranks ten times each: none hangs
	@MLET_SOAK_KILLS=20 $(BIN)/python -m pytest -s tests/training/test_kills.py $(ARGS)
	@MLET_SOAK_FAULTS=10 $(BIN)/python -m pytest -s tests/cluster/test_rank_faults.py $(ARGS)

# GPU_PYTHON is a Python that has torch, TorchRec and fbgemm already, on a machine without a network for example.
gpu: $(if $(GPU_PYTHON),,$(STAMP)) ## check everything on the NVIDIA GPUs of this machine, in ten minutes; ARGS="--device cpu" rehearses
	@$(or $(GPU_PYTHON),$(BIN)/python) -m tests.gpu.run_checks $(ARGS)

slurm: $(STAMP) ## install Slurm if it is missing (Debian, as root), and train on two nodes of one that runs here
	@tests/helpers/install_slurm.sh
	@$(BIN)/python -m pytest -m slurm $(ARGS)

cluster-test: $(STAMP) ## train on the Kubernetes cluster of KUBECONFIG while pods are killed: IMAGE=REGISTRY/mlet-dist-cpu:TAG
	@$(BIN)/python -m tests.kubernetes_trial.run_trial --image '$(or $(IMAGE),mlet-dist-cpu:$(VERSION))' $(ARGS)

clean: ## remove .venv, demo/, dist/ and caches
	rm -rf $(VENV) demo docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
