"""What a published model directory says of the network: sizes in config.json, names of weights.

Both exist in two layouts, which are read alike:

    older (flat)     {"hidden_size": ...}                    model.layers.0 ...  visual.blocks.0 ...
    newer (nested)   {"text_config": {"hidden_size": ...}}   model.language_model.layers.0 ...
                                                             model.visual.blocks.0 ...

The parameters of model.py have the older names, and so have the weights that it writes.
"""
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from plumbing.files import read_json
from plumbing.options import fill, option


def size(default=MISSING):
    return option(default, least=1, most=1_000_000)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. Published checkpoints leave out those that are the default."""
    depth: int = option(32, least=1, most=1000)
    hidden_size: int = size(1280)
    intermediate_size: int = size(3420)
    num_heads: int = size(16)
    in_channels: int = size(3)
    patch_size: int = size(14)                      # pixels
    temporal_patch_size: int = size(2)              # frames: a still picture is shown twice
    spatial_merge_size: int = size(2)               # 2 x 2 patches become one image token
    window_size: int = size(112)                    # pixels: attention stays within windows of this
    fullatt_block_indexes: tuple = option((7, 15, 23, 31), most=1000)    # side, but in these blocks


@dataclass(frozen=True)
class Config:
    """Sizes of the decoder, and the vision tower's; a field without a default must be given."""
    vocab_size: int = size()
    hidden_size: int = size()
    intermediate_size: int = size()                 # inside the SwiGLU
    num_hidden_layers: int = option(least=1, most=1000)
    num_attention_heads: int = size()
    num_key_value_heads: int = size()               # each is shared by several attention heads
    mrope_section: tuple = option(most=1_000_000)   # rotary pairs of time, height, width
    image_token_id: int = size()
    rms_norm_eps: float = option(1e-5, least=1e-30)
    rope_theta: float = option(1e6, least=1)
    max_position_embeddings: int = size(32768)
    tie_word_embeddings: bool = option(False)       # whether the head is the embedding table
    vision: VisionConfig = field(default_factory=VisionConfig)
    raw: dict = field(default_factory=dict, repr=False, compare=False)     # config.json as it is

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


def read_config(source):
    """Config from a model directory, a config.json or a dict, of either layout.

    ValueError names the field that is missing, beyond its limits, or not implemented here.
    """
    if isinstance(source, dict):
        where, raw = "config", source
    else:
        where = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        raw = read_json(where)
    text = {**raw, **part_of(raw, "text_config", where)}
    rope = {**part_of(text, "rope_scaling", where), **part_of(text, "rope_parameters", where)}
    vision = part_of(raw, "vision_config", where)
    refuse_unsupported(raw, text, rope, vision, where)

    vision.setdefault("in_channels", vision.get("in_chans"))
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    text["mrope_section"] = rope.get("mrope_section")
    for name in ("image_token_id", "tie_word_embeddings"):      # of two, the outer counts
        text[name] = raw.get(name, text.get(name))
    text["vision"] = fill(VisionConfig, vision, f"{where}: vision_config")
    text["raw"] = raw
    config = fill(Config, text, where)
    check_sizes(config, where)
    return config


def part_of(config, name, where):
    """A copy of an object inside a config.json; empty where it is missing or null."""
    part = config.get(name)
    if not isinstance(part, (dict, type(None))):
        raise ValueError(f"{where}: {name} is {str(part)[:40]!r}, expected an object")
    return dict(part or {})


def refuse_unsupported(raw, text, rope, vision, where):
    """ValueError for a network that is another one than model.py's."""
    for name, value, supported in (
            ("model_type", raw.get("model_type"), ("qwen2_5_vl",)),
            ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
            ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ("silu",)),
            ("use_sliding_window", text.get("use_sliding_window"), (False, None)),
            ("rope type", rope.get("rope_type", rope.get("type")), ("default", "mrope", None)),
            ("quantization_config", raw.get("quantization_config"), (None,))):
        if value not in supported:
            choices = " or ".join(map(repr, supported))
            raise ValueError(f"{where}: {name} is {value!r}, this code supports {choices} only")


def check_sizes(c, where):
    """ValueError for sizes that do not fit each other, before anything is allocated."""
    if c.hidden_size % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads:
        raise ValueError(f"{where}: hidden_size {c.hidden_size}, num_attention_heads "
                         f"{c.num_attention_heads} and num_key_value_heads {c.num_key_value_heads} "
                         "must divide one another in this order")
    if len(c.mrope_section) != 3 or 2 * sum(c.mrope_section) != c.head_dim:
        raise ValueError(f"{where}: mrope_section {list(c.mrope_section)} must be three numbers "
                         f"that sum to half of the head dimension {c.head_dim}")
    if c.vision.hidden_size % (4 * c.vision.num_heads):
        raise ValueError(f"{where}: vision_config: hidden_size {c.vision.hidden_size} must be a "
                         f"multiple of 4 x {c.vision.num_heads} heads")


def saved_config(raw, dtype):
    """The config.json of a model that is saved: as it was read, with the type of its weights."""
    config = dict(raw)
    for name in ("text_config", "vision_config"):
        if isinstance(config.get(name), dict) and "dtype" in config[name]:
            config[name] = {**config[name], "dtype": dtype}
    if "dtype" in config:
        config["dtype"] = dtype
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["torch_dtype"] = dtype
    return config


def our_name(key):
    """A published name of a weight, of either layout -> ours, the older one."""
    for newer, older in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if key.startswith(newer):
            return older + key.removeprefix(newer)
    return key


def published_name(name):
    """Our name of a layer or a weight -> that of the newer layout."""
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return "model." + name
