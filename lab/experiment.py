"""The study: what is annotation worth, and where do step rewards matter? Three seeds, all else
equal.

What flows through this file:
    plan (below, as data) -> jobs: one method, one setting, one seed
                          -> train.py and infer.py as a user would call them
                          -> a row for each finished job in results/PART.jsonl
                          -> lab/tables.py: results/summary.json, figures, docs/results.md

    rates       the learning rate of each method, chosen on validation questions alone
    main        six methods from the same weak start, two test worlds
    dials       worlds in which facts are missing or moved, answers guessable, wordings new
    annotation  30, 300 and 3,000 annotated questions, and wrong routes in the annotation
    axis        starts that are right more or less often, on questions that need a search: where do
                answers alone stop being enough?
    depth       three hops and more: trained compositions, unseen ones, unseen depth
    next        one hop deeper than the start knows, with 256 questions, 56 of them to validate on
    ablation    what breaks Step-GRPO
    steps       do the rewards of steps predict the end?
    cost        what a question costs, by pipeline, one at a time

Jobs run two at a time, each on one core, and count the time of the processor, which other work on
the machine hardly changes. A job that was stopped goes on; a finished one is not run again, unless
its commands or the shipped weights have changed.

Choices are made on validation worlds. A test world is used once, by each finished job.
"""
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean

from lab.scores import rows_of, summary_of_steps, summary_of_test
from lab.tables import write_tables
from lab.world import ONE_AND_TWO_HOPS, RETRIEVERS, write_lines
from plumbing.files import checksum, point, run_command, say
from plumbing.options import OneLineParser, add_flags, check_options, from_flags, option

HERE = Path(__file__).resolve().parents[1]
WARM, TINY = "weights/tiny-warm", "weights/tiny"

# -------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Scale:
    """How large everything is. Minutes are of the processor. Folders are named after all of it: a
    field more, and finished runs are looked for in other places."""
    name: str = "study"             # of the folders under data and runs
    main: float = 6.0               # minutes of a main run
    short: float = 3.0              # minutes of any other training
    steps: int = 0                  # updates of a training; 0: as many as fit its minutes
    train: int = 3000               # questions of a training world
    val: int = 260                  # questions of a validation world
    test: int = 520                 # questions of a test world
    countries: int = 0              # of every world; 0: as lab.world has it
    sizes: tuple = (30, 300)        # annotated questions, beside all of them
    rounds: int = 5                 # of rejection sampling
    sampled: int = 600              # questions of a round of a main run; of others in proportion
    deep: int = 8000                # questions of each depth to train on
    deep_steps: int = 2000          # updates of a training for depth
    deep_test: int = 260            # questions of each test of depth
    next: int = 200                 # questions of the next depth, and
    next_val: int = 56              # those that choose a checkpoint: 256 in all
    weaken: int = 300               # updates that make a start weaker or stronger
    read: int = 3000                # updates that teach the weak start to read worlds with dials
    validations: int = 6            # of a training, of which the best chooses the checkpoint; of
                                    # the main part three times as many
    seeds: tuple = (0, 1, 2)
    flags: tuple = ()               # more options of every grpo training
    few: bool = False               # of each part but the main one only the last job


QUICK = Scale(name="study-quick", steps=2, train=39, val=13, test=26, countries=40, sizes=(13, 26),
              rounds=1, sampled=39, deep=39, deep_steps=2, deep_test=20, next=20,
              next_val=8, weaken=2, read=2,
              validations=1, seeds=(0,), few=True,
              flags=("--prompts", 6, "--group", 2, "--open-questions", 12))


@dataclass(frozen=True)
class Method:
    """A way to train the router."""
    needs: str              # of the training questions
    data: str               # the file of the training world that holds it
    kind: str               # grpo, sft, rejection
    rate: float             # the best of part "rates"
    updates: float          # that fit a minute of the processor (two cores, AMD EPYC)
    flags: tuple = ()


STEP, SFT, BARE, STATE = "Step-GRPO", "SFT", "SFT without thoughts", "credit by state"
TRAJECTORY, REJECTION = "credit by trajectory", "rejection sampling"
METHODS = {
    STEP: Method("gold steps", "questions", "grpo", 3e-4, 45, ("--follow", "best")),
    SFT: Method("gold steps and thoughts", "steps", "sft", 3e-4, 350),
    BARE: Method("gold steps", "bare", "sft", 3e-4, 350),
    STATE: Method("final answers", "answers", "grpo", 3e-4, 28, ("--mode", "outcome")),
    TRAJECTORY: Method("final answers", "answers", "grpo", 3e-4, 17,
                       ("--mode", "outcome", "--credit", "trajectory")),
    REJECTION: Method("final answers", "answers", "rejection", 3e-4, 290),
}
RATES = {name: (1.5e-4, 3e-4, 6e-4) for name in METHODS}    # tried in part "rates"
CHOICE = 41                         # the seed of that part, whose worlds no other part uses
FIRST_WORLD = 200                   # seed of the worlds of seed 0

SETTINGS = {                        # options of all worlds of a setting
    "plain": (),
    "unanswerable": ("--unanswerable", 0.15),
    "moved": ("--moved", 0.3),
    "guessable": ("--guessable", 0.8),
    "paraphrased": ("--wordings", "several"),
    "searched": ("--kinds", *(kind for kind, chains in ONE_AND_TWO_HOPS.items() if chains)),
    "four hops": ("--rich", "--peel", "--hops", 4),
}
OF_TESTS = {"paraphrased": ("--wordings", "held")}          # in place of those
DIALS = ("unanswerable", "moved", "guessable", "paraphrased")
# The weak start has never read that the evidence does not say. Before the dials it learns to read
# that, and never to ask elsewhere: lab.practice.weak_steps has no routing of such questions.
READS_DIALS = "reads dials"
A_LITTLE = ("--unanswerable", 0.05, "--moved", 0.08, "--guessable", 0.15, "--wordings", "several")
TO_READ = {"weak": 10, "copy": 4, "describe": 2, "compare": 2, "absent": 2, "verdict": 4}
RATE_OF_STARTS = 5e-4
TESTS = (640001, 640002)            # seeds of test worlds, used for nothing else

ABLATION = {                        # a method, and options beside its own
    "Step-GRPO, not balanced": (STEP, "--no-balance"),
    "Step-GRPO, later hops pay too": (STEP, "--no-ready"),
    "Step-GRPO without similarity": (STEP, "--similarity-weight", 0, "--route-weight", 1),
    "Step-GRPO, small differences count in full": (STEP, "--eps", 1e-6),
    "Step-GRPO, gold history (offline)": (STEP, "--mode", "offline"),
    "credit by state, balanced over gold routes": (STATE, "--balance"),
}

# Depth. With --rich a world has 15 moves in place of 12, and questions go all ways through them.
# What a recipe trains on leaves out a third of the compositions of three hops, also inside of
# longer ones.
RICH, PEEL = "--rich", "--peel"
TRAIN, HELD = ("--compositions", "train"), ("--compositions", "held")
# name of a recipe -> options of its worlds, its training worlds {hops: weight}
DEPTH = {
    "to three hops": ((RICH, PEEL), {2: 4, 3: 6}),
    "to three hops, fewer relations": ((PEEL,), {2: 4, 3: 6}),
    "to four hops": ((RICH, PEEL), {2: 3, 3: 3, 4: 4}),
}
DEPTH_TESTS = {                     # name of a test -> options of its world
    "two hops": ("--hops", 2),
    "three": ("--hops", 3, *TRAIN),
    "three, unseen": ("--hops", 3, *HELD),
    "four": ("--hops", 4, *TRAIN),
    "four, unseen": ("--hops", 4, *HELD),
    "five": ("--hops", 5),
}
RIGHT_STEPS = (0.0, 0.25, 0.6)      # share of right routing steps in what a start is made of
PIPELINES = ("router", "oracle", "random", "static", "text", "image", "table", "direct",
             "iterative", "cot", "fewshot")
PARTS = ("rates", "main", "dials", "annotation", "axis", "depth", "next", "ablation", "steps",
         "cost")


@dataclass(frozen=True)
class Job:
    """A line of a table, one seed of it."""
    part: str
    name: str
    seed: int
    kind: str                       # a key of KINDS: how it is run
    method: str = ""                # of METHODS, for a training
    minutes: float = 0.0            # of training; where updates are counted, about
    setting: str = "plain"
    tag: str = ""                   # of the data: "", "-30", "-wrong", ...
    start: str = WARM               # a model directory, or a key of `starts`
    rate: float = 0.0               # 0: the method's
    flags: tuple = ()


def plan(scale):
    """All jobs of the study, the main ones first."""
    jobs, seeds = [], scale.seeds

    def train(part, method, name="", minutes=scale.short, some=seeds, **more):
        for seed in some:
            jobs.append(Job(part, name or method, seed, "train", method, minutes, **more))

    def ask(part, name, model, **more):
        jobs.append(Job(part, name, 0, "eval", start=model, **more))

    for name, rates in RATES.items():
        for rate in rates:
            train("rates", name, some=(CHOICE,), rate=rate)
    for name in METHODS:
        train("main", name, minutes=scale.main)
    ask("main", "weak start", WARM)
    for dial in DIALS:
        for name in (SFT, STEP, STATE, REJECTION):
            train("dials", name, setting=dial, start=READS_DIALS)
        ask("dials", "weak start that reads dials", READS_DIALS, setting=dial)
        for method in ("router", "static", "oracle"):
            ask("dials", method, TINY, setting=dial, flags=("--method", method))
    for tag in (*(f"-{n}" for n in scale.sizes), "", "-wrong"):
        for name in (SFT, BARE, STEP, STATE, REJECTION):
            if tag != "-wrong" or name in (SFT, BARE, STEP):    # the others read no routes
                train("annotation", name, tag=tag)
    for share in RIGHT_STEPS:
        start = f"start-{share}"
        ask("axis", "start", start, setting="searched", flags=("--temperature", 1))
        for name in (SFT, STEP, STATE):
            train("axis", name, setting="searched", start=start)
    for name in DEPTH:
        jobs += [Job("depth", name, seed, "depth", minutes=scale.deep_steps / 400)
                 for seed in seeds]
    ask("next", "start", "three hops", setting="four hops")
    ask("next", "oracle", "three hops", setting="four hops", flags=("--method", "oracle"))
    for name in (SFT, STEP, STATE):
        train("next", name, setting="four hops", start="three hops")
    for name, (method, *flags) in ABLATION.items():
        train("ablation", method, name, flags=tuple(flags))
    for updates in (0, 25, 75, 165):
        minutes = updates / METHODS[STEP].updates
        for seed in seeds if updates else seeds[:1]:
            jobs.append(Job("steps", f"{updates} updates", seed, "steps", STEP, minutes))
    for method in PIPELINES:
        ask("cost", method, TINY, flags=("--method", method, "--batch-size", 1))
    return few_of(jobs) if scale.few else jobs


def few_of(jobs):
    few = [job for job in jobs if job.part == "main"]
    for part in PARTS:
        own = [job for job in jobs if job.part == part != "main"]
        few += own[-1:]
    return few


# --------------------------------------------------------------------------- worlds and their files


def world(scale, setting, split, seed):
    """The folder of a world."""
    return f"data/{scale.name}/{setting.replace(' ', '-')}-{split}-{seed}"


def worlds(scale):
    """All worlds of the study: {folder: options of lab.world}."""
    practice = ("--practice", max(scale.train // 5, 1))
    folders = {to_read(scale): ("--split", "train", "--seed", CHOICE, "--questions", scale.train,
                                *A_LITTLE, *practice)}
    for job in plan(scale):
        if job.kind == "depth":
            folders |= deep_worlds(scale, *DEPTH[job.name])
            continue
        questions = {"train": scale.train, "val": scale.val, "test": scale.test}
        if job.setting == "four hops":
            questions = {"train": scale.next, "val": scale.next_val, "test": scale.deep_test}
        seeds = [("train", job.seed), ("val", job.seed)]
        seeds += [("test", number) for number in range(tests_of(job))]
        for split, seed in seeds:
            options = SETTINGS[job.setting]
            if split == "test":
                options = OF_TESTS.get(job.setting, options)
            number = TESTS[seed] if split == "test" else FIRST_WORLD + seed
            folders[world(scale, job.setting, split, seed)] = (
                "--split", split, "--seed", number, "--questions", questions[split], *options)
    return folders


def to_read(scale):
    """The folder of the world from which READS_DIALS is made."""
    return f"data/{scale.name}/to-read"


def deep_worlds(scale, options, mix):
    """The worlds of a recipe of the depth part."""
    folders = {}
    practice = ("--practice", max(scale.deep // 5, 1))
    for hops in mix:
        more = ("--hops", hops, *TRAIN)
        folders[deep(scale, "train", options, more)] = (
            "--split", "train", "--seed", 100, "--questions", scale.deep, *options, *more,
            *practice)
    for more in deep_tests(options).values():
        folders[deep(scale, "test", options, more)] = (
            "--split", "test", "--seed", TESTS[0], "--questions", scale.deep_test, *options, *more)
    return folders


def deep_tests(options):
    """The tests for worlds of these options: {name: more options}. Five hops need the more
    relations."""
    return {name: more for name, more in DEPTH_TESTS.items() if name != "five" or RICH in options}


def deep(scale, split, options, more):
    """Folder of a world of the depth part. What is only asked has no thoughts to peel."""
    words = ["depth", split]
    for word in (*options, *more):
        if (split, word) != ("test", PEEL) and word not in ("--hops", "--compositions"):
            words.append(str(word).strip("-"))
    return f"data/{scale.name}/{'-'.join(words)}"


def write_worlds(scale):
    """Writes the worlds of the study, those that are not there yet, what is trained on, and builds
    the bases that are searched."""
    from retrieve import world_bases                # here, since it takes torch with it
    for name, options in worlds(scale).items():
        folder = HERE / name
        if not (folder / "questions.jsonl").is_file():
            more = ("--countries", scale.countries) if scale.countries else ()
            words = command("-m", "lab.world", *options, *more, "--out", folder)
            if subprocess.run(words, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
                raise ValueError(f"lab.world could not write {name}: see its message above")
        practice = "--practice" in options          # such a world is only read by sft
        if options[1] == "train" and not practice and not (folder / "answers.jsonl").is_file():
            write_data(folder, scale)
        if not practice:
            world_bases(folder)


def write_data(folder, scale):
    """What is trained on, of a training world: all of its questions, the first so many, or with
    wrong routes; steps without thoughts; answers alone (a question's kind names its gold bases, so
    it goes, too); rounds of rejection sampling. The last file says that all are there."""
    questions, steps = rows_of(folder / "questions.jsonl"), rows_of(folder / "steps.jsonl")
    rng = random.Random("wrong routes")
    versions = {f"-{n}": (questions[:n], steps[:n]) for n in scale.sizes}
    pairs = [misrouted(*pair, rng) for pair in zip(questions, steps)]
    versions["-wrong"] = ([q for q, _ in pairs], [s for _, s in pairs])
    for share in RIGHT_STEPS:
        write_lines(folder / f"start-{share}.jsonl", [weakened(row, share, rng) for row in steps])
    versions[""] = (questions, steps)
    for tag, (some, their_steps) in versions.items():
        write_lines(folder / f"questions{tag}.jsonl", some)
        write_lines(folder / f"steps{tag}.jsonl", their_steps)
        write_lines(folder / f"bare{tag}.jsonl", map(without_thoughts, their_steps))
        answers = [{key: row[key] for key in ANSWER} for row in some]
        for i in range(scale.rounds):
            asked = []
            for place in range(i * scale.sampled, (i + 1) * scale.sampled):
                row = answers[place % len(some)]
                asked.append({**row, "id": f"{row['id']}-{place}"})     # a question asked again
            write_lines(folder / f"round{tag}-{i}.jsonl", asked)
        write_lines(folder / f"answers{tag}.jsonl", answers)


ANSWER = ("id", "question", "answer", "image")


def without_thoughts(row):
    return {**row, "steps": [{**step, "thought": ""} for step in row["steps"]]}


def misrouted(question, row, rng, share=0.4):
    """A question and its steps with wrong bases in that share of the hops."""
    hops, steps = [], list(row["steps"])
    for i, hop in enumerate(question["hops"]):
        if rng.random() < share:
            others = [name for name in RETRIEVERS.values() if name != hop["retriever"]]
            hop = {**hop, "retriever": rng.choice(others)}
            answer = {"query": hop["query"], "retriever": [hop["retriever"]]}
            steps[2 * i] = {**steps[2 * i], "answer": answer}       # a hop is two steps
        hops.append(hop)
    return {**question, "hops": hops}, {**row, "steps": steps}


def weakened(row, share, rng):
    """A trajectory in which that share of the routing steps is right; the others stop early, or ask
    a wrong base."""
    steps = []
    for step in row["steps"]:
        if step["step_type"] == "ret" and rng.random() >= share:
            query, [right] = step["answer"]["query"], step["answer"]["retriever"]
            wrong = [name for name in RETRIEVERS.values() if name != right]
            answer = {"query": query, "retriever": [rng.choice(wrong)]}
            if rng.random() < 0.5 or right == "none":
                answer = {"query": "none", "retriever": ["none"]}
                step = {**step, "thought": "enough"}
            step = {**step, "answer": answer}
        steps.append(step)
    return {**row, "steps": steps}


# ---------------------------------------------------------------------------------------- commands


def command(script, *words):
    return [sys.executable, script, *map(str, words)]


def folder_of(job, scale):
    """Where a job's run lives; another plan for it gets another folder."""
    words = f"{job.part} {job.name} {job.setting}{job.tag}"
    slug = "".join(letter if letter.isalnum() else "-" for letter in words.lower()).strip("-")
    return Path("runs") / scale.name / f"{slug}-{job.seed}-{mark_of(job, scale)}"


def mark_of(job, scale):
    """A short mark of all that a job depends on, beside the code: with another plan, other worlds
    or other shipped weights it has another folder, other commands, and its row does not count."""
    of_worlds = (SETTINGS[job.setting], OF_TESTS.get(job.setting), TESTS, DEPTH.get(job.name))
    method = METHODS.get(job.method)
    if method and job.rate:                         # which is then not the method's
        method = replace(method, rate=job.rate)
    start = start_of(job.start, scale)
    parts = (job, scale, method, of_worlds, FIRST_WORLD, start, *shipped())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:6]


@lru_cache
def shipped():
    """Checksums of the shipped weights."""
    return [checksum(HERE / model / "model.safetensors") for model in (WARM, TINY)]


def train(job, scale):
    """Training with one of METHODS, and the tests of its best checkpoint."""
    method, out = METHODS[job.method], folder_of(job, scale)
    home, model = world(scale, job.setting, "train", job.seed), start_of(job.start, scale)
    if method.kind == "rejection":
        return [*rejection(job, method, scale, out, home), *tests(job, out / "best", scale)]
    data = method.data
    if "offline" in job.flags:
        data = "steps"
    if "--balance" in job.flags:                                # it needs gold routes
        data = "questions"
    words = training(job, method, scale, out, model, [f"{home}/{data}{job.tag}.jsonl"])
    if method.kind == "grpo":
        words += [*method.flags, *job.flags, *scale.flags]
        if "offline" not in job.flags:
            words += ["--world", home]
    script = "grpo" if method.kind == "grpo" else "sft"
    return [command("train.py", script, *words), *tests(job, out / "best", scale)]


def training(job, method, scale, out, model, data, parts=1):
    """Options of a training that takes one of `parts` equal parts of a job's time."""
    steps = scale.steps or max(1, round(method.updates * job.minutes / parts))
    validations = scale.validations * (3 if job.part == "main" else 1)
    return ["--model", model, "--data", *data, "--seed", job.seed, "--threads", 1,
            "--clock", "cpu", "--steps", steps, "--learning-rate", job.rate or method.rate,
            "--val-world", world(scale, job.setting, "val", job.seed),
            "--val-questions", scale.val, "--log-every", 100, "--out", out,
            "--val-every", max(1, steps * parts // validations)]


def rejection(job, method, scale, out, home):
    """In turns: sample trajectories, keep those whose final answer is right, train on all that were
    kept so far."""
    commands, kept, model = [], [], start_of(job.start, scale)
    sampled = max(1, round(scale.sampled * job.minutes / scale.main))
    for i in range(scale.rounds):
        kept.append(f"{out}/round-{i}-steps.jsonl")
        commands.append(command(
            "infer.py", "--model", model, "--world", home,
            "--eval", f"{home}/round{job.tag}-{i}.jsonl", "--limit", sampled,
            "--threads", 1, "--temperature", 1,
            "--seed", job.seed, "--max-new-tokens", 64, "--out", f"{out}/round-{i}.jsonl",
            "--write-steps", kept[-1], "--keep", "correct"))
        words = training(job, method, scale, out / f"round-{i}", model, kept, scale.rounds)
        commands.append(command("train.py", "sft", *words))
        model = out / f"round-{i}" / "last"
    return commands


def depth(job, scale):
    """Teach weights/tiny longer questions by supervision, then ask it for those of each depth, also
    with gold sub-questions and routes: what is left then is reading."""
    options, _ = DEPTH[job.name]
    out = folder_of(job, scale)
    commands = [deeper(job, scale)]
    for more in deep_tests(options).values():
        home = deep(scale, "test", options, more)
        commands.append(test(job, out / "last", scale, home, "--method", "router", "oracle"))
    return commands


def deeper(job, scale):
    """The training of a recipe for depth."""
    (options, mix), files, homes = DEPTH[job.name], [], {}
    for hops, weight in mix.items():
        homes[hops] = deep(scale, "train", options, ("--hops", hops, *TRAIN))
        files.append(f"{homes[hops]}/fresh.jsonl={weight}")
    for task, weight in (("copy", 2), ("describe", 2), ("compare", 1), ("absent", 1)):
        files.append(f"{homes[2]}/{task}.jsonl={weight}")
    return command(
        "train.py", "sft", "--model", TINY, "--seed", job.seed, "--threads", 1,
        "--steps", scale.deep_steps, "--learning-rate", 5e-4, "--warmup", 50, "--log-every", 100,
        "--save-every", scale.deep_steps, "--out", folder_of(job, scale), "--data", *files)


def evaluate(job, scale):
    """The tests of a model as it is."""
    return tests(job, start_of(job.start, scale), scale, *job.flags)


def steps(job, scale):
    """Step-GRPO for so many updates; then questions are answered by sampling, and their steps
    judged."""
    out, updates = folder_of(job, scale), int(job.name.split()[0])
    home, model, commands = world(scale, "plain", "train", job.seed), WARM, []
    if updates:
        words = training(job, METHODS[STEP], scale, out, WARM, [f"{home}/questions.jsonl"])
        for flag in ("--steps", "--val-every"):
            words[words.index(flag) + 1] = scale.steps or updates
        model = out / "last"
        commands = [command("train.py", "grpo", *words, "--world", home, *METHODS[STEP].flags,
                            *scale.flags)]
    return [*commands, test(job, model, scale, world(scale, "plain", "val", job.seed),
                            "--temperature", 1)]


def tests_of(job):
    """How many test worlds a job meets."""
    if job.part == "main":
        return 2
    return 0 if job.part in ("rates", "steps", "depth") else 1


def tests(job, model, scale, *more):
    """The one use of each of its test worlds."""
    homes = [world(scale, job.setting, "test", number) for number in range(tests_of(job))]
    return [test(job, model, scale, home, *more) for home in homes]


def test(job, model, scale, home, *more):
    if job.kind == "depth":
        more = (*more, "--max-steps", 6)
    return command("infer.py", "--model", model, "--world", home, "--threads", 1, *more,
                   "--out", f"{folder_of(job, scale)}.{Path(home).name}.jsonl", "--json")


KINDS = {"train": train, "depth": depth, "eval": evaluate, "steps": steps}


def commands_of(job, scale):
    return KINDS[job.kind](job, scale)


def three_hops(scale):
    """The job whose model knows three hops, from which part "next" starts."""
    return Job("depth", "to three hops", scale.seeds[0], "depth", minutes=scale.deep_steps / 400)


def start_of(name, scale):
    """The model directory that a start names."""
    if name == "three hops":
        return folder_of(three_hops(scale), scale) / "last"
    if name.startswith("weights/"):
        return name
    made_of = (scale, RIGHT_STEPS, A_LITTLE, TO_READ, RATE_OF_STARTS, *shipped())
    mark = hashlib.sha256(repr(made_of).encode()).hexdigest()[:6]
    return f"runs/{scale.name}/{name.replace(' ', '-')}-{mark}/last"


def make_start(name, scale):
    """The command that makes a start, where it is not shipped."""
    if name == "three hops":
        return deeper(three_hops(scale), scale)
    files = [f"{world(scale, 'plain', 'train', CHOICE)}/{name}.jsonl"]
    updates = scale.weaken
    if name == READS_DIALS:
        files = [f"{to_read(scale)}/{task}.jsonl={weight}" for task, weight in TO_READ.items()]
        updates = scale.read
    return command("train.py", "sft", "--model", WARM, "--data", *files, "--seed", 0,
                   "--threads", 1, "--steps", updates, "--learning-rate", RATE_OF_STARTS,
                   "--decay", 0.7, "--log-every", 100, "--save-every", updates,
                   "--out", Path(start_of(name, scale)).parent)


# --------------------------------------------------------------------------------------- execution

RUNNING = []                        # the processes of all jobs under way
TOOK = "seconds of the processor: "


def fingerprint(job, scale):
    """What a job's commands amount to: with others, its stored row does not count."""
    words = [[Path(script).name, *options] for _, script, *options in commands_of(job, scale)]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]


def output_of(*words):
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


def machine():
    """Where and with what code a row was made; "+" where the code differs from its commit."""
    from lab.bench import machine as of_bench       # here, since it takes torch with it
    code = (".", ":(exclude)results", ":(exclude)docs", ":(exclude)README.md")
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", *code)
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    return {"machine": f"{of_bench('cpu')['cpu']}, {os.cpu_count()} cores",
            "python": platform.python_version(), "commit": commit + ("+" if changes else "")}


def run_one(words, log):
    """Runs a command whose errors go to the log. Returns what it printed. A last line of the log
    says how many seconds of the processor it took, as a stopped one has, too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, stderr=file, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        RUNNING.append(process)
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        RUNNING.remove(process)
        file.write(f"{output}\n{TOOK}{used.ru_utime + used.ru_stime:.1f}\n")
    if process.returncode:
        raise ValueError(f"{words[1]} ended with {process.returncode}; see {log}")
    return output


def seconds_of(log):
    """All seconds of the processor that a log speaks of."""
    lines = Path(log).read_text(encoding="utf-8").splitlines()
    return round(sum(float(line.removeprefix(TOOK)) for line in lines if line.startswith(TOOK)))


def run(job, scale):
    """Runs a job's commands one after the other; a test prints a result for each of its methods.
    Returns the job's row."""
    commands, results, out, made = commands_of(job, scale), {}, folder_of(job, scale), machine()
    (HERE / out if is_rejection(job) else HERE / out.parent).mkdir(parents=True, exist_ok=True)
    for words in commands:
        if "--json" in words and not results and is_rejection(job):
            choose_round(out, scale)
        output = run_one(words, Path(f"{out}.log"))
        if "--json" in words:
            file = Path(words[words.index("--out") + 1])
            home = file.name.removeprefix(f"{out.name}.").removesuffix(".jsonl")
            for line in output.splitlines():
                result = json.loads(line)
                rows = [row for row in rows_of(file) if row["method"] == result["method"]]
                results[f"{home} {result['method']}"] = {**result, **summary_of_test(rows)}
                if job.kind == "steps":
                    results[f"{home} {result['method']}"]["steps"] = summary_of_steps(rows)
    method = METHODS.get(job.method)
    if not job.start.startswith("weights/"):
        commands = [make_start(job.start, scale), *commands]    # it was made before, for all
    return {**asdict(job), "needs": method.needs if method else "-",
            "fingerprint": fingerprint(job, scale),
            "commands": [" ".join(words[1:]) for words in commands], **made,
            "finished": time.strftime("%Y-%m-%d"), "cpu_seconds": seconds_of(f"{out}.log"),
            "curve": curve(job, scale), "routes": routes(out / "log.jsonl"), "tests": results}


def is_rejection(job):
    return job.method == REJECTION


def choose_round(out, scale):
    """Links `best` to the checkpoint that was best in validation, of all rounds."""
    best = {}
    for i in range(scale.rounds):
        for row in rows_of(out / f"round-{i}" / "log.jsonl"):
            if "validation" in row:
                best[i] = max(best.get(i, 0), row["validation"]["f1_recall"])
    point(out / "best", f"round-{max(best, key=best.get)}/best")


CURVES = ("f1_recall", "route_accuracy", "retrievals", "malformed")


def curve(job, scale):
    """Validations over time and over sampled tokens, of one run or of the rounds of a job in a
    row."""
    folders = [folder_of(job, scale)]
    if is_rejection(job):
        folders = [folders[0] / f"round-{i}" for i in range(scale.rounds)]
    points, before, tokens = [], 0.0, 0
    sampling = job.method in METHODS and METHODS[job.method].kind == "grpo"
    for folder in folders:
        seconds = 0.0
        for row in rows_of(Path(f"{folder}.jsonl")):            # what a round of rejection sampled
            tokens += row["cost"]["generated_tokens"]
            before += row["cost"]["seconds_model"] + row["cost"]["seconds_search"]
        for row in rows_of(folder / "log.jsonl"):
            seconds = row["seconds"]
            if "validation" in row:
                scores = {key: row["validation"][key] for key in CURVES if key in row["validation"]}
                points.append({**scores, "seconds": round(before + seconds, 1), "tokens": tokens,
                               "step": row["step"]})
            elif sampling:
                tokens += row["tokens"]
        before += seconds
    return points


def routes(path, width=25):
    """How often each route is asked for, is gold, and has mixed groups, over updates: means over
    `width` of them."""
    rows = [row for row in rows_of(path) if "validation" not in row]
    keys = set()
    for row in rows:
        for key in row:
            if key.split(":")[0] in ("asked", "prompts", "mixed"):
                keys.add(key)
    bins = []
    for start in range(0, len(rows) if keys else 0, width):
        part = rows[start:start + width]
        means = {"step": part[-1]["step"], "seconds": part[-1]["seconds"]}
        for key in sorted(keys):
            values = [row[key] for row in part if row.get(key) is not None]
            means[key] = round(mean(values), 4) if values else None
        bins.append(means)
    return bins


def key_of(job):
    """What tells the jobs of a part apart; of a Job, or of its row."""
    job = job if isinstance(job, dict) else asdict(job)
    return tuple(job[name] for name in ("part", "name", "seed", "setting", "tag", "start", "rate"))


def execute(jobs, scale, out, side_by_side):
    """Runs what is not finished, some jobs side by side; each finished one is a line of its part's
    file."""
    finished = set()
    for part in {job.part for job in jobs}:
        for row in rows_of(out / f"{part}.jsonl"):
            finished.add((key_of(row), row["fingerprint"]))
    waiting = [job for job in jobs if (key_of(job), fingerprint(job, scale)) not in finished]
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them finished before", flush=True)
    lock, started, ended, faults = threading.Lock(), time.time(), [], []

    def one(job):
        try:
            row = run(job, scale)
        except ValueError as error:                     # the others go on
            faults.append(f"{' '.join(map(str, key_of(job)))}: {error}")
            say(faults[-1])
            return
        with lock:
            with open(out / f"{job.part}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            ended.append(job)
            left = sum(other.minutes for other in waiting if other not in ended)
            say_finished(row, len(ended), len(waiting), time.time() - started, left / side_by_side)

    def start(name):                                    # of one that is finished nothing is left
        run_one(make_start(name, scale), Path(f"{Path(start_of(name, scale)).parent}.log"))

    names = {job.start for job in waiting if not job.start.startswith("weights/")}
    in_parallel(start, sorted(names), side_by_side)
    in_parallel(one, waiting, side_by_side)
    if faults:
        raise ValueError(f"{len(faults)} of {len(waiting)} jobs failed, the first: {faults[0]}")


def in_parallel(work, items, side_by_side):
    """work(item) for all items, some side by side; the first error, or a signal, ends all."""
    with ThreadPoolExecutor(side_by_side) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in RUNNING:
                process.terminate()                 # train.py saves behind the update under way
            raise


def say_finished(row, number, count, seconds, minutes_left):
    """A line on a finished job: its score, and how long the others will take, tests included."""
    scores = [f"{name} {test['f1_recall']:.3f}" for name, test in row["tests"].items()]
    if row["curve"]:
        scores.append(f"validation {max(point['f1_recall'] for point in row['curve']):.3f}")
    what = " ".join(filter(None, (row["setting"] + row["tag"], row["name"])))
    print(f"{number}/{count}  {row['part']}: {what}, seed {row['seed']}: F1-Recall "
          f"{', '.join(scores)}   {seconds / 60:.0f} min, about {minutes_left * 1.3:.0f} min left",
          flush=True)


# ------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class ExperimentOptions:
    """Run the whole study, or go on with it."""
    quick: bool = option(False, "the same plan at toy scale: it shows that everything runs")
    parts: tuple = option(PARTS, "only these parts", nargs="+")
    jobs: int = option(2, "jobs side by side", least=1)
    out: str = option("results", "folder of the results")
    summary: bool = option(False, "run nothing: summary.json, figures and the tables of "
                           "docs/results.md from what is there")

    def __post_init__(self):
        check_options(self)


def work(words):
    p = OneLineParser(prog="lab.experiment", description=ExperimentOptions.__doc__)
    add_flags(p, ExperimentOptions)
    o = from_flags(ExperimentOptions, p.parse_args(words))
    unknown = [part for part in o.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"--parts {unknown[0]}: give some of {', '.join(PARTS)}")
    scale, out = QUICK if o.quick else Scale(), Path(o.out).resolve()
    os.chdir(HERE)                                  # all other paths are the project's
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background ignores it
    if not o.summary:
        write_worlds(scale)
        jobs = [job for job in plan(scale) if job.part in o.parts]
        execute([job for job in jobs if job.part != "cost"], scale, out, o.jobs)
        execute([job for job in jobs if job.part == "cost"], scale, out, 1)     # timed: alone
    rows = {part: current(part, scale, out) for part in PARTS}
    page = HERE / "docs" / "results.md" if o.summary else None
    print(json.dumps(write_tables(rows, out, page)))


def current(part, scale, out):
    """The rows of a part that today's plan would make, in its order: the last of each job."""
    stored = {(key_of(row), row["fingerprint"]): row for row in rows_of(out / f"{part}.jsonl")}
    keys = [(key_of(job), fingerprint(job, scale)) for job in plan(scale) if job.part == part]
    return [stored[key] for key in keys if key in stored]


def main(argv=None):
    return run_command("lab.experiment", work, argv, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
