"""The report: its numbers against cases worked by hand, its markup against hostile text, the page
in a real browser."""
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import urllib.request
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from lab import curves, report

HOSTILE = ('</script><script>window.hacked = 1</script><hostile>"\' onmouseover="window.hacked = 2"'
           ' </textarea></style><img src=x onerror=window.hacked=3> &amp; &lt; ü 漢字 ${1} $x_$')
TEXT, TABLE = "Text Retriever", "Table Retriever"


def plan(query, route, answer=None, **more):
    plan = {"thought": "t", "query": query, "retriever": [route], **more}
    if answer is not None:
        plan["answer"] = {"thought": "t", "answer": answer}
    return plan


def row(question, gold, answer, *plans, kind="one", hops=(), method="router", **more):
    """A result row as parts.trajectory.result_row has it; 10 prompt tokens, 5 generated ones, half
    a second."""
    cost = {"retrievals": len(plans), "model_calls": 2, "prompt_tokens": 10, "generated_tokens": 5,
            "malformed": 0, "too_long": 0, "seconds_model": 0.25, "seconds_search": 0.25}
    row = {"question": question, "answer": gold, "kind": kind, "hops": list(hops),
           "method": method, "cost": cost, "llm_answer": {"thought": "", "answer": answer}}
    for i, plan in enumerate(plans, 1):
        row[f"plan_{i}"] = plan
    return {**row, **more}


def hop(query, base, answer):
    return {"query": query, "retriever": base, "answer": answer}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder, seed=0, rows=(), samples=(), **options):
    folder.mkdir(parents=True)
    options = {"mode": "online", "seed": seed, **options}
    (folder / "options.json").write_text(json.dumps(options))
    write_rows(folder / "log.jsonl", rows)
    if samples:
        write_rows(folder / "samples.jsonl", samples)
    return folder


class Reader(HTMLParser):
    """What a browser would see: elements with their attributes, text, and the cells of tables."""

    def __init__(self, markup):
        super().__init__()
        self.elements, self.texts, self.tables, self.open = [], [], [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("img", "input", "meta"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append((dict(attributes)["aria-label"], []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        self.texts.append(text)
        if {"th", "td"} & set(self.open):
            sign = {"b": "*", "small": " "}.get(self.open[-1], "")
            self.tables[-1][1][-1][-1] += sign + text

    def table(self, title):
        """{row heading: {column heading: cell}}; "*" stands before bold text."""
        head, *body = next(rows for name, rows in self.tables if name == title)
        return {first: dict(zip(head[1:], cells)) for first, *cells in body}


def page_of(*inputs, count=60):
    runs, results, faults = report.load([str(path) for path in inputs])
    assert not faults
    return Reader(report.page(runs, results, count))


# ----------------------------------------------------------------------------------------- tables

GOOD = [row("a", ["lima"], "lima", kind="x", hops=[hop("q", "text retriever", "lima")]),
        row("b", ["new york city"], "new york", kind="x"),
        row("c", ["7"], "8", kind="y"),
        row("d", ["red"], "red", kind="y")]
BAD = [{**row, "llm_answer": "no", "method": "direct"} for row in GOOD]


def test_scores_are_those_worked_by_hand(tmp_path):
    # recall 1, 2/3, 0, 1 -> 0.667; exact 1, 0, 0, 1 -> 0.500
    # F1 1, 2 * 1 * (2/3) / (5/3) = 0.8, 0, 1 -> 0.700
    good = write_rows(tmp_path / "good.jsonl", GOOD)
    bad = write_rows(tmp_path / "bad.jsonl", BAD)
    page = page_of(good, bad)
    scores = page.table("4 questions, for example “a”")
    assert list(scores) == ["good", "bad"]
    by_hand = {"seeds": "1", "n": "4", "F1-Recall": "*0.667", "exact": "*0.500", "F1": "*0.700",
               "gold": "0.25", "read": "10", "written": "5", "model s": "0.250"}
    assert scores["good"] | by_hand == scores["good"]
    assert scores["bad"]["F1-Recall"] == "0.000" and scores["bad"]["routing"] == "–"
    assert page.table("F1-Recall by kind") == {
        "good": {"seeds": "1", "x": "*0.833", "y": "*0.500"},
        "bad": {"seeds": "1", "x": "0.000", "y": "0.000"}}
    assert page.table("F1-Recall by hops") == {
        "good": {"seeds": "1", "0": "*0.556", "1": "*1.000"},
        "bad": {"seeds": "1", "0": "0.000", "1": "0.000"}}


def test_fewer_malformed_steps_are_better():
    entries = [[0.5], [0.25], [0.25]]
    marks = ["<b>" in cell for cell in report.cells_of(entries, ".3f", min)]
    assert marks == [False, True, True]
    assert not any("<b>" in cell for cell in report.cells_of(entries, ".3f", None))
    assert report.BETTER["malformed"] is min


def test_seeds_are_one_row_with_their_range_and_other_questions_another_table(tmp_path):
    one = write_rows(tmp_path / "1.jsonl", GOOD)
    two = write_rows(tmp_path / "2.jsonl", BAD)
    three = write_rows(tmp_path / "3.jsonl", GOOD[:1])
    page = page_of(f"ours={one}", f"ours={two}", three)
    scores = page.table("4 questions, for example “a”")
    assert scores["ours"]["F1-Recall"] == "0.333 0.000–0.667"       # alone: not bold
    assert scores["ours"]["seeds"] == "2"
    assert list(page.table("1 questions, for example “a”")) == ["3"]


def test_methods_of_a_file_are_told_apart(tmp_path):
    _, results, _ = report.load([str(write_rows(tmp_path / "r.jsonl", GOOD + BAD))])
    assert [(one.label, len(one.rows)) for one in results] == [("r · router", 4), ("r · direct", 4)]


def log_of(*scores):
    """A log of an update and of validations with these scores."""
    rows = [{"step": 1, "tokens": 5, "seconds": 1.0, "reward": 0.5}]
    for step, score in enumerate(scores, 1):
        validation = {"f1_recall": score, "n": 9, "by_kind": {}, "by_hops": {}}
        rows.append({"step": step, "validation": validation, "seconds": 2.0})
    return rows


def test_validations_and_options(tmp_path):
    folders = [write_run(tmp_path / "a-0", 0, log_of(0.2, 0.6, 0.4), clip=0.2),
               write_run(tmp_path / "a-1", 1, log_of(0.5), clip=0.2),
               write_run(tmp_path / "b-0", 0, log_of(0.1), clip=0.2, mode="outcome"),
               write_run(tmp_path / "c-0", 0, log_of(0.1), clip=0.2),
               write_run(tmp_path / "c-1", 1, log_of(0.1), clip=0.3)]
    page = page_of(*folders)
    best = page.table("Best validation of each run")
    assert list(best) == ["a", "b", "c-0", "c-1"]   # c-0, c-1 differ in their clip: not seeds
    assert best["a"]["F1-Recall"] == "*0.550 0.500–0.600" and best["b"]["F1-Recall"] == "0.100"
    runs = page.table("Runs")
    assert runs["a-1"]["seed"] == "1" and runs["a-1"]["updates"] == "1"
    assert [runs[name]["clip"] for name in ("a-0", "c-1")] == ["0.2", "0.3"]
    assert runs["b-0"]["mode"] == "outcome" and "log_every" not in runs["b-0"]
    told, _, _ = report.load([f"c={folders[3]}", f"c={folders[4]}"])
    assert [run.label for run in told] == ["c", "c"]


def test_confusion_by_hand():
    hops = [hop("q", "text retriever", "x"), hop("r", "table retriever", "y")]
    end = plan("None", "None")
    fault = {"fault": "no tags", "text": "?", "query": "None", "retriever": ["None"]}
    rows = [row("a", "x", "x", plan("q", TEXT), plan("r", TEXT), end, hops=hops),
            row("b", "x", "x", plan("q", TABLE), fault, hops=hops),     # gold None: not reached
            row("c", "x", "x", plan("q", TABLE), end, hops=[]),         # gold: None at once
            row("d", "x", "x", plan("q", TABLE), hops=hops, method="text")]     # chose nothing
    assert report.confusion(rows) == {
        (TEXT, TEXT): 1, (TABLE, TEXT): 1, ("None", "None"): 1, (TEXT, TABLE): 1,
        (TABLE, "malformed"): 1, ("None", "ended"): 1, ("None", TABLE): 1,
        ("past the end", "None"): 1}


# ----------------------------------------------------------------------------------------- curves

LOG = [{"step": 1, "tokens": 80, "outputs": 20, "seconds": 2.0, "reward": 0.25, "kl": 0.0,
        "route:table": 0.5, "answer": None},
       {"step": 2, "tokens": 120, "outputs": 20, "seconds": 5.0, "reward": 0.75, "kl": 0.0,
        "loss": float("nan"), "answer": 1.0},
       {"step": 2, "seconds": 5.0,
        "validation": {"f1_recall": 0.5, "n": 2, "by_kind": {}, "by_hops": {}}}]


def pairs(run, key, x="steps"):
    xs, ys = curves.points(run, key, x)
    return list(zip(xs.tolist(), ys.tolist()))


def test_points_over_each_axis(tmp_path):
    (run,), _, _ = report.load([str(write_run(tmp_path / "r-3", 3, LOG, kl_coef=0.0))])
    assert run.label == "r"
    assert pairs(run, "reward") == [(1, 0.25), (2, 0.75)]
    assert pairs(run, "reward", "tokens") == [(80, 0.25), (200, 0.75)]
    assert pairs(run, "reward", "seconds") == [(2, 0.25), (5, 0.75)]
    assert pairs(run, "validation.f1_recall", "tokens") == [(200, 0.5)]
    assert pairs(run, "answer") == [(2, 1.0)] and pairs(run, "loss") == []      # null, NaN: none
    assert pairs(run, "length") == [(1, 4.0), (2, 6.0)]                         # 80 / 20, 120 / 20
    assert pairs(run, "kl") == []                                   # not computed at coefficient 0
    panels = [key for _, key, *_ in curves.panels_of([run])]
    assert panels == ["validation.f1_recall", "reward", "answer", "route:table", "length"]


def test_trailing_mean_by_hand():
    assert curves.trailing_mean([1.0, 3.0, 5.0, 1.0], 2).tolist() == [1, 2, 4, 3]


def test_eight_labels_have_eight_styles():
    runs = [curves.Run(f"r{i}", f"r{i // 2}", {}, [], []) for i in range(16)]
    styles = curves.styles(runs)
    assert len(set(styles.values())) == 8 and styles["r7"] == (curves.COLOURS[0], "dashed")


def test_seeds_share_a_bold_line_as_far_as_all_go():
    class Axis:
        def __init__(self):
            self.bold = []

        def plot(self, x, y, **style):
            self.bold += [(x, y)] if style["linewidth"] > 1 else []

    runs = []
    for i, points in enumerate([[(0, 0.0), (10, 10.0)], [(2, 4.0), (6, 4.0)]]):
        rows = [{"step": step, "loss": loss} for step, loss in points]
        runs.append(curves.Run(f"a-{i}", "a", {}, rows, []))
    axis = Axis()
    curves.draw_panel(axis, runs, "loss", "steps")
    (x, y), = axis.bold                                     # (x + 4) / 2 from 2 to 6
    assert (x[0], x[-1]) == (2, 6) and (y[0], y[-1]) == pytest.approx((3, 5))


def test_pictures_of_curves(tmp_path):
    folder = write_run(tmp_path / "_$x_0$", 0, LOG)
    runs, _, _ = report.load([str(folder)])
    for x in curves.AXES:
        curves.draw_curves(runs, tmp_path / "all.png", x)
        width, height = Image.open(tmp_path / "all.png").size
        assert width > 1000 and height > 500                # five panels in three columns
    curves.draw_curves(runs, tmp_path / "one.png", "tokens", ["reward"])
    assert Image.open(tmp_path / "one.png").size[0] < 600
    with pytest.raises(ValueError, match="nonsense"):
        curves.draw_curves(runs, tmp_path / "none.png", y=["nonsense"])
    assert report.main([str(folder), "--out", str(tmp_path / "o" / "r.html")]) == 0
    page = Reader((tmp_path / "o" / "r.html").read_text(encoding="utf-8"))
    texts = [attributes.get("alt") for _, attributes in page.elements]
    assert "Reward over updates. _$x_0$: from 0.25 to 0.75" in texts
    classes = [attributes["class"] for tag, attributes in page.elements if tag == "img"]
    assert classes == ["steps", "tokens", "seconds"] * 5


# -------------------------------------------------------------------------- rewards of the steps


class Words:
    """An encoder for which texts are alike, whatever their case, or have nothing in common."""

    def encode_queries(self, texts):
        numbers = {text.lower(): i for i, text in enumerate(dict.fromkeys(texts))}
        return torch.eye(len(texts))[[numbers[text.lower()] for text in texts]]


def totals(row):
    pairs = []
    for pair in report.step_rewards(row, Words()):
        pairs.append(tuple(reward and reward.total for reward in pair))
    return pairs


def test_rewards_of_a_trajectory_by_hand():
    hops = [hop("who leads X?", "text retriever", "ann"),
            hop("how old is ann?", "table retriever", "35")]
    judged = row("q", ["35"], "ann", plan("how old is ann?", TABLE, "36"),
                 plan("Who leads X?", TABLE, "ann"), plan("who leads X?", TEXT, "ann"),
                 plan("how old is ann?", TABLE, "36"), plan("None", "None"), hops=hops)
    # 1 nobody has found Ann so far, so it is measured by the first hop: 0
    # 2 right words, wrong base: 0.5; its answer closes the first hop
    # 3 that hop is closed, and neither words nor base are the second's: 0; what is its answer
    #   worth? nobody knows
    # 4 the second hop asked rightly, 1; its answer is wrong, so it stays open
    # 5 a hop is open, so ending earns 0            final: "ann" is not "35"
    expected = [(0.0, None), (0.5, 1.0), (0.0, None), (1.0, 0.0), (0.0, None), (None, 0.0)]
    assert totals(judged) == expected


def test_ending_in_time_pays_and_unknown_hops_are_not_judged():
    done = row("q", ["x"], "x", plan("None", "None"))
    assert totals(done) == [(1.0, None), (None, 1.0)]
    for other in ({**done, "hops": None}, {**done, "method": "direct"}):
        assert totals(other) == [(None, None)] * 2


# ----------------------------------------------------------------------------------------- markup


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page in which every text that a file can hold is hostile, beside three harmless rows: its
    file."""
    out = tmp_path_factory.mktemp("page")
    Image.new("RGB", (40, 40), "red").save(out / "red.png")
    bad = plan(HOSTILE, TEXT, HOSTILE, ter=[HOSTILE, "plain"], ter_scores=[0.75, 0.5])
    fault = {"fault": HOSTILE, "text": HOSTILE, "query": "None", "retriever": ["None"]}
    how_many = hop("how many?", "table retriever", "7")
    rows = [row(HOSTILE, [HOSTILE], HOSTILE, {**bad, "thought": HOSTILE}, fault, kind=HOSTILE,
                image=HOSTILE, hops=[hop(HOSTILE, "text retriever", HOSTILE)]),
            row("broken \ud800 surrogate", ["x"], "y", kind="look", image="red.png"),
            row("red?", ["red"], "red", kind="look", image="red.png"),
            row("how many?", ["7"], "7", plan("how many?", TABLE, "7"), kind="count",
                hops=[how_many])]
    texts = [HOSTILE, f"<think> {HOSTILE}</think><answer> {HOSTILE}</answer>",
             "<think> x</think><sub-question> s?</sub-question><ret> Table Retriever</ret>"]
    outputs = []
    for text, reward in zip(texts, (0.0, 0.0, 1.0)):
        outputs.append({"text": text, "reward": reward, "advantage": 1.4 * reward - 0.7,
                        "parts": {"similarity": reward, "route": reward}})
    sample = {"step": 3, "label": HOSTILE, "prompt": HOSTILE, "image": HOSTILE, "gold": [HOSTILE],
              "outputs": outputs}
    run = write_run(out / HOSTILE.replace("/", "∕")[:80], 0, LOG, [sample], note=HOSTILE)
    other = write_run(out / "other-0", 0, LOG[:2], note="x")
    results = write_rows(out / f"x{HOSTILE[:30].replace('/', '')}.jsonl", rows)
    page = out / "report.html"
    assert report.main([str(run), str(other), str(results), "--out", str(page)]) == 0
    return page


def test_text_stays_text(hostile):
    markup = hostile.read_text(encoding="utf-8")
    page = Reader(markup)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert {"hostile", "textarea"}.isdisjoint(tags)
    for _, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes)
    # question, thought, sub-question, evidence twice, answer, prompt ...: letter by letter
    assert sum(HOSTILE in text for text in page.texts) >= 12
    kinds = [attributes.get("data-kind") for tag, attributes in page.elements if tag == "article"]
    assert HOSTILE in kinds
    scripts = re.findall(r"<script>.*?</script>", markup, re.DOTALL)
    assert "window.hacked" not in "".join(scripts)


def test_the_page_needs_nothing_but_itself(hostile):
    markup = hostile.read_text(encoding="utf-8")
    page = Reader(markup)
    for tag, attributes in page.elements:
        assert attributes.get("src", "data:image/").startswith("data:image/"), attributes
        assert attributes.get("href", "#").startswith("#")
        assert tag not in ("link", "iframe", "object", "base")
    style = re.search(r"<style>(.*?)</style>", markup, re.DOTALL)[1]
    script = re.search(r"<script>(.*?)</script>", markup, re.DOTALL)[1]
    assert not re.search(r"url\(|@import|https?:", style + script)
    policy = next(attributes["content"] for _, attributes in page.elements
                  if attributes.get("http-equiv") == "Content-Security-Policy")
    ours = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{ours}'" in policy


def test_cards_show_what_was_asked_read_and_earned(hostile):
    page = Reader(hostile.read_text(encoding="utf-8"))
    text = "\n".join(page.texts)
    assert "r\u00a01.000 (similarity 1.00, base 1.00)" in text
    assert "A\u00a0+0.700" in text and "A\u00a0-0.700" in text
    assert "0.750 " in page.texts and "malformed: " in page.texts
    cards = [attributes for tag, attributes in page.elements if tag == "article"]
    assert [card["data-right"] for card in cards] == ["yes", "no", "yes", "yes", "mixed"]
    assert [card["data-base"] for card in cards[:4]] == ["text", "none", "none", "table"]
    photos = [attributes["alt"] for _, attributes in page.elements
              if attributes.get("class") == "photo"]
    assert photos == ["the question's picture"] * 2
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")


def test_few_cards_hold_right_and_wrong_of_each_kind():
    rows = [row(str(i), ["x"], "x" if i < 90 else "y", kind="ab"[i % 2]) for i in range(100)]
    few = report.varied(rows, 4)
    kinds = sorted((row["kind"], report.is_right(row)) for row in few)
    assert kinds == [("a", False), ("a", True), ("b", False), ("b", True)]


# ----------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("words, message", [
    ([], "nothing to report"), (["empty"], "no log.jsonl"), (["none.jsonl"], "none.jsonl"),
    (["strange.jsonl"], "expected a result row"), (["--cards", "0"], "--cards is 0"),
    (["--oops"], "--help"), (["strange.jsonl", "--out", "strange.jsonl"], "ends with .html")])
def test_mistakes_are_told_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_rows(tmp_path / "strange.jsonl", [{"a": 1}])
    assert report.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("change", [
    {"plan_1": "text"}, {"plan_1": {"query": 1, "retriever": ["None"]}},
    {"plan_1": {"query": "q", "retriever": [{}]}}, {"plan_1": {"query": "q", "retriever": []}},
    {"plan_1": {"query": "q", "retriever": "text"}}, {"hops": [{"retriever": "text retriever"}]},
    {"hops": [{"query": "q", "retriever": "text retriever", "answer": {}}]}, {"kind": [1]},
    {"method": {}}, {"cost": 5}, {"cost": {"a": 1}}, {"question": None}, {"llm_answer": [1]}])
def test_rows_of_another_shape_are_left_out(change, tmp_path, capsys):
    path = write_rows(tmp_path / "r.jsonl", [GOOD[1], {**GOOD[0], **change}])
    assert report.main([str(path), "--out", str(tmp_path / "r.html")]) == 2
    assert f"left out: {path}:2: " in capsys.readouterr().err
    assert "<article" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("outputs", [
    None, [], "x", [1], [{"text": "x", "reward": 1.0, "advantage": 0.0}],
    [{"text": 1, "reward": 1.0, "advantage": 0.0, "parts": {}}],
    [{"text": "x", "reward": "1", "advantage": 0.0, "parts": {}}]])
def test_groups_of_another_shape_are_left_out(outputs, tmp_path, capsys):
    good = {"step": 1, "label": "answer", "prompt": "?", "image": None, "gold": ["x"],
            "outputs": [{"text": "x", "reward": 1.0, "advantage": 0.0, "parts": {}}]}
    run = write_run(tmp_path / "a", rows=LOG[:1], samples=[good, {**good, "outputs": outputs}])
    assert report.main([str(run), "--out", str(tmp_path / "r.html")]) == 2
    assert "samples.jsonl:2: " in capsys.readouterr().err


def test_answers_of_others_may_be_texts(tmp_path):
    """Published rows have no thoughts, and an answer may be its text alone."""
    plan = {"query": "q", "retriever": [TEXT], "answer": "an"}
    other = row("q", ["x"], "x", plan, method="theirs", llm_answer="x")
    page = page_of(write_rows(tmp_path / "r.jsonl", [other]))
    assert page.texts.count("an") == 1 and "gold: " in page.texts


def test_a_run_that_has_only_begun(tmp_path, monkeypatch, capsys):
    """A run that was stopped before it logged anew has empty files: no samples, or, of runs/*, no
    run so far."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", rows=[{"step": 1, "tokens": 3}])
    (tmp_path / "runs" / "a" / "samples.jsonl").write_text("")
    write_run(tmp_path / "runs" / "b")
    assert report.main(["runs/a", "--out", "a.html"]) == 0
    assert report.main(["--out", "b.html"]) == 0
    assert "1 runs" in capsys.readouterr().out.splitlines()[-1]


def test_runs_of_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "mine", 0, LOG[:1])
    assert report.main([]) == 0 and "1 runs" in capsys.readouterr().out
    assert "mine" in Reader((tmp_path / "report.html").read_text()).table("Runs")


# -------------------------------------------------------------------------------------- a browser


class Browser:
    """Headless Chromium behind chromedriver, spoken to over its plain HTTP protocol (W3C
    WebDriver)."""

    def __init__(self, driver, chromium, home):
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            match = re.search(r"started successfully on port (\d+)", line)
            if match:
                break
        flags = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", f"--user-data-dir={home}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        wanted = {"browserName": "chrome",
                  "goog:chromeOptions": {"binary": chromium, "args": flags}}
        self.url = f"http://127.0.0.1:{match[1]}"
        session = self.post("/session", capabilities={"alwaysMatch": wanted})
        self.url += f"/session/{session['sessionId']}"

    def post(self, path, method="POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data,
                                         {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def run(self, script, *words):
        return self.post("/execute/sync", script=script, args=list(words))

    def open(self, address, width):
        self.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride",
                  params={"width": width, "height": 900, "deviceScaleFactor": 1,
                          "mobile": width < 500})
        self.post("/url", url="about:blank")
        self.post("/url", url=address)

    def choose(self, name, value):
        """Picks an option of a filter as a user does."""
        path = f"select[name={name}] option[value='{value}']"
        element = self.post("/element", using="css selector", value=path)
        self.post(f"/element/{next(iter(element.values()))}/click")

    def shown(self):
        return self.run("return [document.querySelector('.filters output').textContent, "
                        "[...document.querySelectorAll('.card')].filter(c => c.offsetHeight)"
                        ".map(c => c.querySelector('h3').textContent)]")

    def close(self):
        try:
            self.post("", method="DELETE")
        finally:
            self.process.terminate()
            self.process.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if not driver or not chromium:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    browser = Browser(driver, chromium, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_filters_in_a_browser(hostile, browser):
    browser.open(hostile.as_uri(), 1280)
    assert browser.shown()[0] == "5 of 5 shown"
    browser.choose("kind", "look")
    assert browser.shown()[0] == "2 of 5 shown"
    assert browser.run("return location.hash") == "#kind=look"
    browser.choose("right", "yes")
    assert browser.shown() == ["1 of 5 shown", ["red?"]]
    browser.run("document.querySelector('button[type=reset]').click()")
    browser.choose("base", "table")
    assert browser.shown() == ["1 of 5 shown", ["how many?"]]
    browser.open(hostile.as_uri() + "#right=mixed&kind=no+such", 1280)      # as somebody sent it
    assert browser.shown()[0] == "1 of 5 shown"


def test_no_text_runs_in_a_browser(hostile, browser):
    browser.open(hostile.as_uri(), 1280)
    assert browser.run("return window.hacked ?? null") is None
    assert browser.run("return document.querySelectorAll('hostile, script').length") == 1


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_width(width, hostile, browser):
    browser.open(hostile.as_uri(), width)
    inner, content = browser.run("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width and content <= width                      # nothing to scroll sideways
    columns = browser.run("return new Set([...document.querySelectorAll('.card')]"
                          ".map(c => c.offsetLeft)).size")
    assert columns == (2 if width > 1000 else 1)


def test_the_axis_is_chosen_with_a_button(hostile, browser):
    browser.open(hostile.as_uri(), 1280)
    seen = ("const seen = [...document.querySelectorAll('#curves img')]"
            ".filter(i => i.offsetHeight); return [...new Set(seen.map(i => i.className))]")
    assert browser.run(seen) == ["steps"]
    browser.run("document.querySelector('label[for=x-tokens]').click()")
    assert browser.run(seen) == ["tokens"]


def test_parts_without_anything_to_show_are_hidden(tmp_path, browser):
    visible = ("return [...document.querySelectorAll('section, nav a, .filters')]"
               ".filter(e => e.offsetHeight).map(e => e.id || e.className || e.textContent)")
    page = tmp_path / "r.html"
    run = write_run(tmp_path / "a", rows=LOG[:1])
    assert report.main([str(run), "--out", str(page)]) == 0
    browser.open(page.as_uri(), 1280)
    assert browser.run(visible) == ["Runs", "Curves", "Trajectories", "runs", "curves",
                                    "trajectories"]
    results = write_rows(tmp_path / "r.jsonl", [{**row("q", ["x"], "x"), "hops": None}])
    assert report.main([str(results), "--out", str(page)]) == 0
    browser.open(page.as_uri(), 1280)
    assert browser.run(visible) == ["Scores", "Trajectories", "scores", "trajectories", "filters"]
