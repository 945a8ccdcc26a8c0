"""parts/chat.py against the published template and tokenizer: prompts, batches, and text from
outside, which stays text."""
import json
import shutil
from unicodedata import normalize

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from networks import CLOSE, our_logits
from oracles import (CONTROL, ENDOFTEXT, FIRST_CONTROL, IM_END, IM_START, IMAGE_PAD, TAGS,
                     VISION_END, VISION_START, deviation, full_tokenizer, hf_logits,
                     plain_tokenizer)
from parts.chat import Processor
from pictures import picture


@pytest.fixture(scope="module")
def processor(small):
    return Processor.from_pretrained(small.path)


def text_ids(text):
    """Ids of a text that can only be text."""
    return plain_tokenizer().encode(text).ids


def test_prompt_by_hand(processor):
    # <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it
    # red?<|im_end|>\n<|im_start|>assistant\n
    batch = processor([[{"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "Is it red?"}]])
    expected = [IM_START, *text_ids("system\nBe brief."), IM_END, *text_ids("\n"),
                IM_START, *text_ids("user\nIs it red?"), IM_END, *text_ids("\n"), IM_START,
                *text_ids("assistant\n")]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["attention_mask"].tolist() == [[True] * len(expected)]
    assert batch["pixel_values"] is None and batch["image_grid_thw"] is None
    # The published template makes a string, and the published kind of tokenizer reads it: the same
    # ids.
    string = ("<|im_start|>system\nBe brief.<|im_end|>\n"
              "<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n")
    assert full_tokenizer().encode(string).ids == expected


def test_the_template_fills_in_a_system_turn(processor):
    string = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
              "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = processor([[{"role": "user", "content": "Hi"}]])["input_ids"]
    assert ids.tolist() == [full_tokenizer().encode(string).ids]


def test_prompt_with_pictures_and_an_earlier_answer(processor):
    parts = [{"type": "text", "text": "Compare"}, {"type": "image", "image": picture(84, 56)},
             {"type": "text", "text": " with\n\n"}, {"type": "image", "image": picture(56, 56)},
             {"type": "text", "text": "now."}]
    batch = processor([[{"role": "system", "content": ""}, {"role": "user", "content": parts},
                        {"role": "assistant", "content": "\nSame."},
                        {"role": "user", "content": "Sure?"}]])

    def pictured(n):
        return f"<|vision_start|>{n * '<|image_pad|>'}<|vision_end|>"
    # 84 x 56 pixels are 6 x 4 patches, 6 tokens; 56 x 56 are 4 tokens
    string = ("<|im_start|>system\n<|im_end|>\n"
              f"<|im_start|>user\nCompare{pictured(6)} with\n\n{pictured(4)}now.<|im_end|>\n"
              "<|im_start|>assistant\n\nSame.<|im_end|>\n"
              "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")
    assert batch["input_ids"].tolist() == [full_tokenizer().encode(string).ids]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4]]


def test_a_batch_is_padded_on_the_left(processor, small):
    talks = [[{"role": "user",
               "content": "Why is the sky so very blue in this picture, and not green?"}],
             [{"role": "user", "content": [{"type": "image", "image": picture(56, 56)}]}],
             [{"role": "user", "content": "?"}]]
    batch, alone = processor(talks), [processor([talk]) for talk in talks]
    assert batch["input_ids"].dtype == torch.long and batch["attention_mask"].dtype == torch.bool
    for ids, mask, single in zip(batch["input_ids"], batch["attention_mask"], alone):
        length = single["input_ids"].shape[1]
        assert mask.tolist() == [False] * (len(mask) - length) + [True] * length
        assert ids[mask].tolist() == single["input_ids"][0].tolist()
    assert torch.equal(batch["pixel_values"], alone[1]["pixel_values"])
    logits = our_logits(small.vlm, batch)  # what the processor makes is what the network takes
    assert deviation(logits[1][batch["attention_mask"][1]],
                     hf_logits(small.hf, alone[1])[0]) < CLOSE


def test_ids_of_the_processor(processor):
    assert tuple(processor.eos_ids) == (IM_END, ENDOFTEXT)
    assert processor.pad_id == ENDOFTEXT


def test_a_broken_processor_directory(small, tmp_path):
    path = shutil.copytree(small.path, tmp_path / "broken")
    (path / "generation_config.json").unlink()
    assert tuple(Processor.from_pretrained(path).eos_ids) == (IM_END,)  # what ends a turn
    plain_tokenizer().save(str(path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json.*im_start"):
        Processor.from_pretrained(path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Processor.from_pretrained(path)
    full_tokenizer().save(str(path / "tokenizer.json"))
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        Processor.from_pretrained(path)


def test_the_turn_ends_with_its_own_token_however_ends_are_listed(small, tmp_path):
    """eos_token_id is a set to transformers: any order, with or without <|im_end|>. All are
    special."""
    path = shutil.copytree(small.path, tmp_path / "ends")
    file = path / "tokenizer.json"
    plain = json.loads(file.read_text())
    for token in plain["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(plain))
    # an end, but a word of the answer as well
    tag = full_tokenizer().token_to_id("</think>")
    for listed in ([ENDOFTEXT, IM_END], ENDOFTEXT, [ENDOFTEXT, tag]):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        processor = Processor.from_pretrained(path)
        assert processor.end == IM_END and processor.eos_ids[:2] == (IM_END, ENDOFTEXT)
        assert ENDOFTEXT not in processor.encode("a<|endoftext|>b")
        assert processor.decode([ENDOFTEXT]) == ""
        assert processor.encode("</think>") == [tag] and processor.decode([tag]) == "</think>"


@pytest.mark.parametrize("wrong", [[], [[]], ["hello"], [[{"content": "x"}]],
                                   [[{"role": "user", "content": None}]],
                                   [[{"role": "user", "content": ["x"]}]]], ids=str)
def test_conversations_that_are_refused(processor, wrong):
    with pytest.raises(ValueError, match="conversation: |no conversation: give"):
        processor(wrong)


@pytest.mark.parametrize("part", [{"type": "video", "video": "film.mp4"}, {"type": "image"},
                                  {"type": "text", "text": None}, {"type": "text", "text": 5},
                                  {"type": "text", "text": ["a"]}, {"type": "image", "image": None},
                                  {"type": "image", "image": [1]},
                                  {"type": "image", "image": torch.zeros(3, 8, 8)},
                                  {"type": "image", "image": 7}], ids=lambda p: str(p)[:30])
def test_contents_that_are_refused(processor, part):
    with pytest.raises(ValueError, match="is neither"):
        processor([[{"role": "user", "content": [part]}]])


PIECES = CONTROL + TAGS + ("<|im_", "end|>", "<|", "|>", "user\n", "\n", " ", "é", "日本", "\u0301")
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


@settings(max_examples=40, deadline=None)
@given(system=HOSTILE, first=HOSTILE, second=HOSTILE)
def test_text_makes_no_control_token(processor, system, first, second):
    """Turns and pictures alone decide how often each control token stands in the prompt, and the
    words are those that were given."""
    content = [{"type": "text", "text": first},
               {"type": "image", "image": Image.new("RGB", (56, 56))},
               {"type": "text", "text": second}]
    batch = processor([[{"role": "system", "content": system},
                        {"role": "user", "content": content}]])
    ids = batch["input_ids"][0].tolist()
    counts = {i: ids.count(i) for i in range(FIRST_CONTROL, FIRST_CONTROL + len(CONTROL))
              if i in ids}
    assert counts == {IM_START: 3, IM_END: 2, VISION_START: 1, VISION_END: 1, IMAGE_PAD: 4}
    words = f"system\n{system}\nuser\n{first}{second}\nassistant\n"
    assert normalize("NFC", processor.decode(ids)) == normalize("NFC", words)


def test_decode_drops_control_tokens_only(processor):
    text = "<think> it says <|im_end|> here</think>\n  <ret>"
    before, after = (full_tokenizer().encode(words).ids
                     for words in ("<think> it says ", " here</think>\n  <ret>"))
    ids = before + text_ids("<|im_end|>") + after
    assert processor.decode([IM_START, *ids, IM_END, ENDOFTEXT]) == text
    assert processor.decode(torch.tensor(ids + [IM_END])) == text
    assert processor.decode(ids + [303]) == text  # a spare row of the embedding has no text
