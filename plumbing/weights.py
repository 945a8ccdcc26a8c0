"""Model directories: safetensors and tokenizer.json."""
import functools
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

from plumbing.old import read_json


WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")  # others are quantized, and mean nothing without their scales


def flat_config(source):
    """A config.json in the old flat or the new nested layout (`text_config`), as a directory, a file or a dict ->
    (where, raw, text, rope, vision): its name for messages, all of it, and three flat dicts."""
    if isinstance(source, dict):
        raw, where = source, "config"
    else:
        where = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        raw = read_json(where)
    for d, names in ((raw, ("text_config", "vision_config", "rope_scaling", "rope_parameters")),
                     (raw.get("text_config") or {}, ("rope_scaling", "rope_parameters"))):
        if wrong := [name for name in names if not isinstance(d.get(name) or {}, dict)]:
            raise ValueError(f"{where}: {wrong[0]} is {str(d[wrong[0]])[:40]!r}, expected an object")
    text = {**raw, **(raw.get("text_config") or {})}
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    vision = dict(raw.get("vision_config") or {})
    vision["in_channels"] = vision.get("in_channels", vision.get("in_chans", 3))
    text["image_token_id"] = raw.get("image_token_id", text.get("image_token_id"))
    return where, raw, text, rope, vision


def retyped(raw, dtype):
    """config.json with the newer layout's `dtype` fields, wherever they stand, set to the type that is saved."""
    return {k: retyped(v, dtype) if isinstance(v, dict) else dtype if k == "dtype" else v for k, v in raw.items()}


def our_name(key):
    """Published key of either layout -> this file's parameter name (the older published layout)."""
    for theirs, ours in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if key.startswith(theirs):
            return ours + key[len(theirs):]
    return key


def weight_files(path):
    """The safetensors files of a model directory: those of the index where there is one. Raises ValueError where there
    are none."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        listed = read_json(index)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict) or not listed["weight_map"]:
            raise ValueError(f"{index}: expected an object with a weight_map that names a file for each weight")
        names = sorted(set(map(str, listed["weight_map"].values())))
        if absent := [n for n in names if Path(n).name != n or not (path / n).is_file()]:
            raise ValueError(f"{path}: the index names files that are not there: {', '.join(absent)}")
        return [path / n for n in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if pickled := sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pth", ".pt")):
        raise ValueError(f"{path}: only {pickled[0]} is there, and pickled weights are not read because they can run "
                         "code; convert them once with "
                         "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')")
    raise ValueError(f"{path}: no model.safetensors")


def finite(tensor):
    """Whether all its numbers are; needs no second tensor of its size, as isfinite() would."""
    return all(math.isfinite(end) for end in tensor.detach().aminmax())


def set_parameter(module, name, tensor):
    """Put a tensor in the place of a (meta) parameter."""
    *path, last = name.split(".")
    setattr(functools.reduce(getattr, path, module), last, nn.Parameter(tensor))


def load_weights(module, path, names, unused):
    """Fills a module made on the meta device from safetensors; one error lists every key that does not fit."""
    wanted, state, problems = module.state_dict(), {}, []
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    name = key
                    for pattern, ours in names:
                        name = re.sub(pattern, ours, name)
                    if re.search(unused, name):
                        continue
                    shape, kind = list(tensors.get_slice(key).get_shape()), tensors.get_slice(key).get_dtype()
                    if name not in wanted:
                        problems.append(f"unexpected: {key}")
                    elif shape != list(wanted[name].shape):
                        problems.append(f"shape {shape} instead of {list(wanted[name].shape)}: {key}")
                    elif kind not in WEIGHT_TYPES:
                        problems.append(f"of type {kind} instead of {', '.join(WEIGHT_TYPES)}: {key}")
                    state[name] = tensors.get_tensor(key).float()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); is the download complete?") from None
    problems += [f"missing: {name}" for name in wanted if name not in state]
    if problems:
        raise ValueError(f"{path}: {len(problems)} weights do not fit config.json: {'; '.join(problems)}")
    module.load_state_dict(state, assign=True)
    return module


def precision(device):
    """Half precision on CUDA, single on the CPU, where half is slower."""
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def read_tokenizer(path):
    """The directory's tokenizer.json, without the padding and truncation that may be saved in it."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing: make it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) once")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer that can be read ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
