# permdistill. The two commands that matter: `make paper` and `make test`. `make help` lists the rest.
# Every target sets up what it needs; any of them may be killed at any moment and started again.

## PYTHON=python3       the Python that makes the virtual environment, 3.11 or newer
PYTHON ?= python3
## VENV=.venv           where the virtual environment is
VENV ?= .venv
## TEACHER=committed    committed: read scores/ and check a sample of it live; live: score everything anew (hours)
TEACHER ?= committed
## PROFILE=full         full: the paper's tables and figures; smoke: in small, to see that it runs; paper: its own models, on GPUs
PROFILE ?= full
## BUILD=build          where executed notebooks, tables and checkpoints go
BUILD ?= build
NOTEBOOKS ?= notebooks

ifeq ($(filter committed live,$(TEACHER)),)
$(error TEACHER is '$(TEACHER)': give committed or live)
endif
ifeq ($(filter smoke full paper,$(PROFILE)),)
$(error PROFILE is '$(PROFILE)': give smoke, full or paper)
endif
# No scores of the paper's own models are committed.
ifeq ($(PROFILE),paper)
override TEACHER := live
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The kernel "python3" is this environment's, whatever kernels the user has installed elsewhere.
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

PY := $(abspath $(VENV))/bin/python
OUT := $(abspath $(BUILD))
INSTALLED := $(VENV)/.installed
CODE := $(filter-out permdistill/paper/manifest.py,$(wildcard permdistill/*.py permdistill/*/*.py))

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

# pip writes a package's RECORD last. A dist-info without one is what a killed pip left; pip would take it for installed.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "$(PYTHON) is Python %d.%d, 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." % v[:2])'
	@"$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear "$(VENV)"
	@for d in "$(VENV)"/lib/python*/site-packages/*.dist-info; do [ ! -d "$$d" ] || [ -e "$$d/RECORD" ] || rm -rf "$$d"; done
	"$(VENV)/bin/python" -m pip install -r requirements.lock
	"$(VENV)/bin/python" -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# ---------------------------------------------------------------------------------------------------------------------
# The paper

# The committed scores come from these commands: what profiles.PROFILES["full"] and profiles.MATRIX ask for. What a store
# holds already is not scored again. The last lines put the same questions in other words.
MULTIPLE_CHOICE := arc_easy arc_challenge openbookqa
TEST_ONLY := csqa hellaswag mmlu socialiqa piqa
SUMMEVAL := summeval_coherence summeval_consistency summeval_fluency summeval_relevance
SCORE = $(PY) -m permdistill.cli score --scores $(1) --teacher
AUDIT = $(PY) -m permdistill.cli audit
define score
$(SCORE) qwen2.5-coder-1.5b
$(SCORE) qwen2.5-coder-0.5b --splits train --tasks $(MULTIPLE_CHOICE)
for teacher in qwen2.5-coder-0.5b smollm2-135m; do \
    $(SCORE) $$teacher --splits test --tasks $(MULTIPLE_CHOICE) && \
    $(SCORE) $$teacher --splits test --tasks $(TEST_ONLY) --limit 150 && \
    $(SCORE) $$teacher --splits test --tasks $(SUMMEVAL) --limit 280 || exit; done
for template in numbers brief; do \
    $(SCORE) qwen2.5-coder-1.5b --splits test --tasks $(MULTIPLE_CHOICE) mmlu socialiqa piqa --limit 80 --template $$template || exit; done
$(SCORE) qwen2.5-coder-1.5b --splits test --tasks $(SUMMEVAL) --limit 140 --template summaries_letters
endef

ifeq ($(TEACHER),live)
SCORES := $(OUT)/scores
SCORED := $(BUILD)/scores/.complete$(if $(filter paper,$(PROFILE)),-paper)
AUDITED :=
else
SCORES := $(abspath scores)
SCORED := $(wildcard scores/*/scores.parquet)
AUDITED := $(BUILD)/audit.ok
endif

# Whatever decides about a score. Scores are found by content, so a rerun recomputes only what really changed.
SCORING := $(addprefix permdistill/,cli.py orders.py prompts.py questions.py scores.py sources.py teachers.py $(addprefix paper/,assets.py hub.py models.py profiles.py readers.py tasks.py)) $(wildcard permdistill/engine/*.py)

$(BUILD)/scores/.complete: $(SCORING) | $(INSTALLED)
	@mkdir -p $(@D)
	$(call score,"$(OUT)/scores")
	@touch $@

$(BUILD)/scores/.complete-paper: $(SCORING) | $(INSTALLED)
	@mkdir -p $(@D)
	$(PY) -m permdistill.cli score --profile paper --scores "$(OUT)/scores"
	@touch $@

$(BUILD)/audit.ok: $(wildcard scores/*/scores.parquet) $(SCORING) | $(INSTALLED)
	@mkdir -p $(@D)
	$(PY) -m permdistill.paper.manifest "$(OUT)" --measure audit -- $(AUDIT)
	$(AUDIT) --tasks $(MULTIPLE_CHOICE) mmlu socialiqa piqa --splits test --limit 80 --template numbers --n 3
	$(AUDIT) --tasks $(MULTIPLE_CHOICE) mmlu socialiqa piqa --splits test --limit 80 --template brief --n 3
	$(AUDIT) --tasks $(SUMMEVAL) --splits test --limit 140 --template summaries_letters --n 3
	$(AUDIT) --teacher qwen2.5-coder-0.5b --tasks $(MULTIPLE_CHOICE)
	for teacher in qwen2.5-coder-0.5b smollm2-135m; do \
	    $(AUDIT) --teacher $$teacher --tasks $(MULTIPLE_CHOICE) $(TEST_ONLY) $(SUMMEVAL) --splits test --limit 150 || exit; done
	@touch $@

# Another PROFILE or TEACHER makes the notebooks out of date: this file changes only when they do.
SETTINGS := PROFILE=$(PROFILE) TEACHER=$(TEACHER)
$(BUILD)/settings: FORCE
	@mkdir -p $(@D)
	@echo "$(SETTINGS)" | cmp -s - $@ || echo "$(SETTINGS)" > $@
.PHONY: FORCE
FORCE:

NAMES := $(basename $(notdir $(sort $(wildcard $(NOTEBOOKS)/*.ipynb))))
EXECUTED := $(NAMES:%=$(BUILD)/notebooks/%.ipynb)

# The executed copy appears under its name only when every cell has run.
$(EXECUTED): $(BUILD)/notebooks/%.ipynb: $(NOTEBOOKS)/%.ipynb $(CODE) $(SCORED) $(BUILD)/settings requirements.lock | $(INSTALLED)
	@mkdir -p $(@D)
	@echo "== $* ($(PROFILE))"
	@TQDM_MININTERVAL=15 $(PY) -m permdistill.paper.manifest "$(OUT)" --measure $* -- $(PY) -m papermill --kernel python3 --log-output --progress-bar \
	    -r profile $(PROFILE) -r output "$(OUT)/$(PROFILE)" -r scores "$(SCORES)" "$<" "$(@:.ipynb=.part.ipynb)"
	@mv "$(@:.ipynb=.part.ipynb)" "$@"

# One after the other, in the order of their numbers, also with make -j: a notebook may read what an earlier one wrote.
# The teachers' table comes first, within minutes; all others wait for the audit of the scores too.
$(wordlist 2,$(words $(EXECUTED)),$(EXECUTED)): $(AUDITED)
previous :=
$(foreach target,$(EXECUTED),$(eval $(target): $(previous))$(eval previous := $(target)))

# The figures and tables that git keeps are those of the full profile.
$(BUILD)/manifest.json: $(EXECUTED) $(AUDITED)
	@$(if $(EXECUTED),,echo "there are no notebooks in $(NOTEBOOKS)/" >&2; exit 1)
	@if [ $(PROFILE) = full ] && [ -d "$(BUILD)/full/figures" ]; then \
	    mkdir -p figures && cp $(BUILD)/full/figures/* $(BUILD)/full/tables/* figures/; fi
	@$(PY) -m permdistill.paper.manifest "$(BUILD)"
	$(eval MADE := yes)

.PHONY: paper
paper: $(BUILD)/manifest.json ## every table and figure: run all notebooks (an hour or more on 2 cores)
	@echo "$(if $(MADE),done,nothing to do): tables and figures are up to date, see $(BUILD)/ and $(BUILD)/manifest.json"

.PHONY: plan
plan: $(INSTALLED) ## what PROFILE takes: questions, tokens, FLOPs, GPU-hours, downloads and disk
	$(PY) -m permdistill.cli plan --profile $(PROFILE)

.PHONY: audit
audit: $(BUILD)/audit.ok ## re-score a random sample of the committed scores, fail if it differs

.PHONY: scores
scores: $(INSTALLED) ## make the committed scores (hours); continues where it was stopped
	$(call score,"$(abspath scores)")

.PHONY: students
students: $(INSTALLED) ## train the matrix of students and keep their predictions (hours); continues where it was stopped
	$(PY) -m permdistill.cli students

.PHONY: cost
cost: $(INSTALLED) ## measure what an answer of every teacher and student costs here (minutes), for notebook 10
	$(PY) -m permdistill.paper.cost --output figures/cost.json

.PHONY: bench
bench: $(INSTALLED) ## measure the shared-prefix engine against its rivals (half an hour or more), show it in notebook 5
	@mkdir -p $(BUILD)
	$(PY) -m permdistill.paper.bench --output $(BUILD)/bench.json
	@cp $(BUILD)/bench.json figures/bench.json
	$(MAKE) --no-print-directory performance

.PHONY: performance
performance: $(INSTALLED) ## what `make bench` measured, into notebook 5, figures/ and the README
	TQDM_DISABLE=1 $(PY) -m nbconvert --to notebook --execute --inplace notebooks/05_shared_prefixes.ipynb
	cp build/smoke/figures/P1_* build/smoke/tables/P1_* figures/
	$(PY) -m permdistill.paper.tables

# ---------------------------------------------------------------------------------------------------------------------
# The rest

.PHONY: test
test: $(INSTALLED) ## all tests, and the notebooks' small profile against their stored outputs
	TQDM_DISABLE=1 $(PY) -m pytest -q -m "not long" --nbval-lax --nbval-current-env tests $(NOTEBOOKS)

.PHONY: long
long: $(INSTALLED) ## the tests that take minutes each
	"$(VENV)/bin/python" -m pip install -q "ray[data]==2.60.0"
	TQDM_DISABLE=1 $(PY) -m pytest -q -m long tests

.PHONY: lint
lint: $(INSTALLED) ## style and types
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

.PHONY: lab
lab: $(INSTALLED) ## open the notebooks in JupyterLab
	cd $(NOTEBOOKS) && $(PY) -m jupyterlab

.PHONY: clean
clean: ## delete what `make paper` built (live scores too), keep environment and downloads
	rm -rf "$(BUILD)"

.PHONY: distclean
distclean: clean ## delete the virtual environment and caches too
	rm -rf "$(VENV)" .pytest_cache .ruff_cache .mypy_cache .hypothesis permdistill.egg-info permdistill/__pycache__ tests/__pycache__
