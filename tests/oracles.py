"""Small random Qwen2.5-VL checkpoints in every published layout, made and judged by transformers:
what test_model.py compares with.

Nothing here imports the project. A checkpoint directory is made by transformers' own
save_pretrained and then rewritten, file by file, into the older layouts; batches are made by hand,
so that the network is tested apart from the project's own image and text preparation.

Shapes: B rows, T tokens (longest row), V vocabulary, N images of the batch, P patches of the batch.
"""
import copy
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, trainers)
from transformers import (GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)
from transformers.utils import logging

logging.disable_progress_bar()

# Ids below FIRST_CONTROL are bytes and merges; then come CONTROL in order, then TAGS; the embedding
# has spare rows up to 304, as the published checkpoints have.
FIRST_CONTROL = 280
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
(ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD,
 IMAGE_PAD, VIDEO_PAD) = range(FIRST_CONTROL, FIRST_CONTROL + 8)
TAGS = ("<think>", "</think>")      # ordinary added tokens: text for everybody, but one token each
PUBLISHED_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                   r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TRAINING_TEXT = [
    "the system asks the user a question about the picture, then the assistant answers it",
    "system user assistant ret answer"] * 4

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 16

TEXT = dict(vocab_size=304, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            rms_norm_eps=1e-6, bos_token_id=ENDOFTEXT, eos_token_id=IM_END)
VISION = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14,
              window_size=56, fullatt_block_indexes=[1, 3])
VISION_DEFAULTS = dict(depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420,
                       num_heads=16, patch_size=14, temporal_patch_size=2, spatial_merge_size=2,
                       window_size=112, fullatt_block_indexes=[7, 15, 23, 31])


def plain_tokenizer():
    """Byte-level BPE with Qwen's normaliser and split but no added token at all: how text is
    tokenised when it can only be text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PUBLISHED_SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=FIRST_CONTROL, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    assert tokenizer.get_vocab_size() == FIRST_CONTROL
    return tokenizer


def full_tokenizer():
    """The plain tokenizer with the control tokens (special) and the tags (not special) added, as a
    checkpoint's tokenizer.json holds them."""
    tokenizer = plain_tokenizer()
    control = [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    assert tokenizer.token_to_id("<|image_pad|>") == IMAGE_PAD
    return tokenizer


def make_config(text=(), vision=(), tied=True):
    """A Qwen2_5_VLConfig of toy size. Half the head dimension is shared 1 : 1.5 : 1.5 among time,
    height and width, as published (16, 24, 24); the rotary base is small so that every frequency
    turns visibly within a few dozen positions."""
    text = {**TEXT, **dict(text)}
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    side = 3 * half // 8                                        # of height, and of width
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0,
                               "mrope_section": [half - 2 * side, side, side]}
    vision = {**VISION, "out_hidden_size": text["hidden_size"], **dict(vision)}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied,
                            image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD,
                            vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)


def make_model(config, seed=0):
    """transformers' network with weights that make every part matter: sharp attention, biases and
    norm gains that are not 0 and 1, logits of spread 3."""
    hf = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in hf.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            value = 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
            if name.endswith("language_model.norm.weight"):
                value *= noise.sign().roll(1)   # else a tied head answers each token with itself
        elif "embed_tokens" in name or "lm_head" in name:
            value = 0.4 * noise
            # control tokens and spare rows stay unlikely: what is sampled is text
            value[FIRST_CONTROL:] *= 0.05
        else:
            # by the fan-in, also of the patch convolution
            value = 1.3 * noise / weight[0].numel() ** 0.5
        weight.data = value
    return hf


def save_checkpoint(hf, path):
    """The directory as transformers saves it today: nested config, tokenizer, image processor,
    generation settings, one weight file."""
    path = Path(path)
    hf.save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=full_tokenizer(), eos_token=CONTROL[2],
                                        pad_token=CONTROL[0])
    tokenizer.save_pretrained(path)
    pictures = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS,
                                        patch_size=hf.config.vision_config.patch_size)
    pictures.save_pretrained(path)
    settings = GenerationConfig(pad_token_id=ENDOFTEXT, eos_token_id=[IM_END, ENDOFTEXT],
                                do_sample=True)
    settings.save_pretrained(path)
    return path


# ------------------------------------------------------- the same weights in every published layout

def nested_config(config):
    """As transformers 5 writes it."""
    return copy.deepcopy(config)


def middle_config(config):
    """As transformers 4.52 to 4.57 wrote it: nested, but rope_scaling beside rope_theta and
    torch_dtype instead of rope_parameters and dtype."""
    config = copy.deepcopy(config)
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    scaling = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
    text.update(rope_theta=rope["rope_theta"], rope_scaling=scaling,
                torch_dtype=config.pop("dtype"), tie_word_embeddings=config["tie_word_embeddings"])
    config["torch_dtype"] = text["torch_dtype"]
    config["vision_config"].pop("rope_parameters")
    return config


def flat_config(config):
    """As the published Qwen2.5-VL checkpoints have it: the decoder's fields at the top level,
    rope_scaling of type mrope, in_chans."""
    config = middle_config(config)
    text, vision = config.pop("text_config"), config["vision_config"]
    scaling = {"type": "mrope", "mrope_section": text["rope_scaling"]["mrope_section"]}
    text.update(rope_scaling=scaling, use_sliding_window=False, sliding_window=32768,
                vision_token_id=VISION_PAD)
    for key in ("layer_types", "model_type", "pad_token_id"):
        text.pop(key)
    vision.update(in_chans=vision.pop("in_channels"), spatial_patch_size=vision["patch_size"])
    for key in ("model_type", "initializer_range"):
        vision.pop(key)
    return {**text, **config}


def sparse_config(config):
    """As transformers 4.49 saved it: the vision fields that have their default value are absent,
    also the window of 112 and the patch of 14."""
    config = flat_config(config)
    vision = {"model_type": "qwen2_5_vl"}
    for key, value in config["vision_config"].items():
        if VISION_DEFAULTS.get(key) != value:
            vision[key] = value
    config["vision_config"] = vision
    return config


def old_keys(weights):
    """The published names: model.*, visual.*, lm_head.weight."""
    renamed = {}
    for key, weight in weights.items():
        key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        renamed[key] = weight
    return renamed


def new_keys(weights):
    """The names inside transformers since 4.52: model.language_model.*, model.visual.*,
    lm_head.weight."""
    renamed = {}
    for key, weight in old_keys(weights).items():
        if key.startswith("visual."):
            renamed[f"model.{key}"] = weight
        else:
            renamed[key.replace("model.", "model.language_model.", 1)] = weight
    return renamed


def write_weights(path, weights, shards=1):
    """One model.safetensors, or several files with the index that names the file of each key."""
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        return
    names, file_of = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, path / file, {"format": "pt"})
        file_of.update(dict.fromkeys(part, file))
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


LAYOUTS = {  # name: (configuration, names of the weights, number of files)
    "nested, new keys": (nested_config, new_keys, 1),
    "nested, old keys": (nested_config, old_keys, 1),
    "middle, new keys, sharded": (middle_config, new_keys, 3),
    "flat, old keys": (flat_config, old_keys, 1),
    "flat, old keys, sharded": (flat_config, old_keys, 4),
    "sparse vision, old keys": (sparse_config, old_keys, 1),
}


def rewrite(source, target, layout):
    """Copies the checkpoint directory `source` to `target` in the given layout."""
    to_config, to_keys, shards = LAYOUTS[layout]
    target = Path(shutil.copytree(source, target))
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(to_config(config)))
    write_weights(target, to_keys(load_file(source / "model.safetensors")), shards)
    return target


# -------------------------------------------------------- batches and transformers' answer to them

def make_batch(config, rows, seed=0):
    """Left-padded inputs of random tokens and pixels. A row is a list of parts: an int is that many
    text tokens, a pair (h, w) is a picture of h x w patches with its two markers. -> input_ids
    (B, T), attention_mask (B, T) bool, pixel_values (P, C*2*p*p), image_grid_thw (N, 3)."""
    generator = torch.Generator().manual_seed(seed)
    grids, sequences = [], []
    for row in rows:
        ids = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(0, FIRST_CONTROL, (part,), generator=generator).tolist()
            else:
                grids.append([1, *part])
                ids += [VISION_START] + [IMAGE_PAD] * (part[0] * part[1] // 4) + [VISION_END]
        sequences.append(ids)
    T = max(map(len, sequences))
    input_ids = torch.tensor([[ENDOFTEXT] * (T - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[False] * (T - len(ids)) + [True] * len(ids) for ids in sequences])
    grid = pixels = None
    if grids:
        grid = torch.tensor(grids)
        vision = config.vision_config
        width = vision.in_channels * 2 * vision.patch_size ** 2
        pixels = torch.randn(int(grid.prod(1).sum()), width, generator=generator)
    return dict(input_ids=input_ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grid)


def split_rows(batch):
    """Each row of a batch by itself, without its padding and with its own pictures only."""
    rows, image, patch = [], 0, 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        ids = ids[mask][None]                                                   # (1, t)
        images = int((ids == VISION_START).sum())
        grid = pixels = None
        if images:
            grid = batch["image_grid_thw"][image:image + images]                # (n, 3)
            patches = int(grid.prod(1).sum())
            pixels = batch["pixel_values"][patch:patch + patches]               # (p, C*2*p*p)
            image, patch = image + images, patch + patches
        real = torch.ones_like(ids, dtype=torch.bool)
        rows.append(dict(input_ids=ids, attention_mask=real, pixel_values=pixels,
                         image_grid_thw=grid))
    return rows


def hf_inputs(batch):
    """As transformers wants it: integers as mask, no empty arguments, and a type for each token, 1
    at picture tokens."""
    batch = {name: value for name, value in batch.items() if value is not None}
    types = (batch["input_ids"] == IMAGE_PAD).int()                             # (B, T)
    return {**batch, "attention_mask": batch["attention_mask"].long(), "mm_token_type_ids": types}


@torch.no_grad()
def hf_logits(hf, batch):
    """(B, T, V), all rows at once."""
    return hf(**hf_inputs(batch)).logits


@torch.no_grad()
def hf_greedy(hf, batch, new_tokens, eos_ids=()):
    """transformers.generate without sampling -> (B, L) tokens after the prompt, filled up with
    ENDOFTEXT behind an end token."""
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=ENDOFTEXT,
                              eos_token_id=list(eos_ids) or None)
    # the checkpoint's own settings name an end token, which generate would fall back to
    hf.generation_config = config
    tokens = hf.generate(**hf_inputs(batch), generation_config=config)          # (B, T + L)
    return tokens[:, batch["input_ids"].shape[1]:]


def deviation(ours, theirs):
    """Largest difference over the largest reference value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
