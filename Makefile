# Two commands do all set-up on a machine with python3, a C++ compiler (for hnswlib) and a package index:
#   make demo    answer questions of the embedded world with the shipped tiny model
#   make test    run the tests
# Others: make weights (train both shipped models anew), make train (three minutes of Step-GRPO, table before and after).
PYTHON ?= python3
RUN = .venv/bin/python
TEST_WORLD = --split test --seed 1000

.PHONY: demo test weights train clean

demo: .venv/ready data/demo/questions.jsonl
	$(RUN) infer.py --world data/demo --method router direct static text --show 5

test: .venv/ready-dev
	$(RUN) -m pytest -q tests

.venv/ready: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

data/demo/questions.jsonl: world.py .venv/ready
	$(RUN) world.py $(TEST_WORLD) --questions 200 --out data/demo

# Both shipped models anew, side by side on two cores: the trained one, and the deliberately weak start of Step-GRPO (see WORLD in README.md).
PRACTICE = data/sft/copy.jsonl=4 data/sft/describe.jsonl=5 data/sft/compare.jsonl=2.5
SFT = OMP_NUM_THREADS=1 $(RUN) train.py sft --model data/shell --threads 1 --seed $(SEED) --steps 7000 --learning-rate 1e-3 --warmup 100 \
	--previous-token-head --save-every 1000 --val-every 1000 --val-world data/val --log-every 200
SEED ?= 0

weights: .venv/ready
	$(RUN) world.py --split train --seed $(SEED) --questions 13000 --practice 3000 --out data/sft --shell data/shell
	$(RUN) world.py --split val --seed $(SEED) --questions 260 --out data/val
	$(MAKE) --jobs 2 runs/tiny runs/tiny-warm
	$(RUN) train.py export --run runs/tiny --out weights/tiny
	$(RUN) train.py export --run runs/tiny-warm --which last --out weights/tiny-warm

.PHONY: runs/tiny runs/tiny-warm
runs/tiny:
	$(SFT) --out $@ --data data/sft/fresh.jsonl=10 $(PRACTICE) data/sft/baselines.jsonl=3

runs/tiny-warm:
	$(SFT) --out $@ --data data/sft/weak.jsonl=10 $(PRACTICE)
