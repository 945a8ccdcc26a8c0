"""The study's plan at toy scale, through the real scripts; its data files; what is made of rows."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, made
from lab import experiment, scores, tables
from lab.experiment import Job, Scale
from lab.world import PRACTICE_FILES
from parts.questions import load_questions


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------- the plan

def test_the_whole_plan_runs_at_toy_scale_and_finished_jobs_are_not_run_again(tmp_path):
    command = ("lab.experiment", "--quick", "--out", tmp_path)
    made(*command, cwd=tmp_path)
    jobs = experiment.plan(experiment.QUICK)
    rows = {part: experiment.rows_of(tmp_path / f"{part}.jsonl") for part in experiment.PARTS}
    every = [row for some in rows.values() for row in some]
    assert sorted(map(experiment.key_of, every)) == sorted(map(experiment.key_of, jobs))
    for row in every:
        assert row["commit"] and row["machine"] and row["cpu_seconds"] > 0 and row["commands"]
        assert (row["kind"] in ("eval", "depth")) == (row["curve"] == [])
        for test in row["tests"].values():
            assert len(test["right"]) == test["n"] in (13, 20, 26)
    assert len(rows["main"]) == 7 and all(len(row["tests"]) == 2 for row in rows["main"])
    [depth] = rows["depth"]
    assert len(depth["tests"]) == 12                    # six depths, each with gold steps, too
    [steps] = rows["steps"]
    assert "no wrong base" in next(iter(steps["tests"].values()))["steps"]
    again = made(*command, cwd=tmp_path).stdout
    count = sum(job.part != "cost" for job in jobs)     # what is timed runs behind the others
    assert f"{count} jobs, {count} of them finished before" in again
    assert len(json.loads(again.splitlines()[-1])["goals"]) == 7


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_plan_and_the_runs_that_it_started(tmp_path, number, code):
    words = [sys.executable, "-m", "lab.experiment", "--quick", "--out", tmp_path]
    plan = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)
    assert "jobs" in plan.stdout.readline()
    time.sleep(1)                                       # two runs have begun
    plan.send_signal(number)
    _, message = plan.communicate(timeout=60)
    assert plan.returncode == code
    assert message.strip() == "lab.experiment: stopped; the same command goes on"
    with pytest.raises(ProcessLookupError):
        os.killpg(plan.pid, 0)                          # nobody is left of its group


def test_every_job_has_a_key_and_a_folder_of_its_own():
    jobs, scale = experiment.plan(Scale()), Scale()
    keys = {experiment.key_of(job) for job in jobs}
    folders = {experiment.folder_of(job, scale) for job in jobs}
    assert len(keys) == len(folders) == len(jobs)
    for part in ("main", "annotation", "dials", "next", "ablation"):
        trained = [job for job in jobs if job.part == part and job.kind == "train"]
        assert {job.seed for job in trained} == {0, 1, 2}
        assert len({job.minutes for job in trained}) == 1               # equal time


def test_rejection_samples_in_proportion_to_its_time():
    scale, asked = Scale(), {}
    for job in experiment.plan(scale):
        if job.method == experiment.REJECTION:
            first = experiment.commands_of(job, scale)[0]
            asked.setdefault(job.minutes, set()).add(first[first.index("--limit") + 1])
    assert asked == {6.0: {"600"}, 3.0: {"300"}}


def test_a_job_with_a_rate_of_its_own_does_not_depend_on_the_chosen_one(monkeypatch):
    [job, other] = [Job("rates", experiment.SFT, 41, "train", experiment.SFT, 3.0, rate=rate)
                    for rate in (1e-4, 0.0)]
    before = [experiment.folder_of(one, Scale()) for one in (job, other)]
    chosen = replace(experiment.METHODS[experiment.SFT], rate=7e-4)
    monkeypatch.setitem(experiment.METHODS, experiment.SFT, chosen)
    after = [experiment.folder_of(one, Scale()) for one in (job, other)]
    assert after[0] == before[0] and after[1] != before[1]


def test_what_a_start_is_made_of_is_written():
    scale = Scale()
    made_of = experiment.make_start(experiment.READS_DIALS, scale)
    files = [word.split("=")[0] for word in made_of if ".jsonl=" in word]
    assert len(files) == 6
    for file in files:
        folder, name = file.rsplit("/", 1)
        assert "--practice" in experiment.worlds(scale)[folder]
        assert name.removesuffix(".jsonl") in PRACTICE_FILES
    model = made_of[made_of.index("--model") + 1]
    assert model == experiment.WARM


def split_of(folder):
    return experiment.worlds(Scale())[folder][1]


def test_no_choice_sees_a_test_world_and_no_test_a_training_world():
    """What is trained on and validated on is of other splits than what is tested; the seeds of test
    worlds are used for nothing else, and rates were chosen in worlds of their own."""
    scale, chosen, others = Scale(), set(), set()
    for job in experiment.plan(scale):
        for _, script, *words in experiment.commands_of(job, scale):
            places = [word.rsplit("=", 1)[0] for word in words if word.startswith("data/study")]
            splits = {split_of("/".join(place.split("/")[:3])) for place in places}
            tests = script == "infer.py" and "--json" in words and job.kind != "steps"
            assert splits == {"test"} if tests else "test" not in splits
            (chosen if job.part == "rates" else others).update(places)
        if job.part == "rates":
            assert not any("--json" in words for words in experiment.commands_of(job, scale))
    made_by_rates = {place for place in chosen & others if "/start-" not in place}
    assert not made_by_rates
    options = experiment.worlds(scale).values()
    tested = {words[3] for words in options if words[1] == "test"}
    assert tested == set(experiment.TESTS)
    assert not tested & {words[3] for words in options if words[1] != "test"}


def test_the_rate_of_a_method_is_the_best_that_was_tried_and_not_at_the_edge():
    rows = experiment.current("rates", Scale(), ROOT / "results")
    for name, rates in experiment.RATES.items():
        tried = {row["rate"]: tables.best_validation(row) for row in rows if row["name"] == name}
        if set(tried) == set(rates):
            chosen = experiment.METHODS[name].rate
            assert tried[chosen] == max(tried.values())
            assert min(rates) < chosen < max(rates)


# --------------------------------------------------------------------------- what is trained on

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "w"
    made("lab.world", "--split", "train", "--countries", 60, "--questions", 260, "--out", out)
    experiment.write_data(out, Scale(sizes=(30,), sampled=100, rounds=3))
    return out


def rows(home, name):
    return experiment.rows_of(home / f"{name}.jsonl")


def test_fewer_questions_are_the_first_ones_and_rounds_go_through_all(home):
    questions, steps = rows(home, "questions"), rows(home, "steps")
    assert rows(home, "questions-30") == questions[:30] and rows(home, "steps-30") == steps[:30]
    answers = rows(home, "answers-30")
    assert [row["answer"] for row in answers] == [row["answer"] for row in questions[:30]]
    for row in answers + rows(home, "answers"):         # a kind says which bases are gold
        assert set(row) == {"id", "question", "answer", "image"}
    asked = [row["question"] for i in range(3) for row in rows(home, f"round-{i}")]
    assert asked == ([row["question"] for row in questions] * 2)[:300]
    some, faults = load_questions(home / "round-30-1.jsonl")
    assert len(some) == 100 and not faults


def test_bare_steps_differ_in_their_thoughts_alone(home):
    for bare, full in zip(rows(home, "bare"), rows(home, "steps")):
        assert {step["thought"] for step in bare["steps"]} == {""}
        for step, whole in zip(bare["steps"], full["steps"]):
            assert {**step, "thought": whole["thought"]} == whole


def test_two_routes_in_five_are_wrong_alike_in_questions_and_steps(home):
    wrong = []
    for bad, good, steps in zip(rows(home, "questions-wrong"), rows(home, "questions"),
                                rows(home, "steps-wrong")):
        assert {**bad, "hops": good["hops"]} == good
        asked = [step["answer"]["retriever"] for step in steps["steps"]
                 if step["step_type"] == "ret"]
        assert asked == [[hop["retriever"]] for hop in bad["hops"]] + [["none"]]
        wrong += [a["retriever"] != b["retriever"] for a, b in zip(bad["hops"], good["hops"])]
    assert 0.3 < np.mean(wrong) < 0.5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_start_is_weakened_in_its_routing_steps_alone(home, share):
    same, rng = [], random.Random(0)
    for row in rows(home, "steps"):
        weak = experiment.weakened(row, share, rng)
        for before, after in zip(row["steps"], weak["steps"]):
            if before["step_type"] == "ans":
                assert after == before
            elif before["answer"]["query"] != "none":
                same.append(after["answer"] == before["answer"])
    assert np.mean(same) == pytest.approx(share, abs=0.1)


# ------------------------------------------------------------------------- what is kept of a run

def test_curves_add_up_time_and_tokens_of_all_rounds(tmp_path, monkeypatch):
    """Two rounds of rejection sampling: 30 and 50 tokens sampled in 4 s each, trained 10 s and
    20 s. The second round was the better one."""
    monkeypatch.chdir(tmp_path)
    name, scale = experiment.REJECTION, Scale(rounds=2)
    job = Job("main", name, 0, "train", name, 1.0)
    folder = experiment.folder_of(job, scale)
    for i, (tokens, seconds) in enumerate(((30, 10.0), (50, 20.0))):
        cost = {"generated_tokens": tokens, "seconds_model": 3.5, "seconds_search": 0.5}
        write_rows(folder / f"round-{i}.jsonl", {"cost": cost})
        validation = {"f1_recall": 0.5 + i / 10, "seconds": 0.1}
        write_rows(folder / f"round-{i}" / "log.jsonl",
                   {"step": 1, "tokens": 999, "seconds": seconds / 2},
                   {"step": 2, "validation": validation, "seconds": seconds})
    points = experiment.curve(job, scale)
    assert [(point["seconds"], point["tokens"]) for point in points] == [(14.0, 30), (38.0, 80)]
    assert [point["f1_recall"] for point in points] == [0.5, 0.6]
    assert tables.updates({"curve": points}) == 4
    experiment.choose_round(folder, scale)
    assert os.readlink(folder / "best") == "round-1/best"


def test_the_curve_and_the_routes_of_a_run(tmp_path, monkeypatch):
    """Four updates of 7 tokens in a second each; a validation behind the third."""
    monkeypatch.chdir(tmp_path)
    job, scale = Job("main", experiment.STEP, 0, "train", experiment.STEP, 1.0), Scale()
    log = experiment.folder_of(job, scale) / "log.jsonl"
    logged = [{"step": i, "tokens": 7, "seconds": i, "asked:text": i / 10} for i in range(1, 5)]
    validation = {"step": 3, "validation": {"f1_recall": 0.7, "tokens": 300}, "seconds": 3}
    write_rows(log, *logged[:3], validation, logged[3])
    points = experiment.curve(job, scale)
    assert [(point["seconds"], point["tokens"]) for point in points] == [(3, 21)]
    # means of two updates: (0.1 + 0.2) / 2 and (0.3 + 0.4) / 2
    assert [means["asked:text"] for means in experiment.routes(log, 2)] == [0.15, 0.35]


def answered(line, answer, gold, seconds=1.0):
    return {"line": line, "answer": [gold], "llm_answer": {"answer": answer}, "question": "q",
            "cost": {"seconds_model": seconds, "seconds_search": 0.5}}


def test_abstention_and_latency_by_hand():
    """Of four questions two are unanswerable; "unknown" is said twice, once rightly: precision,
    recall and F1 are one half. Seconds 1 to 4: the middle is 2.5 in the model."""
    some = [answered(4, "Unknown", "unknown", 4), answered(1, "a", "a", 1),
            answered(2, "unknown", "b", 2), answered(3, "c", "unknown", 3)]
    result = scores.summary_of_test(some)
    assert result["right"] == "1001"
    half = {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert result["abstention"] == {**half, "said": 2, "true": 2}
    assert result["latency"]["model"][0] == 2.5 and result["latency"]["both"][0] == 3.0
    assert scores.summary_of_test(some[1:3])["abstention"] is None


def test_what_steps_say_of_the_end_by_hand():
    """Full rewards end right in two of three cases, others in none of one; the correlation of
    (1, 1, 1, 0) and (1, 1, 0, 0) is 1 / sqrt(3)."""
    relation = scores.relation(np.array([1.0, 1, 1, 0]), np.array([1.0, 1, 0, 0]))
    assert relation == {"n": 4, "right": 0.75, "corr": pytest.approx(3 ** -0.5),
                        "end_if_right": pytest.approx(2 / 3), "end_if_wrong": 0.0}
    assert scores.relation(np.ones(2), np.array([0.0, 1]))["corr"] is None


# -------------------------------------------------------------------------------------- tables

def row(name, seed, right, kinds=None, part="main", **more):
    """A row with one test of as many questions as `right` has digits."""
    f1 = right.count("1") / len(right)
    test = {"n": len(right), "f1_recall": f1, "retrievals": 1.5, "gold_retrievals": 1.5,
            "route_accuracy": 1.0, "by_kind": kinds or {"a": f1}, "right": right,
            "abstention": None}
    curve = [{"step": 10, "seconds": 60.0, "tokens": 100, "f1_recall": 0.5},
             {"step": 20, "seconds": 120.0, "tokens": 300, "f1_recall": 0.9}]
    return {"part": part, "name": name, "seed": seed, "kind": "train", "needs": "n", "setting":
            "plain", "tag": "", "rate": 1e-3, "start": "s", "curve": curve, "cpu_seconds": 9,
            "tests": {"world router": test}, **more}


def test_seeds_stand_together_in_the_main_table():
    """0.5 and 1.0: 0.75 ± 0.354; the worst kind of any seed; 300 tokens are sampled by both, so
    that is the limit, below which the best validation is 0.9."""
    some = [row("x", 0, "0101", {"a": 0.25, "b": 1.0}), row("x", 1, "1111")]
    lines = tables.main_table({"main": some}).splitlines()
    assert lines[2] == ("| x | n | 0.750 ± 0.354 (0.500 / 1.000) | 1.000 | 1.50 (1.50) | a 0.25 | "
                        "20 | 2.0 | 0.00 M | 0.900 |")


def test_a_difference_is_paired_over_questions_and_level_if_seeds_disagree():
    """B is right where A is, and on one more question of four in each seed; against C one seed is
    better and one is worse."""
    a = [row(tables.STEP, 0, "1100" * 25), row(tables.STEP, 1, "1100" * 25)]
    b = [row("b", 0, "1110" * 25), row("b", 1, "1101" * 25)]
    c = [row("c", 0, "1110" * 25), row("c", 1, "1000" * 25)]
    result = tables.gain(b, a)
    assert result["difference"] == pytest.approx(0.25) and result["n"] == 100
    assert result["seeds"] == [pytest.approx(0.25)] * 2
    assert not tables.difference(result).endswith("level")
    assert tables.difference(tables.gain(c, a)).endswith(", level")
    text = tables.pairs_table({"main": a + b})
    assert "| b | +0.250" in text and "+0.250 / +0.250 |" in text and tables.STEP + " |" in text


def test_the_best_rate_is_bold():
    some = [row("x", 41, "1", rate=rate) for rate in (1e-4, 2e-4)]
    some[0]["curve"][1]["f1_recall"] = 0.4
    assert tables.rates_table({"rates": some}).splitlines()[2] == "| x | 0.500 | **0.900** |"


def test_every_table_and_figure_is_made_of_the_rows_of_a_whole_plan(tmp_path):
    """A made-up row for every job of the plan at full scale: no part is left out."""
    scale, stored = Scale(), {}
    for job in experiment.plan(scale):
        made_up = row(job.name, job.seed, "1101", {"a": 0.5, "moved": 0.5}, **{
            key: getattr(job, key) for key in ("part", "kind", "setting", "tag", "start", "rate")})
        [test] = made_up.pop("tests").values()
        half = {"n": 4, "right": 0.5, "corr": 0.5, "end_if_right": 0.5, "end_if_wrong": None}
        test |= {"abstention": dict.fromkeys(("precision", "recall", "f1"), 0.5),
                 "latency": dict.fromkeys(("model", "search", "both"), [0.5, 0.9]),
                 "steps": {"answer": half}}
        test |= dict.fromkeys(("model_calls", "tokens_read", "tokens_written"), 1.0)
        names = [f"{Path(words[words.index('--world') + 1]).name} {method}"
                 for words in experiment.commands_of(job, scale) if "--json" in words
                 for method in (("router", "oracle") if job.kind == "depth" else ("router",))]
        curve = made_up["curve"] if job.kind in ("train", "steps") else []
        stored.setdefault(job.part, []).append(
            {**made_up, "curve": curve, "tests": dict.fromkeys(names, test)})
    texts = tables.sections(stored, tmp_path)
    assert "(not run yet)" not in "".join(texts.values())
    assert all(goal["got"] is not None for goal in tables.goals(stored))
    tables.write_tables(stored, tmp_path)
    drawn = sorted(file.name for file in tmp_path.glob("*.png"))
    assert drawn == ["annotation.png", "axis.png", "main-seconds.png", "main-tokens.png"]
    assert len(texts["dials"].splitlines()) == 2 + 4 + 1 + 3 and "+0.000" in texts["dial pairs"]
    assert len(texts["depth"].splitlines()) == 2 + 2 * 3 and texts["depth"].count(" - ") == 2


def test_goals_hold_or_do_not_and_say_where_nothing_was_run():
    """0.96 of 0.95 wanted holds, 0.75 does not; no dial was run."""
    some = [row(tables.STEP, 0, "1" * 24 + "0"), row(tables.STATE, 0, "1110")]
    goals = tables.goals({"main": some, "dials": [], "next": []})
    assert [goal["holds"] for goal in goals] == [True, True, False, None, None, None, None]
    assert goals[0]["got"] == 0.96


def test_speeds_of_a_figure_measured_twice_and_of_one_without_a_peer():
    """Twice as many tokens as the peer, in rounds 1.9 to 2.2; a goal of 3 is missed. The first line
    is old."""
    compared = {"value": 2000, "unit": "tokens/s", "peer": "p", "peer_value": 1000, "ratio": 2.0,
                "rounds": [1.9, 2.2]}
    old, new = {**compared, "ratio": 9.0}, {**compared, "goal": ">= 3", "met": False}
    lines = [{"command": "bench.py x", "figures": {"x": {"a": figure}}} for figure in (old, new)]
    lone = {"share": {"value": 0.0963, "unit": "of 1"}}
    lines.append({"command": "bench.py y", "figures": {"y": lone}})
    assert tables.speeds(lines).splitlines()[2:] == [
        "| `bench.py x` | a | 2,000 tokens/s | 2.00 × p (1.90 to 2.20) | at least 3: missed |",
        "| `bench.py y` | share | 0.0963 of 1 |  |  |"]


def test_a_place_of_a_page_is_written_anew_and_the_rest_stays():
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb"
    assert tables.fill(page, {"x": "new", "y": "z"}) == "a\n<!-- x -->\nnew\n<!-- end -->\nb"


def test_the_pages_show_what_the_stored_results_say():
    out = ROOT / "results"
    stored = {part: experiment.current(part, Scale(), out) for part in experiment.PARTS}
    parts = tables.sections(stored, out)
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name, text in parts.items():
        assert f"<!-- {name} -->" in results or name == "main in short" or "(not run" in text
    for path in (ROOT / "docs" / "results.md", ROOT / "README.md"):
        page = path.read_text(encoding="utf-8")
        assert tables.fill(page, parts) == page
