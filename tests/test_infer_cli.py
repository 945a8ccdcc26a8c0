"""The commands of infer.py: many questions evaluated and continued, one answered, steps written,
flags that do not go together, and mistakes in one line."""
import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image

from conftest import made
from model import VLM
from parts.chat import Processor
from parts.corpora import read_docs
from parts.questions import load_questions
from parts.steps import final_problem
from retrieve import KnowledgeBase, world_bases
from scripted import Scripted, Words, cli, gold_replies, questions_at


def untimed(result):
    """An evaluation without what the clock says."""
    timed = [name for name in result if name.startswith("seconds")]
    return {**result, **dict.fromkeys(timed), "ci": {**result["ci"], **dict.fromkeys(timed)}}


# -------------------------------------------------------------------------------- many questions

def test_evaluation_of_a_world_continues_and_scores_the_same(noise_model, world, tmp_path, capsys):
    out = tmp_path / "results" / "r.jsonl"
    flags = ["--model", noise_model, "--world", world, "--method", "router", "static", "--limit", 6,
             "--max-new-tokens", 6, "--out", out]
    code, lines, _ = cli(capsys, *flags, "--show", 2)
    assert code == 0 and any("  ask" in line for line in lines)
    assert sum("[" in line and ", router]" in line for line in lines) == 2
    assert not any(", static]" in line for line in lines)               # the first method's alone
    assert any(line.startswith("F1-Recall by kind") for line in lines)
    results = [json.loads(line) for line in lines[-2:]]
    assert [result["method"] for result in results] == ["router", "static"]
    assert results[0]["n"] == 6 and results[1]["retrievals"] == 3.0
    wanted = {"method", "n", "f1_recall", "em", "f1", "route_accuracy", "malformed", "retrievals",
              "gold_retrievals", "model_calls", "tokens", "seconds", "by_kind", "by_hops"}
    assert wanted <= set(results[0])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12 and all("llm_answer" in row for row in rows)
    assert set(results[0]["by_set"]) == {world.name}
    assert results[0]["tokens"] > results[0]["tokens_read"]
    # a run that was killed while it wrote its ninth row: eight are kept, the torn one and the
    # others are answered again
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole[:8]) + whole[8][:50])
    code, lines, _ = cli(capsys, *flags, "--json")
    again = out.read_bytes().splitlines(keepends=True)
    assert code == 0 and len(lines) == 2 and again[:8] == whole[:8] and len(again) == 12
    results = [untimed(result) for result in results]
    assert [untimed(json.loads(line)) for line in lines] == results
    # the same rows, scored as a file; other settings are not mixed into it
    code, lines, _ = cli(capsys, "--score", out)
    assert code == 0 and [untimed(json.loads(line)) for line in lines[-2:]] == results
    code, _, err = cli(capsys, *flags, "-k", 1)
    assert code == 2 and len(err) == 1 and "name another --out" in err[0]
    assert out.read_bytes().splitlines(keepends=True) == again


def test_rows_of_another_base_are_not_taken_from_out(noise_model, world, tmp_path, capsys):
    """The base lies at the same place and holds another corpus; and so for a world's corpora."""
    for own in (False, True):
        home, out = shutil.copytree(world, tmp_path / f"w{own}"), tmp_path / f"r{own}.jsonl"
        kb = [] if own else ["--kb", f"text={tmp_path / 'kb'}"]
        flags = ["--model", noise_model, "--world", home, *kb, "--method", "text", "--limit", 1,
                 "--out", out, "--max-new-tokens", 2]
        for change in ("", "not "):
            with open(home / "text.jsonl", "a") as file:
                doc = {"id": f"new {change}", "text": f"It is {change}so."}
                file.write(json.dumps(doc) + "\n")
            if not own:
                docs = read_docs(home / "text.jsonl")
                KnowledgeBase.build(docs, "lexical").save(tmp_path / "kb")
            code, _, err = cli(capsys, *flags)
            assert code == (2 if change else 0), err
            assert not change or "name another --out" in err[-1]


def test_a_world_need_not_hold_what_is_not_asked_for(noise_model, world, tmp_path, capsys):
    """Questions alone are enough for a method without bases; a base that somebody built there
    counts by itself."""
    rows = [json.loads(line) for line in open(world / "questions.jsonl")]
    questions_at(tmp_path / "questions.jsonl", *({**row, "image": None} for row in rows))
    flags = ["--model", noise_model, "--world", tmp_path, "--limit", 1, "--max-new-tokens", 2]
    direct = [*flags, "--method", "direct", "--out", tmp_path / "d"]
    text = [*flags, "--method", "text", "--out", tmp_path / "t"]
    assert cli(capsys, *direct)[0] == cli(capsys, *direct)[0] == 0
    shutil.copy(world / "text.jsonl", tmp_path)
    assert cli(capsys, *text)[0] == cli(capsys, *text)[0] == 0
    docs = [{"id": "1", "text": "Something else."}]
    KnowledgeBase.build(docs, "lexical").save(tmp_path / "kb" / "text")
    code, _, err = cli(capsys, *text)
    assert code == 2 and "name another --out" in err[-1]


def test_rows_of_other_settings_are_not_taken_from_out(noise_model, world, tmp_path, capsys):
    """Weights count by what they hold: a copy of the model continues the run."""
    shutil.copytree(noise_model, tmp_path / "model")
    flags = ["--world", world, "--method", "direct", "--limit", 1, "--out", tmp_path / "r.jsonl",
             "--json", "--max-new-tokens", 2]
    copy = ["--model", tmp_path / "model", *flags]
    assert cli(capsys, "--model", noise_model, *flags)[0] == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    assert cli(capsys, *copy)[0] == 0 and (tmp_path / "r.jsonl").read_bytes() == before
    refused = [["--max-steps", 3], ["--max-new-tokens", 3], ["--temperature", 0.5], ["--seed", 1],
               ["-k", 3], ["--dtype", "bfloat16"], ["--top-k", 3], ["--lower-case"],
               ["--several"]]
    for more in refused:
        code, _, err = cli(capsys, *copy, *more)
        assert code == 2 and len(err) == 1 and "name another --out" in err[0], more
    (tmp_path / "model" / "prompts.json").write_text('{"route": "another"}')
    assert cli(capsys, *copy)[0] == 2
    shutil.copy(noise_model / "prompts.json", tmp_path / "model")
    VLM.from_config(tmp_path / "model", seed=1).save_pretrained(tmp_path / "model")
    code, _, err = cli(capsys, *copy)
    assert code == 2 and len(err) == 1 and "name another --out" in err[0]


@pytest.mark.parametrize("change", [
    {"question": "Who else?"}, {"answer": "y"}, {"image": "a.png"}, {"hops": []}])
def test_rows_of_other_questions_are_not_taken_from_out(noise_model, world, tmp_path, capsys,
                                                        change):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    file = questions_at(tmp_path / "q.jsonl", {}, {"question": "Where?"})
    flags = ["--model", noise_model, "--world", world, "--eval", file, "--method", "direct",
             "--max-new-tokens", 2, "--out", tmp_path / "r.jsonl"]
    assert cli(capsys, *flags)[0] == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    questions_at(file, {}, {"question": "Where?"} | change)
    code, _, err = cli(capsys, *flags)
    assert code == 2 and len(err) == 1 and "line 2 of q" in err[0]
    assert "name another --out" in err[0] and (tmp_path / "r.jsonl").read_bytes() == before


def test_what_an_earlier_run_left_in_a_question_row_does_not_reach_the_results(
        noise_model, world, tmp_path, capsys):
    stale = {"plan_1": {"query": "old"}, "llm_answer": "old", "former": [["old", "old"]]}
    file = questions_at(tmp_path / "q.jsonl", stale)
    flags = ["--model", noise_model, "--world", world, "--eval", file, "--method", "direct",
             "--max-new-tokens", 2]
    assert cli(capsys, *flags, "--out", tmp_path / "r.jsonl")[0] == 0
    assert "old" not in (tmp_path / "r.jsonl").read_text()


def test_a_bad_row_is_named_counted_and_does_not_end_the_run(noise_model, world, tmp_path, capsys):
    """NaN, as pandas writes it, is not equal to itself: no gold answer, with --out or without."""
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "Who?", "answer": "x"}\n{oops\n{"question": "", "answer": "x"}\n'
                    '{"question": "Where?"}\n{"question": "What?", "answer": ["y"]}\n'
                    '{"question": "N", "answer": NaN}\n')
    flags = ["--model", noise_model, "--world", world, "--method", "direct",
             "--max-new-tokens", 4, "--eval", file]
    for more in ([], ["--out", tmp_path / "r.jsonl"], ["--out", tmp_path / "r.jsonl"]):
        code, lines, err = cli(capsys, *flags, *more)
        result = json.loads(lines[-1])
        assert code == 0 and (result["n"], result["left_out"]) == (2, 4)
        numbers = [re.search(r"questions\.jsonl:(\d): ", line).group(1) for line in err]
        assert numbers == ["2", "3", "4", "6"] and "gold answer nan" in err[-1]


def test_what_one_method_cannot_answer_does_not_end_the_run(noise_model, world, tmp_path, capsys):
    Image.new("RGB", (900, 3)).save(tmp_path / "thin.png")          # no model takes such a shape
    hop = {"query": "What is the capital of Kasten?", "retriever": "text retriever",
           "answer": "Ortal"}
    rows = [{"question": f"Who {i}?", "answer": "x", "hops": [hop]} for i in range(7)]
    rows[2]["image"] = "thin.png"
    del rows[5]["hops"]
    file, out = questions_at(tmp_path / "mixed.jsonl", *rows), tmp_path / "r.jsonl"
    flags = ["--model", noise_model, "--world", world, "--eval", file, "--max-new-tokens", 4,
             "--show", 3, "--out", out]
    code, lines, err = cli(capsys, *flags, "--method", "oracle", "direct")
    oracle, direct = map(json.loads, lines[-2:])
    assert code == 0 and (oracle["n"], oracle["left_out"]) == (5, 2)
    assert (direct["n"], direct["left_out"]) == (6, 1)
    assert len(err) == 2 and "mixed.jsonl:3: a picture of 900 x 3" in err[0]
    assert "mixed:6: no gold hops" in err[1]
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()].count(7) == 2
    questions_at(file, rows[5])
    code, lines, err = cli(capsys, *flags, "--method", "direct", "oracle")
    assert code == 2 and not lines and len(err) == 1 and "method oracle: no question" in err[0]


def test_the_six_published_sets_in_one_run(golden, noise_model, tmp_path, capsys):
    files = sorted(golden.glob("questions_*.jsonl"))
    for file in files:
        lines = file.open(encoding="utf-8").readlines()
        for row in map(json.loads, lines[1:4]):                 # the first row's picture is missing
            if "image_id" in row:
                Image.new("RGB", (8, 8)).save(tmp_path / f"{row['image_id']}.jpg")
    KnowledgeBase.build([{"id": "0", "text": "x"}], "lexical").save(tmp_path / "kb")
    flags = ["--model", noise_model, "--kb", f"text={tmp_path / 'kb'}", "--method", "direct",
             "--max-new-tokens", 2]
    code, lines, err = cli(capsys, *flags, "--eval", *files, "--images", tmp_path, "--limit", 4)
    result = json.loads(lines[-1])
    assert code == 0 and set(result["by_set"]) == {file.stem for file in files}
    assert len(files) == 6 and len(err) == result["left_out"] == 24 - result["n"] >= 3
    assert ".jsonl:1: " in err[0]
    code, _, err = cli(capsys, *flags, "--eval", files[0], tmp_path / files[0].name)
    assert code == 2 and len(err) == 1
    shutil.copy(files[0], tmp_path)
    code, _, err = cli(capsys, *flags, "--images", tmp_path, "--eval", files[0],
                       tmp_path / files[0].name)
    assert code == 2 and "have one name" in err[0]


# ----------------------------------------------------------------------------------- one question

def test_one_question_is_answered_and_shown(noise_model, world, capsys):
    flags = ["--model", noise_model, "--world", world, "--max-new-tokens", 5,
             "--question", "Which country has this flag?"]
    photo = next((world / "photos").glob("*.jpg"))
    code, lines, err = cli(capsys, *flags, "--image", photo)
    assert code == 0 and not err
    assert f"  picture   {photo}" in lines and any(line[:8] == "  answer" for line in lines)
    code, lines, _ = cli(capsys, *flags, "--image", photo, "--json", "--method", "direct", "text")
    rows = [json.loads(line) for line in lines]
    assert code == 0 and [row["method"] for row in rows] == ["direct", "text"]
    assert rows[0]["image"] == str(photo) and "llm_answer" in rows[0]


def test_with_nothing_named_a_question_of_the_world_is_shown(noise_model, world, capsys,
                                                             monkeypatch):
    """One with a picture and two hops, chosen by the seed."""
    monkeypatch.setattr("infer.embedded_world", lambda *words: world)
    rows, _ = load_questions(world / "questions.jsonl")
    rows = [row for row in rows if row["image"] and len(row["hops"]) == 2]
    for seed in (0, 1, len(rows)):
        flags = ["--model", noise_model, "--max-new-tokens", 2, "--json", "--seed", seed]
        code, lines, _ = cli(capsys, *flags)
        assert code == 0 and len(lines) == 1
        assert json.loads(lines[0])["question"] == rows[seed % len(rows)]["question"]


@pytest.fixture
def given_to(noise_model, monkeypatch):
    """The model calls of the commands of a test: (prompts as text, options)."""
    processor, generate, calls = Processor.from_pretrained(noise_model), VLM.generate, []

    def noted(self, input_ids, attention_mask, **options):
        prompts = [processor.decode(ids[mask].tolist())
                   for ids, mask in zip(input_ids, attention_mask.bool())]
        calls.append((prompts, options))
        return generate(self, input_ids=input_ids, attention_mask=attention_mask, **options)
    monkeypatch.setattr(VLM, "generate", noted)
    return calls


def test_prompts_and_demonstrations_reach_the_model(noise_model, world, tmp_path, capsys, given_to):
    flags = ["--model", noise_model, "--world", world, "--question", "Who?", "--max-new-tokens", 2]
    problem = final_problem("Who?", [], False)

    def first_prompt(*more):
        given_to.clear()
        assert cli(capsys, *flags, *more)[0] == 0
        return given_to[0][0][0]
    (tmp_path / "own.json").write_text('{"final": "reply in verse"}')
    own = first_prompt("--method", "direct", "--prompts", tmp_path / "own.json")
    assert own.index("reply in verse") < own.index(problem)
    # by default those of the model's prompts.json
    assert first_prompt("--method", "direct") == own.replace("reply in verse", "answer")
    lines = (world / "steps.jsonl").open(encoding="utf-8").readlines()
    for n in (1, 2):
        shown = first_prompt("--method", "fewshot", "--demos", world / "steps.jsonl", "--shots", n)
        steps = [step for line in lines[:n] for step in json.loads(line)["steps"]]
        routes = [step["problem"] for step in steps if step["step_type"] == "ret"]
        assert shown.count("Example:") == len(routes)
        assert routes[-1].removesuffix("<image>") in shown


def test_flags_of_sampling_reach_the_model(noise_model, world, capsys, given_to):
    flags = ["--model", noise_model, "--world", world, "--method", "direct", "--limit", 4,
             "--max-new-tokens", 3]
    assert cli(capsys, *flags, "--batch-size", 2, "--temperature", 0.5, "--seed", 9)[0] == 0
    assert [len(prompts) for prompts, _ in given_to] == [2, 2]
    assert {options["temperature"] for _, options in given_to} == {0.5}
    wanted = torch.rand(2, 3, generator=torch.Generator().manual_seed(9))   # torch's own numbers
    drawn = given_to[0][1]["noise"]
    assert sorted(drawn.flatten().tolist()) == sorted(wanted.flatten().tolist())
    code, _, err = cli(capsys, *flags, "--seed", 10 ** 30)
    assert code == 2 and len(err) == 1 and "seed is 1" in err[0]


# --------------------------------------------------------------------------------- steps written

def test_steps_of_the_command_line(noise_model, world, tmp_path, capsys, monkeypatch):
    rows, _ = load_questions(world / "questions.jsonl")
    gold, dumped = gold_replies(rows), rows[7]

    def reply(prompt, g):       # one answer of the 39 is a dump: all of the gold answer, and more
        text = gold(prompt, g)
        its_own = prompt.count(dumped["question"]) and (dumped["image"] or "") in prompt
        if prompt.startswith("F\n") and its_own:
            return text.replace("</answer>", " or else</answer>")
        return text
    processor = Words()
    monkeypatch.setattr(VLM, "from_pretrained", lambda *args, **options: Scripted(processor, reply))
    monkeypatch.setattr(Processor, "from_pretrained", lambda *args: processor)
    (tmp_path / "p.json").write_text('{"route": "R", "answer": "A", "final": "F"}')
    flags = ["--model", noise_model, "--world", world, "--prompts", tmp_path / "p.json", "--json"]

    def written(folder, *more):
        file = tmp_path / folder / "s.jsonl"
        code, _, err = cli(capsys, *flags, "--write-steps", file, *more)
        lines = file.read_text().splitlines()
        assert code == 0 and err == [f"{file}: steps of {len(lines)} of 39 trajectories"]
        return lines
    everything, correct = written("all", "--keep", "all"), written("correct")
    left = [line for line in everything if line not in correct]
    assert len(everything) == 39 and len(left) == 1 and "or else" in left[0]
    # an --out that was begun before: the steps of its rows are written too
    assert cli(capsys, *flags, "--out", tmp_path / "r.jsonl", "--limit", 9)[0] == 0
    assert written("continued", "--out", tmp_path / "r.jsonl") == correct


# --------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, message", [
    (["--question", "  "], "--question is empty"),
    (["--question", "Who?", "--image", "{tmp}/text.png"], "text.png: not a "),
    (["--question", "Who?", "--image", "{tmp}/none.png"], "none.png"),
    (["--eval", "{tmp}/missing.jsonl"], "missing.jsonl: cannot be read"),
    (["--eval", "{tmp}/bad.jsonl"], "bad.jsonl:1: not JSON"),
    (["--method", "guess"], "unknown method 'guess': give one of router"),
    (["--world", "{tmp}"], "questions.jsonl: cannot be read"),
    (["--world", "{tmp}/nowhere"], "nowhere: no such folder: a world has text.jsonl"),
    (["Which country?"], "'Which country?' stands alone: a question goes behind --question"),
    (["--eval", "{world}/text.jsonl"], "text.jsonl:1: a passage and no question"),
    (["--eval", "{world}/steps.jsonl"], "steps.jsonl:1: steps and no question"),
    (["--kb", "text={tmp}/nowhere", "--question", "Who?", "--method", "text"], "nowhere"),
    (["--kb", "audio={tmp}", "--question", "Who?"],
     "expected NAME=DIR with a name of text, image, table"),
    (["--kb", "text={world}/kb/text", "--question", "Who?"],
     "method router needs the knowledge base 'image'"),
    (["--kb", "text={world}/kb/text"], "give --question or --eval"),
    (["--kb", "text={world}/kb/text", "--method", "text"], "give --eval FILE beside --kb"),
    (["--score", "{tmp}/missing.jsonl"], "missing.jsonl: cannot be read"),
    (["--score", "{world}/questions.jsonl", "{tmp}/bad.jsonl"], "no llm_answer"),
    (["--prompts", "{tmp}/bad.jsonl", "--question", "Who?"], "bad.jsonl:1: not JSON"),
    (["--prompts", "{tmp}/other.json", "--question", "Who?"], "expected system prompts"),
    (["--model", "{tmp}", "--question", "Who?"],
     "no model here: it lacks config.json, tokenizer.json, model.safetensors"),
    (["--prompts", "{world}/questions.jsonl", "--question", "Who?"],
     "questions.jsonl:1: expected {{\"images\""),
    (["--demos", "{world}/questions.jsonl", "--method", "fewshot"],
     "questions.jsonl:1: expected {{\"images\""),
    (["--method", "static", "--write-steps", "{tmp}/s.jsonl"],
     "only router and fewshot make steps"),
    (["--method", "router", "--write-steps", "{tmp}/s.jsonl", "--limit", "2", "--json",
      "--max-new-tokens", "2"], "s.jsonl was not written"),
    (["--score", "{tmp}/bad.jsonl", "--write-steps", "{tmp}/s.jsonl"], "leave out --score"),
    (["--question", "Who?", "-k", "0"], "k is 0: give at least 1"),
    (["--question", "Who?", "--device", "warp"], "device 'warp' cannot be used here"),
    (["--speed", "9"], "unrecognized arguments: --speed"),
])
def test_mistakes_get_one_line_and_exit_code_2(noise_model, world, tmp_path, capsys, flags,
                                               message):
    world_bases(world)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    (tmp_path / "other.json").write_text('{"greeting": "hello"}')
    words = [word.format(tmp=tmp_path, world=world) for word in flags]
    words += [] if "--model" in words else ["--model", noise_model]
    words += [] if {"--kb", "--world"} & set(words) else ["--world", world]
    code, out, err = cli(capsys, *words)
    assert code == 2 and len(err) == 1 and err[0].startswith("infer.py: "), err
    assert message.format() in err[0]
    assert len(out) == ("not written" in message)           # results there were, only no steps


@pytest.mark.parametrize("flags, message", [
    (["--score", "a", "--method", "direct"], "--method does nothing beside --score"),
    (["--score", "a", "--out", "b"], "--out does nothing beside --score"),
    (["--score", "a", "--show", "1"], "--show does nothing beside --score"),
    (["--score", "a", "--image", "b"], "--image is the picture of --question or --chat"),
    (["--score", "a", "-k", "3"], "-k does nothing beside --score: leave it or leave out --score"),
    (["--score", "a", "--question", "?"], "--question does nothing beside --score"),
    (["--question", "Who?", "--out", "b"], "--out does nothing beside --question"),
    (["--question", "Who?", "--write-steps", "b"], "--write-steps does nothing beside --question"),
    (["--question", "Who?", "--limit", "3"], "--limit does nothing beside --question"),
    (["--question", "Who?", "--eval", "b"], "--eval does nothing beside --question"),
    (["--question", "Who?", "--chat"], "--chat does nothing beside --question"),
    (["--chat", "--out", "b"], "--out does nothing beside --chat"),
    (["--chat", "--method", "oracle"], "oracle, which needs gold hops"),
    (["--chat", "--method", "direct", "cot"], "give one method"),
    (["--recipe", "paper"], "invalid choice: 'paper'"),
    (["--score", "a", "--recipe", "released"], "--recipe does nothing beside --score"),
    (["--recipe", "released", "-k", "2"],
     "-k is 2, but --recipe released has 5 (src/answer_generation.py): leave out one of them"),
    (["--recipe", "released", "--max-steps", "4"], "--max-steps is 4, but --recipe released has 3"),
    (["--recipe", "released", "--no-several"], "--several is False, but --recipe released has"),
    (["--recipe", "released", "--no-lower-case", "--chat"], "--lower-case is False, but"),
    (["--recipe", "released", "--top-k", "0", "--question", "Who?"], "--top-k is 0, but"),
    (["--top-k", "-1"], "--top-k is -1: give at least 0"),
    (["--image", "a.png"], "--image is the picture of --question"),
    (["--image", "a.png", "--eval", "a"], "--image is the picture of --question"),
    (["--threads", "-1"], "--threads is -1"), (["--threads", "1025"], "--threads is 1025"),
    (["--show", "-1"], "--show is -1"), (["--shots", "0"], "--shots is 0"),
    (["--limit", "0"], "--limit is 0"),
    (["--out", "a", "--write-steps", "./a"], "given twice (--out, --write-steps)"),
    (["--eval", "a", "--out", "a"], "given twice (--out, --eval)"),
    (["--eval", "a", "./a"], "given twice (--eval, --eval)"),
    (["--score", "a", "a"], "given twice (--score, --score)"),
    (["--demos", "a", "--write-steps", "a"], "given twice (--write-steps, --demos)"),
    (["--prompts", "a", "--out", "a"], "given twice (--out, --prompts)"),
    (["--world", "w", "--out", "w/steps.jsonl"], "w/steps.jsonl is a file of the world"),
])
def test_flags_that_do_not_go_together(flags, message, capsys):
    code, out, err = cli(capsys, *flags)
    assert code == 2 and not out and len(err) == 1 and message in err[0], err


def test_an_evaluation_with_prompts_and_demonstrations_of_one_file(noise_model, world, capsys):
    """What is only read may be named twice."""
    flags = ["--model", noise_model, "--world", world, "--prompts", world / "steps.jsonl",
             "--demos", world / "steps.jsonl", "--limit", 1, "--max-new-tokens", 2, "--threads", 1]
    assert cli(capsys, *flags)[0] == 0


def test_worlds_are_written_by_name(tmp_path):
    """lab.world by hand, infer.py with it, as a user would."""
    made("lab.world", "--questions", 13, "--countries", 12, "--out", tmp_path / "w")
    done = made("infer.py", "--world", tmp_path / "w", "--limit", 2, "--threads", 1, "--json")
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 2
