"""`python model.py check DIR`: what it finds, and that it sees differences from transformers."""
import json
import math
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch

import model
from conftest import ROOT, made, run
from oracles import LAYOUTS, full_tokenizer, make_config, make_model, rewrite, save_checkpoint
from lab import check
from lab.check import Answer, compare, first_difference

# The published template's words, without videos and numbered pictures.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "separate"])
def source(request, tmp_path_factory):
    """(whether its head is tied, transformers' model, its directory)."""
    hf = make_model(make_config(tied=request.param), seed=4)
    return request.param, hf, save_checkpoint(hf, tmp_path_factory.mktemp("source") / "a")


@pytest.fixture
def copied(small, tmp_path):
    """A copy of the small checkpoint, free to be changed."""
    return shutil.copytree(small.path, tmp_path / "copy")


@pytest.fixture
def checked(capsys):
    """Runs the command -> (its exit code, the lines that it prints)."""
    def checked(path, *words):
        code = check.main(["check", str(path), *words])
        output = capsys.readouterr()
        assert output.err == ""
        return code, output.out.splitlines()
    return checked


def tampered(monkeypatch, change):
    """From here on our network is changed after it was loaded."""
    load = model.VLM.from_pretrained

    def load_and_change(path, **options):
        vlm = load(path, **options)
        with torch.no_grad():
            change(vlm)
        return vlm
    monkeypatch.setattr(model.VLM, "from_pretrained", load_and_change)


# ----------------------------------------------------------------------------------- what is equal

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_described_and_equal(source, tmp_path, checked, layout):
    tied, hf, path = source
    code, lines = checked(rewrite(path, tmp_path / "other", layout))
    assert code == 0 and lines[-1] == "equal within 0.0001 of the largest logit"
    facts = dict(line.strip().split(maxsplit=1) for line in lines[1:9])
    kind = "nested (text_config)" if layout.startswith(("nested", "middle")) else "flat"
    assert facts["config"] == f"{kind}, 512 positions"
    numbers = sum(p.numel() for p in hf.parameters())           # a tied table counts once
    names = "newer" if "new keys" in layout else "older"
    assert re.fullmatch(rf"{numbers:,} F32 in \d+ tensors, {names} names", facts["weights"])
    _, _, shards = LAYOUTS[layout]
    assert facts["files"].startswith(f"{shards} of safetensors, ")
    assert facts["decoder"] == "3 layers, 4 heads, 2 key/value heads, hidden size 64"
    assert facts["vision"] == "4 blocks, 2 heads, hidden size 32, patches of 14 x 14 pixels"
    head = "tied to the embedding table" if tied else "separate"
    tokens = full_tokenizer().get_vocab_size()
    assert facts["vocabulary"] == f"304 rows for {tokens} tokens, head {head}"
    assert facts["ends"] == "282 <|im_end|>, 280 <|endoftext|>"
    assert facts["pixels"] == "3,136 to 12,544 of a picture"
    greedy = [line for line in lines if "greedy" in line]
    assert len(greedy) == 2 and all(line.endswith("all the same") for line in greedy)
    positions = [re.search(r"the same at (\d+) of (\d+)$", line) for line in lines]
    positions = [found for found in positions if found]
    assert len(positions) == 2 and all(found[1] == found[2] for found in positions)


def test_the_types_on_disk_are_counted(copied, checked):
    model.VLM.from_pretrained(copied).save_pretrained(copied, dtype=torch.bfloat16)
    code, lines = checked(copied)
    assert code == 0 and re.search(r" [\d,]+ BF16 in", lines[2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(small, monkeypatch, checked, dtype):
    seen = []
    tampered(monkeypatch, change=lambda vlm: seen.append(next(vlm.parameters()).dtype))
    code, lines = checked(small.path, "--dtype", dtype)
    assert code == 0 and seen == [getattr(torch, dtype)]
    assert f"{dtype} on cpu" in "\n".join(lines)
    assert lines[-1] == f"equal within {check.TOLERANCE[dtype]} of the largest logit"
    apart = [float(value) for value in re.findall(r"within (\S+) of each", "\n".join(lines))]
    assert len(apart) == 2 and min(apart) > 1e-3                # both networks really round


def test_sampling_settings_of_the_directory_do_not_count(copied, checked):
    """Published directories name a repetition penalty."""
    file = copied / "generation_config.json"
    settings = json.loads(file.read_text())
    settings |= {"repetition_penalty": 1.9, "do_sample": True, "temperature": 3.0, "top_k": 5}
    file.write_text(json.dumps(settings))
    code, lines = checked(copied)
    assert code == 0 and "differ" not in "\n".join(lines)


def test_one_network_at_a_time(small, monkeypatch, checked):
    """Ours has been freed when transformers' is loaded."""
    ours, calls = [], []
    tampered(monkeypatch, change=lambda vlm: ours.append(weakref.ref(vlm)))
    answers = check.their_answers

    def answers_when_freed(*words):
        calls.append(ours[0]() is None)
        return answers(*words)
    monkeypatch.setattr(check, "their_answers", answers_when_freed)
    assert checked(small.path)[0] == 0 and calls == [True]


# ------------------------------------------------------------------------------- what is different

def off_by_a_little(vlm):
    vlm.model.layers[1].self_attn.k_proj.weight[3, 4] += 0.5


def other_vision(vlm):
    vlm.visual.merger.ln_q.weight[0] += 0.5


def not_a_number(vlm):
    vlm.model.norm.weight[0] = math.nan


@pytest.mark.parametrize("change, faults", [
    (off_by_a_little, ["logits on words", "logits on picture"]),
    (other_vision, ["logits on picture"]),
    (not_a_number, ["logits on words", "logits on picture"])])
def test_other_weights_are_reported(small, monkeypatch, checked, change, faults):
    tampered(monkeypatch, change)
    code, lines = checked(small.path)
    last = lines[-1]
    assert code == 1 and last.startswith("differs: ")
    named = last.removeprefix("differs: ").split(", ")
    assert [fault for fault in named if fault.startswith("logits")] == faults


def test_a_fault_of_decoding_alone_is_reported(small, monkeypatch, checked):
    """Logits of the prompt are right, but each new token stands five places too far."""
    def compute(self):
        self.position += 5
        return right(self)
    right = model.NextToken.compute
    monkeypatch.setattr(model.NextToken, "compute", compute)
    code, lines = checked(small.path)
    assert code == 1
    assert lines[-1] == "differs: greedy tokens on words, greedy tokens on picture"
    places = re.findall(r"greedy tokens differ from number (\d+) on$", "\n".join(lines), re.M)
    assert len(places) == 2 and min(map(int, places)) > 1       # the first comes of the prompt


def test_places_where_lists_differ():
    assert first_difference([1, 2], [1, 2]) is None and first_difference([], []) is None
    assert first_difference([1, 2], [1, 3]) == 1 and first_difference([5], [1, 3]) == 0
    assert first_difference([1], [1, 2]) == first_difference([1, 2], [1]) == 1


@pytest.mark.parametrize("new_logits, ours, faults", [
    ([[3.0, 1.0], [2.0, 2.0005]], [0, 0], []),                  # as likely within 0.002
    ([[3.0, 1.0], [2.0, 2.5]], [0, 0], ["greedy tokens on words"]),
    ([[3.0, 1.0], [2.0, 2.0]], [0], ["greedy tokens on words"]),        # one ended sooner
    ([[3.0, 1.0], [2.0, 2.0005]], [1, 1], ["greedy tokens on words"])])
def test_a_tie_is_no_difference(capsys, new_logits, ours, faults):
    """Logits that are 0.001 apart may change places where they lie closer than twice that."""
    logits = torch.tensor([[10.0, 0.0]])
    theirs = Answer(logits, [0, 1], torch.tensor(new_logits))
    assert compare("words", Answer(logits + 0.001, ours), theirs, 1e-3) == faults
    assert ("as likely" in capsys.readouterr().out) == (not faults)


# ------------------------------------------------------------------------ the published preparation

@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja"])
def test_ids_of_the_published_preparation(copied, checked, name):
    text = json.dumps({"chat_template": TEMPLATE}) if name.endswith("json") else TEMPLATE
    (copied / name).write_text(text)
    code, lines = checked(copied)
    assert code == 0
    prompts = [line.split("prompt: ")[1] for line in lines if "prompt: " in line]
    assert prompts[0] == "the same ids"
    assert re.fullmatch(r"the same ids, pixels within [01]\.0 of 255 levels", prompts[1])

    (copied / name).write_text(text.replace("helpful", "useless"))
    code, lines = checked(copied)
    assert code == 1 and lines[-1] == "differs: ids of words, ids of picture"


def test_other_pixels_are_reported(small, monkeypatch, checked):
    load = model.Processor.from_pretrained

    def darker(path):
        processor = load(path)
        mean = tuple(value + 3.5 / 255 for value in processor.pictures.image_mean)
        processor.pictures = replace(processor.pictures, image_mean=mean)
        return processor
    monkeypatch.setattr(model.Processor, "from_pretrained", darker)
    code, lines = checked(small.path)
    assert code == 1 and lines[-1] == "differs: pixels"
    assert "ids not compared, as there is no chat template, pixels within 3.5" in "\n".join(lines)


def test_a_preparation_that_transformers_cannot_load_is_one_line(copied, checked):
    (copied / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    (copied / "chat_template.json").write_text("{")
    code, lines = checked(copied)
    told = [line for line in lines if line.startswith("  prompts     not compared: ")]
    assert code == 0 and len(told) == 1


# ----------------------------------------------------------------------------- without transformers

def test_without_transformers(small, monkeypatch, checked):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, lines = checked(small.path)
    assert code == 0 and lines[1].startswith("  config ")
    assert [line for line in lines if "transformers" in line] == lines[-1:]
    assert lines[-1].startswith("not compared: ") and "pip install" in lines[-1]


def test_transformers_is_imported_for_a_check_only():
    code = "import sys, model; assert not {'transformers', 'infer', 'train'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = "import sys, lab.check; assert not {'transformers', 'infer', 'train'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -------------------------------------------------------------------------------------- bad input

def without_weights(path):
    (path / "model.safetensors").unlink()


def cut_weights(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:len(data) // 2])


def other_network(path):
    (path / "config.json").write_text('{"model_type": "llama"}')


def without_tokenizer(path):
    (path / "tokenizer.json").unlink()


def without_pictures(path):
    (path / "preprocessor_config.json").unlink(missing_ok=True)
    (path / "processor_config.json").unlink(missing_ok=True)


def refused(capsys, *words):
    """The one line on stderr with which the command fails."""
    assert check.main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("damage, reason", [
    (without_weights, "no model.safetensors"), (cut_weights, "not a readable safetensors"),
    (other_network, "model_type is 'llama'"), (without_tokenizer, "tokenizer.json: missing"),
    (without_pictures, "preprocessor_config.json")])
def test_bad_directories_are_one_line(copied, capsys, damage, reason):
    damage(copied)
    assert reason in refused(capsys, "check", copied)


def test_bad_words_are_one_line(small, tmp_path, capsys):
    assert "no such model directory" in refused(capsys, "check", tmp_path / "nowhere")
    assert "dir" in refused(capsys, "check")
    assert "'frobnicate'" in refused(capsys, "frobnicate", small.path)
    assert "device 'tpux'" in refused(capsys, "check", small.path, "--device", "tpux")
    assert "int8" in refused(capsys, "check", small.path, "--dtype", "int8")


def test_alone_it_says_what_it_can_do():
    done = made("model.py")
    assert "check" in done.stdout and "transformers" in done.stdout
    assert "one network at a time" in " ".join(made("model.py", "check", "--help").stdout.split())


def test_a_difference_is_exit_code_1_of_the_process(copied):
    (copied / "chat_template.jinja").write_text("nothing")
    done = run("model.py", "check", copied)
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("differs: ids")


# ----------------------------------------------------------------------------------- what is pasted

def without_rounding(text):
    """Without what another processor, or another release of transformers, may print."""
    text = re.sub(r"within [\d.e-]+ of each", "within … of each", text)
    return re.sub(r"transformers [\d.]+", "transformers …", text)


def test_docs_show_what_it_prints(checked, monkeypatch):
    page = (ROOT / "docs" / "real-weights.md").read_text()
    [block] = re.findall(r"```\npython model.py check weights/tiny\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    code, lines = checked("weights/tiny")
    assert code == 0
    assert without_rounding("\n".join(lines) + "\n") == without_rounding(block)
