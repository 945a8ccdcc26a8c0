"""The published metric: how right an answer is.

    answer, gold answers -> tokens -> precision, recall, F1, exact match

Deviation: the tokens follow nltk 3.10, which splits at dashes too, as do the published figures that
we test with.
"""
import re
from collections import Counter

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
                "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
STEMS = {  # what the contractions of the VQA evaluation's list end in -> what they begin with
    "n't": "ai are ca could did does do had has have is might must need ought sha should was "
           "were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "": "ma'am o'clock 'twas y'all y'all'll 'ow's'at",
}
TREEBANK = (  # pattern -> replacement: the Penn-Treebank rules that normalised text can meet
    # opening quotes
    (r"([«“‘„])", r" \1 "),
    (r" ''", " `` "),
    (r"(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r"\1 "),
    # periods and other signs
    (r"([^.])(\.)(['»”’ ]*)$", r"\1 \2 \3 "),
    (r"\.{2,}", r" \g<0> "),
    (r"(:)(\D)", r" \1 \2"),
    (r"(:)$", r" \1 "),
    (r"[#$%&\u2012-\u2015]", r" \g<0> "),
    (r"([^'])' ", r"\1 ' "),
    (r"\*", " * "),
    # closing quotes
    (r"^|$", " "),
    (r"([»”’])", r" \1 "),
    (r"''", " '' "),
    (r"\s+", " "),
    (r"([^' ])('s|'m|'d|') ", r"\1 \2 "),
    (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    # words that are two
    (r"\b(can)(not)\b", r" \1 \2 "),
    (r"\b(d)('ye)\b", r" \1 \2 "),
    (r"\b(gim)(me)\b", r" \1 \2 "),
    (r"\b(gon)(na)\b", r" \1 \2 "),
    (r"\b(got)(ta)\b", r" \1 \2 "),
    (r"\b(lem)(me)\b", r" \1 \2 "),
    (r"\b(more)('n)\b", r" \1 \2 "),
    (r"\b(wan)(na)(?=\s)", r" \1 \2 "),
    (r" ('t)(is)\b", r" \1 \2 "),
    (r" ('t)(was)\b", r" \1 \2 "),
)


def contractions():
    """{"dont": "don't", ...}: a contraction that lost exactly one apostrophe gets it back."""
    table = {}
    for ending, stems in STEMS.items():
        for stem in stems.split():
            word = stem + ending
            for i, letter in enumerate(word):
                if letter == "'":
                    table[word[:i] + word[i + 1:]] = word
    table["somebody'd"] = "somebodyd"   # the wrong way round in the list, and so in the metric
    return table


CONTRACTIONS = contractions()


def metric_tokens(text):
    """The tokens of an answer after the published normalisation: str -> list of str."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma_number = re.search(r"\d,\d", text)
    bare = text
    for sign in SIGNS:
        beside_space = sign + " " in text or " " + sign in text
        bare = bare.replace(sign, "" if beside_space or has_comma_number else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)  # a flag that the published code gives as count
    words = []
    for word in bare.lower().split():
        word = NUMBER_WORDS.get(word, word)
        if word not in ("an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return [token for token in treebank_tokens(" ".join(words)) if token not in ",.?!:;'\""]


def treebank_tokens(text):
    """Penn-Treebank tokens of a normalised text."""
    for pattern, replacement in TREEBANK:
        text = re.sub(pattern, replacement, text)
    return text.split()


def in_range(token, low, high):
    """Whether a token is among the numbers that the published code expands an infoseek range to.

    These are a grid from `low` up, whose step depends on the width, and the integers: up to 26,000,
    so they are not listed here. The normalisation takes the sign off a number, so both signs are
    tried.
    """
    if not re.fullmatch(r"\d{1,300}(\.\d+)?", token):           # more digits are beyond any float
        return False
    width = high - low
    if width >= 50:
        step = 1
    elif width >= 5:
        step = 0.1
    elif width >= 1:
        step = 0.01
    else:
        step = 0.001
    for value in (float(token), -float(token)):
        i = round((value - low) / step)                         # the nearest place of the grid
        place = str(round(low + i * step, 3)).lstrip("-")
        if place == token and 0 <= i <= int(width / step):
            return True
        if str(int(value)).lstrip("-") == token and int(low) <= value <= int(high):
            return True
    return False


def gold_tokens(golds, predicted):
    """The tokens of each gold: lists of str. Of a range, each predicted token that it accepts."""
    if isinstance(golds, (str, dict)):
        golds = [golds]
    token_lists = []
    for gold in golds:
        if isinstance(gold, dict):
            low, high = map(float, gold["range"])
            token_lists += [[token] for token in predicted if in_range(token, low, high)]
        else:
            token_lists.append(metric_tokens(str(gold)))
    return token_lists


def answer_scores(prediction, golds):
    """The published metric: (precision, recall, f1) against the gold of best F1. F1-Recall is the
    mean of `recall`.

    golds: a string, or a list of strings and of infoseek's {"range": [low, high]}; ValueError for
    anything else. Recall rewards dumping ("yes no" is right on every yes/no question): read it
    beside `exact_match`.
    """
    if not isinstance(prediction, str) or not isinstance(golds, (str, dict, list, tuple)):
        raise ValueError(f"answer_scores: {str(prediction)[:40]!r} against {str(golds)[:40]!r}: "
                         "expected a string, and a string or a list")
    predicted = Counter(metric_tokens(prediction))
    best = 0.0, 0.0, 0.0
    for gold in gold_tokens(golds, predicted):
        shared = (predicted & Counter(gold)).total()
        if not shared:
            continue
        precision, recall = shared / predicted.total(), shared / len(gold)
        f1 = 2 * precision * recall / (precision + recall)
        if f1 > best[2]:
            best = precision, recall, f1
    return best


def exact_match(prediction, golds):
    """1.0 where the prediction's tokens are those of a gold, in order, else 0.0."""
    predicted = metric_tokens(prediction)
    return float(predicted != [] and predicted in gold_tokens(golds, predicted))
