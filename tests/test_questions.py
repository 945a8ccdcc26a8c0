"""Question files of all the published sets, what may stand in a row, and pictures named in it."""
import json
import os
import threading

import pytest
from PIL import Image

from parts.questions import (embedded_world, gold_routes, golds_of, load_questions, plans_of,
                             predicted)
from scripted import questions_at


def test_published_question_files_are_read_as_they_are(golden, tmp_path):
    for name in ("2wikimultihopqa_val", "openwikitqa_val", "tabfact_val"):
        rows, faults = load_questions(golden / f"questions_{name}.jsonl")
        assert len(rows) == 60 and not faults and all(row["image"] is None for row in rows)
    for name in ("DynVQA_en.202412", "infoseek_val", "webqa_val"):
        file = golden / f"questions_{name}.jsonl"
        ids = [json.loads(line)["image_id"] for line in file.open(encoding="utf-8")]
        for image_id in ids[1:]:
            Image.new("RGB", (8, 8)).save(tmp_path / f"{image_id}.jpg")
        (tmp_path / f"{ids[0]}.jpg").unlink(missing_ok=True)
        rows, faults = load_questions(file, images=tmp_path)
        assert len(rows) + len(faults) == 60 and len(faults) == ids.count(ids[0])
        assert f"{file.name}:1: " in faults[0]
        assert {rows[0]["image"]} <= {str(tmp_path / f"{i}.jpg") for i in ids}
        assert all(golds_of(row) for row in rows)
        with pytest.raises(ValueError, match="--images DIR"):
            load_questions(file)


def test_what_is_added_to_a_row(tmp_path):
    """Its set, its line, its picture; a file `questions` is called after its folder."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows, _ = load_questions(questions_at(tmp_path / "q.jsonl", {}, {"image": "a.png"}))
    assert [(row["set"], row["line"], row["image"]) for row in rows] == [
        ("q", 1, None), ("q", 2, str(tmp_path / "a.png"))]
    (tmp_path / "deep").mkdir()
    file = questions_at(tmp_path / "deep" / "questions.jsonl", {})
    assert load_questions(file)[0][0]["set"] == "deep"


def test_only_the_first_rows(tmp_path):
    file = questions_at(tmp_path / "q.jsonl", {}, {"question": ""}, {}, {})
    rows, faults = load_questions(file, limit=3)
    assert [row["line"] for row in rows] == [1, 3] and len(faults) == 1


def test_what_an_earlier_run_left_in_a_question_row_is_dropped(tmp_path):
    stale = {"plan_1": {"query": "old"}, "plan_9": 3, "llm_answer": "old", "cost": {}, "method": 7,
             "run": "old", "former": [["old", "old"]], "id": "a", "plan": "stays"}
    [row], faults = load_questions(questions_at(tmp_path / "q.jsonl", stale))
    assert not faults
    assert set(row) == {"question", "answer", "id", "plan", "image", "set", "line"}


def test_rows_of_wrong_types_are_named_and_left_out(tmp_path):
    rows = ({}, {"kind": ["a"]}, {"kind": {}}, {"answer": []}, {"kind": None}, {"id": 5},
            {"id": "5"})
    file = questions_at(tmp_path / "q.jsonl", *rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())           # as some editors begin a file
    rows, faults = load_questions(file)
    assert [row["line"] for row in rows] == [1, 5, 6]
    wanted = ["q.jsonl:2: kind", "q.jsonl:3: kind", "q.jsonl:4: gold answer []",
              "q.jsonl:7: id '5' stands in line 6 already"]
    assert len(faults) == 4 and all(text in line for text, line in zip(wanted, faults))


@pytest.mark.parametrize("row, golds", [
    ({"answer": "x"}, ["x"]), ({"answer": ["x", 5, 2.5]}, ["x", 5, 2.5]),
    ({"answer": "x", "answer_eval": None}, ["x"]),              # null says nothing
    ({"answer": "x", "answer_eval": ["y"]}, ["y"]),
    ({"answer": {"range": [1, 2.5]}}, [{"range": [1, 2.5]}])])
def test_gold_answers(row, golds):
    assert golds_of(row) == golds


@pytest.mark.parametrize("answer", [
    None, [], [None], float("nan"), float("inf"), {}, {"range": [1]}, {"range": [1, 2, 3]},
    {"range": [1, "2"]}, {"range": [1, float("inf")]}, {"range": [float("nan"), 1]}, [["x"]]])
def test_what_is_no_gold_answer(answer):
    with pytest.raises(ValueError, match="gold answer"):
        golds_of({"answer": answer})


def test_gold_routes():
    hops = [{"query": "q", "retriever": " Table Retriever "},
            {"query": "q", "retriever": "text image retriever"}]
    assert gold_routes({"hops": hops}) == ["Table Retriever", "Text Image Retriever", "None"]
    assert gold_routes({"hops": []}) == ["None"] and gold_routes({}) is None
    for bad in (7, [7], [{"query": "q"}], [{"retriever": "text retriever"}],
                [{"query": 1, "retriever": "text retriever"}], [{"query": "q", "retriever": "x"}]):
        with pytest.raises(ValueError, match="with a retriever of text retriever"):
            gold_routes({"hops": bad})


def test_plans_stand_in_order():
    row = {"plan_10": "j", "question": "q", "plan_2": "b", "plan_1": "a"}
    assert plans_of(row) == ["a", "b"]                  # of four fields, plan_10 is none of ours
    row |= {str(i): i for i in range(6)}
    assert plans_of(row) == ["a", "b", "j"]


def test_answers_of_others():
    for answer in ("x", {"thought": "t", "answer": "x"}):
        assert predicted({"llm_answer": answer}) == "x"
    assert predicted({"llm_answer": None}) == "" and predicted({"llm_answer": 5}) == "5"
    for row in ({}, {"llm_answer": ["x"]}, {"llm_answer": {"answer": ["x"]}}):
        with pytest.raises(ValueError, match="no llm_answer"):
            predicted(row)


# ------------------------------------------------------------------------------------- pictures

def test_pictures_with_endings_in_capitals(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.JPG")
    file = questions_at(tmp_path / "q.jsonl", {"image_id": "a"})
    rows, faults = load_questions(file, images=tmp_path)
    assert [row["image"] for row in rows] == [str(tmp_path / "a.JPG")] and not faults


def test_a_picture_that_no_model_can_be_shown(tmp_path):
    """It opens, but its shape is refused: the row is left out when it is read, not in the run."""
    for name, size in (("thin", (900, 3)), ("high", (3, 900)), ("just", (600, 3))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    names = ("thin", "high", "just")
    file = questions_at(tmp_path / "q.jsonl", *({"image": f"{name}.png"} for name in names))
    rows, faults = load_questions(file)
    assert [row["line"] for row in rows] == [3]
    assert "q.jsonl:1: a picture of 900 x 3" in faults[0] and "3 x 900" in faults[1]


# -------------------------------------------------------------------------------- embedded worlds

def test_processes_that_need_the_embedded_world_at_once_write_it_once(tmp_path, monkeypatch):
    """Each of six finds it whole. Threads stand for processes: each opens the lock anew."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").touch()
    (tmp_path / "lab" / "world.py").write_text("""import os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
os.makedirs(out, exist_ok=True)
open(out + "/calls", "a").write("x")
time.sleep(0.3)
open(out + "/questions.jsonl", "w").write("whole")
""")
    monkeypatch.setattr("parts.questions.HERE", tmp_path)
    texts = []

    def ask():
        folder = embedded_world("demo", "test", 0, 1)
        texts.append((folder / "questions.jsonl").read_text())
    askers = [threading.Thread(target=ask) for _ in range(6)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert texts == ["whole"] * 6
    assert (tmp_path / "data" / "demo" / "calls").read_text() == "x"
    assert sorted(os.listdir(tmp_path / "data")) == ["demo"]


def test_an_embedded_world_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").touch()
    (tmp_path / "lab" / "world.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr("parts.questions.HERE", tmp_path)
    with pytest.raises(ValueError, match="could not write .*demo"):
        embedded_world("demo", "test", 0, 1)
