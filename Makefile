# permdistill. The two commands that matter: `make paper` and `make test`. `make help` lists the rest.
# Every target sets up what it needs; any of them may be killed at any moment and started again.

## PYTHON=python3       the Python that makes the virtual environment, 3.11 or newer
PYTHON ?= python3
## VENV=.venv           where the virtual environment is
VENV ?= .venv
## TEACHER=committed    committed: read scores/ and check a sample of it live; live: score everything anew (hours)
TEACHER ?= committed
## STUDENTS=stored      stored: read predictions/, train one student of each head anew and compare; live: train all (an hour)
STUDENTS ?= stored
## PROFILE=full         full: the paper's tables and figures; smoke: in small, to see that it runs; paper: its own models, on GPUs;
##                      full-60, paper-150, ..: the same with so many questions of each task
PROFILE ?= full
## BUILD=build          where executed notebooks, tables and checkpoints go
BUILD ?= build
NOTEBOOKS ?= notebooks

one_word = $(if $(filter 1,$(words $($(1)))),,$(error $(1) is '$($(1))': give one word, without spaces))
$(foreach name,PYTHON VENV TEACHER STUDENTS PROFILE BUILD NOTEBOOKS,$(call one_word,$(name)))
# The shell reads recipes: no setting may hold what it takes for its own, and no quoted path what it reads inside quotes.
# Python makes no environment in a path with a colon.
open := (
close := )
hash := \#
odd = $(foreach c,$(2),$(if $(findstring $(c),$(1)),$(error $(3) is '$(1)': make cannot work with $(c) in it, choose another name)))
$(foreach name,PYTHON VENV PROFILE BUILD NOTEBOOKS,$(call odd,$($(name)),' " ` $$ \ : ; & | * ? < > % $(hash) $(open) $(close),$(name)))
$(call odd,$(CURDIR)," ` $$ \ :,this folder)
# What is made and deleted under these names must be ours: not the checkout, nor a folder that somebody else filled.
ifneq ($(shell [ ! -e '$(VENV)' ] || [ -z "$$(ls -A '$(VENV)')" ] || [ -e '$(VENV)/pyvenv.cfg' ] || echo filled),)
$(error VENV is '$(VENV)', which holds something else than a virtual environment: give a new folder)
endif
# The marker is what any target puts first into BUILD; `settings` is what earlier versions did. Whatever the folder build
# holds, it is ours by its name.
MARKER := .made-by-permdistill
ifneq ($(abspath $(BUILD)),$(CURDIR)/build)
ifneq ($(shell cd "$(abspath $(BUILD))" 2>/dev/null || { [ ! -e '$(BUILD)' ] || echo file; exit; }; \
    [ -z "$$(ls -A)" ] || [ -f $(MARKER) ] || grep -qs '^PROFILE=' settings || echo filled),)
$(error BUILD is '$(BUILD)', which make paper has not made: give a new folder, or delete it yourself)
endif
endif
holds_us = $(shell d="$$(cd "$(abspath $(1))" 2>/dev/null && pwd -P)" && case "$$(pwd -P)/" in ("$${d%/}"/*) echo yes;; esac)
$(foreach name,VENV BUILD,$(if $(call holds_us,$($(name))),$(error $(name) is '$($(name))', which holds this checkout: give a new folder)))
ifeq ($(filter committed live,$(TEACHER)),)
$(error TEACHER is '$(TEACHER)': give committed or live)
endif
ifeq ($(filter smoke full paper smoke-% full-% paper-%,$(PROFILE)),)
$(error PROFILE is '$(PROFILE)': give smoke, full or paper, or one of them with a limit: full-60)
endif
ifeq ($(filter stored live,$(STUDENTS)),)
$(error STUDENTS is '$(STUDENTS)': give stored or live)
endif
# No scores of the paper's own models are committed.
ifneq ($(filter paper paper-%,$(PROFILE)),)
override TEACHER := live
endif
# What is stored was taught by the committed scores of the full profile.
ifneq ($(PROFILE) $(TEACHER),full committed)
override STUDENTS := live
endif
# What TEACHER=live makes. The smoke profile reads a part of what the full one does.
SCORED_PROFILE := $(if $(filter smoke,$(PROFILE)),full,$(PROFILE))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The kernel "python3" is this environment's, whatever kernels the user has installed elsewhere.
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

PY := "$(abspath $(VENV))/bin/python"
OUT := $(abspath $(BUILD))
INSTALLED := $(VENV)/.installed
CODE := $(filter-out permdistill/cli.py permdistill/_moved.py permdistill/paper/cli.py permdistill/paper/manifest.py,$(wildcard permdistill/*.py permdistill/*/*.py))

.PHONY: help
help: ## list the targets and the settings
	@echo "make TARGET [SETTING=value]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@awk '/^## / {print "  " substr($$0, 4)}' $(firstword $(MAKEFILE_LIST))

# ---------------------------------------------------------------------------------------------------------------------
# The environment

.PHONY: venv
venv: $(INSTALLED) ## the virtual environment, from requirements.lock

# First whatever has hashes, then torch in this platform's build, and what that needs.
# pip writes a package's RECORD last. A dist-info without one is what a killed pip left; pip would take it for installed.
$(INSTALLED): requirements.lock requirements.sha256 pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "$(PYTHON) is Python %d.%d, 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." % v[:2])'
	@"$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear "$(VENV)"
	@for d in "$(VENV)"/lib/python*/site-packages/*.dist-info; do [ ! -d "$$d" ] || [ -e "$$d/RECORD" ] || rm -rf "$$d"; done
	"$(VENV)/bin/python" -m pip install --require-hashes --no-deps -r requirements.sha256
	"$(VENV)/bin/python" -m pip install -r requirements.lock
	"$(VENV)/bin/python" -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# ---------------------------------------------------------------------------------------------------------------------
# The paper

PAPER := $(PY) -m permdistill.paper

ifeq ($(TEACHER),live)
SCORES := $(OUT)/scores
SCORED := $(BUILD)/scores/.complete-$(SCORED_PROFILE)
AUDITED :=
else
SCORES := $(abspath scores)
SCORED := $(wildcard scores/*/scores.parquet)
AUDITED := $(BUILD)/audit.ok
endif
PREDICTED := $(wildcard predictions/*/*/*.parquet)
RETRAINED := $(if $(filter stored,$(STUDENTS)),$(BUILD)/students.ok)

# Whatever decides about a score. Scores are found by content, so a rerun recomputes only what really changed.
SCORING := $(addprefix permdistill/,commands.py orders.py prompts.py questions.py scores.py sources.py teachers.py $(addprefix paper/,assets.py cli.py hub.py models.py matrix.py profiles.py readers.py tasks.py)) $(wildcard permdistill/engine/*.py)

OURS := $(BUILD)/$(MARKER)
$(OURS):
	@mkdir -p $(@D)
	@touch $@

$(BUILD)/scores/.complete-$(SCORED_PROFILE): $(SCORING) | $(INSTALLED) $(OURS)
	@mkdir -p $(@D)
	$(PAPER) score --profile $(SCORED_PROFILE) --scores "$(OUT)/scores"
	@touch $@

$(BUILD)/audit.ok: $(wildcard scores/*/scores.parquet) $(SCORING) | $(INSTALLED) $(OURS)
	$(PAPER) manifest "$(OUT)" --measure audit -- $(PAPER) audit --profile full
	@touch $@

$(BUILD)/students.ok: $(PREDICTED) $(CODE) | $(INSTALLED) $(OURS)
	$(PAPER) manifest "$(OUT)" --measure students -- $(PAPER) students --audit --work "$(OUT)/audit"
	@touch $@

# Another PROFILE, TEACHER or STUDENTS makes the notebooks out of date: this file changes only when they do.
SETTINGS := PROFILE=$(PROFILE) TEACHER=$(TEACHER) STUDENTS=$(STUDENTS)
$(BUILD)/settings: FORCE | $(OURS)
	@echo "$(SETTINGS)" | cmp -s - $@ || echo "$(SETTINGS)" > $@
.PHONY: FORCE
FORCE:

# The students' notebook runs once for each pool of tasks.
POOLS := multiple_choice summeval
POOLED := 03_students
# Progress is for what takes long: a notebook that reads what is stored shows none.
QUIET := $(if $(filter stored,$(STUDENTS)),TQDM_DISABLE=1,TQDM_MININTERVAL=15)
NAMES := $(basename $(notdir $(sort $(wildcard $(NOTEBOOKS)/*.ipynb))))
RUNS := $(foreach name,$(NAMES),$(if $(filter $(POOLED),$(name)),$(POOLS:%=$(name)_%),$(name)))
EXECUTED := $(RUNS:%=$(BUILD)/notebooks/%.ipynb)
source = $(NOTEBOOKS)/$(if $(filter $(POOLED)_%,$(1)),$(POOLED),$(1)).ipynb
pool = $(patsubst $(POOLED)_%,-r students $(STUDENTS) -r pool %,$(filter $(POOLED)_%,$(1)))
.SECONDEXPANSION:

# The executed copy appears under its name only when every cell has run.
$(EXECUTED): $(BUILD)/notebooks/%.ipynb: $$(call source,$$*) $(CODE) $(SCORED) $(PREDICTED) $(BUILD)/settings requirements.lock | $(INSTALLED)
	@mkdir -p $(@D)
	@echo "== $* ($(PROFILE))"
	@$(QUIET) $(PAPER) manifest "$(OUT)" --measure $* -- $(PY) -m papermill --kernel python3 --log-output --progress-bar \
	    -r profile $(PROFILE) -r output "$(OUT)/$(PROFILE)" -r scores "$(SCORES)" $(call pool,$*) "$<" "$(@:.ipynb=.part.ipynb)"
	@mv "$(@:.ipynb=.part.ipynb)" "$@"

# One after the other, in the order of their numbers, also with make -j: a notebook may read what an earlier one wrote.
# The teachers' table comes first, within minutes; all others wait for the audit of the scores too.
$(wordlist 2,$(words $(EXECUTED)),$(EXECUTED)): $(AUDITED)
previous :=
$(foreach target,$(EXECUTED),$(eval $(target): $(previous))$(eval previous := $(target)))

# The figures and tables that git keeps are those of the full profile, but for what an API's samples decide anew.
$(BUILD)/manifest.json: $(EXECUTED) $(AUDITED) $(RETRAINED)
	@$(if $(EXECUTED),,echo "there are no notebooks in $(NOTEBOOKS)/" >&2; exit 1)
	@if [ $(PROFILE) = full ] && [ -d "$(BUILD)/full/figures" ]; then \
	    mkdir -p figures && cp $(BUILD)/full/figures/* $(BUILD)/full/tables/* figures/; \
	    rm -f figures/*_api_*; fi
	@$(PAPER) manifest "$(BUILD)"
	$(eval MADE := yes)

.PHONY: paper
paper: $(BUILD)/manifest.json ## every table and figure: run all notebooks and two audits (some 20 minutes on 2 cores)
	@echo "$(if $(MADE),done,nothing to do): tables and figures are up to date, see $(BUILD)/ and $(BUILD)/manifest.json"

.PHONY: site
site: $(BUILD)/manifest.json ## executed notebooks, explorer and report as static pages: BUILD/site/index.html
	$(PAPER) site "$(BUILD)"

.PHONY: plan
plan: $(INSTALLED) ## what PROFILE takes: questions, tokens, FLOPs, GPU-hours, downloads and disk
	$(PAPER) plan --profile $(PROFILE)

.PHONY: audit
audit: $(BUILD)/audit.ok ## re-score a random sample of the committed scores, fail if it differs

.PHONY: scores
scores: $(INSTALLED) ## make the committed scores (hours); continues where it was stopped
	$(PAPER) score --profile full --scores "$(abspath scores)"

.PHONY: students
students: $(INSTALLED) ## train the matrix of students and keep their predictions (hours); continues where it was stopped
	$(PAPER) students

.PHONY: cost
cost: $(INSTALLED) ## measure what an answer of every teacher and student costs here (minutes), for notebook 7
	$(PY) -m permdistill.paper.cost --output figures/cost.json

.PHONY: bench
bench: $(INSTALLED) | $(OURS) ## measure the shared-prefix engine against its rivals (an hour or more), show it in notebook 7
	$(PY) -m permdistill.paper.bench --output $(BUILD)/bench.json --keep figures
	$(MAKE) --no-print-directory performance

# Without times in the file: executing a notebook again changes nothing but what it shows.
IN_PLACE := TQDM_DISABLE=1 $(PY) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	--ExecutePreprocessor.startup_timeout=600

.PHONY: performance
performance: $(INSTALLED) ## what `make bench` and `make cost` measured, into notebook 7, figures/ and the README
	$(IN_PLACE) notebooks/07_cost.ipynb
	cp build/full/figures/P[12]_* build/full/tables/P[12]_* figures/
	$(PAPER) results

.PHONY: notebooks
notebooks: $(INSTALLED) ## execute the repository's notebooks in place; their tables and figures go into figures/
	$(IN_PLACE) notebooks/*.ipynb
	cp build/full/figures/* build/full/tables/* figures/
	$(PAPER) results

# ---------------------------------------------------------------------------------------------------------------------
# The rest

.PHONY: test
# The notebooks come first: they are the longest, and whoever is done with one goes on with the tests.
test: $(INSTALLED) ## all tests, and the notebooks against their stored outputs
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not timing" \
	    --nbval-lax --nbval-current-env $(NOTEBOOKS) tests
	TQDM_DISABLE=1 $(PY) -m pytest -q -m "timing and not long" tests

.PHONY: long
long: $(INSTALLED) ## the tests that take minutes each
	"$(VENV)/bin/python" -m pip install -q "ray[data]==2.60.0"
	TQDM_DISABLE=1 $(PY) -m pytest -q -m long tests

.PHONY: lint
lint: $(INSTALLED) ## style and types
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

.PHONY: lab
lab: $(INSTALLED) ## open the notebooks in JupyterLab
	cd $(NOTEBOOKS) && $(PY) -m nbformat.sign *.ipynb && $(PY) -m jupyterlab

.PHONY: clean
clean: ## delete what `make paper` built (live scores too), keep environment and downloads
	rm -rf "$(BUILD)"

.PHONY: distclean
distclean: clean ## delete the virtual environment and caches too
	rm -rf "$(VENV)" .pytest_cache .ruff_cache .mypy_cache .hypothesis permdistill.egg-info permdistill/__pycache__ tests/__pycache__
