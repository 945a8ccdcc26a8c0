"""Endurance: what `make test` tries a few times is tried here for some twenty minutes. Nothing may
be lost, doubled or leaked.

    kill     training, index building, evaluation: SIGKILL at random moments, then continued
             -> the end of no kill
    fuzz     a million generated outputs, answers, rows and pictures -> parser, metric, readers
             -> only declared errors
    memory   thousands of training steps and of routed questions -> resident memory as it goes
             -> its slope

The last line is one JSON object. Exit code 0 where all held, 1 where not, 2 after a user's mistake.
"""
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the tests, for conftest

from conftest import command, made
from infer import Router
from model import VLM, read_config
from parts.chat import Processor
from parts.corpora import read_docs, read_mbeir, read_tables, read_wiki
from parts.evaluate import read_results
from parts.questions import HERE, load_questions
from parts.score import answer_scores, exact_match
from parts.stepfiles import load_prompts, read_steps
from parts.steps import AnswerStep, RouteStep, StepError, parse_step
from parts.trajectory import COSTS
from parts.vision import PICTURES, load_picture
from plumbing.files import Progress, read_json, run_command
from plumbing.options import OneLineParser, add_flags, check_options, from_flags, option
from retrieve import world_bases

TINY = HERE / "weights" / "tiny"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
os.environ["OMP_NUM_THREADS"] = "1"                     # of the commands that are started here


@dataclass(frozen=True)
class SoakOptions:
    """Endurance: kills, generated inputs, memory."""
    seed: int = option(0, "of moments and inputs")
    moments: int = option(20, "kills of each kind of work", least=1)
    inputs: int = option(1_000_000, "generated inputs", least=1)
    steps: int = option(2000, "updates while memory is watched", least=1)
    questions: int = option(20_000, "routed questions while memory is watched", least=1)

    def __post_init__(self):
        check_options(self)


# ------------------------------------------------------------------------------------------- kill

KINDS = ("training", "index", "evaluation")


def work(kind, world, out):
    """A kind of work that writes in the folder `out`: its command, and the file or folder there
    that shows it at work."""
    if kind == "training":
        return command("train.py", "grpo", "--world", world, "--steps", 8, "--save-every", 2,
                       "--prompts", 6, "--group", 4, "--open-questions", 12, "--val-every", 0,
                       "--threads", 1, "--log-every", 2, "--out", out), out / "log.jsonl"
    if kind == "index":
        return command("retrieve.py", "build", world / "text.jsonl", "--shard", 5, "--threads", 1,
                       "--out", out / "kb"), out / ".kb.building"
    file = out / "rows.jsonl"
    return command("infer.py", "--model", TINY, "--world", world, "--limit", 26, "--batch-size", 1,
                   "--threads", 1, "--out", file), file


def untimed(row):
    """A row without what the clock says."""
    plain = {}
    for name, value in row.items():
        if "seconds" not in name and not name.endswith("_s"):
            plain[name] = untimed(value) if isinstance(value, dict) else value
    return plain


def end_of(out):
    """What lies in a folder when the work is done: {name: content}. JSON lines without times, in
    order of step or line; all else byte for byte, but a run's options, which say where it lies."""
    files = {}
    for path in out.rglob("*"):
        if not path.is_file() or path.name == "options.json":
            continue
        content = path.read_bytes()
        if path.name == "trainer.json":
            content = untimed(json.loads(content))
        elif path.name in ("log.jsonl", "rows.jsonl"):
            rows = [untimed(json.loads(line)) for line in content.split(b"\n") if line]
            content = sorted(rows, key=lambda row: row.get("line", row.get("step")))
        files[path.relative_to(out).as_posix()] = content
    return files


def at_work(words, sign, moment=math.inf):
    """Starts a command, kills it `moment` seconds after it touched `sign`: (seconds at work,
    whether it was killed)."""
    launched, begun = time.time(), None
    process = subprocess.Popen(words, **QUIET)
    while process.poll() is None:
        if begun and time.time() - begun > moment:
            break
        with suppress(FileNotFoundError):
            if not begun and sign.stat().st_mtime > launched:
                begun = time.time()
        time.sleep(0.002)
    process.kill()
    killed = process.wait() < 0
    return time.time() - (begun or time.time()), killed


def finish(words):
    """Runs a command that has to succeed."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words[1:])} ended with code {done.returncode}: "
                         f"{done.stderr.strip()[-500:]}")


def soak_kill(o, folder, world, kinds=KINDS):
    """Each kind of work is done once undisturbed, then again with kills on the way, up to three
    before it may end."""
    rng, report = random.Random(o.seed), {}
    for kind in kinds:
        whole = folder / kind / "whole"
        whole.mkdir(parents=True)
        seconds, _ = at_work(*work(kind, world, whole))
        killed = wrong = 0
        progress = Progress(o.moments, f"kills of {kind}")
        for i in range(o.moments):
            out = folder / kind / str(i // 3)
            out.mkdir(exist_ok=True)
            words, sign = work(kind, world, out)
            _, was_killed = at_work(words, sign, rng.uniform(0, 0.6 * seconds))
            killed += was_killed
            if i % 3 == 2 or i == o.moments - 1:
                finish(words)
                wrong += end_of(out) != end_of(whole)
                shutil.rmtree(out)
            progress.add()
        report[kind] = {"moments": o.moments, "killed": killed, "wrong": wrong}
    return report, not any(counts["wrong"] for counts in report.values())


# ------------------------------------------------------------------------------------------- fuzz

PIECES = [*"a \n\0\u2028\x85\ud800\U0001f40dſKİ½٣{}[]\\\"'.-–%$«”", "<|im_end|>", "The Seine",
          "yes", "1,234", "3.5", "-7", "12e5", "9" * 400, "can't", "cant", "''", "...", "None",
          "Text Retriever", "table retriever"]
for tag in ("think", "sub-question", "ret", "answer", "THINK"):
    PIECES += [f"<{tag}>", f"</{tag}>"]

HOP = {"query": "q", "retriever": "text retriever", "answer": "a"}
OUTPUT = {"thought": "t", "answer": "a"}
QUESTION = {"id": "1", "question": "?", "answer": ["a", {"range": [1.5, 2]}], "image": None,
            "kind": "k", "hops": [HOP]}
PLAN = {"thought": "t", "query": "q", "retriever": ["Text Retriever"], "ter": ["p"],
        "answer": OUTPUT}
RESULT = {**QUESTION, "method": "router", "plan_1": PLAN, "llm_answer": OUTPUT,
          "cost": dict.fromkeys(COSTS, 1)}
STEPS = {"images": [], "steps": [
    {"step_type": "ret", "problem": "p", "system": "s",
     "answer": {"query": "q", "retriever": ["none"]}},
    {"step_type": "ans", "problem": "p", "system": "s", "answer": ["a"]}]}
TABLE = {"page_title": "p", "section_title": "s", "caption": "c", "header": ["a", "b"],
         "rows": [["1", "2"]]}
FORMATS = [     # a reader, and a row of what it reads
    (load_questions, QUESTION), (read_results, RESULT), (read_steps, STEPS),
    (load_prompts, {"route": "r"}), (read_config, read_json(TINY / "config.json")),
    (read_tables, [TABLE]),
    (read_docs, {"id": "1", "text": "t", "title": "T", "image": "x.jpg"}),
    (read_mbeir, {"did": "1:1", "txt": "t", "img_path": "x.jpg", "modality": "image,text"}),
    (read_wiki, {"id": "1", "url": "u", "title": "T", "text": "words of a page"})]
VALUES = (None, True, -1, 1.5, 10 ** 400, math.nan, "", "x", "../x.png", [], [[]], {},
          {"range": [2]}, [None], {"range": [-1e308, 1e308]}, ["text retriever"])


def some_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randrange(12)))


def spoilt(rng, value):
    """A JSON value in which something was replaced or left out."""
    if rng.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(VALUES) if rng.random() < 0.7 else some_text(rng)
    new = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.15:
        del new[key]
    else:
        new[key] = spoilt(rng, value[key])
    return new


def some_line(rng, value):
    """A row of a file, spoilt as a value, as text, as both or not at all."""
    for _ in range(rng.randrange(3)):
        value = spoilt(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    line = text.encode("utf-8", "surrogatepass")
    if rng.random() > 0.2:
        return line
    start, end = sorted(rng.choices(range(len(line) + 1), k=2))
    middle = rng.choice((b"", b"\xff", b"[" * 2000, b"\0", b'"', b"<doc id="))
    return line[:start] + middle + line[end:]


def read_whole(reader, file):
    """What a reader makes of a file, to its end."""
    value = reader(file)
    return list(value) if isinstance(value, Iterator) else value


def try_text(rng, file):
    """A text is an output to parse, and an answer to score."""
    text, gold = some_text(rng), some_text(rng)
    ends = sorted(rng.choices((-5, 0, 1, 2.5, 1e9), k=2))
    golds = rng.choice((gold, [gold, "a"], [{"range": ends}]))
    assert isinstance(parse_step(text), (RouteStep, AnswerStep, StepError))
    for score in (*answer_scores(text, golds), exact_match(text, golds)):
        assert 0 <= score <= 1
    return 1


def try_reader(rng, file):
    """A file of one to five lines is read, or refused in one line."""
    reader, row = rng.choice(FORMATS)
    lines = []
    for _ in range(rng.randint(1, 5)):
        _, other = rng.choice(FORMATS)
        lines.append(some_line(rng, row if rng.random() < 0.8 else other))
    file.write_bytes(b"\n".join(lines))
    try:
        read_whole(reader, file)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    return len(lines)


def some_pictures():
    """A small picture in each format and some modes, each with a note (EXIF) that it is turned."""
    note, pictures = Image.Exif(), []
    note[0x0112], note[0x010e] = 6, "described"
    modes = [("RGB", kind) for kind in PICTURES]
    for mode, kind in [*modes, ("P", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG")]:
        file = io.BytesIO()
        picture = Image.radial_gradient("L").resize((20, 24)).convert(mode)
        picture.save(file, kind, exif=note)
        pictures.append(file.getvalue())
    return pictures


SOME_PICTURES = some_pictures()


def try_picture(rng, file):
    """A picture with one to four bytes changed, most of them near its beginning, is read or refused
    in one line."""
    data = bytearray(rng.choice(SOME_PICTURES))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(data), rng.choice((120, 10 ** 6))))
        data[place] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    file.write_bytes(data)
    try:
        assert load_picture(file).mode == "RGB"
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(file) in str(error), str(error)
    return 1


def soak_fuzz(o, folder, world):
    """Generated inputs until there were enough of each kind; what fails is told with its seed."""
    report, failed = {}, []
    for kind, attempt, share in (("parser and metric", try_text, 0.8),
                                 ("readers", try_reader, 0.15), ("pictures", try_picture, 0.05)):
        wanted, trial, start = round(o.inputs * share), 0, time.time()
        progress = Progress(wanted, kind)
        while progress.done < wanted:
            seed = f"{o.seed} {kind} {trial}"
            trial += 1
            count = 1
            try:
                count = attempt(random.Random(seed), folder / "fuzz.jsonl")
            except Exception as error:          # any at all is what this part looks for
                failed.append(f"seed {seed!r}: {type(error).__name__}: {error}"[:300])
            progress.add(count)
        report[kind] = {"inputs": progress.done, "seconds": round(time.time() - start, 1)}
    return {**report, "failed": failed[:20]}, not failed


# ----------------------------------------------------------------------------------------- memory


def resident(pid="self"):
    """Megabytes of main memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(samples, blocks=20):
    """Samples (units of work done, megabytes) -> growth in kB each, and its standard error.

    A line through the means of blocks, since samples that follow each other are alike. The first
    quarter, in which caches fill, is left out.
    """
    done = samples[-1][0]
    late = np.array([sample for sample in samples if sample[0] >= done / 4], float)     # (n, 2)
    parts = np.array_split(late, min(blocks, len(late)))
    x, y = np.array([part.mean(0) for part in parts]).T
    (each, _), covariance = np.polyfit(x, y, 1, cov=True)
    error = math.sqrt(covariance[0, 0])
    grown = each * (x[-1] - x[0])
    return {"work": done, "megabytes": round(y[-1], 1), "kb_each": round(1e3 * each, 4),
            "error": round(1e3 * error, 4),
            "flat": bool(each <= 3 * error or grown < 0.01 * y[-1])}


def memory_of_training(o, folder, world):
    """Step-GRPO in its smallest setting, watched from outside."""
    log, samples, progress = folder / "long" / "log.jsonl", [], Progress(o.steps, "updates")
    process = subprocess.Popen(command(
        "train.py", "grpo", "--world", world, "--steps", o.steps, "--prompts", 4, "--group", 2,
        "--fill", 1, "--tries", 1, "--open-questions", 8, "--max-new-tokens", 32, "--save-every",
        max(1, o.steps // 4), "--val-every", 0, "--threads", 1, "--out", log.parent), **QUIET)
    while process.poll() is None:
        time.sleep(0.1)
        with suppress(OSError, IndexError):             # not begun, or just ended
            done, megabytes = log.read_bytes().count(b"\n"), resident(process.pid)
            if megabytes:                               # an ended process holds nothing
                samples.append((done, megabytes))
            progress.add(done - progress.done)
    if process.returncode or not samples:
        raise ValueError(f"the long training ended with code {process.returncode}")
    return slope(samples)


def memory_of_routing(o, world):
    """One router answers the world's questions again and again."""
    torch.set_num_threads(1)
    rows, _ = load_questions(world / "questions.jsonl")
    prompts = load_prompts(TINY / "prompts.json")
    router = Router(VLM.from_pretrained(TINY), Processor.from_pretrained(TINY), world_bases(world),
                    prompts=prompts)
    samples, progress = [(0, resident())], Progress(o.questions, "routed questions")
    while progress.done < o.questions:
        router.run(rows)
        progress.add(len(rows))
        samples.append((progress.done, resident()))
    return slope(samples)


def soak_memory(o, folder, world):
    report = {"training": memory_of_training(o, folder, world),
              "routing": memory_of_routing(o, world)}
    return report, all(part["flat"] for part in report.values())


# ----------------------------------------------------------------------------------- command line

PARTS = {"kill": soak_kill, "fuzz": soak_fuzz, "memory": soak_memory}


def soak(words):
    """Exit code 1 where something did not hold."""
    p = OneLineParser(prog="soak.py", description=SoakOptions.__doc__)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} [all]")
    add_flags(p, SoakOptions)
    args = p.parse_args(words)
    o = from_flags(SoakOptions, args)
    for part in args.parts:
        if part not in PARTS:
            raise ValueError(f"{part}: no such part, there are {', '.join(PARTS)}")
    report, held = {}, True
    for part in args.parts or PARTS:
        start = time.time()
        with tempfile.TemporaryDirectory() as name:
            world = Path(name) / "w"
            made("lab.world", "--countries", 40, "--questions", 195, "--out", world)
            report[part], well = PARTS[part](o, Path(name), world)
        report[part]["seconds"] = round(time.time() - start)
        held = held and well
    print(json.dumps({**report, "held": held}))
    return 0 if held else 1


def main(argv=None):
    return run_command("soak.py", soak, argv)


if __name__ == "__main__":
    sys.exit(main())
