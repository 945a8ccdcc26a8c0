"""The score: how right an answer is by the published metric, and what a file of result rows amounts to.

    answer, gold answers -> tokens -> precision, recall, F1, exact match
    result rows (questions with plans, `llm_answer` and costs) -> measures of each -> means with intervals, by set, kind
                                                                  and number of hops -> text, CSV, JSONL

Deviation: the tokens of the metric follow nltk 3.10, which splits at dashes too, as the published figures that we test
with.
"""
import csv
import io
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from steps import BASE_OF, NONE, ROUTES

# ---------------------------------------------------------------------------------------------- the published metric

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"


def _contractions():
    """The VQA evaluation's list as a rule: a contraction that lost exactly one of its apostrophes gets it back."""
    stems = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "could might must not should they we what where who would you",
        "'d": "he how it someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
        "n't've": "could had might should would",
        "'d've": "he it she somebody someone something there they we who you y'all",
        "": "ma'am o'clock 'twas y'all y'all'll 'ow's'at",
    }
    words = [stem + tail for tail, group in stems.items() for stem in group.split()]
    table = {word[:i] + word[i + 1:]: word for word in words for i, letter in enumerate(word) if letter == "'"}
    return table | {"somebody'd": "somebodyd"}  # the list has this one the wrong way round, and so has the metric


_CONTRACTIONS = _contractions()
_SPLIT_WORDS = ("can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n")
_TREEBANK = [(re.compile(pattern), replacement) for pattern, replacement in (  # rules that normalised text can meet
    (r"([«“‘„])", r" \1 "), (r" ''", " `` "),                                  # opening quotes
    (r"(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r"\1 "),
    (r"([^.])(\.)(['»”’ ]*)$", r"\1 \2 \3 "), (r"\.{2,}", r" \g<0> "),         # periods
    (r"(:)(\D)", r" \1 \2"), (r"(:)$", r" \1 "),
    (r"[#$%&\u2012-\u2015]", r" \g<0> "), (r"([^'])' ", r"\1 ' "), (r"\*", " * "),
    (r"^|$", " "), (r"([»”’])", r" \1 "), (r"''", " '' "), (r"\s+", " "),      # closing quotes
    (r"([^' ])('s|'m|'d|') ", r"\1 \2 "), (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    *((rf"\b({first})({second})\b", r" \1 \2 ") for first, second in map(str.split, _SPLIT_WORDS)),
    (r"\b(wan)(na)(?=\s)", r" \1 \2 "), (r" ('t)(is)\b", r" \1 \2 "), (r" ('t)(was)\b", r" \1 \2 "))]


def metric_tokens(text):
    """The published normalisation and Penn-Treebank tokens of an answer: str -> list of str."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma_number = re.search(r"\d,\d", text)
    kept = text
    for sign in _SIGNS:
        beside_space = sign + " " in text or " " + sign in text
        kept = kept.replace(sign, "" if beside_space or has_comma_number else " ")
    kept = re.sub(r"\.(?!\d)", "", kept, count=32)  # 32: a flag that the published code passes as the count
    words = [_NUMBERS.get(word, word) for word in kept.lower().split()]
    text = " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("an", "the"))
    for pattern, replacement in _TREEBANK:
        text = pattern.sub(replacement, text)
    return [token for token in text.split() if token not in ",.?!:;'\""]


def _in_range(token, low, high):
    """Whether a token is among the numbers that the published code expands an infoseek range to.

    These are a grid from `low` up, whose step depends on the width, and the integers: up to 26,000, so they are not
    listed here. The normalisation takes the sign off a number, hence both signs are tried.
    """
    if not re.fullmatch(r"\d+(\.\d+)?", token):
        return False
    width = high - low
    step = 1 if width >= 50 else 0.1 if width >= 5 else 0.01 if width >= 1 else 0.001
    number = float(token)
    for value in (number, -number) if number < 1e300 else ():
        i = round((value - low) / step)
        on_grid = 0 <= i <= int(width / step) and str(round(low + i * step, 3)).lstrip("-") == token
        if on_grid or int(low) <= value <= int(high) and str(int(value)).lstrip("-") == token:
            return True
    return False


def _gold_tokens(golds, predicted):
    """Tokens of each gold; of a range, those predicted tokens that it accepts."""
    for gold in [golds] if isinstance(golds, (str, dict)) else golds:
        if isinstance(gold, dict):
            yield from ([token] for token in predicted if _in_range(token, *map(float, gold["range"])))
        else:
            yield metric_tokens(str(gold))


def answer_scores(prediction, golds):
    """The published metric: (precision, recall, f1) against the gold of best F1; F1-Recall is the mean of `recall`.

    `golds`: a string, or a list of strings and of infoseek's `{"range": [low, high]}`. Recall rewards dumping ("yes
    no" is right on every yes/no question): read it beside `exact_match`. ValueError where either is something else.
    """
    if not isinstance(prediction, str) or not isinstance(golds, (str, dict, list, tuple)):
        raise ValueError(f"answer_scores: {str(prediction)[:40]!r} against {str(golds)[:40]!r}: expected a string, and a "
                         "string or a list")
    predicted = Counter(metric_tokens(prediction))
    best = (0.0, 0.0, 0.0)
    for gold in _gold_tokens(golds, predicted):
        shared = sum((predicted & Counter(gold)).values())
        if shared:
            precision, recall = shared / predicted.total(), shared / len(gold)
            f1 = 2 * precision * recall / (precision + recall)
            best = max(best, (precision, recall, f1), key=lambda scores: scores[2])
    return best


def exact_match(prediction, golds):
    """1.0 where the prediction's tokens are those of a gold, in order, after the published normalisation, else 0.0."""
    predicted = metric_tokens(prediction)
    return float(bool(predicted) and predicted in list(_gold_tokens(golds, predicted)))


# --------------------------------------------------------------------------------------------------- the result rows

ROUTING = ("router", "fewshot")  # methods whose model chooses the bases


def plans_of(row):
    """The plans of a result row in order."""
    names = (f"plan_{i}" for i in range(1, len(row) + 1))
    return [row[name] for name in names if name in row]


def golds_of(row):
    """Accepted answers of a question row: strings and ranges; infoseek's `answer_eval` goes before `answer`."""
    golds = row.get("answer") if row.get("answer_eval") is None else row["answer_eval"]
    golds = golds if isinstance(golds, list) else [golds]
    if not golds:
        raise ValueError("gold answer []: expected at least one")
    for gold in golds:
        ends = gold.get("range") if isinstance(gold, dict) else None
        is_range = isinstance(ends, list) and len(ends) == 2 and all(
            isinstance(end, (int, float)) and -1e300 < end < 1e300 for end in ends)
        if not is_range and not isinstance(gold, (str, int)) and not (isinstance(gold, float) and math.isfinite(gold)):
            raise ValueError(f"gold answer {gold!r}: expected 'answer' or 'answer_eval' with a string, a list of "
                             "strings, or {'range': [low, high]}")
    return golds


def check_names(row):
    """ValueError where something that rows are told apart by is no text."""
    for name in ("set", "kind", "method"):
        if not isinstance(row.get(name), (str, type(None))):
            raise ValueError(f"{name} {str(row[name])[:40]!r} is of type {type(row[name]).__name__}: expected a string")


def predicted(row):
    """The answer in a result row of ours or of others: `llm_answer` is a string or {thought, answer}."""
    answer = row.get("llm_answer", ...)
    answer = answer.get("answer") if isinstance(answer, dict) else answer
    if not isinstance(answer, (str, int, float, type(None))):
        raise ValueError("no llm_answer: expected a string or {'thought', 'answer'}")
    return "" if answer is None else str(answer)


def gold_routes(row):
    """Routes of a row's gold hops with None at the end; None where the row has no hops."""
    if row.get("hops") is None:
        return None
    try:
        asked = [(hop["query"].strip(), hop["retriever"].strip().lower()) for hop in row["hops"]]
        return [ROUTES[BASE_OF[retriever]] for _, retriever in asked] + [NONE]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"hops {row['hops']!r}: expected a list of {{'query', 'retriever', 'answer'}} with a "
                         f"retriever of {', '.join(BASE_OF)}") from None


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


def printable(text):
    """Text of a file for one line of a terminal: nothing in it starts a new line or gives the terminal an order."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(text).split()))


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


def write_whole(path, text):
    """Writes a file beside its place, then renames it: nobody reads half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


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
