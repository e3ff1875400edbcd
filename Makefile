# Every target sets up what it needs by itself: .venv, with the versions in constraints.txt.
# You need Python 3.10 or newer, and make. `make` alone lists the targets.

PYTHON ?= python3
ARGS ?=

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt
RUN  := $(VENV)/.installed-to-run
DEV  := $(VENV)/.installed-to-develop

# The tools of .venv come first, also for what a notebook starts. One thread for each worker where two work side by side.
TOOLS := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
TWO   := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-notebooks test-lessons test-units test-wheel fuzz endings lessons export readme docs bench bench-quality browser clean distclean

help:
	@echo "make run        fit the default photograph (another: make run ARGS=\"photo.jpg --steps 500\")"
	@echo "make test       check everything: notebooks and modules, lessons, tests, wheel"
	@echo "make endings    end 2,000 fits and 100 commands at random moments, and fill the disk of 100 more"
	@echo "make fuzz       try strange input on everything that reads (a time: make fuzz ARGS=\"--minutes 30\")"
	@echo "make lessons    open the lessons in JupyterLab"
	@echo "make export     write the modules and README.md from the notebooks, and clean the notebooks"
	@echo "make docs       build the website (needs Quarto)"
	@echo "make bench      measure speed next to others"
	@echo "make bench-quality ARGS=\"FOLDER\"   measure the quality of fits to the pictures in a folder"
	@echo "make browser    install Chromium for the tests that need a browser"
	@echo "make clean      remove what was built (distclean: and .venv); results in gs2d-out/ stay"

# --- what the targets need ---------------------------------------------------------------------

# A stamp is written last, so an installation that fails, or is interrupted, is done again.
$(RUN): constraints.txt settings.ini setup.py
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  command -v "$(PYTHON)" >/dev/null || { \
	    echo "gs2d needs Python 3.10 or newer, and there is no '$(PYTHON)' here. Install it, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "gs2d needs Python 3.10 or newer, and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Name a newer one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }; \
	  echo "Making $(VENV) with $$("$(PYTHON)" -V)"; \
	  "$(PYTHON)" -m venv --clear $(VENV); }
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --use-pep517 --editable .
	@touch $@

$(DEV): $(RUN)
	$(PIP) --no-build-isolation --use-pep517 --editable ".[dev]"
	@touch $@

# --- for everybody -----------------------------------------------------------------------------

run: $(RUN)
	$(VENV)/bin/gs2d fit $(ARGS)

lessons: $(DEV)
	cd nbs && $(TOOLS) OMP_WAIT_POLICY=PASSIVE python -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# --- for those who change something ------------------------------------------------------------

test: test-notebooks test-lessons test-units test-wheel
	@echo "All four checks passed: notebooks and modules agree, lessons run, tests pass, the wheel works."

test-notebooks: $(DEV)  # the notebooks are clean, and gs2d/ and README.md are what they export
	$(TOOLS) python tests/check_notebooks.py

test-lessons: $(DEV)    # every lesson runs from top to bottom
	$(TOOLS) $(TWO) nbdev_test --n_workers 2 --do_print --timing

test-units: $(DEV) browser
	$(TOOLS) $(TWO) python -m pytest tests --numprocesses 2 --dist loadfile --durations 10 $(ARGS)

test-wheel: $(DEV)      # the wheel installs in a fresh environment, and a short fit runs there
	$(TOOLS) python tests/check_wheel.py

endings: $(DEV)         # ends with status 1 at the first thing that is torn or lost; takes half an hour
	$(TOOLS) $(TWO) python tests/endings.py interrupts 2000
	$(TOOLS) $(TWO) python tests/endings.py kills 100
	$(TOOLS) $(TWO) python tests/endings.py full 100

fuzz: $(DEV)            # ends with status 1 if an input was neither read nor clearly refused; those are in fuzz-out/
	$(TOOLS) $(TWO) python tests/fuzz.py $(ARGS)

export: $(DEV)
	$(TOOLS) nbdev_export
	$(TOOLS) nbdev_clean
	$(TOOLS) python tests/readme.py
	find gs2d -name '*.sealed' -delete  # compiled kernels of sources that are gone

readme: $(DEV)
	$(TOOLS) python tests/readme.py

bench: $(DEV)
	$(TOOLS) python benchmarks/run.py $(ARGS)

bench-quality: $(DEV)
	$(TOOLS) python benchmarks/quality.py $(ARGS)

# nbdev renders README.md with Quarto when it is older than index.ipynb; ours comes from `make export`.
docs:
	@command -v quarto >/dev/null || { \
	  echo "The website is built with Quarto, which is not installed here: see https://quarto.org/docs/get-started/" >&2; exit 1; }
	@$(MAKE) --no-print-directory --silent $(DEV)
	touch README.md
	$(TOOLS) nbdev_docs
	@echo "The website is in _docs/index.html"

browser:
	@if command -v chromium >/dev/null; then :; \
	elif ! command -v apt-get >/dev/null; then \
	  echo "The tests in a browser need Chromium: install it so that 'chromium' is on the PATH." >&2; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update && apt-get install --yes --no-install-recommends chromium; \
	elif sudo -n true 2>/dev/null; then sudo -n apt-get update && sudo -n apt-get install --yes --no-install-recommends chromium; \
	else echo "Tests in a browser need Chromium: sudo apt-get install chromium" >&2; exit 1; fi

clean:
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .hypothesis .quarto
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
