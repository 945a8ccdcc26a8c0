"""The released recipe: its entries against our options, docs/recipe.md against both, and a command
that follows it, answered by a script.

That the values are those of the released code was read there by hand: docs/recipe.md names the
file of each.
"""
import json
import re
from dataclasses import fields

import pytest

from conftest import ROOT
from infer import RouterOptions, parse_flags
from model import VLM
from parts.chat import Processor
from parts.recipes import AGREED, ANSWERING, LORA_RATE, TRAINING, follow
from parts.steps import render_answer, render_route
from plumbing.options import flag_of
from scripted import Scripted, Words, cli
from train import GrpoOptions

PAGE = (ROOT / "docs" / "recipe.md").read_text()
TABLES = [("train.py grpo", TRAINING, GrpoOptions), ("infer.py", ANSWERING, RouterOptions)]


def fields_of(options):
    return {f.name: f for f in fields(options)}


# ------------------------------------------------------------------------------------- as data

@pytest.mark.parametrize("script, recipe, options", TABLES)
def test_entries_are_flags_whose_default_is_another(script, recipe, options):
    for name, (value, source) in recipe.items():
        f = fields_of(options)[name]
        assert f.metadata["text"] and f.default != value
        if f.type is not float or type(value) is not int:
            assert type(value) is f.type
    options(**{name: value for name, (value, _) in recipe.items()})         # and within its limits


def test_given_flags_stay_and_contradictions_are_refused():
    flags = {"k": 5, "seed": 7, "temperature": 1.0}
    follow(ANSWERING, flags)
    assert flags == {"k": 5, "seed": 7, "temperature": 1.0, "max_new_tokens": 2048, "top_k": 20,
                     "max_steps": 3, "lower_case": True, "several": True}
    for name, (value, source) in TRAINING.items():
        with pytest.raises(ValueError) as refused:
            follow(TRAINING, {name: "other"})
        assert str(refused.value) == (f"{flag_of(name)} is other, but --recipe released has {value}"
                                      f" ({source}): leave out one of them")


@pytest.mark.parametrize("words, mode", [
    (["--question", "Who?"], "question"), (["--chat"], "chat"), (["--method", "router"], "eval"),
    ([], "question")])
def test_the_recipe_in_every_mode_that_answers(words, mode):
    found, flags, options = parse_flags([*words, "--recipe", "released", "-k", "5"])
    assert found == mode and flags.recipe == "released"
    assert vars(options) == vars(RouterOptions()) | {
        "k": 5, "max_steps": 3, "max_new_tokens": 2048, "top_k": 20, "lower_case": True,
        "several": True}
    assert parse_flags(words)[2] == RouterOptions()


# --------------------------------------------------------------------------------- docs/recipe.md

def rows_of(script):
    """The table below the heading that names a script: [cells]."""
    section = PAGE.split(f"`{script}`\n")[1].split("\n## ")[0]
    rows = []
    for line in section.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def same(cell, value):
    """Whether a cell says a value: yes or no, a number, a word."""
    if isinstance(value, bool):
        return cell == ("yes" if value else "no")
    if isinstance(value, (int, float)):
        return float(cell) == value
    return cell == value


@pytest.mark.parametrize("script, recipe, options", TABLES)
def test_the_page_has_a_row_for_each_setting(script, recipe, options):
    title, line, *rows = rows_of(script)
    assert title == ["setting", "flag", "our default", "released", "source"]
    assert [row[1] for row in rows] == [flag_of(name) for name in recipe]
    for (_, _, ours, released, source), (name, setting) in zip(rows, recipe.items()):
        f = fields_of(options)[name]
        if f.default is None:                   # its --help says what None stands for
            assert re.search(rf"\[{re.escape(ours)}[;\]]", f.metadata["text"])
        else:
            assert same(ours, f.default), name
        assert same(released, setting.value) and source == setting.source, name


def test_the_settings_in_which_both_agree_are_our_defaults():
    for name, (value, source) in AGREED.items():
        assert fields_of(GrpoOptions)[name].default == value and source and name not in TRAINING


def test_the_page_is_short_and_names_the_rate_of_an_adapter():
    assert len(PAGE.splitlines()) <= 90
    [rate] = re.findall(r"adapter \(`--lora-rank`\) takes (\S+) unless", PAGE)
    assert float(rate) == LORA_RATE


# ------------------------------------------------------------------------------------ a command

def test_a_command_that_follows_the_recipe(world, tmp_path, capsys, monkeypatch):
    """Its sampling reaches the model; three sub-questions at most, five passages, two bases asked
    in one step, all in lower case."""
    def reply(prompt, g):
        if prompt.startswith("R\n"):
            number = prompt.count("Sub-question")
            return render_route("T", f"Which Flag {number}?", "Text Retriever, Table Retriever")
        return render_answer("T", "Some Answer")

    processor = Words()
    vlm = Scripted(processor, reply)
    monkeypatch.setattr(VLM, "from_pretrained", lambda *args, **options: vlm)
    monkeypatch.setattr(Processor, "from_pretrained", lambda *args: processor)
    prompts = tmp_path / "p.json"
    prompts.write_text('{"route": "R", "answer": "A", "final": "F"}')
    code, [line], _ = cli(capsys, "--world", world, "--prompts", prompts, "--question", "Who Is?",
                          "--json", "--recipe", "released", "--temperature", 1)
    row = json.loads(line)
    assert code == 0 and row["llm_answer"] == {"thought": "t", "answer": "some answer"}
    assert row["question"] == "Who Is?" and row["cost"]["retrievals"] == 6
    assert "plan_3" in row and "plan_4" not in row
    for number in range(3):
        plan = row[f"plan_{number + 1}"]
        assert plan["query"] == f"which flag {number}?"
        assert plan["retriever"] == ["Text Retriever", "Table Retriever"]
        assert len(plan["ter"]) == len(plan["tar"]) == 5
        assert plan["answer"] == {"thought": "t", "answer": "some answer"}
    for sampling in vlm.sampling:
        assert (sampling["temperature"], sampling["top_k"], sampling["top_p"]) == (1.0, 20, 1.0)
        assert (sampling["n"], sampling["max_new_tokens"]) == (1, 2048)
    # greedy stays the default
    vlm.sampling.clear()
    cli(capsys, "--world", world, "--prompts", prompts, "--question", "?", "--recipe", "released")
    assert {sampling["temperature"] for sampling in vlm.sampling} == {0.0}
