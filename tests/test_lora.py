"""parts/lora.py against peft: adapters that are added, trained, saved, loaded, switched off,
merged."""
import json
import warnings
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2_5_VLForConditionalGeneration

import model
from networks import (BATCHES, CLOSE, GREEDY, PICTURES, REAL, assert_same_logits, fresh, our_logits,
                      seeded)
from oracles import deviation, hf_greedy, hf_logits, make_batch, make_config
from parts.lora import LoRALinear, add_lora, load_adapter, lora_disabled, merge_lora, save_adapter


def with_adapter(small, rank=4, alpha=12, targets=("q_proj", "v_proj", "down_proj")):
    """Our model with an adapter whose two factors are both random, as after training."""
    vlm = fresh(small)
    generator = seeded(0)
    for weight in add_lora(vlm, rank=rank, alpha=alpha, targets=targets):
        weight.data.normal_(0, 0.1, generator=generator)
    return vlm


def peft_model(small, **options):
    """transformers' network with peft's adapter, both factors random."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(small.path)
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"],
               **options}
    adapted = get_peft_model(hf, LoraConfig(**options)).eval()
    generator = seeded(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1, generator=generator)
    return adapted


def test_a_new_adapter_changes_nothing_and_trains_alone(small):
    vlm = fresh(small)
    trainable = add_lora(vlm, rank=4, alpha=8, targets=("q_proj", "gate_proj"))
    assert torch.equal(our_logits(vlm, PICTURES), our_logits(small.vlm, PICTURES))
    names = {name for name, weight in vlm.named_parameters() if weight.requires_grad}
    assert names and all("lora_" in name for name in names) and len(names) == len(trainable)
    # q_proj in 3 decoder layers, gate_proj in 3 decoder layers and 4 vision blocks, two factors
    # each
    assert len(names) == 2 * (3 + 3 + 4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["k_proj", "v_proj", "o_proj"]],
                         ids=str)
def test_generation_with_an_adapter(small, tmp_path, targets, static):
    """Greedy tokens of peft's adapted network, and, disabled, of the base."""
    adapted, vlm = peft_model(small, target_modules=targets), fresh(small)
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(vlm, tmp_path / "adapter")
    batch = make_batch(small.config, BATCHES["padded, with and without pictures"], seed=2)
    expected, base = hf_greedy(adapted.merge_and_unload(), batch, 10), hf_greedy(small.hf, batch,
                                                                                 10)
    assert not torch.equal(expected, base)
    options = dict(n=2, max_new_tokens=10, static=static, **GREEDY)
    assert torch.equal(vlm.generate(**batch, **options).tokens, expected.repeat_interleave(2, 0))
    with lora_disabled(vlm):
        assert torch.equal(vlm.generate(**batch, **options).tokens, base.repeat_interleave(2, 0))


def test_lora_disabled_is_the_base(small):
    vlm, base = with_adapter(small), our_logits(small.vlm, PICTURES)
    adapted = our_logits(vlm, PICTURES)
    assert deviation(adapted, base) > 0.01
    with pytest.raises(KeyError), lora_disabled(vlm):
        assert torch.equal(our_logits(vlm, PICTURES), base)
        raise KeyError  # an error inside leaves the adapter on again
    assert torch.equal(our_logits(vlm, PICTURES), adapted)


PATHS = ("layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
         "model.language_model.layers.1.self_attn.q_proj",
         "language_model.layers.1.self_attn.q_proj",
         "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv", "proj", "0", "2")


@pytest.mark.parametrize("target", PATHS)
def test_targets_by_path_are_those_of_peft(small, tmp_path, target):
    """Our paths and the published ones name one layer, and a short name may be that of other
    modules, too (a convolution, a whole layer); what we save and what peft saves goes to the
    other."""
    vlm = with_adapter(small, targets=(target,))
    found = sum(isinstance(m, LoRALinear) for m in vlm.modules())
    assert found == (4 if target == "proj" else 1)
    save_adapter(vlm, tmp_path / "ours")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(small.path)
    with warnings.catch_warnings():
        # peft warns about keys that it did not find
        warnings.simplefilter("error", UserWarning)
        adapted = PeftModel.from_pretrained(hf, tmp_path / "ours").eval()
    assert sum(name.endswith("lora_A.default.weight") for name,
               _ in adapted.named_parameters()) == found
    assert_same_logits(vlm, adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = fresh(small)
        load_adapter(again, tmp_path / folder)
        assert torch.equal(our_logits(again, PICTURES), our_logits(vlm, PICTURES))


def test_a_refused_adapter_leaves_the_model_as_it_was(small, tmp_path):
    """Its rank is 4 in the file and 3 in the config. The right one is read afterwards."""
    right, wrong, vlm = with_adapter(small), tmp_path / "wrong", fresh(small)
    frozen = fresh(small).requires_grad_(False)
    save_adapter(right, wrong)
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(ValueError, match="weights do not fit"):
        load_adapter(vlm, wrong)
    assert not hasattr(vlm, "lora") and all(weight.requires_grad for weight in vlm.parameters())
    with pytest.raises(ValueError, match="weights do not fit"):
        load_adapter(frozen, wrong)
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert vlm.state_dict().keys() == small.vlm.state_dict().keys()
    assert torch.equal(our_logits(vlm, PICTURES), our_logits(small.vlm, PICTURES))
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(vlm, wrong)
    assert torch.equal(our_logits(vlm, PICTURES), our_logits(right, PICTURES))


def test_peft_loads_our_adapter(small, tmp_path):
    vlm = with_adapter(small)
    save_adapter(vlm, tmp_path / "adapter")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(small.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns about keys that it did not find
        adapted = PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    assert_same_logits(vlm, adapted)


@pytest.mark.parametrize("options",
                         [dict(), dict(r=2, lora_alpha=1), dict(target_modules=["qkv", "o_proj"]),
                                     dict(target_modules=["self_attn.q_proj"]),
                                     dict(target_modules="all-linear")], ids=str)
def test_we_load_the_adapter_of_peft(small, tmp_path, options):
    adapted, vlm = peft_model(small, **options), fresh(small)
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(vlm, tmp_path / "adapter")
    theirs = hf_logits(adapted, PICTURES)[REAL]
    assert deviation(our_logits(vlm, PICTURES)[REAL], theirs) < CLOSE
    assert deviation(our_logits(small.vlm, PICTURES)[REAL], theirs) > 0.01


def test_our_adapter_comes_back(small, tmp_path):
    vlm, again = with_adapter(small), fresh(small)
    save_adapter(vlm, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(our_logits(again, PICTURES), our_logits(vlm, PICTURES))


ADAPTER_REFUSALS = {"use_rslora": True, "use_dora": True, "bias": "all",
                    "alpha_pattern": {"q_proj": 99},
                    "rank_pattern": {"q_proj": 2},
                    "target_modules": r".*layers\.\d\.self_attn\.q_proj"}


@pytest.mark.parametrize("name", ADAPTER_REFUSALS)
def test_adapters_that_are_refused(small, tmp_path, name):
    """What we do not implement is refused by name: a scale that is silently ignored would be a
    wrong model."""
    peft_model(small, **{name: ADAPTER_REFUSALS[name]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="lora_A|rank_pattern" if name == "rank_pattern" else name):
        load_adapter(fresh(small), tmp_path / "adapter")


@pytest.mark.parametrize("option, value, named", [("rank", 2, "lora_A"), ("alpha", 99, "alpha"),
                                                  ("targets", ["qkv"], "q_proj")])
def test_an_adapter_beside_another_is_refused(small, tmp_path, option, value, named):
    """Loaded into a model that already has an adapter of another rank, scale or place."""
    save_adapter(with_adapter(small), tmp_path / "adapter")
    with pytest.raises(ValueError, match=named):
        load_adapter(with_adapter(small, **{option: value}), tmp_path / "adapter")


@pytest.mark.parametrize("kept", [0, 5, 1000, None])
def test_a_broken_adapter_file_is_named(small, tmp_path, kept):
    save_adapter(with_adapter(small), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_adapter(fresh(small), tmp_path / "adapter")


def test_a_target_that_is_no_layer_is_named(small):
    with pytest.raises(ValueError, match="no_such_proj"):
        add_lora(fresh(small), rank=2, alpha=2, targets=("q_proj", "no_such_proj"))


@pytest.mark.parametrize("targets, said",
                         [(("q_proj", "lm_head"), "'lm_head' is the head"), ((), "no targets")])
def test_targets_that_take_no_adapter(targets, said):
    vlm = model.VLM.from_config(make_config(tied=False).to_dict())
    with pytest.raises(ValueError, match=said):
        add_lora(vlm, rank=2, alpha=2, targets=targets)
    assert all(weight.requires_grad for weight in vlm.parameters()) and not hasattr(vlm, "lora")


def test_a_second_adapter_needs_the_first_merged(small):
    vlm = with_adapter(small)
    adapted = our_logits(vlm, PICTURES)
    with pytest.raises(ValueError, match="has an adapter already: merge_lora first"):
        add_lora(vlm, rank=2, alpha=2, targets=("k_proj",))
    assert torch.equal(our_logits(vlm, PICTURES), adapted)
    add_lora(merge_lora(vlm), rank=2, alpha=2, targets=("k_proj",))
    assert deviation(our_logits(vlm, PICTURES), adapted) < CLOSE


@pytest.mark.parametrize("name, value",
                         [("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
                                         ("use_qalora", True), ("alora_invocation_tokens", [1, 2]),
                                         ("layer_replication", [[0, 2], [1, 3]])])
def test_adapters_whose_base_differs_are_refused(small, tmp_path, name, value):
    save_adapter(with_adapter(small), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    for changed, refused in ((value, True),
                             ("gaussian" if name == "init_lora_weights" else None, False)):
        file.write_text(json.dumps({**json.loads(file.read_text()), name: changed}))
        with pytest.raises(ValueError, match=name) if refused else nullcontext():
            load_adapter(fresh(small), tmp_path / "adapter")


def test_a_merged_adapter_is_a_full_checkpoint(small, tmp_path):
    vlm = with_adapter(small)
    adapted = our_logits(vlm, PICTURES)
    merge_lora(vlm)
    assert deviation(our_logits(vlm, PICTURES), adapted) < CLOSE
    vlm.save_pretrained(tmp_path / "merged")
    hf, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged",
                                                                    output_loading_info=True)
    assert not any(report.values()), report
    assert deviation(hf_logits(hf, PICTURES)[REAL], adapted[REAL]) < CLOSE


def test_an_unmerged_adapter_is_saved_apart(small, tmp_path):
    """save_pretrained writes the base alone, with the keys of a Qwen2.5-VL checkpoint; save_adapter
    writes the rest."""
    with_adapter(small).save_pretrained(tmp_path / "base")
    hf, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base",
                                                                    output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(small.vlm, hf)
