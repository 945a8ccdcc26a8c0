"""The score: how right an answer is by the published metric, and what a file of result rows amounts to.

    answer, gold answers -> tokens -> precision, recall, F1, exact match
    result rows (questions with plans, `llm_answer` and costs) -> measures of each -> means with intervals, by set, kind
                                                                  and number of hops -> text, CSV, JSONL

Deviation: the tokens of the metric follow nltk 3.10, which splits at dashes too, as the published figures that we test
with.
"""
import re
from collections import Counter

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
