"""Tests of single exercises, where the project's own tests need several of them at once.

Oracles: cases worked by hand, transformers, faiss, attention written as a loop in float64.
"""
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import infer
import model
import retrieve
from networks import assert_same_logits, make_pair
from oracles import hf_greedy, make_batch
from parts.layers import rotate
from parts.steps import RouteStep, StepError, parse_step, render_answer, render_route
from retrieve import Hit, KnowledgeBase

torch.set_num_threads(1)
INF = math.inf


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small random model, as transformers has it (.hf) and as we load it (.vlm)."""
    return make_pair(tmp_path_factory.mktemp("exercises"))


# ------------------------------------------------------------------------------ 1 M-RoPE positions

HAND = SimpleNamespace(c=SimpleNamespace(head_dim=8, rope_theta=16.0, mrope_section=(1, 1, 2)))


def angles_at(time, height, width):
    """(cos, sin), each (1, 1, 1, D), of one token in the decoder above."""
    return model.Decoder.angles(HAND, torch.tensor([time, height, width]).view(3, 1, 1))


def test_angles_by_hand():
    # speeds 16^(-0/8), 16^(-2/8), 16^(-4/8), 16^(-6/8) = 1, 1/2, 1/4, 1/8: one pair turns with the
    # time 3, one with the height 10, two with the width 8: angles 3 * 1, 10 / 2, 8 / 4, 8 / 8
    cos, sin = angles_at(3, 10, 8)
    angles = [3, 5, 2, 1]
    cosines, sines = [math.cos(a) for a in angles], [math.sin(a) for a in angles]
    assert cos.shape == sin.shape == (1, 1, 1, 8)                               # (B, 1, T, D)
    assert cos.flatten().tolist() == pytest.approx(cosines + cosines, abs=1e-5)
    assert sin.flatten().tolist() == pytest.approx([-x for x in sines] + sines, abs=1e-5)


def test_scores_depend_on_distances_only():
    """q . k is the same when both tokens move alike, and another when one moves, whichever the
    axis."""
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(at_q, at_k):
        return float((rotate(q, *angles_at(*at_q)) * rotate(k, *angles_at(*at_k))).sum())

    at_q, at_k = np.array([3, 10, 8]), np.array([1, 2, 5])
    here = score(at_q, at_k)
    for move in 5 * np.eye(3, dtype=int):
        assert score(at_q + move, at_k + move) == pytest.approx(here, abs=1e-4)
        assert abs(score(at_q + move, at_k) - here) > 1e-2


def test_logits_with_pictures_equal_transformers(pair):
    batch = make_batch(pair.config, [[5, (6, 10), 3], [7], [(4, 4), 2, (14, 6), 9]])
    assert_same_logits(pair.vlm, pair.hf, batch)


# ------------------------------------------------------------------------------- 2 cached decoding

def make_cache(valid, n, room, layers=1, static=False, heads=1, dim=4, seed=0):
    """A cache that has read random prompts, valid (N, P) bool, with room for n samples of each."""
    cache, g = model.KVCache(valid), torch.Generator().manual_seed(seed)
    shape = len(valid), heads, valid.shape[1], dim
    for _ in range(layers):
        cache.keep_prompt(torch.randn(shape, generator=g), torch.randn(shape, generator=g))
    cache.share(n, room, static)
    return cache


def test_slots_by_hand():
    # Two prompts of 3 slots, the first with a token of padding; two samples each, with room for 3
    # tokens: 6 slots.
    cache = make_cache(torch.tensor([[False, True, True], [True, True, True]]), n=2, room=3)
    cache.extend(1)                                             # one token a row, into slot 3
    assert cache.new.tolist() == [3] and (cache.filled, int(cache.end)) == (4, 4)
    # prompts, 1, samples, 1, new tokens, slots seen
    assert cache.bias.shape == (2, 1, 2, 1, 1, 4)
    assert cache.bias[0, 0, :, 0].tolist() == [[[-INF, 0, 0, 0]]] * 2
    assert cache.bias[1, 0, :, 0].tolist() == [[[0, 0, 0, 0]]] * 2
    # two tokens a row, into slots 4 and 5; the first of them is padding in the second row (sample 1
    # of prompt 0)
    real = torch.tensor([[True, True], [False, True], [True, True], [True, True]])
    cache.extend(2, real)
    assert cache.new.tolist() == [4, 5] and (cache.filled, int(cache.end)) == (6, 6)
    assert cache.bias.shape == (2, 1, 2, 1, 2, 6)
    first, second, third = cache.bias[0, 0, 0, 0], cache.bias[0, 0, 1, 0], cache.bias[1, 0, 0, 0]
    assert first.tolist() == [[-INF, 0, 0, 0, 0, -INF], [-INF, 0, 0, 0, 0, 0]]
    # the padding sees itself only
    assert second.tolist() == [[-INF, 0, 0, 0, 0, -INF], [-INF, 0, 0, 0, -INF, 0]]
    assert third.tolist() == [[0, 0, 0, 0, 0, -INF], [0, 0, 0, 0, 0, 0]]


def test_static_slots_by_hand():
    """The whole room is looked at, and what is not filled yet is hidden."""
    cache = make_cache(torch.tensor([[False, True, True]]), n=2, room=3, static=True)
    for filled in (4, 5):
        cache.extend(1)
        expected = [-INF] + [0] * (filled - 1) + [-INF] * (6 - filled)
        assert cache.bias[0, 0, :, 0].tolist() == [[expected]] * 2


def plain_attention(q, k, v):
    """One query (H, D) over keys and values (KV, S, D), in float64, a head at a time."""
    group = len(q) // len(k)
    rows = []
    for h, x in enumerate(q.double()):
        scores = k[h // group].double() @ x / math.sqrt(len(x))                 # (S,)
        weights = scores.exp() / scores.exp().sum()
        rows.append(weights @ v[h // group].double())
    return torch.stack(rows)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_cached_attention_equals_plain_attention(n, static):
    """Chunks of 1, 3 (padded) and 1 tokens behind padded prompts, in two layers, 4 heads on 2."""
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    cache = make_cache(valid, n, room=6, layers=2, static=static, heads=2, dim=8)
    g, B = torch.Generator().manual_seed(1), 2 * n
    keys, values = {}, {}       # (layer, row) -> those of its real tokens so far, (KV, S, D)
    for layer in range(2):
        for row in range(B):
            prompt = row // n
            keys[layer, row], values[layer, row] = (
                x[prompt][:, valid[prompt]] for x in cache.prompt_kv[layer])
    for T in (1, 3, 1):
        real = torch.ones(B, T, dtype=torch.bool)
        real[::2, 0] = T == 1                                   # the chunk of 3 is ragged
        cache.extend(T, real)
        for layer in range(2):
            q = torch.randn(B, 4, T, 8, generator=g)
            k, v = torch.randn(2, B, 2, T, 8, generator=g)
            attended = cache.attend(layer, q, k, v)
            assert attended.shape == (B, 4, T, 8)                               # (B, H, T, D)
            for row, t in real.nonzero().tolist():
                own = layer, row
                keys[own] = torch.cat([keys[own], k[row, :, t:t + 1]], 1)
                values[own] = torch.cat([values[own], v[row, :, t:t + 1]], 1)
                expected = plain_attention(q[row, :, t], keys[own], values[own])
                assert torch.allclose(attended[row, :, t].double(), expected, atol=1e-5)


def test_decode_step_by_hand():
    """One step in a model that only notes what it is asked."""
    calls = []

    class Network:
        def embed_tokens(self, ids):
            return 10.0 * ids[..., None]                                        # (B, T, C = 1)

        def __call__(self, x, positions, mask=None, cache=None):
            calls.append((x.tolist(), positions.tolist(), cache.extended))
            return x + 1

    class Cache:
        static, extended = False, 0

        def extend(self, T, valid=None):
            self.extended += T

    vlm = SimpleNamespace(model=Network(), head=lambda hidden: hidden * 2)
    step = model.NextToken(vlm, Cache(), torch.tensor([7, 4]))
    # tokens 3 and 5 at positions 7 and 4 on all three axes: hidden 31 and 51, logits 62 and 102
    assert step(torch.tensor([3, 5])).tolist() == [[62.0], [102.0]]
    # the cache made place before the network ran
    assert calls == [([[[30.0]], [[50.0]]], [[[7], [4]]] * 3, 1)]
    assert step(torch.tensor([1, 2])).tolist() == [[22.0], [42.0]]
    assert calls[1][1:] == ([[[8], [5]]] * 3, 2)


@pytest.mark.parametrize("static", [False, True])
def test_cached_greedy_equals_transformers(pair, monkeypatch, static):
    """Words only, whose positions just count, so that exercise 1 is not needed: transformers' own
    stand for it."""
    def counted(vlm, input_ids, attention_mask=None, image_grid_thw=None, is_image=None):
        real = attention_mask.long()                                            # (B, T)
        return (real.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1), real.sum(1)

    def angles(decoder, positions):
        (B, T), D = positions.shape[1:], decoder.c.head_dim
        x = torch.zeros(B, T, decoder.c.hidden_size)
        cos, sin = pair.hf.model.language_model.rotary_emb(x, positions)
        cos, sin = cos.reshape(-1, B, T, D)[0], sin.reshape(-1, B, T, D)[0]
        left = torch.arange(D) < D // 2
        return cos[:, None], torch.where(left, -sin, sin)[:, None]

    shapes, forward = [], model.Decoder.forward

    def noted(decoder, x, *rest, **more):
        shapes.append(tuple(x.shape[:2]))
        return forward(decoder, x, *rest, **more)

    monkeypatch.setattr(model.VLM, "positions", counted)
    monkeypatch.setattr(model.Decoder, "angles", angles)
    monkeypatch.setattr(model.Decoder, "forward", noted)
    batch = make_batch(pair.config, [[9], [3], [1]], seed=2)
    ours = pair.vlm.generate(**batch, n=2, max_new_tokens=12, temperature=0.0, static=static)
    assert torch.equal(ours.tokens, hf_greedy(pair.hf, batch, 12).repeat_interleave(2, 0))
    assert shapes == [(3, 9)] + 11 * [(6, 1)]   # the prompts once, then a token a row and step


# --------------------------------------------------------------------- 3 HNSW against exact search

def test_exact_search_equals_faiss():
    rng = np.random.default_rng(0)
    vectors, queries = (rng.normal(size=(n, 16)).astype(np.float32) for n in (1000, 20))
    peer = faiss.IndexFlatIP(16)
    peer.add(vectors)
    # chunks smaller than k among them
    for k, cuts in ((1, (500,)), (7, (3, 500, 999)), (40, (10, 20, 30))):
        scores, rows = retrieve.exact_search(iter(np.split(vectors, cuts)), queries, k)
        theirs, their_rows = peer.search(queries, k)
        assert rows.tolist() == their_rows.tolist()
        assert rows.dtype == np.int64 and scores.dtype == np.float32
        np.testing.assert_allclose(scores, theirs, atol=1e-5)


class BlindTo(retrieve.Flat):
    """An index that finds everything but one row."""

    def search(self, queries, k, device):
        scores = queries @ self.vectors.astype(np.float32).T                    # (Q, N)
        scores[:, self.row] = -INF
        order = np.argsort(-scores, axis=1)[:, :k - 1]
        return np.take_along_axis(scores, order, 1), order


def base_blind_to(row, vectors):
    index = BlindTo(np.asarray(vectors, dtype=np.float16), len(vectors))
    index.row = row
    encoder = SimpleNamespace(
        encode_queries=lambda queries: np.ones((len(queries), 1), dtype=np.float32))
    shard = SimpleNamespace(index=index, docs=[{}] * len(vectors))
    return KnowledgeBase(encoder, [shard], None)


def test_recall_by_hand():
    # the query is 1, so documents score as they are numbered; 9 is missed: of the best three 9 8 7
    # two are found
    base = base_blind_to(1, [[5], [9], [8], [7], [6]])
    assert base.recall(["q"], k=3) == pytest.approx(2 / 3)
    # one of the best two, 4 and 4, is missed, but a third 4 scores as well: nothing is lost
    assert base_blind_to(1, [[3], [4], [4], [4]]).recall(["q", "q"], k=2) == 1.0


def test_recall_of_documents_by_hand():
    # Unit vectors, each its own best hit: of 12 queries the one from the row that is never found
    # goes wrong. A number above 12 means all 12, each once; of 5 different documents at most one
    # goes wrong.
    vectors = np.random.default_rng(0).normal(size=(12, 8))
    base = base_blind_to(3, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert base.recall(12, k=1) == base.recall(1000, k=1) == pytest.approx(11 / 12)
    assert {round(base.recall(5, k=1, seed=seed), 6) for seed in range(20)} == {0.8, 1.0}
    assert KnowledgeBase([], [], None).recall() == 1.0          # an empty base misses nothing


# ------------------------------------------------------------------------------- 6 the router loop

def step(text):
    """A Step as the generator gets it back: what the model wrote, parsed."""
    parsed = parse_step(text)
    return SimpleNamespace(parsed=parsed, route=getattr(parsed, "route", None),
                           answer=getattr(parsed, "answer", ""))


def requests_of(row, replies, **options):
    """Runs the generator of a question on these replies -> all that it asked for."""
    generator = infer.routed("", row, infer.RouterOptions(**options))
    requests = []
    for reply in [None, *replies]:
        try:
            requests.append(generator.send(reply))
        except StopIteration:
            return requests
    raise AssertionError(f"the generator goes on asking: {requests[-1]}")


EVIDENCE = {"text": (Hit("0", "Kasten: Ortal.", 1.0),)}
HOP = [step(render_route("t", "Capital of Kasten?", "Text Retriever")), EVIDENCE,
       step(render_answer("t", "Ortal"))]
STOP, END = step(render_route("t", "None", "None")), step(render_answer("t", "Vesna"))
ROW = {"question": "Who leads the capital?", "image": "flag.png"}


def test_what_the_loop_asks_for():
    route, search, answer, again, final = requests_of(ROW, [*HOP, STOP, END], k=3)
    query, question = "Capital of Kasten?", "Origin question: Who leads the capital?\n"
    assert (route.kind, route.problem) == ("route", question + "<image>")
    assert (search.query, search.bases, search.k) == (query, ("text",), 3)
    assert (answer.kind, answer.query, answer.evidence) == ("answer", query, EVIDENCE)
    assert "ter-0: Kasten: Ortal.\n" in answer.problem
    history = question + "Sub-question1: Capital of Kasten?\nAnswer1: Ortal\n"
    assert (again.kind, again.problem) == ("route", history + "<image>")
    assert final.kind == "final" and final.problem == (
        history + "Now, give me the final answer of the origin question: Who leads the capital?"
        "<image>")
    prompts = [request.prompt for request in (route, answer, again, final)]
    assert prompts == ["route", "answer", "route", "final"]


def test_what_ends_the_loop():
    def kinds(replies, **options):
        requests = requests_of(ROW, replies, **options)
        return [getattr(request, "kind", "search") for request in requests]

    malformed = SimpleNamespace(parsed=StepError("no tags", "I would search."), route=None,
                                answer="")
    assert kinds([STOP, END]) == ["route", "final"]
    assert kinds([malformed, END]) == ["route", "final"]
    two_hops = ["route", "search", "answer"] * 2 + ["final"]
    assert kinds([*HOP, *HOP, END], max_steps=2) == two_hops
    image = step(render_route("t", "Which flag?", "Text Image Retriever"))
    assert isinstance(image.parsed, RouteStep)
    row = {"question": "Whose flag?", "former": [("Before?", "Yes")]}           # no picture
    first, search, *_ = requests_of(row, [image, {"image": ()}, END, STOP, END])
    assert first.problem == "Origin question: Whose flag?\nSub-question1: Before?\nAnswer1: Yes\n"
    assert search.bases == ("image",)


class Scripted(infer.Router):
    """A Router whose model says what the last line of the prompt asks for; it notes the size of
    each call."""
    calls = ()

    def sample(self, talks, generator, n=None, noise=None):
        self.calls += (len(talks),)
        outputs = []
        for system, user in talks:
            problem = user["content"]
            if not problem.endswith("\n"):                      # the evidence, or the last words
                text = render_answer("t", "Ortal")
            elif "Answer1" not in problem:
                text = render_route("t", "Capital of Kasten?", "Text Retriever")
            else:
                text = render_route("t", "None", "None")
            candidate = infer.Candidate(text, (4,), (0.0,), parse_step(text))
            outputs.append(((1, 2, 3), (candidate,)))
        return outputs


def test_a_tick_is_one_call_and_one_search():
    searches, done = [], []

    def search(queries, k):
        searches.append(len(queries))
        return [list(EVIDENCE["text"])] * len(queries)

    base = SimpleNamespace(search=search)
    vlm = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=999))
    bases = {"text": base, "image": base, "table": base}
    router = Scripted(vlm, None, bases, batch_size=4)
    rows = [{"question": f"Question {i}?"} for i in range(6)]
    trajectories = router.run(rows, done.append, torch.Generator())
    assert [t.row for t in trajectories] == rows
    assert [t.answer for t in trajectories] == ["Ortal"] * 6
    assert searches == [6]                                      # all six in one call
    assert router.calls == (4, 2) * 4           # route, answer, route, final: in batches of four
    assert sorted(t.row["question"] for t in done) == [row["question"] for row in rows]
    with pytest.raises(ValueError, match="question 2 is empty"):
        router.run([rows[0], {"question": " "}], generator=torch.Generator())
