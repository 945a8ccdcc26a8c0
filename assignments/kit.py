"""The course kit: writes the student copy of the project, and grades it.

    project -> copy    -> the same files, where the functions of EXERCISES are `raise NotImplementedError`
    copy    -> grade   -> the tests of each exercise -> a table, a score out of 100, one JSON object

The copy is made with the standard library alone; grading needs the test tools (requirements-dev.txt). What a student
is to do stands in the page of each exercise; what a lecturer does with this script, in README.md beside it.
"""
import argparse
import ast
import json
import os
import re
import shutil
import signal
import sys
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60    # a test that takes longer has failed: the loop of a beginner may have no end
TOOLS = ("torch", "hnswlib", "pytest", "hypothesis", "transformers", "peft", "faiss")    # the tests import these


@dataclass(frozen=True)
class Exercise:
    """What is blank in the student copy, and what shows that it is right again.

    A test is the node id of a test function; it passes when all its cases pass. Each of them fails while the functions
    are blank, and none of them needs a function of another exercise.
    """
    page: str          # beside this file
    title: str
    points: int
    file: str          # at the top of the project
    functions: tuple   # qualified names in it; each has a docstring, which stays
    tests: tuple       # equal shares of the points


def ours(*names):
    return tuple(f"assignments/test_exercises.py::test_{name}" for name in names)


def theirs(file, *names):
    return tuple(f"tests/{file}::test_{name}" for name in names)


EXERCISES = {
    1: Exercise("1-mrope.md", "M-RoPE positions", 15, "model.py", ("VLM.positions", "Decoder.angles"),
                theirs("test_model.py", "positions_by_hand", "positions_equal_transformers")
                + ours("angles_by_hand", "scores_depend_on_distances_only", "logits_with_pictures_equal_transformers")),
    2: Exercise("2-cache.md", "cached decoding", 20, "model.py",
                ("KVCache.extend", "KVCache.attend", "NextToken.compute"),
                ours("slots_by_hand", "static_slots_by_hand", "cached_attention_equals_plain_attention",
                     "decode_step_by_hand", "cached_greedy_equals_transformers")),
    3: Exercise("3-search.md", "HNSW against exact search", 15, "retrieve.py", ("exact_search", "KnowledgeBase.recall"),
                ours("exact_search_equals_faiss", "recall_by_hand", "recall_of_documents_by_hand")
                + theirs("test_retrieve.py", "search_equals_brute_force[flat-0.97-0.002]",
                         "equal_scores_stand_in_document_order", "unreachable_rows_are_found_by_exact_search",
                         "recall_counts_what_the_graph_misses", "recall_of_nothing_is_refused")),
    4: Exercise("4-rewards.md", "step rewards", 15, "grpo.py",
                ("read_route", "read_answer", "answer_reward", "step_reward"),
                theirs("test_grpo.py", "routing_reward_by_hand",
                       "hacks_that_the_published_rule_pays_and_the_strict_one_does_not",
                       "dumping_guesses_is_paid_by_recall_but_not_by_f1", "long_gold_is_paid_by_share",
                       "price_of_a_retrieval_is_taken_off_routing_steps_only",
                       "any_output_gets_a_reward_between_0_and_1")),
    5: Exercise("5-loss.md", "group advantages and clipped loss", 15, "grpo.py", ("group_advantages", "grpo_loss"),
                theirs("test_grpo.py", "advantages_by_hand", "a_lone_right_sample_of_eight",
                       "advantages_equal_a_loop_over_groups", "loss_by_hand", "kl_term_by_hand",
                       "value_and_gradient_equal_a_float64_reference", "gradient_by_finite_differences",
                       "parts_of_a_batch_add_up_to_the_whole",
                       "garbage_outside_the_mask_reaches_neither_value_nor_gradient", "bad_arguments_are_named")),
    6: Exercise("6-router.md", "the router loop", 20, "infer.py", ("routed", "Router.run"),
                ours("what_the_loop_asks_for", "what_ends_the_loop", "a_tick_is_one_call_and_one_search")
                + theirs("test_infer.py", "the_loop_of_two_hops", "questions_advance_together_and_come_back_in_order",
                         "more_questions_than_are_open_at_once", "a_malformed_routing_step_ends_the_routing",
                         "a_malformed_answer_is_empty_and_the_loop_goes_on", "max_steps_and_then_the_final_answer",
                         "candidates_of_a_step_share_its_history_and_one_is_followed", "retries_ask_again_and_count")),
}


# ----------------------------------------------------------------------------------------------------- the student copy

def functions_of(tree, prefix=""):
    """(qualified name, node) of each function at the top of a module or of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")


def blank(source, messages):
    """The source of a module, where each function {qualified name: message} has only its docstring and a raise left.

    Decorators, signature, docstring and everything outside these bodies stay byte for byte. Raises ValueError for a
    function that is not there or has no docstring.
    """
    found, lines = dict(functions_of(ast.parse(source))), source.split("\n")
    for name in messages:
        if name not in found or not ast.get_docstring(found[name]):
            raise ValueError(f"{name} is no function with a docstring: correct EXERCISES in assignments/kit.py")
    for name, message in sorted(messages.items(), key=lambda item: -found[item[0]].lineno):   # those above keep places
        docstring, end = found[name].body[0], found[name].end_lineno
        indent = " " * docstring.col_offset
        lines[docstring.end_lineno:end] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


def write_copy(out, numbers):
    """Writes the project to the folder `out`, the functions of these exercises blank; all of it appears at once.

    Left out: hidden files and what .gitignore names, so no history, no data, no runs. Raises ValueError for an `out`
    that holds something or lies inside the project.
    """
    if not out:
        raise ValueError("no folder to write to: make assignment OUT=dir")
    out = Path(out).resolve()
    if out.is_relative_to(ROOT):
        raise ValueError(f"{out} is inside the project: give a folder outside {ROOT}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: give another or delete it first")
    ignored = (ROOT / ".gitignore").read_text().split()
    patterns = [".*", *(pattern.rstrip("/") for pattern in ignored)]

    def left_out(folder, names):
        return [name for name in names if name != ".gitignore" and any(fnmatch(name, p) for p in patterns)]

    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)    # of a run that was stopped
    try:
        shutil.copytree(ROOT, new, ignore=left_out)
        messages = defaultdict(dict)
        for number in numbers:
            e = EXERCISES[number]
            messages[e.file] |= dict.fromkeys(e.functions, f"exercise {number}: assignments/{e.page}")
        for file, of_file in messages.items():
            (new / file).write_bytes(blank((ROOT / file).read_bytes().decode(), of_file).encode())
        os.replace(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return out


# -------------------------------------------------------------------------------------------------------------- grading

class TooLong(BaseException):
    """Not an Exception, so that neither the code that is tested nor hypothesis takes it for a failure to look into."""


class Grader:
    """A plugin of pytest: runs the wanted tests only, and keeps how each ended."""

    def __init__(self, wanted, show):
        self.wanted, self.show = wanted, show    # node ids; whether pytest's own report is seen
        self.cases = defaultdict(list)           # of each wanted test that was found: whether a case passed
        self.faults = {}                         # of a test, or a file that cannot be imported: what went wrong first
        signal.signal(signal.SIGALRM, self.too_long)

    def too_long(self, *_):
        raise TooLong(f"longer than {SECONDS} s")

    def pytest_configure(self, config):
        config.option.tbstyle = "short" if self.show else "native"    # to quote the source takes longer than the tests

    def test_of(self, nodeid):
        """The wanted test that a case belongs to, or None."""
        return next((test for test in (nodeid, nodeid.partition("[")[0]) if test in self.wanted), None)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.test_of(item.nodeid)]

    def pytest_collectreport(self, report):
        if report.failed:
            places = re.findall(r'(\w+\.py)(?:", line |:)(\d+)', str(report.longrepr))
            fault = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
            self.faults[report.nodeid] = f"{':'.join(places[-1])} {fault}" if places else fault

    def pytest_runtest_setup(self):
        signal.alarm(SECONDS)

    def pytest_runtest_teardown(self):
        signal.alarm(0)

    def pytest_runtest_logreport(self, report):
        test = self.test_of(report.nodeid)
        if report.when == "call" or not report.passed:
            self.cases[test].append(report.passed)           # one that is skipped has not passed
        if not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.faults.setdefault(test, str(crash.message if crash else report.longrepr).splitlines()[0])

    def fault(self, test):
        """Why a test has not passed."""
        return self.faults.get(test) or self.faults.get(test.partition("::")[0]) or "no such test"


def grade(numbers, show=False):
    """Runs the tests of these exercises -> (points, passed, fault) of each; show: with pytest's own report."""
    if missing := [name for name in TOOLS if not find_spec(name)]:
        raise ValueError(f"grading needs {', '.join(missing)}: make grade installs what is missing")
    import pytest    # the copy is written without it
    grader = Grader({test for number in numbers for test in EXERCISES[number].tests}, show)
    files = sorted({str(ROOT / test.partition("::")[0]) for test in grader.wanted})
    report = ["--quiet"] if show else ["-p", "no:terminal"]
    # a file that cannot be imported costs the tests in it, no others
    pytest.main([*files, f"--rootdir={ROOT}", "-p", "no:cacheprovider", "--continue-on-collection-errors", *report],
                plugins=[grader])
    marks = {}
    for number in numbers:
        exercise = EXERCISES[number]
        failed = [test for test in exercise.tests if not (grader.cases[test] and all(grader.cases[test]))]
        passed = len(exercise.tests) - len(failed)
        points = round(exercise.points * passed / len(exercise.tests), 1)
        fault = f"{failed[0].partition('::test_')[2]}: {grader.fault(failed[0])}" if failed else ""
        marks[number] = points, passed, fault
    return marks


def print_marks(marks):
    """The table, with the first test of each exercise that has not passed, and the JSON object."""
    print(f"{'exercise':38}    tests        points  first that fails")
    for number, (points, passed, fault) in marks.items():
        e = EXERCISES[number]
        line = f"{number} {e.title:36} {passed:>2} of {len(e.tests):>2}    {points:>4.1f} of {e.points}  {fault}"
        print(line[:160].rstrip())
    score, of = round(sum(points for points, _, _ in marks.values()), 1), sum(EXERCISES[n].points for n in marks)
    print(f"{'score':47} {score:>7.1f} of {of}")
    rows = {n: {"points": points, "of": EXERCISES[n].points, "passed": passed, "tests": len(EXERCISES[n].tests)}
            for n, (points, passed, _) in marks.items()}
    print(json.dumps({"score": score, "of": of, "exercises": rows}))


# --------------------------------------------------------------------------------------------------------- command line

class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message):
        raise ValueError(f"{message}: see {self.prog} --help")


def main(argv=None):
    """Runs a command; a user's mistake is one line on stderr and exit code 2."""
    parser = OneLineParser(prog="kit.py", description="Write the student copy of the exercises, or grade it.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="copy | grade")
    copy = commands.add_parser("copy", help="write the student copy")
    copy.add_argument("out", help="a folder that does not exist yet, outside the project")
    copy.add_argument("exercises", nargs="*", type=int, help="only these are blank in it")
    marks = commands.add_parser("grade", help="run the tests of the exercises in the project that this script lies in")
    marks.add_argument("exercises", nargs="*", type=int, help="only these, with pytest's report of what failed")
    try:
        args = parser.parse_args(argv)
        if unknown := set(args.exercises) - set(EXERCISES):
            raise ValueError(f"no exercise {min(unknown)}: give some of {', '.join(map(str, EXERCISES))}, or none")
        numbers = sorted(set(args.exercises)) or list(EXERCISES)
        if args.command == "copy":
            print(f"{write_copy(args.out, numbers)}: student copy, blank: exercise {', '.join(map(str, numbers))}")
        else:
            print_marks(grade(numbers, show=bool(args.exercises)))
    except (ValueError, OSError) as error:
        print(f"kit.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
