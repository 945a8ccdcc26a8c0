"""Knowledge bases: documents become vectors, vectors become an HNSW graph, a query becomes its
nearest documents.

    corpus -> reader -> documents {"id", "text", "title", "image"} -> encoder -> (N, D) -> index
    query (words, picture or both) -> encoder -> (Q, D) -> search of every shard -> merge -> hits

R1-Router asks three such bases (text, text-image, table). They differ only in reader
(parts/corpora.py) and encoder (parts/encoders.py, parts/pretrained.py). On disk a base is a folder
(parts/store.py), in shards of some documents each.

Shapes: N documents, Q queries, D dimension of a vector, C vectors of a chunk, K hits.

Deviation from the paper and from the released code: searching uses an HNSW graph (Malkov and
Yashunin, 2016) that is loaded once. The released code scores all vectors by brute force and reloads
encoders and corpus for each step. Exact search stays as an option (index="flat").
"""
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import hnswlib
import numpy as np
import torch

from parts.corpora import READERS, checked_doc, distinct, read_docs, stamps
from parts.encoders import passage
from parts.pretrained import EncoderOptions, load_encoder
from parts.steps import BASES
from parts.store import (DocFile, ResumableBuild, check_files, encoder_of, listed_files,
                         read_manifest, stem_of, text_sum, up_to_date, write_base)
from plumbing.files import checksum, lock, printable, read_json, real_place, run_command, say
from plumbing.options import OneLineParser, add_flags, check_options, fill, from_flags, option
from plumbing.weights import usable_device

CHUNK = 8192    # documents encoded, or vectors scored by exact search, at a time
OVERFETCH = 8   # hits asked of an index beyond k, so that of equal ones the first documents stay


@dataclass(frozen=True)
class Hit:
    """A document that a search found: `text` begins with the title, `image` is a path."""
    id: str
    text: str
    score: float
    image: str | None = None


# ---------------------------------------------------------------------------------------- indexes

@dataclass(frozen=True)
class IndexOptions:
    """How vectors are indexed and searched."""
    index: str = option("hnsw", "hnsw: the graph; flat: exact search, half-precision vectors",
                        choices=("hnsw", "flat"))
    M: int = option(16, "neighbours of a node in the graph: more is better, slower and larger",
                    least=2, most=10_000)
    ef_construction: int = option(200, "candidates looked at when a node is inserted",
                                  least=1, most=10**6)
    ef: int = option(0, "candidates looked at by a search; 0: as the encoder needs (2500 "
                        "without weights, else 200)", most=10**9)
    seed: int = option(0, "of the graph's random layers", most=2**63 - 1)
    threads: int = option(0, "that insert; 0: one for up to 20000 vectors, so that every byte "
                             "repeats, else all cores", most=1024)

    def __post_init__(self):
        check_options(self)


def exact_search(chunks, queries, k, device="cpu"):
    """The k largest inner products of queries (Q, D) with the rows of all chunks (C, D): scores
    (Q, k) float32, rows (Q, k) int64.

    Of equal scores the earlier row comes first, also where not all of them fit. Scores are rounded
    to six decimals: the products of one and the same vector differ in their last bits with its
    place in the chunk.
    """
    queries = torch.from_numpy(queries).to(device)
    best_scores = queries.new_empty(len(queries), 0)
    best_rows = queries.new_empty((len(queries), 0), dtype=torch.long)
    start = 0                                                   # row of the chunk's first vector
    for chunk in chunks:
        vectors = torch.from_numpy(chunk).to(device).float()                    # (C, D)
        scores = (queries @ vectors.T).round(decimals=6)                        # (Q, C)
        size = min(k, len(vectors))
        top, columns = scores.topk(size, dim=1)                                 # (Q, <=k)
        # topk takes any of equal scores. Where some are left over, a slower sort takes the first.
        left_over = (scores >= top[:, -1:]).sum(1) > size                       # (Q,)
        in_order = scores[left_over].sort(dim=1, descending=True, stable=True).indices
        columns[left_over] = in_order[:, :size]
        columns = columns.sort(dim=1).values                                    # earlier row first
        best_scores = torch.cat([best_scores, scores.gather(1, columns)], 1)    # (Q, <=2k)
        best_rows = torch.cat([best_rows, columns + start], 1)                  # (Q, <=2k)
        best_scores, order = best_scores.sort(dim=1, descending=True, stable=True)
        best_scores = best_scores[:, :k]
        best_rows = best_rows.gather(1, order[:, :k])
        start += len(vectors)
    return best_scores.cpu().numpy(), best_rows.cpu().numpy()


class Graph:
    """An HNSW graph by hnswlib over unit vectors, whose inner product is their cosine.

    More than `ef_construction` equal vectors find only each other, and may hide others from a
    search: KnowledgeBase.recall shows it, index "flat" is free of it.
    """
    suffix = ".hnsw"

    def __init__(self, hnsw, options):
        self.hnsw, self.options = hnsw, options

    @classmethod
    def empty(cls, dim, room, options):
        """A graph that will hold `room` vectors of dimension `dim`."""
        hnsw = hnswlib.Index("ip", dim)
        hnsw.init_index(room, M=options.M, ef_construction=options.ef_construction,
                        random_seed=options.seed)
        threads = 1 if room <= 20_000 else os.cpu_count()
        hnsw.set_num_threads(options.threads or threads)
        return cls(hnsw, options)

    @property
    def count(self):
        return self.hnsw.get_current_count()

    def add(self, vectors):
        self.hnsw.add_items(vectors)

    def save(self, path):
        self.hnsw.save_index(str(path))
        size = self.hnsw.index_file_size()                      # hnswlib does not look by itself
        if not path.is_file() or path.stat().st_size != size:
            raise OSError(f"{path}: could not be written whole: is the disk full?")

    @classmethod
    def load(cls, path, dim, options):
        hnsw = hnswlib.Index("ip", dim)
        hnsw.load_index(str(path))
        return cls(hnsw, options)

    def block(self, start, stop):
        """The vectors of rows start to stop: (n, D) float32."""
        return self.hnsw.get_items(np.arange(start, stop), return_type="numpy")

    def search(self, queries, k, device):
        """The k <= count nearest rows of queries (Q, D): scores (Q, k) and rows (Q, k)."""
        self.hnsw.set_ef(max(self.options.ef, k))               # hnswlib does not keep it on disk
        try:
            rows, distances = self.hnsw.knn_query(queries, k)
        except RuntimeError as error:
            if "contiguous" not in str(error):                  # else: too thin to reach k rows
                raise
            return exact_search(chunks_of(self), queries, k, device)
        return 1 - distances, rows.astype(np.int64)


class Flat:
    """Exact search over vectors in half precision, in memory or mapped from disk."""
    suffix = ".npy"

    def __init__(self, vectors, count):
        """vectors (N, D) float16, of which `count` rows are filled."""
        self.vectors, self.count = vectors, count

    @classmethod
    def empty(cls, dim, room, options):
        return cls(np.empty((room, dim), np.float16), 0)

    def add(self, vectors):
        end = self.count + len(vectors)
        self.vectors[self.count:end] = vectors
        self.count = end

    def save(self, path):
        np.save(path, self.vectors)

    @classmethod
    def load(cls, path, dim, options):
        vectors = np.load(path, mmap_mode="r")
        if vectors.shape[1:] != (dim,):
            raise ValueError(f"{path}: vectors of shape {vectors.shape[1:]}, expected dimension "
                             f"{dim}: build the base again")
        return cls(vectors, len(vectors))

    def block(self, start, stop):
        return np.array(self.vectors[start:stop])               # (n, D) float16

    def search(self, queries, k, device):
        return exact_search(chunks_of(self), queries, k, device)


INDEXES = {"hnsw": Graph, "flat": Flat}


def chunks_of(index):
    """All vectors of an index, some thousand rows at a time."""
    for start in range(0, index.count, CHUNK):
        yield index.block(start, min(start + CHUNK, index.count))


def build_index(docs, encoder, options, progress=None):
    """The index of a list of documents, which `progress` counts."""
    if options.index == "hnsw" and not encoder.normalised:
        raise ValueError("raw inner products and an HNSW graph do not go together (poor recall): "
                         "give index 'flat'")
    index = INDEXES[options.index].empty(encoder.dim, len(docs), options)
    for start in range(0, len(docs), CHUNK):
        chunk = docs[start:start + CHUNK]
        vectors = encoder.encode_docs(chunk)                                    # (C, D)
        shape = (len(chunk), encoder.dim)
        if vectors.shape != shape or not np.isfinite(vectors).all():
            raise ValueError(f"encoder {encoder.name!r}: vectors of shape {vectors.shape}, "
                             f"expected {shape}, all finite: nothing was indexed")
        index.add(vectors)
        if progress is not None:
            progress.add(len(chunk))
    return index


# ----------------------------------------------------------------------------- the knowledge base

@dataclass(frozen=True)
class Shard:
    """An index, and the documents that its rows stand for, in the same order."""
    index: Graph | Flat
    docs: list | DocFile


class KnowledgeBase:
    """Documents that can be searched by words, pictures or both."""
    mark = ""                                       # checksum of a saved base's manifest

    def __init__(self, encoder, shards, options, device="cpu"):
        self.encoder, self.shards, self.options, self.device = encoder, shards, options, device

    def __len__(self):
        return sum(len(shard.docs) for shard in self.shards)

    @classmethod
    def build(cls, docs, encoder, *, index="hnsw", M=16, ef_construction=200, seed=0, threads=0,
              ef=0):
        """Fits the encoder on the documents, encodes and indexes them, all in memory. For large
        corpora: build_folder.

        docs: an iterable of dicts with id, text and optionally title, image (a path). encoder: an
        Encoder or its name.
        """
        docs = [checked_doc(doc, f"document {number}") for number, doc in enumerate(docs)]
        encoder, _ = load_encoder(encoder).fitted(distinct(lambda: docs))
        options = IndexOptions(index, M, ef_construction, ef or encoder.ef, seed, threads)
        shards = [Shard(build_index(docs, encoder, options), docs)] if docs else []
        return cls(encoder, shards, options)

    def save(self, path):
        """Writes the base as a folder, whole or not at all."""
        path = real_place(path)
        with lock(path):
            write_base(path, self)

    @classmethod
    def load(cls, path, encoder=None, *, device="cpu", ef=None):
        """Opens a saved base after checking every file of it.

        encoder: the Encoder that the base was built with, or its name; default: the one it names.
        device: where encoders and exact search run. ef: another one than the base was built with.
        """
        path = real_place(path)
        manifest = read_manifest(path)
        encoder = encoder_of(manifest, path, encoder, device)
        check_files(path, manifest)
        options = fill(IndexOptions, manifest["index"], path / "manifest.json")
        options = replace(options, ef=ef or options.ef)
        kind = INDEXES[options.index]
        shards = []
        for number in range(len(manifest["shards"])):
            file = path / (stem_of(number) + kind.suffix)
            index = kind.load(file, encoder.dim, options)
            docs = DocFile(path, number)
            if index.count != len(docs):
                raise ValueError(f"{file}: {index.count} vectors for {len(docs)} documents: build "
                                 "the base again")
            shards.append(Shard(index, docs))
        encoder = encoder.restored(read_json(path / "encoder.json"))
        base = cls(encoder, shards, options, usable_device(device))
        base.mark = text_sum(manifest)
        return base

    def search(self, queries, k=5):
        """The k best documents of each query, best first: a list of Hit for each, shorter where the
        base holds fewer.

        A query is a string or {"text", "image"}. Equal scores stand in document order; where more
        than k + 8 documents are equal, exact search takes the first of them, the graph (index
        "hnsw") those that it meets.
        """
        if isinstance(queries, (str, dict)):
            raise ValueError("search takes a list of queries: put the one query into a list")
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k is {k}: give a whole number of at least 1")
        if not queries or not len(self):
            return [[] for _ in queries]
        scores, rows = self.search_vectors(self.encoder.encode_queries(queries), k)     # (Q, K)
        results = []
        for query_rows, query_scores in zip(rows.tolist(), scores.tolist()):
            results.append(list(map(self.hit, query_rows, query_scores)))
        return results

    def search_vectors(self, vectors, k, exact=False):
        """The k best rows for vectors (Q, D): scores (Q, K) float32 and rows (Q, K) int64, K =
        min(k, documents)."""
        shard_scores, shard_rows, start = [], [], 0
        for shard in self.shards:
            index = shard.index
            reach = min(k + OVERFETCH, index.count)
            if exact:
                scores, rows = exact_search(chunks_of(index), vectors, reach, self.device)
            else:
                scores, rows = index.search(vectors, reach, self.device)
            shard_scores.append(scores)                             # (Q, reach)
            shard_rows.append(rows + start)                         # (Q, reach)
            start += index.count
        all_scores = np.concatenate(shard_scores, 1)                # (Q, sum of reaches)
        all_rows = np.concatenate(shard_rows, 1)                    # (Q, sum of reaches)
        order = np.lexsort((all_rows, -all_scores.round(6)), axis=1)    # of equal scores by row
        order = order[:, :k]                                        # (Q, K)
        return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)

    def place(self, row):
        """(shard, row in it) of a row of the whole base."""
        for shard in self.shards:
            if row < len(shard.docs):
                return shard, row
            row -= len(shard.docs)

    def hit(self, row, score):
        """The document of a row as a hit."""
        shard, row_in_shard = self.place(row)
        doc = shard.docs[row_in_shard]
        return Hit(doc["id"], passage(doc), score, doc["image"])

    def recall(self, sample=200, k=10, seed=0):
        """Recall@k of the index against exact search, 0 to 1: how many of its k hits score as well
        as the exact k-th.

        sample: a list of queries, or a number of documents, drawn by seed, whose own vectors are
        the queries.
        """
        size = sample if isinstance(sample, int) else len(sample)
        if k < 1 or size < 1:
            raise ValueError(f"recall@{k} of {sample} queries: give at least 1 of each")
        if not len(self):
            return 1.0
        if isinstance(sample, int):
            size = min(size, len(self))
            rows = np.random.default_rng(seed).choice(len(self), size, replace=False)
            places = [self.place(row) for row in rows]
            blocks = [shard.index.block(row, row + 1) for shard, row in places]
            vectors = np.concatenate(blocks).astype(np.float32)                 # (Q, D)
        else:
            vectors = self.encoder.encode_queries(sample)                       # (Q, D)
        scores, _ = self.search_vectors(vectors, k)                             # (Q, K)
        exact, _ = self.search_vectors(vectors, k, exact=True)                  # (Q, K)
        return float((scores >= exact[:, -1:] - 1e-5).mean())


def build_folder(read, encoder, out, options=IndexOptions(), *, shard=500_000, source=""):
    """Builds a base on disk, shard by shard, in memory bounded by one shard; returns the number of
    documents.

    read() gives a fresh stream of documents. Killed at any point and started again with the same
    arguments and the same `source` (any description of the corpus), it goes on after the last
    finished shard. `out` appears when all is done. ValueError while another process builds there.
    """
    out = real_place(out)
    options = replace(options, ef=options.ef or encoder.ef)
    with lock(out, wait=False):
        return ResumableBuild(out, encoder, options, shard, source).run(read, build_index)


# ------------------------------------------------------------------------------- bases of a world

WORLD_ENCODERS = {"text": "lexical", "image": "pixel", "table": "lexical"}


def load_or_build(path, corpus, encoder):
    """The base of a plain JSONL corpus, kept at `path`: built on first use, and again when the
    corpus is another one. Of several processes that need it at once, one builds and the others
    wait."""
    path = real_place(path)
    if not up_to_date(path, corpus):
        with lock(path):
            if not up_to_date(path, corpus):        # no other process built it in the meantime
                corpus_sum = checksum(corpus)
                base = KnowledgeBase.build(read_docs(corpus), encoder)
                write_base(path, base, corpus_sum)
    return KnowledgeBase.load(path)


def world_bases(folder, names=BASES):
    """The bases of a world, kept in its folder kb."""
    folder, bases = Path(folder), {}
    for name in names:
        corpus = folder / f"{name}.jsonl"
        if not corpus.is_file():
            raise ValueError(f"{corpus}: no such file: a world has text.jsonl, image.jsonl, "
                             "table.jsonl and questions.jsonl")
        bases[name] = load_or_build(folder / "kb" / name, corpus, WORLD_ENCODERS[name])
    return bases


def load_bases(named):
    """["text=DIR", ...] -> {"text": KnowledgeBase, ...}."""
    bases = {}
    for item in named:
        name, _, folder = item.partition("=")
        if name not in BASES or not folder:
            raise ValueError(f"--kb {item}: expected NAME=DIR with a name of {', '.join(BASES)}")
        if name in bases:
            raise ValueError(f"--kb {item}: there is a base {name} before it: name each once")
        bases[name] = KnowledgeBase.load(folder)
    return bases


# ----------------------------------------------------------------------------------- command line

@dataclass(frozen=True)
class BuildOptions:
    """What is built, of what, and where."""
    out: str = option(text="folder of the base")
    format: str = option("plain", "of the corpus", choices=tuple(READERS))
    images: str = option(None, "folder that image paths start from; default: the file's own")
    encoder: str = option("lexical", "lexical, pixel or a model directory")
    shard: int = option(500_000, "documents of a shard", least=1)
    device: str = option("cpu", "where encoders and exact search run")


@dataclass(frozen=True)
class OpenOptions:
    """How a base is opened."""
    ef: int = option(0, "candidates looked at, instead of the base's own number")
    encoder: str = option(None, "where the base's encoder lies now, if it was moved")
    device: str = option("cpu", "where encoders and exact search run")


@dataclass(frozen=True)
class SearchOptions(OpenOptions):
    """What a base is asked, beside the words."""
    image: str = option(None, "a picture that belongs to the query")
    k: int = option(5, "passages of a query", least=1)


@dataclass(frozen=True)
class CheckOptions(OpenOptions):
    """How well a base finds its own documents."""
    sample: int = option(200, "documents that serve as queries", least=1)
    k: int = option(10, "passages of a query", least=1)


def build(args):
    """Encodes and indexes a corpus; a killed build goes on when started again."""
    o = from_flags(BuildOptions, args)
    options = from_flags(IndexOptions, args)
    encoder = load_encoder(o.encoder, o.device, **from_flags(EncoderOptions, args).chosen())
    read = partial(READERS[o.format], args.docs, o.images)
    if not any(read()):
        raise ValueError(f"{args.docs}: holds no document of the format {o.format}")
    count = build_folder(read, encoder, o.out, options, shard=o.shard,
                         source=[o.format, o.images, stamps(args.docs)])
    if encoder.cut:
        say(f"{encoder.cut} documents were longer than the encoder reads and were cut")
    print(f"{o.out}: {count} documents, encoder {encoder.name}, dimension {encoder.dim}, index "
          f"{options.index}")


def search(args):
    """Prints score, id and text of the best documents for a query."""
    o = from_flags(SearchOptions, args)
    if not args.query.strip() and not o.image:
        raise ValueError("the query is empty: give some words, --image, or both")
    base = KnowledgeBase.load(args.kb, o.encoder, device=o.device, ef=o.ef)
    [hits] = base.search([{"text": args.query, "image": o.image}], o.k)
    for hit in hits:
        line = f"{hit.score:.4f}  {printable(hit.id)}  {printable(hit.text)}"
        if hit.image:
            line += f"  [{printable(hit.image)}]"
        print(line)
    if base.encoder.cut:
        say("the query was longer than the encoder reads and was cut")


def info(args):
    """Prints what a base is made of, without opening its indexes."""
    manifest = read_manifest(args.kb)
    size = sum(file["bytes"] for file in listed_files(manifest).values())
    print(json.dumps({"documents": manifest["count"], "encoder": manifest["encoder"],
                      "dimension": manifest["dim"], "index": manifest["index"],
                      "shards": len(manifest["shards"]), "bytes": size}, ensure_ascii=False))


def check(args):
    """Compares checksums, then measures recall against exact search."""
    o = from_flags(CheckOptions, args)
    base = KnowledgeBase.load(args.kb, o.encoder, device=o.device, ef=o.ef)
    recall = base.recall(o.sample, o.k)
    print(json.dumps({"documents": len(base), "checksums": "ok",
                      f"recall@{o.k}": round(recall, 4)}))


COMMANDS = {"build": (build, BuildOptions, EncoderOptions, IndexOptions),
            "search": (search, SearchOptions), "info": (info,), "check": (check, CheckOptions)}


def command(words):
    """Runs one of the commands."""
    top = OneLineParser(prog="retrieve.py", description="Knowledge bases.")
    commands = top.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    for name, (run, *classes) in COMMANDS.items():
        parser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        parser.set_defaults(run=run)
        if name == "build":
            parser.add_argument("docs", help="the corpus: a file, or for wiki also a folder")
        else:
            parser.add_argument("kb", help="folder of the base")
        if name == "search":
            parser.add_argument("query", nargs="?", default="", help="words")
        for cls in classes:
            add_flags(parser, cls)
    args = top.parse_args(words)
    args.run(args)


def main(argv=None):
    return run_command("retrieve.py", command, argv, stopped="stopped; the same build continues")


if __name__ == "__main__":
    sys.exit(main())
