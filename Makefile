PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INTEROP ?= .venv-interop
# The version of torch, and the package index that it comes from (pip's own if empty): CPU wheels have one of their own.
TORCH ?= $(shell sed -n 's/^torch==//p' requirements/dev.lock)
TORCH_INDEX ?=
export PYTHONHASHSEED := 0

.PHONY: env kernels demo test coverage test-matrix check bench gpu docs interop sweep sweep-short reliability \
	reliability-short wheel newcomers lock clean results
env: $(VENV)/.installed          ## make the environment (idempotent)
kernels:                         ## compile the C++ kernels in place, as `make env` does
	$(BIN)/python setup.py --quiet build_ext --inplace
demo: env                        ## the whole idea in minutes on a laptop; ends with a table and report.html
	$(BIN)/espalier demo --out runs/demo
test: env                        ## every test that needs no other library's environment
	$(BIN)/python -m pytest -n 2 --dist loadfile
coverage: env                    ## which lines of src no test runs: a table, and pages in htmlcov/
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report
	$(BIN)/python -m coverage html --quiet
test-matrix: env                 ## every test under other instruction sets, threads, backends; PYTHON= and VENV= choose
	PYTHON=$(BIN)/python tests/matrix.sh
check: env                       ## style, types, import law, public surface
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py tests/test_surface.py
bench: env                       ## side-by-side ratios, one file a question
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
gpu: env                         ## tests, speed tables and trainings on a GPU; their smallest form without one
	$(BIN)/python experiments/gpu.py --deadline $(or $(DEADLINE),25m) --out $(or $(OUT),runs/gpu) --parallel 3
results: env                     ## every page and picture of docs/results from the records
	$(BIN)/python experiments/results.py
docs: env                        ## the guide as a static site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
interop: $(INTEROP)/.installed   ## layouts against timm, torchvision, flash-linear-attention, transformers beside them
	PYTHONPATH=src $(INTEROP)/bin/python -m pytest -q tests/interop --override-ini addopts=-ra
	PYTHONPATH=src $(INTEROP)/bin/python -m pytest -q tests/interop/conftest.py \
		tests/init/layouts/test_transformers_layouts.py --override-ini addopts=-ra
sweep: $(INTEROP)/.installed     ## every architecture that builds, written and judged; writes the page of supported models
	PYTHONPATH=src:tests $(INTEROP)/bin/python experiments/sweep.py --jobs 2 --out docs/guides
sweep-short: env                 ## the same for thirty types of transformers
	PYTHONPATH=src:tests $(BIN)/python experiments/sweep.py --short --jobs 2 --out runs/sweep
reliability: env                 ## kill, damage and starve runs by the hundred; writes docs/results/reliability.md
	$(BIN)/python experiments/reliability.py --kills 200 --write docs/results/reliability.md
reliability-short: env           ## the same, a few of each
	$(BIN)/python experiments/reliability.py --short
wheel: env                       ## the wheel, kernels included, in dist/
	$(BIN)/python -m build --wheel
newcomers: wheel                 ## a script for each kind of new user, each from an empty environment
	TORCH=$(TORCH) $(BIN)/python tests/newcomers/run.py "$$(ls -t dist/*.whl | head -n 1)"
lock: env                        ## write requirements/dev.lock from the environment as it stands
	$(BIN)/python requirements/freeze.py > requirements/dev.lock.new && mv requirements/dev.lock.new requirements/dev.lock
clean:
	rm -rf $(VENV) $(INTEROP) site build dist htmlcov .coverage*

$(VENV)/.installed: requirements/dev.lock requirements/environment.py pyproject.toml setup.py $(wildcard src/espalier/nn/kernels/*.[ch]pp)
	$(PYTHON) requirements/environment.py $(VENV) $(TORCH) $(TORCH_INDEX)
	touch $@

$(INTEROP)/.installed: requirements/interop.lock
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --no-deps -r requirements/interop.lock
	touch $@
