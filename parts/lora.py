"""Adapters (LoRA) beside the model's matrices, in peft's file format.

    add_lora -> trained -> save_adapter ... load_adapter
    lora_disabled: the base model, for as long as it is needed       merge_lora: one model again

Source: LoRA (arXiv 2106.09685).
"""
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from parts.config import our_name, published_name
from plumbing.files import read_json, write_json
from plumbing.options import check_options, fill, option
from plumbing.weights import read_weights, write_weights

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x, with W and b frozen. W and b keep their names."""

    def __init__(self, base, rank, alpha, generator=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        A = base.weight.new_empty(rank, base.in_features)
        A.normal_(0, base.in_features ** -0.5, generator=generator)
        B = base.weight.new_zeros(base.out_features, rank)      # training starts from the base
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.rank, self.alpha = rank, alpha
        self.enabled = True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.rank)


@dataclass(frozen=True)
class LoraConfig:
    """The size of an adapter, in the words of adapter_config.json."""
    r: int = option(least=1, most=4096)             # the rank
    lora_alpha: float = option(least=1e-9)

    def __post_init__(self):
        check_options(self)


def add_lora(vlm, rank=16, alpha=32, targets=LORA_TARGETS, seed=0):
    """Freezes the model and gives each linear layer that a target names an adapter.

    A target is the end of a layer's name, be it ours or the newer published one. Returns the
    trainable parameters. ValueError, with nothing changed, where a target names no layer or the
    head (whose weight is used without its layer), and where the model has an adapter.
    """
    LoraConfig(rank, alpha)
    if hasattr(vlm, "lora"):
        raise ValueError("add_lora: the model has an adapter already: merge_lora first")
    layers_of = target_layers(vlm, targets)
    vlm.requires_grad_(False)
    generator = torch.Generator(next(vlm.parameters()).device).manual_seed(seed)
    for name in each_layer(layers_of):
        layer = vlm.get_submodule(name)
        replace_layer(vlm, name, LoRALinear(layer, rank, alpha, generator))
    published = published_targets(vlm, layers_of)
    vlm.lora = {"r": rank, "lora_alpha": alpha, "target_modules": published}
    return [p for p in vlm.parameters() if p.requires_grad]


def target_layers(vlm, targets):
    """{target: names of its linear layers}. ValueError for a target that can have no adapter."""
    if not targets:
        raise ValueError("add_lora: no targets: name at least one layer")
    linear = [name for name, module in vlm.named_modules() if isinstance(module, nn.Linear)]
    layers_of = {}
    for target in targets:
        layers_of[target] = [name for name in linear if ends_with(name, target)
                             or ends_with(published_name(name), target)]
        if not layers_of[target]:
            raise ValueError(f"add_lora: no linear layer is named {target}")
        if "lm_head" in layers_of[target]:
            raise ValueError(f"add_lora: target {target!r} is the head, which takes no adapter: "
                             "leave it out")
    return layers_of


def ends_with(name, target):
    """Whether a dotted name ends with the whole words of a target."""
    return f".{name}".endswith(f".{target}")


def each_layer(layers_of):
    """The layers of all targets, each once, in order."""
    return list(dict.fromkeys(chain.from_iterable(layers_of.values())))


def published_targets(vlm, layers_of):
    """Targets that make peft choose the same layers. It looks at the ends of published names, of
    modules of any kind; where that would be more or less, each layer is named in full."""
    names = [published_name(name) for name, _ in vlm.named_modules()]
    published = []
    for target, layers in layers_of.items():
        full = [published_name(name) for name in layers]
        chosen = [name for name in names if ends_with(name, target)]
        published += [target] if set(chosen) == set(full) else full
    return published


def replace_layer(vlm, name, layer):
    """Puts a layer in the place of the one of this name."""
    parent, last = name.rsplit(".", 1)
    setattr(vlm.get_submodule(parent), last, layer)


def lora_layers(vlm):
    """[(name, layer)] of the layers with an adapter."""
    return [(name, m) for name, m in vlm.named_modules() if isinstance(m, LoRALinear)]


@contextmanager
def lora_disabled(vlm):
    """Inside this block the model is its base: the reference policy of the KL term, for free."""
    layers = lora_layers(vlm)
    for _, layer in layers:
        layer.enabled = False
    try:
        yield vlm
    finally:
        for _, layer in layers:
            layer.enabled = True


def merge_lora(vlm):
    """Folds the adapters into the weights: W <- W + (alpha / rank) B A. Afterwards the model is an
    ordinary one, and all of it trains."""
    for name, layer in lora_layers(vlm):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        product = (layer.lora_B @ layer.lora_A) * (layer.alpha / layer.rank)
        plain.weight = nn.Parameter(layer.weight + product)
        plain.bias = layer.bias
        replace_layer(vlm, name, plain)
    vlm.__dict__.pop("lora", None)
    return vlm.requires_grad_(True)


def save_adapter(vlm, path):
    """Writes the adapter as peft reads it: adapter_config.json and adapter_model.safetensors."""
    tensors = {}
    for name, p in vlm.named_parameters():
        if "lora_" in name:
            key = f"base_model.model.{published_name(name)}.weight"
            tensors[key] = p.detach().cpu().contiguous()
    if not tensors:
        raise ValueError("save_adapter: this model has no adapter; call add_lora first")
    write_weights(tensors, Path(path) / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    write_json(Path(path) / "adapter_config.json", {**config, **vlm.lora})


# Fields of adapter_config.json and what they may say, beside null, false and what is empty.
# Whatever else peft can do would be another model.
SUPPORTED = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"],
             "use_dora": [], "use_rslora": [], "use_qalora": [], "modules_to_save": [],
             "layers_to_transform": [], "rank_pattern": [], "alpha_pattern": [],
             "alora_invocation_tokens": [], "layer_replication": []}


def load_adapter(vlm, path):
    """Reads an adapter in peft's format into a model, adding the layers where it has none.

    ValueError names every key that does not fit, with nothing changed.
    """
    values = read_json(Path(path) / "adapter_config.json")
    for name, supported in SUPPORTED.items():
        value = values.get(name)
        if value and value not in supported:
            only = supported[0] if supported else None
            raise ValueError(f"{path}: {name} is {value!r}, this code supports {only!r} only")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{path}: target_modules is {targets!r}, expected a list of layer names")
    config = fill(LoraConfig, values, path)
    adapted = hasattr(vlm, "lora")
    if adapted and vlm.lora["lora_alpha"] != config.lora_alpha:
        raise ValueError(f"{path}: lora_alpha is {config.lora_alpha}, the model's adapter has "
                         f"{vlm.lora['lora_alpha']}")

    shapes = {}
    if adapted:
        shapes = {name: p.shape for name, p in vlm.named_parameters() if "lora_" in name}
    else:
        for name in each_layer(target_layers(vlm, targets)):
            layer = vlm.get_submodule(name)
            shapes[f"{name}.lora_A"] = (config.r, layer.in_features)
            shapes[f"{name}.lora_B"] = (layer.out_features, config.r)
    weights = read_weights([Path(path) / "adapter_model.safetensors"], shapes, our_adapter_name,
                           dtype=next(vlm.parameters()).dtype)
    if not adapted:
        add_lora(vlm, config.r, config.lora_alpha, targets)
    parameters = dict(vlm.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def our_adapter_name(key):
    """peft's name of an adapter's matrix -> our parameter."""
    return our_name(key.removeprefix("base_model.model.")).removesuffix(".weight")
