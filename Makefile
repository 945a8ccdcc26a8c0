# Two commands do all set-up on a machine with python3 (3.10 or newer), a C++ compiler (for hnswlib) and a package index:
#   make demo       answer questions of the embedded world with the shipped tiny model, and print the score table
#   make test       run the tests
# and then:
#   make train      160 updates of Step-GRPO (four minutes) from the weak start, with the table of a held-out world before and after
#   make weights    train both shipped models anew (SEED=0)
#   make experiment the full study, which can be stopped and continued (QUICK=1: at toy scale)
#   make soak       kills, a million generated inputs and long runs
#   make assignment OUT=dir      write the student copy of the exercises (assignments/README.md)
#   make grade                   run the exercises' tests, print a score out of 100
PYTHON ?= python3
SEED ?= 0
RUN = .venv/bin/python

.PHONY: demo test train weights experiment soak assignment grade

demo: .venv/ready data/demo/questions.jsonl
	$(RUN) infer.py --world data/demo --method router direct static text --show 5

test: .venv/ready-dev
	$(RUN) -m pytest -q -n 2 --dist loadfile tests

train: .venv/ready data/test/questions.jsonl
	$(RUN) infer.py --model weights/tiny-warm --world data/test
	$(RUN) train.py grpo --follow best --steps 160 --val-every 40 --seed $(SEED) --out runs/step-grpo
	$(RUN) infer.py --model runs/step-grpo/best --world data/test

experiment: .venv/ready-dev
	$(RUN) -m lab.experiment $(if $(QUICK),--quick --out runs/results-quick)

soak: .venv/ready-dev
	$(RUN) tests/soak/soak.py

assignment:
	$(PYTHON) assignments/kit.py copy "$(OUT)" $(EXERCISES)

grade: .venv/ready-dev
	$(RUN) assignments/kit.py grade $(EXERCISES)

.venv/ready: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

data/demo/questions.jsonl: lab/world.py | .venv/ready
	$(RUN) -m lab.world --split test --seed 1000 --questions 200 --out data/demo

data/test/questions.jsonl: lab/world.py | .venv/ready
	$(RUN) -m lab.world --split test --seed 2000 --questions 520 --out data/test

# Both shipped models, side by side on two cores. The trained one comes from a world with a little of all that makes a world harder, the deliberately
# weak one from an ordinary world with poor demonstrations; at a low rate, in the end, its routes become even.
WORLD = $(RUN) -m lab.world --split train --seed $(SEED) --questions 13000 --practice 3000
DIALS = --unanswerable 0.05 --moved 0.08 --guessable 0.15 --wordings several
SFT = $(RUN) train.py sft --model data/shell --threads 1 --seed $(SEED) --steps 7000 --learning-rate 1e-3 --warmup 100 --previous-token-head \
	--save-every 1000 --val-every 1000 --val-world data/val-sft --log-every 200

weights: .venv/ready
	$(WORLD) $(DIALS) --out data/sft --shell data/shell
	$(WORLD) --out data/sft-plain
	$(RUN) -m lab.world --split val --seed $(SEED) --questions 260 --out data/val-sft
	$(MAKE) --jobs 2 runs/tiny runs/tiny-warm
	$(RUN) train.py export --run runs/tiny --out weights/tiny
	$(RUN) train.py export --run runs/tiny-even --which last --out weights/tiny-warm

.PHONY: runs/tiny runs/tiny-warm
runs/tiny: D = data/sft
runs/tiny:
	$(SFT) --out $@ --data $D/fresh.jsonl=10 $D/copy.jsonl=4 $D/describe.jsonl=5 $D/compare.jsonl=2.5 $D/absent.jsonl=1 $D/verdict.jsonl=2 $D/baselines.jsonl=3

runs/tiny-warm: D = data/sft-plain
runs/tiny-warm:
	$(SFT) --out $@ --data $D/weak.jsonl=10 $D/copy.jsonl=4 $D/describe.jsonl=5 $D/compare.jsonl=2.5
	$(RUN) train.py sft --model $@/last --threads 1 --seed $(SEED) --steps 600 --learning-rate 1e-4 --warmup 20 --save-every 600 \
		--val-every 600 --val-world data/val-sft --out runs/tiny-even --data $D/weak.jsonl=10 $D/copy.jsonl=4 $D/describe.jsonl=5 $D/compare.jsonl=2.5
