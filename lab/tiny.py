"""The tiny model's tokenizer and its directory without weights."""
import json
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lab.world import ASK, COLOURS, FINISH, FIRST, INTRO, MOVES, PREFIXES, SECOND, SHAPES, SIDE


# ----------------------------------------------------------------------------------------- the tiny model's empty shell
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "sub-question", "ret", "answer") for slash in ("", "/"))


def build_tokenizer():
    """A byte-level BPE in which every syllable, number and word of the world is one token, and so is every constant
    phrase of a prompt.

    It is made from the world's vocabulary, not from a sample of text, so it is the same whatever was sampled. Other
    text falls to bytes.
    """
    split = Regex(r" ?[A-Z][a-z]{2}(?=[a-z]{3}(?![a-z]))|(?<=[A-Z][a-z]{2})[a-z]{3}(?![a-z])"
                  r"| ?\d{1,2}| ?[A-Za-z]+| ?[^A-Za-z\d\s]+|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    sentences = [" ".join(filter(None, (m.ask, m.stands_for, m.fact, m.need))) for m in MOVES.values()]
    sentences += ["Which country has more people, or more"]
    sentences += ["need fact enough final answer", "Text Retriever Text Image Retriever Table Retriever None",
                  " ".join((*COLOURS, *SHAPES)),
                  "What colour shape is the emblem? What colour is the top left stripe?",
                  "flag system user assistant plan read answer copy"]
    words = sorted({w for s in sentences for w in re.findall(r"[A-Za-z]+", s)})
    vocabulary = [" " + s for s in FIRST] + SECOND + [f" {n}" for n in range(10, 100)] + [" " + w for w in words]
    vocabulary += ["system", "user", "assistant"]
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, special_tokens=list(CONTROL),
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # a syllable is trained inside a name, so that the split above cuts it out as it will in a text
    inside = lambda w: w + SECOND[0] if w[1:] in FIRST else FIRST[0] + w if w in SECOND else w
    tokenizer.train_from_iterator([inside(w) for w in vocabulary], trainer)
    phrases = [INTRO, ASK.rstrip(), FINISH.rstrip(), "Origin question:", "[sep]", "[Row]"]
    phrases += [f"[Title] {t}[Header] fact[sep] value[Rows]" for t in ("country", "person", "cup")]
    phrases += [f"{prefix}-{i}:" for prefix in PREFIXES.values() for i in range(5)]
    phrases += [f"{word}{i}:" for word in ("Sub-question", "Answer") for i in range(1, 6)]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*TAGS, *phrases)])
    return tokenizer


def write_shell(out, hidden, layers, heads, kv_heads, inner):
    """Write a model directory without weights: config, tokenizer, picture settings. train.py fills it."""
    tokenizer = build_tokenizer()
    ids = {t: tokenizer.token_to_id(t) for t in CONTROL}
    turns = hidden // heads // 2                      # rotary pairs of a head: a quarter for time, the rest for
    time, height = turns // 4, (turns - turns // 4) // 2       # height and width
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope",
                         "mrope_section": [time, height, turns - time - height]},
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "in_channels": 3,
                          "out_hidden_size": hidden, "patch_size": 8, "temporal_patch_size": 2,
                          "spatial_merge_size": 2, "window_size": 32, "fullatt_block_indexes": [1],
                          "hidden_act": "silu"},
    }
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "temporal_patch_size": 2,
                "merge_size": 2, "min_pixels": 16 * 16, "max_pixels": 4 * SIDE * SIDE,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    files = {"config.json": config, "preprocessor_config.json": pictures,
             "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
                                        "pad_token_id": ids["<|endoftext|>"]},
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                       "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}}
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
