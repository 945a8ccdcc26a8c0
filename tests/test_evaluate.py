"""Measures by hand, intervals against the binomial distribution, tables, result files that grow."""
import json
import os
import random
import re
import zlib

import pytest

from conftest import ROOT, run
from infer import Flags
from parts.evaluate import (COLUMNS, GROUPINGS, MEASURES, answer_many, appending, compare,
                            different_kinds, earlier_rows, evaluate, means, overview,
                            print_comparison, print_results, print_table, score_row, score_table,
                            settings_mark)
from parts.questions import load_questions
from parts.steps import render_answer
from parts.trajectory import COSTS
from plumbing.files import checksum
from scripted import cli, questions_at, scripted

TEXT, IMAGE, NONE = "Text Retriever", "Text Image Retriever", "None"


def answered(answer, chosen=(), gold=(), method="router", **more):
    """A result row whose gold answer is "Ortal city"."""
    cost = {"retrievals": len(chosen) - 1, "model_calls": 2, "prompt_tokens": 30,
            "generated_tokens": 10, "malformed": 1, "too_long": 0, "seconds_model": 0.5,
            "seconds_search": 0.25}
    row = {"question": "q", "answer": ["Ortal city"], "method": method, "cost": cost,
           "hops": [{"query": "q", "retriever": name} for name in gold],
           "llm_answer": {"thought": "t", "answer": answer}, **more}
    for i, name in enumerate(chosen, 1):
        row[f"plan_{i}"] = {"query": "q", "retriever": [name]}
    return row


ROWS = [
    answered("Ortal city", [TEXT, NONE], ["text retriever"], kind="a"),             # 2 of 2 places
    answered("Ortal", [IMAGE, TEXT, NONE], ["text image retriever"], kind="a"),     # 1 of 3
    answered("x", [NONE], ["text retriever", "table retriever"], kind="b")]         # 0 of 3


def test_evaluation_by_hand():
    result = evaluate(ROWS)
    assert result["route_accuracy"] == round((1 + 1 / 3 + 0) / 3, 6)
    assert result["f1_recall"] == 0.5 and result["em"] == round(1 / 3, 6)
    assert result["f1"] == round((1 + 2 / 3) / 3, 6)
    assert result["retrievals"] == 1.0 and result["gold_retrievals"] == 1.33333      # six digits
    costs = [result[name] for name in ("n", "malformed", "model_calls", "tokens", "seconds")]
    assert costs == [3, 1.0, 2.0, 40.0, 0.75]
    names = ("tokens_read", "tokens_written", "seconds_model", "seconds_search", "too_long")
    assert [result[name] for name in names] == [30.0, 10.0, 0.5, 0.25, 0.0]
    assert result["by_set"] == {} and result["by_kind"] == {"a": 0.75, "b": 0.0}
    assert result["by_hops"] == {"1": 0.75, "2": 0.0}
    other = evaluate([answered("x", [TEXT], ["text retriever"], method="text")])
    assert other["route_accuracy"] is None and other["gold_retrievals"] == 1
    assert evaluate([{"question": "q", "answer": "x", "llm_answer": "x"}])["retrievals"] is None
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate([])


def test_routes_of_others_count_in_any_case():
    row = {"question": "q", "answer": "x", "llm_answer": "x", "method": "fewshot",
           "hops": [{"query": "q", "retriever": "text retriever", "answer": "x"}],
           "plan_1": {"retriever": ["text retriever"]}, "plan_2": {"retriever": [" none"]}}
    assert score_row(row)["route_accuracy"] == 1.0
    # a malformed step chose nothing; one step too many counts
    row |= {"plan_2": {"fault": "no tags", "retriever": ["None"]}}
    assert score_row(row)["route_accuracy"] == 0.5
    row |= {"plan_2": {"retriever": [TEXT]}, "plan_3": {"retriever": [NONE]}}
    assert score_row(row)["route_accuracy"] == pytest.approx(1 / 3)


def test_a_step_that_names_several_bases_is_routed_wrong():
    row = answered("x", [TEXT, NONE], ["text retriever"])
    for names, accuracy in (([TEXT], 1.0), ([TEXT, "Table Retriever"], 0.5), ([TEXT, TEXT], 0.5),
                            ([TEXT, NONE], 0.5)):
        row["plan_1"]["retriever"] = names
        assert score_row(row)["route_accuracy"] == accuracy
    for nothing in ([], TEXT):
        row["plan_1"]["retriever"] = nothing
        with pytest.raises(ValueError, match="is no list of names"):
            score_row(row)


def test_intervals_are_those_of_the_binomial_distribution():
    """The mean of 100 draws from 50 rights and 50 wrongs is Binomial(100, 1/2) / 100, whose 2.5th
    and 97.5th percentiles are 0.40 and 0.60; of 10 rights in 100: 0.05 and 0.16."""
    routed = {"method": "router", "hops": [], "plan_1": {"retriever": ["None"]}}

    def scores(right):
        found = []
        for i in range(100):
            row = {"question": "q", "answer": "x", "llm_answer": "x" if i < right else "y"}
            found.append(score_row(row | routed if i < 20 else row))
        return found
    for right, low, high in ((50, 0.40, 0.60), (10, 0.05, 0.16)):
        result = means(scores(right))
        assert result["ci"]["em"] == pytest.approx([low, high], abs=0.011)
        assert result["em"] == right / 100 and result["n"] == 100
        assert result == means(scores(right)) == means(scores(right)[::-1])
        # of the rows that know it, all are routed right; nobody knows the costs
        assert result["route_accuracy"] == 1.0 and result["ci"]["route_accuracy"] == [1.0, 1.0]
        assert result["seconds"] is None and result["ci"]["seconds"] is None
    assert means(scores(1)[:1])["ci"]["f1_recall"] == [1.0, 1.0]


# ------------------------------------------------------------------------------- two runs compared

def paired_rows(answers, lines=None):
    """Result rows whose gold answer is "Ortal city", on questions 0, 1, ... or those of `lines`."""
    rows = []
    for answer, line in zip(answers, lines or range(len(answers))):
        rows.append(answered(answer, set="s", line=line, question=f"Who {line}?"))
    return rows


def test_a_comparison_by_hand():
    """F1-Recall of A is 1, 1, 1/2, 0, of B 0, 1, 1, 0: gains of 1, 0, -1/2, 0."""
    a = paired_rows(["Ortal city", "Ortal city", "Ortal", "x"])
    b = paired_rows(["x", "Ortal city", "Ortal city", "x"])
    result = compare(a, b)
    assert list(result) == ["n", "difference", "ci", "p", "a_only", "b_only"]
    assert (result["n"], result["difference"]) == (4, 0.125)
    assert (result["a_only"], result["b_only"]) == (0.25, 0.25)
    low, high = result["ci"]
    assert -0.5 <= low < 0.125 < high <= 1
    other = compare(b, a)                                   # the other way round
    assert (other["difference"], other["p"]) == (-0.125, pytest.approx(result["p"], abs=0.03))
    assert other["ci"] == pytest.approx([-high, -low], abs=0.13)    # by one step of 1/8
    assert compare(a[::-1], b[::-1]) == result == compare(a, b)     # order makes no difference
    # one question: every draw is the same; p is at most 1, and 0 where no draw says otherwise
    assert compare(a[:1], b[:1]) == {"n": 1, "difference": 1.0, "ci": [1.0, 1.0], "p": 0.0,
                                     "a_only": 1.0, "b_only": 0.0}


def test_the_p_value_of_two_questions():
    """Gains 1 and 0: of four equally likely draws one is of mean 0, none is below: p = 2 / 4."""
    result = compare(paired_rows(["Ortal city"] * 2), paired_rows(["Ortal city", "x"]))
    assert result["p"] == pytest.approx(0.5, abs=0.02) and result["ci"] == [0.0, 1.0]


def test_a_run_does_not_differ_from_itself():
    rows = paired_rows(["Ortal city", "Ortal", "x"])
    assert compare(rows, rows) == {"n": 3, "difference": 0.0, "ci": [0.0, 0.0], "p": 1.0,
                                   "a_only": 0.0, "b_only": 0.0}


def random_answers(n, seed):
    rng = random.Random(seed)
    return [rng.choice(["Ortal city", "Ortal", "x"]) for _ in range(n)]


def test_the_interval_is_that_of_a_plain_bootstrap():
    n = 60
    a, b = paired_rows(random_answers(n, 1)), paired_rows(random_answers(n, 2))
    gains = []
    for one, other in zip(a, b):
        gains.append(score_row(one)["f1_recall"] - score_row(other)["f1_recall"])
    rng = random.Random(3)
    draws = []
    for _ in range(4000):
        draws.append(sum(rng.choice(gains) for _ in range(n)) / n)
    draws.sort()
    result = compare(a, b)
    assert result["difference"] == pytest.approx(sum(gains) / n, abs=1e-6)
    assert result["ci"] == pytest.approx([draws[100], draws[3899]], abs=0.02)
    low = sum(draw <= 0 for draw in draws) / 4000
    high = sum(draw >= 0 for draw in draws) / 4000
    assert result["p"] == pytest.approx(2 * min(low, high), abs=0.05)


def test_the_interval_of_many_questions_is_the_normal_one():
    """Mean +- 1.96 standard errors of the paired gains; the two runs agree on most questions, so
    that is much narrower than the interval of unpaired means."""
    n = 2000
    answers = random_answers(n, 4)
    others = random_answers(n // 5, 5) + answers[n // 5:]
    a, b = paired_rows(answers), paired_rows(others)
    gains = [score_row(x)["f1_recall"] - score_row(y)["f1_recall"] for x, y in zip(a, b)]
    mean = sum(gains) / n
    error = (sum((gain - mean) ** 2 for gain in gains) / n / n) ** 0.5
    result = compare(a, b, resamples=4000)
    assert result["ci"] == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], abs=0.002)
    low, high = means([score_row(row) for row in a])["ci"]["f1_recall"]
    assert result["ci"][1] - result["ci"][0] < 0.7 * (high - low)


def test_rows_of_several_seeds_are_drawn_with_their_question():
    """Four seeds that agree tell no more than one; as rows of 4n questions they would seem to."""
    answers, others = random_answers(50, 6), random_answers(50, 7)
    one = compare(paired_rows(answers), paired_rows(others))
    lines = list(range(50)) * 4
    four = compare(paired_rows(answers * 4, lines), paired_rows(others * 4, lines))
    assert four == one
    apart = compare(paired_rows(answers * 4), paired_rows(others * 4))
    assert (apart["n"], apart["difference"]) == (200, pytest.approx(one["difference"], abs=1e-6))
    width, narrow = one["ci"][1] - one["ci"][0], apart["ci"][1] - apart["ci"][0]
    assert narrow == pytest.approx(width / 2, rel=0.1)              # the root of four
    # seeds that differ: a question counts with its mean, here gains of 0 and 1/2
    a = paired_rows(["Ortal city", "x", "Ortal city", "Ortal"], [0, 0, 1, 1])
    b = paired_rows(["x", "Ortal city", "x", "Ortal"], [0, 0, 1, 1])
    result = compare(a, b)
    assert (result["n"], result["difference"], result["ci"]) == (2, 0.25, [0.0, 0.5])
    assert (result["a_only"], result["b_only"]) == (0.5, 0.0)


def test_rows_of_different_questions_are_not_compared():
    rows = paired_rows(["x", "x"])
    for change in ({"line": 7}, {"set": "t"}, {"question": "Where?"}):
        with pytest.raises(ValueError, match="line 1 of set 's': A and B answer different"):
            compare(rows, [rows[0], rows[1] | change])
    with pytest.raises(ValueError, match="^2 and 1 result rows"):
        compare(rows, rows[:1])
    with pytest.raises(ValueError, match="^0 and 0 result rows"):
        compare([], [])


# --------------------------------------------------------------------------------------- tables

def test_columns_are_measures():
    assert [column.measure for column in COLUMNS if column.measure not in MEASURES] == []
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)
    for column in COLUMNS:
        format(1.0, column.format)
        assert column.sentence[0].islower() and not column.sentence.endswith(".")


def test_a_table_by_hand():
    table = score_table([{**row, "set": name} for row, name in zip(ROWS, "xyy")])
    assert [(row["by"], row["group"], row["n"]) for row in table] == [
        ("all", "", 3), ("set", "x", 1), ("set", "y", 2), ("kind", "a", 2), ("kind", "b", 1),
        ("hops", "1", 2), ("hops", "2", 1)]
    assert {row["method"] for row in table} == {"router"}
    result = overview(table)
    assert result["by_set"] == {"x": 1.0, "y": 0.25} and result["method"] == "router"
    assert not {"by", "group"} & set(result)
    assert set(result) == {"method", "n", "ci", *MEASURES, *(f"by_{by}" for by in GROUPINGS)}


def test_what_is_printed(capsys):
    print_results([score_table(ROWS)])
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == [
        "method", "n", "F1-Recall", "95 %", "exact", "F1", "routing", "retrievals", "gold",
        "malformed", "calls", "read", "written", "model s", "search s"]
    assert lines[1].split() == ["router", "3", "0.500", "0.000-1.000", "0.333", "0.556", "0.444",
                                "1.00", "1.33", "1.000", "2.00", "30", "10", "0.500", "0.2500"]
    assert [line.split()[:2] for line in lines[2:6]] == [[], ["by", "kind"], ["a", "2"], ["b", "1"]]
    assert lines[8].startswith("1 ") and not any("by set" in line for line in lines)
    # of several methods F1-Recall side by side; "-" where one has no such group
    other = score_table([answered("Ortal city", method="text", kind="c", set="s"),
                         answered("Ortal city", method="text", kind="c", set="t")])
    print_results([score_table(ROWS), other])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[4:7]] == [
        ["F1-Recall", "by", "set", "router", "text"], ["s", "-", "1.000"], ["t", "-", "1.000"]]
    assert ["a", "0.750", "-"] in [line.split() for line in lines]
    print_table([["ab", "c"], ["d", "efg"]])
    assert capsys.readouterr().out == "ab    c\nd   efg\n\n"
    result = {"n": 520, "difference": 0.031, "ci": [0.012, 0.05], "p": 0.002, "a_only": 0.0519,
              "b_only": 0.0208}
    print_comparison("router", "te\nxt", result)
    assert capsys.readouterr().out == (
        "router - te xt: F1-Recall +0.031, 95 % 0.012 to 0.050, p 0.002; router scores higher on "
        "5.2 %, te xt on 2.1 % of 520 questions\n")
    print_comparison("a", "b", result | {"p": 0.0})
    assert ", p < 0.001; " in capsys.readouterr().out


# ---------------------------------------------------------------------------- files of result rows

def test_scoring_the_rows_of_others(tmp_path, capsys):
    rows = [{"question": "q", "answer": "Paris", "llm_answer": "in Paris"},
            {"question": "q", "answer": ["no"], "llm_answer": {"thought": "t", "answer": "yes no"},
             "plan_1": "any"},
            {"question": "q", "answer": ["6.75"], "answer_eval": [{"range": [6.5, 7.0]}],
             "llm_answer": "6.9"},
            {"question": "q", "answer": ["x"], "llm_answer": None}]
    file = tmp_path / "others.jsonl"
    bad = ["{oops", '{"question": "q", "answer": "x"}', '{"llm_answer": "x"}', "[1]",
           '{"answer": [{"range": [1, Infinity]}], "llm_answer": "x"}',
           '{"answer": "x", "llm_answer": "x", "cost": {"retrievals": 1}}',
           '{"answer": "x", "llm_answer": "x", "hops": 3}',
           '{"answer": "x", "llm_answer": "x", "hops": [], "method": "router", "plan_1": "any"}']
    file.write_text("\n".join([json.dumps(row) for row in rows] + bad) + "\n")
    code, lines, err = cli(capsys, "--score", file)
    result = json.loads(lines[-1])
    assert (result["n"], result["f1_recall"], result["em"]) == (4, 0.75, 0.25)
    assert result["left_out"] == 8
    numbers = [int(re.search(r"others\.jsonl:(\d+): ", line).group(1)) for line in err]
    assert code == 0 and numbers == list(range(5, 13))
    code, lines, err = cli(capsys, "--score", file, "--limit", 3, "--json")
    assert json.loads(lines[0])["n"] == 3 and len(lines) == 1 and not err
    # several files, told apart by their names
    more = questions_at(tmp_path / "more.jsonl", {"llm_answer": "x"})
    code, lines, _ = cli(capsys, "--score", file, more)
    assert code == 0 and json.loads(lines[-1])["by_set"] == {"others": 0.75, "more": 1.0}
    assert "by set" in "\n".join(lines) and "more" in "\n".join(lines)


def test_rows_of_wrong_types_are_named_and_left_out(tmp_path, capsys):
    cost = dict.fromkeys(COSTS, 1)
    routed = {"method": "router", "hops": [], "llm_answer": "x"}
    bad = [{"kind": [1]}, {"set": {}}, {"method": ["router"]}, {"llm_answer": "\ud800"},
           {"question": "\udfff"}, {"cost": cost | {"retrievals": 1e999}},
           routed | {"plan_1": {"retriever": [None]}}, {"answer": []}]
    rows = [{"llm_answer": "x"}, {"llm_answer": "x", "method": None}]
    rows += [{"llm_answer": "x", "line": i, **row} for i, row in enumerate(bad, 3)]
    file = questions_at(tmp_path / "r.jsonl", *rows)
    code, lines, err = cli(capsys, "--score", file)
    result = json.loads(lines[-1])
    assert code == 0 and (result["n"], result["left_out"]) == (2, len(bad))
    numbers = [int(line.split("r.jsonl:")[1].split(":")[0]) for line in err]
    assert numbers == list(range(3, 3 + len(bad)))


def test_the_same_questions_of_two_runs_are_not_pooled(tmp_path, capsys):
    one, other = tmp_path / "a" / "r.jsonl", tmp_path / "b" / "r.jsonl"
    for file, answer in ((one, "x"), (other, "y")):
        file.parent.mkdir()
        rows = [{"llm_answer": answer, "method": method} for method in ("direct", "cot")]
        questions_at(file, *rows, {})
    code, lines, err = cli(capsys, "--score", one, other)
    assert code == 2 and not lines and len(err) == 1
    assert "is there twice for method 'direct'" in err[0]
    code, lines, err = cli(capsys, "--score", one)                  # a row left out counts once
    assert code == 0 and len(err) == 1
    assert [json.loads(line)["left_out"] for line in lines[-2:]] == [1, 0]


def result_file(path, answers, lines=(1, 2, 3), **more):
    """A result file of set "s", its lines in this order, gold answer "x"."""
    path.parent.mkdir(exist_ok=True)
    rows = []
    for answer, line in zip(answers, lines):
        rows.append({"set": "s", "line": line, "question": f"Who {line}?", "llm_answer": answer,
                     "method": "router", **more})
    return questions_at(path, *rows)


def test_two_runs_on_the_same_questions_are_compared(tmp_path, capsys):
    a = result_file(tmp_path / "first.jsonl", "xxy")
    b = result_file(tmp_path / "second.jsonl", "yyx", (3, 1, 2))        # paired by line, not place
    code, lines, err = cli(capsys, "--score", a, b)
    assert code == 0 and not err
    first, second, comparison = map(json.loads, lines[-3:])
    assert [first["method"], second["method"]] == ["router first", "router second"]
    assert (first["f1_recall"], second["f1_recall"]) == (0.666667, 0.333333)
    assert comparison.pop("compare") == [str(a), str(b)]
    assert {name: comparison[name] for name in ("n", "difference", "a_only", "b_only")} == {
        "n": 3, "difference": 0.333333, "a_only": 0.333333, "b_only": 0.0}
    assert lines[-4].startswith("router first - router second: F1-Recall +0.333, 95 % 0.000 to 1.0")
    assert any(line.split()[:3] == ["router", "second", "3"] for line in lines)
    code, lines, _ = cli(capsys, "--score", a, b, "--json")
    assert code == 0 and len(lines) == 3 and json.loads(lines[-1])["compare"] == [str(a), str(b)]
    # files of one name are told apart by their paths; different methods are not renamed
    b = result_file(tmp_path / "deep" / "first.jsonl", "yyx")
    names = [json.loads(line)["method"] for line in cli(capsys, "--score", a, b, "--json")[1][:2]]
    assert names == [f"router {a}", f"router {b}"]
    b = result_file(tmp_path / "second.jsonl", "yyx", method="text")
    code, lines, _ = cli(capsys, "--score", a, b)
    assert [json.loads(line)["method"] for line in lines[-3:-1]] == ["router", "text"]
    assert lines[-4].startswith("router - text: F1-Recall +0.333, ")
    # each file has its own rows that were left out
    b.write_text(b.read_text() + "{oops\n")
    lines = cli(capsys, "--score", a, b)[1]
    assert [json.loads(line)["left_out"] for line in lines[-3:-1]] == [0, 1]


def test_files_that_cannot_be_compared(tmp_path, capsys):
    a = result_file(tmp_path / "a.jsonl", "xxy")
    # no line in common: scored together, as before
    b = result_file(tmp_path / "b.jsonl", "xxy", (4, 5, 6))
    code, lines, _ = cli(capsys, "--score", a, b, "--json")
    assert code == 0 and [json.loads(line)["n"] for line in lines] == [6]
    # some in common, a line twice, three files, another question at the same line
    part = result_file(tmp_path / "part.jsonl", "xxy", (2, 3, 4))
    twice = result_file(tmp_path / "twice.jsonl", "xxyx", (1, 2, 3, 3))
    same = result_file(tmp_path / "same.jsonl", "yyy")
    other = result_file(tmp_path / "other.jsonl", "yyy", question="Where?")
    for files, message in (
            ((a, part), "line 2 of set 's' is there twice for method 'router'"),
            ((a, twice), "line 1 of set 's' is there twice"),
            ((a, same, b), "line 1 of set 's' is there twice"),
            ((a, other), "line 1 of set 's': A and B answer different questions: compare runs")):
        code, lines, err = cli(capsys, "--score", *files)
        assert code == 2 and not lines and len(err) == 1 and message in err[0], err
    assert "two with a method each and all the same lines" in cli(capsys, "--score", a, part)[2][0]


def test_nobody_reads_on(tmp_path):
    file = questions_at(tmp_path / "r.jsonl", {"llm_answer": "x"})
    read, write = os.pipe()
    os.close(read)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}           # then the pipe breaks at the end
    done = run("infer.py", "--score", file, capture_output=False, stdout=write, stderr=-1,
               env=buffered, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_first_row_that_was_torn_is_no_row(tmp_path):
    file = tmp_path / "r.jsonl"
    for text, refused in (('{"question": "Wh', False), ("", False), ('{"a": 1}', True),
                          ("notes", True), ('{"a": 1}\n{"b', True), ("\n", True)):
        file.write_text(text)
        if refused:
            with pytest.raises(ValueError, match="name another --out"):
                earlier_rows(file, "x")
        else:
            assert earlier_rows(file, "x") == []
        assert file.read_text() == (text if refused else "")


def test_rows_that_a_run_takes_over(tmp_path):
    file = tmp_path / "r.jsonl"
    rows = [{"run": "x", "llm_answer": {"answer": str(i)}} for i in range(2)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(whole + '{"run": "x", "llm')
    assert earlier_rows(file, "x") == rows and file.read_text() == whole
    for text in (whole, '{"run": "y", "llm_answer": 1}\n', '{"run": "y", "llm_answer": ""}\n'):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds other rows"):
            earlier_rows(file, "y" if text is whole else "x")


def test_two_processes_do_not_write_one_file(tmp_path):
    with appending(tmp_path / "r.jsonl"):
        with pytest.raises(ValueError, match="another process writes there"):
            with appending(tmp_path / "r.jsonl"):
                pass
    assert os.listdir(tmp_path) == []                               # no row came
    with appending(tmp_path / "deep" / "r.jsonl") as file:
        file.write("row\n")
    with appending(tmp_path / "deep" / "r.jsonl") as file:
        file.write("another\n")
    assert (tmp_path / "deep" / "r.jsonl").read_text() == "row\nanother\n"
    assert os.listdir(tmp_path / "deep") == ["r.jsonl"]


def test_questions_to_show_are_of_different_kinds(tmp_path):
    rows = []
    for i, (kind, image) in enumerate((("a", 0), ("a", 1), ("b", 0), ("c", 1), ("d", 0), ("a", 1))):
        rows.append({"kind": kind, "image": "x.png" if image else None, "i": i})
    # new kinds with a picture and without one in turn, then the rest
    assert [row["i"] for row in different_kinds(rows, 6)] == [3, 0, 2, 4, 1, 5]
    assert [row["i"] for row in different_kinds(rows, 2)] == [3, 0]
    assert different_kinds(rows, 0) == []


def test_a_mark_counts_later_options_where_they_are_not_at_their_defaults(bases, tmp_path):
    """At the defaults it is that of the first release, computed here as it was then: a file that
    was begun before the options were there is continued."""
    flags = Flags(model=str(tmp_path), kb=("text=x",))
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    before = {"k": 3, "seed": 5}
    _, router = scripted(bases, None, **before)
    weights = [checksum(tmp_path / "a.safetensors")]
    kb = [base.mark for base in bases.values()]
    first = [weights, kb, (), None, None, "float32", router.prompts, 3, 1, 4, 96, 0.0, 5]
    marks = [f"{zlib.crc32(json.dumps(first).encode()):08x}"]
    assert settings_mark(flags, router) == marks[0]
    for option in ({"top_k": 20}, {"top_k": 21}, {"top_p": 0.9}, {"lower_case": True},
                   {"several": True}, {"several": True, "lower_case": True},
                   {"retries": 2, "temperature": 1.0}, {"temperature": 1.0}):
        marks.append(settings_mark(flags, scripted(bases, None, **before, **option)[1]))
    assert len(set(marks)) == len(marks)
    # what changes no answer changes no mark
    for option in ({"batch_size": 3}, {"call_tokens": 9999}, {"method": "direct"}):
        assert settings_mark(flags, scripted(bases, None, **before, **option)[1]) == marks[0]


def test_what_was_answered_is_not_asked_again(bases, tmp_path, capsys):
    """Rows come in the order of the questions, the file's in that of their answers."""
    rows = [{"kind": kind, "question": f"Who {i}?"} for i, kind in enumerate("aabb")]
    questions, _ = load_questions(questions_at(tmp_path / "q.jsonl", *rows))
    vlm, router = scripted(bases, lambda prompt, g: render_answer("t", "x"), method="direct")
    out = tmp_path / "r.jsonl"
    answer_many(router, questions[1:3], out, "mark")
    assert sum(map(len, vlm.batches)) == 2
    results = answer_many(router, questions, out, "mark", show=2)
    assert [row["question"] for row in results] == [row["question"] for row in rows]
    assert [batch[0].split(": ")[-1] for batch in vlm.batches[1:]] == ["Who 0?", "Who 3?"]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Who")]
    assert shown == ["Who 0?   [a, direct]", "Who 2?   [b, direct]"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in lines] == [2, 3, 1, 4]
    assert {row["run"] for row in lines} == {"mark"}
    answer_many(router, questions, None, show=4, quiet=True)
    assert capsys.readouterr().out == "" and len(out.read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="holds other rows"):
        answer_many(router, questions, out, "another mark")
