"""Bad weights, configs, tokenizers, pictures and adapters (faults.py says how)."""
import json
import os
import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import model
import train
from faults import Bad, check, export, png, table
from parts.chat import Processor


CASES, case = table()


def spoilt(value):
    return lambda tensors: tensors["model.norm.weight"].fill_(value)


@case("weights: not a number")
def _(b):
    return b.ask(m=b.tensors(spoilt(float("nan")))), "not a number: model.norm.weight"


@case("weights: infinite")
def _(b):
    return b.ask(m=b.tensors(spoilt(float("inf")))), "infinite"


@case("weights: not a number, in training")
def _(b):
    return b.sft(m=b.tensors(spoilt(float("nan")))), "not a number: model.norm.weight"


@case("weights: a tensor is missing")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.pop("model.norm.weight"))), "missing: model.norm.weight"


@case("weights: a tensor too many")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.update(extra=torch.ones(2)))), "unexpected: extra"


@case("weights: a tensor of another shape")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)}))), "shape [3] instead of [16]"


@case("weights: quantized, without their scales")
def _(b):
    change = lambda t: t.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)})
    return b.ask(m=b.tensors(change)), "of type F8_E4M3 instead of F64, F32, F16, BF16: model.norm.weight"


@case("weights: whole numbers")
def _(b):
    return b.ask(m=b.tensors(lambda t: t.update({"model.norm.weight": torch.ones(16).long()}))), "of type I64"


@case("weights: truncated")
def _(b):
    cut = (b.m / "model.safetensors").read_bytes()[:-9]
    return b.ask(m=b.model("model.safetensors", cut)), "is the download complete"


@case("weights: no safetensors at all")
def _(b):
    return b.ask(m=b.model("model.safetensors", b"\x80\x04" * 40)), "not a readable safetensors file"


@case("weights: a header of 2^64 bytes")
def _(b):
    return b.ask(m=b.model("model.safetensors", b"\xff" * 64)), "not a readable safetensors file"


@case("weights: empty file")
def _(b):
    return b.ask(m=b.model("model.safetensors", b"")), "not a readable safetensors file"


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


def index(b, names, split=None):
    """A copy of the model with an index that names these files; `split` says what each of them holds."""
    m = b.copy("m")
    tensors = load_file(m / "model.safetensors")
    for name, keys in (split or {}).items():
        save_file({key: tensors[key] for key in keys(list(tensors))}, m / name)
    b.file("m/model.safetensors.index.json", {"weight_map": dict(zip(tensors, names * len(tensors)))})
    return m


@case("shards: one is missing")
def _(b):
    return b.ask(m=index(b, ["model.safetensors", "gone.safetensors"])), "not there: gone.safetensors"


@case("shards: two overlap")
def _(b):
    split = {"a.safetensors": lambda k: k[:3], "b.safetensors": lambda k: k[2:]}
    return b.ask(m=index(b, ["a.safetensors", "b.safetensors"], split)), "twice: "


@case("shards: one leads out of the folder")
def _(b):
    return b.ask(m=index(b, ["../m/model.safetensors"])), "not there: ../m/model.safetensors"


@case("shards: the index is a list")
def _(b):
    return b.ask(m=b.model("model.safetensors.index.json", [])), "expected a JSON object"


@case("shards: the index has no map")
def _(b):
    return b.ask(m=b.model("model.safetensors.index.json", {"weight_map": 3})), "expected a weight_map"


for name, text, said in (
        ("no JSON", "{oops", "config.json: not valid JSON"), ("a list", "[]", "config.json: expected a JSON object"),
        ("no UTF-8", b"\xff\xfe", "config.json: not valid JSON"), ("lists in lists", "[" * 100000, "not valid JSON"),
        ("a number of 5,000 digits", '{"hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
        ("empty object", "{}", "model_type is None")):
    case(f"config: {name}")(lambda b, text=text, said=said: (b.ask(m=b.model("config.json", text)), said))


for name, fields, said in (
        ("another model", {"model_type": "llama"}, "model_type is 'llama'"),
        ("layers beyond reason", {"num_hidden_layers": 10 ** 6}, "num_hidden_layers is 1000000: give 1 to 1000"),
        ("a size beyond reason", {"hidden_size": 10 ** 12}, "hidden_size is 1000000000000"),
        ("a negative size", {"intermediate_size": -1}, "intermediate_size is -1"),
        ("a size in words", {"num_attention_heads": "many"}, "num_attention_heads is 'many'"),
        ("a size that is a fraction", {"max_position_embeddings": 1.5}, "max_position_embeddings is 1.5"),
        ("no rotary sections", {"rope_scaling": None, "rope_parameters": None}, "missing mrope_section"),
        ("a part of the wrong type", {"text_config": [1]}, "text_config is '[1]'"),
        ("vision of the wrong type", {"vision_config": "big"}, "vision_config is 'big'"),
        ("vision depth beyond reason", {"vision_config": {"depth": 10 ** 6}}, "vision_config: depth is 1000000"),
        ("rotary sections in words", {"rope_scaling": {"type": "mrope", "mrope_section": ["a"]}}, "mrope_section is"),
        ("epsilon not a number", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("another picture token", {"image_token_id": 1}, "image_token_id 1")):
    case(f"config: {name}")(lambda b, fields=fields, said=said: (b.ask(m=b.model(**fields)), said))


@case("config: random weights beyond every memory")
def _(b):
    m = b.model(hidden_size=10 ** 6, vocab_size=10 ** 6, num_attention_heads=250000, num_key_value_heads=1,
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


@case("tokenizer: missing")
def _(b):
    m = b.copy("m")
    (m / "tokenizer.json").unlink()
    return b.ask(m=m), "tokenizer.json: missing"


@case("tokenizer: truncated")
def _(b):
    return b.ask(m=b.model("tokenizer.json", (b.m / "tokenizer.json").read_text()[:999])), "not a tokenizer that can be read"


@case("tokenizer: without the control tokens")
def _(b):
    text = (b.m / "tokenizer.json").read_text().replace("<|image_pad|>", "<|picture|>").replace("<|im_end|>", "<|x|>")
    return b.ask(m=b.model("tokenizer.json", text)), "lacks the control tokens <|im_end|>, <|image_pad|>"


@case("tokenizer: an end that is no token")
def _(b):
    return b.ask(m=b.model("generation_config.json", {"eos_token_id": [10 ** 9]})), "eos_token_id 1000000000 is no"


@case("tokenizer: an end below all tokens")
def _(b):
    return b.ask(m=b.model("generation_config.json", {"eos_token_id": -1})), "eos_token_id -1 is no token"


@case("tokenizer: an end in words")
def _(b):
    return b.ask(m=b.model("generation_config.json", {"eos_token_id": "end"})), "eos_token_id 'end' is no token"


for name, fields, said in (
        ("patches of no size", {"patch_size": 0}, "patch_size is 0: give 1 to 100"),
        ("every picture larger than the memory", {"min_pixels": 10 ** 12}, "min_pixels is 1000000000000"),
        ("no upper limit", {"max_pixels": 10 ** 15}, "max_pixels is"),
        ("division by zero", {"image_std": [0, 1, 1]}, "image_std is '[0, 1, 1]'"),
        ("colours in words", {"image_mean": "grey"}, "image_mean is 'grey'"),
        ("patches of another size than the model's", {"patch_size": 7}, "patch_size")):
    def _(b, fields=fields, said=said):
        known = json.loads((b.m / "preprocessor_config.json").read_text())
        return b.ask(m=b.model("preprocessor_config.json", known | fields)), said
    case(f"picture settings: {name}")(_)


@case("picture: missing")
def _(b):
    return b.ask("--image", b.dir / "none.jpg"), "none.jpg: no such picture"


@case("picture: a web page named .jpg")
def _(b):
    return b.picture("page.jpg", "<!DOCTYPE html><html>404</html>"), "page.jpg: not a readable picture; these formats"


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
    text = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return b.picture("text.png", png(9, 9, text)), "text.png: not a readable picture"


@case("picture: truncated PNG")
def _(b):
    return b.picture("short.png", png(90, 90)[:70]), "short.png: not a readable picture"


@case("picture: a note whose numbers are none")
def _(b):
    """EXIF says that the picture is turned, and that it is "x" pixels wide: Pillow raises struct.error."""
    photo, note = Image.new("RGB", (40, 40)), Image.Exif()
    note[0x0112], note[0x010e] = 6, "x"                               # orientation, description
    photo.save(b.dir / "note.png", exif=note.tobytes().replace(b"\x01\x0e", b"\x01\x00"))       # 0x0100 is the width
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


def adapter(b, change=None, **fields):
    """Exports a run whose checkpoint is an adapter, one thing of which is spoilt."""
    path = b.copy("adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    if change:
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")
    b.file("adapter/adapter_config.json", json.loads((path / "adapter_config.json").read_text()) | fields)
    b.file("adapter/trainer.json", {"step": 1})
    b.file("run/options.json", {"model": str(b.m)})
    (b.dir / "run" / "last").symlink_to(path)
    return ["train", "export", "--run", b.dir / "run", "--which", "last", "--out", b.out]


def first(change):
    return lambda tensors: change(tensors, next(iter(tensors)))


for name, change, said in (
        ("not a number", first(lambda t, k: t[k].fill_(float("nan"))), "not a number"),
        ("a matrix is missing", first(lambda t, k: t.pop(k)), "missing: "),
        ("a matrix too many", lambda t: t.update(extra=torch.ones(1)), "unexpected: extra"),
        ("complex numbers", first(lambda t, k: t.update({k: t[k].to(torch.complex64)})), "of type C64"),
        ("another shape", first(lambda t, k: t.update({k: torch.ones(1, 1)})), "shape [1, 1]")):
    case(f"adapter: {name}")(lambda b, change=change, said=said: (adapter(b, change), said))


for name, fields, said in (
        ("rank beyond reason", {"r": 10 ** 9}, "r is 1000000000"), ("rank in words", {"r": "8"}, "r is '8'"),
        ("scale not a number", {"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ("a kind that is not computed here", {"use_dora": True}, "use_dora is True"),
        ("layers that are none", {"target_modules": ["engine"]}, "no linear layer is named engine"),
        ("targets that are no list", {"target_modules": "all"}, "expected a list of layer names")):
    case(f"adapter: {name}")(lambda b, fields=fields, said=said: (adapter(b, **fields), said))


for value in ("1/255", [1], 10 ** 400, 2.0):
    case(f"picture settings: rescale_factor {str(value)[:9]}")(lambda b, value=value: (b.ask(m=b.model(
        "preprocessor_config.json", json.loads((b.m / "preprocessor_config.json").read_text())
        | {"rescale_factor": value})), "rescale_factor is"))


def test_a_tokenizer_file_cannot_have_prompts_cut(home, tmp_path):
    """tokenizer.json may ask for texts to be cut or padded, and files of fine-tuned models do."""
    path = Bad(home, tmp_path).copy("m")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(path / "tokenizer.json"))
    assert len(tokenizer.encode("What").ids) == 99                                  # else this would show nothing
    ids = [Processor.from_pretrained(p).encode("What is the capital of Bakdol?") for p in (path, home / "m")]
    assert ids[0] == ids[1] and len(ids[0]) > 4


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_and_code_2_and_leaves_the_disk_alone(home, tmp_path, capsys, monkeypatch, name):
    check(CASES[name], home, tmp_path, capsys, monkeypatch)
