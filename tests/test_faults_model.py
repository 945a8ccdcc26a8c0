"""Bad weights, configs, tokenizers, pictures and adapters (faults.py says how)."""
import json
import math
import os
import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from faults import Bad, check, each, png, table
from parts.chat import Processor

CASES, case = table()
NAN, INF = math.nan, math.inf
NORM = "model.norm.weight"


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys,
                                                                      monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)


# --------------------------------------------------------------------------------------- tensors

def tensors(b, change, message):
    return b.ask(m=b.tensors(change)), message


def norm(tensor):
    """A change that puts this tensor in the place of the last norm."""
    return lambda tensors: tensors.update({NORM: tensor})


each(case, "weights: ", tensors, [
    ("not a number", norm(torch.full((16,), NAN)), "not a number: model.norm.weight"),
    ("infinite", norm(torch.full((16,), INF)), "infinite"),
    ("a tensor is missing", lambda tensors: tensors.pop(NORM), "missing: model.norm.weight"),
    ("a tensor too many", lambda tensors: tensors.update(extra=torch.ones(2)),
     "unexpected: extra"),
    ("a tensor of another shape", norm(torch.ones(3)), "shape [3] instead of [16]"),
    ("quantized, without their scales", norm(torch.ones(16).to(torch.float8_e4m3fn)),
     "of type F8_E4M3 instead of F64, F32, F16, BF16: model.norm.weight"),
    ("whole numbers", norm(torch.ones(16).long()), "of type I64")])


@case("weights: not a number, in training")
def _(b):
    return b.sft(m=b.tensors(norm(torch.full((16,), NAN)))), "not a number: model.norm.weight"


# ---------------------------------------------------------------------------------- weight files

@case("weights: truncated")
def _(b):
    cut = (b.m / "model.safetensors").read_bytes()[:-9]
    return b.ask(m=b.model("model.safetensors", cut)), "is the download complete"


def weight_file(b, data):
    return b.ask(m=b.model("model.safetensors", data)), "not a readable safetensors file"


each(case, "weights: ", weight_file, [
    ("no safetensors at all", b"\x80\x04" * 40), ("a header of 2^64 bytes", b"\xff" * 64),
    ("empty file", b"")])


@case("weights: pickled")
def _(b):
    m = b.model("pytorch_model.bin", b"\x80\x04.")
    (m / "model.safetensors").unlink()
    return b.ask(m=m), "pickled weights are not read"


@case("weights: none")
def _(b):
    m = b.copy("m")
    (m / "model.safetensors").unlink()
    return b.ask(m=m), "no model.safetensors"


def index(b, files):
    """A copy of the model with an index that names these files, one after the other."""
    m = b.copy("m")
    names = load_file(m / "model.safetensors")
    weight_map = dict(zip(names, files * len(names)))
    b.file("m/model.safetensors.index.json", {"weight_map": weight_map})
    return m


@case("shards: one is missing")
def _(b):
    m = index(b, ["model.safetensors", "gone.safetensors"])
    return b.ask(m=m), "not there: gone.safetensors"


@case("shards: two overlap")
def _(b):
    m = index(b, ["a.safetensors", "b.safetensors"])
    tensors = load_file(m / "model.safetensors")
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:3]}, m / "a.safetensors")
    save_file({name: tensors[name] for name in names[2:]}, m / "b.safetensors")
    return b.ask(m=m), "twice: "


@case("shards: one leads out of the folder")
def _(b):
    return b.ask(m=index(b, ["../m/model.safetensors"])), "not there: ../m/model.safetensors"


def shard_index(b, content, message):
    return b.ask(m=b.model("model.safetensors.index.json", content)), message


each(case, "shards: ", shard_index, [
    ("the index is a list", [], "expected a JSON object"),
    ("the index has no map", {"weight_map": 3}, "expected a weight_map")])


# --------------------------------------------------------------------------------------- configs

def config_text(b, text, message):
    return b.ask(m=b.model("config.json", text)), message


each(case, "config: ", config_text, [
    ("no JSON", "{oops", "config.json: not valid JSON"),
    ("a list", "[]", "config.json: expected a JSON object"),
    ("no UTF-8", b"\xff\xfe", "config.json: not valid JSON"),
    ("lists in lists", "[" * 100000, "not valid JSON"),
    ("a number of 5,000 digits", '{"hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
    ("empty object", "{}", "model_type is None")])


def config_fields(b, fields, message):
    return b.ask(m=b.model(**fields)), message


each(case, "config: ", config_fields, [
    ("another model", {"model_type": "llama"}, "model_type is 'llama'"),
    ("layers beyond reason", {"num_hidden_layers": 10 ** 6},
     "num_hidden_layers is 1000000: give 1 to 1000"),
    ("a size beyond reason", {"hidden_size": 10 ** 12}, "hidden_size is 1000000000000"),
    ("a negative size", {"intermediate_size": -1}, "intermediate_size is -1"),
    ("a size in words", {"num_attention_heads": "many"}, "num_attention_heads is 'many'"),
    ("a size that is a fraction", {"max_position_embeddings": 1.5},
     "max_position_embeddings is 1.5"),
    ("no rotary sections", {"rope_scaling": None, "rope_parameters": None},
     "missing mrope_section"),
    ("a part of the wrong type", {"text_config": [1]}, "text_config is '[1]'"),
    ("vision of the wrong type", {"vision_config": "big"}, "vision_config is 'big'"),
    ("vision depth beyond reason", {"vision_config": {"depth": 10 ** 6}},
     "vision_config: depth is 1000000"),
    ("rotary sections in words", {"rope_scaling": {"type": "mrope", "mrope_section": ["a"]}},
     "mrope_section is"),
    ("epsilon not a number", {"rms_norm_eps": NAN}, "rms_norm_eps is nan"),
    ("another picture token", {"image_token_id": 1}, "image_token_id 1")])


@case("config: random weights beyond every memory")
def _(b):
    m = b.model(hidden_size=10 ** 6, vocab_size=10 ** 6, num_attention_heads=250000,
                num_key_value_heads=1,
                rope_scaling={"type": "mrope", "mrope_section": [1, 1, 0]})
    (m / "model.safetensors").unlink()
    return b.sft(m=m), "random weights"


@case("config: fewer words than the tokenizer")
def _(b):
    m = b.model(vocab_size=50)
    (m / "model.safetensors").unlink()
    return b.sft(m=m), "config.json a vocab_size of 50"


@case("model: no such folder")
def _(b):
    return b.ask(m=b.dir / "nowhere"), "nowhere: no such model directory"


# ------------------------------------------------------------------------------------ tokenizers

@case("tokenizer: missing")
def _(b):
    m = b.copy("m")
    (m / "tokenizer.json").unlink()
    return b.ask(m=m), "tokenizer.json: missing"


@case("tokenizer: truncated")
def _(b):
    cut = (b.m / "tokenizer.json").read_text()[:999]
    return b.ask(m=b.model("tokenizer.json", cut)), "not a tokenizer that can be read"


@case("tokenizer: without the control tokens")
def _(b):
    text = (b.m / "tokenizer.json").read_text()
    text = text.replace("<|image_pad|>", "<|picture|>").replace("<|im_end|>", "<|x|>")
    m = b.model("tokenizer.json", text)
    return b.ask(m=m), "lacks the control tokens <|im_end|>, <|image_pad|>"


def end_token(b, value, message):
    return b.ask(m=b.model("generation_config.json", {"eos_token_id": value})), message


each(case, "tokenizer: ", end_token, [
    ("an end that is no token", [10 ** 9], "eos_token_id 1000000000 is no"),
    ("an end below all tokens", -1, "eos_token_id -1 is no token"),
    ("an end in words", "end", "eos_token_id 'end' is no token")])


def test_a_tokenizer_file_cannot_have_prompts_cut(home, tmp_path):
    """tokenizer.json may ask for texts to be cut or padded, and files of fine-tuned models do."""
    path = Bad(home, tmp_path).copy("m")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(path / "tokenizer.json"))
    assert len(tokenizer.encode("What").ids) == 99              # else this would show nothing
    question = "What is the capital of Bakdol?"
    ids = Processor.from_pretrained(path).encode(question)
    assert ids == Processor.from_pretrained(home / "m").encode(question) and len(ids) > 4


# -------------------------------------------------------------------------------------- pictures

def picture_settings(b, fields, message):
    settings = json.loads((b.m / "preprocessor_config.json").read_text())
    return b.ask(m=b.model("preprocessor_config.json", settings | fields)), message


each(case, "picture settings: ", picture_settings, [
    ("patches of no size", {"patch_size": 0}, "patch_size is 0: give 1 to 100"),
    ("every picture larger than the memory", {"min_pixels": 10 ** 12},
     "min_pixels is 1000000000000"),
    ("no upper limit", {"max_pixels": 10 ** 15}, "max_pixels is"),
    ("division by zero", {"image_std": [0, 1, 1]}, "image_std is '[0, 1, 1]'"),
    ("colours in words", {"image_mean": "grey"}, "image_mean is 'grey'"),
    ("patches of another size than the model's", {"patch_size": 7}, "patch_size"),
    ("rescale_factor 1/255", {"rescale_factor": "1/255"}, "rescale_factor is"),
    ("rescale_factor [1]", {"rescale_factor": [1]}, "rescale_factor is"),
    ("rescale_factor 100000000", {"rescale_factor": 10 ** 400}, "rescale_factor is"),
    ("rescale_factor 2.0", {"rescale_factor": 2.0}, "rescale_factor is")])


@case("picture: missing")
def _(b):
    return b.ask("--image", b.dir / "none.jpg"), "none.jpg: no such picture"


@case("picture: a web page named .jpg")
def _(b):
    words = b.picture("page.jpg", "<!DOCTYPE html><html>404</html>")
    return words, "page.jpg: not a readable picture; these formats"


@case("picture: PostScript named .jpg, for which Pillow would start a program")
def _(b):
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    return b.picture("script.jpg", text), "script.jpg: not a readable picture; these formats"


@case("picture: truncated JPEG")
def _(b):
    photo = next((b.w / "photos").iterdir())
    return b.picture("half.jpg", photo.read_bytes()[:300]), "half.jpg: not a readable picture"


@case("picture: a bomb of 2.5 billion pixels")
def _(b):
    return b.picture("bomb.png", png(50000, 50000)), "bomb.png: not a readable picture"


@case("picture: a bomb just below the limit at which Pillow gives an error of its own")
def _(b):
    return b.picture("bomb.png", png(12000, 12000)), "bomb.png: not a readable picture"


@case("picture: a bomb in the text of a PNG")
def _(b):
    data = b"note\0\0" + zlib.compress(bytes(100_000_000))
    sum_of_text = struct.pack(">I", zlib.crc32(b"zTXt" + data))
    text = struct.pack(">I", len(data)) + b"zTXt" + data + sum_of_text
    return b.picture("text.png", png(9, 9, text)), "text.png: not a readable picture"


@case("picture: truncated PNG")
def _(b):
    return b.picture("short.png", png(90, 90)[:70]), "short.png: not a readable picture"


@case("picture: a note whose numbers are none")
def _(b):
    """EXIF says that the picture is turned, and that it is "x" pixels wide: Pillow raises
    struct.error."""
    photo, note = Image.new("RGB", (40, 40)), Image.Exif()
    orientation, description = 0x0112, 0x010e
    note[orientation], note[description] = 6, "x"
    data = note.tobytes().replace(b"\x01\x0e", b"\x01\x00")     # 0x0100 is the width
    photo.save(b.dir / "note.png", exif=data)
    return b.ask("--image", b.dir / "note.png"), "note.png: not a readable picture"


@case("picture: a folder")
def _(b):
    return b.ask("--image", b.w), "no regular file"


@case("picture: a pipe, at which opening would wait for ever")
def _(b):
    os.mkfifo(b.dir / "pipe.jpg")
    return b.ask("--image", b.dir / "pipe.jpg"), "no regular file"


@case("picture: 1 x 400")
def _(b):
    Image.new("RGB", (1, 400)).save(b.dir / "thin.png")
    return b.ask("--image", b.dir / "thin.png"), "more than 200 times"


# -------------------------------------------------------------------------------------- adapters

def export_adapter(b):
    """The words that export a run whose checkpoint is the adapter in this folder."""
    b.file("adapter/trainer.json", {"step": 1})
    b.file("run/options.json", {"model": str(b.m)})
    (b.dir / "run" / "last").symlink_to(b.dir / "adapter")
    return ["train", "export", "--run", b.dir / "run", "--which", "last", "--out", b.out]


def adapter_weights(b, change, message):
    path = b.copy("adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    return export_adapter(b), message


def adapter_config(b, fields, message):
    config = json.loads((b.copy("adapter") / "adapter_config.json").read_text())
    b.file("adapter/adapter_config.json", config | fields)
    return export_adapter(b), message


def first(change):
    """A change of the first tensor; None takes it away."""
    def of_tensors(tensors):
        name = next(iter(tensors))
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)
    return of_tensors


each(case, "adapter: ", adapter_weights, [
    ("not a number", first(lambda tensor: tensor * NAN), "not a number"),
    ("a matrix is missing", first(None), "missing: "),
    ("a matrix too many", lambda tensors: tensors.update(extra=torch.ones(1)),
     "unexpected: extra"),
    ("complex numbers", first(lambda tensor: tensor.to(torch.complex64)), "of type C64"),
    ("another shape", first(lambda tensor: torch.ones(1, 1)), "shape [1, 1]")])

each(case, "adapter: ", adapter_config, [
    ("rank beyond reason", {"r": 10 ** 9}, "r is 1000000000"),
    ("rank in words", {"r": "8"}, "r is '8'"),
    ("scale not a number", {"lora_alpha": NAN}, "lora_alpha is nan"),
    ("a kind that is not computed here", {"use_dora": True}, "use_dora is True"),
    ("layers that are none", {"target_modules": ["engine"]}, "no linear layer is named engine"),
    ("targets that are no list", {"target_modules": "all"}, "expected a list of layer names")])
