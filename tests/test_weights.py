"""plumbing/weights.py, and the models that it reads and writes: every published layout, against
transformers, and files that are broken."""
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

import model
from networks import CLOSE, PICTURES, assert_same_logits, our_logits
from oracles import (LAYOUTS, deviation, hf_logits, make_config, make_model, rewrite,
                     save_checkpoint)
from plumbing.weights import use_threads, write_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(transformers' model, its directory) for the tests that damage or rewrite a copy. Window and
    patch have their default sizes, so that the sparse layout really leaves them out."""
    hf = make_model(make_config(vision=dict(window_size=112)), seed=1)
    return hf, save_checkpoint(hf, tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint, free to be spoilt."""
    return shutil.copytree(checkpoint[1], tmp_path / "damaged")


def refusal(path, **options):
    """The one-line message with which loading fails."""
    with pytest.raises(ValueError) as error:
        model.VLM.from_pretrained(path, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_logits(checkpoint, tmp_path, layout):
    hf, path = checkpoint
    vlm = model.VLM.from_pretrained(rewrite(path, tmp_path / "other", layout))
    assert torch.equal(our_logits(vlm, PICTURES),
                       our_logits(model.VLM.from_pretrained(path), PICTURES))
    assert_same_logits(vlm, hf)


@pytest.mark.parametrize("layout", ["nested, old keys", "flat, old keys, sharded"])
def test_untied_head_in_other_layouts(tmp_path, layout):
    hf = make_model(make_config(tied=False), seed=2)
    vlm = model.VLM.from_pretrained(rewrite(save_checkpoint(hf, tmp_path / "a"), tmp_path / "b",
                                            layout))
    assert_same_logits(vlm, hf)


def test_a_tied_head_may_be_written_out(checkpoint, damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert_same_logits(model.VLM.from_pretrained(damaged), checkpoint[0])
    weights["lm_head.weight"][5, 3] += 1
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert "tied, but lm_head.weight differs" in refusal(damaged)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there(checkpoint):
    assert "device 'cuda' cannot be used here" in refusal(checkpoint[1], device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["nested, new keys", "flat, old keys, sharded",
                                    "middle, new keys, sharded"])
def test_transformers_loads_what_we_save(checkpoint, tmp_path, layout, dtype):
    vlm = model.VLM.from_pretrained(rewrite(checkpoint[1], tmp_path / "source", layout),
                                    dtype=dtype)
    vlm.save_pretrained(tmp_path / "saved")
    hf, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved",
                                                                    output_loading_info=True)
    assert not any(report.values()), report
    assert hf.dtype == dtype
    ours, theirs = our_logits(vlm.float(), PICTURES), hf_logits(hf.float(), PICTURES)
    assert deviation(ours[PICTURES["attention_mask"]], theirs[PICTURES["attention_mask"]]) < CLOSE
    assert torch.equal(our_logits(model.VLM.from_pretrained(tmp_path / "saved"), PICTURES), ours)


def test_transformers_loads_our_shards(checkpoint, tmp_path):
    hf, path = checkpoint
    vlm = model.VLM.from_pretrained(path)
    vlm.save_pretrained(tmp_path / "shards", shard_bytes=100_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    again, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "shards",
                                                                       output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(vlm, again)
    assert torch.equal(our_logits(model.VLM.from_pretrained(tmp_path / "shards"), PICTURES),
                       our_logits(vlm, PICTURES))
    vlm.save_pretrained(tmp_path / "shards")  # one file again: no shard and no index stays
    assert [file.name for file in (tmp_path / "shards").glob("model*")] == ["model.safetensors"]


def test_saving_over_another_layout(checkpoint, tmp_path):
    """What lay in the directory before, an index with its shards, is not what is loaded
    afterwards."""
    path = rewrite(checkpoint[1], tmp_path / "checkpoint", "flat, old keys, sharded")
    vlm = model.VLM.from_pretrained(path)
    with torch.no_grad():
        vlm.model.norm.weight += 1
    vlm.save_pretrained(path)
    expected = our_logits(vlm, PICTURES)
    assert torch.equal(our_logits(model.VLM.from_pretrained(path), PICTURES), expected)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    assert deviation(hf_logits(hf, PICTURES)[PICTURES["attention_mask"]],
                     expected[PICTURES["attention_mask"]]) < CLOSE
    assert not list(path.glob("*.new")) + list(path.glob("*.tmp"))


def test_every_bad_key_is_named_at_once(damaged):
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"], weights["visual.merger.ln_q.weight"]
    weights["model.layers.1.input_layernorm.weight"] = torch.ones(65)
    qkv = "visual.blocks.0.attn.qkv.weight"
    weights[qkv] = weights[qkv].T.contiguous()
    weights["model.layers.7.input_layernorm.weight"] = torch.ones(64)
    weights["audio_tower.weight"] = torch.ones(2)
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    message = refusal(damaged)
    for key in ("layers.0.mlp.up_proj.weight", "visual.merger.ln_q.weight",
                "layers.1.input_layernorm.weight",
                "visual.blocks.0.attn.qkv.weight", "layers.7.input_layernorm.weight",
                "audio_tower.weight"):
        assert key in message, (key, message)


def test_broken_files_are_named(damaged):
    whole = (damaged / "model.safetensors").read_bytes()
    for kept in (len(whole) // 2, len(whole) - 1, 100, 4, 0):
        (damaged / "model.safetensors").write_bytes(whole[:kept])
        assert "model.safetensors" in refusal(damaged)
    (damaged / "model.safetensors").unlink()
    assert "safetensors" in refusal(damaged)
    (damaged / "pytorch_model.bin").write_bytes(b"old")
    message = refusal(damaged)
    assert "pytorch_model.bin" in message and "safetensors" in message
    (damaged / "config.json").write_text("{")
    assert "config.json" in refusal(damaged)
    (damaged / "config.json").unlink()
    assert "config.json" in refusal(damaged)
    assert "nowhere" in refusal(damaged / "nowhere")


def test_a_missing_shard_is_named(checkpoint, tmp_path):
    path = rewrite(checkpoint[1], tmp_path / "sharded", "flat, old keys, sharded")
    (path / "model-00002-of-00004.safetensors").unlink()
    assert "model-00002-of-00004.safetensors" in refusal(path)
    (path / "model.safetensors.index.json").write_text("[]")
    assert "index" in refusal(path)


# ------------------------------------------------------------------------------- files, threads

@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_weights_are_as_readable_as_any_file(tmp_path, umask, mode):
    before = os.umask(umask)
    write_weights({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("number, weights, used", [(0, 9, 1), (0, 11, None), (3, 9, 3), (3, 11, 3)])
def test_a_small_model_picks_one_thread_by_itself(number, weights, used, monkeypatch):
    """Of ten weights on a model is not small here; what a flag names holds for both."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("plumbing.weights.SMALL", 10)
    use_threads(number, torch.nn.Linear(weights, 1, bias=False))
    assert chosen == ([used] if used else [])
