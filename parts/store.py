"""A knowledge base as a folder: shards, a manifest with the checksum of every file, and builds that
go on where they were killed.

    00000.hnsw (or .npy)    the index of shard 0
    00000.docs.jsonl        its documents, a line each, in the order of the index's rows
    00000.offsets.npy       where each line begins
    encoder.json            what the encoder learned from the corpus
    manifest.json           what the base is made of, and the size and checksum of each other file

A build works in a hidden folder beside the base. There, progress/plan.json says what is built and
progress/N.json that shard N is finished; the base appears, by one rename, when all are.
"""
import hashlib
import itertools
import json
import math
import mmap
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from parts.corpora import checked_doc, distinct
from parts.pretrained import load_encoder
from plumbing.files import (Progress, beside, checksum, put_in_place, read_json, remove, replacing,
                            say, settle, write_json)

FORMAT = 1      # of the folder on disk; a base of another format is refused


# ----------------------------------------------------------------------------------------- shards

class DocFile:
    """Documents on disk, each read by its offset when it is needed. Image paths come back joined to
    the base's folder."""

    def __init__(self, folder, number):
        """Of shard `number` of the base in `folder`."""
        stem = stem_of(number)
        self.folder = os.fspath(folder)
        self.offsets = np.load(folder / f"{stem}.offsets.npy")      # (N + 1,) first bytes of lines
        with open(folder / f"{stem}.docs.jsonl", "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, row):
        doc = json.loads(self.bytes[self.offsets[row]:self.offsets[row + 1]])
        if doc["image"]:
            doc["image"] = os.path.normpath(os.path.join(self.folder, doc["image"]))
        return doc


def stem_of(number):
    """How the files of a shard begin."""
    return f"{number:05d}"


def write_shard(folder, number, index, docs, home):
    """Writes an index and its documents as shard `number` and returns the record of it. Image paths
    are stored relative to `home`, where the base will lie."""
    stem = stem_of(number)
    index.save(folder / f"{stem}{index.suffix}")
    offsets = [0]
    with open(folder / f"{stem}.docs.jsonl", "wb") as file:
        for doc in docs:
            image = doc["image"] and os.path.relpath(doc["image"], home)
            line = json.dumps({**doc, "image": image}, ensure_ascii=False) + "\n"
            file.write(line.encode())
            offsets.append(file.tell())
    np.save(folder / f"{stem}.offsets.npy", np.array(offsets))
    files = sorted(folder.glob(f"{stem}.*"))
    settle(*files, folder)                              # before a record says that they are whole
    return {"count": len(docs), "files": {file.name: checksum(file) for file in files}}


# --------------------------------------------------------------------------------------- manifest

def text_sum(value):
    """Checksum of a JSON value, whatever its spacing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, encoder, options, records, corpus=None):
    """Writes the last files of a base: what the encoder learned, what the base is made of, and how
    to tell that nothing changed since. corpus: the checksum of the file that the base follows."""
    write_json(folder / "encoder.json", encoder.state())
    manifest = {
        "format": FORMAT,
        "count": sum(record["count"] for record in records),
        "dim": encoder.dim,
        "space": "ip",
        "encoder": {"name": encoder.name, "options": encoder.options,
                    "fingerprint": encoder.fingerprint()},
        "index": asdict(options),
        "shards": records,
        "files": {"encoder.json": checksum(folder / "encoder.json")},
    }
    if corpus is not None:
        manifest["corpus"] = corpus
    manifest["sha256"] = text_sum(manifest)
    write_json(folder / "manifest.json", manifest)


def read_manifest(path):
    """The manifest of a base, if this program can read it and nobody changed it since."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        there = "make one with retrieve.py build"
        if (Path(path) / "kb").is_dir():
            there = "its bases lie in kb/"
        raise ValueError(f"{path}: no knowledge base here (no manifest.json): {there}")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: not of format {FORMAT}, which this program reads: build the "
                         "base again")
    if manifest.pop("sha256", None) != text_sum(manifest):
        raise ValueError(f"{file}: altered (checksum differs): build the base again")
    return manifest


def listed_files(manifest):
    """{name: checksum} of the files of a base."""
    files = dict(manifest["files"])
    for record in manifest["shards"]:
        files |= record["files"]
    return files


def check_files(path, manifest):
    """Compares every file of a base with its manifest: there, size, checksum."""
    for name, expected in listed_files(manifest).items():
        file = Path(path) / name
        if not file.is_file():
            raise ValueError(f"{file}: missing: build the base again")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{file}: {size} bytes, expected {expected['bytes']} (truncated?): "
                             "build the base again")
        if checksum(file) != expected:
            raise ValueError(f"{file}: altered (checksum differs): build the base again")


def encoder_of(manifest, path, encoder=None, device="cpu"):
    """The encoder of a saved base, or the given one (an Encoder or its name) if it is the same."""
    built = manifest["encoder"]
    encoder = load_encoder(encoder or built["name"], device, **built["options"])
    if (encoder.dim, encoder.fingerprint()) != (manifest["dim"], built["fingerprint"]):
        raise ValueError(f"{path}: built with encoder {built['name']!r} ({built['fingerprint']}, "
                         f"dimension {manifest['dim']}), not {encoder.name!r} "
                         f"({encoder.fingerprint()}, dimension {encoder.dim}): use that one or "
                         "build again")
    return encoder


def up_to_date(path, corpus):
    """Whether the base at `path` was built from the file `corpus` as it is now. A base that names
    no corpus was put there by somebody (retrieve.py build), and serves as it is."""
    if not (path / "manifest.json").is_file():
        return False
    built_from = read_manifest(path).get("corpus")
    return built_from is None or built_from == checksum(corpus)


# --------------------------------------------------------------------------------- whole folders

OWN_FILE = re.compile(r"manifest\.json|encoder\.json|progress"
                      r"|\d{5,}\.(docs\.jsonl|offsets\.npy|hnsw|npy)")


def check_target(path):
    """ValueError where a base must not be written: the place has to be free, empty, or an older
    base with nothing of somebody else's in it."""
    if not path.exists():
        return
    names = sorted(os.listdir(path)) if path.is_dir() else [path.name]
    if names and not (path / "manifest.json").is_file():
        raise ValueError(f"{path}: exists and is no knowledge base: give another place, nothing "
                         "was overwritten")
    for name in names:
        if not OWN_FILE.fullmatch(name):
            raise ValueError(f"{path / name}: not of the base that would be replaced: move it "
                             "away, nothing was overwritten")


def write_base(path, base, corpus=None):
    """Writes a base as a folder, whole or not at all, for a caller who holds the lock of `path`.
    corpus: the checksum of the file that the base follows."""
    check_target(path)
    with replacing(path) as folder:
        folder.mkdir()
        records = []
        for number, shard in enumerate(base.shards):
            records.append(write_shard(folder, number, shard.index, shard.docs, path))
        write_manifest(folder, base.encoder, base.options, records, corpus)


class ResumableBuild:
    """A build of the base at `out`, for a caller who holds its lock. `source` is any description of
    the corpus: like encoder, options and shard it is the same when a killed build goes on."""

    def __init__(self, out, encoder, options, shard, source):
        self.out, self.encoder, self.options, self.shard = out, encoder, options, shard
        self.plan = text_sum([FORMAT, source, encoder.fingerprint(), asdict(options), shard])
        self.folder = beside(out, "building")
        self.notes = self.folder / "progress"

    def note_in(self, folder):
        """What was noted in a folder when this build began; None where there is no note, or that of
        another build."""
        file = folder / "plan.json"
        note = read_json(file) if file.is_file() else None
        return note if note and note["plan"] == self.plan else None

    def begin(self, read):
        """(encoder fitted on the corpus, number of documents), from the notes of a killed run, else
        by a look at every row before the long work begins."""
        note = self.note_in(self.notes)
        if note is not None:
            say(f"going on in {self.folder}")
            return self.encoder.restored(note["state"]), note["count"]
        if (self.notes / "plan.json").is_file():
            say(f"{self.folder} was begun with other options or another corpus: starting anew")
        encoder, count = self.encoder.fitted(distinct(read))
        say(f"{count} documents")
        remove(self.folder)
        note = {"plan": self.plan, "count": count, "state": encoder.state()}
        write_json(self.notes / "plan.json", note)
        return encoder, count

    def run(self, read, build_index):
        """Builds what is missing and puts the base in its place; returns the number of documents.

        read() gives a fresh stream of documents. build_index(docs, encoder, options, progress)
        gives the index of a list of them.
        """
        check_target(self.out)
        last = self.out / "progress"        # what a build that is in its place deletes at last
        if self.note_in(last) is None:
            self.build(read, build_index)
        count = self.note_in(last)["count"]
        remove(beside(self.out, "old"))
        remove(last)
        return count

    def build(self, read, build_index):
        """Writes the shards that are missing and the manifest, and puts the folder in its place."""
        encoder, count = self.begin(read)
        progress = Progress(count, "documents")
        stream = iter(read())
        records = []
        for number in range(math.ceil(count / self.shard)):
            docs = itertools.islice(stream, self.shard)
            docs = [checked_doc(doc, f"shard {number}") for doc in docs]
            file = self.notes / f"{number}.json"
            if file.is_file():
                progress.add(len(docs), earlier=True)
            else:
                index = build_index(docs, encoder, self.options, progress)
                write_json(file, write_shard(self.folder, number, index, docs, self.out))
                index = None                            # else two shards would be in memory
            docs = None
            records.append(read_json(file))
        documents = sum(record["count"] for record in records)
        if documents != count or next(stream, None) is not None:
            raise ValueError(f"{self.out}: the corpus changed while it was read: delete "
                             f"{self.folder} and build again")
        write_manifest(self.folder, encoder, self.options, records)
        put_in_place(self.folder, self.out)
