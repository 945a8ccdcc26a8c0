"""What the model needs of memory: to be loaded, and for log-probabilities."""
import json
import os
import subprocess
import sys

import pytest

import model
from conftest import ROOT
from oracles import make_config

PEAK = """
import sys, torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
import model
torch.set_num_threads(1)

def resident(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def peak_of(work):
    "Bytes by which the largest resident memory during the work exceeds that before it."
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    kept = work()
    return resident("VmHWM") - before
"""


def peak_memory(script, *arguments):
    """Runs the script in a fresh process (a peak can only be seen there) and returns the numbers of
    bytes that it prints."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory cannot be read on this system")
    command = [sys.executable, "-c", PEAK + script, str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_loading_needs_little_more_than_the_weights(small, tmp_path):
    """A checkpoint of 300 MB, every weight touched after loading."""
    sizes = dict(vocab_size=24000, hidden_size=1024, intermediate_size=3072, num_attention_heads=8)
    vlm = model.VLM.from_config(make_config(text=sizes).to_dict())
    size = sum(weight.nbytes for weight in vlm.parameters())
    assert 2.4e8 < size < 3.6e8
    vlm.save_pretrained(tmp_path / "big")
    del vlm
    script = """
model.VLM.from_pretrained(sys.argv[3])  # what torch imports at its first use is not counted
def load():
    vlm = model.VLM.from_pretrained(sys.argv[2])
    return vlm, [weight.sum() for weight in vlm.parameters()]
print(peak_of(load))
"""
    peak, = peak_memory(script, tmp_path / "big", small.path)
    assert peak < 1.15 * size


def test_log_probs_need_a_quarter_of_the_plain_memory(tmp_path):
    """Forward and backward at the published vocabulary of 151,936. Ours reads 4 x 512 tokens; the
    plain way grows with the tokens, so that 4 x 32 of them tell what 4 x 512 would need."""
    config = make_config(text=dict(vocab_size=151936, num_hidden_layers=1)).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = """
vlm = model.VLM.from_config(sys.argv[2])
def ours(tokens):
    ids = torch.randint(0, 280, (4, tokens))
    vlm.log_probs(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
def plain(tokens):
    ids = torch.randint(0, 280, (4, tokens))
    vlm(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum().backward()
ours(8), plain(8)  # what torch imports at its first use, and the gradients, are not counted
print(peak_of(lambda: ours(512)), peak_of(lambda: plain(32)))
"""
    ours, plain = peak_memory(script, tmp_path)
    assert ours < 16 * plain / 4
