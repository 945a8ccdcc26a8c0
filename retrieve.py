"""Knowledge bases: documents become vectors, vectors become an HNSW graph, a query becomes its
nearest documents.

    corpus -> reader -> documents {"id", "text", "title", "image"} -> encoder -> (N, D) -> index
    query (words, picture or both) -> encoder -> (Q, D) -> search of every shard -> merge -> hits

R1-Router asks three such bases (text, text-image, table). They differ only in reader
(parts/corpora.py) and encoder (parts/encoders.py, parts/pretrained.py). On disk a base is a folder
(parts/store.py): shards of index and documents, a manifest with the checksum of every file.

Shapes: N documents, Q queries, D dimension of a vector, C vectors of a chunk, K hits.

Deviation from the paper and from the released code: searching uses an HNSW graph (Malkov and
Yashunin, 2016) that is loaded once. The released code scores all vectors by brute force and reloads
encoders and corpus for each step. Exact search stays as an option (index="flat").
"""
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import hnswlib
import numpy as np
import torch

from parts.corpora import READERS, checked_doc, distinct, files_of, read_docs
from parts.encoders import WEIGHT_FREE, passage
from parts.pretrained import EncoderOptions, load_encoder
from parts.steps import BASES
from parts.store import (FORMAT, DocFile, Work, check_files, check_target, listed_files,
                         read_manifest, stem_of, text_sum, write_manifest, write_shard)
from plumbing.files import (checksum, lock, printable, read_json, real_place, replacing,
                            run_command, say)
from plumbing.options import OneLineParser, add_flags, check_options, fill, from_flags, option
from plumbing.weights import usable_device

OVERFETCH = 8   # hits beyond k: around the k-th place, document order settles equal scores
CHUNK = 8192    # documents encoded, or vectors scored by exact search, at a time


@dataclass(frozen=True)
class Hit:
    """A document that a search brings: its id, its words (title first), its score, and the path of
    its picture or None."""
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
    """The k largest inner products of queries (Q, D) with chunks of rows: scores (Q, k) float32,
    rows (Q, k) int64.

    Of equal scores the earlier row comes first, also where not all of them fit. Scores are rounded
    to six decimals: the products of one and the same vector differ in their last bits with its
    place in the chunk.
    """
    queries = torch.from_numpy(queries).to(device)
    best = queries.new_empty(len(queries), 0)
    rows = queries.new_empty((len(queries), 0), dtype=torch.long)
    start = 0                                                   # row of the chunk's first vector
    for chunk in chunks:
        chunk = torch.from_numpy(chunk).to(device).float()                      # (C, D)
        scores = (queries @ chunk.T).round(decimals=6)                          # (Q, C)
        size = min(k, len(chunk))
        values, places = scores.topk(size, dim=1)                               # (Q, <=k)
        tied = (scores >= values[:, -1:]).sum(1) > size         # (Q,) more are as good as the k-th:
        in_order = scores[tied].sort(dim=1, descending=True, stable=True)   # topk took any of them
        places[tied] = in_order.indices[:, :size]                           # slow, and rare
        places = places.sort(dim=1).values
        best = torch.cat([best, scores.gather(1, places)], 1)                   # (Q, <=2k)
        rows = torch.cat([rows, places + start], 1)                             # (Q, <=2k)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best = best[:, :k]                                                      # (Q, <=k)
        rows = rows.gather(1, order[:, :k])                                     # (Q, <=k)
        start += len(chunk)
    return best.cpu().numpy(), rows.cpu().numpy()


class Graph:
    """An HNSW graph over unit vectors, by hnswlib; the inner product of unit vectors is their
    cosine.

    More than `ef_construction` rows with one and the same vector find only each other and may hide
    what lies behind them: KnowledgeBase.recall shows it, index "flat" is free of it.
    """
    suffix = ".hnsw"

    def __init__(self, index, options):
        self.index, self.options = index, options

    @classmethod
    def empty(cls, dim, room, options):
        """A graph that will hold `room` vectors of dimension `dim`."""
        index = hnswlib.Index("ip", dim)
        index.init_index(room, M=options.M, ef_construction=options.ef_construction,
                         random_seed=options.seed)
        threads = 1 if room <= 20_000 else os.cpu_count()
        index.set_num_threads(options.threads or threads)
        return cls(index, options)

    @property
    def count(self):
        return self.index.get_current_count()

    def add(self, vectors):
        rows = np.arange(self.count, self.count + len(vectors))
        self.index.add_items(vectors, rows)

    def save(self, path):
        self.index.save_index(str(path))
        whole = self.index.index_file_size()                    # hnswlib does not look by itself
        if not path.is_file() or path.stat().st_size != whole:
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
        self.index.set_ef(max(self.options.ef, k))              # hnswlib does not keep it on disk
        try:
            rows, distances = self.index.knn_query(queries, k)
        except RuntimeError as error:
            if "contiguous" not in str(error):
                raise
            return exact_search(chunks_of(self), queries, k, device)    # too thin to reach k rows
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
        if vectors.shape != (len(chunk), encoder.dim) or not np.isfinite(vectors).all():
            raise ValueError(f"encoder {encoder.name!r}: {vectors.shape} for {len(chunk)} "
                             f"documents of dimension {encoder.dim}, or not finite: nothing was "
                             "indexed")
        index.add(vectors)
        if progress is not None:
            progress.add(len(chunk))
    return index


@dataclass(frozen=True)
class Shard:
    """A part of a base: an index, and the documents that its rows stand for in the same order (a
    list or a DocFile)."""
    index: object
    docs: object

    @classmethod
    def load(cls, folder, number, dim, options):
        """Opens shard `number` of a base."""
        kind = INDEXES[options.index]
        file = folder / (stem_of(number) + kind.suffix)
        index = kind.load(file, dim, options)
        docs = DocFile(folder, stem_of(number))
        if index.count != len(docs):
            raise ValueError(f"{file}: {index.count} vectors for {len(docs)} documents: build the "
                             "base again")
        return cls(index, docs)


# ----------------------------------------------------------------------------- the knowledge base

class KnowledgeBase:
    """Documents that can be searched by words, pictures or both."""
    mark = ""                                       # of a saved base: tells it from all others

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
        options = IndexOptions(index, M, ef_construction, ef, seed, threads)
        docs = [checked_doc(doc, f"document {number}") for number, doc in enumerate(docs)]
        docs = list(distinct(docs.copy))
        if isinstance(encoder, (str, Path)):
            encoder = load_encoder(encoder)
        encoder, _ = encoder.fitted(docs)
        options = replace(options, ef=ef or encoder.ef)
        shards = [Shard(build_index(docs, encoder, options), docs)] if docs else []
        return cls(encoder, shards, options)

    def save(self, path):
        """Writes the base as a folder, whole or not at all."""
        path = real_place(path)
        with lock(path):
            self.write(path)

    def write(self, path, corpus=None):
        """What save does, for a caller who holds the lock already. corpus: the checksum of the file
        that the base follows (load_or_build)."""
        check_target(path)
        with replacing(path) as folder:
            folder.mkdir()
            records = []
            for number, shard in enumerate(self.shards):
                records.append(write_shard(folder, number, shard.index, shard.docs, path))
            write_manifest(folder, self.encoder, self.options, records, corpus)

    @classmethod
    def load(cls, path, encoder=None, *, device="cpu", ef=None):
        """Opens a saved base after checking every file of it.

        encoder: an Encoder or a name, the same that the base was built with; default: the one it
        names. device: where encoders and exact search run. ef: another one than the base was built
        with.
        """
        path = real_place(path)
        manifest = read_manifest(path)
        encoder = encoder_of(manifest, path, encoder, device)
        check_files(path, manifest)
        options = fill(IndexOptions, manifest["index"], path / "manifest.json")
        options = replace(options, ef=ef or options.ef)
        shards = []
        for number in range(len(manifest["shards"])):
            shards.append(Shard.load(path, number, encoder.dim, options))
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
        queries = list(queries)
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k is {k}: give a whole number of at least 1")
        if not queries or not len(self):
            return [[] for _ in queries]
        scores, rows = self.search_vectors(self.encoder.encode_queries(queries), k)     # (Q, K)
        return [self.hits(*both) for both in zip(rows.tolist(), scores.tolist())]

    def search_vectors(self, vectors, k, exact=False):
        """The k best rows for vectors (Q, D): scores (Q, K) float32 and rows (Q, K) int64, K =
        min(k, documents)."""
        scores_of_shards, rows_of_shards, start = [], [], 0
        for shard in self.shards:
            index = shard.index
            reach = min(k + OVERFETCH, index.count)
            if exact:
                result = exact_search(chunks_of(index), vectors, reach, self.device)
            else:
                result = index.search(vectors, reach, self.device)
            scores_of_shards.append(result[0])                   # (Q, reach)
            rows_of_shards.append(result[1] + start)             # (Q, reach)
            start += index.count
        scores = np.concatenate(scores_of_shards, 1)            # (Q, sum of reaches)
        rows = np.concatenate(rows_of_shards, 1)                # (Q, sum of reaches)
        order = np.lexsort((rows, -scores.round(6)), axis=1)    # equal but for rounding: by row
        order = order[:, :k]                                    # (Q, K)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def place(self, row):
        """(shard, row in it) of a row of the whole base."""
        for shard in self.shards:
            if row < len(shard.docs):
                return shard, row
            row -= len(shard.docs)
        raise AssertionError("row beyond the last shard")

    def hits(self, rows, scores):
        """The documents of one query's rows as hits."""
        hits = []
        for row, score in zip(rows, scores):
            shard, row_in_shard = self.place(row)
            doc = shard.docs[row_in_shard]
            hits.append(Hit(doc["id"], passage(doc), score, doc["image"]))
        return hits

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


def encoder_of(manifest, path, encoder=None, device="cpu"):
    """The encoder of a saved base, or the given one (an Encoder or its name) if it is the same."""
    built = manifest["encoder"]
    if encoder is None:
        encoder = built["name"]
    if isinstance(encoder, (str, Path)):
        options = {} if str(encoder) in WEIGHT_FREE else built["options"]
        encoder = load_encoder(encoder, device, **options)
    if (encoder.dim, encoder.fingerprint()) != (manifest["dim"], built["fingerprint"]):
        raise ValueError(f"{path}: built with encoder {built['name']!r} ({built['fingerprint']}, "
                         f"dimension {manifest['dim']}), not {encoder.name!r} "
                         f"({encoder.fingerprint()}, dimension {encoder.dim}): use that one or "
                         "build again")
    return encoder


# ------------------------------------------------------------------------------- bases of a world

WORLD_ENCODERS = {"text": "lexical", "image": "pixel", "table": "lexical"}


def follows(path, corpus):
    """Whether the base at `path` was built from the file `corpus` as it is now. A base that names
    no corpus was put there by somebody (retrieve.py build), and serves as it is."""
    if not (path / "manifest.json").is_file():
        return False
    built_from = read_manifest(path).get("corpus")
    return built_from is None or built_from == checksum(corpus)


def load_or_build(path, corpus, encoder):
    """The base of a plain JSONL corpus, kept at `path`: built on first use, and again when the
    corpus is another one.

    Of several processes that come at once one builds; the others wait for it and open what it
    built.
    """
    path = real_place(path)
    if not follows(path, corpus):
        with lock(path):
            if not follows(path, corpus):           # still, now that no other process is at it
                built_from = checksum(corpus)
                base = KnowledgeBase.build(read_docs(corpus), encoder)
                base.write(path, built_from)
    return KnowledgeBase.load(path)


def world_bases(folder, names=BASES):
    """The bases of a world, kept in its folder kb."""
    bases = {}
    for name in names:
        corpus = Path(folder) / f"{name}.jsonl"
        if not corpus.is_file():
            raise ValueError(f"{corpus}: no such file: --world takes a folder that lab.world has "
                             "written")
        bases[name] = load_or_build(Path(folder) / "kb" / name, corpus, WORLD_ENCODERS[name])
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


# --------------------------------------------------------------------------------- builds on disk

def build_folder(read, encoder, out, options=IndexOptions(), *, shard=500_000, source=""):
    """Builds a base on disk, shard by shard, in memory bounded by one shard; returns the number of
    documents.

    read() gives a fresh stream of documents. Killed at any point and started again with the same
    arguments and the same `source` (any description of the corpus), it goes on after the last
    finished shard. `out` appears when all is done. ValueError while another process builds there.
    """
    if shard < 1:
        raise ValueError(f"shard is {shard}: give the number of documents of a shard, at least 1")
    out = real_place(out)
    options = replace(options, ef=options.ef or encoder.ef)
    plan = text_sum([FORMAT, source, encoder.fingerprint(), asdict(options), shard])
    with lock(out, wait=False):
        check_target(out)
        work = Work(out, plan)
        count = work.finished()
        if count is None:
            count = work.run(read, encoder, options, shard, build_index)
    return count


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
    """Reads a corpus, writes a base."""
    o = from_flags(BuildOptions, args)
    index = from_flags(IndexOptions, args)
    encoder = load_encoder(o.encoder, o.device, **from_flags(EncoderOptions, args).chosen())
    if not os.path.exists(args.docs):
        raise ValueError(f"{args.docs}: no such file")

    def read():
        return READERS[o.format](args.docs, o.images)

    if next(iter(read()), None) is None:
        raise ValueError(f"{args.docs}: holds no document of the format {o.format}")
    files = []
    for file in files_of(args.docs):
        stat = file.stat()
        files.append([str(file), stat.st_size, stat.st_mtime_ns])
    count = build_folder(read, encoder, o.out, index, shard=o.shard,
                         source=[o.format, o.images, files])
    if encoder.cut:
        say(f"{encoder.cut} documents were longer than the encoder reads and were cut")
    print(f"{o.out}: {count} documents, encoder {encoder.name}, dimension {encoder.dim}, index "
          f"{index.index}")


def search(args):
    """Prints score, id and text of the best documents."""
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
    """Compares all checksums, then measures recall."""
    o = from_flags(CheckOptions, args)
    base = KnowledgeBase.load(args.kb, o.encoder, device=o.device, ef=o.ef)
    recall = base.recall(o.sample, o.k)
    print(json.dumps({"documents": len(base), "checksums": "ok",
                      f"recall@{o.k}": round(recall, 4)}))


COMMANDS = {        # name -> function, what it does, its options
    "build": (build, "encode and index a corpus; a killed build goes on when started again",
              (BuildOptions, EncoderOptions, IndexOptions)),
    "search": (search, "print the best documents for a query", (SearchOptions,)),
    "info": (info, "print what a base is made of", ()),
    "check": (check, "compare checksums, measure recall against exact search", (CheckOptions,)),
}


def command(words):
    """Runs one of the commands."""
    top = OneLineParser(prog="retrieve.py", description="Knowledge bases.")
    commands = top.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    for name, (run, text, classes) in COMMANDS.items():
        parser = commands.add_parser(name, help=text, description=text)
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
