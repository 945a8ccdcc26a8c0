"""Encoders with weights: BERT's family for text and tables, CLIP for pictures.

    BERT, XLM-RoBERTa (MiniLM, BGE, E5, BGE-M3)
        text    -> tokens (B, T)             -> blocks -> pooled         -> (B, D)
    CLIP, whose two vectors are summed where a document has both
        text    -> tokens (B, T)             -> blocks -> last token     -> (B, D)
        picture -> pixels (B, 3, side, side) -> blocks -> summary vector -> (B, D)

`load_encoder` opens a model directory as transformers writes it, or an encoder without weights
(parts/encoders.py) by its name.

Shapes: N documents or queries, B batch, T tokens, H heads, D dimension of a vector, P patches,
W width of a tower.
"""
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from parts.corpora import MARKERS
from parts.encoders import WEIGHT_FREE, Encoder, passage, split_query, texts_only
from parts.vision import load_picture, picture_settings
from plumbing.files import checksum, read_json
from plumbing.options import check_options, fill, option
from plumbing.weights import read_tokenizer, read_weights, usable_device, weight_files


@dataclass(frozen=True)
class EncoderOptions:
    """How an encoder with weights is used. Those that shape documents' vectors are part of its
    fingerprint."""
    pooling: str = option("", "cls, mean or pooler; default: what the directory says, else cls")
    normalise: bool = option(True, "vectors of length one; without, scores are raw inner products "
                                   "(needs --index flat)")
    passage_prefix: str = option("", "put before every document, e.g. 'passage: ' for E5")
    query_prefix: str = option("", "put before every query")
    max_length: int = option(0, "tokens of a document; default: what the directory says",
                             most=2**30)
    query_length: int = option(0, "tokens of a query, 64 for Open-WikiTable; default: max_length",
                               most=2**30)
    query_model: str = option("", "directory of another encoder for queries (Open-WikiTable has "
                                  "two)")
    markers: bool = option(False, "add Open-WikiTable's eight table markers to the tokenizer")
    batch_tokens: int = option(0, "tokens in a batch, padding included; 0: 2048 on the CPU (its "
                                  "caches), 65536 on CUDA", most=2**30)

    def __post_init__(self):
        check_options(self)

    def chosen(self):
        """{name: value} of the options that differ from their defaults: what a base remembers."""
        defaults = asdict(EncoderOptions())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


# ----------------------------------------------------------------------------------------- blocks

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "quick_gelu": quick_gelu}


def size(most=1_000_000, **more):
    """A size in a foreign config.json; it has to be there, unless it has a default."""
    return option(least=1, most=most, **more)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes of a stack of blocks, by the names that config.json has for them."""
    hidden_size: int = size()
    intermediate_size: int = size()
    num_hidden_layers: int = size(most=1000)
    num_attention_heads: int = size()
    hidden_act: str = option("gelu", choices=tuple(ACTIVATIONS))
    layer_norm_eps: float = option(1e-12)

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of "
                             f"num_attention_heads {self.num_attention_heads}")


class Block(nn.Module):
    """A transformer block of a BlockConfig: BERT normalises after each residual sum, CLIP (pre)
    before each sub-layer."""

    def __init__(self, c, pre=False, causal=False):
        super().__init__()
        width, inner = c.hidden_size, c.intermediate_size
        self.heads, self.pre, self.causal = c.num_attention_heads, pre, causal
        self.act = ACTIVATIONS[c.hidden_act]
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1 = nn.LayerNorm(width, c.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, c.layer_norm_eps)

    def split(self, x):
        """(B, T, W) -> (B, H, T, W / H)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attend(self, x, mask):
        """Self-attention of x (B, T, W)."""
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))                           # (B, T, W)

    def mlp(self, x):
        return self.down(self.act(self.up(x)))

    def forward(self, x, mask=None):
        """x (B, T, W), mask (B, 1, 1, T) bool, True where a token may be seen, or None where all
        may."""
        if self.pre:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.mlp(x))


def renaming(rules, unused):
    """A function that gives our name of a published key, by every rule in turn; None for one that
    matches `unused`."""
    def rename(key):
        name = key
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        return None if re.search(unused, name) else name
    return rename


def load_weights(module, path, rename, device):
    """Fills a module made on the meta device from the directory's safetensors."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    tensors = read_weights(weight_files(path), shapes, rename, dtype=precision(device),
                           device=device)
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def precision(device):
    """Half precision on CUDA, single on the CPU, where half is slower."""
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def token_batches(encoder, texts):
    """Batches of an encoder's tokens: positions in `texts` (list), ids (B, T) and lengths (B,).

    The longest come first and similar lengths together, so that little is padding, which stands
    behind the tokens. Texts that the tokenizer cut are counted in `encoder.cut`.
    """
    encodings = encoder.tokenizer.encode_batch(texts)
    encoder.cut += sum(bool(encoding.overflowing) for encoding in encodings)
    tokens = [encoding.ids for encoding in encodings]
    lengths = [len(ids) for ids in tokens]
    order = sorted(range(len(tokens)), key=lengths.__getitem__, reverse=True)
    on_cuda = torch.device(encoder.device).type == "cuda"
    budget = encoder.settings.batch_tokens or (65536 if on_cuda else 2048)
    while order:
        longest = lengths[order[0]]
        count = max(budget // longest, 1)
        batch, order = order[:count], order[count:]
        padded = [tokens[i] + [0] * (longest - lengths[i]) for i in batch]
        ids = torch.tensor(padded, device=encoder.device)
        yield batch, ids, torch.tensor([lengths[i] for i in batch], device=encoder.device)


PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")


def model_print(paths, *options):
    """A hash of model directories (config, tokenizer, weights) and of the options that shape
    document vectors."""
    sums = []
    for path in paths:
        settings = [Path(path) / name for name in ("config.json", "tokenizer.json", *PICTURE_FILES)]
        for file in settings + weight_files(path):
            if file.is_file():
                sums.append(checksum(file)["sha256"])
    return hashlib.sha256(json.dumps([sums, options]).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------- BERT and XLM-RoBERTa

@dataclass(frozen=True, kw_only=True)
class BertConfig(BlockConfig):
    """What config.json says of a model of the BERT family."""
    model_type: str = option(choices=("bert", "roberta", "xlm-roberta"))
    vocab_size: int = size()
    max_position_embeddings: int = size()
    type_vocab_size: int = size(default=2)
    pad_token_id: int = option(1)
    position_embedding_type: str = option("absolute", choices=("absolute",))
    is_decoder: bool = option(False, choices=(False,))

    def __post_init__(self):
        super().__post_init__()
        if self.first_position >= self.max_position_embeddings:
            raise ValueError(f"pad_token_id is {self.pad_token_id}: that leaves a text none of the "
                             f"{self.max_position_embeddings} positions")

    @property
    def first_position(self):
        """Of the first token: RoBERTa counts from behind the padding's id."""
        return self.pad_token_id + 1 if "roberta" in self.model_type else 0


class Bert(nn.Module):
    """BERT and XLM-RoBERTa: token, position and type embeddings, then blocks (Devlin et al.,
    2018)."""

    def __init__(self, c, with_pooler):
        super().__init__()
        width = c.hidden_size
        self.words = nn.Embedding(c.vocab_size, width)
        self.positions = nn.Embedding(c.max_position_embeddings, width)
        self.types = nn.Embedding(c.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, c.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.pooler = nn.Linear(width, width) if with_pooler else None
        self.first_position = c.first_position

    def forward(self, ids, mask):
        """Hidden states (B, T, W) of ids (B, T); mask (B, T) bool, True at tokens, False at the
        padding behind them."""
        positions = torch.arange(ids.shape[1], device=ids.device) + self.first_position     # (T,)
        x = self.words(ids) + self.types.weight[0] + self.positions(positions)
        x = self.norm(x)                                                        # (B, T, W)
        visible = None if mask.all() else mask[:, None, None]                   # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, visible)
        return x


BERT_NAMES = [      # published name -> ours, every rule in turn
    (r"^(bert|roberta)\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"),
    (r"^embeddings\.word_embeddings", "words"), (r"^embeddings\.position_embeddings", "positions"),
    (r"^embeddings\.token_type_embeddings", "types"), (r"^embeddings\.LayerNorm", "norm"),
    (r"^encoder\.layer\.", "blocks."), (r"\.attention\.self\.query", ".q"),
    (r"\.attention\.self\.key", ".k"), (r"\.attention\.self\.value", ".v"),
    (r"\.attention\.output\.dense", ".out"), (r"\.attention\.output\.LayerNorm", ".norm1"),
    (r"\.intermediate\.dense", ".up"), (r"\.output\.dense", ".down"),
    (r"\.output\.LayerNorm", ".norm2"), (r"^pooler\.dense", "pooler")]
BERT_UNUSED = r"^(cls|lm_head|classifier)\.|position_ids$|token_type_ids$"
POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class SentenceConfig:
    """sentence_bert_config.json, as sentence-transformers writes it."""
    max_seq_length: int = option(None, least=1)


class TextModel:
    """One directory of the BERT family: texts in, vectors out."""

    def __init__(self, path, settings, device):
        path = Path(path)
        file = path / "config.json"
        config = fill(BertConfig, read_json(file), file)
        check_modules(path / "modules.json")
        self.settings, self.device = settings, device
        self.dim, self.cut = config.hidden_size, 0
        self.pooling = settings.pooling or directory_pooling(path)
        if self.pooling not in ("cls", "mean", "pooler"):
            raise ValueError(f"{path}: pooling is {self.pooling!r}: give cls or mean or pooler")
        with_pooler = self.pooling == "pooler"
        with torch.device("meta"):
            net = Bert(config, with_pooler)
        unused = BERT_UNUSED if with_pooler else BERT_UNUSED + r"|^pooler\."
        self.net = load_weights(net, path, renaming(BERT_NAMES, unused), device)
        self.tokenizer = read_tokenizer(path)
        if settings.markers:
            self.tokenizer.add_tokens(list(MARKERS))
        tokens = self.tokenizer.get_vocab_size()
        if tokens > config.vocab_size:
            raise ValueError(f"{path}: the tokenizer has {tokens} tokens, the model "
                             f"{config.vocab_size}")
        room = config.max_position_embeddings - config.first_position
        length = settings.max_length or directory_length(path) or room
        self.length = min(length, room)                         # tokens of a text

    @torch.inference_mode()
    def __call__(self, texts, length=0):
        """Texts, cut at `length` tokens (0: what the directory says), to rows (N, D) float32."""
        self.tokenizer.enable_truncation(min(length or self.length, self.length))
        rows = np.empty((len(texts), self.dim), np.float32)
        for batch, ids, lengths in token_batches(self, texts):
            places = torch.arange(ids.shape[1], device=self.device)
            mask = places < lengths[:, None]                                    # (B, T)
            vectors = self.pool(self.net(ids, mask), mask).float()              # (B, D)
            if self.settings.normalise:
                vectors = F.normalize(vectors, dim=1)
            rows[batch] = vectors.cpu().numpy()
        return rows

    def pool(self, hidden, mask):
        """Hidden states (B, T, W) to one vector a text (B, D)."""
        if self.pooling == "mean":
            return (hidden.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        first = hidden[:, 0]
        return first if self.pooling == "cls" else torch.tanh(self.net.pooler(first))


def check_modules(file):
    """ValueError where modules.json lists a step from text to vector that is not taken here, such
    as a Dense layer."""
    if not file.is_file():
        return
    for module in read_json(file, kinds=(list,)):
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(kind, str):
            raise ValueError(f"{file}: expected a JSON list of objects that name a type")
        step = kind.rpartition(".")[2]
        if step not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(f"{file}: type is {step!r}: give Transformer or Pooling or Normalize")


def directory_pooling(path):
    """What 1_Pooling/config.json says, as sentence-transformers writes it; cls where there is
    none."""
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return "cls"
    config = read_json(file)
    modes = []
    for name, value in config.items():
        if name.startswith("pooling_mode_") and value is True:
            modes.append(POOLINGS.get(name, name))
    return "+".join(modes) or str(config.get("pooling_mode", "cls"))


def directory_length(path):
    """Tokens of a text, where sentence_bert_config.json says it; else None."""
    file = path / "sentence_bert_config.json"
    if not file.is_file():
        return None
    return fill(SentenceConfig, read_json(file), file).max_seq_length


class TextEncoder(Encoder):
    """Documents and queries through one BERT-family model, or through one each."""

    def __init__(self, path, device="cpu", **options):
        if options.get("query_model"):
            options["query_model"] = os.path.abspath(options["query_model"])
        self.name, self.options = os.path.abspath(path), options
        self.settings = settings = EncoderOptions(**options)
        self.passages = self.questions = TextModel(path, settings, device)
        self.dim, self.normalised = self.passages.dim, settings.normalise
        paths = [path]
        if settings.query_model:
            unmarked = replace(settings, markers=False)     # its tokenizer has no table markers
            self.questions = TextModel(settings.query_model, unmarked, device)
            paths.append(settings.query_model)
        if self.questions.dim != self.dim:
            raise ValueError(f"{settings.query_model}: dimension {self.questions.dim}, {path} has "
                             f"{self.dim}")
        self.identity = model_print(paths, self.passages.pooling, self.passages.length,
                                    settings.normalise, settings.passage_prefix, settings.markers)

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


# ------------------------------------------------------------------------------------------- CLIP

@dataclass(frozen=True)
class ClipConfig:
    """What config.json says of a CLIP model as a whole."""
    text_config: dict = option(None)
    vision_config: dict = option(None)
    projection_dim: int = size(default=512)             # of the space of both towers


@dataclass(frozen=True, kw_only=True)
class TextConfig(BlockConfig):
    """Sizes of the tower of words."""
    vocab_size: int = size()
    max_position_embeddings: int = size()


@dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockConfig):
    """Sizes of the tower of pictures."""
    image_size: int = size()                            # pixels of a side
    patch_size: int = size()                            # pixels of a side


CLIP_TEXT = dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                 num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu",
                 layer_norm_eps=1e-5)           # what a published config.json may leave out
CLIP_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                   num_attention_heads=12, image_size=224, patch_size=32, hidden_act="quick_gelu",
                   layer_norm_eps=1e-5)


class Tower(nn.Module):
    """One half of CLIP (Radford et al., 2021): embeddings, blocks, norm, projection into the common
    space, of a TextConfig or a VisionConfig."""

    def __init__(self, c, dim):
        super().__init__()
        width, eps = c.hidden_size, c.layer_norm_eps
        of_words = isinstance(c, TextConfig)
        if of_words:
            places = c.max_position_embeddings
            self.words = nn.Embedding(c.vocab_size, width)
        else:
            places = (c.image_size // c.patch_size) ** 2 + 1
            self.patches = nn.Conv2d(3, width, c.patch_size, c.patch_size, bias=False)
            self.summary = nn.Parameter(torch.empty(width))
            self.norm0 = nn.LayerNorm(width, eps)
        self.positions = nn.Embedding(places, width)
        self.blocks = nn.ModuleList()
        for _ in range(c.num_hidden_layers):
            self.blocks.append(Block(c, pre=True, causal=of_words))
        self.norm = nn.LayerNorm(width, eps)
        self.projection = nn.Linear(width, dim, bias=False)

    def embed_text(self, ids, lengths):
        """Token ids (B, T), padded behind their lengths (B,), to (B, D): the last token's state,
        which has seen all."""
        x = self.words(ids) + self.positions.weight[:ids.shape[1]]              # (B, T, W)
        for block in self.blocks:
            x = block(x)
        last = x[torch.arange(len(x)), lengths - 1]                             # (B, W)
        return self.projection(self.norm(last))

    def embed_pictures(self, pixels):
        """Pixels (B, 3, side, side) to (B, D): the state of the summary vector before the
        patches."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)               # (B, P, W)
        summary = self.summary.expand(len(patches), 1, -1)                      # (B, 1, W)
        x = torch.cat([summary, patches], 1) + self.positions.weight            # (B, 1 + P, W)
        x = self.norm0(x)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x[:, 0]))


CLIP_NAMES = [
    (r"^(text|vision)_model\.", r"\1."), (r"^text_projection", "text.projection"),
    (r"^visual_projection", "vision.projection"), (r"\.embeddings\.token_embedding", ".words"),
    (r"\.embeddings\.position_embedding", ".positions"),
    (r"\.embeddings\.patch_embedding", ".patches"), (r"\.embeddings\.class_embedding", ".summary"),
    (r"\.encoder\.layers\.", ".blocks."), (r"\.self_attn\.(q|k|v)_proj", r".\1"),
    (r"\.self_attn\.out_proj", ".out"), (r"\.layer_norm(\d)", r".norm\1"),
    (r"\.mlp\.fc1", ".up"), (r"\.mlp\.fc2", ".down"), (r"\.pre_layrnorm", ".norm0"),
    (r"\.(final|post)_layer_?norm", ".norm")]
CLIP_UNUSED = r"^logit_scale$|position_ids$"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # of the colours red, green, blue
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder(Encoder):
    """Words and pictures in one space; what has both gets the sum of the two vectors (UniIR's score
    fusion, 2023)."""

    def __init__(self, path, device="cpu", **options):
        file = Path(path) / "config.json"
        config = fill(ClipConfig, read_json(file), file)
        text = fill(TextConfig, CLIP_TEXT | (config.text_config or {}), f"{file}: text_config")
        vision = fill(VisionConfig, CLIP_VISION | (config.vision_config or {}),
                      f"{file}: vision_config")
        self.name, self.options, self.device = os.path.abspath(path), options, device
        self.settings, self.dim, self.cut = EncoderOptions(**options), config.projection_dim, 0
        with torch.device("meta"):
            towers = nn.ModuleDict({"text": Tower(text, self.dim),
                                    "vision": Tower(vision, self.dim)})
        self.towers = load_weights(towers, path, renaming(CLIP_NAMES, CLIP_UNUSED), device)
        self.tokenizer = read_tokenizer(path)
        self.tokenizer.enable_truncation(text.max_position_embeddings)
        self.set_preprocessing(path, vision.image_size)
        self.identity = model_print([path], self.settings.passage_prefix)

    def set_preprocessing(self, path, side):
        """How a picture becomes pixels: what the directory says, or else CLIP's published way to
        pictures of `side` x `side` pixels."""
        has_settings = any((Path(path) / name).is_file() for name in PICTURE_FILES)
        settings = picture_settings(path) if has_settings else {}
        edge, crop = settings.get("size", side), settings.get("crop_size", side)
        if isinstance(edge, dict):
            edge = edge.get("shortest_edge", edge.get("height"))
        if isinstance(crop, dict):
            crop = crop["height"]
        self.edge, self.crop = edge, crop
        self.resample = settings.get("resample", Image.BICUBIC)
        self.mean = np.array(settings.get("image_mean", CLIP_MEAN), np.float32)
        self.std = np.array(settings.get("image_std", CLIP_STD), np.float32)

    def fingerprint(self):
        return self.identity

    def pixels(self, image):
        """A picture for the network: shorter edge resized, middle cut out, normalised: (3, side,
        side) float32."""
        image = load_picture(image)
        short, long = sorted(image.size)
        longer = int(self.edge * long / short)
        new_size = [self.edge if side == short else longer for side in image.size]
        image = image.resize(new_size, self.resample)
        left = (image.width - self.crop) // 2
        top = (image.height - self.crop) // 2
        image = image.crop((left, top, left + self.crop, top + self.crop))
        colours = np.asarray(image, np.float32) / 255                           # (side, side, 3)
        return ((colours - self.mean) / self.std).transpose(2, 0, 1)

    @torch.inference_mode()
    def encode_pairs(self, texts, images):
        """Texts (N, "" for none) and pictures (N, None for none) to unit rows (N, D) float32."""
        total = np.zeros((len(texts), self.dim), np.float32)
        with_text = [i for i, text in enumerate(texts) if text.strip()]
        for batch, ids, lengths in token_batches(self, [texts[i] for i in with_text]):
            vectors = self.towers["text"].embed_text(ids, lengths)              # (B, D)
            total[[with_text[i] for i in batch]] += vectors.float().cpu().numpy()
        with_image = [i for i, image in enumerate(images) if image is not None]
        for start in range(0, len(with_image), 32):
            batch = with_image[start:start + 32]
            pixels = torch.from_numpy(np.stack([self.pixels(images[i]) for i in batch]))
            pixels = pixels.to(self.device, precision(self.device))             # (B, 3, side, side)
            vectors = self.towers["vision"].embed_pictures(pixels)              # (B, D)
            total[batch] += vectors.float().cpu().numpy()
        return F.normalize(torch.from_numpy(total), dim=1).numpy()

    def encode_docs(self, docs):
        texts = []
        for doc in docs:
            text = passage(doc)
            texts.append(text and self.settings.passage_prefix + text)
        return self.encode_pairs(texts, [doc.get("image") for doc in docs])

    def encode_queries(self, queries):
        texts, images = [], []
        for text, image in map(split_query, queries):
            texts.append(text and self.settings.query_prefix + text)
            images.append(image)
        return self.encode_pairs(texts, images)


def load_encoder(path_or_name, device="cpu", **options):
    """An encoder: "lexical", "pixel", or a Hugging Face directory of the BERT family, XLM-RoBERTa
    or CLIP. An Encoder is returned as it is.

    options are the fields of EncoderOptions, for directories only.
    """
    if not isinstance(path_or_name, (str, Path)):
        return path_or_name
    name, device = str(path_or_name), usable_device(device)
    if name in WEIGHT_FREE:
        if options:
            raise ValueError(f"encoder {name!r} takes no options, got "
                             f"{', '.join(sorted(options))}")
        return WEIGHT_FREE[name]()
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(f"unknown encoder {name!r}: give {', '.join(WEIGHT_FREE)} or a directory "
                         "with config.json")
    clip = read_json(file).get("model_type") == "clip"
    return (ClipEncoder if clip else TextEncoder)(name, device, **options)
