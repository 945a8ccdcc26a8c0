"""Model directories: safetensors in and out, tokenizer.json, the device that they go to.

One reader serves the model, the encoders and the adapters: it is given the names and shapes that it
has to find, and says of every key that does not fit why.
"""
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from plumbing.files import read_json, replacing, write_json

WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")    # others are quantized: nothing without their scales


def usable_device(device):
    """The device, if torch can compute on it here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):      # for an unknown name, for CUDA that is not there
        raise ValueError(f"device {device!r} cannot be used here: give cpu, or cuda where torch "
                         "finds a GPU") from None
    return device


def weight_files(path):
    """The safetensors files of a model directory: those of its index, where there is one."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ValueError(f"{index}: expected a weight_map that names a file for each weight")
        names = sorted({str(name) for name in named.values()})
        absent = [name for name in names if Path(name).name != name or not (path / name).is_file()]
        if absent:
            raise ValueError(f"{path}: the index names files that are not there: "
                             f"{', '.join(absent)}")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    pickled = sorted(file.name for file in path.glob("*") if file.suffix in (".bin", ".pth", ".pt"))
    if pickled:
        raise ValueError(f"{path}: only {pickled[0]} is there, and pickled weights are not read "
                         "because they can run code; convert them once with safetensors.torch."
                         "save_file(torch.load(FILE, weights_only=True), 'model.safetensors')")
    raise ValueError(f"{path}: no model.safetensors")


def finite(tensor):
    """Whether all its numbers are; needs no second tensor of its size, as isfinite() would."""
    return all(math.isfinite(end) for end in tensor.detach().aminmax())


def read_weights(files, shapes, rename, optional=(), dtype=torch.float32, device="cpu"):
    """{name: tensor} of safetensors files, each converted as it is read.

    shapes: {name: shape} of what is wanted, all of it but the names in `optional`. rename(key): our
    name of a published key, None for one to pass over. ValueError lists every key that is missing,
    unexpected, there twice, of another shape or type, or not finite.
    """
    tensors, problems = {}, []
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as stored:
                for key in stored.keys():
                    name = rename(key)
                    if name is None:
                        continue
                    problem = misfit(name, stored.get_slice(key), shapes, tensors)
                    if problem is None:
                        tensor = stored.get_tensor(key).to(device=device, dtype=dtype)
                        tensors[name] = tensor
                        if not finite(tensor):
                            problem = "infinite or not a number"
                    if problem is not None:
                        problems.append(f"{problem}: {key}")
                        tensors.setdefault(name)                # it is there, so not missing
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); is the download "
                             "complete?") from None
    absent = [name for name in shapes if name not in tensors and name not in optional]
    problems = [f"missing: {name}" for name in sorted(absent)] + problems
    if problems:
        raise ValueError(f"{Path(files[0]).parent}: {len(problems)} weights do not fit: "
                         f"{'; '.join(problems)}")
    return tensors


def misfit(name, stored, shapes, tensors):
    """What is wrong with a stored tensor before it is read; None where nothing is."""
    if name not in shapes:
        return "unexpected"
    if name in tensors:
        return "twice"
    if list(stored.get_shape()) != list(shapes[name]):
        return f"shape {stored.get_shape()} instead of {list(shapes[name])}"
    if stored.get_dtype() not in WEIGHT_TYPES:
        return f"of type {stored.get_dtype()} instead of {', '.join(WEIGHT_TYPES)}"
    return None


SMALL = 10e6                # weights of a model whose matrices are too small to share a product


def use_threads(number, network):
    """Lets torch use so many threads of the CPU. 0: one for a small network, else as it likes."""
    small = sum(weight.numel() for weight in network.parameters()) < SMALL
    if number or small:
        torch.set_num_threads(number or 1)


def check_model(path, weights=True):
    """ValueError for what is no model directory: it lacks more than one file, and all are named. Of
    a single one its reader speaks."""
    missing = [name for name in ("config.json", "tokenizer.json") if not Path(path, name).is_file()]
    if weights and not any(Path(path).glob("*.safetensors")):
        missing.append("model.safetensors")
    if len(missing) > 1 and Path(path).is_dir():
        raise ValueError(f"{path}: no model here: it lacks {', '.join(missing)}")


def write_weights(tensors, path):
    """Writes {name: tensor} as one safetensors file, whole or not at all."""
    with replacing(path) as new:
        new.touch()
        mode = new.stat().st_mode                           # as any file; save_file makes it for
        save_file(tensors, new, metadata={"format": "pt"})  # its owner alone
        new.chmod(mode)


def write_shards(tensors, folder, shard_bytes):
    """Writes {name: tensor} into a model directory: as model.safetensors, or as files of at most
    `shard_bytes` with their index. Weights of another model that lie there are deleted."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes

    folder = Path(folder)
    files, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(file if len(shards) > 1 else "model.safetensors")
        write_weights(shard, folder / files[-1])
        weight_map.update(dict.fromkeys(shard, files[-1]))
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    for file in folder.glob("model*.safetensors"):
        if file.name not in files:
            file.unlink()


def read_tokenizer(path):
    """The directory's tokenizer.json, without padding and truncation, which may be saved in it."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing: make it with AutoTokenizer.from_pretrained(DIR)"
                         ".save_pretrained(DIR) once")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:                              # tokenizers raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer that can be read ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
