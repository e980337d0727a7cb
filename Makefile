# Everything a fresh machine needs: each target makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
# psycopg's C build where libpq's headers and a compiler are there, its binary build otherwise.
PSYCOPG := $(shell command -v pg_config >/dev/null && command -v cc >/dev/null && [ -e "$$(pg_config --includedir)/libpq-fe.h" ] && echo c || echo binary)
STAMP := $(VENV)/.installed

.PHONY: demo test check bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,$(PSYCOPG)]'
	touch $@

demo: $(STAMP)
	$(VENV)/bin/mover demo

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: $(STAMP) check
	$(VENV)/bin/python -m pytest

clean:
	rm -rf $(VENV) build *.egg-info
