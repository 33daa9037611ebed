# make demo    install, then prune, export, build, verify, measure and report CenterPoint at 30 % of its multiplications
# make test    install, then run the tests
# make lint    install, then run the linters and the types
# make check   lint, and the guards: tests of the sources, the packages and the pages
# PYTHON=python3.12 chooses the interpreter, ARGS="-k curves" goes to pytest.

PYTHON ?= python3
ARGS ?=
RUN := .venv/bin/python
INSTALL = $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test lint check

demo: .venv/.installed
	.venv/bin/dm3d-deploy build --model centerpoint --target 0.3

test: .venv/.installed-for-tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: .venv/.installed-for-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/guards $(ARGS)

.venv/.installed: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) '.[compile,rtx,sparse3d]'
	@touch $@

.venv/.installed-for-tests: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) '.[compile,rtx,sparse3d,test]'
	@touch .venv/.installed $@

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "dm3d-deploy needs Python 3.10 to 3.13, and '$(PYTHON)' is not: name another one, as in: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "'$(PYTHON) -m venv' failed: install its venv module (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
