# make demo   sets up a virtual environment, trains the default model, says where the report is
# make test   the same set-up, then the whole test suite
# make lint   style and types          make wheel   builds the wheel and tries it from another folder
# make docs   builds the site in docs/_build/html, runs its notebooks and checks its links

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := runs/demo

.PHONY: demo test lint wheel docs clean

demo: $(VENV)/.installed
	$(BIN)/python -m scoresde.run hydra.run.dir=$(DEMO)/$$(date +%Y-%m-%d_%H-%M-%S)
	@echo "Open the newest report: $$(ls -t $(DEMO)/*/report.html | head -n 1)"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(VENV)/.installed-test
	PYTHON=$(BIN)/python sh tests/check_wheel.sh

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going -q -c docs . docs/_build/html
	$(BIN)/python docs/links.py docs/_build/html

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info

# Reinstalled only where these files change.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(PIP) --editable ".[lint]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable ".[docs]"
	touch $@
