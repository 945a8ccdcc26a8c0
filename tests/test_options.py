"""plumbing/options.py: one declaration gives flags, limits and the check of foreign JSON."""
from dataclasses import dataclass

import pytest

from plumbing.options import OneLineParser, add_flags, check_options, fill, from_flags, option


@dataclass(frozen=True)
class Search:
    k: int = option(5, "hits of a query", least=1, most=100)
    learning_rate: float = option(0.5, "speed", most=1)
    index: str = option("hnsw", "kind of index", choices=("hnsw", "flat"))
    exact: bool = option(False, "compare all")
    data: tuple = option((), "files", nargs="+")
    share: int = option(None, "by default as many as k", least=1)
    inner: int = option(3)

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class Sizes:
    hidden: int = option(least=1, most=1000)
    sections: tuple = option(least=0, most=9)
    theta: float = option(1e6, least=1e-9)
    tied: bool = option(False)

    def __post_init__(self):
        if self.hidden == 13:
            raise ValueError("13 brings bad luck")


def parse(*words):
    parser = OneLineParser(prog="some.py")
    add_flags(parser, Search)
    return from_flags(Search, parser.parse_args(words))


def test_flags_become_options():
    assert parse() == Search()
    words = "-k 7 --learning-rate 1 --index flat --exact --data a b --share 2".split()
    assert parse(*words) == Search(7, 1.0, "flat", True, ("a", "b"), 2)
    assert parse("--k", "7", "--no-exact").k == 7


@pytest.mark.parametrize("words, message", [
    (("-k", "0"), "-k is 0: give 1 to 100"), (("-k", "x"), "some.py --help"),
    (("--learning-rate", "nan"), "--learning-rate is nan: give 0 to 1"),
    (("--learning-rate", "-1"), "--learning-rate is -1.0: give 0 to 1"),
    (("--share", "0"), "--share is 0: give at least 1"), (("--inner", "4"), "some.py --help"),
    (("--index", "tree"), "some.py --help")])
def test_wrong_flags_are_one_line(words, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse(*words)


def test_only_given_flags_are_in_the_namespace():
    parser = OneLineParser(prog="some.py")
    add_flags(parser, Search)
    assert vars(parser.parse_args(["-k", "5"])) == {"k": 5}


def test_an_option_without_a_default_must_be_given():
    @dataclass(frozen=True)
    class Build:
        out: str = option(text="where to")

    parser = OneLineParser(prog="some.py")
    add_flags(parser, Build)
    assert from_flags(Build, parser.parse_args(["--out", "x"])) == Build("x")
    with pytest.raises(ValueError, match="required: --out"):
        parser.parse_args([])


def test_help_says_text_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "hits of a query [5]" in text and "kind of index [hnsw]" in text and "inner" not in text


@pytest.mark.parametrize("wrong, message", [
    ({"k": 0}, "k is 0: give 1 to 100"), ({"k": 2.0}, "k is 2.0: expected a whole"),
    ({"k": True}, "k is True"), ({"index": "x"}, "index is 'x': give hnsw or flat"),
    ({"learning_rate": float("inf")}, "learning_rate is inf"),
    ({"exact": 1}, "exact is 1: expected bool")])
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Search(**wrong)


def test_foreign_json_becomes_options():
    values = {"hidden": 8, "sections": [1, 2], "other": 1, "theta": None}
    assert fill(Sizes, values, "a.json") == Sizes(8, (1, 2))


@pytest.mark.parametrize("values, message", [
    ({}, "a.json: missing hidden, sections"),
    ([8], r"a.json is \[8\]: expected an object"),
    ({"hidden": None, "sections": []}, "a.json: missing hidden"),
    ({"hidden": 1001, "sections": []}, "a.json: hidden is 1001: give 1 to 1000"),
    ({"hidden": "8", "sections": []}, "hidden is '8': expected a whole number"),
    ({"hidden": 8, "sections": 3}, "sections is 3: expected a list"),
    ({"hidden": 8, "sections": [1, 10]}, "give 0 to 9"),
    ({"hidden": 8, "sections": [], "theta": 0.0}, "theta is 0.0"),
    ({"hidden": 8, "sections": [], "tied": "no"}, "tied is 'no'"),
    ({"hidden": 13, "sections": []}, "a.json: 13 brings bad luck")])
def test_foreign_json_that_does_not_fit_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        fill(Sizes, values, "a.json")
