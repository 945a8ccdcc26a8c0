"""parts/config.py: config.json as it is published, against transformers, and what is refused."""
import copy
import json
import shutil

import pytest
from transformers import Qwen2_5_VLConfig

from oracles import rewrite
from parts.config import read_config


@pytest.fixture
def damaged(small, tmp_path):
    """A copy of the checkpoint, free to be spoilt."""
    return shutil.copytree(small.path, tmp_path / "damaged")


def refusal(path):
    """The one line with which reading fails."""
    with pytest.raises(ValueError) as error:
        read_config(path)
    message = str(error.value)
    assert "\n" not in message
    return message


PUBLISHED_7B = dict(
    model_type="qwen2_5_vl", hidden_act="silu", hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
    max_position_embeddings=128000,
    rms_norm_eps=1e-6, rope_theta=1000000.0,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    sliding_window=32768, use_sliding_window=False, tie_word_embeddings=False,
    image_token_id=151655,
    video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
    vision_token_id=151654,
    vision_config={"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl",
                   "spatial_patch_size": 14})


def test_the_published_sparse_configuration():
    """All sizes of the 7B model, whose vision_config names almost nothing, are those that
    transformers reads out of it."""
    ours, theirs = read_config(PUBLISHED_7B), Qwen2_5_VLConfig(**copy.deepcopy(PUBLISHED_7B))
    for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels",
                 "patch_size",
                 "temporal_patch_size", "spatial_merge_size", "window_size"):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name), name
    blocks = list(theirs.vision_config.fullatt_block_indexes)
    assert list(ours.vision.fullatt_block_indexes) == blocks
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads",
                 "vocab_size", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs.text_config, name), name
    rope = theirs.text_config.rope_parameters
    assert (list(ours.mrope_section), ours.rope_theta) == (rope["mrope_section"],
                                                           rope["rope_theta"])
    assert (ours.tie_word_embeddings, ours.image_token_id) == (False, 151655)


CONFIG_REFUSALS = {  # change of config.json -> what the message must name
    "model type": (dict(model_type="llama"), ["model_type", "llama"]),
    "no model type": (dict(model_type=None), ["model_type"]),
    "sliding window": (dict(use_sliding_window=True), ["use_sliding_window"]),
    "rope type": (dict(rope_scaling={"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}),
                  ["yarn"]),
    "rope type beside type": (dict(rope_scaling={"rope_type": "linear", "type": "mrope",
                                                 "mrope_section": [2, 3, 3]}),
                              ["linear"]),
    "activation": (dict(hidden_act="gelu_new"), ["hidden_act", "gelu_new"]),
    "mrope section": (dict(rope_scaling={"type": "mrope", "mrope_section": [2, 3, 4]}),
                      ["mrope_section"]),
    "no mrope section": (dict(rope_scaling=None), ["mrope_section"]),
    "heads": (dict(num_attention_heads=3), ["num_attention_heads"]),
    "size as a word": (dict(hidden_size="64"), ["hidden_size"]),
}


@pytest.mark.parametrize("change, named", CONFIG_REFUSALS.values(), ids=CONFIG_REFUSALS)
def test_configurations_that_are_refused(small, tmp_path, change, named):
    path = rewrite(small.path, tmp_path / "flat", "flat, old keys")
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()),
                                                  **change}))
    message = refusal(path)
    assert all(name in message for name in named) and "config.json" in message, message


NESTED_REFUSALS = {"use_sliding_window": True, "hidden_act": "relu",
                   "rope_parameters": {"rope_type": "dynamic", "mrope_section": [2, 3, 3]}}


@pytest.mark.parametrize("name", NESTED_REFUSALS)
def test_nested_configurations_that_are_refused(damaged, name):
    config = json.loads((damaged / "config.json").read_text())
    config["text_config"][name] = NESTED_REFUSALS[name]
    (damaged / "config.json").write_text(json.dumps(config))
    assert ("dynamic" if name == "rope_parameters" else name) in refusal(damaged)
