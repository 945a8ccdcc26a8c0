"""Knowledge bases: documents become vectors, vectors become an HNSW graph, a query becomes its nearest documents.

    documents (JSONL) -> encoder.encode_docs -> (N, D) -> shards of index + documents -> folder on disk
    query (words, picture or both) -> encoder.encode_queries -> (Q, D) -> search of every shard -> merge -> hits

R1-Router asks three such bases (text, text-image, table). They differ only in documents and encoder:
  lexical   words without any trained weight: seeded random projections of words, weighted by their rarity
  pixel     pictures without any trained weight: 8 x 8 mean colours, beside the lexical vector of the caption

Shapes: N documents, Q queries, D dimension of a vector, K hits, W words of a batch, V different words of a batch.

Deviations from the paper and the released code, and why:
  * the released code searches all vectors by brute force and loads them anew for each question; here an HNSW graph
    (Malkov & Yashunin 2016) is loaded once and searched in batches, and exact search stays as an option;
  * the lexical and pixel encoders are ours: the embedded world must run without downloads;
  * a picture query whose words are unknown to the base is led by the picture: see Pixel.encode_queries.
"""
import argparse
import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import hnswlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

FORMAT = 1  # of the folder that save() writes; another number is refused
OVERFETCH = 8  # hits fetched beyond k, so that equal scores around the k-th place are settled by document order
CHUNK = 65536  # rows that exact search scores at a time


# ------------------------------------------------------------------------------------------------ documents

@dataclass(frozen=True)
class Hit:
    """A document that was found: its id, its words (title first), its score, and the path of its picture or None."""
    id: str
    text: str
    score: float
    image: str | None = None


def read_docs(path):
    """Yields {"id", "text", "title", "image"} for each line of a JSONL file, in order.

    `id` and `text` are required; `title` is "" and `image` None where absent. An image path is relative to the file and
    comes back joined to the file's folder. A row that does not fit raises ValueError with file and line.
    """
    path = Path(path)
    try:
        lines = open(path, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): give a JSONL file of documents") from None
    with lines:
        for number, line in enumerate(decoded(lines, path), 1):
            if line.strip():
                yield parse_doc(line, path.parent, f"{path}:{number}")


def decoded(lines, path):
    """Lines of a text file; bytes that are not UTF-8 become a ValueError that names the file."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}): convert the file") from None


def parse_doc(line, folder, place):
    """One JSON line as a document; `place` (file:line) stands in the error."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg}): expected one object a line with id and text") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with id and text, found {type(row).__name__}")
    image = row.get("image")
    if isinstance(image, str):
        row["image"] = os.path.join(folder, image)
    return checked_doc(row, place)


def checked_doc(row, place):
    """A document with exactly the four fields, all of the right type; an integer id becomes a string."""
    doc = {"id": row.get("id"), "text": row.get("text"), "title": row.get("title") or "", "image": row.get("image")}
    if type(doc["id"]) is int:
        doc["id"] = str(doc["id"])
    for field, kinds in (("id", str), ("text", str), ("title", str), ("image", (str, type(None)))):
        if not isinstance(doc[field], kinds):
            found = "missing" if row.get(field) is None else type(row[field]).__name__
            raise ValueError(f"{place}: field {field!r} must be a string, it is {found}")
    return doc


def passage(doc):
    """What is encoded and shown of a document: the title, then the words."""
    return f"{doc['title']} {doc['text']}" if doc["title"] else doc["text"]


def split_query(query):
    """A query as (text, image): a string, or a dict with "text", "image" (a path or a PIL image) or both."""
    text, image = (query.get("text") or "", query.get("image")) if isinstance(query, dict) else (query, None)
    if not isinstance(text, str):
        raise ValueError(f"a query is a string or {{'text', 'image'}}, not {query!r}")
    return text, image


def open_image(image):
    """A path or a PIL image as an RGB PIL image; anything that is no picture raises ValueError."""
    try:
        return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{image}: not a picture that Pillow can read ({error})") from None


# ------------------------------------------------------------------------------------------------ encoders

WORD = re.compile(r"\d+|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")  # Han and kana: one by one
STOP = frozenset("a an and are at be by did do does for from had has have he her his how in is it its of on or she that "
                 "the their there these they this those to was were what when where which who whom whose why with".split())
STOP_WEIGHT = 0.3
NGRAM_SHARE = 0.4  # of a known word's vector; see word_vector


class Encoder:
    """Turns documents and queries into rows of one vector space; what all encoders have in common.

    `name` and `dim` describe it, `fingerprint()` tells two of one name apart, `state()` is what must travel with a base.
    """
    name, dim, normalised = "", 0, True

    def fit(self, docs):
        """Learns what it needs from the corpus (an iterable of documents, read once). Most encoders need nothing."""

    def state(self):
        """What fit() learned, as a dict for JSON."""
        return {}

    def fingerprint(self):
        """A short string that changes where the vectors of the same text would change (fit aside)."""
        return f"{self.name}-{self.dim}-v1"

    def similarity(self, a, b):
        """Cosine of two texts, from -1 to 1."""
        x, y = self.encode_queries([a, b])
        return float(x @ y)


@lru_cache(maxsize=65536)
def sign_vector(key, dim):
    """The random direction of a string: +-1/sqrt(dim) by the bits of its hash, the same on every machine and version.

    Random signs preserve angles as well as Gaussian numbers do (Achlioptas 2003): two of them have cosine 0 +- 1/sqrt(dim).
    """
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(key.encode()).digest(dim // 8), np.uint8))
    return (bits.astype(np.float32) * 2 - 1) / math.sqrt(dim)  # (D,)


@lru_cache(maxsize=65536)
def word_vector(word, known, dim):
    """Unit vector of a word: its own random direction with a light share of its letter trigrams.

    The trigrams let a misspelt or inflected word, which no document holds, still find its neighbours; such an unknown word
    consists of them alone. Between two known words that share a syllable they add about 0.4^2 * 1/3 = 0.05 to the cosine,
    which is below the noise of the projection: exact names win.
    """
    edged = f"<{word}>"
    grams = sum(sign_vector(f"#{edged[i:i + 3]}", dim) for i in range(len(edged) - 2))
    grams = grams / max(np.linalg.norm(grams), 1e-9)
    if not known:
        return grams
    return math.sqrt(1 - NGRAM_SHARE ** 2) * sign_vector(word, dim) + NGRAM_SHARE * grams  # (D,)


class Lexical(Encoder):
    """Bag of words by random projection; rare words weigh more, by the square root of their inverse document frequency.

    (With the plain IDF a rare name drowned the word that says what is asked about it.) The document frequencies are those
    of the corpus that `fit` saw; unfitted, all words weigh the same.
    """
    name, dim = "lexical", 512

    def __init__(self, state=None):
        self.frequency = Counter((state or {}).get("frequency", {}))  # word -> number of documents that hold it
        self.documents = (state or {}).get("documents", 0)

    def fit(self, docs):
        for doc in docs:
            self.frequency.update(set(WORD.findall(passage(doc).lower())))
            self.documents += 1

    def state(self):
        return {"documents": self.documents, "frequency": dict(sorted(self.frequency.items()))}

    def weight(self, word):
        """Weight of a word: sqrt(idf), at most 0.3 for stop words. A word of every document weighs next to nothing."""
        root = math.sqrt(math.log((self.documents + 2) / (self.frequency[word] + 1)))
        return STOP_WEIGHT * min(root, 1.0) if word in STOP else root

    def known(self, word):
        """Whether the corpus holds the word; before fit() every word counts as known."""
        return not self.documents or word in self.frequency

    def encode_texts(self, texts):
        """Texts to unit rows (N, D) float32; a text without any word is a row of zeros."""
        bags = [Counter(WORD.findall(text.lower())) for text in texts]
        column = {word: i for i, word in enumerate(dict.fromkeys(word for bag in bags for word in bag))}
        if not column:
            return np.zeros((len(bags), self.dim), np.float32)
        table = np.stack([word_vector(word, self.known(word), self.dim) for word in column])  # (V, D)
        table *= np.array([self.weight(word) for word in column], np.float32)[:, None]
        words = torch.tensor([column[word] for bag in bags for word in bag])  # (W,)
        times = torch.tensor([1 + math.log(n) for bag in bags for n in bag.values()])  # (W,) a repetition counts less
        starts = torch.tensor(np.cumsum([0] + [len(bag) for bag in bags[:-1]]))  # (N,)
        total = F.embedding_bag(words, torch.from_numpy(table), starts, mode="sum", per_sample_weights=times)  # (N, D)
        return F.normalize(total, dim=1).numpy()

    def encode_docs(self, docs):
        """Documents to unit rows (N, 512) float32; pictures are not looked at."""
        return self.encode_texts([passage(doc) for doc in docs])

    def encode_queries(self, queries):
        """Queries (strings, or dicts whose picture is not looked at) to unit rows (Q, 512) float32."""
        pairs = [split_query(query) for query in queries]
        if any(image is not None and not text.strip() for text, image in pairs):
            raise ValueError("a query without words was put to a base of words: give it a text, or ask the image base")
        return self.encode_texts([text for text, _ in pairs])


class Pixel(Encoder):
    """Pictures with captions: [colours (192) | words (512)], each half of length one where it exists."""
    name = "pixel"
    side = 8
    dim = side * side * 3 + Lexical.dim

    def __init__(self, state=None):
        self.lexical = Lexical(state)
        self.fit, self.state = self.lexical.fit, self.lexical.state

    def colours(self, image):
        """The picture's mean colours on an 8 x 8 grid, centred, of length one: (192,) float32; zeros for no picture."""
        if image is None:
            return np.zeros(self.dim - Lexical.dim, np.float32)
        small = np.asarray(open_image(image).resize((self.side, self.side), Image.BOX), np.float32)  # (8, 8, 3)
        centred = small.reshape(-1) - small.mean()
        return centred / max(np.linalg.norm(centred), 1e-6)

    def fuse(self, images, words):
        """Pictures and word vectors (N, 512) as unit rows (N, D)."""
        colours = np.stack([self.colours(image) for image in images]) if len(words) else np.zeros((0, self.dim - 512))
        both = torch.from_numpy(np.concatenate([colours, words], 1).astype(np.float32))  # (N, 192 + 512)
        return F.normalize(both, dim=1).numpy()

    def encode_docs(self, docs):
        """Documents to unit rows (N, 704) float32; one without a picture has zeros in the colour half."""
        return self.fuse([doc["image"] for doc in docs], self.lexical.encode_docs(docs))

    def encode_queries(self, queries):
        """Queries to unit rows (Q, 704) float32.

        Beside a picture the words count by the share of their weight that the captions know: "which country has this
        flag?" holds no word that tells one caption from another, so the picture alone decides; a name decides with it.
        """
        pairs = [split_query(query) for query in queries]
        words = self.lexical.encode_texts([text for text, _ in pairs])  # (Q, 512)
        shares = [1.0 if image is None else self.told(text) for text, image in pairs]
        return self.fuse([image for _, image in pairs], words * np.array(shares, np.float32).reshape(-1, 1))

    def told(self, text):
        """Share of the text's squared word weights that lies on words of the corpus, from 0 to 1."""
        squares = [(self.lexical.weight(word) ** 2, self.lexical.known(word)) for word in set(WORD.findall(text.lower()))]
        return sum(w for w, known in squares if known) / max(sum(w for w, _ in squares), 1e-9)


WEIGHT_FREE = {"lexical": Lexical, "pixel": Pixel}


def load_encoder(path_or_name, state=None):
    """An encoder by name: "lexical" or "pixel". `state` is what an earlier fit learned."""
    if str(path_or_name) in WEIGHT_FREE:
        return WEIGHT_FREE[str(path_or_name)](state)
    raise ValueError(f"unknown encoder {str(path_or_name)!r}: give one of {sorted(WEIGHT_FREE)}")


# ------------------------------------------------------------------------------------------------ indexes

@dataclass(frozen=True)
class IndexOptions:
    """How vectors are indexed."""
    index: str = "hnsw"  # "hnsw": the graph; "flat": exact search over half-precision vectors
    M: int = 16  # neighbours a node keeps on each layer of the graph: more is better, slower and larger
    ef_construction: int = 200  # candidates looked at when a node is inserted
    ef: int = 1500  # candidates looked at when a query is searched; 200 is enough for the vectors of a trained encoder
    seed: int = 0  # of the random layers
    threads: int = 0  # that insert; 0: one for up to 20,000 vectors (the graph then repeats byte for byte), else all cores

    def __post_init__(self):
        if self.index not in ("hnsw", "flat"):
            raise ValueError(f"unknown index {self.index!r}: give 'hnsw' or 'flat'")
        for name, least in (("M", 2), ("ef_construction", 1), ("ef", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")


def exact_search(chunks, queries, k, device="cpu"):
    """The k largest inner products over chunks of vectors, best first: scores (Q, k) float32 and rows (Q, k) int64."""
    queries = torch.from_numpy(queries).to(device)
    best, rows, start = torch.empty(len(queries), 0, device=device), torch.empty(len(queries), 0, dtype=torch.long, device=device), 0
    for chunk in chunks:
        chunk = torch.from_numpy(chunk).to(device).float()  # (C, D)
        scores, found = (queries @ chunk.T).topk(min(k, len(chunk)), dim=1)  # (Q, <=k)
        best, rows = torch.cat([best, scores], 1), torch.cat([rows, found + start], 1)  # (Q, <=2k)
        best, keep = best.topk(min(k, best.shape[1]), dim=1)
        rows, start = rows.gather(1, keep), start + len(chunk)
    return best.cpu().numpy(), rows.cpu().numpy()


class Graph:
    """An HNSW graph over unit vectors, by hnswlib. Inner product of unit vectors is their cosine."""
    suffix = ".hnsw"

    def __init__(self, index, options):
        self.index, self.count, self.options = index, index.get_current_count(), options

    @classmethod
    def build(cls, vectors, options):
        """Vectors (N, D) float32 as a graph, inserted in order."""
        index = hnswlib.Index("ip", vectors.shape[1])
        index.init_index(len(vectors), M=options.M, ef_construction=options.ef_construction, random_seed=options.seed)
        threads = options.threads or (1 if len(vectors) <= 20_000 else os.cpu_count())
        index.add_items(vectors, np.arange(len(vectors)), num_threads=threads)
        return cls(index, options)

    def save(self, path):
        self.index.save_index(str(path))

    @classmethod
    def load(cls, path, dim, options):
        index = hnswlib.Index("ip", dim)
        index.load_index(str(path))
        return cls(index, options)

    def chunks(self):
        """The vectors, a chunk at a time."""
        for start in range(0, self.count, CHUNK):
            yield self.index.get_items(np.arange(start, min(start + CHUNK, self.count)), return_type="numpy")

    def search(self, queries, k):
        """Nearest k <= count rows of queries (Q, D): scores (Q, k), rows (Q, k)."""
        self.index.set_ef(max(self.options.ef, k))  # hnswlib does not keep ef in its file
        try:
            rows, distances = self.index.knn_query(queries, k)
        except RuntimeError:  # the graph does not reach k rows from its entry point: look at all of them
            return exact_search(self.chunks(), queries, k)
        return 1 - distances, rows.astype(np.int64)


class Flat:
    """Exact search over vectors kept in half precision, in memory or mapped from disk."""
    suffix = ".npy"

    def __init__(self, vectors, device="cpu"):
        self.vectors, self.count, self.device = vectors, len(vectors), device

    @classmethod
    def build(cls, vectors, options):
        return cls(vectors.astype(np.float16))

    def save(self, path):
        np.save(path, self.vectors)

    @classmethod
    def load(cls, path, dim, options):
        return cls(np.load(path, mmap_mode="r"))

    def chunks(self):
        for start in range(0, self.count, CHUNK):
            yield np.array(self.vectors[start:start + CHUNK])

    def search(self, queries, k):
        return exact_search(self.chunks(), queries, k, self.device)


INDEXES = {"hnsw": Graph, "flat": Flat}


# ------------------------------------------------------------------------------------------------ the store

class DocFile:
    """Documents on disk, read one at a time by their offset; image paths come back joined to the base's folder."""

    def __init__(self, path, offsets):
        self.home, self.offsets = os.path.dirname(path), offsets  # offsets (N + 1,) of the lines' first bytes
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        doc = json.loads(self.bytes[int(self.offsets[i]):int(self.offsets[i + 1])])
        image = doc["image"] and os.path.normpath(os.path.join(self.home, doc["image"]))
        return {**doc, "image": image}


@dataclass(frozen=True)
class Shard:
    """A part of a base: an index and the documents that its rows stand for, in the same order."""
    index: object
    docs: object  # a list, or a DocFile

    def write(self, folder, stem, home):
        """Writes index, documents and offsets; `home` is the base's final folder, which image paths are made relative to."""
        self.index.save(folder / f"{stem}{self.index.suffix}")
        lengths = [0]
        with open(folder / f"{stem}.docs.jsonl", "wb") as file:
            for doc in self.docs:
                if doc["image"]:
                    doc = {**doc, "image": os.path.relpath(doc["image"], home)}
                lengths.append(file.write(json.dumps(doc, ensure_ascii=False).encode() + b"\n"))
        np.save(folder / f"{stem}.offsets.npy", np.cumsum(lengths, dtype=np.int64))


def checksum(path):
    """{"bytes", "sha256"} of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


@contextlib.contextmanager
def fresh_folder(path):
    """A temporary folder beside `path` that takes its place when the block succeeds and vanishes when it fails."""
    path = Path(path)
    if path.exists() and not (path / "manifest.json").exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists and is no knowledge base: give another place, nothing was overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        put_in_place(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder, path):
    """Renames a finished folder to `path`; one that stands there is moved aside first and then deleted."""
    os.chmod(folder, 0o755)
    if path.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        os.replace(path, aside / "base")
        os.replace(folder, path)
        shutil.rmtree(aside)
    else:
        os.replace(folder, path)


def read_manifest(path):
    """The manifest of a base, after its files have been compared with it; ValueError says what does not fit."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path}: no knowledge base here (no manifest.json): build one with retrieve.py build") from None
    except ValueError:
        raise ValueError(f"{path}/manifest.json: damaged (not JSON): build the base again") from None
    wanted = {"format", "encoder", "dim", "options", "count", "shards", "files"}
    if not isinstance(manifest, dict) or not wanted <= set(manifest):
        raise ValueError(f"{path}/manifest.json: damaged (expected the fields {sorted(wanted)}): build the base again")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format {manifest['format']}, this program reads {FORMAT}: build the base again")
    return manifest


def check_files(path, manifest):
    """Compares every file of a base with the manifest: size, then checksum."""
    for name, expected in manifest["files"].items():
        file = Path(path) / name
        if not file.is_file():
            raise ValueError(f"{file}: missing: build the base again")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, expected {expected['bytes']} (truncated?): build the base again")
        if checksum(file) != expected:
            raise ValueError(f"{file}: altered (checksum differs): build the base again")


# ------------------------------------------------------------------------------------------------ the knowledge base

class KnowledgeBase:
    """Documents that can be searched by words, pictures or both."""

    def __init__(self, encoder, shards, options, path=None):
        self.encoder, self.shards, self.options, self.path = encoder, shards, options, path

    def __len__(self):
        return sum(len(shard.docs) for shard in self.shards)

    @classmethod
    def build(cls, docs, encoder, *, index="hnsw", M=16, ef_construction=200, seed=0, threads=0, ef=1500):
        """Fits the encoder on the documents, encodes and indexes them, all in memory.

        docs: an iterable of dicts with id, text and optionally title and image (a path). encoder: an Encoder or its name.
        """
        options = IndexOptions(index, M, ef_construction, ef, seed, threads)
        docs = [checked_doc(doc, f"document {i}") for i, doc in enumerate(docs)]
        encoder = load_encoder(encoder) if isinstance(encoder, (str, Path)) else encoder
        encoder.fit(docs)
        shards = [Shard(INDEXES[index].build(encoder.encode_docs(docs), options), docs)] if docs else []
        return cls(encoder, shards, options)

    def save(self, path):
        """Writes the base to a folder, beside it first and then renamed: an interrupted save leaves nothing half-written."""
        home = os.path.abspath(path)
        with fresh_folder(path) as folder:
            (folder / "encoder.json").write_text(json.dumps(self.encoder.state(), ensure_ascii=False), encoding="utf-8")
            for i, shard in enumerate(self.shards):
                shard.write(folder, f"{i:05d}", home)
            manifest = {"format": FORMAT, "encoder": {"name": self.encoder.name, "fingerprint": self.encoder.fingerprint()},
                        "dim": self.encoder.dim, "options": asdict(self.options), "count": len(self),
                        "shards": [len(shard.docs) for shard in self.shards],
                        "files": {file.name: checksum(file) for file in sorted(folder.iterdir())}}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path, encoder=None):
        """Opens a saved base. Its files are checked first; `encoder` (an Encoder or a name) must be the one it was built with."""
        path = Path(path)
        manifest = read_manifest(path)
        made = manifest["encoder"]
        name = encoder if isinstance(encoder, (str, Path)) else getattr(encoder, "name", made["name"])
        if str(name) != made["name"]:
            raise ValueError(f"{path}: built with encoder {made['name']!r}, not {str(name)!r}: use that one or build anew")
        check_files(path, manifest)
        encoder = load_encoder(made["name"], json.loads((path / "encoder.json").read_text(encoding="utf-8")))
        if (encoder.dim, encoder.fingerprint()) != (manifest["dim"], made["fingerprint"]):
            raise ValueError(f"{path}: built with dimension {manifest['dim']}, encoder {made['fingerprint']}; this is dimension "
                             f"{encoder.dim}, encoder {encoder.fingerprint()}: build the base again")
        options, shards = IndexOptions(**manifest["options"]), []
        for i, count in enumerate(manifest["shards"]):
            index = INDEXES[options.index].load(path / f"{i:05d}{INDEXES[options.index].suffix}", encoder.dim, options)
            docs = DocFile(path / f"{i:05d}.docs.jsonl", np.load(path / f"{i:05d}.offsets.npy"))
            if not index.count == len(docs) == count:
                raise ValueError(f"{path}: shard {i} has {index.count} vectors, {len(docs)} documents, expected {count}: build again")
            shards.append(Shard(index, docs))
        return cls(encoder, shards, options, path)

    def search(self, queries, k=5):
        """The k best documents of each query, best first: a list of Hit a query, shorter where the base holds fewer.

        A query is a string or {"text", "image"}. Equal scores stand in document order.
        """
        if isinstance(queries, (str, dict)):
            raise ValueError("search takes a list of queries: put the one query into a list")
        queries = list(queries)
        if k < 1:
            raise ValueError(f"k is {k}: give at least 1")
        if not queries or not len(self):
            return [[] for _ in queries]
        scores, rows = self.search_vectors(self.encoder.encode_queries(queries), k)
        return [[self.hit(row, score) for row, score in zip(*pair)] for pair in zip(rows, scores)]

    def search_vectors(self, vectors, k, exact=False):
        """The k best rows for vectors (Q, D): scores (Q, K) float32 and global rows (Q, K) int64, K = min(k, documents)."""
        scores, rows, start = [], [], 0
        for shard in self.shards:
            reach = min(k + OVERFETCH, shard.index.count)
            s, r = exact_search(shard.index.chunks(), vectors, reach) if exact else shard.index.search(vectors, reach)
            scores, rows, start = scores + [s], rows + [r + start], start + shard.index.count
        scores, rows = np.concatenate(scores, 1), np.concatenate(rows, 1)  # (Q, sum of reaches)
        order = np.lexsort((rows, -scores.round(6)), axis=1)[:, :k]  # equal scores, up to rounding, in document order
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)  # (Q, K) each

    def hit(self, row, score):
        """The document of a global row."""
        for shard in self.shards:
            if row < len(shard.docs):
                doc = shard.docs[int(row)]
                return Hit(doc["id"], passage(doc), float(score), doc["image"])
            row -= len(shard.docs)
        raise AssertionError("row beyond the last shard")


# ------------------------------------------------------------------------------------------------ command line

def build_command(args):
    kb = KnowledgeBase.build(read_docs(args.docs), args.encoder, index=args.index, M=args.M, ef=args.ef,
                             ef_construction=args.ef_construction, seed=args.seed, threads=args.threads)
    kb.save(args.out)
    print(f"{args.out}: {len(kb)} documents, encoder {kb.encoder.name}, dimension {kb.encoder.dim}, index {args.index}")


def search_command(args):
    if not args.query.strip() and not args.image:
        raise ValueError("the query is empty: give some words, --image, or both")
    kb = KnowledgeBase.load(args.kb)
    for hit in kb.search([{"text": args.query, "image": args.image}], args.k)[0]:
        print(f"{hit.score:.4f}  {hit.id}  {hit.text}" + (f"  [{hit.image}]" if hit.image else ""))


def parser():
    """The commands and their flags."""
    defaults = IndexOptions()
    top = argparse.ArgumentParser(prog="retrieve.py", description="Build and search knowledge bases.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="encode and index documents")
    build.add_argument("docs", help="JSONL file with id, text and optionally title, image")
    build.add_argument("--out", required=True, help="folder of the base")
    build.add_argument("--encoder", default="lexical", help="lexical or pixel")
    build.add_argument("--index", default=defaults.index, choices=list(INDEXES), help="graph or exact search")
    for name in ("M", "ef_construction", "ef", "seed", "threads"):
        build.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, default=getattr(defaults, name))
    build.set_defaults(run=build_command)
    search = commands.add_parser("search", help="print the best documents for a query")
    search.add_argument("kb", help="folder of the base")
    search.add_argument("query", nargs="?", default="", help="words")
    search.add_argument("--image", help="path of a picture that belongs to the query")
    search.add_argument("-k", type=int, default=5, help="number of hits")
    search.set_defaults(run=search_command)
    return top


def main():
    """Runs a command; a user's mistake is one line on stderr and exit code 2."""
    args = parser().parse_args()
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(print(f"retrieve.py: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
