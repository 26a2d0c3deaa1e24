# make demo     two methods on a small sample with a small real model: about 5 minutes on 2 CPU cores; TASK=ner, mlqa, qam
# make test     all tests: about 5 minutes on 2 CPU cores
# make xnli     the paper's XNLI runs (a GPU; the model and the data are downloaded); make mlqa, make ner, make qam likewise
# make table1 ... table8, figure1 ... figure7, tables, figures
#               runs what the paper's table or figure lacks, and shows it beside the paper's numbers
# make plan     how many runs TARGETS need (default: all tables and figures), and how long they take on this machine
# make report   one page with all that was run: report/report.md
# make check-targets  each of them once, with the small model on the sample and next to no training: about 10 minutes on 2 cores
# make small    what results/ was made with: the small model on the official files, on a CPU
# make results  writes the README's results from results/
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
# further options of slowfast.py, such as ARGS="--max-updates 1500 --lr 5e-5"
ARGS    ?=

ALL_TASKS := xnli mlqa ner qam
TABLES    := $(addprefix table,1 2 3 4 5 6 7 8) tables
FIGURES   := $(addprefix figure,1 2 3 4 5 6 7) figures
RUN       := .venv/bin/python
E5        := models/multilingual-e5-small

.PHONY: demo test $(ALL_TASKS) $(TABLES) $(FIGURES) plan report check-targets small results clean
.SECONDARY:

# --- what the others need ---

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/figures: .venv/run requirements-figures.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-figures.txt
	touch $@

.venv/dev: .venv/figures requirements-dev.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

models/%/model.safetensors: | .venv/run
	$(RUN) data.py fetch $* --out models/$*

# of each task's files the one that is fetched last (of QAM, whose files have two names, any training set)
DATA_xnli := $(DATA)/XNLI-MT-1.0/multinli/multinli.train.en.tsv
DATA_mlqa := $(DATA)/squad/train-v1.1.json
DATA_ner  := $(DATA)/panx_dataset/zh.tar.gz
DATA_qam  := $(firstword $(wildcard $(DATA)/xglue/QAM/*train*) $(DATA)/xglue/QAM/xglue.qam.en.train)

define fetch_data
$(DATA_$(1)): | .venv/run
	$(RUN) data.py fetch $(1) --data $(DATA)
endef
$(foreach task,$(ALL_TASKS),$(eval $(call fetch_data,$(task))))

# --- make demo ---

demo: demo-df demo-slowfast
	@echo
	@$(RUN) eval.py table runs/demo/$(TASK) --split test --no-paper
	@echo "Look at the gap: English minus the mean of the others, after training on English alone. The paper's claim is that slowfast"
	@echo "makes it smaller and the mean higher; on so small a sample either may win. The curves: runs/demo/$(TASK)/*/*/log.jsonl"

demo-slowfast: demo-df
demo-%: .venv/run $(E5)/model.safetensors
	$(RUN) slowfast.py $(TASK) --method $* --setup demo --model $(E5) --data sample

# --- make test ---

test: .venv/dev
	$(RUN) -m pytest -q tests

# --- make xnli, mlqa, ner, qam: every method with every seed; finished runs are not run again, stopped ones go on ---

# One target per task and method, so that % is the seed (a method's name may hold a dash).
define task_runs
$(1)-run-$(2)-seed%: $(DATA_$(1)) $(MODEL)/model.safetensors
	$(RUN) slowfast.py $(1) --method $(2) --seed $$* --setup $(SETUP) --model $(MODEL) --data $(DATA) --shots $(SHOTS) $(ARGS)
endef
$(foreach task,$(ALL_TASKS),$(foreach method,$(METHODS),$(eval $(call task_runs,$(task),$(method)))))

define task_table
$(1): $(foreach method,$(METHODS),$(foreach seed,$(SEEDS),$(1)-run-$(method)-seed$(seed)))
	$(RUN) eval.py table runs/$(SETUP)/$(1)/$(notdir $(MODEL))
endef
$(foreach task,$(ALL_TASKS),$(eval $(call task_table,$(task))))

# --- make table1 ..., figure1 ..., plan, report: tables share runs; of a target only TASKS are run ---

OPTIONS = --setup $(SETUP) --model $(MODEL) --data $(DATA) --seeds $(SEEDS) --tasks $(TASKS) --args="$(ARGS)"

# which tasks a target is about
$(foreach target,$(addprefix table,1 2 4 5 6 8) $(addprefix figure,2 3 4 6),$(eval needs_$(target) := xnli mlqa ner))
$(foreach target,table7 figure1,$(eval needs_$(target) := xnli))
$(foreach target,table3 figure7,$(eval needs_$(target) := qam))
$(foreach target,tables figures,$(eval needs_$(target) := $(ALL_TASKS)))
needs_figure5 := mlqa ner

.SECONDEXPANSION:
$(TABLES) $(FIGURES): .venv/figures $(MODEL)/model.safetensors $$(foreach t,$$(filter $(TASKS),$$(needs_$$@)),$$(DATA_$$t))
	$(RUN) eval.py make $@ $(OPTIONS)

plan: .venv/run $(MODEL)/model.safetensors
	$(RUN) eval.py plan $(TARGETS) $(OPTIONS)

report: .venv/figures
	$(RUN) eval.py report runs --out report

# --- make check-targets: that they run, with a real model; their numbers say nothing ---

CHECK := --setup demo --seeds 1 --model $(E5) --data sample --runs runs/check --out report/check
CHECK += --args="--max-updates 2 --batch-size 4 --languages en,de --gap-every 2 --gap-examples 4 --cka-every 2 --log-every 2 --window 1"

check-targets: .venv/figures $(E5)/model.safetensors
	rm -rf runs/check
	$(RUN) eval.py make tables figures --tasks ner qam $(CHECK)
	$(RUN) eval.py make table7 figure1 --tasks xnli $(CHECK)
	$(RUN) eval.py make table4 --tasks mlqa $(CHECK)

# --- make small, make results ---

SMALL := --setup small --seeds 1 --model $(E5) --data $(DATA)

small: .venv/figures $(E5)/model.safetensors $(foreach task,$(ALL_TASKS),$(DATA_$(task)))
	$(RUN) eval.py make table3 table4 figure1 $(SMALL)
	$(RUN) eval.py make table6 --tasks ner $(SMALL)

results: .venv/figures
	$(RUN) eval.py report results --out results/report --readme README.md

clean:
	rm -rf .venv cache runs/demo runs/check report __pycache__ tests/__pycache__ .pytest_cache .hypothesis
