"""Many questions: answered, continued, measured, printed as tables."""
import csv
import io
import json
import math
import os
import sys
import zlib
from itertools import zip_longest
from pathlib import Path

import numpy as np

from parts.questions import (ROUTING, check_names, gold_routes, golds_of, load_questions, plans_of,
                             predicted, result_row, world_of)
from parts.score import answer_scores, exact_match
from parts.show import print_trace
from parts.steps import BASES
from plumbing.old import (Progress, appending, as_text, checksum, printable, read_json, read_rows,
                          write_whole)


MEASURES = ("f1_recall", "em", "f1", "route_accuracy", "malformed", "retrievals", "gold_retrievals", "model_calls",
            "tokens", "tokens_read", "tokens_written", "seconds", "seconds_model", "seconds_search", "too_long")
GROUPINGS = ("set", "kind", "hops")


def score_row(row):
    """The MEASURES of one result row, None where it cannot tell, and what it is grouped by (GROUPINGS)."""
    check_names(row)
    golds, routes, answer = golds_of(row), gold_routes(row), predicted(row)
    _, recall, f1 = answer_scores(answer, golds)
    score = dict.fromkeys(MEASURES) | {"f1_recall": recall, "em": exact_match(answer, golds), "f1": f1}
    score |= {"set": row.get("set"), "kind": row.get("kind"), "hops": None}
    try:
        if routes:
            score |= {"hops": len(routes) - 1, "gold_retrievals": len(routes) - 1}
        if routes and row.get("method") in ROUTING:
            named = [plan["retriever"] for plan in plans_of(row) if "fault" not in plan]
            if wrong := [names for names in named if not isinstance(names, list)]:
                raise TypeError(f"retriever {str(wrong[0])[:40]!r} is no list")
            chosen = [names[0].strip().lower() for names in named]
            right = sum(map(str.__eq__, chosen, map(str.lower, routes)))
            score["route_accuracy"] = right / max(len(chosen), len(routes))
        if cost := row.get("cost"):  # rows of others have none
            names = ("prompt_tokens", "generated_tokens", "seconds_model", "seconds_search")
            read, written, model, search = (float(cost[name]) for name in names)
            score |= {name: float(cost[name]) for name in ("retrievals", "model_calls", "malformed", "too_long")}
            score |= {"tokens": read + written, "tokens_read": read, "tokens_written": written,
                      "seconds": model + search, "seconds_model": model, "seconds_search": search}
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"plans or cost are not those of a result row ({type(error).__name__}: {error})") from None
    if not all(math.isfinite(score[name]) for name in MEASURES if score[name] is not None):
        raise ValueError(f"cost {str(row['cost'])[:200]}: expected finite numbers")
    return score


def means(scores, resamples=1000):
    """{"n", each of MEASURES: mean over the rows that know it, "ci": {measure: [low, high]}} of `score_row`'s results.

    The 95 % intervals are percentiles of the bootstrap over questions (Efron 1979), always drawn from seed 0.
    """
    n = len(scores)
    values = np.array([[score[name] for name in MEASURES] for score in scores], dtype=float)  # (N, measures), None: nan
    values = values[np.lexsort(values.T[::-1])]              # the order of the rows in a file makes no difference
    known = ~np.isnan(values)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)        # how often each row is
    drawn = np.concatenate([np.ones((1, n)), drawn])         # (1 + resamples, N), the first draw is the rows themselves
    with np.errstate(invalid="ignore"):                      # 0 / 0 = nan: none of the drawn rows knows the measure
        found = drawn @ np.where(known, values, 0) / (drawn @ known)                         # (1 + resamples, measures)
    result = {"n": n, **dict.fromkeys(MEASURES), "ci": dict.fromkeys(MEASURES)}
    for i in np.flatnonzero(known.any(axis=0)):
        low, high = np.nanpercentile(found[1:, i], (2.5, 97.5))
        mean, low, high = (float(f"{x:.6g}") for x in (found[0, i], low, high))
        result[MEASURES[i]], result["ci"][MEASURES[i]] = mean, [low, high]
    return result


def score_table(rows):
    """Means of the result rows of a method: of all, then of each set, kind and number of hops.

    A row is {"method", "by": "all" or one of GROUPINGS, "group": its name, **means}. `route_accuracy`: chosen against
    gold routes, both ending in None, place by place over the longer of the two. Costs are those of a question.
    """
    if not rows:
        raise ValueError("nothing to evaluate: there are no result rows")
    scores = [score_row(row) for row in rows]
    groups = {("all", ""): scores}
    for by in GROUPINGS:
        for name in sorted({str(score[by]) for score in scores if score[by] is not None}):
            groups[by, name] = [score for score in scores if str(score[by]) == name]
    method = rows[0].get("method") or "given"
    return [{"method": method, "by": by, "group": name, **means(some)} for (by, name), some in groups.items()]


def overview(table):
    """A `score_table` as one object: the means of all, and F1-Recall as {"by_kind": {kind: it}} and so on."""
    total, *groups = table
    by = {f"by_{by}": {row["group"]: row["f1_recall"] for row in groups if row["by"] == by} for by in GROUPINGS}
    return {name: value for name, value in total.items() if name not in ("by", "group")} | by


# ------------------------------------------------------------------------------------------------------------ tables

COLUMNS = (("F1-Recall", "f1_recall", ".3f"), ("95 %", "ci", ".3f"), ("exact", "em", ".3f"), ("F1", "f1", ".3f"),
           ("routing", "route_accuracy", ".3f"), ("retrievals", "retrievals", ".2f"),
           ("gold", "gold_retrievals", ".2f"), ("malformed", "malformed", ".3f"), ("calls", "model_calls", ".2f"),
           ("read", "tokens_read", ".0f"), ("written", "tokens_written", ".0f"), ("model s", "seconds_model", ".3f"),
           ("search s", "seconds_search", ".4f"))


def print_table(rows):
    """Rows of equal length, the first one the heading; the first column left, the others right."""
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]))
    print()


def cell(value, form=".3f"):
    """A number, or the two of an interval; "-" for None."""
    if isinstance(value, list):
        return "-".join(cell(end, form) for end in value)
    return "-" if value is None else format(value, form)


def cells(row):
    """A row of `score_table` as it is printed, behind its name."""
    return [str(row["n"]), *(cell(row["ci"]["f1_recall"] if name == "ci" else row[name], form)
                             for _, name, form in COLUMNS)]


def print_results(tables):
    """A line a method: scores and costs a question. Then the same by set, kind and hops; where there are several
    methods, F1-Recall with a column for each."""
    head, methods = ["n", *(title for title, _, _ in COLUMNS)], [table[0]["method"] for table in tables]
    print_table([["method", *head], *([table[0]["method"], *cells(table[0])] for table in tables)])
    for by in GROUPINGS:
        found = [{row["group"]: row for row in table if row["by"] == by} for table in tables]
        names = sorted(set().union(*found))
        if by == "set" and len(names) < 2:
            continue
        if names and len(tables) == 1:
            print_table([[f"by {by}", *head], *([name, *cells(found[0][name])] for name in names)])
        elif names:
            print_table([[f"F1-Recall by {by}", *methods],
                         *([name, *(cell(rows.get(name, {}).get("f1_recall")) for rows in found)] for name in names)])


def write_table(path, rows, form):
    """Rows of `score_table` as JSONL, or with `form` "csv" as CSV, the intervals then in columns of their own."""
    text = io.StringIO()
    if form == "csv":
        ends = [(name, i, f"{name}_{end}") for name in MEASURES for i, end in enumerate(("low", "high"))]
        columns = [name for name in rows[0] if name != "ci"] + [column for _, _, column in ends]
        out = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        out.writeheader()
        # a spreadsheet would run a text that begins like a formula
        still = lambda cell: "'" + cell if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") else cell
        out.writerows({name: still(cell) for name, cell in row.items()}
                      | {column: (row["ci"][name] or ("", ""))[i] for name, i, column in ends} for row in rows)
    else:
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text.getvalue())


def evaluate(trajectories):
    """Scores and costs of Trajectories or result rows of one method, as one object (`score.overview`)."""
    return overview(score_table([row if isinstance(row, dict) else result_row(row) for row in trajectories]))


def earlier_rows(path, run):
    """Rows that an interrupted run with the same settings left in its --out file; a torn last line is cut off."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        ours = all(row["run"] == run and row["llm_answer"] for row in rows) and (rows or not data or begins_row(data))
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{path}: holds other rows than this run's (settings, weights, questions): name another --out")
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return rows


def begins_row(data):
    """Whether a file holds the beginning of a row and no more, as a first row that was torn while it was written."""
    try:
        json.loads(data)
    except ValueError:
        return data.startswith(b'{"') and b"\n" not in data
    return False


def many_questions(args, world):
    """The questions of --eval or of the world, and the rows left out."""
    if args.eval is None and world is None:
        raise ValueError("nothing to evaluate: give --eval FILE beside --kb")
    questions, faults, sets = [], [], {}
    for file in args.eval or [world / "questions.jsonl"]:
        rows, wrong = load_questions(file, args.images, args.limit)
        if sets.setdefault(rows[0]["set"], file) != file:
            raise ValueError(f"--eval: {sets[rows[0]['set']]} and {file} have one name, but it tells sets apart: "
                             "rename one")
        questions, faults = questions + rows, faults + wrong
    return questions, faults


def answer_many(router, questions, args, show):
    """Result rows of all questions, written to --out as they come, and the faults of those that could not be answered.

    Rows of an earlier run are taken from --out. The first `show` questions of different kinds are answered and shown
    before the others.
    """
    method, rows, faults, run = router.options.method, {}, {}, settings_mark(router, args)
    with appending(args.out) if args.out else open(os.devnull, "a") as out:
        if args.out:
            rows = {row_key(row): row for row in earlier_rows(args.out, run) if row["method"] == method}
            refuse_others(args.out, rows, questions)
        progress = Progress(method, sum(row_key(question) not in rows for question in questions))

        def keep(trajectory):
            row = result_row(trajectory) | {"run": run}
            rows[row_key(row)] = row
            print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
            progress.step()

        def answer(some):
            """Runs what is still open. Where a row makes that fail, each half is run, down to the row alone."""
            some = [question for question in some if row_key(question) not in rows.keys() | faults.keys()]
            if not some:
                return
            try:
                router.run(some, keep)
            except ValueError as error:
                if len(some) == 1:
                    faults[row_key(some[0])] = f"{some[0]['set']}:{some[0]['line']}: {error}"
                else:
                    answer(some[:len(some) // 2])
                    answer(some[len(some) // 2:])

        first = different_kinds(questions, show)
        answer(first)
        for question in first if not args.json else ():
            if row_key(question) in rows:
                print_trace(rows[row_key(question)])
        answer(questions)
    return [rows[row_key(question)] for question in questions if row_key(question) in rows], list(faults.values())


def row_key(row):
    """Which question of a run a row is."""
    return row["set"], row["line"]


def refuse_others(path, rows, questions):
    """ValueError where a kept row {row_key: row} answers another question than the file has there now."""
    for question in questions:
        row = rows.get(row_key(question))
        fields = ("question", "image", "answer", "answer_eval", "hops")
        if row and any(row.get(name) != question.get(name) for name in fields):
            raise ValueError(f"{path}: its answer to line {question['line']} of {question['set']} is that to another "
                             "question: name another --out")


def different_kinds(questions, n):
    """The first n questions, those that open a new kind before the others, with and without a picture in turn."""
    kinds, new, others = set(), ([], []), []
    for question in questions:
        fresh = question.get("kind") not in kinds
        (new[question["image"] is None] if fresh else others).append(question)
        kinds.add(question.get("kind"))
    turns = [question for pair in zip_longest(*new) for question in pair if question]
    return (turns + others)[:n]


def mark_of(args, name):
    """What tells a base of the world from all others: its corpus, or, where somebody else built it, the base."""
    corpus, manifest = world_of(args) / f"{name}.jsonl", world_of(args) / "kb" / name / "manifest.json"
    built = read_json(manifest) if manifest.is_file() else {"corpus": None}
    return built.get("sha256") if "corpus" not in built else checksum(corpus) if corpus.is_file() else None


def settings_mark(router, args):
    """A short mark of all that the answers depend on, so that rows of another run are not taken for this one's."""
    o = router.options
    weights = [[str(file), file.stat().st_mtime] for file in sorted(Path(args.model).glob("*.safetensors"))]
    bases = [base.mark for base in router.bases.values()] if args.kb else [mark_of(args, name) for name in BASES]
    settings = [weights, bases, args.eval, args.world, args.kb, args.images, args.dtype, router.prompts,
                o.k, o.static_k, o.max_steps, o.max_new_tokens, o.temperature, o.seed]
    return f"{zlib.crc32(json.dumps(settings).encode()):08x}"


def score_command(args):
    """Scores existing result files, a line a method; the set of others' rows is named after their file.

    Whose rows were left out cannot be told of all: they are counted in the first line.
    """
    methods, faults, seen = {}, [], {}
    for file in args.score:
        def check(row, number):
            row = {"set": Path(file).stem, "line": number, **row}
            score_row(row)
            as_text(row)
            return row
        rows, wrong = read_rows(file, check, args.limit)
        faults += wrong
        for row in rows:
            method = row.get("method") or "given"
            if seen.setdefault((method, str(row_key(row))), row) is not row:
                raise ValueError(f"{file}: line {row['line']} of set {row['set']!r} is there twice for method "
                                 f"{method!r}: score files of different runs one at a time")
            methods.setdefault(method, []).append(row)
    report([score_table(rows) for rows in methods.values()], [faults] + [[]] * (len(methods) - 1), args)


def report(tables, left_out, args):
    """Tables, the rows left out, and a JSON object a method as the last lines."""
    for flag, path in (("csv", args.csv), ("jsonl", args.jsonl)):
        if path:
            write_table(path, [row for table in tables for row in table], flag)
    if not args.json:
        print_results(tables)
    for fault in dict.fromkeys(fault for faults in left_out for fault in faults):
        print(f"infer.py: left out: {printable(fault)}", file=sys.stderr)
    for table, faults in zip(tables, left_out):
        print(json.dumps(overview(table) | {"left_out": len(faults)}, ensure_ascii=False))
