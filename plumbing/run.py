"""A run: options that become flags, a folder that can be continued, the optimizer, checkpoints, and the ranks that
share the work on several GPUs. What is trained, and on what, is train.py's.

What flows through this file:
    flags -> a frozen options object -> a run: its folder, its optimizer -> the numbers of the updates still to do
    gradients -> clipped -> AdamW on float32 masters -> log.jsonl, validation, checkpoints `last` and `best`

A run is a folder: options.json, log.jsonl (a line a step), samples.jsonl (some groups of grpo), and checkpoints `last`
and `best`, each an ordinary model directory with the optimizer's state beside the weights. A run that was stopped goes
on from `last` as if it had not been; that is exact on the CPU.

Reading order: Run.steps, Run.update, Run.log, Run.save; the ranks when you have several GPUs.
"""
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plumbing.old import hold, option_run as option, read_json, settle, write_json
from plumbing.ranks import empty, full, gather, rank, sharded, share_of


@dataclass(frozen=True)
class Options:
    """Options that every kind of training has. Each becomes a flag of the same name."""
    model: str = option("weights/tiny-warm", "model directory to start from; without weights in it, from random ones")
    out: str = option("runs/run", "folder of the run: options, log, checkpoints; an unfinished one is continued")
    seed: int = option(0, "seed of everything that is random", most=2 ** 63 - 1)
    steps: int = option(1000, "number of updates", least=1)
    learning_rate: float = option(3e-4, "peak of the learning rate")
    warmup: int = option(10, "updates over which the learning rate rises to its peak")
    decay: float = option(0.5, "share of the run, at its end, over which the rate falls to a tenth; 0 keeps it", most=1)
    weight_decay: float = option(0.01, "AdamW's decay of matrices (not of norms and biases)")
    beta1: float = option(0.9, "AdamW's memory of the gradient", most=0.999999)
    beta2: float = option(0.98, "AdamW's memory of the squared gradient", most=0.999999)
    clip_norm: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    device: str = option("cpu", "where to train: cpu, cuda, cuda:1 ...; under torchrun cpu or cuda (a GPU each)")
    dtype: str = option("float32", "type of the weights in a pass; the optimizer works in float32 in any case",
                        choices=("float32", "bfloat16"))
    checkpointing: bool = option(False, "compute activations again in the backward pass instead of keeping them")
    threads: int = option(0, "CPU threads of torch; 0 leaves torch's choice", most=1024)
    clock: str = option("wall", "what --minutes and the seconds of the log count: time on the wall, or time of the "
                        "processor, which other work on the machine hardly changes", choices=("wall", "cpu"))
    save_every: int = option(200, "updates between checkpoints", least=1)
    log_every: int = option(10, "updates between lines on the screen; the log file has every one", least=1)
    minutes: float = option(0.0, "end after this many minutes, whatever --steps says; 0: no limit")
    val_world: str = option("", "a world to validate on through the router, for the choice of the best checkpoint; by "
                            "default the embedded one")
    val_every: int = option(0, "updates between validations; 0: none")
    val_questions: int = option(260, "questions of a validation", least=1)

    def __post_init__(self):
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata.get("least", 0), f.metadata.get("most", math.inf)
            if type(value) in (int, float) and not (least <= value <= most and value < math.inf):
                limits = f"give at least {least}" if most == math.inf else f"give {least} to {most}"
                raise ValueError(f"--{f.name.replace('_', '-')} is {value}: {limits}")


# ---------------------------------------------------------------------------------------------------------------- a run


LOGS = ("log.jsonl", "samples.jsonl")           # a line an update; whole groups, a few of some updates


@contextmanager
def reading_checkpoint(path):
    """Whatever is wrong with a checkpoint is said in one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as e:
        said = str(e).splitlines()[0]
        raise ValueError(f"{path}: no whole checkpoint of this run ({type(e).__name__}: {said}): let the link name "
                         "another one, or name another --out") from None


def cut_log(log, step):
    """Cut the lines of lost updates, and a torn one, off the end of a log."""
    kept = 0
    for number, line in enumerate(log.read_bytes().split(b"\n")[:-1], 1):        # behind the last \n nothing is whole
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{log}:{number}: no line of a run's log: repair it, or name another --out") from None
        kept += len(line) + 1
    os.truncate(log, kept)


class Run:
    """The folder of a run: what was asked for, what happened, and checkpoints from which it goes on. One process at a
    time (with its ranks) works in it."""

    def __init__(self, options, model, processor, prompts, *, save, load, validate):
        """save(path, model, origin, prompts) writes a model directory and load(path, model) reads one;
        validate(options, model, processor, prompts) -> the scores of a validation."""
        self.o, self.plain, self.processor, self.prompts = options, model, processor, prompts
        self.save_model, self.load_model, self.scores_of = save, load, validate
        self.path = Path(options.out)
        self.path.mkdir(parents=True, exist_ok=True)
        if not rank():
            self.lock = open(self.path / "lock", "a")    # held while this object lives; the file stays
            hold(self.lock, self.path)
        self.state = {"step": 0, "seconds": 0.0, "tokens": 0, "best": None}
        stored = self.resume()
        self.model = sharded(model)                      # what is trained; `plain` is what samples and is saved
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # bfloat16 weights cannot hold a small update (8 bits of mantissa): AdamW works on float32 copies, their masters
        self.pairs = [(p, p if p.dtype == torch.float32 else p.detach().float()) for _, p in trained]
        masters = [m for _, m in self.pairs]
        self.names = {id(m): name for m, (name, _) in zip(masters, trained)}
        self.optimizer = torch.optim.AdamW(
            [{"params": [m for m in masters if m.dim() > 1], "weight_decay": options.weight_decay},
             {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0}],
            lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        with reading_checkpoint(self.path / "last"):
            self.restore(stored)
        if not rank():
            write_json(self.path / "options.json", asdict(options))
        self.now = time.process_time if options.clock == "cpu" else time.time
        self.started, self.recent, self.signal = self.now() - self.state["seconds"], [], None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:        # which nohup asks for
                signal.signal(number, lambda which, _: setattr(self, "signal", which))

    def steps(self):
        """The numbers of the updates still to do. Validates and saves between them; a signal ends the run behind the
        update under way."""
        self.agree()
        for step in range(self.state["step"], self.o.steps):
            if self.progress(step) >= 1:
                break
            yield step
            self.agree()
            over = step + 1 == self.o.steps or self.progress(step + 1) >= 1
            due = self.o.val_every and ((step + 1) % self.o.val_every == 0 or over)
            best = self.validate(step + 1) if due else False
            if best or over or self.stop or (step + 1) % self.o.save_every == 0:
                self.save(best)
            if self.stop:
                tell(f"train.py: stopped after step {step + 1}; the same command continues")
                sys.exit(128 + self.stop)
        tell(json.dumps({"run": str(self.path), "steps": self.state["step"], "tokens": self.state["tokens"],
                         "seconds": round(self.state["seconds"], 1), "best": self.state["best"]}), sys.stdout)

    def agree(self):
        """Ranks leave the loop together: the first rank's clock counts, and a signal to any of them stops all."""
        said = gather((self.now() - self.started, self.signal))
        self.clock, self.stop = said[0][0], max((number for _, number in said if number), default=None)

    def progress(self, step):
        """Share of the run that is behind us, by updates or by the clock, whichever is further."""
        return max(step / self.o.steps, self.clock / (60 * self.o.minutes) if self.o.minutes else 0.0)

    def resume(self):
        """Continue from `last`, where there is one: weights, counters; log lines of lost steps are dropped.

        Returns what `restore` reads: optimizer and random state, {} in a new run.
        """
        last = self.path / "last"
        if not os.path.lexists(last):                                                  # killed before it saved, or new
            stale = [path for name in (*LOGS, "checkpoint-*") for path in self.path.glob(name)]
            if stale and not (self.path / "options.json").exists():
                raise ValueError(f"{stale[0]}: not of a run of this program (there is no options.json): name another "
                                 "--out, or move it away")
            for path in stale if not rank() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return {}
        asked, was = asdict(self.o), read_json(self.path / "options.json")
        default = {f.name: list_of(f.default) for f in fields(self.o)}     # of options that are younger than the run
        free = ("out", "steps", "minutes", "save_every", "log_every", "threads")
        if different := [k for k in asked if k not in free and list_of(asked[k]) != was.get(k, default[k])]:
            raise ValueError(f"{self.path} holds a run with another --{different[0].replace('_', '-')} "
                             f"({was.get(different[0], default[different[0]])}); name another --out, or remove it")
        with reading_checkpoint(last):
            self.state |= read_json(last / "trainer.json")
            for name, kind in (("step", int), ("tokens", int), ("seconds", (int, float)), ("best", (dict, type(None)))):
                if not isinstance(self.state[name], kind) or name != "best" and not 0 <= self.state[name] < math.inf:
                    raise TypeError(f"{name} is {self.state[name]!r}")
            stored = load_file(last / "trainer.safetensors", device="cpu")
            self.load_model(last, self.plain)
        for log in (self.path / name for name in LOGS if not rank() and (self.path / name).exists()):
            cut_log(log, self.state["step"])
        tell(f"continuing {self.path} after step {self.state['step']}")
        return stored

    def restore(self, stored):
        """Optimizer and random state of a checkpoint, whatever the number of ranks that wrote it."""
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            name = self.names[id(p)]
            wrong = [key for key in stored if key.endswith("." + name) and not key.startswith("step.")
                     and stored[key].shape != p.shape]
            if wrong:
                raise KeyError(f"shape {list(stored[wrong[0]].shape)} instead of {list(p.shape)}: {wrong[0]}")
            if f"step.{name}" in stored:                 # nothing is stored where no update was made yet
                moments = {key: share_of(stored[f"{key}.{name}"], p) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": stored[f"step.{name}"].to(p.device), **moments}
            if f"master.{name}" in stored:
                p.copy_(share_of(stored[f"master.{name}"], p))
        if stored:
            self.generator.set_state(stored["generator"])

    @contextmanager
    def whole(self):
        """Inside, the plain model has all weights on every rank: for saving, and for sampling, where ranks end at
        different tokens and must not wait for each other at every layer."""
        if self.model is self.plain:
            yield
            return
        for p, share in zip(self.plain.parameters(), self.model.parameters()):
            p.data = full(share.detach())
        yield
        empty(self.plain)

    def learning_rate(self, step):
        """Linear warm-up, then constant, then a linear fall to a tenth over the last `decay` of the run."""
        o = self.o
        fall = 1.0 if o.decay == 0 else 0.1 + 0.9 * min(1.0, (1 - self.progress(step)) / o.decay)
        return o.learning_rate * min(1.0, (step + 1) / max(1, o.warmup)) * max(0.1, fall)

    def update(self, step):
        """Clip the gradient and take one step of AdamW.

        A gradient that is not finite ends the run before it touches the weights.
        """
        rate, apart = self.learning_rate(step), [(p, m) for p, m in self.pairs if m is not p]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for p, m in apart:
            m.grad, p.grad = None if p.grad is None else p.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_([m for _, m in self.pairs], self.o.clip_norm or math.inf)
        norm = full(norm)                                                                        # over all ranks
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step + 1}: the gradient is {norm.item()}; the last good checkpoint is "
                                     f"{self.path / 'last'}; try a lower --learning-rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for p, m in apart:
                p.copy_(m)
        return {"learning_rate": rate, "grad_norm": norm.item()}

    def log(self, row):
        """One line a step: for programs in log.jsonl, for people on the screen with the time left."""
        self.state["step"], self.state["seconds"] = row["step"], self.now() - self.started
        row = {**row, "seconds": round(self.state["seconds"], 2)}
        if rank():
            return
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if "validation" in row:
            return
        self.recent.append(row)
        if row["step"] % self.o.log_every == 0 or row["step"] == self.o.steps:
            known = {k: [r[k] for r in self.recent if isinstance(r.get(k), (int, float))]
                     for k in row if k not in ("step", "seconds") and not k.startswith(("asked", "prompts", "mixed"))}
            shown = "  ".join(f"{k} {sum(v) / len(v):.3g}" for k, v in known.items() if v)
            done = max(self.progress(row["step"]), 1e-6)
            left = row["seconds"] * (1 - done) / done
            tell(f"step {row['step']}/{self.o.steps}  {shown}  {row['seconds']:.0f} s, {left:.0f} s left", sys.stdout)
            self.recent = []

    def show(self, step, groups, count=2):
        """Write a few groups of every log_every-th update to samples.jsonl, those that teach first."""
        if rank() or (step + 1) % self.o.log_every:
            return
        with open(self.path / "samples.jsonl", "a", encoding="utf-8") as f:
            for g in sorted(groups, key=lambda g: not g.teaches)[:count]:
                f.write(json.dumps({"step": step + 1, **g.as_row()}, ensure_ascii=False) + "\n")

    def validate(self, step):
        """Answer the validation world's questions greedily through the router. Returns whether this is the best score
        so far."""
        before = self.now()
        with self.whole():
            scores = self.scores_of(self.o, self.plain, self.processor, self.prompts)
        self.started += self.now() - before                             # validation is not training time
        self.log({"step": step, "validation": scores})
        tell("validation after step {step}: F1-Recall {f1_recall:.3f}, routing {route_accuracy:.3f}, retrievals "
             "{retrievals:.2f} (gold {gold_retrievals:.2f}), malformed {malformed:.3f}".format(step=step, **scores),
             sys.stdout)
        better = self.state["best"] is None or scores["f1_recall"] > self.state["best"]["f1_recall"]
        if better:
            self.state["best"] = {"step": step, "f1_recall": scores["f1_recall"]}
        return better

    def save(self, best=False):
        """Put the shares of the ranks together; the first one writes the checkpoint."""
        stored = {"generator": self.generator.get_state()}
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                value = full(value).contiguous()
                if not rank():
                    stored[f"{key}.{self.names[id(p)]}"] = value.cpu()
        for p, m in self.pairs:
            if m is not p:
                stored[f"master.{self.names[id(m)]}"] = full(m).cpu()
        with self.whole():
            if not rank():
                self.write(stored, best)
        gather(None)                                     # nobody ends the run while the first rank writes

    def write(self, stored, best):
        """Write a checkpoint under its own name, then let the link `last` (and `best`) point to it: a kill at any
        moment leaves a whole one."""
        name = f"checkpoint-{self.state['step']:06d}"
        folder = self.path / name
        if not folder.exists():
            new = self.path / (name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            try:
                self.save_model(new, self.plain, self.o.model, self.prompts)
                save_file(stored, new / "trainer.safetensors")
                write_json(new / "trainer.json", self.state)
                settle(*new.iterdir(), new, *(self.path / log for log in LOGS if (self.path / log).exists()))
                new.replace(folder)
            except (OSError, SafetensorError) as e:
                shutil.rmtree(new, ignore_errors=True)
                raise OSError(f"{folder}: could not be written ({e}): make room, and the same command goes on from the "
                              "checkpoint before it") from None
        for link in ("last", "best") if best else ("last",):
            (self.path / (link + ".new")).unlink(missing_ok=True)
            (self.path / (link + ".new")).symlink_to(name)
            os.replace(self.path / (link + ".new"), self.path / link)
        settle(self.path)                                # before the checkpoint that it replaces is deleted
        kept = {os.readlink(self.path / link) for link in ("last", "best") if (self.path / link).is_symlink()}
        for old in self.path.glob("checkpoint-*"):
            if old.name not in kept:
                shutil.rmtree(old)


def tell(line, file=None):
    """A line for people, once, by default on stderr. A screen that is gone (| head, a closed terminal) ends no run."""
    file = file or sys.stderr
    try:
        if not rank():
            print(line, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def list_of(value):
    return list(value) if isinstance(value, tuple) else value
