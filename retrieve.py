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
import signal
import sys
import time
from array import array
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import hnswlib
import numpy as np
import torch

from encode import MARKERS, WEIGHT_FREE, EncoderOptions, checksum, load_encoder, option, passage, utf8, whole
from model import inside, read_json, settle, usable_device, write_json
from score import printable

FORMAT = 1  # of the folder on disk; a base of another format is refused
MAX_ROW = 4_000_000  # characters of a line of JSONL: a longer one is no passage or question
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
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with id, text, title and image, found {type(row).__name__}")
    title, image = row.get("title"), row.get("image")
    doc = {"id": row.get("id"), "text": row.get("text"), "title": "" if title is None else title,
           "image": None if image == "" else image}
    if type(doc["id"]) is int:
        doc["id"] = str(doc["id"])
    for name, value in doc.items():
        if not isinstance(value, str) and (name != "image" or value is not None):
            found = "missing" if value is None else type(value).__name__
            raise ValueError(f"{place}: field {name!r} is {found}, expected a string: a row has id, text, title, image")
    return {name: value and utf8(value) for name, value in doc.items()}


# --------------------------------------------------------------------------------------------------- readers of corpora

@contextmanager
def reading(path):
    """A text file, open; ValueError where it cannot be read as UTF-8. A byte-order mark at its start is passed over."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}): convert the file") from None


def lines_of(path):
    """Numbered places and lines of a text file: ("file:3", line). A line without end is refused before it is read."""
    with reading(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW + 1), ""), 1):
            if len(line) > MAX_ROW:
                raise ValueError(f"{path}:{number}: a row of more than {MAX_ROW} characters: cut it into passages, one "
                                 "object a line")
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


def picture_in(folder, name, place):
    """The path of a document's picture; a corpus from outside names no file outside its folder, links followed."""
    path = os.path.join(folder, name)
    if not name.isprintable() or not inside(path, folder):
        raise ValueError(f"{place}: picture {name!r} leads out of {folder}: name the pictures' folder with --images")
    return path


def distinct(read):
    """The documents of read(), a function that gives a fresh stream of them; ValueError where an id comes twice.

    Keeps 8 bytes of each id. Only where two are alike the stream is read again, to compare the ids themselves.
    """
    seen = array("q")
    for doc in read():
        seen.append(hash(doc["id"]))
        yield doc
    values, counts = np.unique(np.asarray(seen), return_counts=True)
    twice, met = set(values[counts > 1].tolist()), set()
    for doc in read() if twice else ():
        if doc["id"] in met:
            raise ValueError(f"id {doc['id'][:80]!r} stands twice in the corpus: ids tell documents apart")
        if hash(doc["id"]) in twice:
            met.add(doc["id"])


def read_docs(path, images=None):
    """Plain JSONL: id, text, optionally title and image. Yields documents in order.

    Image paths are relative to the folder `images`, by default the file's own, and come back joined to it.
    A row that does not fit raises ValueError with file and line.
    """
    for place, line in lines_of(path):
        if line.strip():
            doc = checked_doc(json_object(line, place), place)
            yield {**doc, "image": doc["image"] and picture_in(images or Path(path).parent, doc["image"], place)}


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
        image = picture_in(images or Path(path).parent, row["img_path"], place) if "image" in modality else None
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
            if WIKI_HEADER.match(line):  # a page inside a page: the end of the first is missing
                break
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


def write_manifest(folder, encoder, options, records, corpus=None):
    """The last file of a base: what it is made of, and how to tell that nothing changed since. corpus: the checksum of
    the file that it follows (load_or_build)."""
    write_json(folder / "encoder.json", encoder.state())
    body = {"format": FORMAT, "count": sum(record["count"] for record in records), "dim": encoder.dim, "space": "ip",
            "encoder": {"name": encoder.name, "options": encoder.options, "fingerprint": encoder.fingerprint()},
            "index": asdict(options), "shards": records, "files": {"encoder.json": checksum(folder / "encoder.json")},
            **({"corpus": corpus} if corpus else {})}
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
    try:
        endings = (".docs.jsonl", INDEXES[IndexOptions(**manifest["index"]).index].suffix, ".offsets.npy")
        expected = [f"{number:05d}{ending}" for number in range(len(manifest["shards"])) for ending in endings]
        fits = ([name for name, _ in listed_files(manifest)] == ["encoder.json", *expected]
                and {"name", "options", "fingerprint"} <= set(manifest["encoder"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:  # its checksum is right, so somebody wrote it that way
        raise ValueError(f"{file}: not as this program writes it: build the base again")
    return manifest


def listed_files(manifest):
    """(name, checksum) of each file of a base."""
    return [item for part in (manifest, *manifest["shards"]) for item in part["files"].items()]


def check_files(path, manifest):
    """Compares every file of a base with its manifest: there, size, checksum."""
    for name, expected in listed_files(manifest):
        file = Path(path) / name
        if not file.is_file():
            raise ValueError(f"{file}: missing: build the base again")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise ValueError(f"{file}: {size} bytes, expected {expected['bytes']} (truncated?): build the base again")
        if checksum(file) != expected:
            raise ValueError(f"{file}: altered (checksum differs): build the base again")


def real_place(path):
    """The absolute path of a base; where a link stands, that of the folder it points to: a save keeps the link."""
    return Path(os.path.realpath(path) if os.path.islink(path) else os.path.abspath(path))


def put_in_place(folder, path):
    """Renames a finished folder to `path`. A base that stands there is moved aside first, then deleted."""
    clear_aside(path)
    settle(folder)
    if path.exists():
        os.replace(path, aside_of(path))
    os.replace(folder, path)
    settle(path.parent)
    clear_aside(path)


def aside_of(path):
    return path.parent / f".{path.name}.old"


def clear_aside(path):
    shutil.rmtree(aside_of(path), ignore_errors=True)


OWN_FILE = re.compile(r"manifest\.json|encoder\.json|progress|\d{5,}\.(docs\.jsonl|offsets\.npy|hnsw|npy)")


def check_target(path):
    """A place that a base may be written to: free, empty, or an older base and nothing beside it."""
    if path.exists() and not (path / "manifest.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists and is no knowledge base: give another place, nothing was overwritten")
    for file in sorted(path.iterdir()) if path.exists() else ():
        if not OWN_FILE.fullmatch(file.name):
            raise ValueError(f"{file}: not of the base that would be replaced: move it away, nothing was overwritten")


@contextmanager
def sole_writer(path, wait=True, check=check_target):
    """The right to write the base at `path`: one process at a time holds it, until it is done or dies (kill -9 too).
    `check(path)` raises where something else stands there.

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
                    check(path)
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return


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
        with sole_writer(path):
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
            follows = read_manifest(path).get("corpus")
        except ValueError:
            if newer:
                raise
            return False
        return follows == checksum(corpus) if follows else newer

    if not fresh():
        with sole_writer(path):
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
    encoder, count = encoder.fitted(distinct(read))  # also the look at every row before the long work begins
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
    manifest = read_manifest(args.kb)
    shown = {"documents": manifest["count"], "encoder": manifest["encoder"], "dimension": manifest["dim"],
             "index": manifest["index"], "shards": len(manifest["shards"]),
             "bytes": sum(file["bytes"] for _, file in listed_files(manifest))}
    print(json.dumps(shown, ensure_ascii=False))


def check_command(args):
    """Compares all checksums, then measures recall."""
    base = KnowledgeBase.load(args.kb, args.encoder, device=args.device, ef=args.ef)
    recall = round(base.recall(args.sample, args.k), 4)
    print(json.dumps({"documents": len(base), "checksums": "ok", f"recall@{args.k}": recall}))


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message):
        raise ValueError(f"{message}: see {self.prog} --help")


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


def stop_on_sigterm():
    """From here on SIGTERM ends a command as Ctrl-C does: what is half-written is cleared away, one line is said."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, stop)


def code_of(stop):
    """The exit code after a KeyboardInterrupt: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (stop.args or (signal.SIGINT,))[0]


if __name__ == "__main__":
    stop_on_sigterm()
    main()
