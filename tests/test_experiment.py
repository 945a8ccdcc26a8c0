"""The experiment's plan at toy scale, through the real scripts, and what is made of its rows."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from lab import experiment
from lab.experiment import Job, Scale


def test_the_whole_plan_runs_at_toy_scale_and_finished_jobs_are_not_run_again(tmp_path):
    command = [sys.executable, "-m", "lab.experiment", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = experiment.plan(experiment.QUICK)
    rows = [r for part in experiment.PARTS for r in experiment.results_of(part, tmp_path)]
    assert sorted((r["part"], r["name"], r["seed"]) for r in rows) == sorted((j.part, j.name, j.seed) for j in jobs)
    for row in rows:
        assert row["commit"] and row["cpu_seconds"] > 0 and row["commands"]
        if row["kind"] == "depth":
            assert all(test["n"] == 20 for test in row["tests"].values()) and "three, unseen" in row["tests"]
        else:
            assert row["test"]["n"] == 26
            assert (row["kind"] == "eval") == (row["curve"] == [])
    ceiling = next(r for r in rows if r["part"] == "cost" and r["name"] == "oracle")
    assert ceiling["test"]["route_accuracy"] is None or ceiling["test"]["f1_recall"] > 0.8
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and f"{len(jobs) - 7} jobs, {len(jobs) - 7} of them finished before" in again.stdout
    assert len(json.loads(again.stdout.splitlines()[-1])["goals"]) == 6


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_plan_and_the_runs_that_it_started(tmp_path, number, code):
    command = [sys.executable, "-m", "lab.experiment", "--quick", "--out", str(tmp_path)]
    plan = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "jobs" in plan.stdout.readline()
    time.sleep(1)                                               # two runs have begun
    plan.send_signal(number)
    _, said = plan.communicate(timeout=60)
    assert plan.returncode == code and said.strip() == "lab.experiment: stopped; the same command goes on"
    with pytest.raises(ProcessLookupError):
        os.killpg(plan.pid, 0)                                  # nobody is left of its group


def test_every_job_has_commands_of_its_own_and_three_seeds():
    jobs = experiment.plan(Scale())
    prints = [experiment.fingerprint(experiment.KINDS[j.kind](j, Scale())) for j in jobs]
    assert len(set(prints)) == len(jobs)
    for part in ("main", "collapse", "ablation"):
        names = [j.name for j in jobs if j.part == part and j.kind != "eval"]
        assert all(names.count(name) == 3 for name in names)
    folders = [experiment.folder_of(j, Scale()) for j in jobs]
    assert len(set(folders)) == len(jobs)


def row(name, seed, f1, kinds, tokens=100, retrievals=1.5, routing=1.0):
    return {"part": "main", "name": name, "seed": seed, "cpu_seconds": 9, "commit": "c", "machine": "m",
            "curve": [{"tokens": tokens}],
            "test": {"n": 4, "f1_recall": f1, "retrievals": retrievals, "gold_retrievals": 1.5,
                     "route_accuracy": routing, "malformed": 0.25, "by_kind": kinds, "by_hops": {"1": f1}}}


def test_seeds_are_summed_up_by_hand():
    """0.9, 1.0, 0.8: mean 0.9, deviation (n - 1) 0.1; the worst kind of any seed is b with 0.5."""
    s = experiment.over_seeds([row("x", i, f, {"a": 1.0, "b": b}) for i, (f, b) in
                               enumerate([(0.9, 0.5), (1.0, 0.9), (0.8, 0.7)])])
    assert s["f1_recall"]["mean"] == pytest.approx(0.9) and s["f1_recall"]["sd"] == pytest.approx(0.1)
    assert s["worst_kind"] == (0.5, "b") and s["by_kind"]["b"] == [0.5, 0.9, 0.7] and s["seeds"] == [0, 1, 2]
    assert s["tokens_sampled"] == [100] * 3


def test_goals_hold_or_do_not_by_hand():
    """0.96 against 0.5 and 0.88: 46 points ahead, 8 of the best other; retrievals 1.56 / 1.5 is 4 % too many."""
    sums = {name: experiment.over_seeds([row(name, 0, f, {"a": f}, retrievals=r)])
            for name, f, r in ((experiment.STEP, 0.96, 1.56), ("outcome only", 0.5, 1.5),
                               ("rejection sampling", 0.88, 1.5), ("weak start", 0.99, 1.5))}
    found = experiment.goals({"main": sums})
    assert [g["holds"] for g in found] == [True, True, False, True, True, True]
    assert found[2]["got"] == pytest.approx(0.04) and found[5]["got"] == pytest.approx(0.08)
    assert "rejection sampling" in found[5]["goal"]
    assert experiment.goals({"main": {}}) == []


def test_curves_add_up_time_and_tokens_of_all_rounds(tmp_path, monkeypatch):
    """Two rounds of rejection sampling: 30 and 50 tokens sampled in 4 s each, trained 10 s and 20 s; one run of Step-GRPO."""
    monkeypatch.chdir(tmp_path)
    job, scale = Job("main", "r", 0, "rejection", 1.0), Scale(rounds=2)
    folder = experiment.folder_of(job, scale)
    for i, (tokens, seconds) in enumerate(((30, 10.0), (50, 20.0))):
        (folder / f"round-{i}").mkdir(parents=True)
        (folder / f"round-{i}.jsonl").write_text(json.dumps({"cost": {
            "generated_tokens": tokens, "seconds_model": 3.5, "seconds_search": 0.5}}) + "\n")
        (folder / f"round-{i}" / "log.jsonl").write_text(
            json.dumps({"step": 1, "tokens": 999, "seconds": seconds / 2}) + "\n"
            + json.dumps({"step": 2, "validation": {"f1_recall": 0.5, "seconds": 0.1}, "seconds": seconds}) + "\n")
    assert [(p["seconds"], p["tokens"], p["f1_recall"]) for p in experiment.curve(job, scale)] == [
        (14.0, 30, 0.5), (38.0, 80, 0.5)]
    job = Job("main", "g", 0, "grpo", 1.0)
    folder = experiment.folder_of(job, scale)
    folder.mkdir(parents=True)
    rows = [{"step": i, "tokens": 7, "seconds": i, "asked:text": i / 10} for i in range(1, 5)]
    rows[3:3] = [{"step": 3, "validation": {"f1_recall": 0.7, "tokens": 300}, "seconds": 3}]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [(p["seconds"], p["tokens"]) for p in experiment.curve(job, scale)] == [(3, 21)]
    # means of two updates: (0.1 + 0.2) / 2 and (0.3 + 0.4) / 2
    assert [r["asked:text"] for r in experiment.routes(folder / "log.jsonl", 2)] == [0.15, 0.35]


def test_the_page_of_results_shows_what_the_stored_results_say():
    whole, out = experiment.summary(ROOT / "results", Scale()), ROOT / "results"
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert experiment.fill(page, experiment.sections(whole, out)) == page


def test_speeds_of_a_figure_measured_twice_and_of_one_without_a_peer():
    """Twice as many tokens as the peer, in rounds 1.9 to 2.2; a goal of 3 is missed. The first line is old."""
    compared = {"value": 2000, "unit": "tokens/s", "peer": "p", "peer_value": 1000, "ratio": 2.0, "rounds": [1.9, 2.2]}
    old, new = ({"command": "bench.py x", "figures": {"x": {"a": f}}} for f in (
        {**compared, "ratio": 9.0}, {**compared, "goal": ">= 3", "met": False}))
    lone = {"command": "bench.py y", "figures": {"y": {"share": {"value": 0.0963, "unit": "of 1"}}}}
    assert experiment.speeds([old, new, lone]).splitlines()[2:] == [
        "| `bench.py x` | a | 2,000 tokens/s | 2.00 × p (1.90 to 2.20) | at least 3: missed |",
        "| `bench.py y` | share | 0.0963 of 1 |  |  |"]


def test_depths_have_a_column_a_test_and_a_line_a_recipe():
    """Two seeds, 0.5 and 1.0 on two hops: 0.75; five hops were not asked of the second recipe; 1.5 searches each."""
    tests = lambda *names: {name: experiment.over_seeds([row("x", i, f, {"a": f}) for i, f in enumerate((0.5, 1.0))])
                            for name in names}
    lines = experiment.depths({"to three hops": tests(*experiment.DEPTH_TESTS), "to four hops": tests("two hops")})
    scores, costs = (part.splitlines()[2:] for part in lines.split("\n\n"))
    assert scores == ["| three hops |" + " 0.75 ± 0.35 (0.50 / 1.00) |" * 6,
                      "| four hops | 0.75 ± 0.35 (0.50 / 1.00) |" + " - |" * 5]
    assert costs == ["| three hops |" + " 1.50 / 0.25 |" * 6, "| four hops | 1.50 / 0.25 |" + " - |" * 5]
