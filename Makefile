# All common commands of the project. `make help` lists the targets. Most accept CONFIG, NPROC, MODEL and ARGS:
#   make train CONFIG=configs/demo.yaml NPROC=2 ARGS="--train.learning_rate 1e-6"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON3 ?= python3
CONFIG ?= configs/demo.yaml
SFT_CONFIG = $(if $(filter command line environment,$(origin CONFIG)),$(CONFIG),configs/demo_sft.yaml)
NPROC ?=
VERSIONS ?= requirements.lock
MODEL ?=
ARGS ?=
STUDY ?=
LABELS ?= sentiment
WORKERS ?= $(shell nproc | awk '{ print $$1 < 4 ? $$1 : 4 }')

py := .venv/bin/python
launch := PYTHON=$(py) $(if $(NPROC),NPROC=$(NPROC)) launch/run
model_key := $(if $(MODEL),--model.name_or_path $(MODEL))
study_keys = $(if $(STUDY),--name $(STUDY)) $(if $(filter command line environment,$(origin CONFIG)),--config $(CONFIG))
ready := .venv/.ready

.PHONY: help setup demo data data-report sft plan precompute-ref train eval frontier compare sentiment tensorboard
.PHONY: study study-harmless check cache best-of chat convert rounds
.PHONY: test test-unit test-distributed test-e2e test-faults torture torture-rounds bench bench-peers bench-cache lint docs format clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{ \
	    line = sprintf("  %-17s", $$1); n = split($$2, words, " "); \
	    for (i = 1; i <= n; i++) { \
	        if (length(line " " words[i]) > 80) { print line; line = sprintf("%19s", "") } \
	        line = line " " words[i] } \
	    print line }'

setup: $(ready) ## create .venv with the exact versions of requirements.lock (VERSIONS=requirements.minimum: the oldest) and install the project

$(ready): $(VERSIONS) pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "setup: $$($(PYTHON3) --version) is too old; expected Python 3.11 or newer (make setup PYTHON3=...)" >&2; exit 2; }
	$(PYTHON3) -m venv .venv
	[ $(VERSIONS) != requirements.lock ] || \
	    $(py) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.hashes
	$(py) -m pip install --quiet --disable-pip-version-check -r $(VERSIONS)
	$(py) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(ready) ## run the whole pipeline on generated stories: base model, samples, DPO, report (no network)
	PYTHON=$(py) $(if $(NPROC),NPROC=$(NPROC)) launch/demo $(ARGS)

data: $(ready) ## prepare preference data: make data ARGS="hh FILE --output DIR" (without ARGS: list the sources)
	$(py) -m data_prep $(or $(ARGS),--help)

sft: $(ready) ## next-token training with CONFIG (default configs/demo_sft.yaml)
	$(launch) sft --config $(SFT_CONFIG) $(model_key) $(ARGS)

data-report: $(ready) ## what CONFIG's data holds: lengths, repetition, suspected flips; ARGS="--ches 256" also scores pairs
	$(py) -m dpo data --config $(CONFIG) $(model_key) $(ARGS)

plan: $(ready) ## estimate memory, time and disk for CONFIG: make plan CONFIG=... ARGS="--num_gpus 8 --gpu_memory 80GB"
	$(py) -m dpo plan --config $(CONFIG) $(model_key) $(ARGS)

check: $(ready) ## validate CONFIG, model files and some rows before anything is started (ARGS=--exact: all rows)
	$(py) -m dpo check train --config $(CONFIG) $(model_key) $(ARGS)

cache: $(ready) ## what the reference cache holds of CONFIG: make cache ARGS="verify" or "prune" look after it
	$(py) -m dpo cache $(or $(firstword $(ARGS)),info) --config $(CONFIG) $(model_key) $(wordlist 2,99,$(ARGS))

best-of: $(ready) ## best of n samples of CONFIG's reference, and the score that no policy exceeds at a KL
	$(launch) best-of --config $(CONFIG) $(model_key) $(ARGS)

chat: $(ready) ## talk to reference and policy of a run, side by side: make chat ARGS=runs/demo
	$(py) -m dpo chat $(ARGS)

convert: $(ready) ## a configuration of TRL or the alignment-handbook as one of ours: make convert ARGS="TRL.yaml --num_gpus 8"
	$(py) -m dpo convert $(ARGS)

precompute-ref: $(ready) ## fill the cache of reference log-probabilities for CONFIG; takes seconds if it is full
	$(launch) precompute-ref --config $(CONFIG) $(model_key) $(ARGS)

train: $(ready) ## train the policy with CONFIG, after precompute-ref; starts neither where training would be refused
	@ACCELERATE_CONFIG="$${ACCELERATE_CONFIG:-}" $(py) -m dpo check train --config $(CONFIG) $(model_key) $(ARGS) --quiet >/dev/null
	$(launch) precompute-ref --config $(CONFIG) $(model_key) $(ARGS)
	$(launch) train --config $(CONFIG) $(model_key) $(ARGS)

eval: $(ready) ## evaluate CONFIG's run: held-out metrics, samples side by side, report
	$(launch) evaluate --config $(CONFIG) $(model_key) $(ARGS)

frontier: $(ready) ## train CONFIG with several betas and an SFT baseline on one cache; plot score against KL (ARGS="--betas 0.1,1")
	PYTHON=$(py) $(if $(NPROC),NPROC=$(NPROC)) $(py) -m dpo frontier --config $(CONFIG) $(model_key) $(ARGS)

rounds: $(ready) ## on-policy rounds with CONFIG: sample, score, pair, train, again: make rounds CONFIG=... ARGS="--rounds 3"
	PYTHON=$(py) $(if $(NPROC),NPROC=$(NPROC)) $(py) -m dpo rounds --config $(CONFIG) $(model_key) $(ARGS)

study: $(ready) ## sentiment experiment on your text: make study MODEL=path/to/model BOOKS=books.txt (90 minutes on a CPU for 14M)
	$(py) -m benchmarks.study_sentiment --model $(MODEL) --books $(BOOKS) $(study_keys) $(ARGS)
	$(py) -m benchmarks.study_report $(if $(STUDY),--name $(STUDY))

study-harmless: $(ready) ## 5-fold cross-validation on HH-RLHF: make study-harmless MODEL=path/to/model HH=test.jsonl.gz
	$(py) -m benchmarks.study_harmless --model $(MODEL) --hh $(HH) $(study_keys) $(ARGS)
	$(py) -m benchmarks.study_report $(if $(STUDY),--harmless $(STUDY))

compare: $(ready) ## compare runs: make compare ARGS="runs/a runs/b"
	$(py) -m dpo compare $(ARGS)

sentiment: $(ready) ## sentiment experiment on GPT-2: MODEL (default gpt2, or a folder), LABELS (one of OpenAI's tasks, or a file)
	PYTHON=$(py) MODEL="$(MODEL)" LABELS="$(LABELS)" $(if $(NPROC),NPROC=$(NPROC)) launch/sentiment $(ARGS)

tensorboard: $(ready) ## show the runs under runs/ at http://localhost:6006
	$(py) -m tensorboard.main --logdir runs --host localhost $(ARGS)

test: $(ready) ## run all tests, as many at once as there are cores, at most 4 (or WORKERS=N)
	OMP_NUM_THREADS=1 $(py) -m pytest tests/distributed tests/faults tests/end_to_end tests/unit \
	    -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q --durations=10 $(ARGS)

test-unit: $(ready) ## run the fast tests of single modules
	OMP_NUM_THREADS=1 $(py) -m pytest tests/unit -n $(WORKERS) -q $(ARGS)

test-distributed: $(ready) ## run tests with real ranks, launcher and DeepSpeed
	$(py) -m pytest tests/distributed -n $(WORKERS) --dist loadfile -q $(ARGS)

test-e2e: $(ready) ## run tests of the commands as a user runs them
	$(py) -m pytest tests/end_to_end -q $(ARGS)

bench: $(ready) bench-peers ## benchmark train and precompute against a textbook implementation and TRL (ARGS="--rounds 1"; long)
	$(py) -m benchmarks.plan_scale --figure docs/figures/plan_scale.png
	$(py) -m benchmarks.speed $(ARGS)

bench-peers: .venv-peers/.ready ## install TRL in a separate environment, for make bench

.venv-peers/.ready: benchmarks/peers/requirements.txt
	$(PYTHON3) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

bench-cache: $(ready) ## measure the tables and the figure of docs/reference-cache.md: reuse, faults, scale (5 minutes)
	$(py) -m benchmarks.cache_reuse
	$(py) -m benchmarks.cache_faults
	$(py) -m benchmarks.cache_scale --figure docs/figures/reference_cache_join.png

test-faults: $(ready) ## test every fault through the real launcher, for docs/reliability.md (half an hour)
	TEST_LAUNCHER=1 FAULTS_REPORT=faults.md $(py) -m pytest tests/faults -q $(ARGS)

torture: $(ready) ## random faults at random moments for an hour, for docs/reliability.md (ARGS="--seed N" replays one)
	cd tests && PYTHONPATH=. ../$(py) -m torture $(ARGS)

torture-rounds: $(ready) ## kill -9 at 10 random moments of two rounds on 2 ranks; the end must be the same (ARGS="--kills 3 --seed 7")
	cd tests && PYTHONPATH=. ../$(py) -m torture.rounds --folder $${TMPDIR:-/tmp}/dpo-torture-rounds $(ARGS)

lint: $(ready) ## check formatting, lint and types
	$(py) -m ruff format --check .
	$(py) -m ruff check .
	$(py) -m mypy

docs: $(ready) ## build the documentation as a site in site/ (its search needs a server); dead links are errors
	$(py) -m benchmarks.options docs/options.md
	NO_MKDOCS_2_WARNING=1 $(py) -m mkdocs build --quiet --strict

format: $(ready) ## format the code
	$(py) -m ruff format .
	$(py) -m ruff check --fix .

clean: ## remove caches, runs and prepared data; keeps .venv
	rm -rf runs cache data site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
