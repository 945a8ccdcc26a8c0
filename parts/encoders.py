"""Encoders without trained weights: lexical and pixel vectors, and what every encoder has in common."""
import hashlib
import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from parts.vision import load_picture
from plumbing.old import utf8


def passage(doc):
    """What is encoded and shown of a document: the title, then the words."""
    return f"{doc['title']} {doc['text']}" if doc.get("title") else doc["text"]


def split_query(query):
    """A query as (text, image): a string, or a dict with "text", "image" (a path or a PIL image) or both."""
    if isinstance(query, dict) and not {"text", "image"} & set(query):
        raise ValueError(f"a query is a string or {{'text', 'image'}}, not {query!r}")
    text, image = (query.get("text") or "", query.get("image")) if isinstance(query, dict) else (query, None)
    if not isinstance(text, str):
        raise ValueError(f"a query is a string or {{'text', 'image'}}, not {query!r}")
    return utf8(text), image


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


WEIGHT_FREE = {"lexical": Lexical, "pixel": Pixel}
