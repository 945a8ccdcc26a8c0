"""The experiment: what step-wise rewards teach, what they cost, what breaks them; three seeds, all
else equal.

What flows through this file:
    plan (below, as data) -> jobs: one configuration, one seed
                          -> train.py and infer.py as a user would call them
                          -> a row for each finished job in results/PART.jsonl
                          -> results/summary.json, figures, the tables of docs/results.md

    main        Step-GRPO, outcome-only GRPO, more of the same supervision, rejection sampling
    collapse    how a route dies when step prompts are not balanced, and what helps
    ablation    parts of the reward, the deviation, KL, group size, updates a batch, price of a
                retrieval, gold history
    depth       three hops and more: trained compositions, unseen ones, unseen depth
    cost        pipelines that route and that do not: model calls, tokens and seconds of a question

Jobs run two at a time, each on one core, and count the time of the processor, which other work on
the machine hardly changes. A job that was stopped goes on; a finished one is not run again, unless
its commands have changed.

Choices were made on validation worlds. The test world is used once, by each finished job.
"""
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from lab.curves import Run, draw_curves
from plumbing.files import run_command, say, write_json, write_text
from plumbing.options import OneLineParser, add_flags, check_options, from_flags, option

HERE = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)

# -------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Scale:
    """How large everything is. Minutes are of the processor. Folders are named after all of it: a
    field more, and finished runs are looked for in other places."""
    name: str = "experiment"        # of the folders under data and runs
    main: float = 6.0               # minutes of a main run
    ablation: float = 3.0           # minutes of any other training
    steps: int = 0                  # updates of a training; 0: those of UPDATES
    train: int = 3000               # questions of the training world
    weak: int = 13000               # questions of the file of weak demonstrations
    val: int = 260                  # questions of the validation world
    test: int = 520                 # questions of the test world
    countries: int = 0              # of every world; 0: as lab.world has it
    rounds: int = 5                 # of rejection sampling
    sampled: int = 1000             # questions of a round
    deep: int = 8000                # questions of each depth to train on
    deep_steps: int = 2000          # updates of a training for depth
    deep_test: int = 260            # questions of each test of depth
    val_every: int = 25             # updates between validations
    seeds: tuple = SEEDS
    flags: tuple = ()               # more options of every training


QUICK = Scale(name="experiment-quick", main=0, ablation=0, steps=2, train=39, weak=39, val=13,
              test=26, countries=40, rounds=1, sampled=13, deep=39, deep_steps=2, deep_test=20,
              val_every=2, seeds=(0,),
              flags=("--prompts", 6, "--group", 2, "--open-questions", 12))

# Updates that fit a minute of the processor (two cores, AMD EPYC): runs count updates, so that
# their schedules are the same on another day.
UPDATES = {"grpo": 55, "outcome": 20, "sft": 500, "rejection": 500}

STEP = "Step-GRPO"
COLLAPSE = {                        # options beside those of Step-GRPO
    "not balanced": ("--no-balance",),
    "not balanced, no rest, sampled once": ("--no-balance", "--rest", 0, "--tries", 1),
    "not balanced, entropy bonus 0.05": ("--no-balance", "--entropy-coef", 0.05),
    "not balanced, KL 0.05": ("--no-balance", "--kl-coef", 0.05),
    "not balanced, temperature 1.3": ("--no-balance", "--temperature", 1.3),
    "not balanced, G = 16": ("--no-balance", "--group", 16),
    "not balanced, hops that are ready": ("--no-balance", "--ready"),
    "balanced": (),
    "balanced, entropy bonus 0.05": ("--entropy-coef", 0.05),
    "balanced, hops that are ready": ("--ready",),
}
ABLATION = {
    STEP: (),
    "not balanced": ("--no-balance",),
    "without similarity": ("--similarity-weight", 0, "--route-weight", 1),
    "without route": ("--similarity-weight", 1, "--route-weight", 0),
    "without strict format": ("--form", "published"),
    "without division by the deviation": ("--no-scale",),
    "KL 0.01": ("--kl-coef", 0.01),
    "KL 0.05": ("--kl-coef", 0.05),
    "G = 4": ("--group", 4, "--prompts", 64),
    "G = 16": ("--group", 16, "--prompts", 16),
    "four updates a batch": ("--updates", 4),
    "price 0.05": ("--price", 0.05),
    "price 0.2": ("--price", 0.2),
    "gold history (offline)": ("--mode", "offline", "--data", "TRAIN/steps.jsonl"),
}
# Depth. With --rich a world has 15 moves in place of 12, and questions go all ways through them.
# What a recipe trains on leaves out a third of the compositions of three hops, also inside of
# longer ones.
RICH, PEEL = "--rich", "--peel"
TRAIN, HELD = ("--compositions", "train"), ("--compositions", "held")
# name of a recipe -> options of its worlds, its training worlds {hops: weight}
DEPTH = {
    "to three hops": ((RICH, PEEL), {2: 4, 3: 6}),
    "to three hops, thoughts that do not peel": ((RICH,), {2: 4, 3: 6}),
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
PARTS = ("main", "collapse", "ablation", "depth", "cost")
PIPELINES = ("router", "oracle", "static", "text", "image", "table", "direct")


@dataclass(frozen=True)
class Job:
    part: str
    name: str
    seed: int
    kind: str                       # a key of KINDS: how it is run
    minutes: float = 0.0            # of training; for depth, which counts updates, about
    flags: tuple = ()


def folder_of(job, scale):
    """Where a job's run lives; another plan for it gets another folder."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in job.name.lower())
    mark = hashlib.sha256(repr((job, scale)).encode()).hexdigest()[:6]
    return Path("runs") / scale.name / f"{job.part}-{slug}-{job.seed}-{mark}"


def plan(scale):
    """All jobs of the experiment, the main ones first."""
    jobs = []
    for seed in scale.seeds:
        jobs += [Job("main", STEP, seed, "grpo", scale.main),
                 Job("main", "outcome only", seed, "grpo", scale.main,
                     ("--mode", "outcome", "--credit", "trajectory", "--balance")),
                 Job("main", "rejection sampling", seed, "rejection", scale.main),
                 Job("main", "SFT on the weak data", seed, "sft", scale.main)]
    jobs.append(Job("main", "weak start", 0, "eval", flags=("weights/tiny-warm", "router")))
    for part, names in (("collapse", COLLAPSE), ("ablation", ABLATION)):
        for name, flags in names.items():
            jobs += [Job(part, name, seed, "grpo", scale.ablation, flags) for seed in scale.seeds]
    for name in DEPTH:
        minutes = scale.deep_steps / 400
        jobs += [Job("depth", name, seed, "depth", minutes) for seed in scale.seeds]
    for method in PIPELINES:
        jobs.append(Job("cost", method, 0, "eval", flags=("weights/tiny", method)))
    return jobs


# ---------------------------------------------------------------------------------------- commands


def command(script, *words):
    return [sys.executable, script, *map(str, words)]


def data(scale, name):
    """The folder of a world."""
    return f"data/{scale.name}/{name}"


def grpo(job, scale):
    """Step-GRPO, or a variation of it, and the test of its best checkpoint."""
    out = folder_of(job, scale)
    flags = [str(flag).replace("TRAIN", data(scale, "train")) for flag in job.flags]
    return [command("train.py", "grpo", *training(job, scale, out), *flags),
            test(job, out / "best", scale)]


def sft(job, scale):
    """More of the supervision that the weak start had."""
    out = folder_of(job, scale)
    weak = f"{data(scale, 'weak')}/weak.jsonl"
    return [command("train.py", "sft", *training(job, scale, out), "--data", weak),
            test(job, out / "best", scale)]


def rejection(job, scale):
    """In turns: sample trajectories of new questions, keep those whose final answer is right, train
    on them."""
    commands, model = [], "weights/tiny-warm"
    for i in range(scale.rounds):
        folder = folder_of(job, scale) / f"round-{i}"
        steps = f"{folder}-steps.jsonl"
        commands.append(command(
            "infer.py", "--model", model, "--world", data(scale, f"round-{i}"), "--threads", 1,
            "--temperature", 1, "--seed", job.seed, "--max-new-tokens", 64,
            "--out", f"{folder}.jsonl", "--write-steps", steps, "--keep", "correct"))
        flags = training(job, scale, folder, model, scale.rounds)
        commands.append(command("train.py", "sft", *flags, "--data", steps))
        model = folder / "last"
    return [*commands, test(job, model, scale)]


def depth(job, scale):
    """Teach weights/tiny longer questions by supervision, then ask it for those of each depth."""
    (options, mix), out = DEPTH[job.name], folder_of(job, scale)
    files, homes = [], {}
    for hops, weight in mix.items():
        homes[hops] = data(scale, deep("train", options, ("--hops", hops, *TRAIN)))
        files.append(f"{homes[hops]}/fresh.jsonl={weight}")
    for task, weight in (("copy", 2), ("describe", 2), ("compare", 1)):
        files.append(f"{homes[2]}/{task}.jsonl={weight}")
    commands = [command(
        "train.py", "sft", "--model", "weights/tiny", "--seed", job.seed, "--threads", 1,
        "--steps", scale.deep_steps, "--learning-rate", 5e-4, "--warmup", 50, "--log-every", 100,
        "--save-every", scale.deep_steps, "--out", out, "--data", *files)]
    for more in deep_tests(options).values():
        commands.append(test(job, out / "last", scale, world=deep("test", options, more)))
    return commands


def evaluate(job, scale):
    """A test of a shipped model."""
    model, method = job.flags
    return [test(job, model, scale, method)]


def deep_tests(options):
    """The tests for worlds of these options: {name: more options}. Five hops need the more
    relations."""
    return {name: more for name, more in DEPTH_TESTS.items() if name != "five" or RICH in options}


def deep(split, options, more):
    """Name of a world of the depth part. What is only asked has no thoughts to peel."""
    words = ["depth", split]
    for word in (*options, *more):
        if (split, word) != ("test", PEEL) and word not in ("--hops", "--compositions"):
            words.append(str(word).strip("-"))
    return "-".join(words)


def training(job, scale, out, model="weights/tiny-warm", parts=1):
    """Options of a training that takes one of `parts` equal parts of a job's time."""
    kind = "outcome" if "outcome" in job.flags else job.kind
    steps = scale.steps or round(UPDATES[kind] * job.minutes / parts)
    val_every, world, flags = scale.val_every * 10, (), ()
    if job.kind == "grpo":
        val_every, flags = scale.val_every, ("--follow", "best", *scale.flags)
        if "offline" not in job.flags:
            world = ("--world", data(scale, "train"))
    return ("--model", model, "--seed", job.seed, "--threads", 1, "--clock", "cpu",
            "--steps", steps, "--val-every", val_every,
            "--val-world", data(scale, "val"), "--val-questions", scale.val, "--log-every", 100,
            *world, *flags, "--out", out)


def test(job, model, scale, method="router", world="test"):
    """The one use of a test world."""
    size, more = scale.test, ()
    if job.kind == "depth":
        size, more = scale.deep_test, ("--max-steps", 6)
    return command(
        "infer.py", "--model", model, "--world", data(scale, world), "--method", method,
        "--threads", 1, "--limit", size, *more, "--out", f"{folder_of(job, scale)}.{world}.jsonl",
        "--json")


KINDS = {"grpo": grpo, "sft": sft, "rejection": rejection, "depth": depth, "eval": evaluate}


def commands_of(job, scale):
    return KINDS[job.kind](job, scale)


def worlds(scale):
    """All worlds of the experiment: {name: options of lab.world}."""
    def options_of(split, seed, questions, *more):
        return ("--split", split, "--seed", seed, "--questions", questions, *more)

    places = {"train": options_of("train", 0, scale.train),
              "weak": options_of("train", 0, scale.weak, "--practice", 1),
              "val": options_of("val", 0, scale.val),
              "test": options_of("test", 3000, scale.test)}
    for i in range(scale.rounds):
        places[f"round-{i}"] = options_of("train", 100 + i, scale.sampled)
    practice = ("--practice", max(scale.deep // 5, 1))
    for options, mix in DEPTH.values():
        for hops in mix:
            more = ("--hops", hops, *TRAIN)
            places[deep("train", options, more)] = options_of(
                "train", 0, scale.deep, *options, *more, *practice)
        for more in deep_tests(options).values():
            places[deep("test", options, more)] = options_of(
                "test", 3000, scale.deep_test, *options, *more)
    return places


def write_worlds(scale):
    """Writes the worlds of the experiment, those that are not there yet, and builds the bases that
    are searched."""
    from retrieve import world_bases                # here, since it takes torch with it
    for name, options in worlds(scale).items():
        out = Path(data(scale, name))
        if not (HERE / out / "questions.jsonl").is_file():
            more = ("--countries", scale.countries) if scale.countries else ()
            words = command("-m", "lab.world", *options, *more, "--out", out)
            if subprocess.run(words, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
                raise ValueError(f"lab.world could not write {out}: see its message above")
        if "--practice" not in options:             # a world with practice is only read by sft
            world_bases(HERE / out)


# --------------------------------------------------------------------------------------- execution

RUNNING = []                        # the processes of all jobs under way


def fingerprint(commands):
    """What a job's commands amount to: with others, its stored row does not count."""
    words = [[Path(script).name, *options] for _, script, *options in commands]
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
    """Runs a command whose errors go to the log: (what it printed, seconds of the processor)."""
    with open(log, "a") as file:
        process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, stderr=file, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        RUNNING.append(process)
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        RUNNING.remove(process)
        file.write(output)
    if process.returncode:
        raise ValueError(f"{words[1]} ended with {process.returncode}; see {log}")
    return output, used.ru_utime + used.ru_stime


def run(job, scale):
    """Runs a job's commands one after the other; the last line of a test is its result. Returns the
    job's row."""
    commands, seconds, results = commands_of(job, scale), 0.0, []
    log = Path(f"{folder_of(job, scale)}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    for words in commands:
        output, used = run_one(words, log)
        seconds += used
        if "--json" in words:
            results.append(json.loads(output.strip().splitlines()[-1]))
    tests = {"test": results[-1]}
    if job.kind == "depth":
        tests = {"tests": dict(zip(deep_tests(DEPTH[job.name][0]), results))}
    return {**asdict(job), "fingerprint": fingerprint(commands),
            "commands": [" ".join(words[1:]) for words in commands], **machine(),
            "finished": time.strftime("%Y-%m-%d"), "cpu_seconds": round(seconds),
            "curve": curve(job, scale), "routes": routes(folder_of(job, scale) / "log.jsonl"),
            **tests}


def rows_of(path):
    """The rows of a JSONL file that a run or a plan has written; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


CURVES = ("f1_recall", "route_accuracy", "retrievals", "malformed")


def curve(job, scale):
    """Validations over time and over sampled tokens, of one run or of the rounds of a job in a
    row."""
    folders = [folder_of(job, scale)]
    if job.kind == "rejection":
        folders = [folders[0] / f"round-{i}" for i in range(scale.rounds)]
    points, before, tokens = [], 0.0, 0
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
            elif job.kind == "grpo":
                tokens += row["tokens"]
        before += seconds
    return points


def routes(path, width=10):
    """How often each route is asked for, is gold, and has mixed groups, over updates: means over
    `width` of them."""
    rows = [row for row in rows_of(path) if "validation" not in row]
    keys = set()
    for row in rows:
        for key in row:
            if key.split(":")[0] in ("asked", "prompts", "mixed", "route"):
                keys.add(key)
    bins = []
    for start in range(0, len(rows), width):
        part = rows[start:start + width]
        means = {"step": part[-1]["step"], "seconds": part[-1]["seconds"]}
        for key in sorted(keys):
            values = [row[key] for row in part if row.get(key) is not None]
            means[key] = round(mean(values), 4) if values else None
        bins.append(means)
    return bins


def results_of(part, out):
    return rows_of(out / f"{part}.jsonl")


def execute(jobs, scale, out, side_by_side):
    """Runs what is not finished, some jobs side by side; each finished one is a line of its part's
    file."""
    finished = set()
    for part in {job.part for job in jobs}:
        for row in results_of(part, out):
            finished.add((row["part"], row["name"], row["seed"], row["fingerprint"]))
    waiting = []
    for job in jobs:
        mark = fingerprint(commands_of(job, scale))
        if (job.part, job.name, job.seed, mark) not in finished:
            waiting.append(job)
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them finished before", flush=True)
    lock, started, ended = threading.Lock(), time.time(), []

    def one(job):
        try:
            row = run(job, scale)
        except ValueError as error:
            raise ValueError(f"{job.part}, {job.name}, seed {job.seed}: {error}") from None
        with lock:
            with open(out / f"{job.part}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            ended.append(job)
            left = sum(other.minutes for other in waiting if other not in ended)
            say_finished(row, len(ended), len(waiting), time.time() - started, left / side_by_side)

    with ThreadPoolExecutor(side_by_side) as pool:
        futures = [pool.submit(one, job) for job in waiting]
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
    tests = row.get("tests") or {"": row["test"]}
    scores = [f"{name} {test['f1_recall']:.3f}".strip() for name, test in tests.items()]
    print(f"{number}/{count}  {row['part']}: {row['name']}, seed {row['seed']}: F1-Recall "
          f"{', '.join(scores)}   {seconds / 60:.0f} min, about {minutes_left * 1.25:.0f} min left",
          flush=True)


# ----------------------------------------------------------------------------------------- summary


def summary(out, scale):
    """All rows -> {part: {name: scores over seeds}}, names in the order of the plan; in the part
    depth, where a run has several tests, {part: {name: {test: scores}}}.

    Rows that other commands made count only while a name has none of today's, and stderr says how
    many these are; each row names its commands and its commit.
    """
    wanted, whole, outdated = {}, {}, 0
    for job in plan(scale):
        wanted[job.part, job.name, job.seed] = fingerprint(commands_of(job, scale))
    for part in PARTS:
        today = {name: {} for of, name, _ in wanted if of == part}
        before = {name: {} for name in today}
        for row in results_of(part, out):
            mark = wanted.get((part, row["name"], row["seed"]))
            if mark is not None:
                by_name = today if row["fingerprint"] == mark else before
                by_name[row["name"]][row["seed"]] = row
        whole[part] = {}
        for name, by_seed in today.items():
            if not by_seed:
                by_seed = before[name]
                outdated += len(by_seed)
            rows = [by_seed[seed] for seed in sorted(by_seed)]
            if rows and part == "depth":
                whole[part][name] = over_tests(rows)
            elif rows:
                whole[part][name] = over_seeds(rows)
    if outdated:
        say(f"{outdated} rows in {out} were made by other commands than those of today's plan")
    return whole


def over_tests(rows):
    """{test: scores over seeds} of the rows of one depth recipe."""
    scores = {}
    for test in rows[0]["tests"]:
        scores[test] = over_seeds([{**row, "test": row["tests"][test]} for row in rows])
    return scores


SCORES = ("f1_recall", "em", "f1", "route_accuracy", "retrievals", "gold_retrievals", "malformed",
          "model_calls", "tokens_read", "tokens_written", "seconds", "seconds_model",
          "seconds_search")


def over_seeds(rows):
    """Rows of one configuration -> of each score the mean, the deviation and each seed's; scores by
    kind and hops, the worst kind of any seed, and what the runs cost."""
    tests = [row["test"] for row in rows]
    scores = {}
    for name in SCORES:
        values = [test[name] for test in tests if test.get(name) is not None]
        if values:
            deviation = stdev(values) if len(values) > 1 else None
            scores[name] = {"mean": mean(values), "sd": deviation, "seeds": values}
    kinds = {kind: [test["by_kind"][kind] for test in tests] for kind in tests[0]["by_kind"]}
    hops = {count: [test["by_hops"][count] for test in tests] for count in tests[0]["by_hops"]}
    sampled = [row["curve"][-1]["tokens"] if row["curve"] else None for row in rows]
    return {"seeds": [row["seed"] for row in rows], "n": tests[0]["n"], **scores,
            "by_kind": kinds, "by_hops": hops,
            "worst_kind": min((min(values), kind) for kind, values in kinds.items()),
            "cpu_seconds": [row["cpu_seconds"] for row in rows],
            "tokens_sampled": sampled,
            "commits": sorted({row["commit"] for row in rows}), "machine": rows[-1]["machine"]}


def goals(whole):
    """What was wanted of the main comparison, what came, and whether it holds."""
    main = whole.get("main", {})
    if STEP not in main or "outcome only" not in main:
        return []
    step = main[STEP]
    f1, routing = step["f1_recall"]["mean"], step["route_accuracy"]["mean"]
    others = {}
    for name, scores in main.items():
        if name not in (STEP, "weak start"):
            others[name] = scores["f1_recall"]["mean"]
    rival = max(others, key=others.get)
    ahead, ahead_of_rival = f1 - others["outcome only"], f1 - others[rival]
    extra = step["retrievals"]["mean"] / step["gold_retrievals"]["mean"] - 1
    low, kind = step["worst_kind"]
    rows = [("F1-Recall, mean of the seeds", "at least 0.95", f1, f1 >= 0.95),
            ("routing accuracy", "at least 0.99", routing, routing >= 0.99),
            ("retrievals against gold", "within 3 %", extra, abs(extra) <= 0.03),
            (f"worst kind in any seed ({kind})", "at least 0.80", low, low >= 0.80),
            ("ahead of outcome only at equal time", "at least 0.20", ahead, ahead >= 0.20),
            (f"ahead of the best other ({rival})", "at least 0.07", ahead_of_rival,
             ahead_of_rival >= 0.07)]
    return [{"goal": goal, "wanted": wanted, "got": round(got, 4), "holds": bool(holds)}
            for goal, wanted, got, holds in rows]


# ------------------------------------------------------------------------------ tables and figures


def table(header, rows):
    """Rows of cells -> a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def average(score, form=".3f"):
    """The mean of a score over seeds."""
    return "-" if score is None else format(score["mean"], form)


def spread(score, form=".3f"):
    """A score over seeds: the mean, and where there are several the deviation and each seed's."""
    if score is None or score["sd"] is None:
        return average(score, form)
    each = " / ".join(format(value, form) for value in score["seeds"])
    return f"{score['mean']:{form}} ± {score['sd']:{form}} ({each})"


def configurations(names):
    """{name: scores over seeds} -> a table, a line a configuration."""
    header = ["", "F1-Recall, mean ± sd (each seed)", "exact", "F1", "routing",
              "retrievals (gold)", "malformed", "worst kind of any seed", "tokens sampled"]
    rows = []
    for name, scores in names.items():
        sampled = scores["tokens_sampled"]
        known = None not in sampled and any(sampled)
        low, kind = scores["worst_kind"]
        rows.append([name, spread(scores["f1_recall"]), average(scores["em"]),
                     average(scores["f1"]), average(scores.get("route_accuracy")),
                     f"{average(scores['retrievals'], '.2f')} "
                     f"({average(scores['gold_retrievals'], '.2f')})",
                     average(scores["malformed"]), f"{kind} {low:.3f}",
                     f"{mean(sampled) / 1e6:.2f} M" if known else "-"])
    return table(header, rows)


def by_kind(names):
    """F1-Recall by kind and number of hops, means over seeds; a column a configuration."""
    first, rows = next(iter(names.values())), []
    for kind in sorted(first["by_kind"]):
        means = [f"{mean(scores['by_kind'][kind]):.2f}" for scores in names.values()]
        rows.append([kind, *means])
    for hops in sorted(first["by_hops"]):
        means = [f"{mean(scores['by_hops'][hops]):.2f}" for scores in names.values()]
        rows.append([f"{hops} hop" if hops == "1" else f"{hops} hops", *means])
    return table(["", *names], rows)


def depths(names):
    """F1-Recall of each test of depth, a line a recipe. Then how often a question was searched for,
    and how many of its steps were malformed; a right trajectory has a search a hop."""
    scored, searched = [], []
    for name, tests in names.items():
        title = name.removeprefix("to ")
        scored.append([title])
        searched.append([title])
        for test in DEPTH_TESTS:
            scores, searches = "-", "-"
            if test in tests:
                scores = spread(tests[test]["f1_recall"], ".2f")
                searches = (f"{average(tests[test]['retrievals'], '.2f')} / "
                            f"{average(tests[test]['malformed'], '.2f')}")
            scored[-1].append(scores)
            searched[-1].append(searches)
    return (table(["trained on two hops and", *DEPTH_TESTS], scored) + "\n\n"
            + table(["searches / malformed steps", *DEPTH_TESTS], searched))


def costs(names):
    """What a question costs, by pipeline, and quality per second."""
    header = ["", "F1-Recall", "model calls", "searches", "tokens read", "written", "model ms",
              "search ms", "F1-Recall per second"]
    rows = []
    for name, scores in names.items():
        milliseconds = [f"{1e3 * scores[key]['mean']:.2f}"
                        for key in ("seconds_model", "seconds_search")]
        per_second = scores["f1_recall"]["mean"] / scores["seconds"]["mean"]
        rows.append([name, average(scores["f1_recall"]), average(scores["model_calls"], ".2f"),
                     average(scores["retrievals"], ".2f"), average(scores["tokens_read"], ".0f"),
                     average(scores["tokens_written"], ".0f"), *milliseconds, f"{per_second:.0f}"])
    return table(header, rows)


def speeds(lines):
    """The JSON lines of lab.bench -> a table, a line a figure; of a figure measured twice the later
    one."""
    latest = {}
    for line in lines:
        for part, figures in line["figures"].items():
            for name, figure in figures.items():
                latest[part, name] = figure, line["command"]
    rows = []
    for (_, name), (figure, bench) in latest.items():
        value, against, goal = figure["value"], "", ""
        if "ratio" in figure:
            against = f"{figure['ratio']:.2f} × {figure['peer']}"
        if "rounds" in figure:
            against += " ({:.2f} to {:.2f})".format(*figure["rounds"])
        if "goal" in figure:
            goal = figure["goal"].replace(">=", "at least").replace("<=", "at most")
            goal += "" if figure["met"] else ": missed"
        number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        rows.append([f"`{bench}`", name, f"{number} {figure['unit']}", against, goal])
    return table(["command", "what", "ours", "against: median (rounds)", "goal"], rows)


DYING = ("not balanced, no rest, sampled once", "not balanced",
         "not balanced, hops that are ready", "balanced")


def collapse_numbers(out, names=DYING, at=(10, 30, 50, 100, 150)):
    """What groups see of the base of pictures, early and late; means over seeds. The chance p that
    a prompt of its own asks for it is at most its share of what is asked over its share of the
    prompts."""
    rows = []
    for name in names:
        bins = []
        for row in results_of("collapse", out):
            if row["name"] == name:
                bins += row["routes"]
        for step in at if bins else ():
            there = [one for one in bins if one["step"] == step]

            def share(key):
                values = [one[key] for one in there if one.get(key) is not None]
                return mean(values) if values else 0.0

            prompts, asked = share("prompts:text image"), share("asked:text image")
            p = min(1.0, asked / prompts) if prompts else 0.0
            others = []
            for other in ("text", "table", "none"):
                others.append(f"{mean(one.get(f'asked:{other}') or 0 for one in there):.0%}")
            rows.append([name, step, f"{prompts:.1%}", f"{asked:.1%}", f"{p:.2f}",
                         f"{share('mixed:text image'):.0%}", " / ".join(others)])
    return table(["", "update", "share of the routing prompts", "share of all that is asked for",
                  "so p is at most", "of its groups mixed",
                  "asked for instead: text / table / none"], rows)


def goal_table(whole):
    rows = []
    for goal in goals(whole):
        holds = "yes" if goal["holds"] else "no"
        rows.append([goal["goal"], goal["wanted"], f"{goal['got']:.3f}", holds])
    return table(["wanted", "", "got", "holds"], rows)


def sections(whole, out):
    """Everything that docs/results.md shows of the results: {name of the place: text}."""
    parts = {}
    if whole.get("main"):
        main = {name: whole["main"][name] for name in (STEP, *whole["main"])
                if name in whole["main"]}
        parts["main"] = configurations(main)
        parts["kinds"] = by_kind({**main, **whole.get("cost", {})})
        parts["goals"] = goal_table(whole)
    for part in ("collapse", "ablation"):
        if whole.get(part):
            parts[part] = configurations(whole[part])
    if whole.get("collapse"):
        parts["group"] = collapse_numbers(out)
    if whole.get("cost"):
        parts["cost"] = costs(whole["cost"])
        parts["pipelines"] = configurations(whole["cost"])
    if results_of("bench", out):
        parts["speed"] = speeds(results_of("bench", out))
    if whole.get("depth"):
        parts["depth"] = depths(whole["depth"])
    return parts


def fill(text, parts):
    """A page with its generated places written anew: what stands between <!-- NAME --> and
    <!-- end --> is replaced. KeyError for a place that the page lacks."""
    end = "<!-- end -->"
    for name, content in parts.items():
        begin = f"<!-- {name} -->"
        if begin not in text:
            raise KeyError(f"docs/results.md has no place {begin}")
        before, behind = text.split(begin, 1)
        text = f"{before}{begin}\n{content}\n{end}{behind.split(end, 1)[1]}"
    return text


def figures(out):
    """Curves of the main comparison and of the route that dies, as PNG files."""
    main, dying = [], []
    for row in results_of("main", out):
        points = []
        for point in row["curve"]:
            scores = {f"validation.{key}": value for key, value in point.items()}
            points.append({"step": point["step"], "seconds": point["seconds"],
                           "sampled": point["tokens"], **scores})
        if points:
            main.append(Run(f"{row['name']}-{row['seed']}", row["name"],
                            {"seed": row["seed"]}, points, []))
    for row in results_of("collapse", out):
        if row["kind"] == "grpo" and row["curve"]:
            bins = [{**one, "sampled": 0} for one in row["routes"]]
            dying.append(Run(f"{row['name']}-{row['seed']}", row["name"],
                             {"seed": row["seed"]}, bins, []))
    # what samples nothing (sft) has no line over tokens
    sampling = [run if run.rows[-1]["sampled"] else replace(run, rows=[]) for run in main]
    scores = ["validation.f1_recall", "validation.route_accuracy"]
    for name, runs, x, y in (("main-seconds", main, "seconds", scores),
                             ("main-tokens", sampling, "tokens", scores),
                             ("collapse-steps", dying, "steps",
                              ["asked:text image", "mixed:text image"])):
        if runs:
            draw_curves(runs, out / f"{name}.png", x=x, y=y, columns=2)


# ------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class ExperimentOptions:
    """Run the whole experiment, or go on with it."""
    quick: bool = option(False, "the same plan at toy scale: it shows that everything runs")
    parts: tuple = option(PARTS, "only these parts", nargs="+")
    jobs: int = option(2, "jobs side by side", least=1)
    out: str = option("results", "folder of the results")
    summary: bool = option(False, "run nothing: summary.json, figures and the tables of "
                           "docs/results.md from what is there")

    def __post_init__(self):
        check_options(self)


def execute_plan(o, scale, out):
    """Writes the worlds, runs the jobs of the wanted parts; what is timed runs alone."""
    write_worlds(scale)
    jobs = [job for job in plan(scale) if job.part in o.parts]
    execute([job for job in jobs if job.part != "cost"], scale, out, o.jobs)
    execute([job for job in jobs if job.part == "cost"], scale, out, 1)


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
        execute_plan(o, scale, out)
    whole = summary(out, scale)
    write_json(out / "summary.json", {**whole, "goals": goals(whole)}, indent=1)
    figures(out)
    if o.summary:
        page = HERE / "docs" / "results.md"
        write_text(page, fill(page.read_text(encoding="utf-8"), sections(whole, out)))
    counts = {part: len(names) for part, names in whole.items()}
    print(json.dumps({"parts": counts, "goals": goals(whole)}))


def main(argv=None):
    return run_command("lab.experiment", work, argv, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
