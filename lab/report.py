"""The report: what training runs and evaluations wrote becomes one HTML page that needs nothing but
itself: report.html, filled in, with report.css and report.js.

    run folders of train.py        -> Run     -> curves, best validations, logged groups as cards
    result files of infer.py --out -> Results -> scores, gold base x chosen base, cards

Runs (or result files) of one label are seeds of one configuration: they share a colour, and tables
show their mean and range. A run's label is its folder's name without the seed at its end, a result
file's is its name; LABEL=PATH gives another.

All text in the files is foreign: `el` escapes whatever it has not made itself, and the page's
policy (CSP) runs no script but ours and loads nothing.
"""
import base64
import hashlib
import html
import io
import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from string import Template

from grpo import Reward
from lab.curves import (AXES, SMOOTHING, Run, draw_curves, is_number, panels_of, points,
                        styles)
from parts.evaluate import COLUMNS, Column, evaluate, score_row
from parts.live import asked_last, askable, nearest_hops, route_golds, still_open
from parts.pretrained import load_encoder
from parts.questions import HERE, ROUTING, gold_routes, golds_of, plans_of, predicted
from parts.score import answer_scores
from parts.steps import (BASE_OF, NONE, PREFIX, ROUTES, RouteStep, StepError, parse_step,
                         render_answer, render_route)
from parts.vision import load_picture
from plumbing.files import printable, read_json, read_jsonl, run_command, say, utf8, write_text
from plumbing.options import OneLineParser, add_flags, check_options, fill, from_flags, option
from train import GrpoOptions, rewards_of

# ---------------------------------------------------------------------------------- what is read

@dataclass(frozen=True)
class Results:
    """The result rows of one method."""
    label: str
    rows: list
    folder: Path        # pictures are looked for here, too


@dataclass(frozen=True)
class LogRow:
    """What the page counts on in a line of a run's log."""
    step: int = option(most=2 ** 53)
    tokens: int = option(0, most=2 ** 53)
    outputs: int = option(0, most=2 ** 53)
    seconds: float = option(0.0)
    validation: dict = option(None)


@dataclass(frozen=True)
class Output:
    """One output of a logged group."""
    text: str = option()
    reward: float = option(least=-math.inf)
    advantage: float = option(least=-math.inf)
    parts: dict = option()      # of the reward


def load(inputs):
    """["DIR", "FILE", "LABEL=PATH", ...] -> (list of Run, list of Results, faults)."""
    runs, results, faults = [], [], []
    for word in inputs:
        label, _, name = word.partition("=")
        path = Path(name)
        if Path(word).exists() or not name:
            label, path = None, Path(word)
        if path.is_dir():
            run, bad = load_run(path, label)
            runs.append(run)
        else:
            methods, bad = load_results(path, label or path.stem)
            results += methods
        faults += bad
    return with_labels(runs), results, faults


def load_run(folder, label):
    """A run folder of train.py -> (Run, faults)."""
    log, samples, options = folder / "log.jsonl", folder / "samples.jsonl", folder / "options.json"
    if not log.is_file():
        raise ValueError(f"{folder}: no log.jsonl in it: name a run folder (train.py's --out)")
    rows, faults = read_jsonl(log, check_log)
    groups, bad = [], []
    if samples.is_file() and samples.stat().st_size:                        # empty: none so far
        groups, bad = read_jsonl(samples, check_group)
    sampled = 0
    for row in rows:
        tokens = row.get("tokens") or 0
        sampled += tokens
        row["sampled"] = sampled
        if row.get("outputs"):
            row["length"] = tokens / row["outputs"]
        for name, value in (row.get("validation") or {}).items():
            row[f"validation.{name}"] = value
    options = read_json(options) if options.is_file() else {}
    return Run(folder.resolve().name, label, options, rows, groups), faults + bad


def with_labels(runs):
    """A run whose label is not given is called by its name without the seed; runs that would share
    that, but differ in more than their seed, by their whole names."""
    names = [run.name.removesuffix(f"-{run.options.get('seed')}") for run in runs]
    renamed = []
    for run, name in zip(runs, names):
        seeds = [other for other, same in zip(runs, names) if same == name]
        label = run.label or (run.name if differing(seeds) else name)
        renamed.append(replace(run, label=label))
    return renamed


def differing(runs):
    """Names of the options by which runs differ; one that an older run lacks says nothing."""
    values = {}
    for run in runs:
        for name, value in run.options.items():
            values.setdefault(name, set()).add(str(value))
    no_settings = ("out", "seed", "threads", "log_every", "save_every")
    return sorted(name for name in values if len(values[name]) > 1 and name not in no_settings)


def load_results(path, label):
    """A result file of infer.py or of others -> ([Results] of each method, faults)."""
    rows, faults = read_jsonl(path, check_result)
    rows_of = {}                                                            # method -> rows
    for row in rows:
        rows_of.setdefault(row.get("method"), []).append(row)
    results = []
    for method, rows in rows_of.items():
        title = label if len(rows_of) == 1 else f"{label} · {method}"
        results.append(Results(title, rows, path.parent))
    return results, faults


def check_log(row, number):
    fill(LogRow, row, "a line of train.py's log")
    return row


def check_group(row, number):
    outputs = row.get("outputs")
    if not isinstance(outputs, list) or not outputs:
        raise ValueError("expected a group with 'outputs': [{'text', 'reward', 'advantage', "
                         "'parts': {...}}, ...]")
    return {**row, "outputs": [fill(Output, output, "an output") for output in outputs]}


def check_result(row, number):
    """A result row of whoever wrote it, such that the page can count on its shape. Where an answer
    is a text alone, it becomes {"answer": text}."""
    if not isinstance(row.get("question"), str):
        raise ValueError("expected a result row as infer.py --out writes it: 'question', plan_1 "
                         "..., 'llm_answer'")
    score_row(row)
    for plan in plans_of(row):
        names = plan.get("retriever") if isinstance(plan, dict) else None
        if not isinstance(names, list) or not names or not isinstance(plan.get("query"), str):
            raise ValueError("expected each plan to be {'query', 'retriever': [names], ...}")
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"retriever {str(names)[:60]}: expected names")
        if not isinstance(plan.get("answer", {}), dict):
            plan["answer"] = {"answer": str(plan["answer"])}
    for hop in row.get("hops") or ():
        golds_of({"answer": hop.get("answer")})                             # raises
    if not isinstance(row["llm_answer"], dict):
        row["llm_answer"] = {"answer": predicted(row)}
    return row


# ---------------------------------------------------------------------------------------- markup

class Html(str):
    """Text that is markup already. `el` escapes all other text: what is forgotten is escaped."""


def el(name, /, *inside, **attributes):
    """An element: text is escaped, Html is not. aria_label becomes aria-label, class_ class."""
    markup = [f"<{name}"]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        markup.append(f' {key}="{html.escape(str(value))}"')
    markup.append(">")
    if name != "img":
        for item in inside:
            markup.append(item if isinstance(item, Html) else html.escape(str(item)))
        markup.append(f"</{name}>")
    return Html("".join(markup))


def table(title, header, rows):
    """Rows of cells (text or markup), the first of each its heading; a wide table scrolls in its
    own box."""
    head = [el("th", cell, scope="col") for cell in header]
    body = []
    for first, *others in rows:
        cells = [el("td", cell) for cell in others]
        body.append(el("tr", el("th", first, scope="row"), *cells))
    whole = el("table", el("thead", el("tr", *head)), el("tbody", *body), aria_label=title)
    box = el("div", whole, class_="wide", tabindex="0", role="region", aria_label=title)
    return el("div", el("h3", title), box)


def picture(kind, stream, alt, style):
    """An image inside the page, of the bytes of its file."""
    data = base64.b64encode(stream.getvalue()).decode()
    return el("img", src=f"data:image/{kind};base64,{data}", alt=alt, class_=style)


# ----------------------------------------------------------------------------- tables and curves

BETTER = {"f1_recall": max, "em": max, "f1": max, "route_accuracy": max, "malformed": min}
PAST_END, ENDED, MALFORMED = "past the end", "ended", "malformed"


def runs_table(runs):
    """What the runs cost, and the options by which they differ."""
    names, rows = differing(runs), []
    for run in runs:
        last = run.rows[-1]
        seconds = last.get("seconds") or 0
        values = [str(run.options.get(name, "–"))[:40] for name in ("seed", *names)]
        rows.append([run.name, last["step"], f"{last['sampled']:,}", f"{seconds:.0f}", *values])
    header = ["", "updates", "tokens", "seconds", "seed", *names]
    return table("Runs", header, rows) if runs else ""


def cells_of(entries, form, better):
    """Entries, each a list of one number a seed, as cells: the mean, the range of seeds, the best
    mean bold. What is printed alike is equally good; a lone entry is not called best.

    better: max, min, or None where neither is.
    """
    means = [format(sum(values) / len(values), form) if values else "–" for values in entries]
    printed = [float(mean) for mean in means if mean != "–"]
    best = format(better(printed), form) if better and len(printed) > 1 else None
    cells = []
    for values, mean in zip(entries, means):
        inside = [el("b" if mean == best else "span", mean)]
        if len(set(values)) > 1:
            inside.append(el("small", f"{min(values):{form}}–{max(values):{form}}"))
        cells.append(el("span", *inside))
    return cells


def score_table(title, results_of, columns, better=BETTER):
    """A line for each label. results_of: {label: [{measure: number}, one a seed]}."""
    header, cells = ["", "seeds"], [[(label, len(seeds)) for label, seeds in results_of.items()]]
    for column in columns:
        entries = []
        for results in results_of.values():
            values = [result.get(column.measure) for result in results]
            entries.append([value for value in values if is_number(value)])
        header.append(el("span", column.title, title=column.sentence))
        cells.append(cells_of(entries, column.format, better.get(column.measure)))
    rows = [[*first, *others] for first, *others in zip(*cells)]
    return table(title, header, rows)


def score_tables(title, results_of):
    """{label: [result of evaluate, one a seed]} -> all scores, and F1-Recall by kind and hops."""
    count = Column("n", "n", ".0f", "number of questions")
    tables = [score_table(title, results_of, [count, *COLUMNS])]
    for by in ("kind", "hops"):
        groups, recalls_of = set(), {}
        for label, results in results_of.items():
            recalls_of[label] = [result.get(f"by_{by}") or {} for result in results]
            groups.update(*recalls_of[label])
        columns = [Column(group, group, ".3f", "F1-Recall") for group in sorted(groups)]
        if columns:
            better = dict.fromkeys(groups, max)
            tables.append(score_table(f"F1-Recall by {by}", recalls_of, columns, better))
    return tables


def all_score_tables(runs, results):
    """Results on the same questions in one table; and for each run the validation that chose its
    best checkpoint."""
    by_questions, validations, tables = {}, {}, []
    for one in results:
        questions = sorted((row["question"], str(row.get("image"))) for row in one.rows)
        results_of = by_questions.setdefault(tuple(questions), {})
        results_of.setdefault(one.label, []).append(evaluate(one.rows))
    for questions, results_of in by_questions.items():
        first, _ = questions[0]
        title = f"{len(questions)} questions, for example “{first[:60]}”"
        tables += score_tables(title, results_of)
    for run in runs:
        rows = [row for row in run.rows if is_number(row.get("validation.f1_recall"))]
        if rows:
            best = max(rows, key=itemgetter("validation.f1_recall"))
            validations.setdefault(run.label, []).append(best["validation"])
    if validations:
        tables += score_tables("Best validation of each run", validations)
    return tables


def confusion(rows):
    """Counter {(gold base, chosen base)} over the routing steps of rows with gold hops, place by
    place."""
    counts = Counter()
    for row in rows:
        routes = gold_routes(row)
        if row.get("method") not in ROUTING or not routes:
            continue
        chosen = []
        for plan in plans_of(row):
            chosen.append(MALFORMED if "fault" in plan else ", ".join(plan["retriever"]))
        for gold, name in zip_longest(routes, chosen):
            counts[gold or PAST_END, name or ENDED] += 1
    return counts


def confusion_tables(results):
    """One for each label; a cell is the darker, the larger its share of its line."""
    counts_of, tables, bases = {}, [], [*ROUTES.values(), NONE]
    for one in results:
        counts_of.setdefault(one.label, Counter()).update(confusion(one.rows))
    for label, counts in counts_of.items():
        rows, columns = [], bases + sorted({chosen for _, chosen in counts} - set(bases))
        for gold in bases + sorted({gold for gold, _ in counts} - set(bases)):
            total = sum(counts[gold, chosen] for chosen in columns) or 1
            row = [gold]
            for chosen in columns:
                count = counts[gold, chosen]
                row.append(el("span", count, class_="heat right" if gold == chosen else "heat",
                              style=f"--share:{count / total:.2f}"))
            rows.append(row)
        if counts:
            title = f"{label}: gold base (rows), chosen base (columns)"
            tables.append(table(title, ["gold", *columns], rows))
    return tables


def panel_pictures(runs):
    """All panels over each axis, which the page shows one at a time, behind a key of the labels."""
    keys, grids = [], {}
    for label, (colour, dashes) in styles(runs).items():
        keys.append(el("li", el("i", style=f"border-top:3px {dashes} {colour}"), label))
    for group, key, title, _, note in panels_of(runs):
        drawn = []
        for x, (_, axis) in AXES.items():
            stream = io.BytesIO()
            draw_curves(runs, stream, x, [key], legend=False)
            ends = []                           # for those who do not see the picture
            for run in runs:
                _, ys = points(run, key, x)
                if len(ys):
                    ends.append(f"{run.name}: from {ys[0]:.3g} to {ys[-1]:.3g}")
            drawn.append(picture("png", stream, f"{title} over {axis}. {'; '.join(ends)}", x))
        caption = el("figcaption", el("b", title), ": ", note)
        grids.setdefault(group, []).append(el("figure", *drawn, caption))
    markup = el("ul", *keys, class_="key")
    for name, figures in grids.items():
        markup += el("h3", name) + el("div", *figures, class_="grid")
    return markup


# ----------------------------------------------------------------------------------------- cards

TRAINING = GrpoOptions()        # steps are judged by the default rule of training


def step_rewards(row, encoder):
    """The Rewards of a result row's outputs: a pair (routing step, answering step) for each plan,
    the last pair for the final answer. None where a step cannot be judged.

    As training judges a live trajectory (parts/live.py): a routing step by the nearest open gold
    hop, an answer by the hop that its sub-question stands for, which a right answer closes.
    """
    plans = plans_of(row)
    if row.get("method") not in ROUTING or row.get("hops") is None:
        return [(None, None)] * (len(plans) + 1)

    def reward_of(output, golds):
        [reward] = rewards_of(TRAINING, encoder, [(text_of(output), golds)])
        return reward

    open_hops, rewards = list(row["hops"]), []
    for plan in plans:
        ready = askable(open_hops)
        route, answer = reward_of(plan, route_golds(ready)), None
        queries_and_hops = [(plan["query"], asked_last(ready, plan["retriever"]))]
        [hop] = nearest_hops(queries_and_hops, TRAINING.match, encoder)
        if hop and "answer" in plan:
            answer = reward_of(plan["answer"], [{"step_type": "ans", "answer": hop["answer"]}])
            if answer.total == 1:
                open_hops = still_open(open_hops, hop)
        rewards.append((route, answer))
    final = reward_of(row["llm_answer"], [{"step_type": "ans", "answer": golds_of(row)}])
    return [*rewards, (None, final)]


def text_of(output):
    """What the model wrote, of an output as a result row has it."""
    thought = output.get("thought", "")
    if "fault" in output:
        return str(output.get("text"))
    if "retriever" in output:
        return render_route(thought, output["query"], output["retriever"][0])
    return render_answer(thought, output.get("answer", ""))


def output_of(text):
    """What the model wrote, as a result row has it."""
    step = parse_step(text)
    if isinstance(step, StepError):
        return {"fault": step.reason, "text": step.text}
    names = {"retriever": [step.route]} if isinstance(step, RouteStep) else {}
    return {**vars(step), **names}


def earned(reward, advantage=None):
    """A reward with its parts, and the advantage where there is one."""
    if reward is None:
        return Html()
    parts = {"similarity": reward.similarity, "base": reward.route, "answer": reward.answer}
    words = [f"{name} {value:.2f}" for name, value in parts.items() if is_number(value)]
    inside = [f" r\u00a0{reward.total:.3f} ({', '.join(words)})"]
    if advantage is not None:
        sign = "up" if advantage > 0 else "down" if advantage < 0 else ""
        inside += [" ", el("b", f"A\u00a0{advantage:+.3f}", class_=sign)]
    return el("span", *inside, class_="reward")


def base_of(retriever):
    return BASE_OF.get(retriever.lower(), "none")


def lines_of(output, score):
    """One output: the thought, and the answer or the routed sub-question; or what is malformed,
    and how. score: of `earned`."""
    if "fault" in output:
        text = f"{output['fault']}: {str(output.get('text'))[:300]}"
        return [el("p", el("b", "malformed: "), text, score, class_="fault")]
    thought = output.get("thought")
    lines = [el("p", thought, class_="thought")] if thought else []
    if "retriever" not in output:
        return [*lines, el("p", el("b", "→ "), output.get("answer") or "(none)", score)]
    names = output["retriever"]
    chips = [el("span", name, class_=f"chip {base_of(name)}") for name in names]
    query = "nothing more is needed" if names == [NONE] else output["query"]
    return [*lines, el("p", *chips, " ", query, score)]


def evidence(plan):
    """[the passages that a step read], the first in sight; their scores where the row has them."""
    items = []
    for prefix in PREFIX.values():
        passages, scores = plan.get(prefix) or (), plan.get(f"{prefix}_scores") or ()
        for passage, score in zip_longest(passages, scores):
            items.append((el("b", f"{score:.3f} " if is_number(score) else ""), passage or ""))
    if not items:
        return []
    lines = [el("li", *item) for item in items]
    return [el("details", el("summary", "evidence: ", *items[0]), el("ol", *lines))]


def photo(row, folder):
    """A small copy of the row's picture, or a line that it is not there."""
    if row.get("image") is None:
        return Html()
    name = str(row["image"])
    for path in (Path(name), folder / name, HERE / name):
        try:
            small = load_picture(path)
        except ValueError:
            continue
        small.thumbnail((128, 128))
        stream = io.BytesIO()
        small.save(stream, format="JPEG", quality=85)
        return picture("jpeg", stream, "the question's picture", "photo")
    return el("p", f"(picture not found: {name})", class_="note")


def card(title, facts, inside, steps, final, golds, **filters):
    """A card. filters: what those of the page look at: source, kind, base (of BASES, or none),
    hops, right (yes, no, mixed)."""
    right = filters["right"]
    mark = {"yes": "✓ right", "no": "✗ wrong", "mixed": "± mixed"}[right]
    head = el("header", el("h3", title), el("span", mark, class_=f"mark {right}"))
    gold = el("p", el("b", "gold: "), " | ".join(map(str, golds)))
    data = {f"data_{name}": value for name, value in filters.items()}
    return el("article", head, el("p", facts, class_="note"), *inside,
              el("ol", *steps, class_="steps"), el("div", *final, gold, class_="final"),
              class_="card", **data)


def is_right(row):
    _, recall, _ = answer_scores(predicted(row), golds_of(row))
    return recall == 1


def trajectory_card(row, one, encoder):
    """A result row as a card."""
    *rewards, (_, final) = step_rewards(row, encoder)
    steps, bases = [], set()
    for plan, (route, answer) in zip(plans_of(row), rewards):
        lines = lines_of(plan, earned(route)) + evidence(plan)
        if "answer" in plan:
            lines += lines_of(plan["answer"], earned(answer))
        steps.append(el("li", *lines))
        bases |= {base_of(name) for name in plan["retriever"] if name != NONE}
    kind, hops = row.get("kind") or "", row.get("hops")
    count = "" if hops is None else len(hops)
    facts = [one.label, kind, "" if hops is None else f"gold hops: {count}"]
    return card(row["question"], " · ".join(filter(None, facts)), [photo(row, one.folder)], steps,
                lines_of(row["llm_answer"], earned(final)), golds_of(row)[:5], source=one.label,
                kind=kind, base=" ".join(sorted(bases)) or "none", hops=count,
                right="yes" if is_right(row) else "no")


def group_card(row, run):
    """A logged group of a run as a card: the outputs of one prompt, their rewards and advantages.
    """
    steps, totals = [], []
    for output in row["outputs"]:
        parts = [output.parts.get(name) for name in ("similarity", "route", "answer")]
        score = earned(Reward(output.reward, 1.0, *parts), output.advantage)
        steps.append(el("li", *lines_of(output_of(output.text), score)))
        totals.append(output.reward)
    right = "yes" if totals[0] >= 1 else "no"
    if max(totals) > min(totals):
        right = "mixed"
    label, golds = str(row.get("label")), row.get("gold")
    return card(f"Group of update {row.get('step')}: {label}",
                f"{run.name} · {len(steps)} outputs of one prompt",
                [photo(row, HERE), el("pre", row.get("prompt", ""))], steps, [],
                golds if isinstance(golds, list) else [golds], source=run.name,
                kind="training group", hops="", right=right,
                base="" if label in ("answer", "outcome") else base_of(label))


def varied(rows, count):
    """`count` of the rows, kinds and right and wrong in turn, in the order of the file."""
    places_of = {}
    for place, row in enumerate(rows):
        places_of.setdefault((row.get("kind"), is_right(row)), []).append(place)
    turns = []
    for places in zip_longest(*places_of.values()):
        turns += [place for place in places if place is not None]
    return [rows[place] for place in sorted(turns[:count])]


def cards_of(runs, results, count):
    """At most `count` cards of each result file and run."""
    queries, cards = [], []
    for one in results:
        for row in one.rows:
            queries += [{"text": hop["query"]} for hop in row.get("hops") or ()]
    encoder, _ = load_encoder("lexical").fitted(queries)
    for one in results:
        cards += [trajectory_card(row, one, encoder) for row in varied(one.rows, count)]
    for run in runs:
        every = max(1, math.ceil(len(run.samples) / count))
        cards += [group_card(row, run) for row in run.samples[::every]]
    return cards


# -------------------------------------------------------------------------------------- the page

def page(runs, results, count=60):
    """The whole report as one HTML text; count: cards of each run and result file."""
    cards = cards_of(runs, results, count)
    total = sum(len(one.rows) for one in results) + sum(len(run.samples) for run in runs)
    template, style, script = [Path(__file__).with_suffix(ending).read_text(encoding="utf-8")
                               for ending in (".html", ".css", ".js")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(
        style=style, script=script, digest=digest, runs=runs_table(runs),
        scores="".join(all_score_tables(runs, results)),
        routing="".join(confusion_tables(results)), curves=panel_pictures(runs),
        smoothing=SMOOTHING, cards="".join(cards), shown=len(cards), all=total)


@dataclass(frozen=True)
class ReportOptions:
    """One HTML page from training runs and result files."""
    cards: int = option(60, "cards of each run and result file", least=1)
    out: str = option("report.html", "the page, NAME.html", metavar="FILE")

    def __post_init__(self):
        check_options(self)
        if not self.out.endswith(".html"):      # so it replaces nothing that it is made of
            raise ValueError(f"--out {self.out}: give a name that ends with .html")


def command(words):
    """Exit code 2 where rows had to be left out, too."""
    p = OneLineParser(prog="lab.report", description=ReportOptions.__doc__)
    p.add_argument("inputs", nargs="*", metavar="RUN",
                   help="run folders of train.py, result files of infer.py --out; LABEL=PATH names "
                        "one, a label twice makes two seeds of it [runs/*]")
    add_flags(p, ReportOptions)
    args = p.parse_args(words)
    o = from_flags(ReportOptions, args)
    logs = [log for log in sorted(Path("runs").glob("*/log.jsonl")) if log.stat().st_size]
    inputs = args.inputs or [str(log.parent) for log in logs]
    if not inputs:
        raise ValueError("nothing to report: no runs/*/log.jsonl here; name run folders that "
                         "train.py has written, or result files of infer.py --out")
    runs, results, faults = load(inputs)
    text = utf8(page(runs, results, o.cards))
    write_text(o.out, text)
    for fault in faults:
        say(f"lab.report: left out: {printable(fault)}")
    rows = sum(len(one.rows) for one in results)
    print(f"{o.out}: {len(runs)} runs, {rows} result rows, {len(text) / 1e6:.1f} MB")
    return 2 if faults else 0


def main(argv=None):
    return run_command("lab.report", command, argv)


if __name__ == "__main__":
    sys.exit(main())
