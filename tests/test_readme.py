"""README and docs say what is true: their commands run (at small scale), the demo prints what is
pasted, the arithmetic of the worked trajectory is right, tables show what the stored results say,
line counts are those of the files, and every link leads somewhere."""
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from statistics import mean, stdev

import pytest

import infer
import retrieve
import train
from conftest import ROOT, made
from lab import bench, check, experiment, report, world as world_script

PAGES = {}                                     # name -> text, of README and of everything in docs/
for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
    PAGES[str(path.relative_to(ROOT))] = path.read_text()
COURSE = {}
for path in sorted((ROOT / "assignments").glob("*.md")):
    COURSE[str(path.relative_to(ROOT))] = path.read_text()
README = PAGES["README.md"]
RESULTS = PAGES["docs/results.md"]
TRAJECTORY = PAGES["docs/trajectory.md"]
TODAY = []                                     # all pages, without the names that are no more
for text in [*PAGES.values(), *COURSE.values()]:
    TODAY.append(text.split("## Old and new names")[0])
TODAY = "\n".join(TODAY)

# What a command names that is not here, and what stands for it in the test. Flags are run as
# they are written.
STAND_INS = {
    "enwiki": "{out}/enwiki", "splitted_tables.json": "{out}/tables.json",
    "cand_pool.jsonl": "{out}/mbeir.jsonl", "mbeir_images": "{world}",
    "path/to/bge-m3": "lexical", "path/to/clip": "pixel",
    "path/to/R1-Router-7B": "{out}/long",
    "path/to/Qwen2.5-VL-3B-Instruct": "weights/tiny",
    "path/to/Qwen2.5-VL-7B-Instruct": "weights/tiny",
    "kb/text": "{world}/kb/text", "kb/image": "{world}/kb/image", "kb/table": "{world}/kb/table",
    "published_steps.jsonl": "{world}/steps.jsonl",
    "published_valid.jsonl": "{world}/steps.jsonl",
    "questions_val.jsonl": "{world}/questions.jsonl", "questions.jsonl": "{world}/questions.jsonl",
    "cuda": "cpu", "bfloat16": "float32",
    "photo.jpg": "{world}/flags/0.png", "…": "Which country has this flag?",
    "data/demo/kb": "{world}/kb", "data/demo": "{world}", "data/self.jsonl": "{out}/self.jsonl",
    "data/credit": "{out}/credit", "data/mine": "{out}/mine", "data/deeper": "{out}/deeper",
    "data/deep": "{out}/deep",
    "data/world": "{out}/practice", "data/kb": "{out}/practice-kb",
    "runs/step-grpo": "{out}/run", "weights/mine": "{out}/weights",
    "results.jsonl": "{out}/results.jsonl", "report.html": "{out}/report.html",
}
SMALL = {"--questions": "6", "--limit": "4", "--show": "2", "--max-new-tokens": "48",
         "--group": "2", "--seed": "7", "--countries": "60", "--nproc_per_node": "2",
         "--lora-rank": "2"}
SCRIPTS = {                                    # how a script is called -> module, subcommands
    "infer.py": (infer, [[]]), "model.py": (check, [["check"]]),
    "train.py": (train, [["sft"], ["grpo"], ["show"], ["export"]]),
    "retrieve.py": (retrieve, [["build"], ["search"], ["info"], ["check"]]),
    "lab.world": (world_script, [[]]), "lab.report": (report, [[]]),
    "lab.bench": (bench, [[]]), "lab.experiment": (experiment, [[]])}


def printed_by(*words):
    """What a Python command prints, which has to succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout


def blocks(text, language=""):
    """The code blocks that are marked as of this language; those without a mark by default."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for mark, block in found if mark == language]


def spans(text):
    """What stands between backticks in its sentences and tables."""
    sentences = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", sentences)


def commands():
    """Every `python …` and `torchrun …` line of the code blocks, continuation lines joined and
    comments cut; and of the commands in the sentences those that no other test runs."""
    found = []
    for line in "\n".join(blocks(TODAY)).replace("\\\n", " ").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith(("python ", "torchrun ")):
            found.append(line)
    for span in spans(TODAY):
        span = " ".join(span.split())
        if span.startswith("python ") and re.search("--chat|--no-balance|show --", span):
            found.append(span)
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world with its bases, corpora in the published formats, a result file and a run."""
    out = tmp_path_factory.mktemp("readme") / "world"
    made("lab.world", "--seed", "3", "--questions", "8", "--countries", "20", "--out", out)
    home = out.parent
    page = '<doc id="1" url="u" title="Ada">\nAda\n\nAda wrote programs.\n</doc>\n'
    (home / "enwiki").write_text(page)
    table = {"id": "1", "page_title": "Cups", "section_title": "", "caption": "", "name": "t",
             "header": ["cup"], "rows": [["Rut"]]}
    (home / "tables.json").write_text(json.dumps([table]))
    long = shutil.copytree(ROOT / "weights" / "tiny", home / "long")       # room for 2,048 tokens
    config = json.loads((long / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (long / "config.json").write_text(json.dumps(config))
    picture = {"did": "1:1", "txt": "a flag", "img_path": "flags/0.png", "modality": "image,text"}
    (home / "mbeir.jsonl").write_text(json.dumps(picture) + "\n")
    made("infer.py", "--world", out, "--threads", "1", "--out", home / "results.jsonl")
    made("train.py", "grpo", "--world", out, "--out", home / "run", "--steps", "1",
         "--val-world", out, "--val-every", "1", "--val-questions", "2", "--prompts", "4",
         "--group", "2", "--open-questions", "4", "--threads", "1")
    made("lab.world", "--split", "train", "--questions", "6", "--countries", "60",
         "--out", home / "practice")
    made("retrieve.py", "build", home / "practice" / "text.jsonl", "--out", home / "practice-kb")
    return out


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of the world of `make demo`, and what the demo prints."""
    makefile = (ROOT / "Makefile").read_text()
    options = re.search(r"lab\.world (.*--out )data/demo\n", makefile)[1]
    asked = re.search(r"infer\.py --world data/demo (.*)", makefile)[1]
    folder = tmp_path_factory.mktemp("demo") / "demo"
    made("lab.world", *shlex.split(options), folder)
    return folder, made("infer.py", "--world", folder, *shlex.split(asked)).stdout


# ---------------------------------------------------------------------------------- commands

def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for in_block, in_text in re.findall(r"^make (\w+)|`make (\w+)", TODAY, re.MULTILINE):
        name = in_block or in_text
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def stand_in(word, world):
    """A word of a command with a name that exists in the test."""
    if word.startswith("--"):
        return word
    for name in sorted(STAND_INS, key=len, reverse=True):
        if name in word:
            return word.replace(name, STAND_INS[name].format(world=world, out=world.parent))
    return word


def put(words, flag, value):
    """The words with this value of a flag."""
    if flag in words:
        words[words.index(flag) + 1] = value
    else:
        words += [flag, value]


@pytest.mark.parametrize("command", commands())
def test_command_runs(command, world, tmp_path):
    words = []
    for word in shlex.split(command):
        before = words[-1] if words else ""
        words.append(SMALL.get(before) or stand_in(word, world))
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", *words[1:]]
    else:
        words = words[1:]
    if "train.py" in words and "export" not in words:
        words += ["--steps", "1", "--out", str(tmp_path / "run"), "--threads", "1"]
    if "grpo" in words or "show" in words:
        put(words, "--val-every", "1" if "--val" in words else "0")
        put(words, "--val-questions", "2")
        if not {"offline", "released", "--kb"} & set(words):
            words += ["--world", str(world), "--prompts", "4"]
    if "build" in words:
        put(words, "--out", str(tmp_path / "kb"))
    printed_by(*words)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository")
def test_what_the_commands_write_is_ignored_by_git():
    written = set()
    for command in commands():
        words = shlex.split(command)
        for flag in {"--out", "--write-steps"} & set(words):
            written.add(words[words.index(flag) + 1])
    assert len(written) > 8
    for path in written:
        done = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT)
        assert done.returncode == 0, path


@lru_cache(maxsize=None)
def flags_of(script):
    """All flags that a script has, of its subcommands too."""
    module, subcommands = SCRIPTS[script]
    text = io.StringIO()
    for words in subcommands:
        with redirect_stdout(text), suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *words, "--help"])
            module.main()
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text.getvalue()))


def test_flags_in_the_sentences_are_flags_of_the_scripts():
    """Those of a whole command are its script's, those that stand alone some script's."""
    wrong = []
    for span in map(str.strip, spans(TODAY)):
        flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
        if not flags or span.startswith(("hf ", "pip ")):
            continue
        script = next((name for name in SCRIPTS if name in span), None)
        known = flags_of(script) if script else set().union(*map(flags_of, SCRIPTS))
        wrong += [(span, flag) for flag in flags if flag not in known]
    assert not wrong


def test_names_of_functions_exist():
    """`grpo.step_reward` and the like."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("parts/*.py"), *ROOT.glob("lab/*.py")]
    sources = {file.stem: file.read_text() for file in files}
    named = []
    for span in spans("\n".join(PAGES.values())):
        match = re.match(r"(\w+)\.(\w+)(\(.*\))?$", span)
        if match and match[1] in sources and match[2] not in ("py", "json", "jsonl"):
            named.append((match[1], match[2]))
    assert len(named) >= 5
    for module, name in named:
        defined = rf"^(def|class) {name}\b|^{name} = |^from .*\b{name}\b"
        assert re.search(defined, sources[module], re.MULTILINE), (module, name)


def test_the_snippet_prints_what_its_comment_says(demo):
    folder, _ = demo
    [snippet] = blocks(README, "python")
    printed = printed_by("-c", snippet.replace("data/demo", str(folder)))
    assert printed.strip() == re.search(r"# (.*)\n$", snippet)[1].strip()


# ------------------------------------------------------------------------- what was pasted

def score_rows(text):
    """The table that an evaluation prints -> {method: {column: cell}}."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method "))
    titles = re.split(r"\s{2,}", lines[start].strip())
    rows = {}
    for line in lines[start + 1:start + 5]:
        cells = line.split()
        rows[cells[0]] = dict(zip(titles, cells))
    return rows


def test_every_column_of_a_score_table_is_explained():
    from parts.evaluate import heading
    explained = ", ".join(row[0] for row in table_rows(PAGES["docs/metrics.md"])).split(", ")
    assert set(heading()) - {"n"} <= set(explained)


def near(said, found):
    """On another processor a close call may fall the other way: 2 of 200 may."""
    if said == "-" or found == "-":
        return said == found
    return abs(float(said) - float(found)) <= 0.011


def test_the_demo_prints_the_scores_that_are_pasted(demo):
    _, printed = demo
    printed = score_rows(printed)
    [block] = [block for block in blocks(RESULTS) if block.startswith("method ")]
    pasted = score_rows(block)
    assert list(pasted) == list(printed) == ["router", "direct", "static", "text"]
    for method, cells in pasted.items():
        assert list(cells) == list(printed[method])
        for title in ("F1-Recall", "exact", "F1", "routing", "retrievals", "gold", "malformed",
                      "calls"):
            assert near(cells[title], printed[method][title]), (method, title)

    header = re.search(r"^\| method \| (.*) \|\n", README, re.MULTILINE)
    titles = header[1].split(" | ")
    for method, cells in pasted.items():
        line = re.search(rf"^\| {method} \| (.*) \|$", README[header.start():], re.MULTILINE)
        shown = dict(zip(titles, line[1].split(" | ")))
        assert all(shown[title] == cells[title] for title in titles[:-1]), method


def test_the_demo_shows_the_trajectory_that_is_pasted(demo):
    folder, printed = demo
    [block] = [block for block in blocks(README) if "image-table, router" in block]
    pasted = block.replace("data/demo", str(folder)).splitlines()
    part = printed[printed.index(pasted[0]):].split("\n\n")[0].splitlines()
    part = [line for line in part if not line.startswith(("  think ", "  time "))]
    assert part == pasted


OUTPUT = re.compile(r"^  r ([\d.]+)  A ([+-][\d.]+)  (.*)$", re.MULTILINE)


def groups_in(text):
    """The groups of a worked trajectory: lists of (reward, advantage, the rest of the line)."""
    groups = []
    for part in re.split(r"^(?=\w+ step, )", text, flags=re.MULTILINE):
        if outputs := OUTPUT.findall(part):
            groups.append(outputs)
    return groups


def test_the_arithmetic_of_the_worked_trajectory():
    """Each reward is the mean of its parts (Eq. 1, 2), each advantage that of its group (Eq. 3)."""
    import torch
    from grpo import group_advantages
    from parts.steps import StepError, parse_step
    [block] = [block for block in blocks(TRAJECTORY) if "route step, " in block]
    [first] = [block for block in blocks(README) if "route step, " in block]
    groups = groups_in(block)
    assert len(groups) == 6
    for group in [*groups, *groups_in(first)]:
        assert len(group) == 4
        rewards = torch.tensor([float(reward) for reward, _, _ in group])
        advantages = group_advantages(rewards, torch.zeros(4), eps=0.2).tolist()
        for (reward, shown, rest), advantage in zip(group, advantages):
            parts = [float(v) for v in re.findall(r"(?:similarity|route|answer) ([\d.]+)", rest)]
            assert abs(sum(parts) / len(parts) - float(reward)) < 0.0051
            assert abs(advantage - float(shown)) < 0.0011
            if "<think>" in rest:
                assert "form 1.00" in rest
                assert not isinstance(parse_step(rest[rest.index("<think>"):]), StepError)
    # README shows the first group, without its longest columns
    assert [o[:2] for o in groups_in(first)[0]] == [o[:2] for o in groups[0]]


def test_the_arithmetic_of_the_states():
    """Each advantage is that of its state (Eq. 7): of the rewards beside it."""
    import torch
    from grpo import group_advantages
    [block] = [block for block in blocks(TRAJECTORY) if "state, " in block]
    sizes = []
    for state in block.split("\nstate, ")[1:]:
        pairs = re.findall(r"^  R ([\d.]+)  A ([+-][\d.]+)  ", state, re.MULTILINE)
        rewards = torch.tensor([float(reward) for reward, _ in pairs])
        advantages = group_advantages(rewards, torch.zeros(len(pairs))).tolist()
        assert advantages == pytest.approx([float(a) for _, a in pairs], abs=6e-4)
        assert state.startswith(f"{len(pairs)} answered it")
        sizes.append(len(pairs))
    assert sizes == [6, 3, 3]


# ------------------------------------------------------------------ what the results say

def shown(score):
    """A score over seeds as the tables show it."""
    if score["sd"] is None:
        return f"{score['mean']:.3f}"
    each = " / ".join(f"{value:.3f}" for value in score["seeds"])
    return f"{score['mean']:.3f} ± {score['sd']:.3f} ({each})"


def table_rows(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_tables_show_the_stored_results():
    """Every configuration in results/before/summary.json, in docs; the main ones in README."""
    summary = json.loads((ROOT / "results" / "before" / "summary.json").read_text())
    in_docs = table_rows(RESULTS)
    for part in ("main", "collapse", "ablation", "cost"):
        for name, scores in summary[part].items():
            assert [name, shown(scores["f1_recall"])] in [row[:2] for row in in_docs], name
    in_readme = {row[0]: row for row in table_rows(README) if row[0] in summary["main"]}
    assert list(in_readme) == list(dict.fromkeys(["Step-GRPO", *summary["main"]]))
    for name, scores in summary["main"].items():
        full = next(row for row in in_docs if row[:2] == [name, shown(scores["f1_recall"])])
        cells = in_readme[name]
        assert cells[1] == shown(scores["f1_recall"])
        assert cells[2] == f"{scores['route_accuracy']['mean']:.3f}"
        assert cells[4] == f"{scores['worst_kind'][1]} {scores['worst_kind'][0]:.3f}"
        assert all(cell in full for cell in cells), name


def test_credit_by_state_and_by_trajectory_are_the_stored_rows():
    rows = [json.loads(line) for line in (ROOT / "results" / "credit.jsonl").open()]
    in_docs = {row[0]: row[1:] for row in table_rows(RESULTS)}
    means = {}
    for credit in ("state", "trajectory"):
        some = [row for row in rows if row["credit"] == credit]
        scores = [row["test"]["f1_recall"] for row in some]
        means[credit] = {"mean": mean(scores), "sd": stdev(scores), "seeds": scores}
        cells = in_docs[f"by {credit}"]
        assert cells[0] == shown(means[credit])
        assert cells[1] == f"{mean(row['test']['route_accuracy'] for row in some):.3f}"
        assert cells[3] == " / ".join(str(row["updates"]) for row in some)
        assert len(some) == 3 and all(row["seconds"] < 370 for row in some)
        assert shown(means[credit]) in " ".join(README.split())
    assert means["state"]["mean"] >= 0.95


def test_the_headline_is_what_was_measured():
    """Of make train, three seeds: before and after on 520 questions."""
    before, *rows = [json.loads(line) for line in (ROOT / "results" / "train.jsonl").open()]
    scores = [row["test"]["f1_recall"] for row in rows]
    after = {"mean": mean(scores), "sd": stdev(scores), "seeds": scores}
    start = before["test"]["f1_recall"]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert all(row["test"]["n"] == 520 for row in (before, *rows))
    prose = " ".join(README.split())
    assert f"from {start:.2f} to {after['mean']:.2f} F1-Recall" in prose
    assert f"({start:.3f} to {after['mean']:.3f} ± {after['sd']:.3f}, three seeds" in prose
    assert shown(after) in prose and "520 questions" in prose
    options = re.search(r"train\.py (grpo .*) --seed", (ROOT / "Makefile").read_text())[1]
    assert all(options in row["commands"][0].replace(" --clock cpu", "") for row in rows)


def test_the_figures_of_the_soak_are_those_of_its_result():
    soak = json.loads((ROOT / "results" / "soak.json").read_text())
    kills, fuzz, memory = soak["kill"], soak["fuzz"], soak["memory"]
    killed = [kills[work] for work in ("training", "index", "evaluation")]
    assert soak["held"] and not fuzz["failed"] and not any(work["wrong"] for work in killed)
    inputs = sum(fuzz[kind]["inputs"] for kind in ("parser and metric", "readers", "pictures"))
    grown = {}
    for part in ("training", "routing"):
        line = f"{memory[part]['kb_each']:.2f} ± {memory[part]['error']:.2f} kB"
        grown[part] = line.replace("-", "−")
    prose = " ".join(RESULTS.split())
    for figure in (
            f"{sum(k['killed'] for k in killed)} of the {sum(k['moments'] for k in killed)} kills",
            f"{inputs:,} inputs",
            f"{grown['training']} an update ({memory['training']['megabytes']:.0f} MB after 2,000)",
            f"{grown['routing']} a question ({memory['routing']['megabytes']:.0f} MB after "
            f"{memory['routing']['work']:,})"):
        assert figure in prose, figure


# ------------------------------------------------------------------------- size and links

def test_readme_can_be_read_in_ten_minutes():
    assert len(README.splitlines()) <= 250 and len(README.split()) <= 2600


def test_line_counts_are_true():
    """The table between the marks `lines` and `end`. To refresh it, put in what this prints, or
    what `wc -l *.py` and `cat parts/*.py | wc -l` (plumbing, lab) say."""
    [block] = re.findall(r"<!-- lines -->\n(.*?)<!-- end -->", README, re.DOTALL)
    counted = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", block, re.MULTILINE)
    true = {}
    for name in [*sorted(p.name for p in ROOT.glob("*.py")), "parts/", "plumbing/", "lab/"]:
        files = (ROOT / name).glob("*.py") if name.endswith("/") else [ROOT / name]
        true[name] = sum(len(file.read_text().splitlines()) for file in files)
    assert {name: int(count) for name, count in counted} == true


def anchors(text):
    """The names that a page's headings have on the web."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        letters = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(letters.replace(" ", "-"))
    return found


def links():
    for page, text in {**PAGES, **COURSE}.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith("http"):
                yield page, target


@pytest.mark.parametrize("page, target", list(links()))
def test_link_leads_somewhere(page, target):
    file, _, anchor = target.partition("#")
    path = (ROOT / page).parent / file if file else ROOT / page
    assert path.exists()
    if anchor:
        assert anchor in anchors(path.read_text())


def test_every_page_is_linked_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page}" in README, page
