# make demo     two methods on a small sample with a small real model: about 5 minutes on 2 CPU cores
# make test     all tests: about 5 minutes on 2 CPU cores
# make xnli     the paper's XNLI runs (a GPU; the model and the data are downloaded)
# make small    XNLI with the small model, 1,500 updates: what can be measured on a CPU (about 30 minutes a run on 2 cores)
# make results  the tables of results/ from the runs kept there
# make clean    remove what can be made again: .venv, cache, runs/demo (models, data and other runs stay)

PYTHON  ?= python3
METHODS ?= df noisytune fs ff slowfast
SEEDS   ?= 1 2 3 4
MODEL   ?= models/xlm-roberta-base
DATA    ?= data
SHOTS   ?= 0
# further options of slowfast.py, such as ARGS="--max-updates 1500 --lr 5e-5"
ARGS    ?=

RUN := .venv/bin/python
E5  := models/multilingual-e5-small

.PHONY: demo test xnli small results clean
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

# --- make demo: P1 and P2 need two full windows, so these are shorter than the paper's 100 updates ---

DEMO := --model $(E5) --data sample --lr 5e-5 --max-updates 240 --window 20 --gap-every 20 --gap-examples 60 --log-every 20 --save-every 0

demo: demo-df demo-slowfast
	@echo
	@$(RUN) eval.py table runs/demo --split test
	@echo "Look at the gap: English minus the mean of the others, after training on English alone. The paper's claim is that slowfast"
	@echo "makes it smaller and the mean higher; on so small a sample either may win. The curves: runs/demo/*/log.jsonl"

demo-slowfast: demo-df
demo-%: .venv/run $(E5)/model.safetensors
	$(RUN) slowfast.py xnli --method $* $(DEMO) --out runs/demo/$*

# --- make test ---

test: .venv/dev
	$(RUN) -m pytest -q tests

# --- make xnli: every method with every seed; finished runs are not run again, stopped ones go on ---

RUNS := $(foreach method,$(METHODS),$(foreach seed,$(SEEDS),xnli-run-$(method)-seed$(seed)))

xnli: $(RUNS)
	$(RUN) eval.py table runs/xnli/$(notdir $(MODEL))

# One target per method, so that % is the seed (a method's name may hold a dash).
define xnli_runs
xnli-run-$(1)-seed%: $(DATA)/XNLI-MT-1.0/multinli/multinli.train.en.tsv $(MODEL)/model.safetensors
	$(RUN) slowfast.py xnli --method $(1) --seed $$* --model $(MODEL) --data $(DATA) --shots $(SHOTS) $(ARGS)
endef
$(foreach method,$(METHODS),$(eval $(call xnli_runs,$(method))))

$(DATA)/XNLI-MT-1.0/multinli/multinli.train.en.tsv: | .venv/run
	$(RUN) data.py fetch xnli --data $(DATA)

# --- make small, make results ---

SMALL := --model $(E5) --data $(DATA) --lr 5e-5 --max-updates 1500 --no-test --save-every 500

small: $(E5)/model.safetensors $(DATA)/XNLI-MT-1.0/multinli/multinli.train.en.tsv
	$(RUN) slowfast.py xnli --method df $(SMALL) --out runs/small/df
	$(RUN) slowfast.py xnli --method slowfast $(SMALL) --out runs/small/slowfast
	$(RUN) slowfast.py xnli --method slowfast --phase fraction $(SMALL) --out runs/small/slowfast-fraction
	$(RUN) eval.py table runs/small --split dev
	$(RUN) eval.py curves runs/small

results: .venv/run
	$(RUN) eval.py table results/small --split dev --markdown > results/small/table.md
	$(RUN) eval.py curves results/small --markdown > results/small/curves.md
	$(RUN) eval.py table results/demo --split test --markdown > results/demo/table.md

clean:
	rm -rf .venv cache runs/demo __pycache__ tests/__pycache__ .pytest_cache .hypothesis
