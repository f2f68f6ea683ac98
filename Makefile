# Every target makes its own .venv and installs what it needs.
PYTHON ?= python3
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint

demo: .venv/installed-demo    ## train a small real model: make demo [DUMP=path/to/site.7z]
	.venv/bin/python demo.py $(if $(DUMP),"$(DUMP)")

test: .venv/installed-test lint    ## lint, then every test
	.venv/bin/python -m pytest

lint: .venv/installed-test
	.venv/bin/ruff check .

.venv/installed-%: setup.cfg pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@
