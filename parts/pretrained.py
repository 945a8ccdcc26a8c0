"""Encoders: documents and queries become vectors, with and without trained weights.

    {"text", "title", "image"} -> encode_docs    -> (N, D)
    words, picture or both     -> encode_queries -> (Q, D)

    lexical     words without trained weights: seeded random projections, rare words weigh more
    pixel       pictures without trained weights: 8 x 8 mean colours, beside the lexical vector of the caption
    directory   BERT family and XLM-RoBERTa (MiniLM, BGE, E5, BGE-M3) for text and tables, CLIP for pictures

Shapes: N documents, Q queries, B batch, T tokens, H heads, D dimension of a vector, W words, V different words.

Deviation from the released code: the lexical and pixel encoders are ours, since the embedded world must run without
downloads.
"""
import hashlib
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from parts.corpora import MARKERS
from parts.encoders import WEIGHT_FREE, Encoder, passage, split_query, texts_only
from parts.vision import load_picture, picture_settings
from plumbing.old import (checksum, known_value, option_encode as option, read_json, usable_device,
                          whole)
from plumbing.weights import load_weights, precision, read_tokenizer, weight_files


# ------------------------------------------------------------------------------------------------- transformer encoders

@dataclass(frozen=True)
class EncoderOptions:
    """How an encoder with weights is used. Those that shape documents' vectors are part of its fingerprint."""
    pooling: str = option("", "cls, mean or pooler; default: what the directory says, else cls")
    normalise: bool = option(True, "vectors of length one; without, scores are raw inner products (needs --index flat)")
    passage_prefix: str = option("", "put before every document, e.g. 'passage: ' for E5")
    query_prefix: str = option("", "put before every query")
    max_length: int = option(0, "tokens of a document; default: what the directory says")
    query_length: int = option(0, "tokens of a query, 64 for Open-WikiTable; default: max_length")
    query_model: str = option("", "directory of another encoder for queries (Open-WikiTable has two)")
    markers: bool = option(False, "add Open-WikiTable's eight table markers to the tokenizer")
    batch_tokens: int = option(0, "tokens in a batch, padding included; 0: 2048 on the CPU (its caches), 65536 on CUDA")

    def __post_init__(self):
        for name in ("max_length", "query_length", "batch_tokens"):
            whole(getattr(self, name), name, least=0, most=2 ** 30)


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class Block(nn.Module):
    """A transformer block of config `c`: BERT normalises after each residual sum, CLIP (pre) before each sub-layer."""

    def __init__(self, c, eps, pre=False, causal=False):
        super().__init__()
        width, inner, self.heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        act = c.get("hidden_act", "quick_gelu" if pre else "gelu")
        self.act, self.pre, self.causal = ACTIVATIONS[act], pre, causal
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def attend(self, x, mask):
        """Self-attention of x (B, T, D)."""
        heads = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k, v = heads  # (B, H, T, D / H) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def mlp(self, x):
        return self.down(self.act(self.up(x)))

    def forward(self, x, mask=None):
        """x (B, T, D), mask (B, 1, 1, T) bool, True where a token may be seen, or None where all may."""
        if self.pre:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.mlp(x))


class Bert(nn.Module):
    """BERT and XLM-RoBERTa: token, position and type embeddings, then blocks (Devlin et al., 2018)."""

    def __init__(self, c, with_pooler):
        super().__init__()
        width, eps = c["hidden_size"], c.get("layer_norm_eps", 1e-12)
        self.words = nn.Embedding(c["vocab_size"], width)
        self.positions = nn.Embedding(c["max_position_embeddings"], width)
        self.types = nn.Embedding(c.get("type_vocab_size", 2), width)
        self.norm = nn.LayerNorm(width, eps)
        self.blocks = nn.ModuleList(Block(c, eps) for _ in range(c["num_hidden_layers"]))
        self.pooler = nn.Linear(width, width) if with_pooler else None
        self.first = c.get("pad_token_id", 1) + 1 if "roberta" in c["model_type"] else 0  # position of the first token

    def forward(self, ids, mask):
        """Hidden states (B, T, D) of ids (B, T); mask (B, T) bool, True at tokens, False at the padding behind them."""
        place = torch.arange(ids.shape[1], device=ids.device) + self.first
        x = self.norm(self.words(ids) + self.types.weight[0] + self.positions(place))  # (B, T, D)
        seen = None if mask.all() else mask[:, None, None]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, seen)
        return x
BERT_TYPES = ("bert", "roberta", "xlm-roberta")
BERT_NAMES = [  # published name -> ours, every rule in turn
    (r"^(bert|roberta)\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"),
    (r"^embeddings\.word_embeddings", "words"), (r"^embeddings\.position_embeddings", "positions"),
    (r"^embeddings\.token_type_embeddings", "types"), (r"^embeddings\.LayerNorm", "norm"),
    (r"^encoder\.layer\.", "blocks."), (r"\.attention\.self\.query", ".q"), (r"\.attention\.self\.key", ".k"),
    (r"\.attention\.self\.value", ".v"), (r"\.attention\.output\.dense", ".out"),
    (r"\.attention\.output\.LayerNorm", ".norm1"), (r"\.intermediate\.dense", ".up"),
    (r"\.output\.dense", ".down"), (r"\.output\.LayerNorm", ".norm2"), (r"^pooler\.dense", "pooler")]
BERT_UNUSED = r"^(cls|lm_head|classifier)\.|position_ids$|token_type_ids$"


def token_batches(encoder, texts):
    """Batches of an encoder's tokens: positions in `texts` (list), ids (B, T) and lengths (B,).

    The longest come first and similar lengths together, so that little is padding, which stands behind the tokens.
    Texts that the tokenizer cut are counted in `encoder.cut`.
    """
    encodings = encoder.tokenizer.encode_batch(texts)
    encoder.cut += sum(bool(encoding.overflowing) for encoding in encodings)
    tokens = [encoding.ids for encoding in encodings]
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    budget = encoder.settings.batch_tokens or (65536 if torch.device(encoder.device).type == "cuda" else 2048)
    while order:
        longest = len(tokens[order[0]])
        size = max(budget // longest, 1)
        batch, order = order[:size], order[size:]
        ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in batch], device=encoder.device)
        yield batch, ids, torch.tensor([len(tokens[i]) for i in batch], device=encoder.device)


class TextModel:
    """One directory of the BERT family: texts in, vectors out."""

    def __init__(self, path, settings, device):
        config = check_bert(read_json(Path(path) / "config.json"), path)
        check_modules(path)
        self.settings, self.device, self.dim, self.cut = settings, device, config["hidden_size"], 0
        pooling = settings.pooling or directory_pooling(path)
        self.pooling = known_value(f"{path}: pooling", pooling, ("cls", "mean", "pooler"))
        with torch.device("meta"):
            net = Bert(config, with_pooler=self.pooling == "pooler")
        net = load_weights(net, path, BERT_NAMES, BERT_UNUSED + ("" if net.pooler else r"|^pooler\."))
        self.net = net.to(device, precision(device)).eval()
        self.tokenizer = read_tokenizer(path)
        if settings.markers:
            self.tokenizer.add_tokens(list(MARKERS))
        if (size := self.tokenizer.get_vocab_size()) > config["vocab_size"]:
            raise ValueError(f"{path}: the tokenizer has {size} tokens, the model {config['vocab_size']}")
        room = config["max_position_embeddings"] - self.net.first
        file = Path(path) / "sentence_bert_config.json"
        said = read_json(file).get("max_seq_length") if file.is_file() else None
        if said is not None:
            whole(said, f"{file}: max_seq_length")
        self.length = min(settings.max_length or said or room, room)

    @torch.inference_mode()
    def __call__(self, texts, length=0):
        """Texts, cut at `length` tokens (0: what the directory says), to rows (N, D) float32."""
        self.tokenizer.enable_truncation(min(length or self.length, self.length))
        out = np.empty((len(texts), self.dim), np.float32)
        for batch, ids, sizes in token_batches(self, texts):
            mask = torch.arange(ids.shape[1], device=self.device) < sizes[:, None]  # (B, T)
            vectors = self.pool(self.net(ids, mask), mask).float()  # (B, D)
            out[batch] = (F.normalize(vectors, dim=1) if self.settings.normalise else vectors).cpu().numpy()
        return out

    def pool(self, hidden, mask):
        """Hidden states (B, T, D) to one vector a text (B, D)."""
        if self.pooling == "mean":
            return (hidden.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return hidden[:, 0] if self.pooling == "cls" else torch.tanh(self.net.pooler(hidden[:, 0]))


BERT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings")


def check_bert(config, path):
    """The config of a BERT-family model, if this file can run it."""
    place = f"{path}/config.json"
    known_value(f"{place}: model_type", config.get("model_type"), BERT_TYPES)
    if absent := sorted(set(BERT_SIZES) - set(config)):
        raise ValueError(f"{place}: {', '.join(absent)} missing")
    check_sizes({"type_vocab_size": 2, "hidden_act": "gelu", **config}, (*BERT_SIZES, "type_vocab_size"), place)
    if "roberta" in config["model_type"]:  # positions are counted from behind the padding's id
        whole(config.get("pad_token_id", 1), f"{place}: pad_token_id", 0, config["max_position_embeddings"] - 2)
    positions = config.get("position_embedding_type") or "absolute"
    known_value(f"{place}: position_embedding_type", positions, ["absolute"])
    known_value(f"{place}: is_decoder", config.get("is_decoder") or False, [False])
    return config


def check_sizes(c, names, place):
    """ValueError for sizes that cannot be, before anything is allocated."""
    for name in names:
        whole(c[name], f"{place}: {name}", most=1000 if name == "num_hidden_layers" else 1_000_000)
    if c["hidden_size"] % c["num_attention_heads"]:
        raise ValueError(f"{place}: hidden_size {c['hidden_size']} is no multiple of num_attention_heads "
                         f"{c['num_attention_heads']}")
    known_value(f"{place}: hidden_act", c["hidden_act"], list(ACTIVATIONS))


def check_modules(path):
    """ValueError where modules.json lists a step from text to vector that is not taken here, such as a Dense layer."""
    file = Path(path) / "modules.json"
    try:
        kinds = [module["type"].rpartition(".")[2] for module in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{file}: expected a JSON list of objects that name a type") from None
    for kind in kinds:
        known_value(f"{file}: type", kind, ("Transformer", "Pooling", "Normalize"))


def directory_pooling(path):
    """What 1_Pooling/config.json says, as sentence-transformers writes it; cls where there is none."""
    file = Path(path) / "1_Pooling" / "config.json"
    if not file.is_file():
        return "cls"
    config = read_json(file)
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    return "+".join(names.get(name, name) for name in chosen) or str(config.get("pooling_mode", "cls"))


class TextEncoder(Encoder):
    """Documents and queries through one BERT-family model, or through one each."""

    def __init__(self, path, device="cpu", **options):
        if options.get("query_model"):
            options["query_model"] = os.path.abspath(options["query_model"])
        self.name, self.options = os.path.abspath(path), options
        self.settings = settings = make_settings(options)
        self.passages = TextModel(path, settings, device)
        asked = replace(settings, markers=False)  # the question tokenizer has no table markers
        self.questions = TextModel(settings.query_model, asked, device) if settings.query_model else self.passages
        self.dim, self.normalised = self.passages.dim, settings.normalise
        if self.questions.dim != self.dim:
            raise ValueError(f"{settings.query_model}: dimension {self.questions.dim}, {path} has {self.dim}")
        self.identity = model_print([path] + [settings.query_model] * bool(settings.query_model), self.passages.pooling,
                                 self.passages.length, settings.normalise, settings.passage_prefix, settings.markers)

    def fingerprint(self):
        return self.identity

    @property
    def cut(self):
        return sum(model.cut for model in {self.passages, self.questions})

    def encode_docs(self, docs):
        return self.passages([self.settings.passage_prefix + passage(doc) for doc in docs])

    def encode_queries(self, queries):
        texts = [self.settings.query_prefix + text for text in texts_only(queries)]
        return self.questions(texts, self.settings.query_length)


def model_print(paths, *options):
    """A hash of model directories (config, tokenizer, weights) and of the options that shape document vectors."""
    names = ("config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")
    files = [file for path in paths for file in [*(Path(path) / name for name in names), *weight_files(path)]]
    sums = [checksum(file)["sha256"] for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([sums, options]).encode()).hexdigest()[:32]


class Tower(nn.Module):
    """One half of CLIP (Radford et al., 2021): embeddings, blocks, norm, projection into the common space."""

    def __init__(self, c, projection, picture):
        super().__init__()
        width, eps = c["hidden_size"], c.get("layer_norm_eps", 1e-5)
        places = (c["image_size"] // c["patch_size"]) ** 2 + 1 if picture else c["max_position_embeddings"]
        if picture:
            self.patches = nn.Conv2d(3, width, c["patch_size"], c["patch_size"], bias=False)
            self.summary = nn.Parameter(torch.empty(width))
            self.norm0 = nn.LayerNorm(width, eps)
        else:
            self.words = nn.Embedding(c["vocab_size"], width)
        self.positions = nn.Embedding(places, width)
        self.blocks = nn.ModuleList(Block(c, eps, pre=True, causal=not picture) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.LayerNorm(width, eps)
        self.projection = nn.Linear(width, projection, bias=False)

    def embed_text(self, ids, sizes):
        """Token ids (B, T), padded behind their sizes (B,), to (B, D): the last token's state, which has seen all."""
        x = self.words(ids) + self.positions.weight[:ids.shape[1]]  # (B, T, width)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x[torch.arange(len(x)), sizes - 1]))

    def embed_pictures(self, pixels):
        """Pixels (B, 3, side, side) to (B, D): the state of the summary vector before the patches."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.summary.expand(len(x), 1, -1), x], 1) + self.positions.weight  # (B, 1 + patches, width)
        x = self.norm0(x)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x[:, 0]))


CLIP_NAMES = [
    (r"^(text|vision)_model\.", r"\1."), (r"^text_projection", "text.projection"),
    (r"^visual_projection", "vision.projection"), (r"\.embeddings\.token_embedding", ".words"),
    (r"\.embeddings\.position_embedding", ".positions"),
    (r"\.embeddings\.patch_embedding", ".patches"), (r"\.embeddings\.class_embedding", ".summary"),
    (r"\.encoder\.layers\.", ".blocks."), (r"\.self_attn\.(q|k|v)_proj", r".\1"), (r"\.self_attn\.out_proj", ".out"),
    (r"\.layer_norm(\d)", r".norm\1"), (r"\.mlp\.fc1", ".up"), (r"\.mlp\.fc2", ".down"),
    (r"\.pre_layrnorm", ".norm0"), (r"\.(final|post)_layer_?norm", ".norm")]
CLIP_UNUSED = r"^logit_scale$|position_ids$"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_TEXT = dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                 max_position_embeddings=77)  # what a published config.json may leave out
CLIP_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                   image_size=224, patch_size=32)


class ClipEncoder(Encoder):
    """Words and pictures in one space; what has both gets the sum of the two vectors (UniIR's score fusion, 2023)."""

    def __init__(self, path, device="cpu", **options):
        config = read_json(Path(path) / "config.json")
        text, vision = ({"hidden_act": "quick_gelu", **defaults, **(config.get(f"{name}_config") or {})}
                        for name, defaults in (("text", CLIP_TEXT), ("vision", CLIP_VISION)))
        for c, names in ((text, CLIP_TEXT), (vision, CLIP_VISION)):
            check_sizes(c, names, f"{path}/config.json")
        self.name, self.options, self.device, self.cut = os.path.abspath(path), options, device, 0
        self.settings, self.dim = make_settings(options), config.get("projection_dim", 512)
        whole(self.dim, f"{path}/config.json: projection_dim")
        with torch.device("meta"):
            towers = nn.ModuleDict({"text": Tower(text, self.dim, picture=False),
                                    "vision": Tower(vision, self.dim, picture=True)})
        self.towers = load_weights(towers, path, CLIP_NAMES, CLIP_UNUSED).to(device, precision(device)).eval()
        self.tokenizer = read_tokenizer(path)
        self.tokenizer.enable_truncation(text["max_position_embeddings"])
        known = any((Path(path) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
        said = picture_settings(path) if known else {}
        edge, crop = (said.get(name, vision["image_size"]) for name in ("size", "crop_size"))
        self.edge = edge.get("shortest_edge", edge.get("height")) if isinstance(edge, dict) else edge
        self.crop = crop["height"] if isinstance(crop, dict) else crop
        self.resample = said.get("resample", Image.BICUBIC)
        self.mean = np.array(said.get("image_mean", CLIP_MEAN), np.float32)
        self.std = np.array(said.get("image_std", CLIP_STD), np.float32)
        self.identity = model_print([path], self.settings.passage_prefix)

    def fingerprint(self):
        return self.identity

    def pixels(self, image):
        """A picture for the network: shorter edge resized, middle cut out, normalised: (3, side, side) float32."""
        image = load_picture(image)
        short, long = sorted(image.size)
        size = [self.edge if n == short else int(self.edge * long / short) for n in image.size]
        image = image.resize(size, self.resample)
        left, top = (image.width - self.crop) // 2, (image.height - self.crop) // 2
        image = image.crop((left, top, left + self.crop, top + self.crop))
        return ((np.asarray(image, np.float32) / 255 - self.mean) / self.std).transpose(2, 0, 1)

    @torch.inference_mode()
    def encode_pairs(self, texts, images):
        """Texts (N, "" for none) and pictures (N, None for none) to unit rows (N, D) float32."""
        total = np.zeros((len(texts), self.dim), np.float32)
        worded = [i for i, text in enumerate(texts) if text.strip()]
        for batch, ids, sizes in token_batches(self, [texts[i] for i in worded]):
            total[[worded[i] for i in batch]] += self.towers["text"].embed_text(ids, sizes).float().cpu().numpy()
        pictured = [i for i, image in enumerate(images) if image is not None]
        for start in range(0, len(pictured), 32):
            batch = pictured[start:start + 32]
            pixels = torch.from_numpy(np.stack([self.pixels(images[i]) for i in batch]))  # (B, 3, side, side)
            pixels = pixels.to(self.device, precision(self.device))
            total[batch] += self.towers["vision"].embed_pictures(pixels).float().cpu().numpy()
        return F.normalize(torch.from_numpy(total), dim=1).numpy()

    def encode_docs(self, docs):
        texts = [passage(doc) and self.settings.passage_prefix + passage(doc) for doc in docs]
        return self.encode_pairs(texts, [doc.get("image") for doc in docs])

    def encode_queries(self, queries):
        pairs = [split_query(query) for query in queries]
        texts = [text and self.settings.query_prefix + text for text, _ in pairs]
        return self.encode_pairs(texts, [image for _, image in pairs])


def make_settings(options):
    """EncoderOptions from keyword arguments."""
    for name in options:
        known_value("encoder option", name, [f.name for f in fields(EncoderOptions)])
    return EncoderOptions(**options)


def load_encoder(path_or_name, device="cpu", **options):
    """An encoder: "lexical", "pixel", or a Hugging Face directory of the BERT family, XLM-RoBERTa or CLIP.

    options are the fields of EncoderOptions, for directories only.
    """
    name, device = str(path_or_name), usable_device(device)
    if name in WEIGHT_FREE:
        if options:
            raise ValueError(f"encoder {name!r} takes no options, got {', '.join(sorted(options))}")
        return WEIGHT_FREE[name]()
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"unknown encoder {name!r}: give {', '.join(WEIGHT_FREE)} or a directory with config.json")
    kind = read_json(Path(name) / "config.json").get("model_type")
    known_value(f"{name}: model_type", kind, (*BERT_TYPES, "clip"))
    return (ClipEncoder if kind == "clip" else TextEncoder)(name, device, **options)
