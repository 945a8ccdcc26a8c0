"""What tests of encoders, bases and corpora share: small corpora, pictures, and encoders."""
import functools
import itertools
import json
import random

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from parts.encoders import Encoder

SYLLABLES = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrst"][:120]


class Given(Encoder):
    """Vectors that are there already: a document's or a query's text is the number of its row."""
    name = "given"

    def __init__(self, vectors, normalised=True):
        self.vectors, self.dim = vectors.astype(np.float32), vectors.shape[1]
        self.normalised = normalised

    def encode_docs(self, docs):
        return self.vectors[[int(doc["text"]) for doc in docs]]

    def encode_queries(self, queries):
        return self.vectors[[int(query) for query in queries]]


def unit(n, dim, seed=0):
    """n random unit rows."""
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def numbered(n):
    return [{"id": f"d{i}", "text": str(i)} for i in range(n)]


def docs_of(*texts):
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


def top(base, query, k=1):
    return [hit.text for hit in base.search([query], k)[0]]


def write_lines(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def flip(file):
    """Changes one bit of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@functools.cache
def facts():
    """A corpus like the embedded world's: two-syllable names, one fact a passage; and questions
    with the numbers of their passages."""
    draw = random.Random(3)
    pairs = draw.sample(list(itertools.product(SYLLABLES, SYLLABLES)), 4800)
    names = iter([(a + b).capitalize() for a, b in pairs])
    texts, questions = [], []
    for name in [next(names) for _ in range(1200)]:
        for attribute in ("capital", "language", "river"):
            questions.append((f"What is the {attribute} of {name}?", len(texts)))
            texts.append(f"{name} has {attribute} {next(names)}.")
    return texts, questions


def flag(colours, size=64):
    image = Image.new("RGB", (size, size))
    for i, colour in enumerate(colours):
        image.paste(colour, (0, i * size // 3, size, (i + 1) * size // 3))
    return image


def flags(folder):
    """Sixty flags with captions, as documents."""
    draw, docs = random.Random(5), []
    for i in range(60):
        colours = [tuple(draw.randrange(256) for _ in range(3)) for _ in range(3)]
        flag(colours).save(folder / f"{i}.png")
        name = SYLLABLES[i].capitalize() + SYLLABLES[59 - i]
        docs.append({"id": str(i), "text": f"flag of {name}.", "image": str(folder / f"{i}.png")})
    return docs


WORDS = ("what is the capital of a country river flag red green blue big small north south play "
         "run un ##able ##s ##ing").split()


def save_wordpiece(folder):
    """A BERT tokenizer.json over WORDS; returns its vocabulary size."""
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *"bcdefghij"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(6)          # published files hold such leftovers: to be undone
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def make_bert(folder, kind="bert", seed=0, extra=0, **changes):
    """A random small BERT or XLM-RoBERTa directory, made by transformers; returns its model."""
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel
    folder.mkdir(exist_ok=True)
    vocab = save_wordpiece(folder) + extra
    config, net = {"bert": (BertConfig, BertModel),
                   "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel)}[kind]
    torch.manual_seed(seed)
    shape = dict(vocab_size=vocab, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                 intermediate_size=96, max_position_embeddings=40, initializer_range=0.2,
                 pad_token_id=1, type_vocab_size=2 if kind == "bert" else 1)
    net = net(config(**{**shape, **changes})).eval()
    with torch.no_grad():       # LayerNorms as different from one another as after training
        for name, parameter in net.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    return net
