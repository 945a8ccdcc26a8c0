"""A knowledge base as a folder: manifest, shards, builds that go on."""
import hashlib
import json
import mmap
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from parts.corpora import distinct
from plumbing.old import checksum, read_json, settle, write_json

FORMAT = 1  # of the folder on disk; a base of another format is refused


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


def read_manifest(path, suffix_of):
    """The manifest of a base, if this program can read it and nobody changed it. suffix_of(index): the ending of the
    index's files."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path}: no knowledge base here (no manifest.json): make one with retrieve.py build")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: not of format {FORMAT}, which this program reads: build the base again")
    if manifest.pop("sha256", None) != text_sum(manifest):
        raise ValueError(f"{file}: altered (checksum differs): build the base again")
    try:
        endings = (".docs.jsonl", suffix_of(manifest["index"]), ".offsets.npy")
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
