"""ChatML: conversations become token ids and patches, token ids become text.

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    <|vision_start|><|image_pad|> ... <|vision_end|>What is this?<|im_end|>
    <|im_start|>assistant

Deviation from the released template: text is encoded with control tokens switched off, so that no
text from outside can end a turn or insert a picture.
"""
import os
import re
from pathlib import Path

import torch
from PIL import Image

from parts.config import read_config
from parts.vision import PictureSettings, picture_patches, read_picture_settings
from plumbing.files import read_json
from plumbing.weights import read_tokenizer

CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
END_OF_TEXT = "<|endoftext|>"
DEFAULT_SYSTEM = "You are a helpful assistant."     # the published template's, where there is none


class Processor:
    """Conversations -> token ids and patches; token ids -> text."""

    def __init__(self, tokenizer, pictures=PictureSettings(), eos_ids=()):
        """tokenizer: of the tokenizers package, changed here; eos_ids: what ends a text, beside the
        end of a turn."""
        missing = [token for token in CONTROL if tokenizer.token_to_id(token) is None]
        if missing:
            raise ValueError(f"tokenizer.json lacks the control tokens {', '.join(missing)}; is it "
                             "that of Qwen2.5-VL?")
        # Control tokens and ends are special, whatever the file says of them, and special tokens in
        # a text are read as the letters that they are written with.
        special = list(CONTROL)
        ends = {END_OF_TEXT, *map(tokenizer.id_to_token, eos_ids)} & set(tokenizer.get_vocab())
        for token in sorted(ends):
            if token not in CONTROL and re.fullmatch(r"<\|.*\|>", token):
                special.append(token)
        tokenizer.add_special_tokens(special)
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.pictures = pictures
        ids = [tokenizer.token_to_id(token) for token in CONTROL]
        self.start, self.end, self.vision_start, self.vision_end, self.image_pad = ids
        self.eos_ids = tuple(dict.fromkeys((self.end, *eos_ids)))
        pad = tokenizer.token_to_id(END_OF_TEXT)
        self.pad_id = self.end if pad is None else pad

    @classmethod
    def from_pretrained(cls, path):
        """Reads tokenizer.json, the picture settings and generation_config.json of a model
        directory. ValueError names what is wrong, or does not fit its config.json."""
        path = Path(path)
        tokenizer = read_tokenizer(path)
        eos_ids = read_eos_ids(path / "generation_config.json", tokenizer)
        pictures = read_picture_settings(path)
        try:
            processor = cls(tokenizer, pictures, eos_ids)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if (path / "config.json").exists():
            processor.check(read_config(path), path)
        return processor

    def check(self, config, path):
        """ValueError where ids and patches are not those of a model with this config."""
        size = max(self.tokenizer.get_vocab().values()) + 1
        if size > config.vocab_size:
            raise ValueError(f"{path}: tokenizer.json has {size} tokens, config.json a vocab_size "
                             f"of {config.vocab_size}")
        ours, vision = self.pictures, config.vision
        for name, here, there in (
                ("image_token_id", self.image_pad, config.image_token_id),
                ("patch_size", ours.patch_size, vision.patch_size),
                ("temporal_patch_size", ours.temporal_patch_size, vision.temporal_patch_size),
                ("spatial_merge_size", ours.merge_size, vision.spatial_merge_size)):
            if here != there:
                raise ValueError(f"{path}: config.json says {name} {there}, tokenizer.json or the "
                                 f"picture settings {here}")

    def encode(self, text):
        """Text -> ids; control tokens inside it stay text."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"no text that can be encoded: {ascii(text)[:80]}; it holds half of a "
                             "surrogate pair") from None

    def prompt(self, conversation):
        """One conversation -> (ids, list of patches, list of grids), ending with the header of the
        assistant's turn."""
        check_conversation(conversation)
        if conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": DEFAULT_SYSTEM}, *conversation]
        ids, patches, grids = [], [], []
        for message in conversation:
            ids.append(self.start)
            text = message["role"] + "\n"
            for part in parts_of(message):
                if part["type"] == "text":
                    text += part["text"]
                    continue
                pixels, (t, h, w) = picture_patches(part["image"], self.pictures)
                patches.append(pixels)
                grids.append((t, h, w))
                places = t * h * w // self.pictures.merge_size ** 2
                ids += self.encode(text)
                ids += [self.vision_start] + [self.image_pad] * places + [self.vision_end]
                text = ""
            ids += self.encode(text) + [self.end] + self.encode("\n")
        ids += [self.start] + self.encode("assistant\n")
        return ids, patches, grids

    def batch(self, prompts):
        """Prompts as `prompt` returns them -> one left-padded batch for the model."""
        if not prompts:
            raise ValueError("no conversation: give at least one")
        T = max(len(ids) for ids, _, _ in prompts)
        input_ids = torch.full((len(prompts), T), self.pad_id)
        attention_mask = torch.zeros(len(prompts), T, dtype=torch.bool)
        patches, grids = [], []
        for row, (ids, prompt_patches, prompt_grids) in enumerate(prompts):
            input_ids[row, T - len(ids):] = torch.tensor(ids)
            attention_mask[row, T - len(ids):] = True
            patches += prompt_patches
            grids += prompt_grids
        return {"input_ids": input_ids, "attention_mask": attention_mask,
                "pixel_values": torch.cat(patches) if patches else None,
                "image_grid_thw": torch.tensor(grids) if grids else None}

    def __call__(self, conversations):
        """List of conversations -> dict(input_ids (B, T), attention_mask (B, T) bool, pixel_values
        (patches, numbers), image_grid_thw (pictures, 3)); left-padded, the last two None where
        there is no picture."""
        return self.batch([self.prompt(conversation) for conversation in conversations])

    def decode(self, ids):
        """Token ids -> text without control tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def read_eos_ids(file, tokenizer):
    """The ids that end a text, of a generation_config.json; none where there is no such file."""
    listed = read_json(file).get("eos_token_id") if file.exists() else None
    if listed is None:
        return []
    ids = listed if isinstance(listed, list) else [listed]
    for i in ids:
        if type(i) is not int or not 0 <= i < 2 ** 32 or tokenizer.id_to_token(i) is None:
            raise ValueError(f"{file}: eos_token_id {i!r} is no token of tokenizer.json")
    return ids


def parts_of(message):
    """The contents of a message as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def check_conversation(conversation):
    """ValueError for what is no conversation: a list of messages, whose contents are a string, or a
    list of texts and pictures."""
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"conversation: {str(conversation)[:80]} is no list of messages")
    for message in conversation:
        fits = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not fits or not isinstance(message.get("content"), (str, list, tuple)):
            raise ValueError(f"conversation: {str(message)[:80]} is no message {{'role': ..., "
                             "'content': a string or a list}")
        for part in parts_of(message):
            if not is_part(part):
                raise ValueError(f"conversation: {str(part)[:80]} is neither {{'type': 'text', "
                                 "'text': a string} nor {'type': 'image', 'image': a path or a PIL "
                                 "image}")


def is_part(part):
    """Whether it is a text or a picture of a message."""
    if not isinstance(part, dict):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    if part.get("type") == "image":
        return isinstance(part.get("image"), (str, os.PathLike, Image.Image))
    return False
