"""Step files: the published one is read whole, what does not fit is named, and what is written is
what was asked.

Oracles: golden/stepgrpo_steps.jsonl, counts made by reading it, and a scripted model whose right
outputs are known.
"""
import json
import os
from pathlib import Path

import pytest

from infer import Router
from parts.chat import Processor
from parts.questions import load_questions
from parts.stepfiles import (FEWSHOT, StepExample, clean_rows, demonstrations, load_prompts,
                             load_steps, offline_rows, read_sources, read_steps, step_output,
                             steps_to_train_on, system_prompts, with_demonstrations, write_steps)
from parts.steps import PROMPTS, AnswerStep, RouteStep, parse_step
from parts.trajectory import result_row
from retrieve import world_bases
from scripted import QUESTION, capital_then_mayor, gold_replies, scripted
from test_steps import rebuilt


def rows_of(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def written(path, *rows, start=""):
    """A JSONL file of these rows; a text stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text(start + "".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def step(kind="ans", answer="a", **more):
    return {"step_type": kind, "problem": "p", "system": "s", "answer": answer, **more}


def row(*steps, images=()):
    return {"images": list(images), "steps": list(steps or [step()])}


# ---------------------------------------------------------------------------------------- reading


def test_published_step_file_is_read_whole(golden):
    trajectories, faults = read_steps(golden / "stepgrpo_steps.jsonl")
    raw = rows_of(golden / "stepgrpo_steps.jsonl")
    assert len(trajectories) == len(raw) == 40 and not faults
    for steps, published in zip(trajectories, raw):
        for ours, theirs in zip(steps, published["steps"], strict=True):
            assert ours.as_published() == {**theirs, "thought": ""}
            assert ours.golds() == [ours.as_published()]
        assert steps[-1].role == "final"
        for one in steps[:-1]:
            assert one.role == {"ret": "route", "ans": "answer"}[one.kind]


def test_right_outputs_of_the_published_file_are_steps(golden):
    trajectories, _ = read_steps(golden / "stepgrpo_steps.jsonl")
    for steps in trajectories:
        for example in steps:
            parsed, answer = parse_step(step_output(example)), example.answer
            if example.kind == "ret":
                assert isinstance(parsed, RouteStep)
                assert parsed.route.lower() == answer["retriever"][0].strip() == example.label()
            elif str(answer).strip():
                answer = answer[0] if isinstance(answer, list) else answer
                assert parsed == AnswerStep("", answer.strip()) and example.label() == "answer"


@pytest.mark.parametrize("gold", [{"query": "none", "retriever": ["text retriever"]},
                                  {"query": "Which?", "retriever": ["None"]}])
def test_a_step_that_is_none_in_one_place_is_none_in_both(gold):
    example = StepExample("ret", "s", "p", gold, "enough")
    assert parse_step(step_output(example)) == RouteStep("enough", "None", "None")
    assert example.label() == "none"


def test_a_picture_is_shown_where_the_problem_ends_with_its_marker():
    for problem, image, shown in (("p<image>", "a.jpg", "a.jpg"), ("p", "a.jpg", None),
                                  ("p<image>", None, None)):
        chat = StepExample("ans", "s", problem, "a", "", image).conversation()
        content = chat[1]["content"]
        assert (None if isinstance(content, str) else content[1]["image"]) == shown


def test_a_byte_order_mark_and_signs_that_end_no_line_are_read(tmp_path):
    text = "a\u2028b\x85c"
    path = tmp_path / "s.jsonl"
    line = json.dumps(row(step(problem=text)), ensure_ascii=False)
    path.write_text(f"\ufeff{line}\n\n{line}\n", encoding="utf-8")
    trajectories, faults = read_steps(path)
    assert [[one.problem for one in steps] for steps in trajectories] == [[text]] * 2
    assert not faults


GOLD = {"query": "q", "retriever": ["text retriever"]}
BAD_ROWS = [
    ('{"steps": [', "s.jsonl:2: not JSON"),
    ([1], "s.jsonl:2: expected an object"),
    (row(step("ret", "text")), "step_type 'ret' with answer 'text'"),
    (row(step("ret", {"query": "q"})), "step_type 'ret'"),
    (row(step("ret", {"query": 5, "retriever": ["none"]})), "step_type 'ret'"),
    (row(step("ret", {"query": "q", "retriever": 3})), "step_type 'ret'"),
    (row(step("ret", {"query": "q", "retriever": []})), "step_type 'ret'"),
    (row(step("ret", {"query": "q", "retriever": [3]})), "step_type 'ret'"),
    (row(step("ret", {"query": "q", "retriever": ["google"]})), "step_type 'ret'"),
    (row(step("nap")), "step_type 'nap': expected ret or ans"),
    (row(step(answer=GOLD)), "step_type 'ans' with answer"),
    (row(step(answer="")), "step_type 'ans' with answer ''"),
    (row(step(answer=[])), "step_type 'ans'"), (row(step(answer=[3])), "step_type 'ans'"),
    (row(step(answer=5)), "step_type 'ans'"), (row(step(answer=None)), "step_type 'ans'"),
    (row(step(problem=3)), "problem is '3': expected a text"),
    (row(step(system=None)), "system is 'None': expected a text"),
    (row(step(thought=["t"])), "thought is"),
    (row(step(problem="\ud800")), "'utf-8' codec"),
    (row("p"), "step 'p': expected an object"),
    ({"images": [], "steps": []}, 'expected {"images"'), ({"images": []}, 'expected {"images"'),
    ({"images": [], "steps": "ab"}, 'expected {"images"'),
    ({"images": "x.png", "steps": [step()]}, "images is 'x.png': expected a list of paths"),
    (row(images=[5]), "images is '[5]'"),
    (row(images=["a.jpg", "b.jpg"]), "2 pictures: a row shows one"),
]


@pytest.mark.parametrize("bad, message", BAD_ROWS)
def test_a_row_that_does_not_fit_is_a_fault_with_file_and_line(tmp_path, capsys, bad, message):
    path = written(tmp_path / "s.jsonl", row(), bad, row())
    trajectories, [fault] = read_steps(path)
    assert len(trajectories) == 2
    assert fault.startswith(f"{path}:2: ") and message in fault and "\n" not in fault
    # training refuses the file, examples to show go without the row and say so
    with pytest.raises(ValueError) as refusal:
        steps_to_train_on(path)
    assert str(refusal.value) == fault
    assert load_steps(path) == trajectories
    assert capsys.readouterr().err == f"left out 1 rows that do not fit: {fault}\n"


def test_a_file_without_a_row_that_fits_is_refused(tmp_path):
    for path, message in ((written(tmp_path / "a.jsonl"), "a.jsonl: no rows"),
                          (written(tmp_path / "b.jsonl", "[1]"), "b.jsonl:1"),
                          (tmp_path / "c.jsonl", "c.jsonl: cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_steps(path)


def test_pictures_lie_in_the_folder_of_the_file(tmp_path):
    """One from elsewhere that is there is refused, one that is nowhere passes: published files name
    the paths of their authors."""
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "own.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["own.png", "gone.png", "/gone/a.jpg"]
    path = written(folder / "s.jsonl", *(row(images=[name]) for name in names))
    trajectories, faults = read_steps(path)
    shown = [steps[0].image for steps in trajectories]
    assert shown == [str(folder / name) for name in names] and not faults
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        _, [fault] = read_steps(written(path, row(), row(images=[name])))
        assert "leads out of the file's folder" in fault


# ------------------------------------------------------------------------- prompts, demonstrations


def test_prompts_come_from_a_published_step_file(golden):
    prompts = load_prompts(golden / "stepgrpo_steps.jsonl")
    steps = rows_of(golden / "stepgrpo_steps.jsonl")[0]["steps"]
    assert prompts == {"route": steps[0]["system"], "answer": steps[1]["system"],
                       "final": steps[-1]["system"]}
    assert len(set(prompts.values())) == 3


def test_the_most_frequent_prompt_counts_and_of_equals_the_first(tmp_path):
    rows = [row(step("ret", GOLD, system="r1"), step(system="a1"), step("ret", GOLD, system="r2")),
            row(step("ret", GOLD, system="r2"), step(system="a2"))]
    trajectories, _ = read_steps(written(tmp_path / "s.jsonl", *rows))
    assert system_prompts(trajectories) == {"route": "r2", "answer": "a1"}      # no final step
    assert load_prompts(tmp_path / "s.jsonl") == {"route": "r2", "answer": "a1"}
    last = row(step(answer=["a"], system="f"))
    assert load_prompts(written(tmp_path / "t.jsonl", last)) == {"final": "f"}


@pytest.mark.parametrize("text, message", [
    ('{"route": "r", "rout": "x"}', "'rout': expected system prompts as strings under the names"),
    ('{"route": 5}', "'route': expected system prompts as strings"),
    ('["r"]', "expected a JSON object"), ("{", "not valid JSON"),
    ('{"route": "\\ud800"}', "'route' is no text")])
def test_a_prompts_json_that_does_not_fit_is_named(tmp_path, text, message):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"prompts.json: .*{message}"):
        load_prompts(path)
    path.write_text('{"route": "r", "cot": "c"}')
    assert load_prompts(path) == {"route": "r", "cot": "c"}


def test_our_demonstrations_are_a_step_file_with_our_prompts():
    """Problems that follow from each other, outputs that are steps, PROMPTS as they are now."""
    trajectories = demonstrations()
    assert len(trajectories) == 3 and system_prompts(trajectories) == {
        role: PROMPTS[role] for role in ("route", "answer", "final")}
    assert FEWSHOT.read_text().count("\n") == 3
    bases = []
    for steps in trajectories:
        problems = [one.problem for one in steps]
        published = [one.as_published() for one in steps]
        assert rebuilt(published, problems[0].endswith("<image>")) == problems
        bases.append([one.label() for one in steps if one.kind == "ret"])
        for one in steps:
            assert isinstance(parse_step(step_output(one)),
                              RouteStep if one.kind == "ret" else AnswerStep) and one.thought
    assert bases == [["text image retriever", "text retriever", "none"],
                     ["text retriever", "table retriever", "none"], ["none"]]


def test_demonstrations_stand_behind_the_prompts_of_their_role():
    ask = StepExample("ret", "s", "where<image>", GOLD, "t", "a.jpg")
    read = StepExample("ans", "s", "what", " a ")
    end = StepExample("ans", "s", "all", ["b", "c"], "u")
    prompts = {"route": "R", "answer": "A", "final": "F", "cot": "C"}
    route = ("\n\nExample:\nwhere<image>\nReply:\n<think> t</think><sub-question> q</sub-question>"
             "<ret> Text Retriever</ret>")
    assert with_demonstrations(prompts, [[ask, read, end], [ask]]) == {
        "fewshot route": "R" + route * 2,
        "fewshot answer": "A\n\nExample:\nwhat\nReply:\n<think> </think><answer> a</answer>",
        "fewshot final": "F\n\nExample:\nall\nReply:\n<think> u</think><answer> b</answer>"}


# ------------------------------------------------------------------------------------ for training


def test_published_rows_are_counted_and_left_out_by_option(golden):
    """Counted over the raw file: a sub-question (other than none) that comes twice; pictures are
    not there at all."""
    raw = rows_of(golden / "stepgrpo_steps.jsonl")
    repeats = 0
    for published in raw:
        queries = [one["answer"]["query"].strip().lower() for one in published["steps"]
                   if one["step_type"] == "ret"]
        queries = [query for query in queries if query != "none"]
        repeats += len(queries) > len(set(queries))
    trajectories = steps_to_train_on(golden / "stepgrpo_steps.jsonl")
    clean, counts = clean_rows(trajectories, ())
    pictures = sum(bool(published["images"]) for published in raw)
    # intermediate golds that say that nothing is said, found by reading all 94 of the file: those
    # of rows 3, 6, 11, 13, 14, 24, 33
    assert counts == {"no_picture": pictures, "repeats": repeats, "no_information": 7}
    assert repeats > 0 and len(clean) == len(raw) - pictures
    fewer, again = clean_rows(trajectories, ("repeats", "no_information"))
    assert 0 < len(fewer) < len(clean) and again == counts


def test_what_is_odd_by_hand(tmp_path):
    none = {"query": "None", "retriever": ["none"]}
    fine = row(step("ret", GOLD), step(), step("ret", none), step("ret", none), step(answer=["a"]))
    twice = row(step("ret", GOLD), step("ret", {**GOLD, "query": " Q"}))
    silent = row(step(answer="The passages do not mention it."))
    final = row(step(answer=["They do not mention it."]))
    lost = row(images=["gone.jpg"])
    trajectories, _ = read_steps(written(tmp_path / "s.jsonl", fine, twice, silent, final, lost))
    clean, counts = clean_rows(trajectories, ())
    assert counts == {"no_picture": 1, "repeats": 1, "no_information": 1}
    assert clean == trajectories[:4]
    assert clean_rows(trajectories, ("repeats",))[0] == [trajectories[i] for i in (0, 2, 3)]
    assert clean_rows(trajectories, ("no_information",))[0] == [trajectories[i] for i in (0, 1, 3)]
    with pytest.raises(ValueError, match="every picture is missing .*step file\\)$"):
        clean_rows(trajectories[4:], ())
    with pytest.raises(ValueError, match="or --drop leaves all out"):
        clean_rows(trajectories[1:2], ("repeats",))


def test_rows_whose_picture_is_missing_are_counted_and_left_out(tmp_path, capsys):
    path = written(tmp_path / "s.jsonl", row(), row(step(), step()), row(images=["gone.jpg"]))
    [(name, trajectories, share)] = read_sources([f"{path}=2.5"])
    assert (name, share) == (str(path), 2.5) and [len(steps) for steps in trajectories] == [1, 2]
    assert "left out 1 rows whose picture is missing" in capsys.readouterr().err
    assert offline_rows([path, path], ()) == trajectories * 2
    said = capsys.readouterr().err
    assert said == "6 rows: 2 no_picture, 0 repeats, 0 no_information; 4 are trained on\n"
    written(path, row(images=["gone.jpg"]))
    with pytest.raises(ValueError, match=f"--data {path}: no row is left to train on"):
        read_sources([str(path)])


def test_sources_and_their_shares(tmp_path):
    path = str(written(tmp_path / "a=b.jsonl", row()))
    assert [share for _, _, share in read_sources([path + "=3", path + "=1"])] == [3.0, 1.0]
    plain = str(written(tmp_path / "s.jsonl", row()))
    assert [share for _, _, share in read_sources([plain])] == [1.0]
    for share in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(ValueError, match=f"--data {plain}={share}: "):
            read_sources([f"{plain}={share}"])
    written(tmp_path / "s.jsonl", row(), [1])
    with pytest.raises(ValueError, match=f"--data {plain}: {plain}:2: expected an object"):
        read_sources([plain])
    for nothing in (lambda: read_sources([]), lambda: offline_rows((), ())):
        with pytest.raises(ValueError, match="--data: name at least one step file"):
            nothing()


# ---------------------------------------------------------------------------------------- writing


def test_steps_that_are_written_are_those_that_were_asked(world, tmp_path):
    """Through the file and back by the reader of training: problems, system prompts, pictures and
    outputs."""
    rows, _ = load_questions(world / "questions.jsonl")
    _, router = scripted(world_bases(world), gold_replies(rows))
    done = router.run(rows)
    results = [result_row(trajectory) for trajectory in done]
    results[3]["llm_answer"]["answer"] = "wrong"
    results[5]["cost"]["malformed"] = 1
    results[6]["cost"]["too_long"] = 1
    file = tmp_path / "deep" / "steps.jsonl"
    for keep, left_out in (("all", {5, 6}), ("correct", {3, 5, 6})):
        count = write_steps(file, results, router.prompts, keep)
        assert count == len(rows) - len(left_out)
        trajectories = [one for i, one in enumerate(done) if i not in left_out]
        for steps, trajectory in zip(steps_to_train_on(file), trajectories, strict=True):
            assert [one.role for one in steps] == [one.kind for one in trajectory.steps]
            for example, asked in zip(steps, trajectory.steps, strict=True):
                chat = example.conversation()
                if trajectory.row["image"]:
                    ours, theirs = chat[1]["content"][1], asked.conversation[1]["content"][1]
                    path = Path(ours["image"])
                    assert path.is_relative_to(file.parent)
                    assert path.samefile(theirs["image"])           # a hard link
                    ours["image"] = theirs["image"]
                assert chat == asked.conversation
                if asked is not trajectory.steps[-1] or trajectory is not done[3]:
                    assert parse_step(step_output(example)) == asked.parsed
    before = file.read_bytes()
    with pytest.raises(ValueError, match="none of 1 trajectories is well formed and correct: "):
        write_steps(file, results[3:4], router.prompts, "correct")
    with pytest.raises(ValueError, match="none of 1 trajectories is well formed$"):
        write_steps(file, results[5:6], router.prompts, "all")
    assert file.read_bytes() == before
    assert set(os.listdir(file.parent)) == {"steps.jsonl", "steps-pictures"}


def test_steps_that_asked_several_bases_are_written(bases, tmp_path):
    """The file lists their retrievers, and its problems quote the evidence of each."""
    def reply(prompt, g):
        both = "<ret> Table Retriever, Text Retriever"
        return capital_then_mayor(prompt, g).replace("<ret> Text Retriever", both)

    _, router = scripted(bases, reply, several=True)
    [trajectory] = router.run([QUESTION])
    write_steps(tmp_path / "s.jsonl", [result_row(trajectory)], router.prompts, "all")
    [published] = rows_of(tmp_path / "s.jsonl")
    first = {"query": "What is the capital of Kasten?",
             "retriever": ["table retriever", "text retriever"]}
    assert published["steps"][0]["answer"] == first
    assert published["steps"][-2]["answer"] == {"query": "none", "retriever": ["none"]}
    asked = [one.conversation[1]["content"] for one in trajectory.steps]
    [steps] = steps_to_train_on(tmp_path / "s.jsonl")
    assert [one.problem for one in steps] == asked


def test_pictures_beside_the_step_file_are_named_from_there(world, tmp_path):
    rows, _ = load_questions(world / "questions.jsonl")
    rows = [one for one in rows if one["image"]][:1]
    _, router = scripted(world_bases(world), gold_replies(rows))
    [trajectory] = router.run(rows)
    image = Path(rows[0]["image"])
    file = image.parent / "written.jsonl"
    write_steps(file, [result_row(trajectory)], router.prompts, "all")
    [published] = rows_of(file)
    file.unlink()
    assert published["images"] == [image.name]


def test_steps_of_the_shipped_model_have_the_same_prompt_ids(world, tiny, tiny_vlm, tmp_path):
    rows, _ = load_questions(world / "questions.jsonl", limit=8)
    processor, prompts = Processor.from_pretrained(tiny), load_prompts(tiny / "prompts.json")
    router = Router(tiny_vlm, processor, world_bases(world), prompts=prompts)
    done = [trajectory for trajectory in router.run(rows) if not trajectory.malformed]
    write_steps(tmp_path / "s.jsonl", [result_row(t) for t in done], router.prompts, "all")
    asked, read = [], []
    for trajectory in done:
        asked += [list(one.prompt_ids) for one in trajectory.steps]
    for steps in steps_to_train_on(tmp_path / "s.jsonl"):
        read += [processor.prompt(example.conversation())[0] for example in steps]
    assert read == asked and len(asked) > 20
