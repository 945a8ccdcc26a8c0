"""The course kit both ways: the student copy imports and scores 0, the project scores 100, part
scores part."""
import ast
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT, made

sys.path.append(str(ROOT / "assignments"))

import kit

POINTS = {number: exercise.points for number, exercise in kit.EXERCISES.items()}
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}    # a copy finds its own files
CASE = '''"""A module."""
import math


@math.cached
def area(r,
         scale=1):   # of a circle
    """Pi r squared.

    Even so.
    """
    # a hint that must go
    def inner():
        return 3
    return inner() * r ** 2   # and this one


class Shape:
    """Ä shape, without a blank line at the end."""
    def area(self):
        "Short."
        return 0

    def area_of(self): return self.area()
'''
BLANK = '''"""A module."""
import math


@math.cached
def area(r,
         scale=1):   # of a circle
    """Pi r squared.

    Even so.
    """
    raise NotImplementedError("exercise 1")


class Shape:
    """Ä shape, without a blank line at the end."""
    def area(self):
        "Short."
        raise NotImplementedError("exercise 2")

    def area_of(self): return self.area()
'''


def kit_of(folder, *words):
    """What the kit of a project or a copy prints, called as the make targets call it."""
    script = str(folder / "assignments" / "kit.py")
    return made(script, *words, cwd=folder, env=ALONE).stdout


def graded(folder, *numbers):
    """({exercise: points}, table) of a grading run, whose last line agrees with its table."""
    *table, last = kit_of(folder, "grade", *numbers).splitlines()
    marks = json.loads(last)
    assert table[-1].split() == ["score", str(marks["score"]), "of", str(marks["of"])]
    points = {}
    for number, row in marks["exercises"].items():
        points[int(number)] = row["points"]
        share = row["passed"] / row["tests"]                            # tests have equal shares
        assert row["points"] == pytest.approx(POINTS[int(number)] * share, abs=0.05)
    assert marks["score"] == pytest.approx(sum(points.values()))
    return points, "\n".join(table)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "student"
    kit_of(ROOT, "copy", out)
    return out


# ------------------------------------------------------------------------------ what is written

def test_six_exercises_make_100_points():
    assert list(kit.EXERCISES) == [1, 2, 3, 4, 5, 6] and sum(POINTS.values()) == 100
    index = (ROOT / "assignments" / "README.md").read_text()
    for number, e in kit.EXERCISES.items():
        page = (ROOT / "assignments" / e.page).read_text()
        title = page.splitlines()[0]
        assert title.startswith(f"# {number} ") and f"· {e.points} points · about " in title
        start = f"| [{number}]({e.page})"
        row = next(line for line in index.splitlines() if line.startswith(start))
        names = [f"`{name}`" for name in e.functions]
        expected = [f"`{e.file}`", ", ".join(names), str(e.points)]
        assert [cell.strip() for cell in row.split("|")[3:6]] == expected
        assert all(name in page for name in names)


def test_blank_by_hand():
    assert kit.blank(CASE, {"area": "exercise 1", "Shape.area": "exercise 2"}) == BLANK
    assert kit.blank(CASE.replace("\n", "\r\n"), {}) == CASE.replace("\n", "\r\n")
    for name in ("Shape.area_of", "volume", "inner"):       # no docstring, not there, in another
        with pytest.raises(ValueError, match=f"^{name} is no function with a docstring"):
            kit.blank(CASE, {name: ""})


def blank_in(file):
    """The functions that are blank in a file of the student copy, with their exercise's number."""
    numbers = {}
    for number, e in kit.EXERCISES.items():
        if e.file == file:
            numbers.update(dict.fromkeys(e.functions, number))
    return numbers


def files_in(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_the_copy_has_all_files_of_the_project(student):
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    expected = {name for name in names if name[0] != "." or name == ".gitignore"}
    assert set(files_in(student)) == expected


def test_other_files_are_those_of_the_project(student):
    for name in set(files_in(student)) - {e.file for e in kit.EXERCISES.values()}:
        assert (student / name).read_bytes() == (ROOT / name).read_bytes(), name


@pytest.mark.parametrize("file", sorted({e.file for e in kit.EXERCISES.values()}))
def test_nothing_is_gone_but_the_bodies(student, file):
    numbers, ours, theirs = blank_in(file), (ROOT / file).read_text(), (student / file).read_text()
    raises = [line for line in theirs.split("\n") if 'raise NotImplementedError("exercise' in line]
    assert len(raises) == len(numbers)
    left = iter(ours.split("\n"))               # all other lines stand in the project, in order
    assert all(line in left for line in theirs.split("\n") if line not in raises)
    before, after = (dict(kit.functions_of(ast.parse(text))) for text in (ours, theirs))
    assert list(before) == list(after)
    for name, node in after.items():
        if name in numbers:
            docstring, body = node.body
            assert isinstance(body, ast.Raise)
            assert ast.dump(docstring) == ast.dump(before[name].body[0])
            number = numbers[name]
            assert f"exercise {number}: assignments/{number}-" in ast.dump(body)
            node.body = before[name].body
        # signature, decorators, all other functions
        assert ast.dump(node) == ast.dump(before[name])


def test_the_student_copy_imports(student):
    modules = []
    for path in (*student.glob("*.py"), *student.glob("[pl]*/[!_]*.py")):
        modules.append(".".join(path.relative_to(student).with_suffix("").parts))
    assert len(modules) >= 8
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], cwd=student,
                          capture_output=True, env=ALONE)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------- grading

def test_the_student_copy_scores_0(student):
    points, table = graded(student)
    assert points == dict.fromkeys(POINTS, 0.0)
    for number in POINTS:
        assert f"NotImplementedError: exercise {number}: assignments/{number}-" in table


def test_the_project_scores_100():
    points, table = graded(ROOT)
    assert points == POINTS, table


@pytest.mark.parametrize("numbers", [(1, 3, 5), (2, 4, 6)])
def test_no_exercise_needs_another(tmp_path, numbers):
    solved = {number: points for number, points in POINTS.items() if number not in numbers}
    points, table = graded(kit.write_copy(tmp_path / "half", numbers), *solved)
    assert points == solved, table


def test_part_of_an_exercise_and_code_that_does_not_end(tmp_path):
    """Advantages are right but loop for ever where a group has one member, the loss is blank,
    infer.py is broken."""
    out = kit.write_copy(tmp_path / "part", [5, 6])
    source = (out / "grpo.py").read_text()
    body = '''    out = torch.zeros(len(rewards), dtype=torch.as_tensor(rewards).dtype)
    for g in set(groups.tolist()):
        r = rewards[groups == g]
        while len(r) == 1:
            pass
        out[groups == g] = (r - r.mean()) / ((r.std() + eps) if scale else 1.0)
    return out'''
    empty = '    raise NotImplementedError("exercise 5: assignments/5-loss.md")'
    (out / "grpo.py").write_text(source.replace(empty, body, 1))
    (out / "infer.py").write_text("def broken(:\n")
    script = out / "assignments" / "kit.py"
    script.write_text(script.read_text().replace("SECONDS = 60", "SECONDS = 1"))
    points, table = graded(out, 5, 6)
    assert points == {5: 1.5, 6: 0.0}           # one test of ten: a lone right sample of eight
    assert "advantages_by_hand: TooLong: longer than 1 s" in table
    assert "infer.py:1 SyntaxError" in table


# ------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("words, message", [
    (("copy", ""), "no folder to write to: make assignment OUT=dir"),
    (("copy", ROOT / "course"), f"{ROOT / 'course'} is inside the project"),
    (("copy", ROOT / "tests" / ".." / ".." / ROOT.name), "is inside the project"),
    (("copy", ROOT.parent), "is not an empty folder"),
    (("copy", __file__ + "/../../README.md"), "inside the project"),
    (("copy", "/tmp/x", 7), "no exercise 7: give some of 1, 2, 3, 4, 5, 6"),
    (("grade", 0), "no exercise 0"),
    (("grade", "all"), "invalid int value: 'all'"),
    ((), "see kit.py --help"),
])
def test_mistakes_are_one_line(words, message, capsys):
    assert kit.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kit.py: ") and message in error and error.count("\n") == 1


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path, capsys):
    mine, empty = tmp_path / "mine", tmp_path / "empty"
    mine.mkdir()
    (mine / "notes").write_text("x")
    empty.mkdir()
    assert kit.main(["copy", str(mine)]) == 2 and os.listdir(mine) == ["notes"]
    assert kit.main(["copy", str(empty), "4"]) == 0
    assert "student copy, blank: exercise 4" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["empty", "mine"]            # nothing half-written
