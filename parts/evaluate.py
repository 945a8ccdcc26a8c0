"""Many questions: answered, continued after a stop, measured, printed as tables.

    questions -> answer_many -> result rows (a JSONL file that grows) -> score_row -> measures
    -> score_table: means with intervals, of all and by set, kind, number of hops -> print_results
    two runs on the same questions -> compare: the difference, its interval and p-value
"""
import json
import math
import os
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.questions import (HERE, ROUTING, check_names, gold_routes, golds_of, load_questions,
                             plans_of, predicted)
from parts.score import answer_scores, exact_match
from parts.show import print_trace
from parts.stepfiles import write_steps
from parts.steps import BASES
from parts.trajectory import result_row
from plumbing.files import (Progress, as_text, checksum, lock, printable, read_json, read_jsonl,
                            say, whole_lines)


class Column(NamedTuple):
    """A column of a table of results."""
    title: str
    measure: str        # one of MEASURES
    format: str
    sentence: str       # what it says


COLUMNS = (     # costs are those of a question
    Column("F1-Recall", "f1_recall", ".3f", "share of the gold answer's words that an answer has"),
    Column("exact", "em", ".3f", "share of answers that are a gold answer and nothing else"),
    Column("F1", "f1", ".3f", "harmonic mean of an answer's precision and recall in words"),
    Column("routing", "route_accuracy", ".3f", "share of routing steps that chose the gold base"),
    Column("retrievals", "retrievals", ".2f", "searches of a knowledge base"),
    Column("gold", "gold_retrievals", ".2f", "searches that the gold hops need"),
    Column("malformed", "malformed", ".3f", "outputs that are no step"),
    Column("calls", "model_calls", ".2f", "steps that the model was asked for"),
    Column("read", "tokens_read", ".0f", "tokens of the prompts"),
    Column("written", "tokens_written", ".0f", "tokens that the model wrote"),
    Column("model s", "seconds_model", ".3f", "seconds of the model"),
    Column("search s", "seconds_search", ".4f", "seconds of the searches"))
MEASURES = ("f1_recall", "em", "f1", "route_accuracy", "malformed", "retrievals",
            "gold_retrievals", "model_calls", "tokens", "tokens_read", "tokens_written", "seconds",
            "seconds_model", "seconds_search", "too_long")
GROUPINGS = ("set", "kind", "hops")
LATER = ("top_k", "top_p", "retries", "lower_case", "several")      # see settings_mark


# ---------------------------------------------------------------------------------------- measures

def score_row(row):
    """The MEASURES of one result row, None where it cannot tell, and what it is grouped by
    (GROUPINGS). ValueError where it is no result row."""
    check_names(row)
    golds, routes, answer = golds_of(row), gold_routes(row), predicted(row)
    _, recall, f1 = answer_scores(answer, golds)
    score = dict.fromkeys(MEASURES)
    score.update(f1_recall=recall, em=exact_match(answer, golds), f1=f1)
    score.update(set=row.get("set"), kind=row.get("kind"), hops=None)
    if routes:
        score["hops"] = score["gold_retrievals"] = len(routes) - 1          # the last one is None
    try:
        if routes and row.get("method") in ROUTING:
            score["route_accuracy"] = route_accuracy(plans_of(row), routes)
        if row.get("cost"):                                             # rows of others have none
            score.update(measured_costs(row["cost"]))
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError("plans or cost are not those of a result row "
                         f"({type(error).__name__}: {error})") from None
    for name in MEASURES:
        if score[name] is not None and not math.isfinite(score[name]):
            raise ValueError(f"cost {str(row['cost'])[:200]}: expected finite numbers")
    return score


def route_accuracy(plans, routes):
    """Chosen against gold routes, both ending in None, place by place over the longer of the two.
    Malformed routing steps choose nothing; one that names several bases is wrong."""
    chosen = []
    for plan in plans:
        if "fault" in plan:
            continue
        names = plan["retriever"]
        if not isinstance(names, list) or not names:
            raise TypeError(f"retriever {str(names)[:40]!r} is no list of names")
        chosen.append([name.strip().lower() for name in names])
    right = sum(names == [route.lower()] for names, route in zip(chosen, routes))
    return right / max(len(chosen), len(routes))


def measured_costs(cost):
    """The measures that a row's `cost` holds."""
    read, written = float(cost["prompt_tokens"]), float(cost["generated_tokens"])
    model, search = float(cost["seconds_model"]), float(cost["seconds_search"])
    measures = {"tokens": read + written, "tokens_read": read, "tokens_written": written,
                "seconds": model + search, "seconds_model": model, "seconds_search": search}
    for name in ("retrievals", "model_calls", "malformed", "too_long"):
        measures[name] = float(cost[name])
    return measures


def means(scores, resamples=1000):
    """{"n", each of MEASURES: mean over the rows that know it, "ci": {measure: [low, high]}} of
    score_row's results.

    The 95 % intervals are percentiles of the bootstrap over questions (Efron 1979), always drawn
    from seed 0.
    """
    n = len(scores)
    rows = [[score[name] for name in MEASURES] for score in scores]
    values = np.array(rows, dtype=float)                        # (n, measures), None becomes nan
    values = values[np.lexsort(values.T[::-1])]                 # their order makes no difference
    known = ~np.isnan(values)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)      # how often a row is drawn
    counts = np.concatenate([np.ones((1, n)), counts])      # (1 + resamples, n), first: each once
    with np.errstate(invalid="ignore"):                         # 0 / 0 = nan: no drawn row knows it
        averages = counts @ np.where(known, values, 0) / (counts @ known)
    result = {"n": n, **dict.fromkeys(MEASURES), "ci": dict.fromkeys(MEASURES)}
    for i in np.flatnonzero(known.any(axis=0)):
        low, high = np.nanpercentile(averages[1:, i], (2.5, 97.5))
        result[MEASURES[i]] = six_digits(averages[0, i])
        result["ci"][MEASURES[i]] = [six_digits(low), six_digits(high)]
    return result


def six_digits(number):
    return float(f"{number:.6g}")


def compare(rows_a, rows_b, resamples=10000):
    """How much better run A answers than run B does, in F1-Recall: as `paired` has it.

    The i-th rows of both lists, with "set" and "line", answer the same question, else ValueError.
    Rows of several seeds may stand in a list: a question counts with the mean of its rows, and is
    drawn with all of them.
    """
    if len(rows_a) != len(rows_b) or not rows_a:
        raise ValueError(f"{len(rows_a)} and {len(rows_b)} result rows: expected as many of A as "
                         "of B, and at least one")
    gains_of = {}                                   # question -> F1-Recall of A - B, for each seed
    for a, b in zip(rows_a, rows_b):
        question = str((row_key(a), a.get("question")))
        if question != str((row_key(b), b.get("question"))):
            raise ValueError(f"line {a['line']} of set {a['set']!r}: A and B answer different "
                             "questions: compare runs on one question file")
        gain = score_row(a)["f1_recall"] - score_row(b)["f1_recall"]
        gains_of.setdefault(question, []).append(gain)
    return paired([np.mean(gains) for gains in gains_of.values()], resamples)


def paired(gains, resamples=10000):
    """The score of A minus that of B on each of n questions -> {"n", "difference": their mean,
    "ci": [low, high], "p", "a_only" and "b_only": shares of the questions on which A and B score
    higher}.

    The 95 % interval is percentiles of the paired bootstrap over questions (Efron & Tibshirani
    1993; Koehn 2004), always drawn from seed 0. p is two-sided: twice the smaller share of the
    resampled differences that are at most, or at least, 0; 0 says less than 2 / resamples.
    """
    n = len(gains)
    gains = np.sort(gains).round(12)                                                # (n,)
    rng = np.random.default_rng(0)
    differences = np.empty(resamples)
    for i in range(resamples):                      # one at a time: n may be large
        counts = rng.multinomial(n, np.full(n, 1 / n))      # (n,), how often each is drawn
        differences[i] = counts @ gains / n
    differences = differences.round(12)             # 1e-17 is a tie
    low, high = np.percentile(differences, (2.5, 97.5))
    smaller = min(np.mean(differences <= 0), np.mean(differences >= 0))
    return {"n": n, "difference": six_digits(gains.mean().round(12)),
            "ci": [six_digits(low), six_digits(high)], "p": six_digits(min(2 * smaller, 1)),
            "a_only": six_digits(np.mean(gains > 0)), "b_only": six_digits(np.mean(gains < 0))}


def score_table(rows, name=None):
    """Means of the result rows of a method: of all, then of each set, kind and number of hops.

    A row is {"method", "by": "all" or one of GROUPINGS, "group": its name, **means}. Costs are
    those of a question. `name` stands there in place of the method.
    """
    if not rows:
        raise ValueError("nothing to evaluate: there are no result rows")
    scores = [score_row(row) for row in rows]
    method = name or method_of(rows[0])
    table = [{"method": method, "by": "all", "group": "", **means(scores)}]
    for by in GROUPINGS:
        groups = {}
        for score in scores:
            if score[by] is not None:
                groups.setdefault(str(score[by]), []).append(score)
        for name in sorted(groups):
            table.append({"method": method, "by": by, "group": name, **means(groups[name])})
    return table


def method_of(row):
    return row.get("method") or "given"


def overview(table):
    """A score_table as one object: the means of all, and F1-Recall as {"by_kind": {kind: it}} and
    so on."""
    total, *groups = table
    result = {name: value for name, value in total.items() if name not in ("by", "group")}
    for by in GROUPINGS:
        result[f"by_{by}"] = {row["group"]: row["f1_recall"] for row in groups if row["by"] == by}
    return result


def evaluate(trajectories):
    """Scores and costs of Trajectories, or of result rows, of one method, as one object (see
    overview)."""
    rows = []
    for item in trajectories:
        rows.append(item if isinstance(item, dict) else result_row(item))
    return overview(score_table(rows))


# ------------------------------------------------------------------------------------------ tables

def print_table(rows):
    """Rows of equal length, the first one the heading; the first column left, the others right."""
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        texts = [row[0].ljust(widths[0])]
        for text, width in zip(row[1:], widths[1:]):
            texts.append(text.rjust(width))
        print("  ".join(texts))
    print()


def cell(value, form=".3f"):
    """A number, or the two of an interval; "-" for None."""
    if isinstance(value, list):
        return "-".join(cell(end, form) for end in value)
    return "-" if value is None else format(value, form)


def heading():
    """The titles of the printed columns; the interval of F1-Recall stands beside it."""
    titles = [column.title for column in COLUMNS]
    return ["n", titles[0], "95 %", *titles[1:]]


def cells(row):
    """A row of a score_table under `heading`."""
    numbers = [cell(row[column.measure], column.format) for column in COLUMNS]
    return [str(row["n"]), numbers[0], cell(row["ci"]["f1_recall"]), *numbers[1:]]


def print_results(tables):
    """A line a method: scores and costs a question. Then the same by set, kind and hops; where
    there are several methods, F1-Recall with a column for each."""
    lines = [["method", *heading()]]
    for table in tables:
        lines.append([table[0]["method"], *cells(table[0])])
    print_table(lines)
    for by in GROUPINGS:
        groups = []                                             # of each table: {name: its row}
        for table in tables:
            groups.append({row["group"]: row for row in table if row["by"] == by})
        names = sorted(set().union(*groups))
        if not names or by == "set" and len(names) < 2:
            continue
        if len(tables) == 1:
            lines = [[f"by {by}", *heading()]]
            lines += [[name, *cells(groups[0][name])] for name in names]
        else:
            lines = [[f"F1-Recall by {by}", *(table[0]["method"] for table in tables)]]
            for name in names:
                scores = [rows[name]["f1_recall"] if name in rows else None for rows in groups]
                lines.append([name, *map(cell, scores)])
        print_table(lines)


def print_comparison(a, b, result):
    """One line for people: what `compare` says of the methods named a and b."""
    low, high = result["ci"]
    p = "p < 0.001" if result["p"] < 0.001 else f"p {result['p']:.3f}"
    line = (f"{a} - {b}: F1-Recall {result['difference']:+.3f}, 95 % {low:.3f} to {high:.3f}, {p}; "
            f"{a} scores higher on {100 * result['a_only']:.1f} %, "
            f"{b} on {100 * result['b_only']:.1f} % of {result['n']} questions")
    print(printable(line))


def report(tables, left_out, as_json, comparison=None):
    """Prints the tables and the comparison of the two (not with `as_json`), on stderr the rows that
    were left out, and in the end a line of JSON for each method and one for the comparison.
    left_out: a list of faults for each table."""
    if not as_json:
        print_results(tables)
    if comparison and not as_json:
        a, b = (table[0]["method"] for table in tables)
        print_comparison(a, b, comparison)
    all_faults = []
    for faults in left_out:
        all_faults += faults
    for fault in dict.fromkeys(all_faults):                     # each once
        say(f"infer.py: left out: {printable(fault)}")
    for table, faults in zip(tables, left_out):
        result = {**overview(table), "left_out": len(faults)}
        print(json.dumps(result, ensure_ascii=False))
    if comparison:
        print(json.dumps(comparison, ensure_ascii=False))


def score_files(files, limit=None):
    """Result files of ours or of others -> (tables, left_out, comparison).

    tables: a score_table of each method; left_out: a list of faults for each table. Where two files
    answer the same questions with one method each, each has a table of its own, and the comparison
    is {"compare": the files, **compare}; else it is None.
    """
    results = [read_results(file, limit) for file in files]
    if len(files) == 2:
        (rows_a, faults_a), (rows_b, faults_b) = results
        rows_b = in_order_of(rows_a, rows_b)
        if rows_b:
            comparison = {"compare": list(map(str, files)), **compare(rows_a, rows_b)}
            names = names_apart([method_of(rows_a[0]), method_of(rows_b[0])], files)
            tables = [score_table(rows_a, names[0]), score_table(rows_b, names[1])]
            return tables, [faults_a, faults_b], comparison
    rows_of, all_faults, seen = {}, [], {}
    for file, (rows, faults) in zip(files, results):
        all_faults += faults
        for row in rows:
            method = method_of(row)
            if seen.setdefault((method, str(row_key(row))), row) is not row:
                raise ValueError(f"{file}: line {row['line']} of set {row['set']!r} is there twice "
                                 f"for method {method!r}: score files of different runs one at a "
                                 "time, or two with a method each and all the same lines")
            rows_of.setdefault(method, []).append(row)
    tables = [score_table(rows) for rows in rows_of.values()]
    left_out = [all_faults] + [[] for _ in tables[1:]]      # all at the first: whose is not known
    return tables, left_out, None


def in_order_of(rows_a, rows_b):
    """rows_b in the order of rows_a, by their keys. None unless both have the same keys, each once,
    and a method each."""
    for rows in (rows_a, rows_b):
        if len(set(map(method_of, rows))) > 1:
            return None
    keys = [str(row_key(row)) for row in rows_a]
    row_of = {str(row_key(row)): row for row in rows_b}
    if len(rows_b) != len(keys) or sorted(row_of) != sorted(keys):
        return None
    return [row_of[key] for key in keys]


def names_apart(methods, files):
    """What two tables are called: by the method, and where that is the same, the file's name or
    else its path."""
    if methods[0] != methods[1]:
        return methods
    stems = [Path(file).stem for file in files]
    if stems[0] == stems[1]:
        stems = files
    return [f"{method} {stem}" for method, stem in zip(methods, stems)]


def read_results(file, limit=None):
    """The rows of a result file that can be scored, and faults. Rows that name no set get the
    file's name."""
    def check(row, number):
        row = {"set": Path(file).stem, "line": number, **row}
        score_row(row)
        as_text(row)
        return row

    return read_jsonl(file, check, limit)


# ---------------------------------------------------------------------------------- many questions

def questions_of(methods, flags, world):
    """For each method the questions of --eval or of the world that it can answer, and the faults of
    the rows that are left out: [(questions, faults)]."""
    if not flags.eval and world is None:
        raise ValueError("nothing to evaluate: give --eval FILE beside --kb")
    questions, faults, file_of = [], [], {}
    for file in flags.eval or [world / "questions.jsonl"]:
        rows, bad = load_questions(file, flags.images, flags.limit)
        first = file_of.setdefault(rows[0]["set"], file)
        if first != file:
            raise ValueError(f"--eval: {first} and {file} have one name, but it tells sets apart: "
                             "rename one")
        questions += rows
        faults += bad
    with_hops, without = [], []
    for row in questions:
        if row.get("hops") is not None:
            with_hops.append(row)
        else:
            without.append(f"{row['set']}:{row['line']}: no gold hops, which method oracle needs")
    if "oracle" in methods and not with_hops:
        raise ValueError("method oracle: no question of the file has gold hops, leave it out of "
                         "--method")
    oracle, others = (with_hops, faults + without), (questions, faults)
    return [oracle if method == "oracle" else others for method in methods]


def evaluate_routers(routers, questions, flags):
    """Evaluates each router's method on its questions, prints the tables, and writes what the flags
    of infer.py ask for. questions: as questions_of returns them."""
    mark = settings_mark(flags, routers[0]) if flags.out else None
    show = flags.show
    tables, left_out, answered = [], [], []
    for router, (rows, faults) in zip(routers, questions):
        results = answer_many(router, rows, flags.out, mark, show, flags.json)
        show = 0                                            # the first method's steps are shown
        tables.append(score_table(results))
        left_out.append(faults)
        answered += results
    report(tables, left_out, flags.json)
    if flags.write_steps:
        count = write_steps(flags.write_steps, answered, routers[0].prompts, flags.keep)
        say(f"{flags.write_steps}: steps of {count} of {len(answered)} trajectories")


def answer_many(router, questions, out=None, mark=None, show=0, quiet=False):
    """Result rows of all questions, in their order.

    out: a file that gets the rows as they come; those that an earlier run with the same settings
    (`mark`, see settings_mark) left there are taken over. The first `show` questions of different
    kinds are answered before the others, and unless `quiet` their steps are printed.
    """
    method, rows = router.options.method, {}                    # row_key -> row
    progress = Progress(len(questions), f"questions ({method})")

    def add_row(trajectory):
        row = {**result_row(trajectory), "run": mark}
        rows[row_key(row)] = row
        if out:
            print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
        progress.add()

    def still_open(some):
        return [question for question in some if row_key(question) not in rows]

    with appending(out) if out else nullcontext() as file:
        for row in earlier_rows(out, mark) if out else ():
            if row["method"] == method:
                rows[row_key(row)] = row
        refuse_others(out, rows, questions)
        progress.add(len(questions) - len(still_open(questions)), earlier=True)
        first = different_kinds(questions, show)
        router.run(still_open(first), add_row)
        if not quiet:
            for question in first:
                print_trace(rows[row_key(question)])
        router.run(still_open(questions), add_row)
    return [rows[row_key(question)] for question in questions]


def row_key(row):
    """Which question of a run a row is."""
    return row["set"], row["line"]


def different_kinds(questions, n):
    """The first n questions, those that open a new kind before the others, with and without a
    picture in turn."""
    kinds = set()
    with_picture, without_picture, others = [], [], []
    for question in questions:
        kind = question.get("kind")
        if kind in kinds:
            others.append(question)
        elif question["image"] is None:
            without_picture.append(question)
        else:
            with_picture.append(question)
        kinds.add(kind)
    first = []
    for pair in zip_longest(with_picture, without_picture):
        first += [question for question in pair if question]
    return (first + others)[:n]


# ------------------------------------------------------------------------- a result file that grows

@contextmanager
def appending(path):
    """A result file, open for rows at its end. One process holds it until the block ends; it goes
    again where no row came."""
    with lock(path, wait=False):
        try:
            with open(path, "a", encoding="utf-8") as file:
                yield file
        except OSError as error:
            if error.filename or isinstance(error, BrokenPipeError):
                raise
            _, end = whole_lines(path)                          # the last row may be there in part
            os.truncate(path, end)
            raise OSError(f"{path}: {error.strerror}: make room, and the same command continues "
                          "behind the last whole row") from None
        finally:
            if os.path.exists(path) and os.path.getsize(path) == 0:
                os.unlink(path)


def earlier_rows(path, mark):
    """The rows that an interrupted run with the same settings left in its result file. A last line
    that was torn by a kill is cut off. ValueError where the file holds anything else."""
    lines, end = whole_lines(path)
    torn = Path(path).read_bytes()[end:]
    try:
        rows = [json.loads(line) for line in lines]
        ours = all(row["run"] == mark and row["llm_answer"] for row in rows)
    except (ValueError, KeyError, TypeError):
        ours = False
    if torn and not lines:
        ours = begins_row(torn)
    if not ours:
        raise ValueError(f"{path}: holds other rows than this run's (settings, weights, "
                         "questions): name another --out")
    if torn:
        os.truncate(path, end)
    return rows


def begins_row(line):
    """Whether a line is the beginning of a row and no more, as a first row that was torn."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b'{"')
    return False


def refuse_others(path, rows, questions):
    """ValueError where an earlier row {row_key: row} answers another question than the question
    file has there now."""
    for question in questions:
        row = rows.get(row_key(question))
        if row is None:
            continue
        for name in ("question", "image", "answer", "answer_eval", "hops"):
            if row.get(name) != question.get(name):
                raise ValueError(f"{path}: its answer to line {question['line']} of "
                                 f"{question['set']} is that to another question: name another "
                                 "--out")


def settings_mark(flags, router):
    """A short mark of all that the answers depend on, by content: weights, bases, settings. Rows of
    another mark are not taken for this run's. flags: those of infer.py.

    The options of LATER count where they are not at their defaults: so older files keep theirs.
    """
    weights = [checksum(file) for file in sorted(Path(flags.model).glob("*.safetensors"))]
    if flags.kb:
        bases = [base.mark for base in router.bases.values()]
    else:
        bases = [mark_in_world(world_of(flags), name) for name in BASES]
    o = router.options
    settings = [weights, bases, flags.eval, flags.world, flags.images, flags.dtype, router.prompts,
                o.k, o.passages_each, o.max_steps, o.max_new_tokens, o.temperature, o.seed]
    later = {}
    for f in fields(o):
        value = getattr(o, f.name)
        if f.name in LATER and value != f.default:
            later[f.name] = value
    if later:
        settings.append(later)
    return f"{zlib.crc32(json.dumps(settings).encode()):08x}"


def mark_in_world(world, name):
    """What tells a base of a world from all others: its corpus, or, where somebody else built it
    there, the base. None where there is neither."""
    manifest = world / "kb" / name / "manifest.json"
    if manifest.is_file():
        built = read_json(manifest)
        if "corpus" not in built:
            return built.get("sha256")
    corpus = world / f"{name}.jsonl"
    return checksum(corpus) if corpus.is_file() else None


def world_of(flags):
    """The folder of the world that the flags of infer.py name, or of the embedded one."""
    return Path(flags.world or HERE / "data" / "demo")
