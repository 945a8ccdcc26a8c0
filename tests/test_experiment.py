"""The experiment's plan at toy scale, through the real scripts, and what is made of its rows."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, made
from lab import experiment
from lab.experiment import DEPTH_TESTS, STEP, Job, Scale, over_seeds


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------- the plan

def test_the_whole_plan_runs_at_toy_scale_and_finished_jobs_are_not_run_again(tmp_path):
    command = ("lab.experiment", "--quick", "--out", tmp_path)
    made(*command, cwd=tmp_path)
    jobs = experiment.plan(experiment.QUICK)
    rows = [row for part in experiment.PARTS for row in experiment.results_of(part, tmp_path)]
    finished = sorted((row["part"], row["name"], row["seed"]) for row in rows)
    assert finished == sorted((job.part, job.name, job.seed) for job in jobs)
    for row in rows:
        assert row["commit"] and row["cpu_seconds"] > 0 and row["commands"]
        if row["kind"] == "depth":
            assert all(test["n"] == 20 for test in row["tests"].values())
            assert "three, unseen" in row["tests"]
        else:
            assert row["test"]["n"] == 26
            assert (row["kind"] == "eval") == (row["curve"] == [])
    ceiling = next(row for row in rows if row["part"] == "cost" and row["name"] == "oracle")
    assert ceiling["test"]["route_accuracy"] is None or ceiling["test"]["f1_recall"] > 0.8
    again = made(*command, cwd=tmp_path).stdout
    count = sum(job.part != "cost" for job in jobs)     # what is timed runs behind the others
    assert f"{count} jobs, {count} of them finished before" in again
    assert len(json.loads(again.splitlines()[-1])["goals"]) == 6


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


def test_every_job_has_commands_of_its_own_and_three_seeds():
    jobs, scale = experiment.plan(Scale()), Scale()
    prints = {experiment.fingerprint(experiment.commands_of(job, scale)) for job in jobs}
    folders = {experiment.folder_of(job, scale) for job in jobs}
    assert len(prints) == len(folders) == len(jobs)
    for part in ("main", "collapse", "ablation"):
        names = [job.name for job in jobs if job.part == part and job.kind != "eval"]
        assert all(names.count(name) == 3 for name in names)


# ------------------------------------------------------------------------- what rows add up to

def row(name, seed, f1, kinds, tokens=100, retrievals=1.5, routing=1.0):
    scores = {"n": 4, "f1_recall": f1, "retrievals": retrievals, "gold_retrievals": 1.5,
              "route_accuracy": routing, "malformed": 0.25, "by_kind": kinds, "by_hops": {"1": f1}}
    return {"part": "main", "name": name, "seed": seed, "cpu_seconds": 9, "commit": "c",
            "machine": "m", "curve": [{"tokens": tokens}], "test": scores}


def test_seeds_are_summed_up_by_hand():
    """0.9, 1.0, 0.8: mean 0.9, deviation (n - 1) 0.1; the worst kind of any seed is b with 0.5."""
    s = over_seeds([row("x", 0, 0.9, {"a": 1.0, "b": 0.5}), row("x", 1, 1.0, {"a": 1.0, "b": 0.9}),
                    row("x", 2, 0.8, {"a": 1.0, "b": 0.7})])
    assert s["f1_recall"]["mean"] == pytest.approx(0.9)
    assert s["f1_recall"]["sd"] == pytest.approx(0.1)
    assert s["worst_kind"] == (0.5, "b") and s["by_kind"]["b"] == [0.5, 0.9, 0.7]
    assert s["seeds"] == [0, 1, 2] and s["tokens_sampled"] == [100] * 3


def test_goals_hold_or_do_not_by_hand():
    """0.96 against 0.5 and 0.88: 46 points ahead, 8 of the best other; retrievals 1.56 / 1.5 is 4 %
    too many."""
    sums = {}
    for name, f1, retrievals in ((STEP, 0.96, 1.56), ("outcome only", 0.5, 1.5),
                                 ("rejection sampling", 0.88, 1.5), ("weak start", 0.99, 1.5)):
        sums[name] = over_seeds([row(name, 0, f1, {"a": f1}, retrievals=retrievals)])
    goals = experiment.goals({"main": sums})
    assert [goal["holds"] for goal in goals] == [True, True, False, True, True, True]
    assert goals[2]["got"] == pytest.approx(0.04) and goals[5]["got"] == pytest.approx(0.08)
    assert "rejection sampling" in goals[5]["goal"]
    assert experiment.goals({"main": {}}) == []


def test_curves_add_up_time_and_tokens_of_all_rounds(tmp_path, monkeypatch):
    """Two rounds of rejection sampling: 30 and 50 tokens sampled in 4 s each, trained 10 s and
    20 s."""
    monkeypatch.chdir(tmp_path)
    job, scale = Job("main", "r", 0, "rejection", 1.0), Scale(rounds=2)
    folder = experiment.folder_of(job, scale)
    for i, (tokens, seconds) in enumerate(((30, 10.0), (50, 20.0))):
        cost = {"generated_tokens": tokens, "seconds_model": 3.5, "seconds_search": 0.5}
        write_rows(folder / f"round-{i}.jsonl", {"cost": cost})
        validation = {"f1_recall": 0.5, "seconds": 0.1}
        write_rows(folder / f"round-{i}" / "log.jsonl",
                   {"step": 1, "tokens": 999, "seconds": seconds / 2},
                   {"step": 2, "validation": validation, "seconds": seconds})
    points = experiment.curve(job, scale)
    assert [(point["seconds"], point["tokens"]) for point in points] == [(14.0, 30), (38.0, 80)]
    assert [point["f1_recall"] for point in points] == [0.5, 0.5]


def test_the_curve_and_the_routes_of_a_run(tmp_path, monkeypatch):
    """Four updates of 7 tokens in a second each; a validation behind the third."""
    monkeypatch.chdir(tmp_path)
    job, scale = Job("main", "g", 0, "grpo", 1.0), Scale()
    log = experiment.folder_of(job, scale) / "log.jsonl"
    rows = [{"step": i, "tokens": 7, "seconds": i, "asked:text": i / 10} for i in range(1, 5)]
    validation = {"step": 3, "validation": {"f1_recall": 0.7, "tokens": 300}, "seconds": 3}
    write_rows(log, *rows[:3], validation, rows[3])
    points = experiment.curve(job, scale)
    assert [(point["seconds"], point["tokens"]) for point in points] == [(3, 21)]
    # means of two updates: (0.1 + 0.2) / 2 and (0.3 + 0.4) / 2
    assert [means["asked:text"] for means in experiment.routes(log, 2)] == [0.15, 0.35]


# -------------------------------------------------------------------------------------- tables

def test_the_page_of_results_shows_what_the_stored_results_say():
    whole, out = experiment.summary(ROOT / "results", Scale()), ROOT / "results"
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert experiment.fill(page, experiment.sections(whole, out)) == page


def test_speeds_of_a_figure_measured_twice_and_of_one_without_a_peer():
    """Twice as many tokens as the peer, in rounds 1.9 to 2.2; a goal of 3 is missed. The first line
    is old."""
    compared = {"value": 2000, "unit": "tokens/s", "peer": "p", "peer_value": 1000, "ratio": 2.0,
                "rounds": [1.9, 2.2]}
    old, new = {**compared, "ratio": 9.0}, {**compared, "goal": ">= 3", "met": False}
    lines = [{"command": "bench.py x", "figures": {"x": {"a": figure}}} for figure in (old, new)]
    lone = {"share": {"value": 0.0963, "unit": "of 1"}}
    lines.append({"command": "bench.py y", "figures": {"y": lone}})
    assert experiment.speeds(lines).splitlines()[2:] == [
        "| `bench.py x` | a | 2,000 tokens/s | 2.00 × p (1.90 to 2.20) | at least 3: missed |",
        "| `bench.py y` | share | 0.0963 of 1 |  |  |"]


def test_depths_have_a_column_a_test_and_a_line_a_recipe():
    """Two seeds, 0.5 and 1.0 on two hops: 0.75; five hops were not asked of the second recipe; 1.5
    searches each."""
    scores = over_seeds([row("x", 0, 0.5, {"a": 0.5}), row("x", 1, 1.0, {"a": 1.0})])
    recipes = {"to three hops": dict.fromkeys(DEPTH_TESTS, scores),
               "to four hops": {"two hops": scores}}
    table, costs = experiment.depths(recipes).split("\n\n")
    assert table.splitlines()[2:] == [
        "| three hops |" + " 0.75 ± 0.35 (0.50 / 1.00) |" * 6,
        "| four hops | 0.75 ± 0.35 (0.50 / 1.00) |" + " - |" * 5]
    assert costs.splitlines()[2:] == ["| three hops |" + " 1.50 / 0.25 |" * 6,
                                      "| four hops | 1.50 / 0.25 |" + " - |" * 5]
