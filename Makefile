# Everything a fresh machine needs: each target makes the virtual environment that it runs in.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
# psycopg's C build where a compiler, libpq's and Python's headers are there, its binary build otherwise.
HEADERS = "$$(pg_config --includedir)/libpq-fe.h" \
	"$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
PSYCOPG = $(shell { command -v cc && ls $(HEADERS); } >/dev/null 2>&1 && echo c || echo binary)

.PHONY: demo test test-faults test-kill test-long check clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo '$(PYTHON) is not Python 3.11 or later: name one, as in `make PYTHON=/usr/bin/python3.11 …`' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo '$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu install python3-venv' >&2; exit 1; }
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
	$(VENV)/bin/python -m pytest -n 3 --dist worksteal

test-kill: $(STAMP)
	$(VENV)/bin/python -m pytest -n 3 --dist worksteal -m kill

test-long: $(STAMP)
	$(VENV)/bin/python -m pytest -rP -m long

test-faults: $(STAMP)
	$(VENV)/bin/python -m pytest -n 3 --dist worksteal -m faults

clean:
	rm -rf $(VENV) build *.egg-info
