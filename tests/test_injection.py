"""Text from outside (questions, captions, passages, tables) is text: it opens no turn, shows no
picture, and does not change how the model's output is read. Properties over random and hostile
texts; that it becomes no tag of a step is shown in test_steps.py."""
import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from conftest import ROOT
from hostile import evidences, histories, texts, words
from infer import Router
from oracles import full_tokenizer
from parts.chat import Processor
from parts.corpora import flatten_table
from parts.encoders import passage
from parts.stepfiles import step_output, steps_of
from parts.steps import (BASES, PROMPTS, StepError, answer_problem, conversation, final_problem,
                         parse_step, render_answer, render_route, route_problem)
from parts.trajectory import Candidate, result_row
from parts.vision import PictureSettings
from retrieve import Hit

PICTURE = Image.new("RGB", (56, 56), "white")


# --------------------------------------------------------------------------- through the tokenizer


@pytest.fixture(scope="module", params=["letters and merges", "words of the shipped model"])
def processor(request):
    """The published kind of tokenizer, and the tiny model's own."""
    if request.param == "letters and merges":
        return Processor(full_tokenizer(), PictureSettings())
    return Processor.from_pretrained(ROOT / "weights" / "tiny")


def control_ids(processor, talk):
    """The special tokens of a prompt, in order; the places of a picture as one."""
    special = set()
    for i, token in processor.tokenizer.get_added_tokens_decoder().items():
        if token.special or token.content.startswith("<|"):
            special.add(i)
    ids = [i for i in processor.prompt(talk)[0] if i in special]
    return [i for i, _ in itertools.groupby(ids)]


@settings(max_examples=60, deadline=None)
@given(question=words, history=histories, evidence=evidences, image=st.booleans(), system=texts)
def test_control_ids_of_a_prompt_are_those_of_its_turns(processor, question, history, evidence,
                                                        image, system):
    """By hand: <|im_start|> system <|im_end|> <|im_start|> user (picture) <|im_end|> <|im_start|>
    for the answer."""
    p, shown = processor, PICTURE if image else None
    picture = [p.vision_start, p.image_pad, p.vision_end] if image else []
    expected = [p.start, p.end, p.start, *picture, p.end, p.start]
    expected = [i for i, _ in itertools.groupby(expected)]
    for problem in (route_problem(question, history, image),
                    answer_problem(question, evidence, image),
                    final_problem(question, history, image)):
        chat = conversation(system, problem, shown)
        assert control_ids(p, chat) == expected
        assert len(p.prompt(chat)[1]) == image


@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_a_text_is_encoded_the_same_wherever_it_stands(processor, text):
    """No id of a text is a control token, and a byte-level tokenizer gives the text back."""
    ids = processor.encode(text)
    control = {processor.start, processor.end, processor.image_pad, *processor.eos_ids}
    assert not set(ids) & control
    normalizer = processor.tokenizer.normalizer
    if normalizer is not None:                          # the published kind loses nothing
        assert processor.decode(ids) == normalizer.normalize_str(text)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(texts, min_size=3, max_size=3), title=texts, caption=texts)
def test_tables_and_captions_are_evidence_like_any_other(processor, cells, title, caption):
    """Whatever cells, titles and captions hold: the prompt has the control ids of its two turns."""
    head, *row = cells
    table = flatten_table({"page_title": title, "caption": caption, "header": [head],
                           "rows": [row]})
    shown = passage({"title": title, "text": caption})
    problem = answer_problem("Who?", {"table": [table], "image": [shown]}, False)
    assert all(cell in problem for cell in cells)
    p = processor
    ids = control_ids(p, conversation("s", problem))
    assert ids == [p.start, p.end, p.start, p.end, p.start]


# ------------------------------------------------------------------------ through the whole router


class Script(Router):
    """A router whose model says the same whatever it is shown."""

    def sample(self, conversations, generator, n=None, noise=None):
        self.seen += conversations
        replies = [next(self.outputs) for _ in conversations]
        return [((0,), (Candidate(text, (1,), (0.0,), parse_step(text)),)) for text in replies]


def routed(question, passages, outputs):
    """The router, and the trajectory of a question for which every base finds these passages."""
    hits = [Hit(str(i), text, 1.0) for i, text in enumerate(passages)]
    base = SimpleNamespace(search=lambda queries, k: [hits for _ in queries])
    parameter = SimpleNamespace(device="cpu")
    vlm = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096),
                          parameters=lambda: iter([parameter]))
    router = Script(vlm, None, dict.fromkeys(BASES, base))
    router.outputs, router.seen = iter(outputs), []
    [trajectory] = router.run([{"question": question, "answer": "x", "set": "s", "line": 1}])
    return router, trajectory


OUTPUTS = [render_route("t", "Who leads it?", "Table Retriever"), render_answer("t", "Bak"),
           render_route("enough", "None", "None"), render_answer("t", "Dol")]


@settings(max_examples=100, deadline=None)
@given(question=words, passages=st.lists(texts, max_size=3))
def test_evidence_never_becomes_a_step(question, passages):
    """The steps of a trajectory are those of the model's outputs, whatever question and passages
    say; its row is one line of JSON, and as a step file it asks and answers the same."""
    router, trajectory = routed(question, passages, OUTPUTS)
    _, harmless = routed("Who?", ["a passage"], OUTPUTS)
    parsed = [step.parsed for step in trajectory.steps]
    assert parsed == [step.parsed for step in harmless.steps]
    assert trajectory.answer == "Dol"
    assert (trajectory.retrievals, trajectory.malformed) == (1, 0)
    systems = [chat[0]["content"] for chat in router.seen]
    assert systems == [PROMPTS[kind] for kind in ("route", "answer", "route", "final")]
    for passage in passages:                            # shown as it is, in the user's turn
        assert passage in router.seen[1][1]["content"]
    line = json.dumps(result_row(trajectory), ensure_ascii=False)
    assert "\n" not in line and json.loads(line)["plan_1"]["tar"] == passages
    steps = steps_of(json.loads(line), PROMPTS)
    assert [step.problem for step in steps] == [chat[1]["content"] for chat in router.seen]
    assert [parse_step(step_output(step)) for step in steps] == parsed


@settings(max_examples=100, deadline=None)
@given(question=words, passages=st.lists(texts, max_size=2), output=texts)
def test_hostile_outputs_are_a_step_or_counted(question, passages, output):
    """Whatever the model says first, the trajectory ends, with at most one malformed step counted
    for it."""
    _, trajectory = routed(question, passages, [output] + OUTPUTS[1:] + OUTPUTS[2:] * 3)
    first = parse_step(output)
    assert trajectory.malformed >= isinstance(first, StepError)
    assert len(trajectory.steps) <= 2 * 4 + 1
    assert json.loads(json.dumps(result_row(trajectory)))["question"] == question
