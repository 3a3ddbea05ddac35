# Two commands: `make demo` trains and shows, `make test` checks. Both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test fuzz mutants lint docs clean

setup: $(STAMP)

# constraints.txt pins every version; the stamp makes a second call free
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"wsss needs Python 3.11 or 3.12, {sys.executable} is {v[0]}.{v[1]}; pass PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[crf,wandb,tensorboard,slurm,optuna,clip,export,dev,docs]'
	touch $(STAMP)

# four short runs, two at a time, then the page that compares them; a browser where there is a screen
demo: setup
	$(BIN)/wsss train -m +experiments=league_minivoc/brief
	$(BIN)/wsss compare runs/demo
	$(BIN)/wsss report runs/demo out=runs/demo-report
	if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then \
		$(BIN)/python -m webbrowser runs/demo-report/index.html; fi

# a thread each, since the networks of tests are too small for more
WORKERS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# the fuzzers alone, ROUNDS times as many cases as in `make test`, the later ones with new seeds
ROUNDS ?= 20
fuzz: setup
	FUZZ_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest -o timeout=0 tests/fuzz

# alter the equations one at a time, for hours; MODULES="wsss.maps.cams.* wsss.methods.losses.*"
# are some of them; survivors: $(BIN)/python -m mutmut results, then `mutmut show NAME`
MODULES ?=
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 2 $(MODULES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# fails on a broken link, a page without a place, or anything fetched from a network
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
# runs/ stays: hours of work
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache
