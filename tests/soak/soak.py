"""Endurance: what `make test` tries a few times is tried here for some twenty minutes. Nothing may be lost, doubled or
leaked.

    kill     training, index building, evaluation: SIGKILL at random moments, then continued -> the end of no kill
    fuzz     a million generated outputs, answers, rows and pictures -> parser, metric, readers -> only declared errors
    memory   thousands of training steps and of routed questions -> resident memory as it goes -> its slope

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
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infer import Router
from model import VLM, read_config
from parts.chat import Processor
from parts.corpora import read_docs, read_mbeir, read_tables, read_wiki
from parts.evaluate import score_row
from parts.questions import HERE, load_questions
from parts.trajectory import COSTS
from parts.score import answer_scores, exact_match
from parts.stepfiles import load_prompts, load_steps, read_steps
from parts.steps import AnswerStep, RouteStep, StepError, parse_step
from parts.vision import PICTURES, load_picture
from plumbing.old import OneLineParser, read_json, read_rows
from retrieve import world_bases

TINY = HERE / "weights" / "tiny"
QUIET = {"env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
         "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Clock:
    """Says every few seconds how much is done and how long the rest will take."""

    def __init__(self, what, total):
        self.what, self.total, self.start, self.said = what, total, time.time(), time.time()

    def at(self, done):
        now = time.time()
        if now - self.said >= 5 and done:
            self.said, left = now, (now - self.start) * (self.total - done) / done
            print(f"{self.what}: {done} of {self.total}, {left:.0f} s left", file=sys.stderr, flush=True)


def command(script, *words):
    program = ["-m", script] if script.startswith("lab.") else [str(HERE / script)]
    return [sys.executable, *program, *map(str, words)]


def must(words):
    """Runs a command that has to succeed."""
    done = subprocess.run(words, env=QUIET["env"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words[1:])} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")


# ----------------------------------------------------------------------------------------------------------------- kill


def untimed(row):
    """A row without what the clock says."""
    return {k: untimed(v) if isinstance(v, dict) else v for k, v in row.items()
            if "seconds" not in k and not k.endswith("_s")}


def end_of(out):
    """What lies in a folder when the work is done: JSON lines without times, in order of step or line; all else byte
    for byte, but a run's options, which say where it lies."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*")
             if path.is_file() and path.name != "options.json"}
    for name, data in files.items():
        if name.endswith("trainer.json"):
            files[name] = untimed(json.loads(data))
        elif name in ("log.jsonl", "rows.jsonl"):
            rows = [untimed(json.loads(line)) for line in data.split(b"\n") if line]
            files[name] = sorted(rows, key=lambda row: row.get("line", row.get("step")))
    return files


def kinds_of_work(world):
    """{name: (its command for a folder, the file or folder there that shows it at work)}"""
    return {
        "training": (lambda out: command(
            "train.py", "grpo", "--world", world, "--steps", 8, "--save-every", 2, "--prompts", 6, "--group", 4,
            "--open-questions", 12, "--val-every", 0, "--threads", 1, "--log-every", 2, "--out", out), "log.jsonl"),
        "index": (lambda out: command(
            "retrieve.py", "build", world / "text.jsonl", "--shard", 5, "--threads", 1, "--out", out / "kb"),
            ".kb.building"),
        "evaluation": (lambda out: command(
            "infer.py", "--model", TINY, "--world", world, "--limit", 26, "--batch-size", 1, "--threads", 1, "--out",
            out / "rows.jsonl"), "rows.jsonl")}


def at_work(words, sign, moment=math.inf):
    """Starts a command, kills it `moment` seconds after it touched `sign`: (seconds at work, whether it was killed)."""
    launched, begun, process = time.time(), None, subprocess.Popen(words, **QUIET)
    while process.poll() is None and not (begun and time.time() - begun > moment):
        with suppress(FileNotFoundError):
            begun = begun or (time.time() if sign.stat().st_mtime > launched else None)
        time.sleep(0.002)
    process.kill()
    return time.time() - (begun or time.time()), process.wait() < 0


def soak_kill(o, folder, world):
    """Each kind of work is done once undisturbed, then again with kills on the way, up to three before it may end."""
    rng, report = random.Random(o.seed), {}
    for name, (work, sign) in kinds_of_work(world).items():
        for i in range(-1, (o.moments + 2) // 3):
            (folder / name / str(i)).mkdir(parents=True)
        whole, clock, counts = folder / name / "-1", Clock(name, o.moments), {"killed": 0, "wrong": 0}
        seconds, _ = at_work(work(whole), whole / sign)
        for i in range(o.moments):
            out = folder / name / str(i // 3)
            counts["killed"] += at_work(work(out), out / sign, rng.uniform(0, 0.6 * seconds))[1]
            if i % 3 == 2 or i == o.moments - 1:
                must(work(out))
                counts["wrong"] += end_of(out) != end_of(whole)
                shutil.rmtree(out)
            clock.at(i + 1)
        report[name] = {"moments": o.moments, **counts}
    return report, not any(counts["wrong"] for counts in report.values())


# ----------------------------------------------------------------------------------------------------------------- fuzz

PIECES = [*"a \n\0\u2028\x85\ud800\U0001f40dſKİ½٣{}[]\\\"'.-–%$«”", "<|im_end|>", "The Seine", "yes", "1,234",
          "3.5", "-7", "12e5", "9" * 400, "can't", "cant", "''", "...", "None", "Text Retriever", "table retriever"]
PIECES += [f"<{slash}{name}>" for slash in ("", "/") for name in ("think", "sub-question", "ret", "answer", "THINK")]
HOP, SAID = {"query": "q", "retriever": "text retriever", "answer": "a"}, {"thought": "t", "answer": "a"}
QUESTION = {"id": "1", "question": "?", "answer": ["a", {"range": [1.5, 2]}], "image": None, "kind": "k", "hops": [HOP]}
PLAN = {"thought": "t", "query": "q", "retriever": ["Text Retriever"], "ter": ["p"], "answer": SAID}
RESULT = {**QUESTION, "method": "router", "plan_1": PLAN, "llm_answer": SAID, "cost": dict.fromkeys(COSTS, 1)}
STEP = {"step_type": "ret", "problem": "p", "system": "s", "answer": {"query": "q", "retriever": ["none"]}}
STEPS = {"images": [], "steps": [STEP, {"step_type": "ans", "problem": "p", "system": "s", "answer": ["a"]}]}
TABLE = {"page_title": "p", "section_title": "s", "caption": "c", "header": ["a", "b"], "rows": [["1", "2"]]}
FORMATS = [  # a reader, and a row of what it reads
    (load_questions, QUESTION), (read_steps, STEPS), (load_steps, STEPS), (load_prompts, {"route": "r"}),
    (lambda p: read_rows(p, lambda row, number: score_row(row)), RESULT), (lambda p: list(read_tables(p)), [TABLE]),
    (lambda p: list(read_docs(p)), {"id": "1", "text": "t", "title": "T", "image": "x.jpg"}),
    (lambda p: list(read_mbeir(p)), {"did": "1:1", "txt": "t", "img_path": "x.jpg", "modality": "image,text"}),
    (lambda p: list(read_wiki(p)), {"id": "1", "url": "u", "title": "T", "text": "words of a page"}),
    (read_config, read_json(TINY / "config.json"))]
VALUES = (None, True, -1, 1.5, 10 ** 400, math.nan, "", "x", "../x.png", [], [[]], {}, {"range": [2]}, [None],
          {"range": [-1e308, 1e308]}, ["text retriever"])


def some_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randrange(12)))


def spoilt(rng, value):
    """A JSON value in which something was replaced or left out."""
    if rng.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(VALUES) if rng.random() < 0.7 else some_text(rng)
    key, new = rng.choice(list(value) if isinstance(value, dict) else range(len(value))), value.copy()
    if rng.random() < 0.15:
        del new[key]
    else:
        new[key] = spoilt(rng, value[key])
    return new


def some_line(rng, value):
    """A row of a file, spoilt as a value, as text, as both or not at all."""
    for _ in range(rng.randrange(3)):
        value = spoilt(rng, value)
    line = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() > 0.2:
        return line
    start, end = sorted(rng.choices(range(len(line) + 1), k=2))
    return line[:start] + rng.choice((b"", b"\xff", b"[" * 2000, b"\0", b'"', b"<doc id=")) + line[end:]


def try_text(rng, file):
    """A text is an output to parse, and an answer to score."""
    text, gold, ends = some_text(rng), some_text(rng), sorted(rng.choices((-5, 0, 1, 2.5, 1e9), k=2))
    golds = rng.choice((gold, [gold, "a"], [{"range": ends}]))
    assert isinstance(parse_step(text), (RouteStep, AnswerStep, StepError))
    assert all(0 <= score <= 1 for score in (*answer_scores(text, golds), exact_match(text, golds)))
    return 1


def try_reader(rng, file):
    """A file of one to five lines is read, or refused in one line."""
    reader, row = rng.choice(FORMATS)
    lines = [some_line(rng, row if rng.random() < 0.8 else rng.choice(FORMATS)[1]) for _ in range(rng.randint(1, 5))]
    file.write_bytes(b"\n".join(lines))
    try:
        reader(file)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    return len(lines)


def some_pictures():
    """A small picture in each format and some modes, each with a note (EXIF) that it is turned."""
    note, made = Image.Exif(), []
    note[0x0112], note[0x010e] = 6, "described"
    for mode, kind in [("RGB", kind) for kind in PICTURES] + [("P", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG")]:
        file = io.BytesIO()
        Image.radial_gradient("L").resize((20, 24)).convert(mode).save(file, kind, exif=note)
        made.append(file.getvalue())
    return made


def try_picture(rng, file, made=some_pictures()):
    """A picture with one to four bytes changed, most of them near its beginning, is read or refused in one line."""
    data = bytearray(rng.choice(made))
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
    for kind, attempt, share in (("parser and metric", try_text, 0.8), ("readers", try_reader, 0.15),
                                 ("pictures", try_picture, 0.05)):
        done, trial, wanted = 0, 0, round(o.inputs * share)
        clock = Clock(kind, wanted)
        while done < wanted:
            seed, trial = f"{o.seed} {kind} {trial}", trial + 1
            try:
                done += attempt(random.Random(seed), folder / "fuzz.jsonl")
            except Exception as error:                                    # any at all is what this part looks for
                done, failed = done + 1, [*failed[:19], f"seed {seed!r}: {type(error).__name__}: {error}"[:300]]
            clock.at(done)
        report[kind] = {"inputs": done, "seconds": round(time.time() - clock.start, 1)}
    return {**report, "failed": failed}, not failed


# --------------------------------------------------------------------------------------------------------------- memory


def resident(pid="self"):
    """Megabytes of main memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(samples, blocks=20):
    """Samples (units of work done, megabytes) -> growth in kB each, and its standard error: a line through the means of
    blocks, since samples that follow each other are alike. The first quarter, in which caches fill, is left out."""
    done = samples[-1][0]
    late = [sample for sample in samples if sample[0] >= done / 4]
    x, y = np.array([part.mean(0) for part in np.array_split(np.array(late, float), min(blocks, len(late)))]).T
    (each, _), covariance = np.polyfit(x, y, 1, cov=True)
    error, grown = math.sqrt(covariance[0, 0]), each * (x[-1] - x[0])
    return {"work": done, "megabytes": round(y[-1], 1), "kb_each": round(1e3 * each, 4), "error": round(1e3 * error, 4),
            "flat": bool(each <= 3 * error or grown < 0.01 * y[-1])}


def memory_of_training(o, folder, world):
    """Step-GRPO in its smallest setting, watched from outside."""
    log, samples, clock = folder / "long" / "log.jsonl", [], Clock("training", o.steps)
    process = subprocess.Popen(command(
        "train.py", "grpo", "--world", world, "--steps", o.steps, "--prompts", 4, "--group", 2, "--fill", 1, "--tries",
        1, "--open-questions", 8, "--max-new-tokens", 32, "--save-every", max(1, o.steps // 4), "--val-every", 0,
        "--threads", 1, "--out", log.parent), **QUIET)
    while process.poll() is None:
        time.sleep(0.1)
        with suppress(OSError, IndexError):                               # not begun, or just ended
            done, held = log.read_bytes().count(b"\n"), resident(process.pid)
            samples += [(done, held)] if held else []                     # an ended process holds nothing
            clock.at(done)
    if process.returncode or not samples:
        raise ValueError(f"the long training ended with code {process.returncode}")
    return slope(samples)


def memory_of_routing(o, world):
    """One router answers the world's questions again and again."""
    torch.set_num_threads(1)
    rows, _ = load_questions(world / "questions.jsonl")
    router = Router(VLM.from_pretrained(TINY), Processor.from_pretrained(TINY), world_bases(world),
                    prompts=load_prompts(TINY / "prompts.json"))
    samples, clock = [(0, resident())], Clock("routed questions", o.questions)
    while samples[-1][0] < o.questions:
        router.run(rows)
        samples.append((samples[-1][0] + len(rows), resident()))
        clock.at(samples[-1][0])
    return slope(samples)


def soak_memory(o, folder, world):
    report = {"training": memory_of_training(o, folder, world), "routing": memory_of_routing(o, world)}
    return report, all(part["flat"] for part in report.values())


PARTS = {"kill": soak_kill, "fuzz": soak_fuzz, "memory": soak_memory}


def main(argv=None):
    try:
        p = OneLineParser(prog="soak.py", description=__doc__.split("\n")[0])
        p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
        p.add_argument("--quick", action="store_true", help="a few of everything: it shows that all runs")
        p.add_argument("--seed", type=int, default=0, help="of moments and inputs (0)")
        o, report, held = p.parse_args(argv), {}, True
        if unknown := [part for part in o.parts if part not in PARTS]:
            raise ValueError(f"{unknown[0]}: no such part, there are {', '.join(PARTS)}")
        o.moments, o.inputs, o.steps, o.questions = (3, 20000, 60, 1560) if o.quick else (20, 1_000_000, 2000, 20000)
        for part in o.parts or PARTS:
            with tempfile.TemporaryDirectory() as name:
                folder, start = Path(name), time.time()
                must(command("lab.world", "--countries", 40, "--questions", 195, "--out", folder / "w"))
                report[part], well = PARTS[part](o, folder, folder / "w")
            report[part]["seconds"], held = round(time.time() - start), held and well
    except (ValueError, OSError) as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report | {"held": held}))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
