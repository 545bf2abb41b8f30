PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INTEROP ?= .venv-interop
export PYTHONHASHSEED := 0

.PHONY: env demo test check bench docs interop sweep sweep-short lock clean
env: $(VENV)/.installed          ## make the environment (idempotent)
demo: env                        ## the whole idea in minutes on a laptop; ends with a table and report.html
	$(BIN)/espalier demo --out runs/demo
test: env                        ## every test that needs no other library's environment
	$(BIN)/python -m pytest -n 2 --dist loadfile
check: env                       ## style, types, import law, public surface
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py
bench: env                       ## side-by-side ratios, one file a question
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
docs: env                        ## the guide as a static site in site/
	$(BIN)/mkdocs build --strict
interop: $(INTEROP)/.installed   ## layouts against timm, torchvision, flash-linear-attention, transformers beside them
	PYTHONPATH=src $(INTEROP)/bin/python -m pytest -q tests/interop --override-ini addopts=-ra
	PYTHONPATH=src $(INTEROP)/bin/python -m pytest -q tests/interop/conftest.py \
		tests/init/layouts/test_transformers_layouts.py --override-ini addopts=-ra
sweep: $(INTEROP)/.installed     ## every architecture that builds, written and judged; writes the page of supported models
	PYTHONPATH=src:tests $(INTEROP)/bin/python experiments/sweep.py --jobs 2 --out docs/guides
sweep-short: env                 ## the same for thirty types of transformers
	PYTHONPATH=src:tests $(BIN)/python experiments/sweep.py --short --jobs 2 --out runs/sweep
lock: env                        ## write requirements/dev.lock from the environment as it stands
	$(BIN)/python requirements/freeze.py > requirements/dev.lock.new && mv requirements/dev.lock.new requirements/dev.lock
clean:
	rm -rf $(VENV) $(INTEROP) site build dist

# The lock lists every package, so pip resolves nothing (--no-deps): torch comes as the pinned CPU build, and
# torchattacks cannot drag in a torchvision that does not import beside it.
$(VENV)/.installed: requirements/dev.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps torch==$$(sed -n 's/^torch==//p' requirements/dev.lock)
	$(BIN)/pip install --quiet --no-deps -r requirements/dev.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(INTEROP)/.installed: requirements/interop.lock
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --no-deps -r requirements/interop.lock
	touch $@
