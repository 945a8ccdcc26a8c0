"""ChatML: conversations become token ids and patches, and token ids become text."""
import math
import os
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from parts.vision import VisionConfig, load_picture, picture_settings, smart_resize
from plumbing.old import read_json
from plumbing.weights import flat_config


def check_pictures(settings):
    """Raise ValueError for picture settings that cannot be, before any picture is made that large."""
    size = settings.get("size") or {}
    most = {"patch_size": 100, "temporal_patch_size": 10, "merge_size": 10}
    found = {**settings, **(size if isinstance(size, dict) else {"size": size})}
    for name in (*most, "min_pixels", "max_pixels", "shortest_edge", "longest_edge"):
        value, limit = found.get(name), most.get(name, 2 ** 26)
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise ValueError(f"preprocessor_config.json: {name} is {str(value)[:40]!r}, expected a whole number from 1 "
                             f"to {limit}")
    for name, only in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if settings.get(name, only) not in (only, None):
            raise ValueError(f"preprocessor_config.json: {name} is {str(settings[name])[:40]!r}, this code supports "
                             f"{only} only")
    scale = settings.get("rescale_factor") or 1 / 255
    if not isinstance(scale, float) or not math.isclose(scale, 1 / 255, rel_tol=1e-3):
        raise ValueError(f"preprocessor_config.json: rescale_factor is {str(scale)[:40]!r}, this code supports 1/255 "
                         "only")
    for name, least in (("image_mean", -math.inf), ("image_std", 0)):
        values = settings.get(name, [1, 1, 1])
        fits = isinstance(values, list) and [type(x) in (int, float) and least < x < math.inf for x in values]
        if fits != [True] * 3:
            raise ValueError(f"preprocessor_config.json: {name} is {str(values)[:40]!r}, expected three numbers")


class Processor:
    """Conversations -> token ids and patches (ChatML, `tokenizer.json`, `picture_settings`), and token ids -> text."""
    CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    # what the published template says where a conversation has no system turn
    DEFAULT_SYSTEM = "You are a helpful assistant."

    def __init__(self, tokenizer, settings, eos_ids=()):
        self.tokenizer = tokenizer
        missing = [t for t in self.CONTROL if tokenizer.token_to_id(t) is None]
        if missing:
            raise ValueError(f"tokenizer.json lacks the control tokens {', '.join(missing)}; "
                             "is this a Qwen2.5-VL tokenizer?")
        check_pictures(settings)
        # whatever the file says of them, control tokens and ends are special,
        # and special tokens in a text are read as the letters they are written with
        ends = {"<|endoftext|>", *map(tokenizer.id_to_token, eos_ids)} & set(tokenizer.get_vocab())
        ends = sorted(t for t in ends if t not in self.CONTROL and re.fullmatch(r"<\|.*\|>", t))
        tokenizer.add_special_tokens([*self.CONTROL, *ends])
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()                         # a file may ask for both; a cut prompt loses the question
        tokenizer.no_padding()
        ids = map(tokenizer.token_to_id, self.CONTROL)
        self.start, self.end, self.vision_start, self.vision_end, self.image_pad = ids
        self.eos_ids = tuple(dict.fromkeys((self.end, *eos_ids)))
        pad = tokenizer.token_to_id("<|endoftext|>")
        self.pad_id = self.end if pad is None else pad
        size = settings.get("size") or {}
        self.patch = settings.get("patch_size", 14)
        self.frames = settings.get("temporal_patch_size", 2)
        self.merge = settings.get("merge_size", 2)
        self.min_pixels = settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        self.max_pixels = settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        self.mean = np.array(settings.get("image_mean", (0.48145466, 0.4578275, 0.40821073)), dtype=np.float32)
        self.std = np.array(settings.get("image_std", (0.26862954, 0.26130258, 0.27577711)), dtype=np.float32)

    @classmethod
    def from_pretrained(cls, path):
        """Read tokenizer.json, the picture settings and generation_config.json of a model directory; ValueError names
        what is wrong."""
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"{path}: no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as e:      # the tokenizers package raises bare Exception for a file that does not parse
            raise ValueError(f"{path / 'tokenizer.json'}: not a readable tokenizer ({e})") from None
        settings = picture_settings(path)
        generation = path / "generation_config.json"
        eos = read_json(generation).get("eos_token_id") if generation.exists() else None
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if wrong := [i for i in eos if type(i) is not int or not 0 <= i < 2 ** 32 or tokenizer.id_to_token(i) is None]:
            raise ValueError(f"{generation}: eos_token_id {wrong[0]!r} is no token of tokenizer.json")
        try:
            processor = cls(tokenizer, settings, eos)
            if (path / "config.json").exists():
                _, _, text, _, vision = flat_config(path)
                processor.check(text, vision)
            return processor
        except ValueError as e:
            raise ValueError(str(e) if str(path) in str(e) else f"{path}: {e}") from None

    def check(self, text, vision):
        """Raise ValueError where tokens and patches are not those of a model with this config."""
        size, rows = max(self.tokenizer.get_vocab().values()) + 1, text.get("vocab_size")
        if type(rows) is int and size > rows:
            raise ValueError(f"tokenizer.json has {size} tokens, config.json a vocab_size of {rows}")
        v = {f.name: vision.get(f.name, f.default) for f in fields(VisionConfig)}
        for name, ours, theirs in (("image_token_id", self.image_pad, text["image_token_id"]),
                                   ("patch_size", self.patch, v["patch_size"]),
                                   ("temporal_patch_size", self.frames, v["temporal_patch_size"]),
                                   ("spatial_merge_size", self.merge, v["spatial_merge_size"])):
            if ours != theirs:
                raise ValueError(f"config.json says {name} {theirs}, tokenizer.json or preprocessor_config.json {ours}")

    def pixels(self, image):
        """Picture -> patches (P, 3 * frames * patch^2) float32 and its grid (1, h, w) in patches; 2 x 2 neighbours
        stand together."""
        image = load_picture(image)
        h, w = smart_resize(image.height, image.width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        if (w, h) != image.size:
            image = image.resize((w, h), Image.Resampling.BICUBIC)
        x = (np.asarray(image, dtype=np.float32) / 255 - self.mean) / self.std      # (height, width, 3)
        m, p = self.merge, self.patch
        gh, gw = h // p, w // p
        # channel, block row, row, y, block column, column, x
        x = x.transpose(2, 0, 1).reshape(3, gh // m, m, p, gw // m, m, p)
        # block row, block column, row, column, channel, frame, y, x
        x = x.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].repeat(self.frames, axis=5)
        return torch.from_numpy(x.reshape(gh * gw, -1)), (1, gh, gw)

    def encode(self, text):
        """Text -> ids; control tokens inside it stay text."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"no text that can be encoded: {ascii(text)[:80]}; it holds half of a surrogate "
                             "pair") from None

    def turn(self, message, grids):
        """Ids of one turn: <|im_start|>role, newline, the contents, <|im_end|>, newline. Pictures take their grid from
        `grids` in order."""
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        ids, text = [self.start], message["role"] + "\n"
        for part in parts:
            if part["type"] == "text":
                text += part["text"]
                continue
            t, h, w = next(grids)
            places = [self.image_pad] * (t * h * w // self.merge ** 2)
            ids += self.encode(text) + [self.vision_start] + places + [self.vision_end]
            text = ""
        return ids + self.encode(text) + [self.end] + self.encode("\n")

    def prompt(self, conversation):
        """One conversation -> (ids, list of patches, list of grids), ending with the header of the assistant's turn."""
        if not isinstance(conversation, (list, tuple)) or not conversation or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str)
                and isinstance(m.get("content"), (str, list, tuple)) for m in conversation):
            raise ValueError(f"conversation: {str(conversation)[:80]} is no list of messages {{'role': ..., "
                             "'content': a string or a list}")
        parts = [part for m in conversation if not isinstance(m["content"], str) for part in m["content"]]
        takes = {"text": str, "image": (str, os.PathLike, Image.Image)}
        if wrong := [part for part in parts if not isinstance(part, dict) or part.get("type") not in ("text", "image")
                     or not isinstance(part.get(part["type"]), takes[part["type"]])]:
            raise ValueError(f"conversation: {str(wrong[0])[:80]} is neither {{'type': 'text', 'text': a string}} "
                             "nor {'type': 'image', 'image': a path or a PIL image}")
        pictures = [self.pixels(part["image"]) for part in parts if part["type"] == "image"]
        grids = iter([g for _, g in pictures])
        if conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": self.DEFAULT_SYSTEM}, *conversation]
        ids = [i for message in conversation for i in self.turn(message, grids)]
        return ids + [self.start] + self.encode("assistant\n"), [x for x, _ in pictures], [g for _, g in pictures]

    def batch(self, prompts):
        """Prompts as `prompt` returns them -> one left-padded batch for the model."""
        if not prompts:
            raise ValueError("no conversation: give at least one")
        T = max(len(ids) for ids, _, _ in prompts)
        input_ids = torch.full((len(prompts), T), self.pad_id)
        attention_mask = torch.zeros(len(prompts), T, dtype=torch.bool)
        for row, (ids, _, _) in enumerate(prompts):
            input_ids[row, T - len(ids):] = torch.tensor(ids)
            attention_mask[row, T - len(ids):] = True
        patches = [x for _, xs, _ in prompts for x in xs]
        grids = [g for _, _, gs in prompts for g in gs]
        return {"input_ids": input_ids, "attention_mask": attention_mask,
                "pixel_values": torch.cat(patches) if patches else None,
                "image_grid_thw": torch.tensor(grids) if grids else None}

    def __call__(self, conversations):
        """List of conversations -> dict(input_ids (B, T), attention_mask (B, T) bool, pixel_values (P, patch),
        image_grid_thw (pictures, 3)); left-padded, the last two None where there is no picture."""
        return self.batch([self.prompt(c) for c in conversations])

    def decode(self, ids):
        """Token ids -> text without control tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
