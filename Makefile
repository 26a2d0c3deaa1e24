# make demo     two methods on a small sample with a small real model: about 5 minutes on 2 CPU cores; TASK=ner, TASK=mlqa
# make test     all tests: about 5 minutes on 2 CPU cores
# make xnli     the paper's XNLI runs (a GPU; the model and the data are downloaded); make mlqa, make ner, make qam likewise
# make small    XNLI with the small model, 1,500 updates: what can be measured on a CPU (about 30 minutes a run on 2 cores)
# make small-tasks  question answering, named entities and QAM with the small model (hours on a CPU)
# make results  the tables of results/ from the runs kept there
# make clean    remove what can be made again: .venv, cache, runs/demo (models, data and other runs stay)

PYTHON  ?= python3
METHODS ?= df noisytune fs ff slowfast
SEEDS   ?= 1 2 3 4
MODEL   ?= models/xlm-roberta-base
DATA    ?= data
SHOTS   ?= 0
TASK    ?= xnli
# further options of slowfast.py, such as ARGS="--max-updates 1500 --lr 5e-5"
ARGS    ?=

TASKS := xnli mlqa ner qam
RUN   := .venv/bin/python
E5    := models/multilingual-e5-small

.PHONY: demo test $(TASKS) small small-tasks results clean
.SECONDARY:

# --- what the others need ---

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

models/%/model.safetensors: | .venv/run
	$(RUN) data.py fetch $* --out models/$*

# of each task's files the one that is fetched last
DATA_xnli := $(DATA)/XNLI-MT-1.0/multinli/multinli.train.en.tsv
DATA_mlqa := $(DATA)/xquad/xquad.zh.json
DATA_ner  := $(DATA)/panx_dataset/zh.tar.gz
DATA_qam  := $(DATA)/xglue/QAM/xglue.qam.fr.test

define fetch_data
$(DATA_$(1)): | .venv/run
	$(RUN) data.py fetch $(1) --data $(DATA)
endef
$(foreach task,$(TASKS),$(eval $(call fetch_data,$(task))))

# --- make demo: P1 and P2 need two full windows, so these are shorter than the paper's 100 updates ---

DEMO := --model $(E5) --data sample --window 20 --gap-every 20 --gap-examples 60 --log-every 20 --save-every 0
DEMO_xnli := --lr 5e-5 --max-updates 240
DEMO_ner  := --lr 5e-5 --max-updates 240
# (question answering: the loss falls all the way through so short a run, so that by the loss rule it would never leave P1)
DEMO_mlqa := --lr 1e-4 --max-updates 120 --max-length 192 --stride 64 --attention-dropout 0 --phase fraction --gap-every 60 --gap-examples 10

demo: demo-df demo-slowfast
	@echo
	@$(RUN) eval.py table runs/demo/$(TASK) --split test --no-paper
	@echo "Look at the gap: English minus the mean of the others, after training on English alone. The paper's claim is that slowfast"
	@echo "makes it smaller and the mean higher; on so small a sample either may win. The curves: runs/demo/$(TASK)/*/log.jsonl"

demo-slowfast: demo-df
demo-%: .venv/run $(E5)/model.safetensors
	$(if $(DEMO_$(TASK)),,$(error make demo has TASK=xnli, TASK=ner and TASK=mlqa, no $(TASK)))
	$(RUN) slowfast.py $(TASK) --method $* $(DEMO) $(DEMO_$(TASK)) --out runs/demo/$(TASK)/$*

# --- make test ---

test: .venv/dev
	$(RUN) -m pytest -q tests

# --- make xnli, mlqa, ner, qam: every method with every seed; finished runs are not run again, stopped ones go on ---

# One target per task and method, so that % is the seed (a method's name may hold a dash).
define task_runs
$(1)-run-$(2)-seed%: $(DATA_$(1)) $(MODEL)/model.safetensors
	$(RUN) slowfast.py $(1) --method $(2) --seed $$* --model $(MODEL) --data $(DATA) --shots $(SHOTS) $(ARGS)
endef
$(foreach task,$(TASKS),$(foreach method,$(METHODS),$(eval $(call task_runs,$(task),$(method)))))

define task_table
$(1): $(foreach method,$(METHODS),$(foreach seed,$(SEEDS),$(1)-run-$(method)-seed$(seed)))
	$(RUN) eval.py table runs/$(1)/$(notdir $(MODEL))
endef
$(foreach task,$(TASKS),$(eval $(call task_table,$(task))))

# --- make small, make small-tasks, make results ---

SMALL := --model $(E5) --data $(DATA) --lr 5e-5 --save-every 500

small: $(E5)/model.safetensors $(DATA_xnli)
	$(RUN) slowfast.py xnli --method df $(SMALL) --max-updates 1500 --no-test --out runs/small/df
	$(RUN) slowfast.py xnli --method slowfast $(SMALL) --max-updates 1500 --no-test --out runs/small/slowfast
	$(RUN) slowfast.py xnli --method slowfast --phase fraction $(SMALL) --max-updates 1500 --no-test --out runs/small/slowfast-fraction
	$(RUN) eval.py table runs/small --split dev
	$(RUN) eval.py curves runs/small

# --eval-every 0: the dev sets of 40 languages take longer than all of the training
SMALL_mlqa := --attention-dropout 0 --max-updates 1720 --eval-every 0 --gap-every 430 --gap-examples 50 --tests squad,xquad,dev-7x7
SMALL_ner  := --epochs 1 --eval-every 0 --dev-examples 1000
SMALL_qam  := --source de --languages de

small-tasks: $(foreach task,mlqa ner qam,small-$(task)-df small-$(task)-slowfast)
	$(RUN) eval.py table runs/small-mlqa runs/small-ner runs/small-qam --by-language

define small_runs
small-$(1)-%: $(E5)/model.safetensors
	$(RUN) slowfast.py $(1) --method $$* $(SMALL) $(SMALL_$(1)) --out runs/small-$(1)/$$*
endef
$(foreach task,mlqa ner qam,$(eval $(call small_runs,$(task))))

results: .venv/run
	$(RUN) eval.py table results/small --split dev --markdown > results/small/table.md
	$(RUN) eval.py curves results/small --markdown > results/small/curves.md
	$(RUN) eval.py table results/demo --split test --markdown > results/demo/table.md
	$(RUN) eval.py table results/small-qam --markdown > results/small-qam/table.md

clean:
	rm -rf .venv cache runs/demo __pycache__ tests/__pycache__ .pytest_cache .hypothesis
