"""Vectors without trained weights, and what every encoder has in common.

    {"text", "title", "image"} -> encode_docs    -> (N, D)
    words, picture or both     -> encode_queries -> (Q, D)

    lexical   words: seeded random projections, rare words weigh more
    pixel     pictures: 8 x 8 mean colours, beside the lexical vector of the caption

Shapes: N documents, Q queries, D dimension of a vector, W words of all texts, V different words.

Deviation from the released code: these two encoders are ours, since the embedded world must run
without downloads. Encoders with weights are in parts/pretrained.py.
"""
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
from plumbing.files import utf8


def passage(doc):
    """What is encoded and shown of a document: the title, then the words."""
    if doc.get("title"):
        return f"{doc['title']} {doc['text']}"
    return doc["text"]


def split_query(query):
    """A query as (text, image): a string, or a dict with "text", "image" (a path or a PIL image) or
    both."""
    text, image = query, None
    if isinstance(query, dict) and ("text" in query or "image" in query):
        text, image = query.get("text") or "", query.get("image")
    if not isinstance(text, str):
        raise ValueError(f"a query is a string or {{'text', 'image'}}, not {query!r}")
    return utf8(text), image


def texts_only(queries):
    """The words of queries to a base that reads no pictures. A picture beside words is ignored."""
    texts = []
    for text, image in map(split_query, queries):
        if image is not None and not text.strip():
            raise ValueError("a picture without words was put to a base of words: give a text, or "
                             "ask the base of pictures")
        texts.append(text)
    return texts


class Encoder:
    """Turns documents and queries into rows of one space. One's own needs name, dim and the two
    encode methods."""
    name = ""               # what load_encoder takes
    dim = 0
    normalised = True       # rows have length one, so that their inner product is their cosine
    ef = 200                # candidates that a search of a graph over such vectors should look at
    options = {}            # what load_encoder takes beside the name; travels with a base
    cut = 0                 # documents and queries so far that were longer than the encoder reads

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
        """(encoder, number of documents): the encoder after one look at the corpus. Most need none
        and only count."""
        return self, sum(1 for _ in docs)

    def state(self):
        """What fitting learned, for JSON; restored(state) gives the fitted encoder back."""
        return {}

    def restored(self, state):
        return self

    def similarity(self, a, b):
        """Inner product of two texts' vectors: their cosine, from -1 to 1, where rows are
        normalised."""
        x, y = self.encode_queries([a, b])
        return float(x @ y)


# ------------------------------------------------------------------------------------------ words

WORD = re.compile(r"\d+|[\u3040-\u30ff\u3400-\u9fff]"           # Han and kana one by one
                  r"|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")
STOP = frozenset(
    "a an and are at be by did do does for from had has have he her his how in is it its of on or "
    "she that the their there these they this those to was were what when where which who whom "
    "whose why with".split())
STOP_WEIGHT = 0.3
NGRAM_SHARE = 0.4


def words_of(text):
    """Words and numbers in lower case, accents and widths in one spelling."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@lru_cache(maxsize=16384)
def sign_vector(key, dim):
    """The random direction of a string: +-1/sqrt(D) by the bits of its hash, the same on every
    machine. (D,) float32.

    Random signs keep angles as well as Gaussian numbers do (Achlioptas, 2003): two strings have
    cosine 0 +- 1/sqrt(D).
    """
    digest = hashlib.shake_128(key.encode()).digest(dim // 8)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))           # (D,) of 0 and 1
    return (bits.astype(np.float32) * 2 - 1) / math.sqrt(dim)


@lru_cache(maxsize=65536)
def word_vector(word, in_corpus, dim):
    """Vector of a word: its own random direction and a light share of its letter trigrams. (D,).

    A misspelt or inflected word that no document holds consists of its trigrams alone and so still
    finds neighbours. Between two words of the corpus that share a syllable the trigrams add about
    0.4^2 / 3 = 0.05 to the cosine, about what chance does at 512 dimensions: exact names win.
    """
    edged = f"<{word}>"
    trigrams = 0
    for start in range(len(edged) - 2):
        trigrams = trigrams + sign_vector("#" + edged[start:start + 3], dim)
    trigrams = trigrams / max(np.linalg.norm(trigrams), 1e-9)
    if not in_corpus:
        return trigrams
    return math.sqrt(1 - NGRAM_SHARE**2) * sign_vector(word, dim) + NGRAM_SHARE * trigrams


class Lexical(Encoder):
    """Bag of words by random projection, each word weighted by the square root of its inverse
    document frequency.

    (With the frequency itself a rare name, and other names that chance makes similar to it, drown
    the word that says what the question is about.) The frequencies are those of the corpus the
    encoder was fitted on. Unfitted, all but stop words weigh the same; fitted once, it stays as it
    is. Such vectors form no slope that a graph could follow, so a search must look at many
    candidates: meant for corpora of up to some 10,000 documents.
    """
    name, dim, ef = "lexical", 512, 2500

    def __init__(self, documents=0, frequency=None):
        """documents of the corpus; frequency: word -> number of documents that hold it."""
        self.documents, self.frequency = documents, Counter(frequency)

    def fitted(self, docs):
        frequency, count = Counter(), 0
        for doc in docs:
            frequency.update(set(words_of(passage(doc))))
            count += 1
        return self if self.documents else Lexical(count, frequency), count

    def state(self):
        return {"documents": self.documents, "frequency": dict(sorted(self.frequency.items()))}

    def restored(self, state):
        return Lexical(**state)

    def weight(self, word):
        """The square root of 0.5 + idf; 0.3 for stop words."""
        return STOP_WEIGHT if word in STOP else math.sqrt(0.5 + self.idf(word))

    def idf(self, word):
        """ln((N + 2) / (df + 1)): close to 0 for a word that all N documents hold, larger for rarer
        ones."""
        return math.log((self.documents + 2) / (self.frequency[word] + 1))

    def in_corpus(self, word):
        """Whether the corpus holds the word; before fitting every word counts as in it."""
        return not self.documents or word in self.frequency

    def encode_texts(self, texts):
        """Texts to unit rows (N, D) float32; a text without any word becomes zeros."""
        bags = [Counter(words_of(text)) for text in texts]
        column = {}                                     # word -> its row in the table of vectors
        for bag in bags:
            for word in bag:
                column.setdefault(word, len(column))
        if not column:
            return np.zeros((len(bags), self.dim), np.float32)
        table = np.stack([word_vector(word, self.in_corpus(word), self.dim) for word in column])
        weights = np.array([self.weight(word) for word in column], np.float32)
        table *= weights[:, None]                                                       # (V, D)
        words, times, starts = [], [], []
        for bag in bags:
            starts.append(len(words))
            words += [column[word] for word in bag]
            times += [1 + math.log(n) for n in bag.values()]            # repetitions count less
        sums = F.embedding_bag(torch.tensor(words), torch.from_numpy(table), torch.tensor(starts),
                               mode="sum", per_sample_weights=torch.tensor(times))      # (N, D)
        return F.normalize(sums, dim=1).numpy()

    def encode_docs(self, docs):
        return self.encode_texts([passage(doc) for doc in docs])

    def encode_queries(self, queries):
        return self.encode_texts(texts_only(queries))


# --------------------------------------------------------------------------------------- pictures

class Pixel(Encoder):
    """Pictures with captions: [colours (192) | words (512)], each part of length one where there is
    one."""
    name, ef = "pixel", 2500
    side = 8                                                # of the grid of colours
    dim = side * side * 3 + Lexical.dim

    def __init__(self, words=None):
        """words: the Lexical of the captions, and of the words of queries."""
        self.words = words or Lexical()

    def fitted(self, docs):
        words, count = self.words.fitted(docs)
        return Pixel(words), count

    def state(self):
        return self.words.state()

    def restored(self, state):
        return Pixel(self.words.restored(state))

    def colours(self, image):
        """The picture's mean colours on an 8 x 8 grid, centred, of length one: (192,) float32;
        zeros for no picture."""
        if image is None:
            return np.zeros(self.side * self.side * 3, np.float32)
        small = load_picture(image).resize((self.side, self.side), Image.BOX)
        means = np.asarray(small, np.float32).reshape(-1)
        centred = means - means.mean()
        return centred / max(np.linalg.norm(centred), 1e-6)

    def fuse(self, images, words):
        """Pictures (N, each may be None) and word vectors (N, 512) to unit rows (N, D)."""
        colours = np.array([self.colours(image) for image in images], np.float32)
        colours = colours.reshape(len(words), -1)                               # (N, 192)
        both = torch.from_numpy(np.concatenate([colours, words], 1))            # (N, D)
        return F.normalize(both, dim=1).numpy()

    def encode_docs(self, docs):
        return self.fuse([doc.get("image") for doc in docs], self.words.encode_docs(docs))

    def encode_queries(self, queries):
        """Queries to unit rows (Q, 704) float32.

        Beside a picture the words count by the share of their idf that the captions hold: "which
        country has this flag?" holds nothing that tells one caption from another, so the picture
        alone decides; a name would count.
        """
        texts, images, shares = [], [], []
        for text, image in map(split_query, queries):
            texts.append(text)
            images.append(image)
            shares.append(1.0 if image is None else self.shared_idf(text))
        words = self.words.encode_texts(texts) * np.array(shares, np.float32)[:, None]  # (Q, 512)
        return self.fuse(images, words)

    def shared_idf(self, text):
        """Share of the text's idf that lies on words of the corpus, 0 to 1; a word of every
        document adds nothing."""
        shared = total = 0
        for word in dict.fromkeys(words_of(text)):
            if word in STOP:
                continue
            idf = self.words.idf(word)
            total += idf
            if self.words.in_corpus(word):
                shared += idf
        return shared / max(total, 1e-9)


WEIGHT_FREE = {"lexical": Lexical, "pixel": Pixel}
