"""Encoders without weights: weights and colours by hand, and that names find their facts."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from bases import docs_of, facts, flags, top
from parts.encoders import Lexical
from parts.pretrained import load_encoder
from retrieve import Hit, KnowledgeBase


@pytest.fixture(scope="module")
def facts_base():
    return KnowledgeBase.build(docs_of(*facts()[0]), "lexical")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return flags(tmp_path_factory.mktemp("flags"))


def test_lexical_weights_worked_by_hand():
    encoder, count = Lexical().fitted(docs_of("Red flag", "the red hat", "red RED"))
    assert count == 3
    frequency = {"flag": 1, "hat": 1, "red": 3, "the": 1}
    assert encoder.state() == {"documents": 3, "frequency": frequency}
    # sqrt(0.5 + ln(5 / 4)): in 3 of 3; sqrt(0.5 + ln(5 / 2)): in 1 of 3; sqrt(0.5 + ln 5)
    assert encoder.weight("red") == pytest.approx(0.8504, abs=1e-4)
    assert encoder.weight("flag") == pytest.approx(1.1901, abs=1e-4)
    assert encoder.weight("unseen") == pytest.approx(1.4524, abs=1e-4)
    assert encoder.weight("the") == 0.3
    # were random directions orthogonal: 0.8504^2 / (0.8504^2 + 1.1901^2)
    assert encoder.similarity("red flag", "red hat") == pytest.approx(0.338, abs=0.13)


def test_lexical_finds_the_right_fact_of_every_question(facts_base):
    texts, questions = facts()
    questions = questions[::2]
    hits = facts_base.search([question for question, _ in questions], k=2)
    wrong = [(question, first.text) for (question, i), (first, _) in zip(questions, hits)
             if first.text != texts[i]]
    assert not wrong, wrong[:5]


def test_names_that_share_a_syllable_stay_apart(facts_base):
    names = [text.split()[0] for text in facts()[0][::3]]
    vectors = facts_base.encoder.encode_queries(names)
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
    np.fill_diagonal(cosines, 0)
    assert cosines.max() < 0.5  # the right name scores 1


def test_typos_of_names_still_find_something(facts_base):
    texts, questions = facts()
    right = 0
    for question, i in questions[:300]:
        name = texts[i].split()[0]
        misspelt = question.replace(name, name[:4] + name[3:])      # a letter doubled
        hits = facts_base.search([misspelt], k=5)[0]
        right += any(name in hit.text for hit in hits)
    assert right / 300 > 0.6, right


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
    similarity = load_encoder("lexical").similarity
    assert similarity("capital of Bakdol", "Capital of Bakdol?") == pytest.approx(1)
    assert similarity("capital of Bakdol", "capital of Mirtas") == pytest.approx(0.5, abs=0.15)
    assert abs(similarity("capital of Bakdol", "who won")) < 0.25


@pytest.mark.parametrize("name", ["lexical", "pixel"])
def test_fitting_one_base_leaves_another_alone(name):
    encoder = load_encoder(name)
    first = KnowledgeBase.build(docs_of("Bakdol has capital Mirtas."), encoder)
    before = first.encoder.state()
    second = KnowledgeBase.build(docs_of("other words", "and more"), encoder)
    assert first.encoder.state() == before and encoder.state()["documents"] == 0
    again = KnowledgeBase.build(docs_of("a third corpus"), second.encoder)
    assert again.encoder.state() == second.encoder.state()      # fitted once, it stays as it is


def test_what_fitting_learned_comes_back(pictures):
    queries = [{"text": "the flag", "image": pictures[0]["image"]}, "flag of nowhere"]
    for name in ("lexical", "pixel"):
        encoder, _ = load_encoder(name).fitted(pictures)
        restored = load_encoder(name).restored(encoder.state())
        np.testing.assert_array_equal(restored.encode_docs(pictures), encoder.encode_docs(pictures))
        np.testing.assert_array_equal(restored.encode_queries(queries),
                                      encoder.encode_queries(queries))


def test_pixel_colours_are_block_means(pictures):
    encoder = load_encoder("pixel")
    pixels = np.asarray(Image.open(pictures[7]["image"]), np.float64)
    means = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3)).reshape(-1)
    means -= means.mean()
    means /= np.linalg.norm(means)
    colours = encoder.colours(pictures[7]["image"])
    np.testing.assert_allclose(colours, means, atol=3e-3)       # Pillow rounds


def test_pixel_words_count_by_their_share_of_the_idf():
    """Of 3 captions all hold "flag", two "red": of "red flag unseen" ln(5/3) + ln(5/4) of ln(5/3) +
    ln(5/4) + ln 5 is in the corpus; a stop word counts nothing."""
    encoder, _ = load_encoder("pixel").fitted(docs_of("red flag", "red the flag", "flag"))
    assert encoder.shared_idf("the red flag unseen") == pytest.approx(0.3132, abs=1e-4)
    assert encoder.shared_idf("the") == 0


def test_pixel_base_takes_pictures_words_or_both(pictures):
    base, noise = KnowledgeBase.build(pictures, "pixel"), np.random.default_rng(0)
    for doc in pictures:
        pixels = np.asarray(Image.open(doc["image"]), np.float32)
        noisy = pixels * 0.9 + noise.normal(0, 12, (64, 64, 3))
        photo = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        name = doc["text"].split()[-1]
        alone = {"image": photo}
        beside_words = {"text": "Which country has this flag?", "image": photo}
        for query in (alone, beside_words, f"flag of {name}", {"text": f"flag of {name}"},
                      {"text": f"the flag of {name}", "image": doc["image"]}):
            assert base.search([query], 1)[0][0].id == doc["id"], query
        for one, other in zip(*base.search([alone, beside_words], 10)):
            # words that tell no caption from another change next to nothing
            assert one.score == pytest.approx(other.score, abs=0.01)
    hit = base.search([{"image": pictures[3]["image"]}], 1)[0][0]
    assert hit == Hit("3", pictures[3]["text"], hit.score, pictures[3]["image"])


def test_base_of_words_asked_with_a_picture(pictures):
    base = KnowledgeBase.build(docs_of("Bakdol has capital Mirtas.", "rain"), "lexical")
    picture = pictures[0]["image"]
    assert top(base, {"text": "capital of Bakdol", "image": picture}) == [
        "Bakdol has capital Mirtas."]
    with pytest.raises(ValueError, match="picture without words"):
        base.search([{"text": "", "image": picture}])


def test_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "no.png").write_text("words")
    base = KnowledgeBase.build([{"id": "1", "text": "x"}], "pixel")
    with pytest.raises(ValueError, match="no.png"):
        base.search([{"text": "", "image": str(tmp_path / "no.png")}])
