"""Adapters (LoRA) beside the decoder's matrices, in peft's file format."""
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from plumbing.old import read_json, settle, write_json
from plumbing.weights import WEIGHT_TYPES, finite, our_name


# ----------------------------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x, with W and b frozen (arXiv 2106.09685). Names of W and b stay those of the
    layer it replaces."""
    def __init__(self, base, rank, alpha, generator=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        like = dict(dtype=base.weight.dtype, device=base.weight.device)
        A = torch.empty(rank, base.in_features, **like).normal_(0, base.in_features ** -0.5, generator=generator)
        B = torch.zeros(base.out_features, rank, **like)                # zero: training starts from the base exactly
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.rank, self.alpha, self.enabled = rank, alpha, True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.rank) if self.enabled else y


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def check_rank(rank, alpha, where):
    """Raise ValueError for an adapter of impossible size, before it is allocated."""
    if type(rank) is not int or not 1 <= rank <= 4096:
        raise ValueError(f"{where}: the adapter's rank is {rank!r}, expected a whole number from 1 to 4096")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{where}: lora_alpha is {alpha!r}, expected a positive number")


def add_lora(vlm, rank=16, alpha=32, targets=LORA_TARGETS, seed=0):
    """Freeze the model and give each linear layer whose name ends with a target an adapter, be it our name or the newer
    published one (`published_name`).

    Returns the trainable parameters. Raises ValueError, with nothing changed, where a target names no layer or the head
    (whose weight is used without its layer), and where the model has an adapter.
    """
    check_rank(rank, alpha, "add_lora")
    if hasattr(vlm, "lora"):
        raise ValueError("add_lora: the model has an adapter already: merge_lora first")
    layers = [name for name, m in vlm.named_modules() if isinstance(m, nn.Linear)]
    ends = lambda name, target: ("." + name).endswith("." + target)
    found = {t: [name for name in layers if ends(name, t) or ends(published_name(name), t)] for t in targets}
    if not found or (empty := [t for t, names in found.items() if not names]):
        raise ValueError(f"add_lora: no linear layer is named {', '.join(empty) if found else 'in targets'}")
    if head := [t for t, names in found.items() if "lm_head" in names]:
        raise ValueError(f"add_lora: target {head[0]!r} is the head, which takes no adapter: leave it out")
    vlm.requires_grad_(False)
    generator = torch.Generator(next(vlm.parameters()).device).manual_seed(seed)
    for name in dict.fromkeys(name for names in found.values() for name in names):
        parent, last = name.rsplit(".", 1)
        setattr(vlm.get_submodule(parent), last, LoRALinear(vlm.get_submodule(name), rank, alpha, generator))
    # as peft finds them: by published names, of modules of any kind
    named = {t: [t] if {name for name, _ in vlm.named_modules() if ends(published_name(name), t)} == set(names) else
             [published_name(name) for name in names] for t, names in found.items()}
    vlm.lora = {"r": rank, "lora_alpha": alpha, "target_modules": [name for names in named.values() for name in names]}
    return [p for p in vlm.parameters() if p.requires_grad]


@contextmanager
def lora_disabled(vlm):
    """Inside this block the model is its base: the reference policy of the KL term, for free."""
    adapters = [m for m in vlm.modules() if isinstance(m, LoRALinear)]
    for m in adapters:
        m.enabled = False
    try:
        yield vlm
    finally:
        for m in adapters:
            m.enabled = True


def published_name(name):
    """Our name of a layer or parameter -> that of the newer published layout."""
    return "model.language_model." + name[len("model."):] if name.startswith("model.") else "model." + name


def adapter_name(name):
    """Our parameter name -> peft's: base_model.model. + the newer published path, `.weight` behind lora_A, lora_B."""
    return f"base_model.model.{published_name(name)}.weight"


def save_adapter(vlm, path):
    """Write the adapter as peft reads it: adapter_config.json and adapter_model.safetensors."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {adapter_name(n): p.detach().cpu().contiguous() for n, p in vlm.named_parameters() if "lora_" in n}
    if not tensors:
        raise ValueError("save_adapter: this model has no adapter; call add_lora first")
    save_file(tensors, path / "adapter_model.safetensors.new", metadata={"format": "pt"})
    settle(path / "adapter_model.safetensors.new")
    os.replace(path / "adapter_model.safetensors.new", path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, **vlm.lora}
    write_json(path / "adapter_config.json", config)


def load_adapter(vlm, path):
    """Read an adapter in peft's format into a model, adding the layers where it has none.

    Raises ValueError that names every key that does not fit, with nothing changed.
    """
    config = read_json(Path(path) / "adapter_config.json")
    plain = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none", "modules_to_save": None,
             "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}, "use_qalora": False,
             "alora_invocation_tokens": None, "layer_replication": None}
    for name, value in plain.items():
        if (config.get(name) or value or None) != (value or None):
            raise ValueError(f"{path}: {name} is {config[name]!r}, this code supports {value!r} only")
    if (start := config.get("init_lora_weights")) not in (True, False, None, "gaussian"):
        raise ValueError(f"{path}: init_lora_weights is {start!r}: such an adapter may belong to a changed base")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{path}: target_modules is {targets!r}, expected a list of layer names")
    check_rank(config.get("r"), config.get("lora_alpha"), path)
    theirs, file = {}, Path(path) / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt", device="cpu") as f:
            for key in f.keys():
                if (kind := f.get_slice(key).get_dtype()) not in WEIGHT_TYPES:
                    raise ValueError(f"{file}: {key} is of type {kind} instead of {', '.join(WEIGHT_TYPES)}")
                theirs[our_name(key.removeprefix("base_model.model.")).removesuffix(".weight")] = f.get_tensor(key)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a readable safetensors file ({e})") from None
    trainable = [weight.requires_grad for weight in vlm.parameters()]
    if new := not hasattr(vlm, "lora"):
        add_lora(vlm, config["r"], config["lora_alpha"], tuple(targets))
    if vlm.lora["lora_alpha"] != config["lora_alpha"]:
        raise ValueError(f"{path}: lora_alpha is {config['lora_alpha']}, "
                         f"the model's adapter has {vlm.lora['lora_alpha']}")
    ours = {n: p for n, p in vlm.named_parameters() if "lora_" in n}
    bad = [f"missing: {n}" for n in sorted(set(ours) - set(theirs))]
    bad += [f"unexpected: {n}" for n in sorted(set(theirs) - set(ours))]
    bad += [f"shape {list(theirs[n].shape)} instead of {list(ours[n].shape)}: {n}"
            for n in ours if n in theirs and theirs[n].shape != ours[n].shape]
    bad += [f"infinite or not a number: {n}" for n in ours if n in theirs and not finite(theirs[n])]
    if bad:
        if new:
            merge_lora(vlm)                                             # B is zero: the weights stay what they are
            for weight, trained in zip(vlm.parameters(), trainable):
                weight.requires_grad_(trained)
        raise ValueError(f"{path}: {len(bad)} adapter weights do not fit: {'; '.join(bad)}")
    with torch.no_grad():
        for n, p in ours.items():
            p.copy_(theirs[n])


def merge_lora(vlm):
    """Fold the adapters into the weights: W <- W + (alpha / rank) B A. Afterwards the model is an ordinary full
    checkpoint."""
    for name, m in list(vlm.named_modules()):
        if isinstance(m, LoRALinear):
            plain = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta")
            plain.weight = nn.Parameter(m.weight + (m.lora_B @ m.lora_A) * (m.alpha / m.rank))
            plain.bias = m.bias
            parent, last = name.rsplit(".", 1)
            setattr(vlm.get_submodule(parent), last, plain)
    vlm.__dict__.pop("lora", None)
    return vlm.requires_grad_(True)
