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
