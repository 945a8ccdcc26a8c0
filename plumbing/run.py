"""A run of training: a folder that can be continued, the optimizer, the schedule, checkpoints.

What flows through this file:
    options -> open_run: lock, load, shard, optimizer, restore -> the numbers of the updates to do
    gradients -> clipped -> AdamW on float32 masters -> log.jsonl, validation, checkpoints

A run is a folder: options.json, log.jsonl (a line an update), samples.jsonl (what some updates
learned from), and checkpoints, of which the links `last` and `best` name two. A checkpoint is what
the caller's `save` writes, with the state of the optimizer beside it. A run that was stopped goes
on from `last` as if it had not been; that is exact on the CPU.

What is trained, and on what, is the caller's: `save`, `load` and `validate` are passed in.

Reading order: open_run, Run.updates, Run.optimize; MasterAdamW; Run.save.
"""
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from plumbing.files import (lock, point, read_json, remove, replacing, settle, time_left,
                            whole_lines, write_json)
from plumbing.options import check_options, fill, flag_of, option
from plumbing.ranks import empty, full, gather, rank, sharded, share_of, tell
from plumbing.weights import write_weights


DEFAULT_RATE = 3e-4


@dataclass(frozen=True)
class RunOptions:
    """Options that every run has. Each becomes a flag of the same name."""
    out: str = option("runs/run", "folder of the run: options, log, checkpoints; an unfinished one "
                      "is continued")
    seed: int = option(0, "seed of everything that is random", most=2 ** 63 - 1)
    steps: int = option(1000, "number of updates", least=1)
    learning_rate: float = option(None, "peak of the learning rate [3e-4; must be named where all "
                                  "weights of a model above 100 M are trained]")
    warmup: int = option(10, "updates over which the learning rate rises to its peak")
    decay: float = option(0.5, "share of --steps, the last ones, over which the rate falls to a "
                          "tenth; 0 keeps it", most=1)
    weight_decay: float = option(0.01, "AdamW's decay of matrices (not of norms and biases)")
    beta1: float = option(0.9, "AdamW's memory of the gradient", most=0.999999)
    beta2: float = option(0.98, "AdamW's memory of the squared gradient", most=0.999999)
    clip_norm: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    device: str = option("cpu", "where to train: cpu, cuda, cuda:1 ...; under torchrun cpu or cuda "
                         "(a GPU each)")
    clock: str = option("wall", "what --minutes and the seconds of the log count: time on the "
                        "wall, or of the processor, which other work on the machine hardly changes",
                        choices=("wall", "cpu"))
    save_every: int = option(200, "updates between checkpoints", least=1)
    log_every: int = option(10, "updates between lines on the screen; the log file has every one",
                            least=1)
    minutes: float = option(0.0, "stop after this many minutes, wherever the schedule of --steps "
                            "stands; 0: no limit")
    val_every: int = option(0, "updates between validations; 0: none")

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class Counters:
    """What every trainer.json holds; the caller may add to it."""
    step: int = option(0)           # updates that are done
    seconds: float = option(0.0)
    tokens: int = option(0)
    best: dict = option(None)       # {"step", score} of the best validation


MAY_CHANGE = ("out", "steps", "minutes", "save_every", "log_every", "threads")  # when a run goes on
LOGS = ("log.jsonl", "samples.jsonl")


# -------------------------------------------------------------------------------------------- a run

@contextmanager
def open_run(options, model, *, save, load, validate, best_by):
    """The run in the folder options.out, new or continued. One process at a time (with its ranks)
    works in it.

    save(path, model) writes a model directory and load(path, model) reads one; validate(model,
    number) returns the scores after that update, of which `best_by` names the one that chooses the
    best checkpoint.
    """
    run = Run(options, model, save, load, validate, best_by)
    one_writer = nullcontext() if rank() else lock(run.path, wait=False)
    with one_writer, making_room(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        stored = run.load()                     # weights and counters; what `restore` needs
        run.model = sharded(model)
        run.optimizer = MasterAdamW(run.model.named_parameters(), options.learning_rate,
                                    (options.beta1, options.beta2), options.weight_decay)
        run.restore(stored)
        if not rank():
            write_json(run.path / "options.json", asdict(options))
        run.start_clock()
        run.stop_on_signals()
        yield run


class Run:
    """A run at work. Its `model` is what is trained, one share of it on each rank; `plain` is what
    samples, validates and is saved (see `whole`)."""

    def __init__(self, options, model, save, load, validate, best_by):
        self.o = options
        self.path = Path(options.out)
        self.plain = model
        self.save_model, self.load_model = save, load
        self.scores_of, self.best_by = validate, best_by
        self.state = asdict(Counters())         # becomes trainer.json
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.signal = None                      # the number of one that came
        self.recent = []                        # rows of the log since the last line on the screen

    # ------------------------------------------------------------------------------------- the loop

    def updates(self):
        """Yields the numbers of the updates still to do, from 0. Validates and saves between them;
        a signal ends the run behind the update under way."""
        self.agree()
        for number in range(self.state["step"], self.o.steps):
            if self.progress(number) >= 1:
                break
            yield number
            self.agree()
            done = number + 1
            over = done == self.o.steps or self.progress(done) >= 1
            best = False
            if self.o.val_every and (over or done % self.o.val_every == 0):
                best = self.validate(done)
            if best or over or self.stop or done % self.o.save_every == 0:
                self.save(best)
            if self.stop:
                tell(f"stopped after update {done}; the same command continues")
                sys.exit(128 + self.stop)
        done = self.state["step"]
        if 0 < done < self.o.steps:
            rate = self.learning_rate(done - 1)
            tell(f"{self.o.minutes:g} minutes were over after update {done} of {self.o.steps}, "
                 f"where the learning rate stood at {rate:.2g}; a new run with --steps {done} "
                 "takes as long, and there it falls to its end")
        summary = {"run": str(self.path), "steps": self.state["step"],
                   "tokens": self.state["tokens"], "seconds": round(self.state["seconds"], 1),
                   "best": self.state["best"]}
        tell(json.dumps(summary), sys.stdout)

    def agree(self):
        """Ranks leave the loop together: the first rank's clock counts, and a signal to any of them
        stops all."""
        clocks_and_signals = gather((self.now() - self.started, self.signal))
        self.elapsed, _ = clocks_and_signals[0]
        self.stop = max((number for _, number in clocks_and_signals if number), default=None)

    def progress(self, number):
        """Share of the run that is behind us after that many updates, by updates or by the clock,
        whichever is further: for the end, and the time left."""
        by_updates = number / self.o.steps
        by_clock = self.elapsed / (60 * self.o.minutes) if self.o.minutes else 0.0
        return max(by_updates, by_clock)

    def start_clock(self):
        self.now = time.process_time if self.o.clock == "cpu" else time.time
        self.started = self.now() - self.state["seconds"]

    def stop_on_signals(self):
        """A signal is noted from here on, and `updates` ends the run when it comes by."""
        def note(number, frame):
            self.signal = number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue                                        # started by nohup
            signal.signal(number, note)

    def learning_rate(self, number):
        """Linear warm-up, then constant, then a linear fall to a tenth over the last `decay` of the
        updates, whatever the clock says: the same command gives the same run on another day."""
        o = self.o
        rise = min(1.0, (number + 1) / max(1, o.warmup))
        fall = 1.0
        if o.decay:
            fall = 0.1 + 0.9 * min(1.0, (1 - number / o.steps) / o.decay)
        return o.learning_rate * rise * max(0.1, fall)

    def optimize(self, number):
        """One step of AdamW with the gradient that the model holds. Returns what a log says of it.

        A gradient that is not finite ends the run before it touches the weights.
        """
        rate = self.learning_rate(number)
        norm = self.optimizer.clip(self.o.clip_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {number + 1}: the gradient is {norm}; the last good "
                                     f"checkpoint is {self.path / 'last'}; try a lower "
                                     "--learning-rate")
        self.optimizer.step(rate)
        return {"learning_rate": rate, "grad_norm": norm}

    def validate(self, number):
        """Measures the model, outside the time of training. Returns whether it is the best so far.
        """
        start = self.now()
        with self.whole():
            scores = self.scores_of(self.plain, number)
        self.started += self.now() - start
        self.record({"step": number, "validation": scores})
        score, best = scores[self.best_by], self.state["best"]
        if best is not None and score <= best[self.best_by]:
            return False
        self.state["best"] = {"step": number, self.best_by: score}
        return True

    @contextmanager
    def whole(self):
        """Inside, the plain model has all weights on every rank: for saving, and for sampling,
        where ranks end at different tokens and must not wait for each other at every layer."""
        if self.model is self.plain:
            yield
            return
        for p, share in zip(self.plain.parameters(), self.model.parameters()):
            p.data = full(share.detach())
        yield
        empty(self.plain)

    # -------------------------------------------------------------------------------------- the log

    def record(self, row):
        """A line of log.jsonl, for programs. Returns the row with the seconds so far."""
        self.state["step"] = row["step"]
        self.state["seconds"] = self.now() - self.started
        row = {**row, "seconds": round(self.state["seconds"], 2)}
        self.append("log.jsonl", [row])
        return row

    def say(self, row, without=()):
        """A line for people every log_every updates: the means since the line before, and the time
        left. without: beginnings of names that are for the log alone."""
        self.recent.append(row)
        if row["step"] % self.o.log_every and row["step"] != self.o.steps:
            return
        shown = []
        for name in row:
            values = [r[name] for r in self.recent if isinstance(r.get(name), (int, float))]
            if values and name not in ("step", "seconds") and not name.startswith(tuple(without)):
                shown.append(f"{name} {sum(values) / len(values):.3g}")
        left = time_left(row["seconds"], self.progress(row["step"]))
        tell(f"step {row['step']}/{self.o.steps}  {'  '.join(shown)}  {row['seconds']:.0f} s, "
             f"{left:.0f} s left", sys.stdout)
        self.recent = []

    def record_samples(self, number, rows):
        """Lines of samples.jsonl, behind every log_every-th update: some of what it learned from.
        """
        if number % self.o.log_every == 0:
            self.append("samples.jsonl", [{"step": number, **row} for row in rows])

    def append(self, name, rows):
        if rank():
            return
        with open(self.path / name, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    # ---------------------------------------------------------------------------------- checkpoints

    def save(self, best=False):
        """Puts the shares of the ranks together; the first rank writes the checkpoint."""
        stored = self.optimizer.stored()
        stored["generator"] = self.generator.get_state()
        with self.whole():
            if not rank():
                self.write(stored, best)
        gather(None)                            # nobody ends the run while the first rank writes

    def write(self, stored, best):
        """Writes a checkpoint under its own name, then lets the link `last` (and `best`) name it: a
        kill at any moment leaves a whole one."""
        name = f"checkpoint-{self.state['step']:06d}"
        if not (self.path / name).exists():
            try:
                self.write_checkpoint(self.path / name, stored)
            except (OSError, SafetensorError) as error:
                raise OSError(f"{self.path / name}: could not be written ({error}): make room, and "
                              "the same command goes on from the checkpoint before it") from None
        point(self.path / "last", name)
        if best:
            point(self.path / "best", name)
        links = [self.path / link for link in ("last", "best")]
        in_use = {os.readlink(link) for link in links if link.is_symlink()}
        for pattern in CHECKPOINTS:
            for old in self.path.glob(pattern):
                if old.name not in in_use:
                    remove(old)

    def write_checkpoint(self, folder, stored):
        with replacing(folder) as new:
            self.save_model(new, self.plain)
            write_weights(stored, new / "trainer.safetensors")
            write_json(new / "trainer.json", self.state)
            settle(*(self.path / log for log in LOGS if (self.path / log).exists()))

    def load(self):
        """Continues from `last`, where there is one: weights, counters; log lines of lost updates
        are dropped. Returns what `restore` reads, {} in a new run."""
        last = self.path / "last"
        if not os.path.lexists(last):                           # new, or killed before it saved
            self.clear()
            return {}
        self.check_same()
        with reading_checkpoint(last):
            self.state |= read_json(last / "trainer.json")
            self.state |= asdict(fill(Counters, self.state, last / "trainer.json"))
            stored = load_file(last / "trainer.safetensors", device="cpu")
            self.load_model(last, self.plain)
        for name in LOGS:
            if not rank() and (self.path / name).exists():
                cut_log(self.path / name, self.state["step"])
        tell(f"continuing {self.path} after step {self.state['step']}")
        return stored

    def restore(self, stored):
        """Optimizer and random state of a checkpoint, whatever the number of ranks that wrote it.
        """
        if stored:
            with reading_checkpoint(self.path / "last"):
                self.optimizer.restore(stored)
                self.generator.set_state(stored["generator"])

    def clear(self):
        """Deletes what a run left that was killed before its first checkpoint. ValueError where
        that may be somebody else's."""
        stale = []
        for pattern in (*LOGS, *CHECKPOINTS):
            stale += self.path.glob(pattern)
        if stale and not (self.path / "options.json").exists():
            raise ValueError(f"{stale[0]}: not of a run of this program (there is no options.json):"
                             " name another --out, or move it away")
        for path in stale:
            if not rank():
                remove(path)

    def check_same(self):
        """ValueError where the folder holds a run with other options. An option that is younger
        than that run was at its default, or what its `before` says."""
        before = read_json(self.path / "options.json")
        for f in fields(self.o):
            value = as_json(getattr(self.o, f.name))
            was = before.get(f.name, as_json(f.metadata.get("before", f.default)))
            if f.name not in MAY_CHANGE and value != was:
                raise ValueError(f"{self.path} holds a run with another {flag_of(f.name)} ({was}); "
                                 "name another --out, or remove it")


CHECKPOINTS = ("checkpoint-*", ".checkpoint-*")                 # whole ones, half-written ones


@contextmanager
def making_room(path):
    """A file that could not be written, of which the system does not say the name, gets one."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.strerror:
            raise
        raise OSError(f"{path}: {error.strerror}: make room, and the same command goes on from the "
                      "last checkpoint") from None


@contextmanager
def reading_checkpoint(path):
    """Whatever is wrong with a checkpoint becomes one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: no whole checkpoint of this run ({type(error).__name__}: "
                         f"{reason}): let the link name another one, or name another --out"
                         ) from None


def cut_log(log, step):
    """Cuts the lines of lost updates, and a torn one, off the end of a log."""
    lines, _ = whole_lines(log)
    size = 0                                                    # of the lines to keep, in bytes
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{log}:{number}: no line of a run's log: repair it, or name another "
                             "--out") from None
        size += len(line) + 1
    os.truncate(log, size)


def as_json(value):
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------ the optimizer

class MasterAdamW:
    """AdamW that works in float32 whatever the type of the weights.

    bfloat16 weights cannot hold a small update (8 bits of mantissa), so each has a float32 copy,
    its master: the master is updated and rounded into the weight. A float32 weight is its own.
    """

    def __init__(self, named_parameters, learning_rate, betas=(0.9, 0.999), weight_decay=0.0):
        self.pairs, self.names = [], {}         # (weight, master); id(master) -> name
        matrices, others = [], []
        for name, p in named_parameters:
            if not p.requires_grad:
                continue
            master = p if p.dtype == torch.float32 else p.detach().float()
            self.pairs.append((p, master))
            self.names[id(master)] = name
            (matrices if master.dim() > 1 else others).append(master)
        groups = [{"params": matrices, "weight_decay": weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        self.inner = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def clip(self, norm=0.0):
        """Moves the gradients to the masters and scales them to this norm at most; 0 does not.
        Returns the norm that they had, over all ranks."""
        for p, master in self.pairs:
            if master is not p:
                master.grad = None if p.grad is None else p.grad.float()
                p.grad = None
        masters = [master for _, master in self.pairs]
        before = torch.nn.utils.clip_grad_norm_(masters, norm or math.inf)
        return full(before).item()

    @torch.no_grad()
    def step(self, learning_rate):
        """One update of the masters, and of the weights from them. The gradients are gone then."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        for p, master in self.pairs:
            if master is not p:
                p.copy_(master)

    def stored(self):
        """{name: tensor} of all that an update depends on, whole on the first rank."""
        tensors = {}
        for master, state in self.inner.state.items():
            for key, value in state.items():
                value = full(value).contiguous()                # all ranks take part
                if not rank():
                    tensors[f"{key}.{self.names[id(master)]}"] = value.cpu()
        for p, master in self.pairs:
            if master is not p:
                tensors[f"master.{self.names[id(master)]}"] = full(master).cpu()
        return tensors

    @torch.no_grad()
    def restore(self, tensors):
        """What `stored` returned, for any number of ranks. KeyError where a shape does not fit."""
        for _, master in self.pairs:
            name = self.names[id(master)]
            for key in ("exp_avg", "exp_avg_sq", "master"):
                tensor = tensors.get(f"{key}.{name}")
                if tensor is not None and tensor.shape != master.shape:
                    raise KeyError(f"shape {list(tensor.shape)} instead of {list(master.shape)}: "
                                   f"{key}.{name}")
            if f"step.{name}" in tensors:                       # else no update was made yet
                state = {"step": tensors[f"step.{name}"].to(master.device)}
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = share_of(tensors[f"{key}.{name}"], master)
                self.inner.state[master] = state
            if f"master.{name}" in tensors:
                master.copy_(share_of(tensors[f"master.{name}"], master))
