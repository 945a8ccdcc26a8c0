"""A model directory: how it is read and written, and how weights that are not there start."""
import math
import shutil
from pathlib import Path

import torch

from parts.lora import load_adapter, save_adapter
from parts.stepfiles import load_prompts
from plumbing.files import write_json

CONFIG, TOKENIZER = "config.json", "tokenizer.json"             # without them there is no model
OTHER_FILES = (TOKENIZER, "tokenizer_config.json", "preprocessor_config.json",
               "processor_config.json", "generation_config.json", "chat_template.json",
               "chat_template.jinja")
PROMPTS = "prompts.json"                # the system prompts that a model was trained with


def prompts_in(folder):
    """The system prompts that a model directory was trained with; {} where it has none."""
    path = Path(folder) / PROMPTS
    return load_prompts(path) if path.exists() else {}


@torch.no_grad()
def start_previous_token_head(model, layers=(0, 1), strength=10.0):
    """Lets query head 0 of the first layers start out attending to the token before: half of an
    induction head, put into random weights by hand.

    On the rotary pairs that turn with time the weights of its query and key are set to zero and
    their biases to constants: key (m, 0), query (m cos w, -m sin w) for a pair of speed w. After
    rotation the product is largest at distance one. The architecture is unchanged.
    """
    config = model.config
    D = config.head_dim
    speeds = config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)     # (D / 2,)
    m = math.sqrt(strength * math.sqrt(D))
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        q, k = attention.q_proj, attention.k_proj
        q.weight[:D] *= 0.1
        for pair in range(config.mrope_section[0]):
            places = [pair, pair + D // 2]                      # of the two numbers of a pair
            cos, sin = math.cos(speeds[pair]), math.sin(speeds[pair])
            q.weight[places] = 0.0
            k.weight[places] = 0.0
            k.bias[places] = torch.tensor([m, 0.0])
            q.bias[places] = m * torch.tensor([cos, -sin])


def write_model(path, model, origin, prompts, dtype=None):
    """Writes a model directory: our weights (or adapter) in that type; tokenizer and picture
    settings of the directory that training started from; the system prompts."""
    path.mkdir(parents=True, exist_ok=True)
    for name in OTHER_FILES:
        if (Path(origin) / name).exists():
            shutil.copy(Path(origin) / name, path / name)
    if prompts:
        write_json(path / PROMPTS, prompts)
    if hasattr(model, "lora"):
        save_adapter(model, path)
    else:
        model.save_pretrained(path, dtype)


def read_model(path, model):
    """The weights (or the adapter) of a checkpoint, into a model that is there."""
    if hasattr(model, "lora"):
        load_adapter(model, path)
    else:
        dtype = next(model.parameters()).dtype
        saved = type(model).from_pretrained(path, dtype=dtype)
        model.load_state_dict(saved.state_dict())


def keep_others(old, new):
    """Copies what is no part of a model from a directory to its successor. ValueError where the old
    one holds other files and no model."""
    paths = list(old.iterdir())
    if paths and not (old / CONFIG).is_file() and not (old / TOKENIZER).is_file():
        raise ValueError(f"{old}: holds other files and no model: name another place, nothing was "
                         "overwritten")
    new.mkdir()
    for path in paths:
        if path.name in (CONFIG, PROMPTS, *OTHER_FILES) or path.match("model*.safetensors*"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)
