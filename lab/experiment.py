"""The experiment: what step-wise rewards teach, what they cost, what breaks them; three seeds, all else equal.

What flows through this file:
    plan (below, as data) -> jobs: one configuration, one seed -> train.py and infer.py as a user would call them
                          -> a row a finished job in results/PART.jsonl -> results/summary.json, figures, README tables

    main        Step-GRPO, outcome-only GRPO, more of the same supervision, rejection sampling
    collapse    how a route dies when step prompts are not balanced, and what helps
    ablation    parts of the reward, the deviation, KL, group size, updates a batch, price of a retrieval, gold history
    depth       three hops and more: trained compositions, unseen ones, unseen depth
    cost        pipelines that route and that do not: model calls, tokens and seconds of a question

Jobs run two at a time, each on one core, and count the time of the processor, which other work on the machine hardly
changes. A job that was stopped goes on; a finished one is not run again, unless its commands have changed.

Choices were made on validation worlds. The test world is used once, by each finished job.
"""
import argparse
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)

# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Scale:
    """How large everything is. Minutes are of the processor."""
    name: str = "experiment"        # of the folders under data and runs
    main: float = 6.0               # minutes of a main run
    ablation: float = 3.0           # minutes of any other training
    steps: int = 100_000            # updates at most
    train: int = 3000               # questions of the training world
    weak: int = 13000               # questions of the file of weak demonstrations
    val: int = 260                  # questions of the validation world
    test: int = 520                 # questions of the test world
    countries: int = 0              # of every world; 0: as world.py has it
    rounds: int = 5                 # of rejection sampling
    sampled: int = 1000             # questions of a round
    deep: int = 8000                # questions of each depth to train on
    deep_steps: int = 2000          # updates of a training for depth
    deep_test: int = 260            # questions of each test of depth
    val_every: int = 25             # updates between validations
    seeds: tuple = SEEDS
    flags: tuple = ()               # more options of every training


QUICK = Scale(name="experiment-quick", main=0, ablation=0, steps=2, train=39, weak=39, val=13, test=26, countries=40,
              rounds=1, sampled=13, deep=39, deep_steps=2, deep_test=20, val_every=2, seeds=(0,),
              flags=("--prompts", 6, "--group", 2, "--open-questions", 12))

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
# Depth. With --rich a world has 15 moves in place of 12, and questions go all ways through them. What a recipe trains
# on leaves out a third of the compositions of three hops, also inside of longer ones.
RICH, PEEL, TRAIN, HELD = "--rich", "--peel", ("--compositions", "train"), ("--compositions", "held")
DEPTH = {                           # name of a recipe -> options of its worlds, its training worlds {hops: weight}
    "to three hops": ((RICH, PEEL), {2: 4, 3: 6}),
    "to three hops, thoughts that do not peel": ((RICH,), {2: 4, 3: 6}),
    "to three hops, fewer relations": ((PEEL,), {2: 4, 3: 6}),
    "to four hops": ((RICH, PEEL), {2: 3, 3: 3, 4: 4}),
}
DEPTH_TESTS = {                     # name of a test -> options of its world
    "two hops": ("--hops", 2), "three": ("--hops", 3, *TRAIN), "three, unseen": ("--hops", 3, *HELD),
    "four": ("--hops", 4, *TRAIN), "four, unseen": ("--hops", 4, *HELD), "five": ("--hops", 5),
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
    slug = "".join(c if c.isalnum() else "-" for c in job.name.lower())
    mark = hashlib.sha256(repr((job, scale)).encode()).hexdigest()[:6]
    return Path("runs") / scale.name / f"{job.part}-{slug}-{job.seed}-{mark}"


def plan(scale):
    """All jobs of the experiment, the main ones first."""
    jobs = []
    for seed in scale.seeds:
        jobs += [Job("main", STEP, seed, "grpo", scale.main),
                 Job("main", "outcome only", seed, "grpo", scale.main, ("--mode", "outcome")),
                 Job("main", "rejection sampling", seed, "rejection", scale.main),
                 Job("main", "SFT on the weak data", seed, "sft", scale.main)]
    jobs.append(Job("main", "weak start", 0, "eval", flags=("weights/tiny-warm", "router")))
    for part, names in (("collapse", COLLAPSE), ("ablation", ABLATION)):
        jobs += [Job(part, name, seed, "grpo", scale.ablation, flags)
                 for name, flags in names.items() for seed in scale.seeds]
    jobs += [Job("depth", name, seed, "depth", scale.deep_steps / 400) for name in DEPTH for seed in scale.seeds]
    return jobs + [Job("cost", method, 0, "eval", flags=("weights/tiny", method)) for method in PIPELINES]


# ------------------------------------------------------------------------------------------------------------ commands


def command(script, *words):
    return [sys.executable, script, *map(str, words)]


def grpo(job, scale):
    """Step-GRPO, or a variation of it, and the test of its best checkpoint."""
    flags = [str(flag).replace("TRAIN", f"data/{scale.name}/train") for flag in job.flags]
    return [command("train.py", "grpo", *training(job, scale, folder_of(job, scale)), *flags),
            test(job, folder_of(job, scale) / "best", scale)]


def sft(job, scale):
    """More of the supervision that the weak start had."""
    return [command("train.py", "sft", *training(job, scale, folder_of(job, scale)),
                    "--data", f"data/{scale.name}/weak/weak.jsonl"),
            test(job, folder_of(job, scale) / "best", scale)]


def rejection(job, scale):
    """In turns: sample trajectories of new questions, keep those whose final answer is right, train on them."""
    commands, model = [], "weights/tiny-warm"
    for i in range(scale.rounds):
        folder, world = folder_of(job, scale) / f"round-{i}", f"data/{scale.name}/round-{i}"
        commands.append(command("infer.py", "--model", model, "--world", world, "--threads", 1, "--temperature", 1,
                                "--seed", job.seed, "--max-new-tokens", 64, "--out", f"{folder}.jsonl",
                                "--write-steps", f"{folder}-steps.jsonl", "--keep", "correct"))
        commands.append(command("train.py", "sft", *training(job, scale, folder, model, scale.rounds),
                                "--data", f"{folder}-steps.jsonl"))
        model = folder / "last"
    return [*commands, test(job, model, scale)]


def depth(job, scale):
    """Teach weights/tiny longer questions by supervision, then ask it for those of each depth."""
    (options, mix), out = DEPTH[job.name], folder_of(job, scale)
    home = {hops: f"data/{scale.name}/{deep('train', options, ('--hops', hops, *TRAIN))}" for hops in mix}
    files = [f"{home[hops]}/fresh.jsonl={weight}" for hops, weight in mix.items()]
    files += [f"{home[2]}/{task}.jsonl={weight}" for task, weight in (("copy", 2), ("describe", 2), ("compare", 1))]
    return [command("train.py", "sft", "--model", "weights/tiny", "--seed", job.seed, "--threads", 1,
                    "--steps", scale.deep_steps, "--learning-rate", 5e-4, "--warmup", 50, "--log-every", 100,
                    "--save-every", scale.deep_steps, "--out", out, "--data", *files),
            *(test(job, out / "last", scale, world=deep("test", options, more))
              for more in deep_tests(options).values())]


def deep_tests(options):
    """The tests for worlds of these options: {name: more options}. Five hops need the more relations."""
    return {name: more for name, more in DEPTH_TESTS.items() if name != "five" or RICH in options}


def deep(split, options, more):
    """Name of a world of the depth part. What is only asked has no thoughts to peel."""
    words = [str(w).strip("-") for w in (*options, *more) if (split, w) != ("test", PEEL)]
    return "-".join(["depth", split, *(w for w in words if w not in ("hops", "compositions"))])


def training(job, scale, out, model="weights/tiny-warm", parts=1):
    """Options of a training that takes one of `parts` equal parts of a job's time."""
    flags = ("--follow", "best", *scale.flags) if job.kind == "grpo" else ()
    world = ("--world", f"data/{scale.name}/train") if job.kind == "grpo" and "offline" not in job.flags else ()
    return ("--model", model, "--seed", job.seed, "--threads", 1, "--clock", "cpu", "--steps", scale.steps,
            "--minutes", job.minutes / parts, "--val-every", scale.val_every * (1 if job.kind == "grpo" else 10),
            "--val-world", f"data/{scale.name}/val", "--val-questions", scale.val, "--log-every", 100, *world, *flags,
            "--out", out)


def test(job, model, scale, method="router", world="test"):
    """The one use of a test world."""
    size, more = (scale.deep_test, ("--max-steps", 6)) if job.kind == "depth" else (scale.test, ())
    return command("infer.py", "--model", model, "--world", f"data/{scale.name}/{world}", "--method", method,
                   "--threads", 1, "--limit", size, *more, "--out", f"{folder_of(job, scale)}.{world}.jsonl", "--json")


KINDS = {"grpo": grpo, "sft": sft, "rejection": rejection, "depth": depth,
         "eval": lambda job, scale: [test(job, job.flags[0], scale, job.flags[1])]}


def worlds(scale):
    """All worlds of the experiment: {name: options of world.py}."""
    of = lambda split, seed, questions, *more: ("--split", split, "--seed", seed, "--questions", questions, *more)
    places = {"train": of("train", 0, scale.train), "weak": of("train", 0, scale.weak, "--practice", 1),
              "val": of("val", 0, scale.val), "test": of("test", 3000, scale.test)}
    places |= {f"round-{i}": of("train", 100 + i, scale.sampled) for i in range(scale.rounds)}
    for options, mix in DEPTH.values():
        for more in (("--hops", hops, *TRAIN) for hops in mix):
            places[deep("train", options, more)] = of("train", 0, scale.deep, *options, *more, "--practice",
                                                      max(scale.deep // 5, 1))
        for more in deep_tests(options).values():
            places[deep("test", options, more)] = of("test", 3000, scale.deep_test, *options, *more)
    return places


def write_worlds(scale):
    """Write the worlds of the experiment, those that are not there yet, and build the bases that are searched."""
    from retrieve import world_bases                   # here, since it takes torch with it
    for name, options in worlds(scale).items():
        out = Path("data") / scale.name / name
        if not (HERE / out / "questions.jsonl").is_file():
            more = ("--countries", scale.countries) if scale.countries else ()
            done = subprocess.run(command("-m", "lab.world", *options, *more, "--out", out), cwd=HERE,
                                  stdout=subprocess.DEVNULL)
            if done.returncode:
                raise ValueError(f"world.py could not write {out}: see its message above")
        if "--practice" not in options:             # a world with practice is only read by sft
            world_bases(HERE / out)


# ----------------------------------------------------------------------------------------------------------- execution


def fingerprint(commands):
    """What a job's commands amount to: with others, its stored row does not count."""
    words = [[Path(c[1]).name, *c[2:]] for c in commands]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]


def machine():
    """Where and with what code a row was made."""
    said = lambda *words: subprocess.run(words, cwd=HERE, capture_output=True, text=True).stdout.strip()
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                 platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    code = (".", ":(exclude)results", ":(exclude)README.md")              # those two are what a finished job changes
    changed = "+" if said("git", "status", "--porcelain", "--untracked-files=no", "--", *code) else ""
    return {"machine": f"{model}, {os.cpu_count()} cores", "python": platform.python_version(),
            "commit": said("git", "rev-parse", "--short", "HEAD") + changed}


def run(job, scale):
    """Run a job's commands one after the other; a test's last line is its result. Returns the job's row."""
    commands, seconds, results = KINDS[job.kind](job, scale), 0.0, []
    log = Path(f"{folder_of(job, scale)}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    for words in commands:
        with open(log, "a") as f:
            process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, stderr=f, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            RUNNING.append(process)
            said = process.stdout.read()
            _, code, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(code)
            RUNNING.remove(process)
            f.write(said)
        seconds += used.ru_utime + used.ru_stime
        if process.returncode:
            raise RuntimeError(f"{job.part}, {job.name}, seed {job.seed}: {words[1]} ended with "
                               f"{process.returncode}; see {log}")
        if "--json" in words:
            results.append(json.loads(said.strip().splitlines()[-1]))
    tests = {"test": results[-1]}
    if job.kind == "depth":
        tests = {"tests": dict(zip(deep_tests(DEPTH[job.name][0]), results))}
    return {**asdict(job), "fingerprint": fingerprint(commands), "commands": [" ".join(c[1:]) for c in commands],
            **machine(), "finished": time.strftime("%Y-%m-%d"), "cpu_seconds": round(seconds),
            "curve": curve(job, scale), "routes": routes(folder_of(job, scale) / "log.jsonl"), **tests}


RUNNING = []


CURVES = ("f1_recall", "route_accuracy", "retrievals", "malformed")


def curve(job, scale):
    """Validations over time and over sampled tokens, of one run or of the rounds of one job in a row."""
    folders = [folder_of(job, scale)]
    if job.kind == "rejection":
        folders = [folders[0] / f"round-{i}" for i in range(scale.rounds)]
    points, before, tokens = [], 0.0, 0
    for folder in folders:
        seconds = 0.0
        if not (folder / "log.jsonl").is_file():
            continue
        sampled = Path(f"{folder}.jsonl")                      # of a round of rejection sampling
        if sampled.is_file():
            costs = [json.loads(line)["cost"] for line in open(sampled)]
            tokens += sum(cost["generated_tokens"] for cost in costs)
            before += sum(cost["seconds_model"] + cost["seconds_search"] for cost in costs)
        for row in map(json.loads, open(folder / "log.jsonl")):
            seconds = row["seconds"]
            if "validation" in row:
                found = {k: row["validation"][k] for k in CURVES if k in row["validation"]}
                points.append({**found, "seconds": round(before + seconds, 1), "tokens": tokens,
                               "step": row["step"]})
            elif job.kind == "grpo":
                tokens += row["tokens"]
        before += seconds
    return points


def routes(path, width=10):
    """How often each route is asked for, is gold, and has mixed groups, over updates: means over `width` of them."""
    if not path.is_file():
        return []
    rows = [row for row in map(json.loads, open(path)) if "validation" not in row]
    keys = sorted({k for row in rows for k in row if k.split(":")[0] in ("asked", "prompts", "mixed", "route")})
    bins = [rows[i:i + width] for i in range(0, len(rows), width)]
    some = lambda values: round(mean(values), 4) if values else None
    return [{"step": part[-1]["step"], "seconds": part[-1]["seconds"],
             **{k: some([row[k] for row in part if row.get(k) is not None]) for k in keys}} for part in bins]


def results_of(part, out):
    path = out / f"{part}.jsonl"
    return [json.loads(line) for line in open(path)] if path.is_file() else []


def execute(jobs, scale, out, side_by_side):
    """Run what is not finished, some jobs side by side; each finished one is a line of its part's file."""
    done = {(r["part"], r["name"], r["seed"], r["fingerprint"]) for part in {j.part for j in jobs}
            for r in results_of(part, out)}
    waiting = [j for j in jobs if (j.part, j.name, j.seed, fingerprint(KINDS[j.kind](j, scale))) not in done]
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them finished before", flush=True)
    lock, started, count = threading.Lock(), time.time(), 0
    left = sum(j.minutes for j in waiting)

    def one(job):
        nonlocal count, left
        row = run(job, scale)
        with lock:
            with open(out / f"{job.part}.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            count, left = count + 1, left - job.minutes
            tests = row["tests"] if "tests" in row else {"": row["test"]}
            scores = ", ".join(f"{name} {t['f1_recall']:.3f}".strip() for name, t in tests.items())
            minutes, rest = (time.time() - started) / 60, left * 1.25 / side_by_side
            print(f"{count}/{len(waiting)}  {job.part}: {job.name}, seed {job.seed}: F1-Recall {scores}   "
                  f"{minutes:.0f} min, about {rest:.0f} min left", flush=True)
    with ThreadPoolExecutor(side_by_side) as pool:
        futures = [pool.submit(one, job) for job in waiting]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in RUNNING:
                process.terminate()                             # train.py saves behind the update under way
            raise


# ------------------------------------------------------------------------------------------------------------- summary


def summary(out, scale):
    """All rows -> {part: {name: scores over seeds}}: mean, deviation and each seed's; by kind also the worst."""
    whole = {}
    wanted = {(j.part, j.name, j.seed): fingerprint(KINDS[j.kind](j, scale)) for j in plan(scale)}
    for part in dict.fromkeys(part for part, _, _ in wanted):
        by_name = {name: {} for of, name, _ in wanted if of == part}                    # in the order of the plan
        for row in results_of(part, out):
            if wanted.get((part, row["name"], row["seed"])) == row["fingerprint"]:
                by_name[row["name"]][row["seed"]] = row
        by_name = {name: rows for name, rows in by_name.items() if rows}
        whole[part] = {name: over_seeds([rows[s] for s in sorted(rows)]) for name, rows in by_name.items()
                       if part != "depth"}
        if part == "depth":                         # several tests a run
            whole[part] = {name: {t: over_seeds([{**rows[s], "test": rows[s]["tests"][t]} for s in sorted(rows)])
                                  for t in rows[min(rows)]["tests"]} for name, rows in by_name.items()}
    return whole


SCORES = ("f1_recall", "em", "f1", "route_accuracy", "retrievals", "gold_retrievals", "malformed", "model_calls",
          "tokens_read", "tokens_written", "seconds", "seconds_model", "seconds_search")


def over_seeds(rows):
    tests = [row["test"] for row in rows]
    scores = {}
    for name in SCORES:
        values = [t[name] for t in tests if t.get(name) is not None]
        if values:
            scores[name] = {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "seeds": values}
    kinds = {kind: [t["by_kind"][kind] for t in tests] for kind in tests[0]["by_kind"]}
    hops = {h: [t["by_hops"][h] for t in tests] for h in tests[0]["by_hops"]}
    return {"seeds": [row["seed"] for row in rows], "n": tests[0]["n"], **scores, "by_kind": kinds, "by_hops": hops,
            "worst_kind": min((min(v), kind) for kind, v in kinds.items()),
            "cpu_seconds": [row["cpu_seconds"] for row in rows],
            "tokens_sampled": [row["curve"][-1]["tokens"] if row["curve"] else None for row in rows],
            "commits": sorted({row["commit"] for row in rows}), "machine": rows[-1]["machine"]}


def goals(whole):
    """What was wanted of the main comparison, what came, and whether it holds."""
    main = whole.get("main", {})
    if STEP not in main or "outcome only" not in main:
        return []
    step, f1, routing = main[STEP], main[STEP]["f1_recall"]["mean"], main[STEP]["route_accuracy"]["mean"]
    others = {name: s["f1_recall"]["mean"] for name, s in main.items()
              if name not in (STEP, "weak start")}
    rival = max(others, key=others.get)
    ahead, rest = f1 - others["outcome only"], f1 - others[rival]
    extra = step["retrievals"]["mean"] / step["gold_retrievals"]["mean"] - 1
    low, kind = min((min(v), k) for k, v in step["by_kind"].items())
    rows = [("F1-Recall, mean of the seeds", "at least 0.95", f1, f1 >= 0.95),
            ("routing accuracy", "at least 0.99", routing, routing >= 0.99),
            ("retrievals against gold", "within 3 %", extra, abs(extra) <= 0.03),
            (f"worst kind in any seed ({kind})", "at least 0.80", low, low >= 0.80),
            ("ahead of outcome only at equal time", "at least 0.20", ahead, ahead >= 0.20),
            (f"ahead of the best other ({rival})", "at least 0.07", rest, rest >= 0.07)]
    return [{"goal": g, "wanted": w, "got": round(v, 4), "holds": bool(h)} for g, w, v, h in rows]


# -------------------------------------------------------------------------------------------------- tables and figures


def table(header, rows):
    """Rows of cells -> a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shown(score, form=".3f"):
    """A score over seeds: the mean, and where there are several the deviation and each seed's."""
    if score is None:
        return "-"
    if score["sd"] is None:
        return format(score["mean"], form)
    each = " / ".join(format(v, form) for v in score["seeds"])
    return f"{score['mean']:{form}} ± {score['sd']:{form}} ({each})"


def configurations(names):
    """{name: scores over seeds} -> a table, a line a configuration."""
    million = lambda tokens: "-" if None in tokens or not any(tokens) else f"{mean(tokens) / 1e6:.2f} M"
    return table(
        ["", "F1-Recall, mean ± sd (each seed)", "exact", "F1", "routing", "retrievals (gold)", "malformed",
         "worst kind of any seed", "tokens sampled"],
        [[name, shown(s["f1_recall"]), *(shown(s[measure]).split()[0] for measure in ("em", "f1")),
          shown(s.get("route_accuracy")).split()[0],
          f"{shown(s['retrievals'], '.2f').split()[0]} ({s['gold_retrievals']['mean']:.2f})",
          shown(s["malformed"]).split()[0], f"{s['worst_kind'][1]} {s['worst_kind'][0]:.3f}",
          million(s["tokens_sampled"])] for name, s in names.items()])


def by_kind(names):
    """F1-Recall by kind and number of hops, means over seeds; a column a configuration."""
    first = next(iter(names.values()))
    rows = [[kind, *(f"{mean(s['by_kind'][kind]):.2f}" for s in names.values())] for kind in sorted(first["by_kind"])]
    rows += [[f"{h} hop{'s' * (h != '1')}", *(f"{mean(s['by_hops'][h]):.2f}" for s in names.values())]
             for h in sorted(first["by_hops"])]
    return table(["", *names], rows)


def depths(names):
    """F1-Recall of each test of depth: mean over seeds, and each; a line a recipe. Then how often a question was
    searched for, and how many of its steps were malformed; a right trajectory has a search a hop."""
    def lines(cell):
        return [[name.removeprefix("to "), *(cell(tests[t]) if t in tests else "-" for t in DEPTH_TESTS)]
                for name, tests in names.items()]
    one = lambda score: shown(score, ".2f").split()[0]
    return "\n\n".join([
        table(["trained on two hops and", *DEPTH_TESTS], lines(lambda s: shown(s["f1_recall"], ".2f"))),
        table(["searches / malformed steps", *DEPTH_TESTS],
              lines(lambda s: f"{one(s['retrievals'])} / {one(s['malformed'])}"))])


def costs(names):
    """What a question costs, by pipeline, and quality per second."""
    form = {"f1_recall": ".3f", "model_calls": ".2f", "retrievals": ".2f", "tokens_read": ".0f",
            "tokens_written": ".0f"}
    cell = lambda s, name: f"{1e3 * s[name]['mean']:.2f}" if "seconds" in name else shown(s[name], form[name])
    columns = (*form, "seconds_model", "seconds_search")
    return table(["", "F1-Recall", "model calls", "searches", "tokens read", "written", "model ms", "search ms",
                  "F1-Recall per second"],
                 [[name, *(cell(s, c) for c in columns), f"{s['f1_recall']['mean'] / s['seconds']['mean']:.0f}"]
                  for name, s in names.items()])


def speeds(lines):
    """The JSON lines of bench.py -> a table, a line a figure; of a figure measured twice the later one."""
    number = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    found = {(part, name): (f, line["command"]) for line in lines for part, figures in line["figures"].items()
             for name, f in figures.items()}

    def against(f):
        spread = f" ({f['rounds'][0]:.2f} to {f['rounds'][1]:.2f})" if "rounds" in f else ""
        return f"{f['ratio']:.2f} × {f['peer']}{spread}" if "ratio" in f else ""
    verdict = lambda f: f"{f['goal'].replace('>=', 'at least').replace('<=', 'at most')}" + (
        "" if f["met"] else ": missed") if "goal" in f else ""
    return table(["command", "what", "ours", "against: median (rounds)", "goal"],
                 [[f"`{command}`", name, f"{number(f['value'])} {f['unit']}", against(f), verdict(f)]
                  for (_, name), (f, command) in found.items()])


def collapse_numbers(out, names=("not balanced, no rest, sampled once", "not balanced",
                                 "not balanced, hops that are ready", "balanced"), at=(10, 30, 50, 100, 150)):
    """What groups see of the base of pictures, early and late; means over seeds. The chance p that a prompt of its own
    asks for it is at most its share of what is asked over its share of the prompts."""
    rows = []
    for name in names:
        seeds = [row["routes"] for row in results_of("collapse", out) if row["name"] == name]
        for step in at if seeds else ():
            bins = [b for bins in seeds for b in bins if b["step"] == step]
            known = lambda key: [b[f"{key}:text image"] for b in bins if b.get(f"{key}:text image") is not None]
            prompts, asked, mixed = (mean(known(key)) if known(key) else 0.0 for key in ("prompts", "asked", "mixed"))
            p = min(1.0, asked / prompts) if prompts else 0.0
            others = " / ".join(f"{mean(b.get(f'asked:{other}') or 0 for b in bins):.0%}"
                                for other in ("text", "table", "none"))
            rows.append([name, step, f"{prompts:.1%}", f"{asked:.1%}", f"{p:.2f}", f"{mixed:.0%}", others])
    return table(["", "update", "share of the routing prompts", "share of all that is asked for", "so p is at most",
                  "of its groups mixed", "asked for instead: text / table / none"], rows)


def sections(whole, out):
    """Everything that the README shows of the results: {name of the place: text}."""
    parts = {}
    if main_part := whole.get("main"):
        order = [STEP, *(name for name in main_part if name != STEP)]
        main_part = {name: main_part[name] for name in order if name in main_part}
        parts["main"] = configurations(main_part)
        parts["kinds"] = by_kind({**main_part, **whole.get("cost", {})})
        parts["goals"] = table(["wanted", "", "got", "holds"], [
            [g["goal"], g["wanted"], f"{g['got']:.3f}", "yes" if g["holds"] else "no"] for g in goals(whole)])
    for part in ("collapse", "ablation"):
        if whole.get(part):
            parts[part] = configurations(whole[part])
    if whole.get("collapse"):
        parts["group"] = collapse_numbers(out)
    if whole.get("cost"):
        parts["cost"] = costs(whole["cost"])
        parts["pipelines"] = configurations(whole["cost"])
    if bench := results_of("bench", out):
        parts["speed"] = speeds(bench)
    if whole.get("depth"):
        parts["depth"] = depths(whole["depth"])
    return parts


def fill(text, parts):
    """A page with its generated places written anew: what stands between <!-- NAME --> and <!-- end --> is replaced,
    and so are the line counts of the file table. KeyError for a place that the page lacks."""
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        if begin not in text:
            raise KeyError(f"README.md has no place {begin}")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
    count = lambda m: f"| `{m[1]}` | {len((HERE / m[1]).read_text().splitlines())} |"
    return re.sub(r"^\| `(\w+\.py)` \| \d+ \|", count, text, flags=re.MULTILINE)


def figures(out):
    """Curves of the main comparison and of the route that dies, as PNG files."""
    from lab import report                                   # here, since it takes matplotlib with it
    for part, name, y in (("main", "main", ["validation.f1_recall", "validation.route_accuracy"]),
                          ("collapse", "collapse", ["asked:text image", "mixed:text image"])):
        runs = []
        for row in results_of(part, out):
            if row["kind"] != "grpo" and part == "collapse" or not row["curve"]:
                continue
            points = [{"step": p["step"], "seconds": p["seconds"], "sampled": p["tokens"],
                       **{f"validation.{k}": v for k, v in p.items()}} for p in row["curve"]]
            bins = [{**b, "sampled": 0} for b in row["routes"]]
            label = row["name"]
            runs.append(report.Run(f"{label}-{row['seed']}", label, {"seed": row["seed"]},
                                   points if part == "main" else bins, []))
        for x in ("seconds", "tokens") if part == "main" else ("steps",):
            # sft samples nothing: over tokens it has no line
            shown = [run if x != "tokens" or run.rows[-1]["sampled"] else replace(run, rows=[]) for run in runs]
            if shown:
                report.curves(shown, out / f"{name}-{x}.png", x=x, y=y, columns=2)


def stop(number, frame):
    """A signal ends the plan; `execute` passes it on to the runs, which save behind the update under way."""
    raise KeyboardInterrupt(number)


def main():
    p = argparse.ArgumentParser(description="Run the whole experiment, or go on with it.")
    p.add_argument("--quick", action="store_true", help="the same plan at toy scale: it shows that everything runs")
    p.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="only these parts")
    p.add_argument("--jobs", type=int, default=2, help="jobs side by side (default 2)")
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the results (default results)")
    p.add_argument("--summary", action="store_true", help="run nothing: summary.json, figures and the README's tables "
                   "from what is there")
    a = p.parse_args()
    scale, a.out = QUICK if a.quick else Scale(), a.out.resolve()
    os.chdir(HERE)                                              # all other paths are the project's
    a.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):              # also where a shell started this in its background
        signal.signal(number, stop)
    try:
        if not a.summary:
            write_worlds(scale)
            jobs = [j for j in plan(scale) if j.part in a.parts]
            execute([j for j in jobs if j.part != "cost"], scale, a.out, a.jobs)
            execute([j for j in jobs if j.part == "cost"], scale, a.out, 1)              # what is timed runs alone
    except KeyboardInterrupt as stopped:
        print("experiment.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    except (RuntimeError, ValueError, OSError) as e:
        print(f"experiment.py: {e}", file=sys.stderr)
        sys.exit(2)
    whole = summary(a.out, scale)
    (a.out / "summary.json").write_text(json.dumps({**whole, "goals": goals(whole)}, indent=1) + "\n")
    figures(a.out)
    if a.summary:
        readme = HERE / "README.md"
        readme.write_text(fill(readme.read_text(), sections(whole, a.out)))
    print(json.dumps({"parts": {part: len(names) for part, names in whole.items()}, "goals": goals(whole)}))


if __name__ == "__main__":
    main()
