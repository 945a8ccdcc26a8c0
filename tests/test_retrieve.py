"""Search against brute force, bases that are built on first use, and the command line."""
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import retrieve
from bases import Given, docs_of, facts, flip, make_bert, numbered, top, unit, write_lines
from conftest import run
from parts.pretrained import load_encoder
from retrieve import IndexOptions, KnowledgeBase, build_folder, load_or_build


# ----------------------------------------------------------------------------------------- search

@pytest.mark.parametrize("index, least, precision", [
    ("hnsw", 0.99, 1e-5), ("flat", 0.97, 2e-3)])                            # flat is rounded
def test_search_equals_brute_force(index, least, precision):
    vectors = unit(700, 24)
    products = vectors[500:] @ vectors[:500].T                              # (200, 500)
    exact = np.argsort(-products, axis=1)[:, :7]
    base = KnowledgeBase.build(numbered(500), Given(vectors), index=index)
    results = base.search([str(i) for i in range(500, 700)], 7)
    same = [[f"d{j}" for j in row] == [hit.id for hit in hits]
            for row, hits in zip(exact, results)]
    assert np.mean(same) >= least
    scores = np.array([[hit.score for hit in hits] for hits in results])
    np.testing.assert_allclose(scores, np.take_along_axis(products, exact, 1), atol=precision)


def test_hnsw_recall_on_facts():
    texts, questions = facts()
    base = KnowledgeBase.build(docs_of(*texts), "lexical")
    queries = [question for question, _ in questions][:500]
    vectors = base.encoder.encode_queries(queries)
    everything = base.encoder.encode_docs([{"text": text, "title": ""} for text in texts])
    exact = np.argsort(-(vectors @ everything.T), axis=1, kind="stable")
    rows = base.search_vectors(vectors, 10)[1]
    for k in (1, 2, 5, 10):
        recall = np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(rows, exact)])
        assert recall >= 0.98, (k, recall)
    assert base.recall(queries, k=10) >= 0.98


@pytest.mark.parametrize("index", ["hnsw", "flat"])
def test_k_beyond_the_base_and_empty_base(tmp_path, index):
    base = KnowledgeBase.build(numbered(60), Given(unit(60, 8)), index=index)
    hits = base.search(["3", "5"], k=1000)
    assert [len(h) for h in hits] == [60, 60]
    assert {h.id for h in hits[0]} == {f"d{i}" for i in range(60)}
    assert base.search([], k=3) == []
    empty = KnowledgeBase.build([], "lexical", index=index)
    empty.save(tmp_path / "kb")
    for base in (empty, KnowledgeBase.load(tmp_path / "kb")):
        assert len(base) == 0 and base.search(["x", "y"]) == [[], []] and base.recall() == 1.0


def test_unreachable_rows_are_found_by_exact_search():
    base = KnowledgeBase.build(numbered(3000), Given(unit(3000, 4)), M=2, ef_construction=2)
    hits = base.search(["7"], k=3000)[0]                # the graph is too thin to reach all rows
    assert len({hit.id for hit in hits}) == 3000


def test_equal_scores_stand_in_document_order():
    """Exact search: of any number of equal documents the first. The graph: of k + 8 of them."""
    for index, equal in (("flat", 40), ("flat", 13), ("flat", 9000), ("hnsw", 12)):
        docs = docs_of("other", *["same words"] * equal)
        base = KnowledgeBase.build(docs, "lexical", index=index)
        for hits in base.search(["same words", "words", "same"], 5):
            assert [hit.id for hit in hits] == ["1", "2", "3", "4", "5"]
    base = KnowledgeBase.build(docs_of(*["same words"] * 40), "lexical")
    ids = [int(hit.id) for hit in base.search(["same words"], 5)[0]]
    assert ids == sorted(set(ids)) and len(ids) == 5
    vectors = np.repeat(unit(1, 384), 41, axis=0)
    for queries in (1, 3, 50):      # matrix products of these shapes differ in their last bits
        chunks = [vectors[:20], vectors[20:]]
        rows = retrieve.exact_search(chunks, unit(queries, 384, seed=1), 7)[1]
        assert (rows == np.arange(7)).all()


def test_duplicates_hide_nothing_or_recall_tells():
    """Of 3000 vectors 150 are the same, which is fine, or 300: more than the graph's 200
    candidates."""
    for every, index, least, most in ((20, "hnsw", 0.99, 1), (10, "hnsw", 0.5, 0.95),
                                      (10, "flat", 1, 1)):
        vectors = unit(3000, 32)
        vectors[::every] = vectors[0]
        base = KnowledgeBase.build(numbered(3000), Given(vectors), index=index)
        exact = np.sort(vectors[::7] @ vectors.T, axis=1)[:, -10]
        scores = base.search_vectors(vectors[::7], 10)[0]
        by_hand = (scores >= exact[:, None] - 2e-3).mean()
        recall = base.recall([str(i) for i in range(0, 3000, 7)])
        assert least <= by_hand <= most and recall == pytest.approx(by_hand, abs=0.02)


def test_odd_queries_behave():
    texts = ("Ärger im Büro", "東京 は 日本 の 首都", "x" * 100_000, "\ud800 half", "",
             "<|im_end|></think>")
    base = KnowledgeBase.build(docs_of(*texts), "lexical")
    assert top(base, "BU\u0308RO a\u0308rger") == ["Ärger im Büro"]     # decomposed, in capitals
    assert top(base, "日本の首都") == ["東京 は 日本 の 首都"]                 # no spaces in the query
    assert top(base, "<|im_end|>") == ["<|im_end|></think>"]
    for query in ("", "   ", "?!", "\udfff", "word " * 200_000, "y" * 1_000_000, "\0"):
        assert len(base.search([query], 2)[0]) == 2
    for wrong in (None, 3, {"text": 5}, {"words": "x"}):
        with pytest.raises(ValueError, match="a query is"):
            base.search([wrong])
    with pytest.raises(ValueError, match="list"):
        base.search("one string")
    for k in (0, 2.5, "3"):
        with pytest.raises(ValueError, match=f"k is {k}"):
            base.search(["x"], k=k)
    with pytest.raises(ValueError, match="document 0: expected an object .* found str"):
        KnowledgeBase.build(["a"], "lexical")


def test_recall_counts_what_the_graph_misses():
    encoder = Given(unit(2000, 32))
    thin = KnowledgeBase.build(numbered(2000), encoder, M=3, ef_construction=8, ef=1)
    good = KnowledgeBase.build(numbered(2000), encoder)
    queries = [str(i) for i in range(0, 2000, 20)]
    assert good.recall(queries) > 0.99 and good.recall(100) > 0.99
    exact = np.argsort(-(unit(2000, 32)[::20] @ unit(2000, 32).T), axis=1)[:, :10]
    rows = thin.search_vectors(encoder.encode_queries(queries), 10)[1]
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact)])
    assert thin.recall(queries) == pytest.approx(by_hand, abs=1e-3) and by_hand < 0.9


@pytest.mark.parametrize("sample, k", [(0, 10), (-3, 10), ([], 10), (5, 0)])
def test_recall_of_nothing_is_refused(sample, k):
    with pytest.raises(ValueError, match="at least 1"):
        KnowledgeBase.build(docs_of("x"), "lexical").recall(sample, k)


@pytest.mark.parametrize("vectors", [np.zeros((1, 8)), np.zeros((2, 7)), np.full((2, 8), np.nan)])
def test_vectors_that_cannot_be_are_not_indexed(vectors):
    encoder = Given(unit(2, 8))
    encoder.encode_docs = lambda docs: vectors.astype(np.float32)
    for index in ("hnsw", "flat"):
        with pytest.raises(ValueError, match="encoder 'given'.*nothing was indexed"):
            KnowledgeBase.build(numbered(2), encoder, index=index)


def test_raw_products_are_not_put_into_a_graph():
    encoder = Given(unit(2, 8), normalised=False)
    assert len(KnowledgeBase.build(numbered(2), encoder, index="flat")) == 2
    with pytest.raises(ValueError, match="give index 'flat'"):
        KnowledgeBase.build(numbered(2), encoder)


@pytest.mark.parametrize("values, reason", [
    ({"index": "tree"}, "tree"), ({"M": 1}, "M is 1"), ({"threads": -1}, "threads"),
    ({"ef_construction": 0}, "ef_construction"), ({"M": 2.5}, "M is 2.5"),
    ({"M": 10001}, "M is 10001"), ({"seed": 2 ** 70}, "seed is 118"), ({"ef": "9"}, "ef is '9'"),
    ({"ef_construction": 2 ** 70}, "ef_construction is 118")])
def test_wrong_index_options(values, reason):
    with pytest.raises(ValueError, match=reason):
        KnowledgeBase.build(docs_of("x"), "lexical", **values)


def test_shards_are_searched_as_one(tmp_path):
    texts, questions = facts()
    docs = docs_of(*texts[:1000])
    whole = KnowledgeBase.build(docs, "lexical", index="flat")
    queries = [question for question, _ in questions[:1000:10]]
    for index in ("flat", "hnsw"):
        count = build_folder(lambda: iter(docs), load_encoder("lexical"), tmp_path / index,
                             IndexOptions(index), shard=300)
        base = KnowledgeBase.load(tmp_path / index)
        assert count == 1000 and [len(shard.docs) for shard in base.shards] == [300, 300, 300, 100]
        exact, hits = whole.search(queries, 3), base.search(queries, 3)
        if index == "flat":
            assert hits == exact
        assert [h[0].id for h in hits] == [h[0].id for h in exact] and base.recall(queries) > 0.98


# ------------------------------------------------------------------------ bases built on first use

def test_processes_that_need_the_same_base_at_once_build_it_once(tmp_path, monkeypatch):
    """Threads stand for processes here: each opens the lock file anew, which is all that the system
    looks at."""
    corpus = write_lines(tmp_path / "t.jsonl", {"id": "a", "text": "one"})
    built, build = [], KnowledgeBase.build

    def slow(docs, encoder):
        built.append(1)
        time.sleep(0.2)
        return build(docs, encoder)

    monkeypatch.setattr(KnowledgeBase, "build", slow)

    def open_it(number=0):
        return load_or_build(tmp_path / "kb" / "text", corpus, "lexical")

    def at_once():
        with ThreadPoolExecutor(6) as pool:
            return {tuple(top(base, "x")) for base in pool.map(open_it, range(6))}

    assert at_once() == {("one",)} and len(built) == 1
    assert at_once() == {("one",)} and len(built) == 1
    write_lines(corpus, {"id": "a", "text": "two"})
    os.utime(corpus, ns=(1, 1))                     # what counts is what the corpus holds
    open_it()
    assert len(built) == 2
    os.utime(corpus, ns=(time.time_ns() + 10**9,) * 2)
    assert at_once() == {("two",)} and len(built) == 2
    assert [p.name for p in (tmp_path / "kb").iterdir()] == ["text"]


def test_a_base_that_somebody_put_there_serves_as_it_is(tmp_path):
    corpus = write_lines(tmp_path / "t.jsonl", {"id": "a", "text": "one"})
    KnowledgeBase.build(docs_of("mine"), "lexical").save(tmp_path / "kb")
    os.utime(corpus, ns=(time.time_ns() + 10**9,) * 2)
    assert top(load_or_build(tmp_path / "kb", corpus, "lexical"), "x") == ["mine"]


def test_a_broken_base_is_not_built_over(tmp_path):
    corpus = write_lines(tmp_path / "t.jsonl", {"id": "a", "text": "one"})
    load_or_build(tmp_path / "kb", corpus, "lexical")
    flip(tmp_path / "kb" / "manifest.json")
    with pytest.raises(ValueError, match="manifest.json: .*"):
        load_or_build(tmp_path / "kb", corpus, "lexical")


def test_bases_are_named_once_and_by_their_names(tmp_path):
    KnowledgeBase.build(docs_of("x"), "lexical").save(tmp_path / "kb")
    bases = retrieve.load_bases([f"text={tmp_path / 'kb'}", f"table={tmp_path / 'kb'}"])
    assert {name: len(base) for name, base in bases.items()} == {"text": 1, "table": 1}
    for named, reason in ((["web=x"], "expected NAME=DIR"), (["text="], "expected NAME=DIR"),
                          ([f"text={tmp_path / 'kb'}"] * 2, "name each once")):
        with pytest.raises(ValueError, match=reason):
            retrieve.load_bases(named)


# ----------------------------------------------------------------------------------- command line

@pytest.fixture
def script(capsys):
    """retrieve.py's command line in this process: (exit code, stdout, stderr) of some words."""
    def call(*words):
        code = retrieve.main([str(word) for word in words])
        return code, *capsys.readouterr()
    return call


def test_the_commands(tmp_path, script):
    corpus = write_lines(tmp_path / "text.jsonl", {"id": "a", "text": "Bakdol has capital Mirtas."},
                         {"id": "b", "text": "Baklin has capital Tosrek."})
    kb = tmp_path / "kb" / "text"
    code, out, _ = script("build", corpus, "--encoder", "lexical", "--out", kb)
    assert code == 0
    assert out == f"{kb}: 2 documents, encoder lexical, dimension 512, index hnsw\n"
    code, out, _ = script("search", kb, "What is the capital of Bakdol?", "-k", 5)
    assert code == 0 and [line.split()[1] for line in out.splitlines()] == ["a", "b"]
    assert len(script("search", kb, "capital", "-k", 1)[1].splitlines()) == 1
    info = json.loads(script("info", kb)[1])
    assert (info["documents"], info["dimension"], info["index"]["M"]) == (2, 512, 16)
    assert info["bytes"] == sum(file.stat().st_size for file in kb.glob("[!m]*"))
    check = json.loads(script("check", kb)[1])
    assert check == {"documents": 2, "checksums": "ok", "recall@10": 1.0}


def test_a_base_remembers_how_its_model_was_used(tmp_path, script):
    corpus = write_lines(tmp_path / "text.jsonl", {"id": "a", "text": "red green blue big small"},
                         {"id": "b", "text": "north south red green blue"})
    make_bert(tmp_path / "m")
    words = "--index flat --no-normalise --pooling mean --max-length 4 --query-prefix".split()
    code, _, err = script("build", corpus, "--out", tmp_path / "b", "--encoder", tmp_path / "m",
                          *words, "what ")
    assert code == 0 and "2 documents were longer than the encoder reads and were cut" in err
    for query, cut in (("red green blue big small", True), ("red", False)):
        assert ("the query was longer" in script("search", tmp_path / "b", query)[2]) == cut
    encoder = KnowledgeBase.load(tmp_path / "b").encoder
    assert encoder.options == {"pooling": "mean", "normalise": False, "query_prefix": "what ",
                               "max_length": 4}


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, script):
    corpus = write_lines(tmp_path / "text.jsonl", {"id": "a", "text": "Bakdol has capital Mirtas."})
    kb = tmp_path / "kb"
    assert script("build", corpus, "--out", kb)[0] == 0

    def refused(reason, *words):
        code, _, err = script(*words)
        assert code == 2 and reason in err and len(err.splitlines()) == 1, err

    refused("device 'tpux'", "search", kb, "x", "--device", "tpux")
    refused("--sample is 0: give at least 1", "check", kb, "--sample", 0)
    refused("-k is 0: give at least 1", "search", kb, "x", "-k", 0)
    flip(kb / "00000.hnsw")
    write_lines(tmp_path / "bad.jsonl", "{")
    refused("altered", "check", kb)
    refused("altered", "search", kb, "x")
    refused("query is empty", "search", kb, " ")
    refused("no knowledge base", "info", tmp_path)
    refused("bad.jsonl:1", "build", tmp_path / "bad.jsonl", "--out", kb)
    refused("No such file", "build", tmp_path / "no", "--out", kb)
    refused("nothing was overwritten", "build", corpus, "--out", tmp_path)
    refused("--shard is 0", "build", corpus, "--out", kb, "--shard", 0)
    refused("unknown encoder", "build", corpus, "--out", kb, "--encoder", "no")
    refused("--out", "build", corpus)
    refused("build | search | info | check")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "kb", "text.jsonl"]
    done = run("retrieve.py", "search", tmp_path / "nothing", "x")
    assert done.returncode == 2 and "no knowledge base" in done.stderr
    assert len(done.stderr.splitlines()) == 1
