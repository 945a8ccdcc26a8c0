"""The course kit: writes the student copy of the project, and grades it.

    project -> copy  -> the same files, where the functions of EXERCISES only raise
    copy    -> grade -> the tests of each exercise -> a table, a score out of 100, one JSON object

The copy is made with the standard library alone; grading needs the test tools
(requirements-dev.txt). What a student is to do stands in the page of each exercise; what a lecturer
does with this script, in README.md beside it.
"""
import ast
import json
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
sys.path.insert(0, str(ROOT))

from plumbing.files import replacing, run_command
from plumbing.options import OneLineParser

SECONDS = 60    # a test that takes longer has failed: the loop of a beginner may have no end
TOOLS = ("torch", "hnswlib", "pytest", "hypothesis", "transformers", "peft", "faiss")   # of tests


@dataclass(frozen=True)
class Exercise:
    """What is blank in the student copy, and what shows that it is right again.

    A test is the node id of a test function; it passes when all its cases pass. Each of them fails
    while the functions are blank, and none of them needs a function of another exercise.
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
    1: Exercise("1-mrope.md", "M-RoPE positions", 15, "model.py",
                ("VLM.positions", "Decoder.angles"),
                theirs("test_model.py", "positions_by_hand", "positions_equal_transformers")
                + ours("angles_by_hand", "scores_depend_on_distances_only",
                       "logits_with_pictures_equal_transformers")),
    2: Exercise("2-cache.md", "cached decoding", 20, "model.py",
                ("KVCache.extend", "KVCache.attend", "NextToken.compute"),
                ours("slots_by_hand", "static_slots_by_hand",
                     "cached_attention_equals_plain_attention", "decode_step_by_hand",
                     "cached_greedy_equals_transformers")),
    3: Exercise("3-search.md", "HNSW against exact search", 15, "retrieve.py",
                ("exact_search", "KnowledgeBase.recall"),
                ours("exact_search_equals_faiss", "recall_by_hand", "recall_of_documents_by_hand")
                + theirs("test_retrieve.py", "search_equals_brute_force[flat-0.97-0.002]",
                         "equal_scores_stand_in_document_order",
                         "unreachable_rows_are_found_by_exact_search",
                         "recall_counts_what_the_graph_misses", "recall_of_nothing_is_refused")),
    4: Exercise("4-rewards.md", "step rewards", 15, "grpo.py",
                ("read_route", "read_answer", "answer_reward", "step_reward"),
                theirs("test_grpo.py", "routing_reward_by_hand",
                       "hacks_that_the_published_rule_pays_and_the_strict_one_does_not",
                       "dumping_guesses_is_paid_by_recall_but_not_by_f1",
                       "long_gold_is_paid_by_share",
                       "price_of_a_retrieval_is_taken_off_routing_steps_only",
                       "any_output_gets_a_reward_between_0_and_1")),
    5: Exercise("5-loss.md", "group advantages and clipped loss", 15, "grpo.py",
                ("group_advantages", "grpo_loss"),
                theirs("test_grpo.py", "advantages_by_hand", "a_lone_right_sample_of_eight",
                       "advantages_equal_a_loop_over_groups", "loss_by_hand", "kl_term_by_hand",
                       "value_and_gradient_equal_a_float64_reference",
                       "gradient_by_finite_differences", "parts_of_a_batch_add_up_to_the_whole",
                       "garbage_outside_the_mask_reaches_neither_value_nor_gradient",
                       "bad_arguments_are_named")),
    6: Exercise("6-router.md", "the router loop", 20, "infer.py", ("routed", "Router.run"),
                ours("what_the_loop_asks_for", "what_ends_the_loop",
                     "a_tick_is_one_call_and_one_search")
                + theirs("test_infer.py", "the_loop_of_two_hops",
                         "questions_advance_together_and_come_back_in_order",
                         "more_questions_than_are_open_at_once",
                         "a_malformed_routing_step_ends_the_routing",
                         "a_malformed_answer_is_empty_and_the_loop_goes_on",
                         "max_steps_and_then_the_final_answer",
                         "candidates_of_a_step_share_its_history_and_one_is_followed",
                         "retries_ask_again_and_count")),
}


# ------------------------------------------------------------------------------- the student copy

def functions_of(tree, prefix=""):
    """(qualified name, node) of each function at the top of a module or of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")


def blank(source, messages):
    """The source of a module, where each function {qualified name: message} has only its docstring
    and a raise left.

    Decorators, signature, docstring and everything outside these bodies stay byte for byte. Raises
    ValueError for a function that is not there or has no docstring.
    """
    functions, lines = dict(functions_of(ast.parse(source))), source.split("\n")
    for name in messages:
        if name not in functions or not ast.get_docstring(functions[name]):
            raise ValueError(f"{name} is no function with a docstring: correct EXERCISES in "
                             "assignments/kit.py")
    from_below = sorted(messages, key=lambda name: functions[name].lineno, reverse=True)
    for name in from_below:                         # so that those above keep their places
        docstring = functions[name].body[0]
        indent = " " * docstring.col_offset
        body = f'{indent}raise NotImplementedError("{messages[name]}")'
        lines[docstring.end_lineno:functions[name].end_lineno] = [body]
    return "\n".join(lines)


def left_out(folder, names):
    """The files of a folder that are not copied: hidden ones and what .gitignore names, so no
    history, no data, no runs."""
    patterns = [".*"]
    for pattern in (ROOT / ".gitignore").read_text().split():
        patterns.append(pattern.rstrip("/"))
    hidden = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    return [name for name in hidden if name != ".gitignore"]


def write_copy(out, numbers):
    """Writes the project to the folder `out`, the functions of these exercises blank; all of it
    appears at once. ValueError for an `out` that holds something or lies inside the project."""
    if not out:
        raise ValueError("no folder to write to: make assignment OUT=dir")
    out = Path(out).resolve()
    if out.is_relative_to(ROOT):
        raise ValueError(f"{out} is inside the project: give a folder outside {ROOT}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: give another or delete it first")
    messages = defaultdict(dict)                    # file -> {function: what its blank body says}
    for number in numbers:
        e = EXERCISES[number]
        for name in e.functions:
            messages[e.file][name] = f"exercise {number}: assignments/{e.page}"
    with replacing(out) as new:
        shutil.copytree(ROOT, new, ignore=left_out)
        for file, of_file in messages.items():
            source = (ROOT / file).read_bytes().decode()        # with the ends of lines as they are
            (new / file).write_bytes(blank(source, of_file).encode())
    return out


# ---------------------------------------------------------------------------------------- grading

class TooLong(BaseException):
    """Not an Exception, so that neither the code that is tested nor hypothesis takes it for a
    failure to look into."""


class Grader:
    """A plugin of pytest: runs the wanted tests only, and notes how each ended."""

    def __init__(self, wanted, show):
        self.wanted, self.show = wanted, show    # node ids; whether pytest's own report is seen
        self.cases = defaultdict(list)           # test -> of each of its cases, whether it passed
        self.faults = {}                         # test, or file -> what went wrong first
        signal.signal(signal.SIGALRM, self.too_long)

    def too_long(self, *_):
        raise TooLong(f"longer than {SECONDS} s")

    def pytest_configure(self, config):
        # to quote the source takes longer than the tests
        config.option.tbstyle = "short" if self.show else "native"

    def test_of(self, case):
        """The wanted test that a case belongs to, or None. (A test may be one case of many.)"""
        for test in (case, case.partition("[")[0]):
            if test in self.wanted:
                return test

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.test_of(item.nodeid)]

    def pytest_collectreport(self, report):
        """A file that cannot be imported: the last place and line of its traceback."""
        if report.failed:
            text = str(report.longrepr)
            fault = text.strip().splitlines()[-1].removeprefix("E").strip()
            places = re.findall(r'(\w+\.py)(?:", line |:)(\d+)', text)
            self.faults[report.nodeid] = f"{':'.join(places[-1])} {fault}" if places else fault

    def pytest_runtest_setup(self):
        signal.alarm(SECONDS)

    def pytest_runtest_teardown(self):
        signal.alarm(0)

    def pytest_runtest_logreport(self, report):
        test = self.test_of(report.nodeid)
        if report.when == "call" or not report.passed:
            self.cases[test].append(report.passed)              # one that is skipped has not passed
        if not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(crash.message if crash else report.longrepr)
            self.faults.setdefault(test, text.splitlines()[0])

    def passed(self, test):
        return bool(self.cases[test]) and all(self.cases[test])

    def fault(self, test):
        """Why a test has not passed."""
        file = test.partition("::")[0]
        return self.faults.get(test) or self.faults.get(file) or "no such test"


@dataclass(frozen=True)
class Mark:
    """How far an exercise is."""
    points: float
    of: int
    passed: int
    tests: int
    fault: str         # the first test that has not passed, and why


def grade(numbers, show=False):
    """Runs the tests of these exercises -> {number: Mark}; show: with pytest's own report."""
    missing = [name for name in TOOLS if not find_spec(name)]
    if missing:
        raise ValueError(f"grading needs {', '.join(missing)}: make grade installs what is missing")
    import pytest       # the copy is written without it
    wanted = {test for number in numbers for test in EXERCISES[number].tests}
    grader = Grader(wanted, show)
    files = sorted({str(ROOT / test.partition("::")[0]) for test in wanted})
    report = ["--quiet"] if show else ["-p", "no:terminal"]
    # a file that cannot be imported costs the tests in it, no others
    words = [f"--rootdir={ROOT}", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest.main([*files, *words, *report], plugins=[grader])
    marks = {}
    for number in numbers:
        e = EXERCISES[number]
        failed = [test for test in e.tests if not grader.passed(test)]
        passed = len(e.tests) - len(failed)
        fault = ""
        if failed:
            name = failed[0].partition("::test_")[2]
            fault = f"{name}: {grader.fault(failed[0])}"
        points = round(e.points * passed / len(e.tests), 1)
        marks[number] = Mark(points, e.points, passed, len(e.tests), fault)
    return marks


def print_marks(marks):
    """The table, with the first test of each exercise that has not passed, and the JSON object."""
    print(f"{'exercise':38}    tests        points  first that fails")
    rows = {}
    for number, mark in marks.items():
        title = f"{number} {EXERCISES[number].title:36}"
        line = (f"{title} {mark.passed:>2} of {mark.tests:>2}    {mark.points:>4.1f} of {mark.of}"
                f"  {mark.fault}")
        print(line[:160].rstrip())
        rows[number] = {"points": mark.points, "of": mark.of, "passed": mark.passed,
                        "tests": mark.tests}
    score = round(sum(mark.points for mark in marks.values()), 1)
    of = sum(mark.of for mark in marks.values())
    print(f"{'score':47} {score:>7.1f} of {of}")
    print(json.dumps({"score": score, "of": of, "exercises": rows}))


# ----------------------------------------------------------------------------------- command line

def command(words):
    parser = OneLineParser(prog="kit.py",
                           description="Write the student copy of the exercises, or grade it.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="copy | grade")
    copy = commands.add_parser("copy", help="write the student copy")
    copy.add_argument("out", help="a folder that does not exist yet, outside the project")
    copy.add_argument("exercises", nargs="*", type=int, help="only these are blank in it")
    marks = commands.add_parser("grade", help="run the tests of the exercises in the project that "
                                              "this script lies in")
    marks.add_argument("exercises", nargs="*", type=int,
                       help="only these, with pytest's report of what failed")
    args = parser.parse_args(words)
    unknown = set(args.exercises) - set(EXERCISES)
    if unknown:
        numbers = ", ".join(map(str, EXERCISES))
        raise ValueError(f"no exercise {min(unknown)}: give some of {numbers}, or none")
    numbers = sorted(set(args.exercises)) or list(EXERCISES)
    if args.command == "grade":
        print_marks(grade(numbers, show=bool(args.exercises)))
        return
    out = write_copy(args.out, numbers)
    print(f"{out}: student copy, blank: exercise {', '.join(map(str, numbers))}")


def main(argv=None):
    return run_command("kit.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
