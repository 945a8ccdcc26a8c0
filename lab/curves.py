"""Curves of training runs: what their logs hold, drawn as one PNG with a panel for each metric.

Runs of one label are seeds of one configuration: they share a colour. lab.report draws a page's
panels with it, lab.experiment the figures of docs/results.md.
"""
import math
from dataclasses import dataclass

import numpy as np

AXES = {"steps": ("step", "updates"), "tokens": ("sampled", "tokens sampled (sft: read)"),
        "seconds": ("seconds", "seconds of training")}
PANELS = (      # group, key of the log rows, title, whether its values are shares, what it says
    ("Validation", "validation.f1_recall", "Validation F1-Recall", True, "right answers, greedy"),
    ("Validation", "validation.route_accuracy", "Validation routing", True, "bases of gold chains"),
    ("Validation", "validation.retrievals", "Validation retrievals", False, "per question"),
    ("Validation", "validation.reward", "Validation reward", True, "step files: greedy outputs"),
    ("Validation", "validation.malformed", "Validation malformed", False, "steps per question"),
    ("Reward", "reward", "Reward", True, "mean over the outputs (outcome mode: trajectories)"),
    ("Reward", "form", "Well-formed", True, "outputs that can be read as their kind of step"),
    ("Reward", "similarity", "Similarity", True, "of the sub-question to the nearest gold one"),
    ("Reward", "route", "Right base", True, "routing steps that name the gold base"),
    ("Reward", "answer", "Right answer", True, "reward of answering steps"),
    ("Routing by gold base", "route:", "Gold base: ", True, "right bases in groups of that base"),
    ("Routing by gold base", "mixed:", "Mixed groups: ", True, "of the groups of that base"),
    ("Bases asked for", "asked:", "Asked for: ", False, "share of all sampled routing steps"),
    ("Update", "flat_groups", "Flat groups", True, "all outputs earned the same: nothing to learn"),
    ("Update", "entropy", "Entropy", False, "of the next token, nats, mean over sampled tokens"),
    ("Update", "kl", "KL", False, "distance to the reference policy (k3), per token"),
    ("Update", "clip_fraction", "Clip fraction", False, "tokens whose ratio is clipped"),
    ("Update", "length", "Output length", False, "sampled tokens per output"),
    ("Update", "loss", "Loss", False, "of the update"),
    ("Update", "grad_norm", "Gradient norm", False, "before clipping"),
    ("Update", "learning_rate", "Learning rate", False, "as used"))
# for colour-blind eyes, too
COLOURS = ("#0072b2", "#d55e00", "#00795a", "#a3417f", "#6b5b00", "#3a3a3a", "#2b8cd8")
DASHES = ("solid", "dashed", "dotted")
SMOOTHING = 25      # a curve is the mean over the last 1/25 of its points


@dataclass(frozen=True)
class Run:
    """A training run. Its log rows have, beside what train.py wrote, "sampled" (tokens so far),
    "length" (tokens an output) and "validation.NAME"."""
    name: str
    label: str
    options: dict
    rows: list
    samples: list       # rows of samples.jsonl, for lab.report


def is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 1e300


def points(run, key, x="steps"):
    """Two arrays (n,): the x axis and the finite values of a log key. A KL that was not computed
    has none."""
    column, _ = AXES[x]
    pairs = []
    for row in run.rows if key != "kl" or run.options.get("kl_coef") else ():
        if is_number(row.get(key)) and is_number(row.get(column)):
            pairs.append((row[column], row[key]))
    xs, ys = np.array(pairs, dtype=float).reshape(-1, 2).T
    return xs, ys


def trailing_mean(y, window):
    """(n,) -> (n,): each value's mean with the window - 1 before it, or as many as there are."""
    sums = np.cumsum([0.0, *y])                                             # (n + 1,)
    end = np.arange(1, len(y) + 1)
    start = np.maximum(0, end - window)
    return (sums[end] - sums[start]) / (end - start)


def panels_of(runs):
    """Those of PANELS for which any run has points; a key as "route:" becomes one a route."""
    logged = set()
    for run in runs:
        logged.update(*run.rows)
    panels = []
    for group, begin, title, share, note in PANELS:
        keys = [begin]
        if begin.endswith(":"):
            keys = sorted(key for key in logged if key.startswith(begin))
        for key in keys:
            if any(len(points(run, key)[0]) for run in runs):
                panels.append((group, key, title + key.removeprefix(begin), share, note))
    return panels


def styles(runs):
    """Label -> (colour, dashes), in the order of the runs."""
    style_of = {}
    for run in runs:
        turn, place = divmod(len(style_of), len(COLOURS))
        style_of.setdefault(run.label, (COLOURS[place], DASHES[turn % len(DASHES)]))
    return style_of


def draw_panel(ax, runs, key, x):
    """One panel: the bold line is the mean of a label's seeds, faint lines are the seeds (of one:
    every update)."""
    for label, (colour, dashes) in styles(runs).items():
        lines = [points(run, key, x) for run in runs if run.label == label]
        lines = [(xs, ys) for xs, ys in lines if len(xs)]
        if not lines:
            continue
        smooth = [(xs, trailing_mean(ys, max(1, len(ys) // SMOOTHING))) for xs, ys in lines]
        grid, _ = smooth[0]
        if len(smooth) > 1:     # seeds end at different places: their mean goes as far as all
            start, end = max(xs[0] for xs, _ in smooth), min(xs[-1] for xs, _ in smooth)
            grid, lines = np.linspace(start, end, 200), smooth
        for xs, ys in lines:
            ax.plot(xs, ys, color=colour, alpha=0.3, linewidth=0.8)
        mean = np.mean([np.interp(grid, xs, ys) for xs, ys in smooth], axis=0)
        ax.plot(grid, mean, color=colour, linestyle=dashes, linewidth=1.8, markersize=3,
                marker="o" if len(grid) < 30 else None)


def draw_curves(runs, path, x="steps", y=None, columns=3, legend=True):
    """Draws log keys of runs, a panel each, as one PNG.

    path: a file or a binary stream; x: steps, tokens or seconds; y: keys as "reward",
    "route:table", "validation.f1_recall" (default: all there are). ValueError where no run has any.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ValueError("no matplotlib: pip install -r requirements-dev.txt") from None
    panels = [panel for panel in panels_of(runs) if y is None or panel[1] in y]
    if not panels:
        raise ValueError(f"none of {len(runs)} runs has logged {', '.join(y or ['anything'])}")
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    names = [f" {label}" for label in styles(runs)]     # matplotlib drops one that begins with "_"
    room = 45 * columns // (8 + max(map(len, names)))   # for so many of them in a line
    wide = max(1, min(len(names), room))
    height = 2.3 * lines + legend * (0.2 + 0.2 * math.ceil(len(names) / wide))
    figure = Figure(figsize=(3.6 * columns, height), dpi=140, layout="constrained")
    for i, (_, key, title, share, _) in enumerate(panels, 1):
        ax = figure.add_subplot(lines, columns, i)
        draw_panel(ax, runs, key, x)
        ax.set_title(title, fontsize=10, parse_math=False)
        ax.set_xlabel(AXES[x][1], fontsize=8)
        if x == "steps":
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.xaxis.set_major_formatter(short)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if share:
            ax.set_ylim(-0.03, 1.03)
    if legend:
        handles = [Line2D([], [], color=c, linestyle=dashes) for c, dashes in styles(runs).values()]
        place = {"loc": "outside upper center", "ncols": wide, "fontsize": 9}
        for text in figure.legend(handles, names, **place).get_texts():
            text.set_parse_math(False)                  # "$" begins no formula
    figure.savefig(path, format="png")


def short(value, _):
    """A number on an axis: 900, 12k, 1.5M."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"
