"""Knowledge bases: documents become vectors, vectors become an HNSW graph, a query becomes its nearest documents.

    corpus file -> reader -> documents {"id", "text", "title", "image"} -> encoder -> (N, D) -> index
    query (words, picture or both) -> encoder -> (Q, D) -> search of every shard -> merge -> hits

R1-Router asks three such bases (text, text-image, table). They differ only in reader and encoder:

    lexical     words without trained weights: seeded random projections, rare words weigh more
    pixel       pictures without trained weights: 8 x 8 mean colours, beside the lexical vector of the caption
    directory   BERT family and XLM-RoBERTa (MiniLM, BGE, E5, BGE-M3) for text and tables, CLIP for pictures

On disk a base is one folder: shards of index + documents, and a manifest with the checksum of every file.

Shapes: N documents, Q queries, B batch, T tokens, H heads, D dimension of a vector, K hits, W words, V different words.

Deviations from the paper and from the released code, and why:
  * searching: an HNSW graph (Malkov and Yashunin, 2016) that is loaded once. The released code scores all vectors by
    brute force and reloads encoders and corpus for each step. Exact search stays as an option (index="flat");
  * the lexical and pixel encoders are ours: the embedded world must run without downloads;
  * Wikipedia: the released builder repeats the last window of a page, breaks on quotes in titles, leaves HTML entities
    and writes a wrong id before each passage. Here a last, shorter window covers what no full one does, and an id says
    page and window.
"""
import argparse
import fcntl
import hashlib
import html
import itertools
import json
import math
import mmap
import os
import re
import shutil
import sys
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import hnswlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from model import load_picture, read_json, weight_files, write_json

FORMAT = 1  # of the folder on disk; a base of another format is refused
OVERFETCH = 8  # hits fetched beyond k, so that equal scores around the k-th place are settled by document order
CHUNK = 8192  # documents encoded, or vectors scored by exact search, at a time


# ------------------------------------------------------------------------------------------------------------ documents

@dataclass(frozen=True)
class Hit:
    """A document that was found: its id, its words (title first), its score, and the path of its picture or None."""
    id: str
    text: str
    score: float
    image: str | None = None


def checked_doc(row, place):
    """A document with exactly the four fields, each of the right type; `place` (file:line) stands in the error."""
    doc = {"id": row.get("id"), "text": row.get("text"), "title": row.get("title") or "",
           "image": row.get("image") or None}
    if type(doc["id"]) is int:
        doc["id"] = str(doc["id"])
    for name, value in doc.items():
        if not isinstance(value, str) and (name != "image" or value is not None):
            found = "missing" if value is None else type(value).__name__
            raise ValueError(f"{place}: field {name!r} is {found}, expected a string: a row has id, text, title, image")
    return {name: value and utf8(value) for name, value in doc.items()}


def utf8(text):
    """The text without halves of surrogate pairs, which JSON may hold but no file or tokenizer takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def passage(doc):
    """What is encoded and shown of a document: the title, then the words."""
    return f"{doc['title']} {doc['text']}" if doc.get("title") else doc["text"]


def split_query(query):
    """A query as (text, image): a string, or a dict with "text", "image" (a path or a PIL image) or both."""
    text, image = (query.get("text") or "", query.get("image")) if isinstance(query, dict) else (query, None)
    if not isinstance(text, str):
        raise ValueError(f"a query is a string or {{'text', 'image'}}, not {query!r}")
    return utf8(text), image


# --------------------------------------------------------------------------------------------------- readers of corpora

@contextmanager
def reading(path):
    """A text file, open; ValueError where it cannot be read as UTF-8."""
    try:
        with open(path, encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}): convert the file") from None


def lines_of(path):
    """Numbered places and lines of a text file: ("file:3", line)."""
    with reading(path) as file:
        for number, line in enumerate(file, 1):
            yield f"{path}:{number}", line


def json_object(line, place):
    """One line of a JSONL file as a dict."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, an integer beyond Python's limit, lists in lists in lists
        raise ValueError(f"{place}: not JSON ({error}): expected one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, found {type(row).__name__}")
    return row


def read_docs(path, images=None):
    """Plain JSONL: id, text, optionally title and image. Yields documents in order.

    Image paths are relative to the folder `images`, by default the file's own, and come back joined to it.
    A row that does not fit raises ValueError with file and line.
    """
    for place, line in lines_of(path):
        if line.strip():
            doc = checked_doc(json_object(line, place), place)
            yield {**doc, "image": doc["image"] and os.path.join(images or Path(path).parent, doc["image"])}


def read_mbeir(path, images=None):
    """M-BEIR candidates: did, txt, img_path, modality. `images` is the folder that img_path starts from."""
    for place, line in lines_of(path):
        if not line.strip():
            continue
        row = json_object(line, place)
        modality = set(str(row.get("modality")).split(","))  # "text,image" and "image,text" both occur
        if not modality <= {"text", "image"}:
            raise ValueError(f"{place}: modality is {row.get('modality')!r}, expected text, image or both")
        if "image" in modality and not (isinstance(row.get("img_path"), str) and row["img_path"]):
            raise ValueError(f"{place}: modality {row['modality']!r}, but img_path is {row.get('img_path')!r}")
        image = os.path.join(images or Path(path).parent, row["img_path"]) if "image" in modality else None
        text = (row.get("txt") or "") if "text" in modality else ""
        yield checked_doc({"id": row.get("did"), "text": text, "image": image}, place)


class JsonStream:
    """A JSON file read piece by piece: a window slides over its text, so that only the value in hand is in memory."""
    solid = re.compile(r"\S")

    def __init__(self, path, file):
        self.path, self.file, self.window, self.at = path, file, "", 0  # what stands before `at` is done with

    def broken(self, problem):
        return ValueError(f"{self.path}: cannot be read as JSON near {self.window[self.at:self.at + 40]!r}: {problem}")

    def grow(self, problem):
        """Reads on, so that what is left of the window at least doubles; the problem is an error at the file's end."""
        more = self.file.read(max(1 << 16, len(self.window) - self.at))
        if not more:
            raise self.broken(problem)
        self.window, self.at = self.window[self.at:] + more, 0

    def next(self):
        """The next character that is no space, without passing it."""
        while not (found := self.solid.search(self.window, self.at)):
            self.grow("it ends too early")
        self.at = found.start()
        return found[0]

    def expect(self, character):
        """Passes the next character, which must be this one."""
        if self.next() != character:
            raise self.broken(f"expected {character!r}")
        self.at += 1

    def value(self, decode=json.JSONDecoder().raw_decode):
        """The next value, whole: the window grows until it holds the value and what follows it."""
        self.next()
        while True:
            try:
                value, end = decode(self.window, self.at)
                problem = "expected ','"
            except (ValueError, RecursionError) as error:
                end, problem = len(self.window), getattr(error, "msg", error)
            follows = self.solid.search(self.window, end)
            if follows and follows[0] in ",:]}":  # anything else may be the rest of a number that the window cuts
                self.at = end
                return value
            self.grow(problem)

    def items(self):
        """Enters the next object or list and yields its keys, of a list numbers. Before the next key is asked for, the
        caller takes the item's value, by value() or items()."""
        opening, count = self.next(), 0
        if opening not in "{[":
            raise self.broken("expected a list or an object")
        self.at += 1
        while self.next() != {"{": "}", "[": "]"}[opening]:
            if count:
                self.expect(",")
            key, count = self.value() if opening == "{" else count, count + 1
            if opening == "{":
                self.expect(":")
            yield key
        self.at += 1

    def pairs(self):
        """(key, value) of each item of the next object or list."""
        return ((key, self.value()) for key in self.items())


def table_column(path, name):
    """(key, value) of each item of one column of a file of columns."""
    with reading(path) as file:
        stream = JsonStream(path, file)
        for column in stream.items():
            yield from (pair for pair in stream.pairs() if column == name)


MARKERS = ("[Title]", "[Section title]", "[Caption]", "[Table name]", "[Header]", "[Rows]", "[Row]", "[sep]")  # by id
TABLE_FIELDS = ("flattened", "page_title", "section_title", "caption", "name", "header", "rows")


def read_tables(path, images=None):
    """Open-WikiTable's splitted_tables.json in any pandas orientation: a document's text is the flattened table."""
    for key, row in table_rows(path):
        place = f"{path}: table {key}"
        row = row if isinstance(row, dict) else {}
        lines = [row.get("header"), *row["rows"]] if isinstance(row.get("rows"), list) else [None]
        if not row.get("flattened") and not all(isinstance(line, list) for line in lines):
            raise ValueError(f"{place}: expected flattened, or header and rows (a list, and a list of lists)")
        yield checked_doc({"id": str(key), "text": row.get("flattened") or flatten_table(row)}, place)


def table_rows(path):
    """(key, row) of each table, as pandas writes them: a list of rows, an object of rows, or an object of columns."""
    with reading(path) as file:
        stream, columns = JsonStream(path, file), []
        for key in stream.items():
            columns += [key] * (key in TABLE_FIELDS)
            for _ in stream.pairs():
                pass  # a look at the keys only
        if (stream.window[stream.at:] + file.read()).strip():
            raise stream.broken("the file should end here")
    if not {"header", "flattened"} & set(columns):
        with reading(path) as file:
            yield from JsonStream(path, file).pairs()
        return
    for cells in itertools.zip_longest(*(table_column(path, name) for name in columns), fillvalue=(None, None)):
        if len({key for key, _ in cells}) > 1:  # (key, value) of one table in each column
            raise ValueError(f"{path}: its columns do not list the same tables in the same order")
        yield cells[0][0], dict(zip(columns, (value for _, value in cells)))


def flatten_table(row):
    """A table as one line, the way the table encoder was trained to see it."""
    cells = [[str(cell) for cell in line] for line in [row["header"], *row["rows"]]]
    heads = [row.get(name) or "" for name in ("page_title", "section_title", "caption", "name")]
    return ("".join(marker + str(head) for marker, head in zip(MARKERS, heads)) + "[Header]" + "[sep]".join(cells[0])
            + "[Rows]" + "".join("[Row]" + "[sep]".join(line) for line in cells[1:]))


WIKI_HEADER = re.compile(r'<doc id="([^"]*)".*? url="[^"]*" title="(.*)">\s*$')  # greedy: a title may hold quotes and >
WIKI_SKIP = re.compile(r"(List|Index|Outline) of |.*\(disambiguation", re.IGNORECASE)
WIKI_MEANINGS = re.compile(r"[^\n]{0,200}\b(may|can) (also |commonly )?refer to:?\s*$", re.MULTILINE)


def files_of(path):
    """A file, or all files below a folder in a fixed order."""
    path = Path(path)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def read_wiki(path, images=None):
    """wikiextractor's output, plain or --json, a file or a folder: windows of 100 words, each with the page's title."""
    for file in files_of(path):
        for place, page, title, text in wiki_pages(file):
            title, text = html.unescape(title).strip(), html.unescape(text).strip()
            head, _, rest = text.partition("\n")
            text = rest.strip() if head.strip() == title else text
            if text and not WIKI_SKIP.match(title) and not WIKI_MEANINGS.match(text):
                for i, window in enumerate(windows(text.split())):
                    yield checked_doc({"id": f"{page}-{i}", "text": window, "title": title}, place)


def wiki_pages(path):
    """Pages of one wikiextractor file: (place, id, title, text)."""
    header, body = None, []
    for place, line in lines_of(path):
        if header is not None:
            if line.strip() == "</doc>":
                yield *header, "".join(body)
                header, body = None, []
            else:
                body.append(line)
        elif line.startswith("{"):
            row = json_object(line, place)
            if not all(isinstance(row.get(name), str) for name in ("id", "title", "text")):
                raise ValueError(f"{place}: expected id, title and text, each a string")
            yield place, row["id"], row["title"], row["text"]
        elif match := WIKI_HEADER.match(line):
            header = place, match[1], match[2]
        elif line.strip():
            raise ValueError(f"{place}: expected <doc id= url= title=> or JSON, found {line.strip()[:40]!r}")
    if header is not None:
        raise ValueError(f"{header[0]}: page {header[2]!r} does not end with </doc>: is the file complete?")


def windows(words, size=100, stride=50):
    """Overlapping windows of words, the last one shorter where full ones leave words over; each holds something new."""
    for start in range(0, max(len(words) - size + stride, 1), stride):
        yield " ".join(words[start:start + size])


READERS = {"plain": read_docs, "wiki": read_wiki, "tables": read_tables, "mbeir": read_mbeir}


# --------------------------------------------------------------------------------------------- encoders without weights

class Encoder:
    """Turns documents and queries into rows of one space. One's own needs name, dim and the two encode methods."""
    name = ""  # what load_encoder takes
    dim = 0
    normalised = True  # rows have length one, so that their inner product is their cosine
    ef = 200  # candidates that a search of an HNSW graph over such vectors should look at
    options = {}  # what load_encoder takes beside the name; travels with a base
    cut = 0  # documents and queries so far that were longer than the encoder reads

    def encode_docs(self, docs):
        """Documents (dicts with text, perhaps title and image) to rows (N, D) float32."""
        raise NotImplementedError

    def encode_queries(self, queries):
        """Queries (strings, or dicts with text, image or both) to rows (Q, D) float32."""
        raise NotImplementedError

    def fingerprint(self):
        """A string that differs where the vectors of the same document would (fitting aside)."""
        return f"{self.name}-{self.dim}-v1"

    def fitted(self, docs):
        """(encoder, number of documents): the encoder after one look at the corpus. Most need none and only count."""
        return self, sum(1 for _ in docs)

    def state(self):
        """What fitting learned, for JSON; restored(state) gives the fitted encoder back."""
        return {}

    def restored(self, state):
        return self

    def similarity(self, a, b):
        """Inner product of two texts' vectors: their cosine, from -1 to 1, where rows are normalised."""
        x, y = self.encode_queries([a, b])
        return float(x @ y)


WORD = re.compile(r"\d+|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")  # Han, kana one by one
STOP = frozenset(
    "a an and are at be by did do does for from had has have he her his how in is it its of on or she that the their "
    "there these they this those to was were what when where which who whom whose why with".split())
STOP_WEIGHT = 0.3
NGRAM_SHARE = 0.4


def words_of(text):
    """Words and numbers in lower case, accents and widths in one spelling."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@lru_cache(maxsize=16384)
def sign_vector(key, dim):
    """The random direction of a string: +-1/sqrt(dim) by the bits of its hash, the same on every machine.

    Random signs keep angles as well as Gaussian numbers do (Achlioptas, 2003): two strings have cosine 0 +- 1/sqrt(D).
    """
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(key.encode()).digest(dim // 8), np.uint8))
    return (bits.astype(np.float32) * 2 - 1) / math.sqrt(dim)  # (D,)


@lru_cache(maxsize=65536)
def word_vector(word, known, dim):
    """Vector of a word: its own random direction and a light share of its letter trigrams.

    A misspelt or inflected word that no document holds consists of its trigrams alone and so still finds neighbours.
    Between two known words that share a syllable the trigrams add about 0.4^2 / 3 = 0.05 to the cosine, about what
    chance does at 512 dimensions: exact names win.
    """
    edged = f"<{word}>"
    grams = sum(sign_vector(f"#{edged[i:i + 3]}", dim) for i in range(len(edged) - 2))
    grams = grams / max(np.linalg.norm(grams), 1e-9)
    if not known:
        return grams
    return math.sqrt(1 - NGRAM_SHARE**2) * sign_vector(word, dim) + NGRAM_SHARE * grams  # (D,)


class Lexical(Encoder):
    """Bag of words by random projection, each word weighted by the square root of its inverse document frequency.

    (With the frequency itself a rare name, and other names that chance makes similar to it, drown the word that says
    what is asked.) The frequencies are those of the corpus the encoder was fitted on; unfitted, all but stop words
    weigh the same; fitted once, it stays as it is. Such vectors form no slope that a graph could follow, so a search
    must look at many candidates: meant for corpora of up to some 10,000 documents.
    """
    name, dim, ef = "lexical", 512, 2500

    def __init__(self, state=None):
        self.frequency = Counter((state or {}).get("frequency", {}))  # word -> number of documents that hold it
        self.documents = (state or {}).get("documents", 0)

    def fitted(self, docs):
        frequency, count = Counter(), 0
        for count, doc in enumerate(docs, 1):
            frequency.update(set(words_of(passage(doc))))
        return (self if self.documents else type(self)({"frequency": frequency, "documents": count})), count

    def state(self):
        return {"documents": self.documents, "frequency": dict(sorted(self.frequency.items()))}

    def restored(self, state):
        return type(self)(state)

    def weight(self, word):
        """The square root of 0.5 + idf; 0.3 for stop words."""
        return STOP_WEIGHT if word in STOP else math.sqrt(0.5 + self.idf(word))

    def idf(self, word):
        """ln((N + 2) / (df + 1)): close to 0 for a word that all N documents hold, larger for rarer ones."""
        return math.log((self.documents + 2) / (self.frequency[word] + 1))

    def known(self, word):
        """Whether the corpus holds the word; before fitting every word counts as known."""
        return not self.documents or word in self.frequency

    def encode_texts(self, texts):
        """Texts to unit rows (N, D) float32; a text without any word becomes zeros."""
        bags = [Counter(words_of(text)) for text in texts]
        column = {word: i for i, word in enumerate(dict.fromkeys(word for bag in bags for word in bag))}
        if not column:
            return np.zeros((len(bags), Lexical.dim), np.float32)
        table = np.stack([word_vector(word, self.known(word), Lexical.dim) for word in column])  # (V, D)
        table *= np.array([self.weight(word) for word in column], np.float32)[:, None]
        words = torch.tensor([column[word] for bag in bags for word in bag])  # (W,)
        times = torch.tensor([1 + math.log(n) for bag in bags for n in bag.values()])  # (W,) repetitions count less
        starts = torch.tensor(np.cumsum([0] + [len(bag) for bag in bags[:-1]]))  # (N,)
        total = F.embedding_bag(words, torch.from_numpy(table), starts, mode="sum", per_sample_weights=times)
        return F.normalize(total, dim=1).numpy()  # (N, D)

    def encode_docs(self, docs):
        return self.encode_texts([passage(doc) for doc in docs])

    def encode_queries(self, queries):
        return self.encode_texts(texts_only(queries))


def texts_only(queries):
    """The words of queries to a base that reads no pictures (a picture beside words is ignored)."""
    pairs = [split_query(query) for query in queries]
    if any(image is not None and not text.strip() for text, image in pairs):
        raise ValueError("a picture without words was put to a base of words: give a text, or ask the base of pictures")
    return [text for text, _ in pairs]


class Pixel(Lexical):
    """Pictures with captions: [colours (192) | words (512)], each part of length one where there is one."""
    name = "pixel"
    side = 8
    dim = side * side * 3 + Lexical.dim

    def colours(self, image):
        """The picture's mean colours on an 8 x 8 grid, centred, of length one: (192,) float32; zeros for no picture."""
        if image is None:
            return np.zeros(self.side * self.side * 3, np.float32)
        small = np.asarray(load_picture(image).resize((self.side, self.side), Image.BOX), np.float32).reshape(-1)
        return (small - small.mean()) / max(np.linalg.norm(small - small.mean()), 1e-6)

    def fuse(self, images, words):
        """Pictures (N, each may be None) and word vectors (N, 512) to unit rows (N, D)."""
        colours = np.array([self.colours(image) for image in images], np.float32).reshape(len(words), -1)
        return F.normalize(torch.from_numpy(np.concatenate([colours, words], 1)), dim=1).numpy()

    def encode_docs(self, docs):
        return self.fuse([doc.get("image") for doc in docs], super().encode_docs(docs))

    def encode_queries(self, queries):
        """Queries to unit rows (Q, 704) float32.

        Beside a picture the words count by the share of their idf that the captions know: "which country has this
        flag?" holds nothing that tells one caption from another, so the picture alone decides; a name would count.
        """
        pairs = [split_query(query) for query in queries]
        shares = np.array([1.0 if image is None else self.told(text) for text, image in pairs], np.float32)
        words = self.encode_texts([text for text, _ in pairs]) * shares[:, None]  # (Q, 512)
        return self.fuse([image for _, image in pairs], words)

    def told(self, text):
        """Share of the text's idf that lies on words of the corpus, 0 to 1; a word of every document adds nothing."""
        idf = {word: self.idf(word) for word in set(words_of(text)) - STOP}
        return sum(value for word, value in idf.items() if self.known(word)) / max(sum(idf.values()), 1e-9)


# ------------------------------------------------------------------------------------------------- transformer encoders

def option(default, text):
    """A dataclass field whose help text also serves the command line."""
    return field(default=default, metadata={"help": text})


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


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def known_value(name, value, known):
    """The value, if it is one that this file implements."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}: this program knows {', '.join(map(str, known))}")
    return value


class Block(nn.Module):
    """A transformer block of config `c`: BERT normalises after each residual sum, CLIP (pre) before each sub-layer."""

    def __init__(self, c, eps, pre=False, causal=False):
        super().__init__()
        width, inner, self.heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        act = c.get("hidden_act", "quick_gelu" if pre else "gelu")
        self.act, self.pre, self.causal = ACTIVATIONS[known_value("hidden_act", act, ACTIVATIONS)], pre, causal
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


def load_weights(module, path, names, unused):
    """Fills a module made on the meta device from safetensors; one error lists every key that does not fit."""
    wanted, state, problems = module.state_dict(), {}, []
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    name = key
                    for pattern, ours in names:
                        name = re.sub(pattern, ours, name)
                    if re.search(unused, name):
                        continue
                    shape = list(tensors.get_slice(key).get_shape())
                    if name not in wanted:
                        problems.append(f"unexpected: {key}")
                    elif shape != list(wanted[name].shape):
                        problems.append(f"shape {shape} instead of {list(wanted[name].shape)}: {key}")
                    state[name] = tensors.get_tensor(key).float()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); is the download complete?") from None
    problems += [f"missing: {name}" for name in wanted if name not in state]
    if problems:
        raise ValueError(f"{path}: {len(problems)} weights do not fit config.json: {'; '.join(problems)}")
    module.load_state_dict(state, assign=True)
    return module


def precision(device):
    """Half precision on CUDA, single on the CPU, where half is slower."""
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def usable_device(device):
    """The device, if torch can compute on it here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch says the one of an unknown name, the other of a missing CUDA
        raise ValueError(f"device {device!r} cannot be used here: give cpu, or cuda where torch finds a GPU") from None
    return device


def read_tokenizer(path):
    """The directory's tokenizer.json, without the padding and truncation that may be saved in it."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing: make it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) once")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer that can be read ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


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


def check_bert(config, path):
    """The config of a BERT-family model, if this file can run it."""
    needed = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings"}
    if absent := sorted(needed - set(config)):
        raise ValueError(f"{path}/config.json: {', '.join(absent)} missing")
    positions = config.get("position_embedding_type") or "absolute"
    known_value(f"{path}/config.json: position_embedding_type", positions, ["absolute"])
    return config


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
        self.print = model_print([path] + [settings.query_model] * bool(settings.query_model), self.passages.pooling,
                                 self.passages.length, settings.normalise, settings.passage_prefix, settings.markers)

    def fingerprint(self):
        return self.print

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
    names = ("config.json", "tokenizer.json", "preprocessor_config.json")
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
        text, vision = ({**defaults, **config.get(f"{name}_config", {})}
                        for name, defaults in (("text", CLIP_TEXT), ("vision", CLIP_VISION)))
        self.name, self.options, self.device, self.cut = os.path.abspath(path), options, device, 0
        self.settings, self.dim = make_settings(options), config.get("projection_dim", 512)
        with torch.device("meta"):
            towers = nn.ModuleDict({"text": Tower(text, self.dim, picture=False),
                                    "vision": Tower(vision, self.dim, picture=True)})
        self.towers = load_weights(towers, path, CLIP_NAMES, CLIP_UNUSED).to(device, precision(device)).eval()
        self.tokenizer = read_tokenizer(path)
        self.tokenizer.enable_truncation(text["max_position_embeddings"])
        file = Path(path) / "preprocessor_config.json"
        said = read_json(file) if file.is_file() else {}
        edge, crop = (said.get(name, vision["image_size"]) for name in ("size", "crop_size"))
        self.edge = edge.get("shortest_edge", edge.get("height")) if isinstance(edge, dict) else edge
        self.crop = crop["height"] if isinstance(crop, dict) else crop
        self.resample = said.get("resample", Image.BICUBIC)
        self.mean = np.array(said.get("image_mean", CLIP_MEAN), np.float32)
        self.std = np.array(said.get("image_std", CLIP_STD), np.float32)
        self.print = model_print([path], self.settings.passage_prefix)

    def fingerprint(self):
        return self.print

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


WEIGHT_FREE = {"lexical": Lexical, "pixel": Pixel}


def load_encoder(path_or_name, device="cpu", **options):
    """An encoder: "lexical", "pixel", or a Hugging Face directory of the BERT family, XLM-RoBERTa or CLIP.

    options are the fields of EncoderOptions, for directories only.
    """
    name = str(path_or_name)
    if name in WEIGHT_FREE:
        if options:
            raise ValueError(f"encoder {name!r} takes no options, got {', '.join(sorted(options))}")
        return WEIGHT_FREE[name]()
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"unknown encoder {name!r}: give {', '.join(WEIGHT_FREE)} or a directory with config.json")
    kind = read_json(Path(name) / "config.json").get("model_type")
    known_value(f"{name}: model_type", kind, (*BERT_TYPES, "clip"))
    return (ClipEncoder if kind == "clip" else TextEncoder)(name, usable_device(device), **options)


# -------------------------------------------------------------------------------------------------------------- indexes

@dataclass(frozen=True)
class IndexOptions:
    """How vectors are indexed and searched."""
    index: str = option("hnsw", "hnsw: the graph; flat: exact search over half-precision vectors on disk")
    M: int = option(16, "neighbours of a node in the graph: more is better, slower and larger")
    ef_construction: int = option(200, "candidates looked at when a node is inserted")
    ef: int = option(0, "candidates looked at by a search; 0: as the encoder needs (2500 without weights, else 200)")
    seed: int = option(0, "of the graph's random layers")
    threads: int = option(0, "that insert; 0: one for up to 20000 vectors, so that every byte repeats, else all cores")

    def __post_init__(self):
        if self.index not in INDEXES:
            raise ValueError(f"unknown index {self.index!r}: give {' or '.join(INDEXES)}")
        for name, least in (("M", 2), ("ef_construction", 1), ("ef", 0), ("seed", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")


def exact_search(chunks, queries, k, device="cpu"):
    """The k largest inner products of queries (Q, D) with chunks of rows: scores (Q, k) float32, rows (Q, k) int64."""
    queries = torch.from_numpy(queries).to(device)
    best, rows, start = queries.new_empty(len(queries), 0), queries.new_empty((len(queries), 0), dtype=torch.long), 0
    for chunk in chunks:
        chunk = torch.from_numpy(chunk).to(device).float()  # (C, D)
        scores, found = (queries @ chunk.T).topk(min(k, len(chunk)), dim=1)  # (Q, <=k)
        best, rows = torch.cat([best, scores], 1), torch.cat([rows, found + start], 1)  # (Q, <=2k)
        best, keep = best.topk(min(k, best.shape[1]), dim=1)
        rows, start = rows.gather(1, keep), start + len(chunk)
    return best.cpu().numpy(), rows.cpu().numpy()


class Graph:
    """An HNSW graph over unit vectors, by hnswlib; the inner product of unit vectors is their cosine.

    More than `ef_construction` rows with one and the same vector find only each other and may hide what lies behind
    them: KnowledgeBase.recall shows it, index "flat" is free of it.
    """
    suffix = ".hnsw"

    def __init__(self, index, options):
        self.index, self.options = index, options

    @classmethod
    def empty(cls, dim, room, options):
        """A graph that will hold `room` vectors of dimension `dim`."""
        index = hnswlib.Index("ip", dim)
        index.init_index(room, M=options.M, ef_construction=options.ef_construction, random_seed=options.seed)
        index.set_num_threads(options.threads or (1 if room <= 20_000 else os.cpu_count()))
        return cls(index, options)

    @property
    def count(self):
        return self.index.get_current_count()

    def add(self, vectors):
        self.index.add_items(vectors, np.arange(self.count, self.count + len(vectors)))

    def save(self, path):
        self.index.save_index(str(path))
        if not path.is_file() or path.stat().st_size != self.index.index_file_size():  # hnswlib does not look
            raise OSError(f"{path}: could not be written whole: is the disk full?")

    @classmethod
    def load(cls, path, dim, options):
        index = hnswlib.Index("ip", dim)
        index.load_index(str(path))
        return cls(index, options)

    def block(self, start, stop):
        """The vectors of some rows that follow one another: (n, D) float32."""
        return self.index.get_items(np.arange(start, stop), return_type="numpy")

    def search(self, queries, k, device):
        """The k <= count nearest rows of queries (Q, D): scores (Q, k) and rows (Q, k)."""
        self.index.set_ef(max(self.options.ef, k))  # hnswlib does not keep ef in its file
        try:
            rows, distances = self.index.knn_query(queries, k)
        except RuntimeError as error:
            if "contiguous" not in str(error):
                raise
            return exact_search(chunks_of(self), queries, k, device)  # the graph does not reach k rows: look at all
        return 1 - distances, rows.astype(np.int64)


class Flat:
    """Exact search over vectors in half precision, in memory or mapped from disk."""
    suffix = ".npy"

    def __init__(self, vectors, count):
        self.vectors, self.count = vectors, count  # (N, D) float16, of which `count` rows are filled

    @classmethod
    def empty(cls, dim, room, options):
        return cls(np.empty((room, dim), np.float16), 0)

    def add(self, vectors):
        self.vectors[self.count:self.count + len(vectors)] = vectors
        self.count += len(vectors)

    def save(self, path):
        np.save(path, self.vectors)

    @classmethod
    def load(cls, path, dim, options):
        vectors = np.load(path, mmap_mode="r")
        return cls(vectors, len(vectors))

    def block(self, start, stop):
        return np.array(self.vectors[start:stop])  # (n, D) float16

    def search(self, queries, k, device):
        return exact_search(chunks_of(self), queries, k, device)


INDEXES = {"hnsw": Graph, "flat": Flat}


def chunks_of(index):
    """All vectors of an index, some thousand rows at a time."""
    for start in range(0, index.count, CHUNK):
        yield index.block(start, min(start + CHUNK, index.count))


# --------------------------------------------------------------------------------------------------- the folder on disk

class DocFile:
    """Documents on disk, read by offset when they are asked for; image paths come back joined to the base's folder."""

    def __init__(self, folder, stem):
        self.folder = os.fspath(folder)
        self.offsets = np.load(folder / f"{stem}.offsets.npy")  # (N + 1,) first bytes of the lines
        with open(folder / f"{stem}.docs.jsonl", "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        doc = json.loads(self.bytes[self.offsets[i]:self.offsets[i + 1]])
        return {**doc, "image": doc["image"] and os.path.normpath(os.path.join(self.folder, doc["image"]))}


@dataclass(frozen=True)
class Shard:
    """A part of a base: an index, and the documents that its rows stand for in the same order (a list or a DocFile)."""
    index: object
    docs: object

    @classmethod
    def build(cls, docs, encoder, options, tick=lambda count: None):
        """Encodes and indexes a list of documents; `tick` is told how many more are done."""
        if options.index == "hnsw" and not encoder.normalised:
            raise ValueError("raw inner products and an HNSW graph do not go together (poor recall): give index 'flat'")
        index = INDEXES[options.index].empty(encoder.dim, len(docs), options)
        for start in range(0, len(docs), CHUNK):
            part = docs[start:start + CHUNK]
            vectors = encoder.encode_docs(part)
            if vectors.shape != (len(part), encoder.dim) or not np.isfinite(vectors).all():
                raise ValueError(f"encoder {encoder.name!r}: {vectors.shape} numbers for {len(part)} documents at "
                                 f"dimension {encoder.dim}, or some not finite: nothing was indexed")
            index.add(vectors)
            tick(len(vectors))
        return cls(index, docs)

    def write(self, folder, number, home):
        """Writes shard `number` into a folder and returns its record; image paths are stored relative to `home`."""
        stem, offset, offsets = f"{number:05d}", 0, [0]
        self.index.save(folder / (stem + self.index.suffix))
        with open(folder / f"{stem}.docs.jsonl", "wb") as file:
            for doc in self.docs:
                image = doc["image"] and os.path.relpath(doc["image"], home)
                offset += file.write(json.dumps({**doc, "image": image}, ensure_ascii=False).encode() + b"\n")
                offsets.append(offset)
        np.save(folder / f"{stem}.offsets.npy", np.array(offsets))
        files = sorted(folder.glob(stem + ".*"))
        return {"count": len(self.docs), "files": {file.name: checksum(file) for file in files}}

    @classmethod
    def load(cls, folder, number, dim, options):
        stem, kind = f"{number:05d}", INDEXES[options.index]
        return cls(kind.load(folder / (stem + kind.suffix), dim, options), DocFile(folder, stem))


def checksum(path):
    """{"bytes", "sha256"} of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def write_manifest(folder, encoder, options, records):
    """The last file of a base: what it is made of, and how to tell that nothing changed since."""
    write_json(folder / "encoder.json", encoder.state())
    body = {"format": FORMAT, "count": sum(record["count"] for record in records), "dim": encoder.dim, "space": "ip",
            "encoder": {"name": encoder.name, "options": encoder.options, "fingerprint": encoder.fingerprint()},
            "index": asdict(options), "shards": records, "files": {"encoder.json": checksum(folder / "encoder.json")}}
    write_json(folder / "manifest.json", {**body, "sha256": text_sum(body)})


def text_sum(value):
    """Checksum of a JSON value, whatever its spacing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(path):
    """The manifest of a base, if this program can read it and nobody changed it."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path}: no knowledge base here (no manifest.json): make one with retrieve.py build")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: not of format {FORMAT}, which this program reads: build the base again")
    if manifest.pop("sha256", None) != text_sum(manifest):
        raise ValueError(f"{file}: altered (checksum differs): build the base again")
    return manifest


def check_files(path, manifest):
    """Compares every file of a base with its manifest: there, size, checksum."""
    for name, expected in [item for part in (manifest, *manifest["shards"]) for item in part["files"].items()]:
        file = Path(path) / name
        if not file.is_file():
            raise ValueError(f"{file}: missing: build the base again")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise ValueError(f"{file}: {size} bytes, expected {expected['bytes']} (truncated?): build the base again")
        if checksum(file) != expected:
            raise ValueError(f"{file}: altered (checksum differs): build the base again")


def put_in_place(folder, path):
    """Renames a finished folder to `path`. A base that stands there is moved aside first, then deleted."""
    clear_aside(path)
    if path.exists():
        os.replace(path, aside_of(path))
    os.replace(folder, path)
    clear_aside(path)


def aside_of(path):
    return path.parent / f".{path.name}.old"


def clear_aside(path):
    shutil.rmtree(aside_of(path), ignore_errors=True)


def check_target(path):
    """A place that a base may be written to: free, empty, or an older base."""
    if path.exists() and not (path / "manifest.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists and is no knowledge base: give another place, nothing was overwritten")


@contextmanager
def sole_writer(path, wait=True):
    """The right to write the base at `path`: one process at a time holds it, until it is done or dies (kill -9 too).

    Where another process holds it, this one waits, or with wait=False raises ValueError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(f"{path}: another process builds it: wait for that, or give another place") from None
            if os.fstat(file.fileno()).st_nlink:  # 0: who held it deleted it while we waited; others may hold a new one
                try:
                    check_target(path)
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return


# --------------------------------------------------------------------------------------------------- the knowledge base

class KnowledgeBase:
    """Documents that can be searched by words, pictures or both."""

    def __init__(self, encoder, shards, options, device="cpu"):
        self.encoder, self.shards, self.options, self.device = encoder, shards, options, device

    def __len__(self):
        return sum(len(shard.docs) for shard in self.shards)

    @classmethod
    def build(cls, docs, encoder, *, index="hnsw", M=16, ef_construction=200, seed=0, threads=0, ef=0):
        """Fits the encoder on the documents, encodes and indexes them, all in memory. For large corpora: build_folder.

        docs: an iterable of dicts with id, text and optionally title, image (a path). encoder: an Encoder or its name.
        """
        options = IndexOptions(index, M, ef_construction, ef, seed, threads)
        docs = [checked_doc(doc, f"document {i}") for i, doc in enumerate(docs)]
        encoder = load_encoder(encoder) if isinstance(encoder, (str, Path)) else encoder
        encoder, _ = encoder.fitted(docs)
        options = replace(options, ef=ef or encoder.ef)
        return cls(encoder, [Shard.build(docs, encoder, options)] if docs else [], options)

    def save(self, path):
        """Writes the base as a folder, beside `path` first and then renamed: nothing is ever half-written there."""
        path = Path(os.path.abspath(path))
        with sole_writer(path):
            self.write(path)

    def write(self, path):
        """What save does, for a caller who is the sole writer already."""
        folder = path.parent / f".{path.name}.new"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            records = [shard.write(folder, number, path) for number, shard in enumerate(self.shards)]
            write_manifest(folder, self.encoder, self.options, records)
            put_in_place(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def load(cls, path, encoder=None, *, device="cpu", ef=None):
        """Opens a saved base after checking every file of it.

        encoder: an Encoder or a name, the same that the base was built with; default: the one it names. device: where
        encoders and exact search run. ef: another one than the base was built with.
        """
        path = Path(os.path.abspath(path))
        manifest = read_manifest(path)
        made = manifest["encoder"]
        encoder = made["name"] if encoder is None else encoder
        if isinstance(encoder, (str, Path)):
            encoder = load_encoder(encoder, device, **(made["options"] if str(encoder) not in WEIGHT_FREE else {}))
        if (encoder.dim, encoder.fingerprint()) != (manifest["dim"], made["fingerprint"]):
            raise ValueError(f"{path}: built with encoder {made['name']!r} ({made['fingerprint']}, dimension "
                             f"{manifest['dim']}), not {encoder.name!r} ({encoder.fingerprint()}, dimension "
                             f"{encoder.dim}): use that one or build again")
        check_files(path, manifest)
        options = IndexOptions(**{**manifest["index"], **({"ef": ef} if ef else {})})
        shards = [Shard.load(path, number, encoder.dim, options) for number in range(len(manifest["shards"]))]
        return cls(encoder.restored(read_json(path / "encoder.json")), shards, options, usable_device(device))

    def search(self, queries, k=5):
        """The k best documents of each query, best first: a list of Hit for each, shorter where the base holds fewer.

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
        return [[self.hit(int(row), float(score)) for row, score in zip(*found)] for found in zip(rows, scores)]

    def search_vectors(self, vectors, k, exact=False):
        """The k best rows for vectors (Q, D): scores (Q, K) float32 and rows (Q, K) int64, K = min(k, documents)."""
        scores, rows, start = [], [], 0
        for shard in self.shards:
            reach = min(k + OVERFETCH, shard.index.count)
            found = (exact_search(chunks_of(shard.index), vectors, reach, self.device) if exact
                     else shard.index.search(vectors, reach, self.device))
            scores, rows, start = scores + [found[0]], rows + [found[1] + start], start + shard.index.count
        scores, rows = np.concatenate(scores, 1), np.concatenate(rows, 1)  # (Q, sum of reaches) each
        order = np.lexsort((rows, -scores.round(6)), axis=1)[:, :k]  # equal scores, but for rounding, in document order
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def place(self, row):
        """(shard, row in it) of a row of the whole base."""
        for shard in self.shards:
            if row < len(shard.docs):
                return shard, row
            row -= len(shard.docs)
        raise AssertionError("row beyond the last shard")

    def hit(self, row, score):
        shard, row = self.place(row)
        doc = shard.docs[row]
        return Hit(doc["id"], passage(doc), score, doc["image"])

    def recall(self, sample=200, k=10, seed=0):
        """Recall@k of the index against exact search, 0 to 1: how many of its k hits score as well as the exact k-th.

        sample: a list of queries, or a number of documents, drawn by seed, whose own vectors are the queries.
        """
        if k < 1 or (sample if isinstance(sample, int) else len(sample)) < 1:
            raise ValueError(f"recall@{k} of {sample} queries: give at least 1 of each")
        if not len(self):
            return 1.0
        if isinstance(sample, int):
            drawn = np.random.default_rng(seed).choice(len(self), min(sample, len(self)), replace=False)
            places = [self.place(row) for row in drawn]
            vectors = np.concatenate([shard.index.block(row, row + 1) for shard, row in places]).astype(np.float32)
        else:
            vectors = self.encoder.encode_queries(sample)
        found, exact = self.search_vectors(vectors, k)[0], self.search_vectors(vectors, k, exact=True)[0]
        return float((found >= exact[:, -1:] - 1e-5).mean())


def load_or_build(path, corpus, encoder):
    """The base of a plain JSONL corpus, kept at `path`: built on first use, or when the corpus is newer than the base.

    Of several processes that come at once one builds; the others wait for it and open what it built.
    """
    path, corpus = Path(os.path.abspath(path)), Path(corpus)

    def fresh():
        try:
            return (path / "manifest.json").stat().st_mtime >= corpus.stat().st_mtime
        except FileNotFoundError:
            return False

    if not fresh():
        with sole_writer(path):
            if not fresh():  # still, now that no other process is at it
                KnowledgeBase.build(read_docs(corpus), encoder).write(path)
    return KnowledgeBase.load(path)


def build_folder(read, encoder, out, options=IndexOptions(), *, shard=500_000, source="", log=lambda line: None):
    """Builds a base on disk, shard by shard, in memory bounded by one shard; returns the number of documents.

    read() gives a fresh stream of documents. Killed at any point and started again with the same arguments and the same
    `source` (any description of the corpus), it goes on after the last finished shard. `out` appears when all is done.
    While another process builds the same base, ValueError.
    """
    if shard < 1:
        raise ValueError(f"shard is {shard}: give the number of documents of a shard, at least 1")
    out = Path(os.path.abspath(out))
    with sole_writer(out, wait=False):
        return build_shards(read, encoder, out, replace(options, ef=options.ef or encoder.ef), shard, source, log)


def build_shards(read, encoder, out, options, shard, source, log):
    """What build_folder does, for the sole writer."""
    work = out.parent / f".{out.name}.building"
    plan = text_sum([FORMAT, source, encoder.fingerprint(), asdict(options), shard])
    last = out / "progress" / "plan.json"
    if last.is_file() and (known := read_json(last))["plan"] == plan:  # killed just after the base was put in place
        clear_aside(out)
        shutil.rmtree(out / "progress")
        return known["count"]
    encoder, count = begin_or_resume(work, plan, read, encoder, log)
    stream, records = iter(read()), []
    progress = Progress(count, log)
    for number in range(math.ceil(count / shard)):
        docs = (checked_doc(doc, f"shard {number}") for doc in itertools.islice(stream, shard))
        record = work / "progress" / f"{number}.json"
        if record.is_file():
            progress.add(sum(1 for _ in docs), encoded=False)
        else:
            write_json(record, Shard.build(list(docs), encoder, options, progress.add).write(work, number, out))
        records.append(read_json(record))
    if sum(record["count"] for record in records) != count or next(stream, None) is not None:
        raise ValueError(f"{out}: the corpus changed while it was read: delete {work} and build again")
    write_manifest(work, encoder, options, records)
    put_in_place(work, out)
    shutil.rmtree(out / "progress")
    return count


def begin_or_resume(work, plan, read, encoder, log):
    """(Encoder fitted on the corpus, number of documents): of an earlier run with the same plan, else of a new one."""
    begun = work / "progress" / "plan.json"
    if begun.is_file():
        known = read_json(begun)
        if known["plan"] == plan:
            log(f"going on in {work}")
            return encoder.restored(known["state"]), known["count"]
        log(f"{work} was begun with other options or another corpus: starting anew")
    encoder, count = encoder.fitted(read())  # also the look at every row before the long work begins
    log(f"{count} documents")
    shutil.rmtree(work, ignore_errors=True)
    (work / "progress").mkdir(parents=True)
    write_json(begun, {"plan": plan, "count": count, "state": encoder.state()})
    return encoder, count


class Progress:
    """Says every few seconds how many documents are done and how long the rest will take."""

    def __init__(self, total, log, every=5.0):
        self.total, self.log, self.every = total, log, every
        self.done = self.encoded = 0  # of the whole corpus; of them by this run
        self.start = self.said = time.monotonic()

    def add(self, count, encoded=True):
        """`count` more documents are done; encoded=False where an earlier run had done them."""
        self.done, self.encoded, now = self.done + count, self.encoded + count * encoded, time.monotonic()
        if encoded and (now - self.said >= self.every or self.done == self.total):
            self.said, rate = now, self.encoded / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate / 60
            self.log(f"{self.done} of {self.total} documents, {rate:.0f}/s, {left:.1f} min left")


# --------------------------------------------------------------------------------------------------------- command line

def log_line(line):
    print(line, file=sys.stderr, flush=True)


def build_command(args):
    """Reads a corpus, writes a base."""
    chosen = {f.name: getattr(args, f.name) for f in fields(EncoderOptions) if getattr(args, f.name) != f.default}
    encoder = load_encoder(args.encoder, args.device, **chosen)
    index = IndexOptions(**{f.name: getattr(args, f.name) for f in fields(IndexOptions)})
    if not os.path.exists(args.docs):
        raise ValueError(f"{args.docs}: no such file")
    source = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(args.docs)]
    count = build_folder(lambda: READERS[args.format](args.docs, args.images), encoder, args.out, index,
                         shard=args.shard, source=[args.format, args.images, source], log=log_line)
    if encoder.cut:
        log_line(f"{encoder.cut} documents were longer than the encoder reads and were cut")
    print(f"{args.out}: {count} documents, encoder {encoder.name}, dimension {encoder.dim}, index {index.index}")


def search_command(args):
    """Prints score, id and text of the best documents."""
    if not args.query.strip() and not args.image:
        raise ValueError("the query is empty: give some words, --image, or both")
    base = KnowledgeBase.load(args.kb, args.encoder, device=args.device, ef=args.ef)
    for hit in base.search([{"text": args.query, "image": args.image}], args.k)[0]:
        print(f"{hit.score:.4f}  {hit.id}  {hit.text}" + (f"  [{hit.image}]" if hit.image else ""))
    if base.encoder.cut:
        log_line("the query was longer than the encoder reads and was cut")


def info_command(args):
    """Prints what a base is made of, without opening its indexes."""
    manifest = read_manifest(args.kb)
    files = [f for part in (manifest, *manifest["shards"]) for f in part["files"].values()]
    shown = {"documents": manifest["count"], "encoder": manifest["encoder"], "dimension": manifest["dim"],
             "index": manifest["index"], "shards": len(manifest["shards"]), "bytes": sum(f["bytes"] for f in files)}
    print(json.dumps(shown, ensure_ascii=False))


def check_command(args):
    """Compares all checksums, then measures recall."""
    base = KnowledgeBase.load(args.kb, args.encoder, device=args.device, ef=args.ef)
    recall = round(base.recall(args.sample, args.k), 4)
    print(json.dumps({"documents": len(base), "checksums": "ok", f"recall@{args.k}": recall}))


def add_flags(parser, kind):
    """One flag for each field of an options dataclass."""
    for f in fields(kind):
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        if type(f.default) is bool:
            parser.add_argument(flag, dest=f.name, default=f.default, action=argparse.BooleanOptionalAction, help=text)
        else:
            text = f"{text} [{f.default}]" if f.default else text
            parser.add_argument(flag, dest=f.name, default=f.default, type=type(f.default), help=text)


def parse_arguments():
    """The commands and their flags."""
    top = argparse.ArgumentParser(prog="retrieve.py", description="Build, search and check knowledge bases.")
    commands = top.add_subparsers(required=True, metavar="build | search | info | check")
    build = commands.add_parser("build", help="encode and index a corpus; a killed build goes on when started again")
    build.add_argument("docs", help="the corpus: a file, or for wiki also a folder")
    build.add_argument("--out", required=True, help="folder of the base")
    build.add_argument("--format", default="plain", choices=list(READERS), help="of the corpus [plain JSONL]")
    build.add_argument("--images", help="folder that image paths start from [the file's own]")
    build.add_argument("--encoder", default="lexical", help="lexical, pixel or a model directory [lexical]")
    build.add_argument("--shard", type=int, default=500_000, help="documents of a shard [500000]")
    add_flags(build, EncoderOptions)
    add_flags(build, IndexOptions)
    search = commands.add_parser("search", help="print the best documents for a query")
    info = commands.add_parser("info", help="print what a base is made of")
    check = commands.add_parser("check", help="compare checksums, measure recall against exact search")
    for command in (search, info, check):
        command.add_argument("kb", help="folder of the base")
    search.add_argument("query", nargs="?", default="", help="words")
    search.add_argument("--image", help="a picture that belongs to the query")
    check.add_argument("--sample", type=int, default=200, help="documents that serve as queries [200]")
    for command, k in ((search, 5), (check, 10)):
        command.add_argument("-k", type=int, default=k, help=f"hits of a query [{k}]")
        command.add_argument("--ef", type=int, help="candidates looked at, instead of the base's own number")
        command.add_argument("--encoder", help="where the base's encoder lies now, if it was moved")
    for command in (build, search, check):
        command.add_argument("--device", default="cpu", help="where encoders and exact search run [cpu]")
    for command, run in zip((build, search, info, check), (build_command, search_command, info_command, check_command)):
        command.set_defaults(run=run)
    return top.parse_args()


def main():
    """Runs a command; a user's mistake is one line on stderr and exit code 2."""
    args = parse_arguments()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"retrieve.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
