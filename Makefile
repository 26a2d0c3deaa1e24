# make demo     two methods on a few short texts with a small real model: 3 to 6 minutes on 2 CPU cores; TASK=ner, mlqa, qam
# make test     all tests: about 6 minutes on 2 CPU cores
# make check    format, lint and the quick tests: under a minute
# make xnli     the paper's XNLI runs (a GPU; the model and the data are downloaded); make mlqa, make ner, make qam likewise
# make table1 ... table8, figure1 ... figure7, tables, figures
#               runs what the paper's table or figure lacks, and shows it beside the paper's numbers
# make plan     how many runs TARGETS need (default: all tables and figures), and how many are there
# make report   one page with all that was run: report/report.md
# make check-targets  each of them once, with the small model on the demo's texts and next to no training
# make small    what results/small was made with: the small model on the official files, on a CPU
# make evidence what results/cpu was made with: several seeds of shorter runs, most of a day
# make results  writes results/README.md, and the README's tables, from the runs in results/
# make bench    our training loop against Hugging Face's Trainer, on this machine: results/bench; QUICK=1: 3 minutes
# make soak     the promises of README.md, tried for ten minutes on 2 cores: results/soak.json; QUICK=1, SEED=n
# make clean    remove what can be made again: .venv, cache, runs/demo, runs/check, report (models, data and other runs stay)

PYTHON  ?= python3
METHODS ?= df noisytune fs ff slowfast
SEEDS   ?= 1 2 3 4
SETUP   ?= paper
MODEL   ?= models/xlm-roberta-base
DATA    ?= data
SHOTS   ?= 0
TASK    ?= xnli
TASKS   ?= xnli mlqa ner qam
TARGETS ?= tables figures
# further options of `python -m paper run`, such as ARGS="--max-updates 1500 --lr 5e-5"
ARGS    ?=

ALL_TASKS := xnli mlqa ner qam
TABLES    := $(addprefix table,1 2 3 4 5 6 7 8) tables
FIGURES   := $(addprefix figure,1 2 3 4 5 6 7) figures
RUN       := .venv/bin/python
PAPER     := $(RUN) -m paper
E5        := models/multilingual-e5-small

OPTIONS    = --setup $(SETUP) --model $(MODEL) --data $(DATA) --seeds $(SEEDS) --tasks $(TASKS) --args='$(subst ','\'',$(ARGS))'

.PHONY: demo test check $(ALL_TASKS) $(TABLES) $(FIGURES) plan report check-targets small evidence results bench soak clean
.SECONDARY:

# --- what the command line gets wrong: said before anything is installed or downloaded ---

GOALS   := $(or $(MAKECMDGOALS),demo)
MODELS  := models/xlm-roberta-base models/xlm-roberta-large $(E5)
WEIGHTS  = $(if $(filter $(MODELS),$(MODEL)),$(MODEL)/model.safetensors)

$(foreach name,METHODS SEEDS TASKS TARGETS,$(if $(strip $($(name))),,$(error $(name) is empty)))
$(foreach name,MODEL DATA,$(if $(word 2,$($(name))),\
	$(error $(name)=$($(name)) has a space in it, which make cannot take: give a link to it)))
override MODEL := $(patsubst %/,%,$(MODEL))

# what make xnli sets itself
OWN := method seed setup model data shots runs out
ifneq ($(filter $(ALL_TASKS),$(GOALS)),)
$(foreach name,$(OWN),$(if $(filter --$(name) --$(name)=%,$(ARGS)),\
	$(error ARGS has --$(name): give METHODS, SEEDS, SETUP, MODEL, DATA or SHOTS; runs and their names are make's)))
endif

# $(call check,target,the command that it is going to give)
check = $(if $(filter $(1),$(GOALS)),$(eval said := $$(shell $(or $(wildcard $(RUN)),$(PYTHON)) -m paper.arguments $(2) 2>&1))$(if $(said),$(error $(said))))
$(call check,demo,run $(TASK) --setup demo --model $(E5) $(ARGS))
$(foreach task,$(ALL_TASKS),$(call check,$(task),run $(task) $(addprefix --method ,$(METHODS)) $(addprefix --seed ,$(SEEDS)) \
	--setup $(SETUP) --model $(MODEL) --data $(DATA) --shots $(SHOTS) $(ARGS)))
$(foreach target,$(TABLES) $(FIGURES),$(call check,$(target),make $(target) $(OPTIONS)))
$(call check,plan,plan $(TARGETS) $(OPTIONS))

ifneq ($(filter $(ALL_TASKS) $(TABLES) $(FIGURES) plan,$(GOALS)),)
$(if $(or $(WEIGHTS),$(wildcard $(MODEL)/model*.safetensors)),,\
	$(error MODEL=$(MODEL): no model.safetensors is in it, and what can be fetched are $(MODELS). Of a pytorch_model.bin \
	`python -m paper run` says what to do))
endif

# --- what the others need ---

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/figures: .venv/run requirements-figures.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-figures.txt
	touch $@

.venv/fetch: .venv/run requirements-fetch.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-fetch.txt
	touch $@

# (an older pip, such as Python 3.10's own, cannot build seqeval)
.venv/dev: .venv/figures .venv/fetch requirements-dev.txt
	.venv/bin/python -m pip install -q --disable-pip-version-check "pip>=23.1"
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(E5)/model.safetensors: | .venv/run
	$(RUN) -m demo.e5 $(E5)

models/%/model.safetensors: | .venv/fetch
	$(PAPER) fetch $* --out models/$*

# of each task's files the one that is fetched last (of QAM, whose files have two names, any training set)
DATA_xnli := $(DATA)/XNLI-MT-1.0/multinli/multinli.train.en.tsv
DATA_mlqa := $(DATA)/squad/train-v1.1.json
DATA_ner  := $(DATA)/panx_dataset/zh.tar.gz
DATA_qam  := $(firstword $(wildcard $(DATA)/xglue/QAM/*train*) $(DATA)/xglue/QAM/xglue.qam.en.train)

define fetch_data
$(DATA_$(1)): | .venv/fetch
	$(PAPER) fetch $(1) --data $(DATA)
endef
$(foreach task,$(ALL_TASKS),$(eval $(call fetch_data,$(task))))

# --- make demo ---

demo: demo-df demo-slowfast
	@echo
	@$(PAPER) table runs/demo/$(TASK) --split test --no-paper
	@echo "The gap is English minus the mean of the others, after training on English alone. So short a run shows how it works,"
	@echo "not whether: over 4 seeds these texts, mostly from templates, do not tell the two apart, nor do as few real pairs"
	@echo "(240 updates of 3,060 pairs: mean -0.4 [-1.8, 1.0]); what longer runs say is in README.md. The curves:"
	@echo "runs/demo/$(TASK)/*/*/log.jsonl"

demo-slowfast: demo-df
demo-%: .venv/run $(E5)/model.safetensors
	@echo "$*, one of two runs: after five updates it says how long it takes on this machine"
	$(PAPER) run $(TASK) --method $* --setup demo --model $(E5) --data demo/texts $(ARGS)

# --- make test, make check ---

test: .venv/dev
	$(RUN) -m pytest -q -n 2 --dist worksteal tests

check: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(RUN) -m pytest -q -m "not slow" tests

# --- make xnli, mlqa, ner, qam: all methods with the first seed, then with the next; finished runs are not run again,
# --- stopped ones go on ---

# One target per task and method, so that % is the seed (a method's name may hold a dash).
define task_runs
$(1)-run-$(2)-seed%: $(DATA_$(1)) $(WEIGHTS)
	$(PAPER) run $(1) --method $(2) --seed $$* --setup $(SETUP) --model $(MODEL) --data $(DATA) --shots $(SHOTS) $(ARGS)
endef
$(foreach task,$(ALL_TASKS),$(foreach method,$(METHODS),$(eval $(call task_runs,$(task),$(method)))))

define task_table
$(1): .venv/figures $(foreach seed,$(SEEDS),$(foreach method,$(METHODS),$(1)-run-$(method)-seed$(seed)))
	$(PAPER) table runs/$(SETUP)/$(1)/$(notdir $(abspath $(MODEL)))
endef
$(foreach task,$(ALL_TASKS),$(eval $(call task_table,$(task))))

# --- make table1 ..., figure1 ..., plan, report: tables share runs; of a target only TASKS are run ---

# which tasks a target is about
$(foreach target,$(addprefix table,1 2 4 5 6 8) $(addprefix figure,2 3 4 6),$(eval needs_$(target) := xnli mlqa ner))
$(foreach target,table7 figure1,$(eval needs_$(target) := xnli))
$(foreach target,table3 figure7,$(eval needs_$(target) := qam))
$(foreach target,tables figures,$(eval needs_$(target) := $(ALL_TASKS)))
needs_figure5 := mlqa ner

.SECONDEXPANSION:
$(TABLES) $(FIGURES): .venv/figures $(WEIGHTS) $$(foreach t,$$(filter $(TASKS),$$(needs_$$@)),$$(DATA_$$t))
	$(PAPER) make $@ $(OPTIONS)

plan: .venv/run $(WEIGHTS)
	$(PAPER) plan $(TARGETS) $(OPTIONS)

report: .venv/figures
	$(PAPER) report runs --out report

# --- make check-targets: that they run, with a real model; their numbers say nothing ---

CHECK := --setup demo --seeds 1 --model $(E5) --data demo/texts --runs runs/check --out report/check
CHECK += --args="--max-updates 2 --batch-size 4 --languages en,de --gap-every 2 --gap-examples 4 --cka-every 2 --log-every 2 --window 1"

check-targets: .venv/figures $(E5)/model.safetensors
	rm -rf runs/check
	$(PAPER) make tables figures --tasks ner qam $(CHECK)
	$(PAPER) make table7 figure1 --tasks xnli $(CHECK)
	$(PAPER) make table4 --tasks mlqa $(CHECK)

# --- make small, make results ---

SMALL := --setup small --seeds 1 --model $(E5) --data $(DATA)

small: .venv/figures $(E5)/model.safetensors $(foreach task,$(ALL_TASKS),$(DATA_$(task)))
	$(PAPER) make table3 table4 figure1 $(SMALL)
	$(PAPER) make table6 --tasks ner $(SMALL)

# Policy IV is off for NER: there ff is df, and slowfast is fs.
SHORT := SETUP=small MODEL=$(E5)
ONCE  := --no-test --eval-every 0 --cka-every 0 --discard
XNLI_240 := $(ONCE) --max-updates 240 --window 20 --dev-examples 500 --gap-every 60 --gap-examples 200 --log-every 20
XNLI_960 := $(ONCE) --max-updates 960 --window 80 --dev-examples 500 --gap-every 240 --gap-examples 100 --log-every 20
NER_960  := $(ONCE) --max-updates 960 --epochs 2 --dev-examples 300 --gap-every 240 --gap-examples 100
NER_3840 := $(ONCE) --max-updates 3840 --epochs 7 --dev-examples 300 --gap-every 960 --gap-examples 100 --window 320
NER_240  := $(ONCE) --max-updates 240 --window 20 --dev-examples 300 --gap-every 0 --log-every 20
MLQA_480 := $(ONCE) --max-updates 480 --window 40 --dev-examples 300 --gap-every 160 --gap-examples 50 --log-every 20

evidence:
	$(MAKE) xnli $(SHORT) ARGS="$(XNLI_240)"
	$(MAKE) xnli $(SHORT) ARGS="$(XNLI_960)"
	$(MAKE) table6 $(SHORT) TASKS=xnli SEEDS="1 2" ARGS="$(XNLI_240)"
	$(MAKE) ner $(SHORT) METHODS="df slowfast" ARGS="$(NER_960) --window 80"
	$(MAKE) ner $(SHORT) METHODS=slowfast ARGS="$(NER_960) --window 20"
	$(MAKE) ner $(SHORT) METHODS=df SEEDS="5 6" ARGS="$(NER_960) --window 80"
	$(MAKE) ner $(SHORT) METHODS=slowfast SEEDS="1 2 3 4 5 6" ARGS="$(NER_960) --window 80 --phase fraction"
	$(MAKE) ner $(SHORT) METHODS="df slowfast" ARGS="$(NER_3840) --phase fraction"
	$(MAKE) mlqa $(SHORT) METHODS="df slowfast" ARGS="$(MLQA_480) --phase fraction"
	$(MAKE) table1 table6 $(SHORT) TASKS=ner SEEDS="1 2" ARGS="$(NER_960) --window 80"
	$(MAKE) table8 $(SHORT) TASKS=ner SEEDS="1 2" ARGS="$(NER_960) --window 80 --phase fraction"
	$(MAKE) table5 $(SHORT) TASKS=ner SEEDS="1 2" ARGS="$(NER_960) --window 80 --phase fraction"
	$(MAKE) ner $(SHORT) METHODS="df slowfast" SEEDS="1 3 4" SHOTS=10 ARGS="$(NER_960) --window 80 --phase fraction"
	$(MAKE) table1 $(SHORT) TASKS=ner SEEDS="1 2 3" ARGS="$(NER_240)"
	$(MAKE) table6 $(SHORT) TASKS=ner ARGS="$(NER_240)"
	$(MAKE) table5 $(SHORT) TASKS=ner SEEDS="1 2" ARGS="$(NER_240) --phase fraction"
	$(MAKE) ner $(SHORT) METHODS=slowfast ARGS="$(NER_240) --phase fraction"
	$(MAKE) ner $(SHORT) METHODS="df slowfast" SHOTS=5 ARGS="$(NER_240) --phase fraction"
	$(MAKE) ner $(SHORT) METHODS="df slowfast" SHOTS=10 ARGS="$(NER_240) --phase fraction"
	$(MAKE) ner $(SHORT) METHODS="df slowfast" SHOTS=20 ARGS="$(NER_240) --phase fraction"

results: .venv/figures
	$(PAPER) report results --out results --readme README.md

# --- make bench (the small model is there for its tokeniser; weights are random) ---

bench: .venv/dev $(E5)/model.safetensors
	$(RUN) -m paper.bench $(if $(QUICK),--quick) $(ARGS)

soak: .venv/dev
	$(RUN) tests/soak.py $(if $(QUICK),--quick) $(if $(SEED),--seed $(SEED)) $(ARGS)

clean:
	rm -rf .venv cache runs/demo runs/check report .pytest_cache .ruff_cache .hypothesis
	rm -rf __pycache__ paper/__pycache__ demo/__pycache__ tests/__pycache__
