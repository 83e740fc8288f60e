# One command each. `make` alone lists them. The environment is made on first use, inside this folder.
# Every recipe calls .venv/bin/python -m ..., so that no script of another environment on the PATH is started.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environment run class site test outside lab bench lab-model doctor lint format types lock reasoning-gym clean clean-all

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
SIZE := 3 GB; 8 GB with CUDA
ARGS ?=

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# The first Python of a known name that is 3.11 to 3.14 (torch 2.13 has no wheel for later ones).
# Another one: make PYTHON=/path/to/python3.12 run
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 && { echo $$p; break; }; done)

help:  ## list the commands
	@echo 'make COMMAND, where COMMAND is one of'
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1@\2/' | awk -F@ '{printf "%-16s %s\n", $$1, $$2}'

environment: $(STAMP)  ## make or update .venv (the other commands do this by themselves)

# The stamp is written last: an interrupted install leaves none, and the next `make` goes on where pip stopped.
# torch comes first and alone: `torch==2.13.0` is then met by whichever build of it pip finds or a person has put into
# .venv before (CPU or CUDA), and the second step leaves that build as it is.
# pycosat, which one data set of reasoning-gym solves its puzzles with, has no wheel and needs a C compiler. So all the
# rest is installed without looking at that dependency, and its failure is told and not fatal.
$(STAMP): requirements.lock requirements-reasoning-gym.lock pyproject.toml
	@$(MAKE) --no-print-directory venv
	$(PIP) install --quiet "$$(grep '^torch==' requirements.lock)"
	$(PIP) install --quiet -r requirements.lock
	grep -v '^pycosat==' requirements-reasoning-gym.lock | $(PIP) install --quiet --no-deps -r /dev/stdin
	@$(PIP) install --quiet "$$(grep '^pycosat==' requirements-reasoning-gym.lock)" >/dev/null 2>&1 || printf '%s\n' \
		'pycosat could not be built (it needs a C compiler): reasoning-gym:zebra_puzzles is not available, all else is.' \
		'To have it: install a compiler (Debian: sudo apt install build-essential), then: make reasoning-gym'
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PY) -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (workbench)" >/dev/null
	@touch $(STAMP)

.PHONY: venv
# pip writes INSTALLER after a package's files: one without it was cut off half-way, and is forgotten to be installed anew.
venv:
	@if test -f $(VENV)/pyvenv.cfg && $(PY) -m pip --version >/dev/null 2>&1; then \
		for info in $(VENV)/lib/python*/site-packages/*.dist-info; do \
			test -f "$$info/INSTALLER" || rm -rf "$$info"; done; exit 0; fi; \
	if test -z "$(PYTHON)"; then \
		echo "No Python 3.11 to 3.14 found: python3 is '$$(python3 --version 2>&1)'."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; fi; \
	"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
		echo "PYTHON=$(PYTHON) is '$$("$(PYTHON)" --version 2>&1)'; the workbench needs Python 3.11 to 3.14."; exit 1; }; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make environments: its venv or ensurepip module is missing."; \
		echo "Debian and Ubuntu: sudo apt install $$("$(PYTHON)" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 1; }; \
	echo "Making $(VENV) with $$("$(PYTHON)" --version) (some minutes, about $(SIZE))"; \
	"$(PYTHON)" -m venv --clear $(VENV)

reasoning-gym: $(STAMP)  ## install reasoning-gym with pycosat, which needs a C compiler
	$(PIP) install -r requirements-reasoning-gym.lock

run: $(STAMP)  ## the whole tour on the lab model: all notebooks, a table and a report in outputs/main
	$(PY) -m workbench run --out outputs/main $(ARGS)

class: $(STAMP)  ## the student's and the teacher's version of every notebook, in outputs/class
	$(PY) -m workbench class $(ARGS)

# Made from the newest complete run, or: make site RUN=outputs/NAME
RUN ?=
site: $(STAMP) .outside/site/.complete  ## the newest run's notebooks as pages that open offline: outputs/site/index.html
	$(PY) -m workbench site $(RUN) --out outputs/site $(ARGS)

lab: $(STAMP)  ## JupyterLab on this machine only, with its access token on
	$(PY) -m jupyterlab --ip=127.0.0.1 $(ARGS)

lab-model: $(STAMP)  ## train the lab model again
	$(PY) -m workbench.lab.train $(ARGS)

bench: export PYTHONPATH = $(if $(wildcard $(HARNESSES)/.complete),$(CURDIR)/$(HARNESSES)/packages)
bench: $(STAMP)  ## measure speed and memory on this machine
	$(PY) -m bench $(ARGS)

doctor: $(STAMP)  ## check this machine and say what to do about each fault
	$(PY) -m workbench doctor

# Two workers with one torch thread each: small tensors gain nothing from a second thread.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)  ## all tests, doctests included (a part: make test ARGS="-k steering")
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

# Other libraries, each in an environment of its own, because they hold transformers under 5 or numpy under 2.
# The stamp is again last. What can't be installed is told and not fatal: its tests say that they were skipped. `site` is
# no library to compare with but the tool that makes pages: its own environment keeps .venv small.
OUTSIDE := steering-vectors repeng site
OUTSIDE_SIZE = $(if $(filter site,$*),0.2 GB,1.4 GB; 7 GB with CUDA)
$(OUTSIDE:%=.outside/%/.complete): .outside/%/.complete: requirements-outside-%.lock
	@mkdir -p .outside && printf '*\n' >.outside/.gitignore
	@$(MAKE) --no-print-directory venv VENV=.outside/$* SIZE='$(OUTSIDE_SIZE)' && \
	.outside/$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile \
		--only-binary :all: -r requirements-outside-$*.lock && touch $@ || printf '%s\n' \
		'$* could not be installed, so what needs it is refused or skipped. It needs a network or a filled pip cache, and' \
		'repeng Python 3.11 or 3.12 (numpy under 2). To try again: make .outside/$*/.complete PYTHON=/path/to/python3.12'

# What runs models of ours in its own process can't have an environment of its own: the evaluation harnesses, and of what
# they need only what .venv lacks or has in a version that they refuse, lie in a folder that their tests alone see.
HARNESSES := .outside/harnesses
HARNESSED := $(addprefix tests/outside/test_,inspect.py lm_eval.py lm_eval_files.py)
$(HARNESSES)/.complete: requirements-outside-harnesses.lock $(STAMP)
	@rm -rf $(HARNESSES) && mkdir -p $(HARNESSES) && printf '*\n' >.outside/.gitignore
	@$(PIP) install --quiet --no-deps --no-compile --only-binary :all: --target $(HARNESSES)/packages -r $< && \
	touch $@ || printf '%s\n' 'lm_eval and inspect_ai could not be installed, so the tests beside them are skipped.' \
		'They need a network or a filled pip cache. To try again: make outside'

# pytest ends with 5 where nothing is left to run: ARGS="-k ..." chose none of a half, or the harnesses are missing.
outside: export HF_HUB_OFFLINE := 1
outside: export HF_DATASETS_OFFLINE := 1
outside: export OMP_NUM_THREADS ?= 1
outside: $(STAMP) $(OUTSIDE:%=.outside/%/.complete) $(HARNESSES)/.complete  ## compare with other libraries (in .outside)
	$(PY) -m pytest tests/outside $(HARNESSED:%=--ignore=%) $(ARGS) || test $$? -eq 5
	PYTHONPATH="$(CURDIR)/$(HARNESSES)/packages" $(PY) -m pytest $(HARNESSED) $(ARGS) || test $$? -eq 5

lint: $(STAMP)  ## formatting and common mistakes, notebooks included
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: $(STAMP)  ## put formatting and import order right
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

types: $(STAMP)  ## type checker
	$(PY) -m mypy

# A new lock: the newest versions that pyproject.toml allows, minus what belongs to one machine (+cpu, CUDA packages).
LOCK_ENV := .venv-lock
FREEZE = $(LOCK_ENV)/bin/python -m pip freeze --exclude-editable --exclude workbench | \
	sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(nvidia|cuda|triton)'
lock:  ## pin the newest allowed versions anew (then: make test)
	"$(PYTHON)" -m venv --clear $(LOCK_ENV)
	$(LOCK_ENV)/bin/python -m pip install --quiet '.[dev]'
	{ sed '/^[^#]/,$$d' requirements.lock; $(FREEZE); } > $(LOCK_ENV)/core
	$(LOCK_ENV)/bin/python -m pip install --quiet '.[dev,reasoning-gym]'
	{ sed '/^[^#]/,$$d' requirements-reasoning-gym.lock; $(FREEZE) | grep -vxFf $(LOCK_ENV)/core; } > $(LOCK_ENV)/gym
	mv $(LOCK_ENV)/core requirements.lock
	mv $(LOCK_ENV)/gym requirements-reasoning-gym.lock
	rm -rf $(LOCK_ENV)

clean:  ## remove caches (outputs and the environment stay)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . \( -path ./$(VENV) -o -path ./.outside \) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

clean-all: clean  ## remove caches and environments (outputs stay)
	rm -rf $(VENV) $(LOCK_ENV) .outside
