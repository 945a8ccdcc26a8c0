"""Stores against damage, saves against failure, builds against kill -9."""
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import retrieve
from bases import (SYLLABLES, Given, docs_of, facts, flag, flags, flip, make_bert, numbered, unit,
                   write_lines)
from conftest import ROOT
from parts import store
from parts.corpora import read_docs
from parts.pretrained import load_encoder
from plumbing.files import Progress
from retrieve import IndexOptions, KnowledgeBase, build_folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return flags(tmp_path_factory.mktemp("flags"))


@pytest.fixture
def saved(tmp_path, pictures):
    base = KnowledgeBase.build(pictures[:20], "pixel")
    base.save(tmp_path / "kb")
    return base, tmp_path / "kb"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same_folders(a, b):
    return {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes()
                                                             for p in b.iterdir()}


# ---------------------------------------------------------------------------------- save and load

def test_saved_and_loaded_bases_answer_alike(saved, pictures):
    base, folder = saved
    loaded = KnowledgeBase.load(folder)
    queries = [{"image": pictures[3]["image"]}, "flag of nowhere", pictures[5]["text"]]
    assert loaded.search(queries, 6) == base.search(queries, 6)
    assert loaded.options == base.options and len(loaded) == 20
    loaded.save(folder)  # over itself
    assert KnowledgeBase.load(folder).search(queries, 6) == base.search(queries, 6)
    assert names(folder.parent) == ["kb"]  # nothing left beside it


def test_images_move_with_the_world(tmp_path):
    world = tmp_path / "w"
    (world / "photos").mkdir(parents=True)
    flag(["red", "green", "blue"]).save(world / "photos" / "a.png")
    write_lines(world / "image.jsonl", {"id": "a", "text": "flag", "image": "photos/a.png"})
    KnowledgeBase.build(read_docs(world / "image.jsonl"), "pixel").save(world / "kb" / "image")
    moved = world.rename(tmp_path / "moved")
    hit = KnowledgeBase.load(moved / "kb" / "image").search(["flag"], 1)[0][0]
    assert hit.image == str(moved / "photos" / "a.png")


DAMAGES = {"flipped": flip, "truncated": lambda f: f.write_bytes(f.read_bytes()[:-2]),
           "emptied": lambda f: f.write_bytes(b""), "missing": lambda f: f.unlink()}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused_before_hnswlib_opens_them(saved, damage, monkeypatch):
    _, folder = saved
    opened = []
    monkeypatch.setattr(retrieve.Graph, "load", classmethod(lambda *args: opened.append(args)))
    files = sorted(folder.iterdir())
    assert len(files) == 5  # graph, documents, offsets, encoder, manifest
    for file in files:
        whole = file.read_bytes()
        damage(file)
        with pytest.raises(ValueError) as error:
            KnowledgeBase.load(folder)
        assert file.name in str(error.value) and "\n" not in str(error.value) and not opened
        file.write_bytes(whole)


def test_a_changed_manifest_is_refused(saved):
    _, folder = saved
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for change in ({"dim": 12}, {"count": 3}, {"format": 99}, {"shards": []},
                   {"index": {**manifest["index"], "M": 3}}):
        file.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match="manifest.json: (altered|not of format)"):
            KnowledgeBase.load(folder)
    file.write_text(json.dumps(manifest, indent=3))  # other spacing, the same content
    assert len(KnowledgeBase.load(folder)) == 20


def test_another_encoder_or_dimension_is_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="built with encoder 'pixel'.*dimension 704.*"
                                         "'lexical'.*dimension 512"):
        KnowledgeBase.load(folder, "lexical")
    with pytest.raises(ValueError, match="dimension 16"):
        KnowledgeBase.load(folder, Given(unit(4, 16)))


def test_another_model_in_the_same_place_is_refused(tmp_path):
    make_bert(tmp_path / "m")
    encoder = load_encoder(tmp_path / "m", query_prefix="what is ")
    KnowledgeBase.build(docs_of("red flag", "north"), encoder).save(tmp_path / "b")
    loaded = KnowledgeBase.load(tmp_path / "b")
    assert loaded.encoder.settings.query_prefix == "what is "  # it travels with the base
    shutil.copytree(tmp_path / "m", tmp_path / "moved")
    assert len(KnowledgeBase.load(tmp_path / "b", tmp_path / "moved")) == 2
    make_bert(tmp_path / "m", seed=9)  # other weights
    with pytest.raises(ValueError, match="use that one or build again"):
        KnowledgeBase.load(tmp_path / "b")
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ValueError, match="unknown encoder"):
        KnowledgeBase.load(tmp_path / "b")


def test_no_base_and_strange_places(tmp_path):
    with pytest.raises(ValueError, match="no knowledge base here"):
        KnowledgeBase.load(tmp_path / "nothing")
    write_lines(tmp_path / "precious.txt", "keep me")
    for place in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(ValueError, match="nothing was overwritten"):
            KnowledgeBase.build(docs_of("x"), "lexical").save(place)
    assert (tmp_path / "precious.txt").read_text() == "keep me\n"
    assert names(tmp_path) == ["precious.txt"]


def test_a_base_with_something_else_in_it_is_not_replaced(saved):
    _, folder = saved
    write_lines(folder / "diary.txt", "mine")
    with pytest.raises(ValueError, match="diary.txt: not of the base that would be replaced"):
        KnowledgeBase.build(docs_of("x"), "lexical").save(folder)
    with pytest.raises(ValueError, match="diary.txt: not of the base that would be replaced"):
        build_folder(lambda: iter(docs_of("x")), load_encoder("lexical"), folder)
    assert (folder / "diary.txt").read_text() == "mine\n" and len(KnowledgeBase.load(folder)) == 20


def test_saves_through_a_link_keep_the_link(tmp_path, pictures):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "far" / "away" / "kb"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "disk")
    for count in (5, 7):
        KnowledgeBase.build(pictures[:count], "pixel").save(link)
        assert link.is_symlink() and (tmp_path / "disk" / "manifest.json").is_file()
        for place in (link, tmp_path / "disk"):
            base = KnowledgeBase.load(place)
            assert len(base) == count
            assert all(os.path.isfile(doc["image"]) for doc in base.shards[0].docs)
    assert build_folder(lambda: iter(docs_of("x")), load_encoder("lexical"), link) == 1
    assert link.is_symlink() and len(KnowledgeBase.load(link)) == 1


def test_a_failing_save_leaves_the_old_base(saved, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    _, folder = saved
    monkeypatch.setattr(store, "write_manifest", fail)
    with pytest.raises(OSError):
        KnowledgeBase.build(docs_of("new"), "lexical").save(folder)
    assert len(KnowledgeBase.load(folder)) == 20 and names(folder.parent) == ["kb"]


def test_a_full_disk_is_noticed(saved):
    """No file may grow beyond 50 kB: hnswlib would leave a torn graph without a word."""
    base, folder = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="00000.hnsw: could not be written whole"):
            base.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(KnowledgeBase.load(folder)) == 20 and names(folder.parent) == ["kb"]


def test_ef_holds_after_loading(tmp_path):
    """hnswlib forgets ef; with its own default of 10 this thin graph would find much less."""
    vectors = unit(4000, 32)
    base = KnowledgeBase.build(numbered(4000), Given(vectors), M=6, ef=150)
    base.save(tmp_path / "kb")
    loaded = KnowledgeBase.load(tmp_path / "kb", Given(vectors))
    hasty = KnowledgeBase.load(tmp_path / "kb", Given(vectors), ef=10)
    assert (loaded.options.ef, hasty.options.ef) == (150, 10)
    queries = vectors[:200]
    for one, other in zip(base.search_vectors(queries, 10), loaded.search_vectors(queries, 10)):
        np.testing.assert_array_equal(one, other)
    assert loaded.recall(200) > hasty.recall(200) + 0.05


def test_saves_to_one_place_take_turns(tmp_path):
    bases = [KnowledgeBase.build(docs_of(*"abc"[:n]), "lexical") for n in (1, 2, 3)]
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda i: bases[i % 3].save(tmp_path / "kb"), range(60)))
    assert len(KnowledgeBase.load(tmp_path / "kb")) in (1, 2, 3)
    assert names(tmp_path) == ["kb"]


def test_one_thread_repeats_every_byte(tmp_path):
    docs = docs_of(*facts()[0][:800])
    for name in ("a", "b"):
        KnowledgeBase.build(docs, "lexical", seed=4, threads=1).save(tmp_path / name)
    assert same_folders(tmp_path / "a", tmp_path / "b")


# --------------------------------------------------------------------------------- builds on disk

def test_a_killed_build_goes_on_without_redoing_losing_or_doubling(tmp_path, capsys, monkeypatch):
    """kill -9 at two moments of a build of five shards; the base then equals an undisturbed one,
    byte for byte."""
    corpus = write_lines(tmp_path / "docs.jsonl", *[
        {"id": f"d{i}", "text": f"{SYLLABLES[i % 120]}{SYLLABLES[i // 120]} has capital "
                                f"{SYLLABLES[i * 7 % 120]}"} for i in range(4500)])

    def words(name):
        return ["build", str(corpus), "--shard", "1000", "--threads", "1",
                "--out", str(tmp_path / name)]

    assert retrieve.main(words("whole")) == 0
    work, written = tmp_path / ".kb.building", {}
    for begun, done in (("plan.json", 0), ("1.json", 2)):
        process = subprocess.Popen([sys.executable, str(ROOT / "retrieve.py"), *words("kb")],
                                   stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        note, limit = work / "progress" / begun, time.monotonic() + 60
        while not note.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        capsys.readouterr()
        assert retrieve.main(words("kb")) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "another process writes there" in line
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert note.exists() and not (tmp_path / "kb").exists()
        assert (tmp_path / ".kb.lock").exists()  # but nobody holds it any more
        for number in range(done):
            file = f"{number:05d}.hnsw"
            written[file] = (work / file).stat().st_mtime_ns
    counted, add = [], Progress.add

    def noted(progress, count, **how):
        counted.append((count, how))
        add(progress, count, **how)

    monkeypatch.setattr(Progress, "add", noted)
    assert retrieve.main(words("kb")) == 0
    assert "going on" in capsys.readouterr().err and len(written) == 2
    assert counted[:2] == 2 * [(1000, {"earlier": True})]       # not built again, but counted
    assert sum(count for count, _ in counted) == 4500
    assert names(tmp_path) == ["docs.jsonl", "kb", "whole"]
    for name, stamp in written.items():
        assert (tmp_path / "kb" / name).stat().st_mtime_ns == stamp, f"{name} was written again"
    assert same_folders(tmp_path / "whole", tmp_path / "kb")
    base = KnowledgeBase.load(tmp_path / "kb")
    ids = [doc["id"] for shard in base.shards for doc in shard.docs]
    assert ids == [f"d{i}" for i in range(4500)]


class Kill(BaseException):
    """Stands for kill -9."""


class FileOperations:
    """Counts the operations that change the disk. The one numbered `stop` does not happen, and none
    after it, whatever handlers run: that is what a kill leaves."""

    def __init__(self, monkeypatch):
        self.count, self.stop = 0, math.inf
        for module, name in ((os, "replace"), (np, "save"), (shutil, "rmtree"), (store, "checksum"),
                             (Path, "write_text"), (Path, "mkdir"), (Path, "unlink")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, function):
        def call(*args, **kwargs):
            if not kwargs.get("missing_ok") or args[0].exists():
                self.count += 1
            if self.count >= self.stop:
                raise Kill
            return function(*args, **kwargs)
        return call


def test_a_build_stopped_at_any_file_operation_goes_on(tmp_path, monkeypatch):
    def build(name):
        return build_folder(lambda: iter(docs_of(*"abcdefg")), load_encoder("lexical"),
                            tmp_path / name, IndexOptions(index="flat"), shard=3)

    old = KnowledgeBase.build(docs_of("old"), "lexical")
    old.save(tmp_path / "whole")
    operations = FileOperations(monkeypatch)
    build("whole")
    total = operations.count
    assert total > 30
    for n in range(1, total + 1):
        name, operations.stop = f"kb{n}", math.inf
        if n > total / 2 or n % 2:          # an older base stands in the place
            old.save(tmp_path / name)
        operations.count, operations.stop = 0, n
        with pytest.raises(Kill):
            build(name)
        operations.stop = math.inf
        if (tmp_path / name).exists():
            assert len(KnowledgeBase.load(tmp_path / name)) in (1, 7), n
        assert build(name) == 7
        assert same_folders(tmp_path / "whole", tmp_path / name), n
        assert not [left for left in names(tmp_path) if left.startswith(".")], n


def test_a_save_stopped_at_any_file_operation_loses_neither_base(tmp_path, monkeypatch):
    """The old base stays until the new one is whole; then one of them is there or beside it."""
    operations = FileOperations(monkeypatch)
    new = KnowledgeBase.build(docs_of("new", "er"), "lexical")
    n, seen = 0, set()
    while "done" not in seen:
        n += 1
        place = tmp_path / f"kb{n}"
        operations.stop = math.inf
        KnowledgeBase.build(docs_of("old"), "lexical").save(place)
        operations.count, operations.stop = 0, n
        try:
            new.save(place)
            operations.stop = math.inf
            seen.add("done")
        except Kill:
            operations.stop = math.inf
            aside = tmp_path / f".kb{n}.old"
            seen.add(len(KnowledgeBase.load(place if place.exists() else aside)))
            new.save(place)
        assert len(KnowledgeBase.load(place)) == 2
        assert not [left for left in names(tmp_path) if left.startswith(".")], n
    assert seen == {1, 2, "done"} and n > 10


def test_a_build_holds_one_shard_in_memory(tmp_path):
    """Ten shards of 400 documents with 4 kB of text and 2 kB of vectors each: 2.4 MB a shard, 24 MB
    in all."""
    def read():
        for i in range(4000):
            yield {"id": str(i), "text": str(i), "title": f"{i:04000d}"}

    encoder, peaks = Given(unit(4000, 1024)), []
    for shard in (400, 4000):
        tracemalloc.start()
        build_folder(read, encoder, tmp_path / str(shard), IndexOptions("flat"), shard=shard)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # beside the shard stand the rows in single precision, 1.6 MB
    assert peaks[0] < 6e6 < 24e6 < peaks[1]


def test_a_changed_corpus_starts_anew(tmp_path, capsys):
    docs, passes = docs_of(*"abcdefgh"), []

    class Stop(Exception):
        pass

    def read():
        passes.append(1)
        yield from docs[:5]
        if len(passes) > 1:  # the first pass counts, the second is interrupted
            raise Stop
        yield from docs[5:]

    encoder = load_encoder("lexical")
    with pytest.raises(Stop):
        build_folder(read, encoder, tmp_path / "kb", shard=2, source="one")
    assert (tmp_path / ".kb.building").is_dir()
    build_folder(lambda: iter(docs[:3]), encoder, tmp_path / "kb", shard=2, source="other")
    assert "starting anew" in capsys.readouterr().err
    assert len(KnowledgeBase.load(tmp_path / "kb")) == 3


@pytest.mark.parametrize("second", ["abcdef", "abcdefghi"])
def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path, second):
    passes = iter((docs_of(*"abcdefgh"), docs_of(*second)))
    with pytest.raises(ValueError, match="changed"):
        build_folder(lambda: iter(next(passes)), load_encoder("lexical"), tmp_path / "kb", shard=3)
    assert not (tmp_path / "kb").exists()
