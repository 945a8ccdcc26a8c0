"""What the rows of the study add up to: the tables and figures of docs/results.md and the README.

    rows of results/*.jsonl -> lines of a table, seeds together -> Markdown between <!-- NAME -->
                                                                   and <!-- end -->
                            -> PNG files
"""
from dataclasses import replace
from statistics import mean, stdev

import numpy as np

from lab.curves import COLOURS, Run, draw_curves
from lab.scores import rows_of
from parts.evaluate import paired
from plumbing.files import write_text

STEP, STATE, TRAJECTORY = "Step-GRPO", "credit by state", "credit by trajectory"
SFT, BARE, REJECTION = "SFT", "SFT without thoughts", "rejection sampling"


def write_tables(rows, out, page=None):
    """rows: {part: rows of today's plan}. Draws the figures, and where a page is given, fills it
    and the README beside it. Returns what the study has cost, and its goals."""
    draw_figures(rows, out)
    parts = sections(rows, out)
    for path in (page, page.parents[1] / "README.md") if page else ():
        write_text(path, fill(path.read_text(encoding="utf-8"), parts))
    hours = sum(row["cpu_seconds"] for some in rows.values() for row in some) / 3600
    return {"rows": {part: len(some) for part, some in rows.items()},
            "core_hours": round(hours, 2), "goals": goals(rows)}


def sections(rows, out):
    """Everything that the pages show of the rows: {name of the place: text}."""
    parts = {"main": main_table, "main in short": short_table, "pairs": pairs_table,
             "kinds": kinds_table, "rates": rates_table,
             "dials": dials_table, "dial pairs": dial_pairs, "annotation": annotation_table,
             "axis": axis_table, "depth": depth_table, "next": next_table,
             "ablation": ablation_table, "steps": steps_table, "cost": cost_table}
    texts = {}
    for name, make in parts.items():
        try:
            texts[name] = make(rows)
        except NoRows:
            texts[name] = "(not run yet)"
    texts["goals"] = goal_table(rows)
    texts["speed"] = speeds(rows_of(out / "bench.jsonl"))
    return texts


def fill(text, parts):
    """A page with its generated places written anew: what stands between <!-- NAME --> and
    <!-- end --> is replaced. Places that it has not got are passed over."""
    end = "<!-- end -->"
    for name, content in parts.items():
        begin = f"<!-- {name} -->"
        if begin in text:
            before, behind = text.split(begin, 1)
            text = f"{before}{begin}\n{content}\n{end}{behind.split(end, 1)[1]}"
    return text


# ------------------------------------------------------------------------------- numbers of a row


class NoRows(Exception):
    """A part of the study was not run yet."""


def lines_of(rows, *keys):
    """Rows that agree in these fields, seeds together: {values of the fields: rows}. NoRows where
    there is none."""
    lines = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in keys), []).append(row)
    if not lines:
        raise NoRows
    return lines


def score(row, name="f1_recall"):
    """The mean of a score over the tests of a row; None where they have none."""
    values = [test[name] for test in row["tests"].values() if test.get(name) is not None]
    return mean(values) if values else None


def scores(some, name="f1_recall"):
    """The score of each seed."""
    values = [score(row, name) for row in some]
    return [value for value in values if value is not None]


def kind_scores(row):
    """{kind: F1-Recall}, means over the tests."""
    by_kind = {}
    for test in row["tests"].values():
        for kind, value in test["by_kind"].items():
            by_kind.setdefault(kind, []).append(value)
    return {kind: mean(values) for kind, values in by_kind.items()}


def right(some):
    """(questions,): the share of the seeds that are right on each question of all tests."""
    digits = []
    for row in some:
        digits.append([int(digit) for test in row["tests"].values() for digit in test["right"]])
    return np.mean(digits, axis=0)


def gain(some, others):
    """The paired comparison of two lines of a table over the same questions; also by seed."""
    result = paired(right(some) - right(others))
    of_seeds = {row["seed"]: score(row) for row in others}
    return {**result, "seeds": [score(row) - of_seeds[row["seed"]] for row in some
                                if row["seed"] in of_seeds]}


def best_validation(row):
    return max(point["f1_recall"] for point in row["curve"])


def at_tokens(row, limit):
    """The best validation before so many tokens were sampled."""
    return max((p["f1_recall"] for p in row["curve"] if p["tokens"] <= limit), default=None)


# ----------------------------------------------------------------------------------------- cells


def table(header, rows):
    """Rows of cells -> a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def average(values, form=".3f"):
    return format(mean(values), form) if values else "-"


def spread(values, form=".3f"):
    """A score over seeds: the mean, and where there are several the deviation and each seed's."""
    if len(values) < 2:
        return average(values, form)
    each = " / ".join(format(value, form) for value in values)
    return f"{mean(values):{form}} ± {stdev(values):{form}} ({each})"


def short(values, form=".2f"):
    """The mean and the deviation alone."""
    if len(values) < 2:
        return average(values, form)
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def difference(result):
    """A paired comparison in a cell: level where the interval has 0 in it, or seeds disagree."""
    low, high = result["ci"]
    signs = {value > 0 for value in result["seeds"] if value}
    level = low <= 0 <= high or len(signs) > 1
    words = f"{result['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
    return words + (", level" if level else "")


# ----------------------------------------------------------------------------------------- tables


def main_table(rows):
    lines = lines_of(rows["main"], "name")
    limit = token_limit(lines)
    header = ["", "needs", "F1-Recall, mean ± sd (each seed)", "routing", "retrievals (gold)",
              "worst kind of any seed", "updates", "minutes", "tokens sampled",
              f"validation at {limit / 1e6:.2f} M tokens"]
    cells = []
    for (name,), some in lines.items():
        low, kind = worst_kind(some)
        cost = ["-"] * 4                                # of what was not trained
        if some[0]["curve"]:
            last = [row["curve"][-1] for row in some]
            sampled = [point["tokens"] for point in last]
            at_limit = [at_tokens(row, limit) for row in some]
            cost = [average([updates(row) for row in some], ".0f"),
                    average([point["seconds"] / 60 for point in last], ".1f"),
                    f"{mean(sampled) / 1e6:.2f} M" if any(sampled) else "-",
                    average(at_limit) if any(sampled) and None not in at_limit else "-"]
        cells.append([name, some[0]["needs"], spread(scores(some)),
                      average(scores(some, "route_accuracy")),
                      f"{average(scores(some, 'retrievals'), '.2f')} "
                      f"({average(scores(some, 'gold_retrievals'), '.2f')})",
                      f"{kind} {low:.2f}", *cost])
    return table(header, cells)


def token_limit(lines):
    """How many tokens every run of every method sampled that goes on sampling: rejection sampling
    has fewer, and stands there with all of its own."""
    totals = []
    for (name,), some in lines.items():
        if name != REJECTION:
            totals += [row["curve"][-1]["tokens"] for row in some if row["curve"]]
    return min((tokens for tokens in totals if tokens), default=0)


def short_table(rows):
    """The main table for the README."""
    cells = []
    for (name,), some in lines_of(rows["main"], "name").items():
        cells.append([name, some[0]["needs"], spread(scores(some)),
                      average(scores(some, "route_accuracy")),
                      average(scores(some, "retrievals"), ".2f")])
    return table(["", "needs", "F1-Recall, mean ± sd (each seed)", "routing", "retrievals"], cells)


def updates(row):
    """Updates of a run; of rounds in a row, of all."""
    total, last = 0, 0
    for point in row["curve"]:
        total += point["step"] - (last if point["step"] > last else 0)
        last = point["step"]
    return total


def worst_kind(some):
    return min((value, kind) for row in some for kind, value in kind_scores(row).items())


def pairs_table(rows):
    """Each method against Step-GRPO on the same questions."""
    lines = lines_of(rows["main"], "name")
    cells = []
    for (name,), some in lines.items():
        if name != STEP:
            result = gain(some, lines[STEP,])
            each = " / ".join(f"{value:+.3f}" for value in result["seeds"])
            cells.append([name, difference(result), each if len(some) > 1 else "-"])
    return table(["less Step-GRPO", "F1-Recall (95 % over questions)", "each seed"], cells)


def kinds_table(rows):
    """F1-Recall by kind, means over seeds; a column a method."""
    lines = lines_of(rows["main"], "name")
    columns = [[kind_scores(row) for row in some] for some in lines.values()]
    cells = []
    for kind in sorted(columns[0][0]):
        cells.append([kind, *(average([row[kind] for row in some], ".2f") for some in columns)])
    return table(["", *(name for (name,) in lines)], cells)


def rates_table(rows):
    """The best validation of each rate; the best of a method is bold."""
    lines = lines_of(rows["rates"], "name", "rate")
    rates = sorted({rate for _, rate in lines})
    cells = []
    for name in dict.fromkeys(name for name, _ in lines):
        values = {rate: best_validation(lines[name, rate][0]) for rate in rates
                  if (name, rate) in lines}
        top = max(values.values())
        cells.append([name, *(rate_cell(values.get(rate), top) for rate in rates)])
    return table(["", *(f"{rate:.2g}" for rate in rates)], cells)


def rate_cell(value, top):
    if value is None:
        return "-"
    return f"**{value:.3f}**" if value == top else f"{value:.3f}"


def dials_table(rows):
    """F1-Recall on each dial, and what is particular to it."""
    lines = lines_of(rows["dials"], "name", "setting")
    dials = list(dict.fromkeys(setting for _, setting in lines))
    header = [""]
    for dial in dials:
        header.append(dial)
        header += {"unanswerable": ["abstention F1 (precision, recall)"],
                   "moved": ["recovery"]}.get(dial, [])
    cells = []
    for name in dict.fromkeys(name for name, _ in lines):
        line = [name]
        for dial in dials:
            some = lines.get((name, dial), [])
            line.append(short(scores(some), ".3f"))
            if dial == "unanswerable":
                line.append(abstention_cell(some))
            if dial == "moved":
                line.append(short([kind_scores(row)["moved"] for row in some], ".3f"))
        cells.append(line)
    return table(header, cells)


def abstention_of(some, name="f1"):
    return [test["abstention"][name] for row in some for test in row["tests"].values()]


def abstention_cell(some):
    if not some:
        return "-"
    return (f"{short(abstention_of(some))} ({average(abstention_of(some, 'precision'), '.2f')}, "
            f"{average(abstention_of(some, 'recall'), '.2f')})")


def dial_pairs(rows):
    """Each trained method against Step-GRPO, on each dial."""
    lines = lines_of(rows["dials"], "name", "setting")
    dials = list(dict.fromkeys(setting for _, setting in lines))
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows["dials"] if row["kind"] == "train"):
        if name != STEP:
            cells.append([name, *(difference(gain(lines[name, dial], lines[STEP, dial]))
                                  for dial in dials if (name, dial) in lines)])
    return table(["less Step-GRPO", *dials], cells)


def annotation_table(rows):
    """F1-Recall by the number of annotated questions."""
    lines = lines_of(rows["annotation"], "name", "tag")
    tags = list(dict.fromkeys(tag for _, tag in lines))
    cells = []
    for name in dict.fromkeys(name for name, _ in lines):
        cells.append([name, *(spread(scores(lines.get((name, tag), []))) for tag in tags)])
    return table(["annotated questions", *map(tag_title, tags)], cells)


def tag_title(tag):
    return {"": "3,000", "-wrong": "3,000, 40 % of the routes wrong"}.get(tag, tag.strip("-"))


def axis_table(rows):
    """F1-Recall by how often the start is right."""
    lines = lines_of(rows["axis"], "name", "start")
    starts = [start for name, start in lines if name == "start"]
    often = {start: score(lines["start", start][0]) for start in starts}
    starts.sort(key=often.get)
    cells = []
    for name in dict.fromkeys(name for name, _ in lines if name != "start"):
        cells.append([name, *(spread(scores(lines.get((name, start), []))) for start in starts)])
    return table(["the start, sampled, is right in", *(f"{often[start]:.3f}" for start in starts)],
                 cells)


def depth_table(rows):
    """F1-Recall of each test of depth, a line a recipe; and with gold sub-questions and routes."""
    lines = lines_of(rows["depth"], "name")
    titles = ["two hops", "three", "three, unseen", "four", "four, unseen", "five"]
    cells = []
    for (name,), some in lines.items():
        for method in ("router", "oracle"):
            tests = [[test for key, test in row["tests"].items() if key.endswith(method)]
                     for row in some]
            columns = [short([test["f1_recall"] for test in column]) for column in zip(*tests)]
            columns += ["-"] * (len(titles) - len(columns))
            cells.append([f"{name.removeprefix('to ')}: {method}", *columns])
    return table(["trained on two hops and", *titles], cells)


def next_table(rows):
    lines = lines_of(rows["next"], "name")
    cells = []
    for (name,), some in lines.items():
        cells.append([name, some[0]["needs"], spread(scores(some)),
                      average(scores(some, "retrievals"), ".2f")])
    return table(["", "needs", "four hops: F1-Recall", "retrievals (gold 4)"], cells)


def ablation_table(rows):
    lines, cells = lines_of(rows["ablation"], "name"), []
    plain = [row for row in rows["annotation"] if row["name"] in (STEP, STATE) and not row["tag"]]
    for (name,), some in {**(lines_of(plain, "name") if plain else {}), **lines}.items():
        low, kind = worst_kind(some)
        cells.append([name, spread(scores(some)), average(scores(some, "route_accuracy")),
                      average(scores(some, "retrievals"), ".2f"), f"{kind} {low:.2f}"])
    return table(["", "F1-Recall", "routing", "retrievals", "worst kind of any seed"], cells)


def steps_table(rows):
    """How the reward of a step predicts the end; means over seeds."""
    lines = lines_of(rows["steps"], "name")
    cells = []
    for (name,), some in lines.items():
        found = [next(iter(row["tests"].values()))["steps"] for row in some]
        for kind in found[0]:
            there = [one[kind] for one in found if kind in one]
            cells.append([name, kind, *(average(known(there, key), form) for key, form in
                                        (("n", ".0f"), ("right", ".2f"), ("corr", ".2f"),
                                         ("end_if_right", ".2f"), ("end_if_wrong", ".2f")))])
    return table(["Step-GRPO after", "step", "n", "full reward", "correlation with the end",
                  "right in the end if so", "if not"], cells)


def known(some, key):
    return [one[key] for one in some if one[key] is not None]


def cost_table(rows):
    """What a question costs, one at a time."""
    cells = []
    for (name,), [row, *_] in lines_of(rows["cost"], "name").items():
        [test] = row["tests"].values()
        line = [name, f"{test['f1_recall']:.3f}", f"{test['model_calls']:.2f}",
                f"{test['retrievals']:.2f}", f"{test['tokens_read']:.0f}",
                f"{test['tokens_written']:.0f}"]
        for stage in ("model", "search", "both"):
            line.append(" / ".join(f"{1e3 * seconds:.1f}" for seconds in test["latency"][stage]))
        cells.append(line)
    return table(["", "F1-Recall", "model calls", "searches", "tokens read", "written",
                  "model ms, p50 / p95", "search ms", "both"], cells)


def speeds(lines):
    """The JSON lines of lab.bench -> a table, a line a figure; of a figure measured twice the later
    one."""
    latest = {}
    for line in lines:
        for part, figures in line["figures"].items():
            for name, figure in figures.items():
                latest[part, name] = figure, line["command"]
    rows = []
    for (_, name), (figure, bench) in latest.items():
        value, against, goal = figure["value"], "", ""
        if "ratio" in figure:
            against = f"{figure['ratio']:.2f} × {figure['peer']}"
        if "rounds" in figure:
            against += " ({:.2f} to {:.2f})".format(*figure["rounds"])
        if "goal" in figure:
            goal = figure["goal"].replace(">=", "at least").replace("<=", "at most")
            goal += "" if figure["met"] else ": missed"
        number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        rows.append([f"`{bench}`", name, f"{number} {figure['unit']}", against, goal])
    return table(["command", "what", "ours", "against: median (rounds)", "goal"], rows)


# ------------------------------------------------------------------------------------------ goals


def goals(rows):
    """What was wanted of the study before it ran, what came, and whether it holds; None where the
    part was not run yet."""
    main = {name: some for (name,), some in lines(rows["main"], "name").items()}
    dials = lines(rows["dials"], "name", "setting")
    trained = {row["name"] for row in rows["dials"] if row["kind"] == "train"}
    best_abstention = best(trained, dials, "unanswerable", abstention_of)
    best_recovery = best(trained - {SFT}, dials, "moved", recovery_of)
    wanted = [
        ("Step-GRPO: F1-Recall", 0.95, scores(main.get(STEP, []))),
        ("Step-GRPO: routing", 0.99, scores(main.get(STEP, []), "route_accuracy")),
        ("credit by state from final answers alone: F1-Recall", 0.95, scores(main.get(STATE, []))),
        ("abstention F1 of the best method", 0.85, best_abstention),
        ("recovery of the best method without SFT", 0.80, best_recovery),
        ("unseen depth from 256 questions, the best method", 0.50, best_next(rows)),
        ("unseen depth from 256 final answers alone", 0.50,
         scores([row for row in rows["next"] if row["name"] == STATE]))]
    return [{"goal": goal, "at_least": least, "got": round(mean(got), 4) if got else None,
             "holds": mean(got) >= least if got else None} for goal, least, got in wanted]


def lines(rows, *keys):
    return lines_of(rows, *keys) if rows else {}


def recovery_of(some):
    return [kind_scores(row)["moved"] for row in some]


def best(names, dials, dial, measure):
    """The seeds' values of the method that is best on a dial; none where nothing was run."""
    values = [measure(dials[name, dial]) for name in names if (name, dial) in dials]
    return max(values, key=mean, default=[])


def best_next(rows):
    values = [scores(some) for (name,), some in lines(rows["next"], "name").items()
              if name not in ("start", "oracle")]
    return max(values, key=mean, default=[])


def expectations(rows):
    """Differences that were expected, with their intervals: [(what, expected, got)]."""
    main = {name: some for (name,), some in lines(rows["main"], "name").items()}
    cells = []
    for a, b, expected in ((STATE, TRAJECTORY, "at least 0.15"), (STEP, BARE, "0.02 to 0.05")):
        got = difference(gain(main[a], main[b])) if a in main and b in main else "(not run yet)"
        cells.append([f"{a} less {b}", expected, got, ""])
    dials, distance = lines(rows["dials"], "name", "setting"), "(not run yet)"
    trained = {row["name"] for row in rows["dials"] if row["kind"] == "train"}
    of_others, of_sft = (best(names, dials, "moved", recovery_of)
                         for names in (trained - {SFT}, trained & {SFT}))
    if of_others and of_sft:
        distance = f"{mean(of_others) - mean(of_sft):+.3f}"
    cells.append(["recovery: the best other less SFT", "whatever it is", distance, ""])
    return cells


def goal_table(rows):
    words = {True: "yes", False: "**no**", None: "(not run yet)"}
    cells = []
    for goal in goals(rows):
        got = "-" if goal["got"] is None else f"{goal['got']:.3f}"
        cells.append([goal["goal"], f"at least {goal['at_least']}", got, words[goal["holds"]]])
    return table(["wanted or expected", "", "got", "holds"], [*cells, *expectations(rows)])


# ---------------------------------------------------------------------------------------- figures


def draw_figures(rows, out):
    """Curves of the main comparison; lines over annotation and over how often a start is right."""
    runs = []
    for row in rows["main"]:
        points = [{"step": point["step"], "seconds": point["seconds"], "sampled": point["tokens"],
                   **{f"validation.{key}": value for key, value in point.items()}}
                  for point in row["curve"]]
        if points:
            runs.append(Run(f"{row['name']}-{row['seed']}", row["name"], {}, points, []))
    # what samples nothing (sft) has no line over tokens
    sampling = [run if run.rows[-1]["sampled"] else replace(run, rows=[]) for run in runs]
    panels = ["validation.f1_recall", "validation.route_accuracy"]
    if runs:
        draw_curves(runs, out / "main-seconds.png", x="seconds", y=panels, columns=2)
        draw_curves(sampling, out / "main-tokens.png", x="tokens", y=panels, columns=2)
    counts = {"-30": 30, "-300": 300, "": 3000}
    some = [row for row in rows["annotation"] if row["tag"] in counts]
    if some:
        places = {(row["tag"],): counts[row["tag"]] for row in some}
        draw_lines(some, ("tag",), places, "annotated questions", out / "annotation.png")
    starts = {(row["start"],): score(row) for row in rows["axis"] if row["name"] == "start"}
    some = [row for row in rows["axis"] if (row["start"],) in starts and row["name"] != "start"]
    if some:
        draw_lines(some, ("start",), starts, "how often the start is right", out / "axis.png")


def draw_lines(rows, keys, places, title, path):
    """F1-Recall of each method over a number, on a logarithmic axis; bars are the seeds' range."""
    from matplotlib.figure import Figure                # here, since only figures need it
    figure = Figure(figsize=(5.4, 3.2), dpi=140, layout="constrained")
    ax = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = lines_of([row for row in rows if row["name"] == name], *keys)
        xs = sorted(own, key=places.get)
        values = [scores(own[x]) for x in xs]
        means = [mean(some) for some in values]
        low = [m - min(some) for m, some in zip(means, values)]
        high = [max(some) - m for m, some in zip(means, values)]
        ax.errorbar([max(places[x], 1e-3) for x in xs], means, yerr=[low, high], label=name,
                    color=COLOURS[i], marker="o", markersize=4, capsize=2, linewidth=1.6)
    ax.set_xscale("log")
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel(title, fontsize=9)
    ax.set_ylabel("F1-Recall", fontsize=9)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8)
    figure.savefig(path, format="png")
