"""Training: a supervised warm start (sft) and Step-GRPO.

What flows through this file:
    sft    step files -> prompts and target texts -> cross-entropy on the response tokens only -> AdamW -> checkpoints

Legend of shapes
    B examples of a batch   T tokens of a row   M response tokens

A run is a folder: options.json, log.jsonl (a line a step), and checkpoints `last` and `best`, each an ordinary model directory with the
optimizer's state beside the weights. A run that was stopped goes on from `last` as if it had not been; that is exact on the CPU.

Deviations from the paper and from the released code, with the reason
    * The warm start's targets carry a thought: published step files have none, so a step without one is trained with an empty thought.
    * A prompt that is too long is counted and left out. It is never cut: cutting loses the question.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infer import (IMAGE, ROUTES, conversation, render_answer, render_route)
from model import VLM, Processor, load_picture, write_json

# ---------------------------------------------------------------------------------------------------------------------- options


def option(default, text, **more):
    """A field of an options class: its default, and the sentence that --help shows."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Options:
    """Options that every kind of training has. Each becomes a flag of the same name."""
    model: str = option("weights/tiny-warm", "model directory to start from; one without weights starts from random ones")
    out: str = option("runs/run", "folder of the run: options, log, checkpoints; an unfinished run there is continued")
    seed: int = option(0, "seed of everything that is random")
    steps: int = option(1000, "number of updates")
    learning_rate: float = option(5e-4, "peak of the learning rate")
    warmup: int = option(10, "updates over which the learning rate rises to its peak")
    decay: float = option(0.5, "share of the run, at its end, over which the rate falls linearly to a tenth; 0 keeps it")
    weight_decay: float = option(0.01, "AdamW's decay of matrices (not of norms and biases)")
    beta1: float = option(0.9, "AdamW's memory of the gradient")
    beta2: float = option(0.98, "AdamW's memory of the squared gradient")
    clip_norm: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    device: str = option("cpu", "where to train: cpu, cuda, cuda:1 ...")
    dtype: str = option("float32", "type of the weights while training", choices=("float32", "bfloat16"))
    threads: int = option(0, "CPU threads of torch; 0 leaves torch's choice")
    save_every: int = option(200, "updates between checkpoints")
    log_every: int = option(10, "updates between lines on the screen; the log file has every one")


@dataclass(frozen=True)
class SftOptions(Options):
    """Options of supervised training."""
    data: tuple = option((), "step files, each may carry its share of the examples: steps.jsonl=3 copy.jsonl=1", nargs="+")
    tokens: int = option(1280, "token budget of a batch, padding included")
    previous_token_head: bool = option(False, "start from random weights with one head of the first layers attending to the token before")


def parse_options(cls, words):
    """Flags -> a frozen options object. Unknown flags and wrong values end with one line and code 2."""
    p = argparse.ArgumentParser(prog=f"train.py {cls.__name__.removesuffix('Options').lower()}", description=cls.__doc__,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(cls):
        kind = type(f.default)
        more = {k: v for k, v in f.metadata.items() if k != "help"}
        if kind is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["type"] = str if kind is tuple else kind
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **more)
    values = vars(p.parse_args(words))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# -------------------------------------------------------------------------------------------------------------- step files as examples


@dataclass(frozen=True)
class StepExample:
    """One step of a published Step-GRPO file (FORMATS 2): what is asked, and what is right."""
    kind: str                                             # "ret" or "ans"
    system: str
    problem: str
    answer: object                                        # {"query", "retriever"} of a routing step, text or list of accepted texts otherwise
    thought: str
    images: tuple                                         # paths

    @property
    def final(self):
        return isinstance(self.answer, list)

    def conversation(self):
        """The chat that the processor takes: a picture stands where the problem ends with its marker."""
        image = self.images[0] if self.images and self.problem.endswith(IMAGE) else None
        return conversation(self.system, self.problem, image)

    def target(self):
        """The right output as text."""
        if self.kind == "ret":
            route = self.answer["retriever"][0].strip().lower()
            name = next((r for r in ROUTES.values() if r.lower() == route), "None")
            return render_route(self.thought, "None" if name == "None" else self.answer["query"].strip(), name)
        return render_answer(self.thought, (self.answer[0] if self.final else self.answer).strip())


def read_steps(path):
    """Read a step file into a list of trajectories, each a list of StepExample. ValueError names file and line of a row that does not fit."""
    path, rows = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not readable ({e})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            images = tuple(str(path.parent / i) for i in row.get("images") or ())
            steps = [StepExample(s["step_type"], s["system"], s["problem"], s["answer"], s.get("thought", ""), images) for s in row["steps"]]
            bad = [s for s in steps if s.kind not in ("ret", "ans") or (s.kind == "ret") != isinstance(s.answer, dict) or not s.answer]
            if bad or not steps:
                raise KeyError(f"step_type {bad[0].kind!r} with answer {str(bad[0].answer)[:60]!r}" if bad else "steps")
            rows.append(steps)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}, line {number}: expected {{\"images\", \"steps\": [{{\"step_type\": ret|ans, \"problem\", \"system\", "
                             f"\"answer\"}}]}} ({type(e).__name__}: {e})") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


class Mixture:
    """Endless batches from several files, each file drawn in proportion to its share and without repetition within an epoch.

    Batch (pool, i) depends on the seed alone, so a run continues at the same place. Examples of a pool are sorted by length before they
    are cut into batches, so that little is padded; the order of the batches is shuffled again.
    """
    POOL = 1024

    def __init__(self, sources, tokens, seed):
        """sources: list of (name, examples, share); tokens: budget of a batch."""
        total = sum(share for _, _, share in sources)
        self.sources = [(name, examples, max(1, round(self.POOL * share / total))) for name, examples, share in sources]
        self.tokens, self.seed, self.orders = tokens, seed, {}

    def drawn(self, name, examples, i):
        """The i-th draw from a file: every epoch is another permutation."""
        epoch, place = divmod(i, len(examples))
        if self.orders.get(name, (None, None))[0] != epoch:
            order = list(range(len(examples)))
            random.Random(f"{self.seed} {name} {epoch}").shuffle(order)
            self.orders[name] = epoch, order
        return examples[self.orders[name][1][place]]

    def batches(self, pool):
        """The batches of a pool, each a list of StepExample."""
        drawn = [self.drawn(name, examples, pool * count + i) for name, examples, count in self.sources for i in range(count)]
        length = lambda e: len(e.problem) // 3 + 60 * len(e.images)       # a guess is enough for sorting
        drawn.sort(key=length)
        batches, rng = [], random.Random(f"{self.seed} pool {pool}")
        size = max(1, self.tokens // 64)
        for start in range(0, len(drawn), size):
            batches.append(drawn[start:start + size])
        rng.shuffle(batches)
        return batches


def make_batch(processor, examples, max_positions, device):
    """Prompts and targets side by side: [prompt | target | eos], left-padded. Returns the model's inputs, the mask (B, T) of the target tokens,
    and how many examples were too long to be used."""
    prompts, responses, too_long = [], [], 0
    for e in examples:
        ids, patches, grids = processor.prompt(e.conversation())
        response = processor.encode(e.target()) + [processor.eos_ids[0]]
        if len(ids) + len(response) > max_positions:
            too_long += 1
            continue
        prompts.append((ids + response, patches, grids))
        responses.append(len(response))
    if not prompts:
        raise ValueError(f"all {len(examples)} examples of a batch are longer than the model's {max_positions} positions")
    batch = processor.batch(prompts)
    T = batch["input_ids"].shape[1]
    mask = torch.arange(T) >= T - torch.tensor(responses)[:, None]        # (B, T): rows end together, so targets are the last tokens
    return {k: None if v is None else v.to(device) for k, v in batch.items()}, mask.to(device), too_long


# ---------------------------------------------------------------------------------------------------------------------- a run


class Run:
    """The folder of a run: what was asked for, what happened, and checkpoints from which it goes on."""

    def __init__(self, options, model, processor):
        self.o, self.model, self.processor = options, model, processor
        self.path = Path(options.out)
        self.path.mkdir(parents=True, exist_ok=True)
        decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
        self.optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
                                           lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.state = {"step": 0, "seconds": 0.0, "tokens": 0, "best": None}
        self.resume()
        write_json(self.path / "options.json", asdict(options))
        self.started = time.time() - self.state["seconds"]
        self.recent = []

    def resume(self):
        """Continue from `last`, where there is one: weights, optimizer, random state, counters. Log lines of lost steps are dropped."""
        last = self.path / "last"
        if not last.exists():
            (self.path / "log.jsonl").unlink(missing_ok=True)
            return
        asked, was = asdict(self.o), json.loads((self.path / "options.json").read_text())
        if different := [k for k in asked if k not in ("out", "steps", "save_every", "log_every", "threads") and list_of(asked[k]) != was.get(k)]:
            raise ValueError(f"{self.path} holds a run with another --{different[0].replace('_', '-')} ({was.get(different[0])}); name another --out, or remove it")
        self.state = json.loads((last / "trainer.json").read_text())
        stored = load_file(last / "trainer.safetensors", device="cpu")
        weights = VLM.from_pretrained(last, dtype=next(self.model.parameters()).dtype).state_dict()
        self.model.load_state_dict(weights)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                name = self.names[id(p)]
                self.optimizer.state[p] = {key: stored[f"{key}.{name}"].to(p.device if key != "step" else "cpu") for key in ("step", "exp_avg", "exp_avg_sq")}
        self.generator.set_state(stored["generator"])
        log = self.path / "log.jsonl"
        kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= self.state["step"]]
        log.with_suffix(".new").write_text("".join(kept))
        log.with_suffix(".new").replace(log)
        print(f"continuing {self.path} after step {self.state['step']}", file=sys.stderr)

    def learning_rate(self, step):
        """Linear warm-up, then constant, then a linear fall to a tenth over the last `decay` of the run."""
        o = self.o
        fall = 1.0 if o.decay == 0 else 0.1 + 0.9 * min(1.0, (1 - step / o.steps) / o.decay)
        return o.learning_rate * min(1.0, (step + 1) / max(1, o.warmup)) * fall

    def update(self, step):
        """Clip the gradient and take one step of AdamW. Returns the gradient's norm; a NaN ends the run before it touches the weights."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.o.clip_norm or math.inf)
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step + 1}: the gradient is {norm.item()}; the last good checkpoint is {self.path / 'last'}; "
                                     "try a lower --learning-rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"learning_rate": rate, "grad_norm": norm.item()}

    def log(self, row):
        """One line a step: for programs in log.jsonl, for people on the screen with the time left."""
        self.state["step"], self.state["seconds"] = row["step"], time.time() - self.started
        row = {**row, "seconds": round(self.state["seconds"], 2)}
        with open(self.path / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        self.recent.append(row)
        if row["step"] % self.o.log_every == 0 or row["step"] == self.o.steps:
            mean = lambda k: sum(r[k] for r in self.recent) / len(self.recent)
            shown = "  ".join(f"{k} {mean(k):.4g}" for k in row if k not in ("step", "seconds") and isinstance(row[k], (int, float)))
            left = self.state["seconds"] / row["step"] * (self.o.steps - row["step"])
            print(f"step {row['step']}/{self.o.steps}  {shown}  {row['seconds']:.0f} s, {left:.0f} s left", flush=True)
            self.recent = []

    def save(self, best=False):
        """Write a checkpoint under its own name, then let the link `last` (and `best`) point to it: a kill at any moment leaves a whole one."""
        name = f"checkpoint-{self.state['step']:06d}"
        folder = self.path / name
        if not folder.exists():
            new = self.path / (name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            write_model(new, self.model, self.o.model)
            stored = {f"{key}.{self.names[id(p)]}": value for p, s in self.optimizer.state.items() for key, value in s.items()}
            save_file({k: v.contiguous().cpu() for k, v in stored.items()} | {"generator": self.generator.get_state()}, new / "trainer.safetensors")
            write_json(new / "trainer.json", self.state)
            new.replace(folder)
        for link in ("last", "best") if best else ("last",):
            (self.path / (link + ".new")).unlink(missing_ok=True)
            (self.path / (link + ".new")).symlink_to(name)
            os.replace(self.path / (link + ".new"), self.path / link)
        kept = {os.readlink(self.path / link) for link in ("last", "best") if (self.path / link).is_symlink()}
        for old in self.path.glob("checkpoint-*"):
            if old.name not in kept:
                shutil.rmtree(old)


def list_of(value):
    return list(value) if isinstance(value, tuple) else value


def write_model(path, model, origin, dtype=None):
    """A model directory: our weights, and tokenizer, picture settings and prompts of the directory that training started from."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json", "prompts.json", "chat_template.json"):
        if (Path(origin) / name).exists():
            shutil.copy(Path(origin) / name, path / name)
    model.save_pretrained(path, dtype)


def open_model(options):
    """Weights where the directory has them, random ones where it holds a config alone."""
    path, dtype = Path(options.model), getattr(torch, options.dtype)
    if not path.is_dir():
        raise ValueError(f"--model {path}: no such directory")
    if options.threads:
        torch.set_num_threads(options.threads)
    fresh = not any(path.glob("*.safetensors"))
    model = VLM.from_config(path, options.seed, dtype, options.device) if fresh else VLM.from_pretrained(path, dtype, options.device)
    return model, Processor.from_pretrained(path), fresh


@torch.no_grad()
def start_previous_token_head(model, layers=(0, 1), strength=10.0):
    """Let query head 0 of the first layers start out attending to the token before (the first half of an induction head).

    On the rotary pairs that turn with time the weights of its query and key are set to zero and their biases to constants: key (m, 0), query
    (m cos w, -m sin w) for a pair of speed w. After rotation the product is largest at distance one. The architecture is unchanged.
    """
    c = model.config
    speeds = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    half, size = c.head_dim // 2, math.sqrt(strength * math.sqrt(c.head_dim))
    for layer in layers:
        q, k = model.model.layers[layer].self_attn.q_proj, model.model.layers[layer].self_attn.k_proj
        q.weight[:c.head_dim] *= 0.1
        for pair in range(c.mrope_section[0]):
            both = [pair, pair + half]
            q.weight[both], k.weight[both] = 0.0, 0.0
            k.bias[both] = torch.tensor([size, 0.0])
            q.bias[both] = size * torch.tensor([math.cos(speeds[pair]), -math.sin(speeds[pair])])


# ---------------------------------------------------------------------------------------------------------------------- supervised


def prompts_of(sources):
    """The system prompts that step files use most, for prompts.json: route, answer, final."""
    counts = {"route": {}, "answer": {}, "final": {}}
    for _, examples, _ in sources[:1]:
        for e in examples:
            seen = counts["route" if e.kind == "ret" else "final" if e.final else "answer"]
            seen[e.system] = seen.get(e.system, 0) + 1
    return {kind: max(seen, key=seen.get) for kind, seen in counts.items() if seen}


def read_sources(specs):
    """["a.jsonl=3", "b.jsonl"] -> [(name, steps, share)]."""
    sources = []
    for spec in specs:
        name, _, share = spec.rpartition("=") if "=" in spec else (spec, "", "1")
        try:
            sources.append((name, [step for row in read_steps(name) for step in row], float(share)))
        except ValueError as e:
            raise ValueError(f"--data {spec}: {e}") from None
    if not sources:
        raise ValueError("--data: name at least one step file")
    return sources


def sft(o):
    """Supervised training on step files: cross-entropy of the response tokens, nothing else."""
    model, processor, fresh = open_model(o)
    if o.previous_token_head and fresh:
        start_previous_token_head(model)
    sources = read_sources(o.data)
    mixture = Mixture(sources, o.tokens, o.seed)
    run = Run(o, model, processor)
    pool, place = run.state.setdefault("place", [0, 0])
    batches = mixture.batches(pool)
    for step in range(run.state["step"], o.steps):
        if place == len(batches):
            pool, place = pool + 1, 0
            batches = mixture.batches(pool)
        batch, mask, too_long = make_batch(processor, batches[place], model.config.max_positions, o.device)
        place += 1
        logps = model.log_probs(targets_mask=mask, **batch)                       # (B, T - 1)
        loss = -logps.sum() / mask.sum()
        loss.backward()
        metrics = run.update(step)
        run.state["tokens"] += batch["input_ids"].numel()
        run.state["place"] = [pool, place]
        run.log({"step": step + 1, "loss": loss.item(), "examples": len(batches[place - 1]), "tokens": batch["input_ids"].numel(),
                 "too_long": too_long, **metrics})
        if (step + 1) % o.save_every == 0 or step + 1 == o.steps:
            run.save()
    write_json(run.path / "last" / "prompts.json", prompts_of(sources))
    print(json.dumps({"run": str(run.path), "steps": o.steps, "seconds": round(run.state["seconds"], 1), "tokens": run.state["tokens"]}))


COMMANDS = {"sft": (SftOptions, sft)}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: train.py {{{','.join(COMMANDS)}}} [options]; train.py {next(iter(COMMANDS))} --help lists them", file=sys.stderr)
        sys.exit(0 if "--help" in sys.argv else 2)
    options, command = COMMANDS[sys.argv[1]]
    try:
        command(parse_options(options, sys.argv[2:]))
    except (ValueError, FloatingPointError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
