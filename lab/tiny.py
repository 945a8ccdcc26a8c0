"""The tiny model's tokenizer, and its directory without weights."""
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lab.world import COLOURS, FIRST, MOVES, SECOND, SHAPES, SIDE, WORDINGS
from parts.steps import ASK, EVIDENCE_HEADER, FINISH, PREFIX, UNKNOWN
from plumbing.files import replacing, write_json

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<sub-question>", "</sub-question>", "<ret>", "</ret>",
        "<answer>", "</answer>")

# A text is cut into first syllables, second syllables, numbers of up to two digits, words, other
# signs and spaces, each but the second syllable with the space before it.
CUTS = (r" ?[A-Z][a-z]{2}(?=[a-z]{3}(?![a-z]))|(?<=[A-Z][a-z]{2})[a-z]{3}(?![a-z])"
        r"| ?\d{1,2}| ?[A-Za-z]+| ?[^A-Za-z\d\s]+|\s+")


def build_tokenizer():
    """A byte-level BPE in which every syllable, number and word of the world is one token, and so
    is every constant phrase of a prompt.

    It is made from the world's vocabulary, not from a sample of text, so it is the same whatever
    was sampled. Other text falls to bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CUTS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, special_tokens=list(CONTROL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([in_a_name(word) for word in vocabulary()], trainer)
    tokens = [AddedToken(text, special=False, normalized=False) for text in (*TAGS, *phrases())]
    tokenizer.add_tokens(tokens)
    return tokenizer


def vocabulary():
    """What becomes one token by training: syllables, numbers, and the words of the world."""
    sentences = []
    for move in MOVES.values():
        sentences += [move.ask, move.stands_for or "", move.fact, move.need]
    sentences += WORDINGS
    sentences += [
        "Which country has more people, or more", "need fact enough final answer no yes Is it this",
        UNKNOWN,
        "Text Retriever Text Image Retriever Table Retriever None", *COLOURS, *SHAPES,
        "What colour shape is the emblem? What colour is the top left stripe?",
        "flag system user assistant plan read answer copy"]
    words = sorted(set(re.findall(r"[A-Za-z]+", " ".join(sentences))))
    first = [" " + syllable for syllable in FIRST]
    numbers = [f" {n}" for n in range(10, 100)]
    return [*first, *SECOND, *numbers, *(" " + word for word in words),
            "system", "user", "assistant"]


def in_a_name(word):
    """A syllable inside a name, so that training cuts it out as CUTS will in a text."""
    if word[1:] in FIRST:
        return word + SECOND[0]
    return FIRST[0] + word if word in SECOND else word


def phrases():
    """Constant phrases of a prompt, each of which is added as one token."""
    texts = [EVIDENCE_HEADER, "\n" + ASK.rstrip(), FINISH.rstrip(), "Origin question:", "[sep]",
             "[Row]"]
    for title in ("country", "person", "cup"):
        texts.append(f"[Title] {title}[Header] fact[sep] value[Rows]")
    for prefix in PREFIX.values():
        texts += [f"{prefix}-{i}:" for i in range(5)]
    for word in ("Sub-question", "Answer"):
        texts += [f"{word}{i}:" for i in range(1, 10)]
    return texts


def config_of(tokenizer, hidden, layers, heads, kv_heads, inner):
    """The config.json of a model of these sizes, in the flat layout."""
    ids = {text: tokenizer.token_to_id(text) for text in CONTROL}
    pairs = hidden // heads // 2        # rotary pairs of a head: a quarter for time, the rest for
    time = pairs // 4                   # height and width
    height = (pairs - time) // 2
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [time, height, pairs - time - height]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
            "in_channels": 3, "out_hidden_size": hidden, "patch_size": 8, "temporal_patch_size": 2,
            "spatial_merge_size": 2, "window_size": 32, "fullatt_block_indexes": [1],
            "hidden_act": "silu"},
    }


def write_shell(out, hidden, layers, heads, kv_heads, inner):
    """Writes a model directory without weights: config, tokenizer, picture settings; train.py fills
    it. ValueError for sizes that do not fit each other."""
    shape = (hidden, layers, heads, kv_heads, inner)
    if min(shape) < 1 or hidden % (8 * heads) or heads % kv_heads:
        raise ValueError(f"--shape {' '.join(map(str, shape))}: give numbers of at least 1, a "
                         "hidden size that is a multiple of 8 for each head, and key/value heads "
                         "that divide the heads")
    tokenizer = build_tokenizer()
    ids = {text: tokenizer.token_to_id(text) for text in CONTROL}
    pictures = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "temporal_patch_size": 2,
        "merge_size": 2, "min_pixels": 16 * 16, "max_pixels": 4 * SIDE * SIDE,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    with replacing(out / "tokenizer.json") as new:
        tokenizer.save(str(new))
    write_json(out / "preprocessor_config.json", pictures)
    write_json(out / "generation_config.json",
               {"eos_token_id": ends, "pad_token_id": ids["<|endoftext|>"]})
    write_json(out / "tokenizer_config.json",
               {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>"})
    config = config_of(tokenizer, *shape)
    write_json(out / "config.json", config)         # the last: a directory without it is refused
