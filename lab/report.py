"""The report: what training runs and evaluations wrote becomes one HTML page that needs nothing but itself.

    run folders (options.json, log.jsonl, samples.jsonl if any) -> Run     -> curves (PNG), scores, groups as cards
    result files of infer.py --out (JSONL, a row a question)    -> Results -> scores, gold base x chosen base, cards
                                                                   all of it -> report.html

In reading order: 1 what is read, 2 markup, 3 curves, 4 tables, 5 rewards of the steps of a result row, 6 cards, 7 the
page with its style and script, 8 the command line. `curves` and `score_tables` also serve scripts that have runs.

Runs (or result files) of one label are seeds of one configuration: they share a colour, and tables show their mean and
range. A run's label is its folder's name without the seed at its end, a result file's is its name; LABEL=PATH gives
another.

samples.jsonl, a line a group:   {"step": 12, "label": "table retriever", "prompt": problem, "image": path or null,
    "gold": [sub-questions or answers], "outputs": [{"text", "reward", "advantage", "parts": {"route": 1.0, ...}}]}

All text in the files is foreign: `el` escapes whatever it has not made itself, and the page's policy (CSP) runs no
script but ours and loads nothing.
"""
import base64
import hashlib
import html
import io
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np

from grpo import Reward, RewardOptions, similarity_table, step_reward
from parts.evaluate import evaluate, score_row
from parts.pretrained import load_encoder
from parts.questions import HERE, gold_routes, golds_of, plans_of, predicted
from parts.score import answer_scores
from parts.steps import (NONE, PREFIX, ROUTES, RouteStep, StepError, parse_step, render_answer,
                         render_route)
from parts.vision import load_picture
from plumbing.old import OneLineParser, printable, read_json, read_rows

# ------------------------------------------------------------------------------------------------------ 1 what is read


@dataclass(frozen=True)
class Run:
    """A training run. Its log rows have, beside what train.py wrote, "sampled" (tokens so far), "length" (tokens an
    output) and "validation.NAME"."""
    name: str
    label: str
    options: dict
    rows: list
    samples: list       # rows of samples.jsonl


@dataclass(frozen=True)
class Results:
    """The result rows of one method."""
    label: str
    rows: list
    folder: Path        # pictures are looked for here, too


def load(inputs):
    """["DIR", "FILE", "LABEL=PATH", ...] -> (list of Run, list of Results, what was left out)."""
    runs, labels, results, faults = [], [], [], []
    for word in inputs:
        path, label = labelled(word)
        if path.is_dir():
            run, left_out = load_run(path)
            runs, labels = [*runs, run], [*labels, label]
        else:
            found, left_out = load_results(path, label)
            results += found
        faults += left_out
    runs = [replace(run, label=label) if label else run for run, label in zip(own_labels(runs), labels)]
    return runs, results, faults


def labelled(word):
    """PATH or LABEL=PATH -> (path, label or None)."""
    label, _, name = word.partition("=")
    return (Path(word), None) if Path(word).exists() or not name else (Path(name), label)


def load_run(folder):
    """A run folder of train.py -> (Run, faults)."""
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder}: no log.jsonl in it: name a folder that train.py has written (its --out)")
    options = read_json(folder / "options.json") if (folder / "options.json").is_file() else {}
    if not isinstance(options.get("group", 0), int):
        raise ValueError(f"{folder / 'options.json'}: group is {options['group']!r}: expected a whole number")
    rows, faults = read_rows(folder / "log.jsonl", check_log)
    sampled, stepwise = 0, options.get("mode") in ("online", "offline")
    for row in rows:
        sampled = row["sampled"] = sampled + row.get("tokens", 0)
        row.update({f"validation.{name}": value for name, value in row.get("validation", {}).items()})
        outputs = row.get("outputs") or (stepwise and row.get("groups", 0) * options.get("group", 0))
        if outputs:
            row["length"] = row.get("tokens", 0) / outputs
    here = (folder / "samples.jsonl").is_file() and (folder / "samples.jsonl").stat().st_size    # empty: none so far
    samples, more = read_rows(folder / "samples.jsonl", check_sample) if here else ([], [])
    name = folder.resolve().name
    return Run(name, name.removesuffix(f"-{options.get('seed')}"), options, rows, samples), faults + more


def load_results(path, label=None):
    """A result file of infer.py or of others -> ([Results] of each method, faults)."""
    rows, faults = read_rows(path, check_result)
    methods, label = list(dict.fromkeys(row.get("method") for row in rows)), label or path.stem
    return [Results(label if len(methods) == 1 else f"{label} · {method}",
                    [row for row in rows if row.get("method") == method], path.parent) for method in methods], faults


def check_log(row, number):
    result = row.get("validation", {"f1_recall": 0.0, "n": 0})
    counted = [row.get("step"), *(row.get(name, 0) for name in ("tokens", "outputs", "groups"))]
    if not (all(isinstance(n, int) and 0 <= n < 2 ** 53 for n in counted) and isinstance(result, dict)
            and isinstance(row.get("seconds", 0.0), (int, float)) and -1e300 < row.get("seconds", 0.0) < 1e300
            and isinstance(result.get("f1_recall"), (int, float)) and isinstance(result.get("n"), int)):
        raise ValueError("expected a line of train.py's log, with 'step' and 'tokens', or 'step' and 'validation'")
    return row


def check_sample(row, number):
    outputs = row.get("outputs")
    if not (isinstance(outputs, list) and outputs and all(
            isinstance(x, dict) and isinstance(x.get("text"), str) and isinstance(x.get("parts"), dict)
            and all(isinstance(v, (int, float, type(None))) for v in x["parts"].values())
            and all(isinstance(x.get(name), (int, float)) for name in ("reward", "advantage")) for x in outputs)):
        raise ValueError("expected a group with 'outputs': [{'text', 'reward', 'advantage', 'parts': {...}}, ...]")
    return row


def check_result(row, number):
    """A result row of whoever wrote it, such that the page can count on its shape."""
    plans, names = plans_of(row), (row.get("kind"), row.get("method"))
    if not isinstance(row.get("question"), str) or not all(isinstance(name, (str, type(None))) for name in names):
        raise ValueError("expected a result row as infer.py --out writes it: 'question', plan_1 ..., 'llm_answer'")
    if not all(isinstance(plan, dict) and isinstance(plan.get("query"), str) and isinstance(plan.get("retriever"), list)
               and plan["retriever"] and all(isinstance(name, str) for name in plan["retriever"]) for plan in plans):
        raise ValueError("expected each plan to be {'thought', 'query', 'retriever': [names], ...}")
    gold_routes(row)
    if not all(isinstance(hop.get("query"), str) and "answer" in hop for hop in row.get("hops") or ()):
        raise ValueError("expected hops of {'query', 'retriever', 'answer'}")
    try:
        score_row(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot be scored ({type(error).__name__}: {error}): expected 'cost' as infer.py writes "
                         "it, or none") from None
    return row


def own_labels(runs):
    """Runs that would share a label, but differ in more than their seed, are called by their names."""
    groups = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return [replace(run, label=run.name) if differing(groups[run.label]) else run for run in runs]


def differing(runs):
    """Names of the options by which runs differ; one that an older run does not have says nothing."""
    names = {name for run in runs for name in run.options} - {"out", "seed", "threads", "log_every", "save_every"}
    return sorted(n for n in names if len({str(run.options[n]) for run in runs if n in run.options}) > 1)


# ------------------------------------------------------------------------------------------------------------ 2 markup


class Html(str):
    """Text that is markup already. `el` escapes every other text, so what is forgotten is escaped."""


def el(name, /, *inside, **attributes):
    """An element: text is escaped, Html is not. Attributes of None are left out; aria_label is aria-label."""
    words = {key.rstrip("_").replace("_", "-"): html.escape(str(v)) for key, v in attributes.items() if v is not None}
    start = f"<{name}" + "".join(f' {key}="{value}"' for key, value in words.items()) + ">"
    if name in ("img", "input", "meta"):
        return Html(start)
    return Html(start + "".join(x if isinstance(x, Html) else html.escape(str(x)) for x in inside) + f"</{name}>")


def section(name, title, note, *inside):
    return el("section", el("h2", title), el("p", note), *inside, id=name)


def table(title, header, rows):
    """Rows of cells (text or markup), the first of each its heading; a wide table scrolls in its own box."""
    head = el("tr", *(el("th", cell, scope="col") for cell in header))
    body = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    whole = el("table", el("thead", head), el("tbody", *body), aria_label=title)
    return el("div", el("h3", title), el("div", whole, class_="wide", tabindex="0", role="region", aria_label=title))


def embedded(kind, stream):
    """The bytes of a picture as an address that holds them."""
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------------ 3 curves

AXES = {"steps": ("step", "updates"), "tokens": ("sampled", "tokens sampled (sft: read)"),
        "seconds": ("seconds", "seconds of training")}
PANELS = (  # group, key of a log row, title, what it says, whether it is a share from 0 to 1
    ("Validation", "validation.f1_recall", "Validation F1-Recall", "right answers on held-out names, greedy", True),
    ("Validation", "validation.route_accuracy", "Validation routing", "bases chosen as in the gold chain", True),
    ("Validation", "validation.retrievals", "Validation retrievals", "searches per question", False),
    ("Validation", "validation.malformed", "Validation malformed", "steps per question that cannot be read", False),
    ("Reward", "reward", "Reward", "mean over the sampled outputs (outcome mode: over trajectories)", True),
    ("Reward", "form", "Well-formed", "outputs that can be read as their kind of step", True),
    ("Reward", "similarity", "Similarity", "of the sub-question to the nearest gold one", True),
    ("Reward", "route", "Right base", "routing steps that name the gold base", True),
    ("Reward", "answer", "Right answer", "reward of answering steps", True),
    ("Routing by gold base", "route:", "Gold base: ", "right bases, in groups whose gold base it is", True),
    ("Routing by gold base", "mixed:", "Mixed groups: ", "share of the groups where this base is gold", True),
    ("Bases asked for", "asked:", "Asked for: ", "share of all sampled routing steps", False),
    ("Update", "flat_groups", "Flat groups", "groups whose outputs all earned the same: they teach nothing", True),
    ("Update", "entropy", "Entropy", "of the next token, in nats, mean over sampled tokens", False),
    ("Update", "kl", "KL", "distance to the reference policy (k3), per token", False),
    ("Update", "clip_fraction", "Clip fraction", "tokens whose ratio is clipped (0 with one update per batch)", False),
    ("Update", "length", "Output length", "sampled tokens per output", False),
    ("Update", "loss", "Loss", "of the update", False),
    ("Update", "grad_norm", "Gradient norm", "before clipping", False),
    ("Update", "learning_rate", "Learning rate", "as used", False))
COLOURS = ("#0072b2", "#d55e00", "#00795a", "#a3417f", "#6b5b00", "#3a3a3a", "#2b8cd8")  # for colour-blind eyes, too
DASHES = ("solid", "dashed", "dotted")
SMOOTHING = 25  # a curve is the mean over the last 1/25 of its points


def points(run, key, x="steps"):
    """Two arrays (n,): the x axis and the finite values of a log key. A KL that was not computed has none."""
    number = lambda v: isinstance(v, (int, float)) and math.isfinite(v)
    rows = run.rows if key != "kl" or run.options.get("kl_coef") else ()
    kept = [(row[AXES[x][0]], row[key]) for row in rows if number(row.get(key)) and number(row.get(AXES[x][0]))]
    return tuple(np.array(kept, dtype=float).reshape(-1, 2).T)


def trailing_mean(y, window):
    """(n,) -> (n,): the mean of each value and the window - 1 before it, or as many as there are."""
    sums, end = np.cumsum([0.0, *y]), np.arange(1, len(y) + 1)
    start = np.maximum(0, end - window)
    return (sums[end] - sums[start]) / (end - start)


def panels_of(runs):
    """The panels for which any run has points; a key as "route:" becomes one for each route."""
    logged = sorted({key for run in runs for row in run.rows for key in row})
    for group, key, title, note, share in PANELS:
        for own in [name for name in logged if name.startswith(key)] if key.endswith(":") else [key]:
            if any(len(points(run, own)[0]) for run in runs):
                yield group, own, title + own.removeprefix(key), note, share


def styles(runs):
    """Label -> (colour, dashes), in the order of the runs."""
    labels = dict.fromkeys(run.label for run in runs)
    return {name: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, name in enumerate(labels)}


def draw(ax, runs, key, x):
    """One panel: the bold line is the mean of a label's seeds, faint lines are the seeds (of one: every update)."""
    for label, (colour, dashes) in styles(runs).items():
        lines = [(a, b) for a, b in (points(run, key, x) for run in runs if run.label == label) if len(a)]
        if not lines:
            continue
        smooth = [(a, trailing_mean(b, max(1, len(b) // SMOOTHING))) for a, b in lines]
        grid = smooth[0][0]
        if len(smooth) > 1:  # seeds end at different places: their mean goes as far as all of them
            grid = np.linspace(max(a[0] for a, _ in smooth), min(a[-1] for a, _ in smooth), 200)
        for a, b in smooth if len(smooth) > 1 else lines:
            ax.plot(a, b, color=colour, alpha=0.3, linewidth=0.8)
        mean = np.mean([np.interp(grid, a, b) for a, b in smooth], axis=0)
        ax.plot(grid, mean, color=colour, linestyle=dashes, linewidth=1.8, marker="o" if len(grid) < 30 else None,
                markersize=3)


def curves(runs, path, x="steps", y=None, columns=3, legend=True):
    """Draw log keys of runs, a panel each, as one PNG.

    runs: list of Run; path: a file or a binary stream; x: steps, tokens or seconds; y: keys as "reward", "route:table",
    "validation.f1_recall" (default: all there are). ValueError where no run has any of them.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install -r requirements-dev.txt") from None
    shown = [panel for panel in panels_of(runs) if y is None or panel[1] in y]
    if not shown:
        raise ValueError(f"no curve to draw: none of {len(runs)} runs has logged {', '.join(y or ['anything'])}")
    columns = min(columns, len(shown))
    lines = math.ceil(len(shown) / columns)
    names = [f" {label}" for label in styles(runs)]  # matplotlib would drop a name that begins with "_"
    wide = max(1, min(len(names), 45 * columns // (8 + max(map(len, names)))))       # so many names a line has room for
    figure = Figure(figsize=(3.6 * columns, 2.3 * lines + legend * (0.2 + 0.2 * math.ceil(len(names) / wide))), dpi=140,
                    layout="constrained")
    short = lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else f"{v / 1e3:g}k" if v >= 1e4 else f"{v:g}"
    for i, (_, key, title, _, share) in enumerate(shown, 1):
        ax = figure.add_subplot(lines, columns, i)
        draw(ax, runs, key, x)
        ax.set_title(title, fontsize=10, parse_math=False)
        ax.set_xlabel(AXES[x][1], fontsize=8)
        if x == "steps":
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_formatter(short)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if share:
            ax.set_ylim(-0.03, 1.03)
    if legend:
        handles = [Line2D([], [], color=colour, linestyle=dashes) for colour, dashes in styles(runs).values()]
        for text in figure.legend(handles, names, loc="outside upper center", ncols=wide, fontsize=9).get_texts():
            text.set_parse_math(False)                   # and would read "$" as the beginning of a formula
    figure.savefig(path, format="png")


def curves_section(runs):
    """All panels over each axis; which axis is seen is chosen with the buttons above them."""
    if not runs:
        return Html()
    buttons = [el("span", el("input", type="radio", name="axis", id=f"x-{x}", checked="" if x == "steps" else None),
                  el("label", "over " + AXES[x][1], for_=f"x-{x}")) for x in AXES]
    keys = [el("li", el("i", style=f"border-top:3px {dashes} {colour}"), label)
            for label, (colour, dashes) in styles(runs).items()]
    groups = {}
    for group, key, title, note, _ in panels_of(runs):
        drawn = [panel_picture(runs, key, title, x) for x in AXES]
        groups.setdefault(group, []).append(el("figure", *drawn, el("figcaption", el("b", title), ": ", note)))
    grids = [Html(el("h3", name) + el("div", *figures, class_="grid")) for name, figures in groups.items()]
    return section("curves", "Curves", "A bold line is a configuration: the mean of its seeds, each averaged over the "
                   f"last 1/{SMOOTHING} of its points. Faint lines are its seeds; of a single seed, every update.",
                   el("div", *buttons, class_="axis"), el("ul", *keys, class_="key"), *grids)


def panel_picture(runs, key, title, x):
    """One panel as an element; those who do not see it are told where each run starts and ends."""
    stream = io.BytesIO()
    curves(runs, stream, x, [key], legend=False)
    ends = [(run.name, points(run, key, x)[1]) for run in runs]
    said = "; ".join(f"{name}: from {y[0]:.3g} to {y[-1]:.3g}" for name, y in ends if len(y))
    return el("img", src=embedded("png", stream), alt=f"{title} over {AXES[x][1]}. {said}", class_=x)


# ------------------------------------------------------------------------------------------------------------ 4 tables

# title, key of a result, format, sign of what is better
COLUMNS = (("F1-Recall", "f1_recall", ".3f", 1), ("exact", "em", ".3f", 1), ("F1", "f1", ".3f", 1),
           ("routing", "route_accuracy", ".3f", 1), ("malformed", "malformed", ".3f", -1),
           ("retrievals", "retrievals", ".2f", 0), ("gold", "gold_retrievals", ".2f", 0),
           ("calls", "model_calls", ".2f", 0), ("tokens", "tokens", ".0f", 0), ("seconds", "seconds", ".3f", 0))


def cells_of(entries, form, sign=1):
    """Entries, each a list of one number (or None) a seed, as cells: the mean, the range of seeds, the best mean bold.

    What is printed alike is equally good; a lone entry is not called best.
    """
    known = [[value for value in values if value is not None] for values in entries]
    means = [format(sum(values) / len(values), form) if values else "–" for values in known]
    scores = [sign * float(mean) for mean in means if mean != "–"]
    best = max(scores) if sign and len(scores) > 1 else None
    return [el("span", el("b" if mean != "–" and sign * float(mean) == best else "span", mean),
               *([el("small", f"{min(values):{form}}–{max(values):{form}}")] if len(set(values)) > 1 else []))
            for mean, values in zip(means, known)]


def score_tables(title, found):
    """{label: [result of infer.evaluate, one a seed]} -> the score table, and F1-Recall by kind and by hops."""
    columns = [cells_of([[result.get(key) for result in results] for results in found.values()], form, sign)
               for _, key, form, sign in COLUMNS]
    counts = [(label, len(results), results[0]["n"]) for label, results in found.items()]
    tables = [table(title, ["", "seeds", "n", *(name for name, *_ in COLUMNS)],
                    [[*count, *cells] for count, cells in zip(counts, zip(*columns))])]
    for name in ("kind", "hops"):
        by = {label: [result.get(f"by_{name}") or {} for result in results] for label, results in found.items()}
        groups = sorted({group for parts in by.values() for part in parts for group in part})
        cells = [cells_of([[part.get(group) for part in parts] for parts in by.values()], ".3f") for group in groups]
        rows = [[group, *row] for group, row in zip(groups, cells)]
        tables += [table(f"F1-Recall by {name}", [name, *found], rows)] if rows else []
    return el("div", *tables, class_="side")


def tables_section(runs, results):
    """Results on the same questions in one table; and for each run the validation that chose its best checkpoint."""
    by_questions, validations = {}, {}
    for one in results:
        asked = tuple(sorted((row["question"], str(row.get("image"))) for row in one.rows))
        by_questions.setdefault(asked, {}).setdefault(one.label, []).append(evaluate(one.rows))
    for run in runs:
        found = [row["validation"] for row in run.rows if "validation" in row]
        if found:
            validations.setdefault(run.label, []).append(max(found, key=lambda result: result["f1_recall"]))
    tables = [score_tables(f"{len(asked)} questions, for example “{asked[0][0][:60]}”", by_label)
              for asked, by_label in by_questions.items()]
    tables += [score_tables("Best validation of each run", validations)] if validations else []
    return section("scores", "Scores", "Scores from 0 to 1, costs per question. Bold: the best on the same questions. "
                   "Small: lowest and highest of several seeds. Recall also pays long lists of guesses (“yes no” is "
                   "right on every yes/no question), so exact match and F1 stand beside it. The best validation score "
                   "is too high: it chose the checkpoint.",
                   *tables) if tables else Html()


def runs_section(runs):
    """What the runs are, and the options by which they differ."""
    names = differing(runs)
    rows = [[run.name, run.options.get("seed", "–"), run.rows[-1]["step"], f"{run.rows[-1]['sampled']:,}",
             f"{run.rows[-1].get('seconds', 0):.0f}", *(str(run.options.get(n, "–"))[:40] for n in names)]
            for run in runs]
    return section("runs", "Runs", "Beside their cost, the options by which they differ.",
                   table("Runs", ["", "seed", "updates", "tokens", "seconds", *names], rows)) if runs else Html()


PAST_END, ENDED, MALFORMED = "past the end", "ended", "malformed"


def confusion(rows):
    """Counter {(gold base, chosen base)} over the steps of router rows with gold hops, place by place."""
    counts = Counter()
    for row in rows:
        if row.get("method") == "router" and gold_routes(row):
            chosen = [MALFORMED if "fault" in plan else plan["retriever"][0] for plan in plans_of(row)]
            counts.update(zip_longest(gold_routes(row), chosen))
    return Counter({(gold or PAST_END, chosen or ENDED): n for (gold, chosen), n in counts.items()})


def confusion_section(results):
    tables, bases = [], [*ROUTES.values(), NONE]
    for label in dict.fromkeys(one.label for one in results):
        counts = confusion(row for one in results if one.label == label for row in one.rows)
        columns = [*bases, *sorted({chosen for _, chosen in counts} - {*bases})]
        rows = []
        for gold in [*bases, *sorted({gold for gold, _ in counts} - {*bases})]:
            total = sum(counts[gold, chosen] for chosen in columns) or 1
            rows.append([gold, *(el("span", counts[gold, chosen], class_="heat right" if gold == chosen else "heat",
                                    style=f"--share:{counts[gold, chosen] / total:.2f}") for chosen in columns)])
        if counts:
            tables.append(table(f"{label}: gold base (rows), chosen base (columns)", ["gold", *columns], rows))
    return section("routing", "Gold base and chosen base", "Routing steps place by place, as routing accuracy counts "
                   "them: “ended” is a step of the gold chain that was not taken, “past the end” the reverse. None: "
                   "nothing more is needed.", el("div", *tables, class_="side")) if tables else Html()


# ----------------------------------------------------------------------------------------------- 5 rewards of the steps

STRICT = RewardOptions(form="strict")  # as training measures by default
MATCH = 0.9                            # so similar a sub-question stands for a gold hop: train.py's --match


def output_of(said):
    """The model's output behind a plan, or behind an answer."""
    if "fault" in said:
        return str(said.get("text"))
    if "retriever" in said:
        return render_route(said.get("thought", ""), said["query"], said["retriever"][0])
    return render_answer(said.get("thought", ""), said.get("answer", ""))


def step_rewards(row, encode):
    """What Eq. 1 and 2 give the steps of a result row: a pair (of the route, of the answer) a plan, the last pair for
    the final answer. None where a step cannot be judged.

    As training judges a live trajectory: a routing step by the nearest gold hop that is open, an answer by the hop that
    its sub-question stands for; a hop is closed once it is answered rightly. encode: texts -> (n, dim) unit rows.
    """
    plans, hops = plans_of(row), list(row.get("hops") or ())
    if row.get("method") != "router" or row.get("hops") is None:
        return [(None, None)] * (len(plans) + 1)
    asked = lambda hop: {"step_type": "ret", "answer": {"query": hop["query"], "retriever": [hop["retriever"]]}}
    done, rewards = {"query": "none", "retriever": "none"}, []
    pairs = [(output_of(plan), asked(hop)) for plan in plans for hop in [*hops, done]]
    similarity = similarity_table([a for a, _ in pairs], [b for _, b in pairs], encode, "strict")
    judge = lambda said, golds: step_reward(output_of(said), {"step_type": "ans", "answer": golds}, similarity, STRICT)
    for plan in plans:
        judged = [(step_reward(output_of(plan), asked(hop), similarity, STRICT), hop) for hop in hops or [done]]
        route, hop = max(judged, key=lambda pair: (pair[0].similarity, pair[0].total))
        answer = None
        if "answer" in plan and hops and route.similarity >= MATCH:
            golds = hop["answer"] if isinstance(hop["answer"], list) else [hop["answer"]]
            answer = judge(said_of(plan["answer"]), [str(gold) for gold in golds])
            if answer.total == 1:
                hops.remove(hop)
        rewards.append((route, answer))
    return [*rewards, (None, judge(said_of(row["llm_answer"]), [str(gold) for gold in golds_of(row)]))]


def said_by(step):
    """What parse_step has read, as a plan of a result row."""
    if isinstance(step, StepError):
        return {"fault": step.reason, "text": step.text}
    return vars(step) | ({"retriever": [step.route]} if isinstance(step, RouteStep) else {})


def said_of(answer):
    """An answer as {"thought", "answer"}; others write its text alone."""
    return answer if isinstance(answer, dict) else {"answer": "" if answer is None else str(answer)}


# ------------------------------------------------------------------------------------------------------------- 6 cards

BASE_OF = {name.lower(): base for base, name in ROUTES.items()} | {NONE.lower(): "none"}


def chip(route):
    """The name of a base in its colour."""
    return el("span", route, class_=f"chip {BASE_OF.get(route.lower(), 'none')}")


def earned(reward, advantage=None):
    """A reward with its parts, and the advantage where there is one."""
    if reward is None:
        return Html()
    named = (("similarity", reward.similarity), ("base", reward.route), ("answer", reward.answer))
    parts = ", ".join(f"{name} {value:.2f}" for name, value in named if value is not None)
    sign = "" if not advantage else "up" if advantage > 0 else "down"
    more = [] if advantage is None else [" ", el("b", f"A\u00a0{advantage:+.3f}", class_=sign)]
    return el("span", f" r\u00a0{reward.total:.3f} ({parts})", *more, class_="reward")


def said_lines(said, reward, advantage=None):
    """One output: the thought, and the answer or the routed sub-question; or what is malformed, and how."""
    score = earned(reward, advantage)
    if "fault" in said:
        text = f"{said['fault']}: {str(said.get('text'))[:300]}"
        return [el("p", el("b", "malformed: "), text, score, class_="fault")]
    thought = [el("p", said["thought"], class_="thought")] if said.get("thought") else []
    if "retriever" in said:
        query = "nothing more is needed" if said["retriever"] == [NONE] else said["query"]
        return [*thought, el("p", *map(chip, said["retriever"]), " ", query, score)]
    return [*thought, el("p", el("b", "→ "), said.get("answer") or "(none)", score)]


def evidence(plan):
    """The passages that a step read; their scores where the row has them ("ter_scores" beside "ter")."""
    items = []
    for prefix in PREFIX.values():
        passages, scores = plan.get(prefix) or (), plan.get(f"{prefix}_scores") or ()
        for passage, score in zip_longest(map(str, passages), scores):
            items.append((el("b", f"{score:.3f} ") if isinstance(score, (int, float)) else "", passage or ""))
    lines = [el("li", *item) for item in items]
    return [el("details", el("summary", "evidence: ", *items[0]), el("ol", *lines))] if items else []


def pictures(row, folder):
    """The row's picture, if it has one."""
    return [] if row.get("image") is None else [picture(str(row["image"]), str(folder))]


@lru_cache(maxsize=None)
def picture(name, folder, size=128):
    """A small copy of a picture inside the page, as an element; or a line that it is not there."""
    for path in (Path(name), Path(folder) / name, HERE / name):
        try:
            small = load_picture(path)
        except ValueError:
            continue
        small.thumbnail((size, size))
        stream = io.BytesIO()
        small.save(stream, format="JPEG", quality=85)
        return el("img", src=embedded("jpeg", stream), alt="the question's picture", class_="photo")
    return el("p", f"(picture not found: {name})", class_="note")


def card(title, facts, inside, steps, last, **data):
    """A card with what the filters look at: source, kind, base (of BASES, or none), hops, right (yes, no, mixed)."""
    mark = {"yes": "✓ right", "no": "✗ wrong", "mixed": "± mixed"}[data["right"]]
    head = el("header", el("h3", title), el("span", mark, class_=f"mark {data['right']}"))
    return el("article", head, el("p", facts, class_="note"), *inside, el("ol", *steps, class_="steps"), last,
              class_="card", **{f"data_{name}": value for name, value in data.items()})


def is_right(row):
    return answer_scores(predicted(row), golds_of(row))[1] == 1


def trajectory_card(row, one, encode):
    """A result row as a card."""
    rewards, hops = step_rewards(row, encode), row.get("hops")
    steps = [el("li", *said_lines(plan, route), *evidence(plan),
                *(said_lines(said_of(plan["answer"]), answer) if "answer" in plan else []))
             for plan, (route, answer) in zip(plans_of(row), rewards)]
    named = {name.lower() for plan in plans_of(row) for name in plan["retriever"] if name != NONE}
    golds = el("p", el("b", "gold: "), " | ".join(map(str, golds_of(row)[:5])))
    facts = [one.label, row.get("kind"), None if hops is None else f"gold hops: {len(hops)}"]
    return card(row["question"], " · ".join(filter(None, facts)), pictures(row, one.folder), steps,
                el("div", *said_lines(said_of(row["llm_answer"]), rewards[-1][1]), golds, class_="final"),
                source=one.label, kind=row.get("kind") or "", hops="" if hops is None else len(hops),
                base=" ".join(sorted({BASE_OF.get(name, "none") for name in named}) or ["none"]),
                right="yes" if is_right(row) else "no")


def group_card(row, run):
    """A logged group of a training run as a card: the outputs of one prompt with their rewards and advantages."""
    steps, rewards, label = [], [output["reward"] for output in row["outputs"]], str(row.get("label"))
    for output in row["outputs"]:
        parts = {name: output["parts"].get(name) for name in ("similarity", "route", "answer")}
        reward = Reward(output["reward"], 1.0, **parts)
        steps.append(el("li", *said_lines(said_by(parse_step(output["text"])), reward, output["advantage"])))
    gold = row.get("gold") if isinstance(row.get("gold"), list) else [row.get("gold")]
    return card(f"Group of update {row.get('step')}: {label}", f"{run.name} · {len(steps)} outputs of one prompt",
                [*pictures(row, ""), el("pre", row.get("prompt", ""))], steps,
                el("p", el("b", "gold: "), " | ".join(map(str, gold)), class_="final"), source=run.name,
                kind="training group", base=BASE_OF.get(label.lower(), ""), hops="",
                right="mixed" if max(rewards) > min(rewards) else "yes" if rewards[0] >= 1 else "no")


def varied(rows, count):
    """`count` of the rows, kinds and right and wrong in turn, in the order of the file."""
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.get("kind"), is_right(row)), []).append(i)
    turns = [i for turn in zip_longest(*groups.values()) for i in turn if i is not None]
    return [rows[i] for i in sorted(turns[:count])]


FILTERS = (("source", "From"), ("kind", "Kind"), ("base", "Base asked"), ("hops", "Gold hops"), ("right", "Answer"))


def cards_section(runs, results, count):
    """At most `count` cards of each result file and run, and the filters; the script finds their options in cards."""
    queries = [{"text": hop["query"]} for one in results for row in one.rows for hop in row.get("hops") or ()]
    encode = load_encoder("lexical").fitted(queries)[0].encode_queries
    cards = [trajectory_card(row, one, encode) for one in results for row in varied(one.rows, count)]
    cards += [group_card(row, run) for run in runs for row in run.samples[::math.ceil(len(run.samples) / count) or 1]]
    total = sum(len(one.rows) for one in results) + sum(len(run.samples) for run in runs)
    filters = [el("label", title, el("select", el("option", "all", value=""), name=name)) for name, title in FILTERS]
    shown = el("output", f"{len(cards)} of {len(cards)} shown", id="count", aria_live="polite")
    return section("trajectories", "Trajectories", f"{len(cards)} of {total}, kinds and right and wrong in turn. r is "
                   "the reward of a step where the gold hops are known: ½ similarity of its sub-question (lexical) + ½ "
                   "right base, or whether its answer is right. A is the advantage in its group, where a run has "
                   "logged groups.", el("form", *filters, el("button", "reset", type="reset"), shown, class_="filters"),
                   el("div", *cards, class_="cards")) if cards else section(
        "trajectories", "Trajectories", "No groups were logged: train.py --log-every 1 logs some of every update, and "
        "result files of infer.py --out show trajectories.")


# ---------------------------------------------------------------------------------------------------------- 7 the page


def page(runs, results, count=60):
    """The whole report as one HTML text; count: cards of each run and result file."""
    sections = {"runs": runs_section(runs), "scores": tables_section(runs, results),
                "routing": confusion_section(results), "curves": curves_section(runs),
                "trajectories": cards_section(runs, results, count)}
    links = [el("a", name.capitalize(), href=f"#{name}") for name, markup in sections.items() if markup]
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    head = el("head", el("meta", charset="utf-8"), el("meta", http_equiv="Content-Security-Policy", content=policy),
              el("meta", name="viewport", content="width=device-width, initial-scale=1"),
              el("title", "R1-Router report"), el("style", Html(STYLE)))
    top = el("header", el("h1", "R1-Router report"), el("nav", *links, aria_label="Sections"), class_="top")
    body = el("body", top, el("main", *sections.values()), el("script", Html(SCRIPT)))
    return "<!DOCTYPE html>\n" + el("html", head, body, lang="en")


STYLE = """
:root { --ink: #1d2329; --soft: #5a646e; --line: #dfe3e6; --blue: #0b5cad }
* { box-sizing: border-box }
body { margin: 0; background: #f7f8f8; color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
.top, main { max-width: 1240px; margin: 0 auto; padding: 0 20px } .top { padding-top: 24px }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem }
h3 { font-size: 1rem; margin: 1rem 0 .4rem }
nav a { color: var(--blue); display: inline-block; margin-right: 1.1rem; line-height: 2 }
section > p { max-width: 62rem; color: var(--soft); margin: .2rem 0 .8rem }
:focus-visible { outline: 2px solid var(--blue) }

.axis { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem } .axis label { margin-left: .35rem }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; padding: 0; margin: .6rem 0 }
.key i { display: inline-block; width: 2rem; margin-right: .5rem; vertical-align: middle }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px }
figure, .wide, .card { background: #fff; border: 1px solid var(--line); border-radius: 8px }
figure { margin: 0; padding: 8px } figcaption { font-size: .85rem; color: var(--soft) }
figure img { width: 100%; height: auto; display: block }
#curves:has(#x-steps:checked) img:not(.steps), #curves:has(#x-tokens:checked) img:not(.tokens),
#curves:has(#x-seconds:checked) img:not(.seconds) { display: none }

.side { display: flex; flex-wrap: wrap; gap: 0 24px; align-items: flex-start } .side > div { max-width: 100% }
.wide { overflow-x: auto; margin: 0 0 14px; width: fit-content; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: 4px 12px; text-align: right; white-space: nowrap } tbody tr { border-top: 1px solid var(--line) }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; white-space: normal; min-width: 6.5rem }
thead th { color: var(--soft); font-weight: 500 } td small { display: block; color: var(--soft); font-size: .75rem }
.heat { display: block; margin: -4px -12px; padding: 4px 12px; background: rgb(190 60 0 / calc(var(--share) * .5)) }
.heat.right { background: rgb(0 110 80 / calc(var(--share) * .35)) }

.filters { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: end; padding: 10px 0; background: #f7f8f8;
  z-index: 1 }
.filters label { display: grid; font-size: .8rem; color: var(--soft) }
.filters output { font-weight: 600; padding-bottom: 6px }
select, button { font: inherit; font-size: .95rem; color: var(--ink); padding: 4px 8px; min-height: 36px;
  background: #fff; border: 1px solid #8a939b; border-radius: 6px } select { width: 100%; max-width: 16rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px;
  align-items: start }
.card { padding: 12px 16px; min-width: 0; display: flow-root; content-visibility: auto;
  contain-intrinsic-size: auto 380px }
.card[hidden] { display: none } .card h3, .card p { margin: 0 0 .3rem }
.card header { display: flex; justify-content: space-between; gap: 12px }
.mark { white-space: nowrap; font-weight: 600 } .yes, .up { color: #0a6b3d } .no, .down, .fault { color: #a8200d }
.mixed, .note, .thought, .reward { color: var(--soft) }
.note, .reward, details { font-size: .85rem } .thought { font-style: italic }
.photo { float: right; width: 96px; border-radius: 6px; margin: 0 0 8px 12px }
.steps { padding-left: 1.3rem; margin: .4rem 0 } .steps > li { padding: 5px 0 }
.steps > li + li { border-top: 1px dashed var(--line) } .final { border-top: 1px solid var(--line); padding-top: 6px }
pre { white-space: pre-wrap; font-size: .8rem; margin: .3rem 0 }
details { color: var(--soft); margin: 0 0 .3rem } details ol { padding-left: 1.2rem; margin: 0 }
summary { cursor: pointer; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.chip { font-size: .85rem; font-weight: 600; padding: 1px 8px; border-radius: 999px; white-space: nowrap;
  color: #4a5058; background: #eceeef }
.chip.text { color: #0b4f94; background: #e3eefa } .chip.image { color: #8a3b00; background: #fdebdb }
.chip.table { color: #0a5f37; background: #dff3e8 }
@media (min-width: 800px) { .filters { position: sticky; top: 0 } }
@media (max-width: 500px) { .top, main { padding: 0 12px } .top { padding-top: 14px } .photo { width: 76px }
  .filters label { flex: 1 1 44% } select { max-width: 100% } .card { padding: 10px 12px } }
"""

# The filters live in the address, as in report.html#kind=look&right=no, so that what is seen can be passed on.
SCRIPT = """
const cards = [...document.querySelectorAll(".card")], form = document.querySelector(".filters");
const filters = form ? [...form.querySelectorAll("select")] : [];
const names = {yes: "right", no: "wrong", none: "no retrieval"};
const values = (card, name) => name === "base" ? card.dataset.base.split(" ") : [card.dataset[name]];

function show() {
  const chosen = filters.filter(f => f.value);
  for (const card of cards) card.hidden = !chosen.every(f => values(card, f.name).includes(f.value));
  const shown = cards.filter(card => !card.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${cards.length} shown`;
}
function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const f of filters) {
    f.value = wanted.get(f.name) ?? "";
    if (f.selectedIndex < 0) f.value = "";
  }
  show();
  if (filters.some(f => f.value)) form.scrollIntoView();
}
function toAddress() {
  history.replaceState(null, "", "#" + new URLSearchParams(filters.filter(f => f.value).map(f => [f.name, f.value])));
  show();
}
for (const f of filters) {
  const counts = new Map();
  for (const v of cards.flatMap(card => values(card, f.name))) if (v) counts.set(v, (counts.get(v) ?? 0) + 1);
  for (const v of [...counts.keys()].sort()) f.add(new Option(`${names[v] ?? v} (${counts.get(v)})`, v));
}
if (form) {
  form.addEventListener("change", toAddress);
  form.addEventListener("reset", () => setTimeout(toAddress));
  addEventListener("hashchange", () => { if (/=|^$/.test(location.hash)) fromAddress(); });
  fromAddress();
}
"""


# --------------------------------------------------------------------------------------------------- 8 the command line


def parse_flags(argv):
    p = OneLineParser(prog="report.py", description="One HTML page from training runs and result files.")
    p.add_argument("inputs", nargs="*", metavar="RUN", help="run folders of train.py, result files of infer.py --out; "
                   "LABEL=PATH names one, a label twice makes two seeds of it (default: runs/*)")
    p.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    p.add_argument("--png", metavar="DIR", help="write the curves there, too: curves-steps.png, -tokens, -seconds")
    p.add_argument("--cards", type=int, default=60, metavar="N", help="cards of each run and result file (60)")
    args = p.parse_args(argv)
    if args.cards < 1:
        raise ValueError(f"--cards {args.cards}: give at least 1")
    args.inputs = args.inputs or [str(log.parent) for log in sorted(Path("runs").glob("*/log.jsonl"))
                                  if log.stat().st_size]                    # empty: nothing logged so far
    if not args.inputs:
        raise ValueError("nothing to report: no runs/*/log.jsonl here; name run folders that train.py has written, or "
                         "result files of infer.py --out")
    read = [path for word in args.inputs for path in (labelled(word)[0], *labelled(word)[0].glob("*.json*"))]
    if os.path.realpath(args.out) in map(os.path.realpath, read):
        raise ValueError(f"--out {args.out} is what the page is made of: name another file")
    return args


def write(path, data):
    """Write bytes beside the file, then rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(f"{path}.new")
    new.write_bytes(data)
    os.replace(new, path)


def main(argv=None):
    """Exit code 2 after a user's mistake, or where rows had to be left out."""
    try:
        args = parse_flags(argv)
        runs, results, faults = load(args.inputs)
        # half a surrogate pair may stand in JSON, but not in UTF-8
        data = page(runs, results, args.cards).encode("utf-8", "replace")
        write(Path(args.out), data)
        for x in AXES if args.png else ():
            stream = io.BytesIO()
            curves(runs, stream, x)
            write(Path(args.png) / f"curves-{x}.png", stream.getvalue())
    except (ValueError, OSError) as error:
        print(f"report.py: {printable(error)}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"report.py: left out: {printable(fault)}", file=sys.stderr)
    rows = sum(len(one.rows) for one in results)
    print(f"{args.out}: {len(runs)} runs, {rows} result rows, {len(data) / 1e6:.1f} MB")
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
