"""Knowledge bases: documents become vectors, vectors become an HNSW graph, a query becomes its nearest documents.

    corpus file -> reader -> documents {"id", "text", "title", "image"} -> encoder -> (N, D) -> index
    query (words, picture or both) -> encoder -> (Q, D) -> search of every shard -> merge -> hits

R1-Router asks three such bases (text, text-image, table). They differ only in reader and encoder (encode.py).

On disk a base is one folder: shards of index + documents, and a manifest with the checksum of every file.

Shapes: N documents, Q queries, D dimension of a vector, K hits.

Deviations from the paper and from the released code, and why:
  * searching: an HNSW graph (Malkov and Yashunin, 2016) that is loaded once. The released code scores all vectors by
    brute force and reloads encoders and corpus for each step. Exact search stays as an option (index="flat");
  * Wikipedia: the released builder repeats the last window of a page, breaks on quotes in titles, leaves HTML entities
    and writes a wrong id before each passage. Here a last, shorter window covers what no full one does, and an id says
    page and window.
"""
import itertools
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import hnswlib
import numpy as np
import torch

from parts.corpora import READERS, checked_doc, distinct, files_of, read_docs
from parts.encoders import WEIGHT_FREE, passage
from parts.pretrained import EncoderOptions, load_encoder
from parts.steps import BASES
from parts.store import (FORMAT, DocFile, begin_or_resume, check_files, check_target, clear_aside,
                         listed_files, put_in_place, read_manifest, real_place, text_sum,
                         write_manifest)
from plumbing.old import (OneLineParser, Progress_build as Progress, add_flags, checksum, code_of,
                          option_encode as option, printable, read_json, settle, sole_writer,
                          stop_on_sigterm, usable_device, whole, write_json)

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
        for name, least, most in (("M", 2, 10_000), ("ef_construction", 1, 10 ** 6), ("ef", 0, 10 ** 9),
                                  ("seed", 0, 2 ** 63 - 1), ("threads", 0, 1024)):
            whole(getattr(self, name), name, least, most)


def exact_search(chunks, queries, k, device="cpu"):
    """The k largest inner products of queries (Q, D) with chunks of rows: scores (Q, k) float32, rows (Q, k) int64.

    Of equal scores the earlier row comes first, also where not all of them fit. Scores are rounded to six decimals: the
    products of one and the same vector differ in their last bits with its place in the chunk.
    """
    queries = torch.from_numpy(queries).to(device)
    best, rows, start = queries.new_empty(len(queries), 0), queries.new_empty((len(queries), 0), dtype=torch.long), 0
    for chunk in chunks:
        chunk = torch.from_numpy(chunk).to(device).float()  # (C, D)
        scores, size = (queries @ chunk.T).round(decimals=6), min(k, len(chunk))  # (Q, C)
        values, found = scores.topk(size, dim=1)  # (Q, <=k)
        tied = (scores >= values[:, -1:]).sum(1) > size  # (Q,) more are as good as the k-th: topk took any of them
        found[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :size]  # slow, and rare
        found = found.sort(dim=1).values
        best, rows = torch.cat([best, scores.gather(1, found)], 1), torch.cat([rows, found + start], 1)  # (Q, <=2k)
        best, keep = best.sort(dim=1, descending=True, stable=True)
        best, rows, start = best[:, :k], rows.gather(1, keep[:, :k]), start + len(chunk)
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
        if vectors.shape[1:] != (dim,):
            raise ValueError(f"{path}: vectors of shape {vectors.shape[1:]}, expected dimension {dim}: build the base "
                             "again")
        return cls(vectors, len(vectors))

    def block(self, start, stop):
        return np.array(self.vectors[start:stop])  # (n, D) float16

    def search(self, queries, k, device):
        return exact_search(chunks_of(self), queries, k, device)


INDEXES = {"hnsw": Graph, "flat": Flat}


def suffix_of(index):
    """The ending of the files of an index with these options, as a manifest has them."""
    return INDEXES[IndexOptions(**index).index].suffix


def chunks_of(index):
    """All vectors of an index, some thousand rows at a time."""
    for start in range(0, index.count, CHUNK):
        yield index.block(start, min(start + CHUNK, index.count))


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
        settle(*files, folder)  # before a record says that they are whole
        return {"count": len(self.docs), "files": {file.name: checksum(file) for file in files}}

    @classmethod
    def load(cls, folder, number, dim, options):
        stem, kind = f"{number:05d}", INDEXES[options.index]
        index, docs = kind.load(folder / (stem + kind.suffix), dim, options), DocFile(folder, stem)
        if index.count != len(docs):
            raise ValueError(f"{folder / (stem + kind.suffix)}: {index.count} vectors for {len(docs)} documents: build "
                             "the base again")
        return cls(index, docs)


# --------------------------------------------------------------------------------------------------- the knowledge base

class KnowledgeBase:
    """Documents that can be searched by words, pictures or both."""
    mark = ""  # of a saved base: tells it from all others

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
        docs = list(distinct(lambda: iter(docs)))
        encoder = load_encoder(encoder) if isinstance(encoder, (str, Path)) else encoder
        encoder, _ = encoder.fitted(docs)
        options = replace(options, ef=ef or encoder.ef)
        return cls(encoder, [Shard.build(docs, encoder, options)] if docs else [], options)

    def save(self, path):
        """Writes the base as a folder, beside `path` first and then renamed: nothing is ever half-written there."""
        path = real_place(path)
        with sole_writer(path, check=check_target):
            self.write(path)

    def write(self, path, corpus=None):
        """What save does, for a caller who is the sole writer already; corpus: see write_manifest."""
        folder = path.parent / f".{path.name}.new"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            records = [shard.write(folder, number, path) for number, shard in enumerate(self.shards)]
            write_manifest(folder, self.encoder, self.options, records, corpus)
            put_in_place(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def load(cls, path, encoder=None, *, device="cpu", ef=None):
        """Opens a saved base after checking every file of it.

        encoder: an Encoder or a name, the same that the base was built with; default: the one it names. device: where
        encoders and exact search run. ef: another one than the base was built with.
        """
        path = real_place(path)
        manifest = read_manifest(path, suffix_of)
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
        base = cls(encoder.restored(read_json(path / "encoder.json")), shards, options, usable_device(device))
        base.mark = text_sum(manifest)
        return base

    def search(self, queries, k=5):
        """The k best documents of each query, best first: a list of Hit for each, shorter where the base holds fewer.

        A query is a string or {"text", "image"}. Equal scores stand in document order; where more than k + 8 documents
        are equal, exact search takes the first of them, the graph (index "hnsw") those that it meets.
        """
        if isinstance(queries, (str, dict)):
            raise ValueError("search takes a list of queries: put the one query into a list")
        queries = list(queries)
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k is {k}: give a whole number of at least 1")
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
    """The base of a plain JSONL corpus, kept at `path`: built on first use, and again when the corpus is another one. A
    base that somebody else built there (retrieve.py build) is kept until the corpus is newer.

    Of several processes that come at once one builds; the others wait for it and open what it built.
    """
    path, corpus = real_place(path), Path(corpus)

    def fresh():
        manifest = path / "manifest.json"
        if not manifest.is_file():
            return False
        newer = manifest.stat().st_mtime >= corpus.stat().st_mtime
        try:
            follows = read_manifest(path, suffix_of).get("corpus")
        except ValueError:
            if newer:
                raise
            return False
        return follows == checksum(corpus) if follows else newer

    if not fresh():
        with sole_writer(path, check=check_target):
            if not fresh():  # still, now that no other process is at it
                known = checksum(corpus)
                KnowledgeBase.build(read_docs(corpus), encoder).write(path, known)
    return KnowledgeBase.load(path)


def build_folder(read, encoder, out, options=IndexOptions(), *, shard=500_000, source="", log=lambda line: None):
    """Builds a base on disk, shard by shard, in memory bounded by one shard; returns the number of documents.

    read() gives a fresh stream of documents. Killed at any point and started again with the same arguments and the same
    `source` (any description of the corpus), it goes on after the last finished shard. `out` appears when all is done.
    While another process builds the same base, ValueError.
    """
    if shard < 1:
        raise ValueError(f"shard is {shard}: give the number of documents of a shard, at least 1")
    out = real_place(out)
    with sole_writer(out, wait=False, check=check_target):
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
WORLD_ENCODERS = {"text": "lexical", "image": "pixel", "table": "lexical"}


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


def world_bases(folder, names=BASES):
    """The bases of a world, kept in its folder kb: built on first use, and again when their corpus is another one."""
    bases = {}
    for name in names:
        corpus, home = Path(folder) / f"{name}.jsonl", Path(folder) / "kb" / name
        if not corpus.is_file():
            raise ValueError(f"{corpus}: no such file: --world takes a folder that world.py has written")
        bases[name] = load_or_build(home, corpus, WORLD_ENCODERS[name])
    return bases


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
    if next(iter(READERS[args.format](args.docs, args.images)), None) is None:
        raise ValueError(f"{args.docs}: holds no document of the format {args.format}")
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
        shown = [f"{hit.score:.4f}", hit.id, hit.text, *([f"[{hit.image}]"] if hit.image else [])]
        print("  ".join(map(printable, shown)))
    if base.encoder.cut:
        log_line("the query was longer than the encoder reads and was cut")


def info_command(args):
    """Prints what a base is made of, without opening its indexes."""
    manifest = read_manifest(args.kb, suffix_of)
    shown = {"documents": manifest["count"], "encoder": manifest["encoder"], "dimension": manifest["dim"],
             "index": manifest["index"], "shards": len(manifest["shards"]),
             "bytes": sum(file["bytes"] for _, file in listed_files(manifest))}
    print(json.dumps(shown, ensure_ascii=False))


def check_command(args):
    """Compares all checksums, then measures recall."""
    base = KnowledgeBase.load(args.kb, args.encoder, device=args.device, ef=args.ef)
    recall = round(base.recall(args.sample, args.k), 4)
    print(json.dumps({"documents": len(base), "checksums": "ok", f"recall@{args.k}": recall}))


def parse_arguments():
    """The commands and their flags."""
    top = OneLineParser(prog="retrieve.py", description="Build, search and check knowledge bases.")
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
    """Runs a command; a user's mistake is one line on stderr and exit code 2, Ctrl-C 130, SIGTERM 143."""
    try:
        args = parse_arguments()
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"retrieve.py: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("retrieve.py: stopped; the same build continues", file=sys.stderr)
        sys.exit(code_of(stop))


if __name__ == "__main__":
    stop_on_sigterm()
    main()
