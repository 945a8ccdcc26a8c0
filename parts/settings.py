"""The options of train.py: each field is a flag, with its default, limits and help.

Those of every run (learning rate, steps, checkpoints) are RunOptions in plumbing/run.py.
"""
from dataclasses import dataclass

from parts.recipes import AGREED, LORA_RATE, TRAINING, follow
from plumbing.options import flag_of, option
from plumbing.run import RunOptions


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Options of both kinds of training; those of a run stand in plumbing/run.py."""
    model: str = option("weights/tiny-warm", "model directory to start from; without weights in "
                        "it, from random ones")
    dtype: str = option("float32", "type of the weights in a pass; the optimizer works in float32 "
                        "in any case", choices=("float32", "bfloat16"))
    checkpointing: bool = option(False, "compute activations again in the backward pass instead of "
                                 "keeping them")
    threads: int = option(0, "CPU threads; 0: 1 for a small model, else as torch likes", most=1024)
    val_world: str = option("", "a world to validate on through the router, for the choice of the "
                            "best checkpoint; by default the embedded one")
    val: str = option("", "a file to validate on in its place: questions, asked through the router "
                      "of the bases of --kb or --val-world; mode offline also steps, judged by the "
                      "rewards of greedy outputs")
    val_questions: int = option(260, "questions of a validation, or rows of its step file", least=1)
    kb: tuple = option((), "bases of your own in place of a world's: text=DIR image=DIR table=DIR",
                       nargs="+", metavar="NAME=DIR")
    images: str = option("", "folder of the pictures of question files; by default the file's own")


@dataclass(frozen=True)
class SftOptions(TrainOptions):
    """Supervised training on step files."""
    data: tuple = option((), "step files, each may carry its share of the examples: steps.jsonl=3 "
                         "copy.jsonl=1", nargs="+")
    tokens: int = option(1536, "token budget of a batch, padding included", least=1)
    previous_token_head: bool = option(False, "start from random weights with one head of the "
                                       "first layers attending to the token before")


@dataclass(frozen=True)
class GrpoOptions(TrainOptions):
    """Step-GRPO and its ablations; by default weights/tiny-warm learns in the embedded world."""
    recipe: str = option(None, "released: train as the released code does (mode offline); docs/"
                         "recipe.md lists its settings", choices=("released",))
    out: str = option("runs/step-grpo", "folder of the run; an unfinished run there is continued")
    steps: int = option(250, "number of updates; outcome: 180", least=1)
    val_every: int = option(50, "updates between validations; 0: none")
    mode: str = option("online", "offline: step files with gold history; online: live "
                       "trajectories, a group a step, by gold hops; outcome: whole trajectories, "
                       "by final answers alone", choices=("offline", "online", "outcome"))
    credit: str = option("state", "outcome: whose reward a step is compared with: state, of all "
                         "steps that answered the same prompt; trajectory, of all trajectories of "
                         "the question", choices=("state", "trajectory"))
    data: tuple = option((), "offline: step files; online, outcome: question files in place of the "
                         "world's", nargs="+")
    world: str = option("", "online, outcome: a world to practise in; by default the embedded one")
    encoder: str = option("lexical", "offline: the encoder that measures similarity; online takes "
                          "the text base's")
    prompts: int = option(32, "step prompts an update (offline, online)", least=1)
    questions: int = option(8, "questions an update (outcome)", least=1)
    group: int = option(8, "samples of a prompt: the group G", least=2)
    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the loss",
                                least=0.01)
    max_new_tokens: int = option(64, "longest output", least=1)
    call_tokens: int = option(65536, "token budget of a model call in sampling: prompts, and room "
                              "for all outputs", least=1)
    balance: bool = option(True, "draw step prompts evenly over their gold route (offline, "
                           "online), questions over their routes (outcome, where they have hops; "
                           "with credit by state it is off unless it is asked for)")
    answer_share: float = option(0.25, "share of answering steps among the prompts, where they are "
                                 "balanced", most=1)
    rest: float = option(0.8, "how much less often solved prompts are drawn: 0 as often, 1 never "
                         "again", most=1)
    follow: str = option("random", "online: the candidate that the trajectory goes on with",
                         choices=("random", "best"))
    match: float = option(0.9, "online: how similar to an open gold hop a sub-question must be to "
                          "stand for it")
    ready: bool = option(True, "online: measure a sub-question by those open hops alone that can "
                         "be asked for by now; else a later hop with an invented name pays")
    open_questions: int = option(160, "online: trajectories that are under way at once", least=1)
    k: int = option(2, "online, outcome: passages of evidence", least=1)
    max_steps: int = option(4, "online, outcome: sub-questions at most", least=1)
    lower_case: bool = option(False, "read outputs in lower case: sub-questions, searches, answers")
    several: bool = option(False, "a routing step may name several bases, with commas between; "
                           "with --form strict such a step earns nothing")
    form: str = option("strict", "of the reward: strict pays only what the router can read, "
                       "published searches for tags", choices=("strict", "published"))
    similarity_weight: float = option(0.5, "of the routing reward")
    route_weight: float = option(0.5, "of the routing reward")
    answer_rule: str = option("published", "of the answering reward",
                              choices=("published", "recall", "f1", "exact"))
    price: float = option(0.0, "taken off the reward for each retrieval asked for")
    scale: bool = option(True, "divide advantages by the group's standard deviation")
    eps: float = option(0.2, "added to the deviation of a group's rewards (Eq. 3): groups that "
                        "differ by less teach less; outcome: by default 1e-6", before=1e-6)
    clip: float = option(0.2, "the ratio is clipped below 1 - clip")
    clip_high: float = option(0.0, "the ratio is clipped above 1 + clip_high; 0: as --clip")
    kl_coef: float = option(0.0, "weight of the KL term; 0 computes no reference")
    entropy_coef: float = option(0.0, "bonus for entropy on the tokens that --entropy-on names")
    entropy_on: str = option("route", "the tokens between the ret tags, or all that were sampled",
                             choices=("route", "all"))
    level: str = option("token", "of the loss: mean over all tokens, or over outputs",
                        choices=("token", "sequence"))
    fill: int = option(8, "sample until this many groups of an update teach something; outcome: "
                       "until the trajectories of so many questions, by default 4, earned "
                       "different rewards")
    tries: int = option(4, "sample at most this many times for an update", least=1)
    updates: int = option(1, "passes over a batch of samples; above 1 the clip matters", least=1)
    tokens: int = option(2048, "token budget of a micro-batch of the update: prompts and outputs",
                         least=1)
    lora_rank: int = option(0, "train an adapter of this rank instead of all weights; 0 trains all",
                            most=4096)
    lora_alpha: float = option(32.0, "the adapter is scaled by alpha / rank")
    drop: tuple = option((), "offline: rows to leave out", nargs="*",
                         choices=("no_picture", "repeats", "no_information"))


@dataclass(frozen=True)
class ShowOptions(GrpoOptions):
    """One question as training sees it: the group of each step, its rewards and advantages."""
    question: int = option(0, "number of the question in the world's file")
    follow: str = option("best", "the candidate that the trajectory goes on with",
                         choices=("random", "best"))


@dataclass(frozen=True)
class ExportOptions:
    """A checkpoint of a run as a plain model directory; an adapter is merged into its base."""
    run: str = option("runs/run", "folder of the run")
    which: str = option("best", "the checkpoint with the best validation, or the last one",
                        choices=("best", "last"))
    out: str = option("weights/mine", "model directory to write; other files there stay")
    dtype: str = option("float16", "type of the weights on disk",
                        choices=("float32", "bfloat16", "float16"))


OF_STEPS = ("encoder", "form", "similarity_weight", "route_weight", "answer_rule", "price")


def complete(flags):
    """Adds to the flags that were given, {name: value}, what follows from them."""
    if "recipe" in flags:
        follow_released(flags)
    if "credit" in flags and flags.get("mode") != "outcome":
        raise ValueError("--credit does nothing but in --mode outcome: steps are judged one by one "
                         "in the others")
    if flags.get("mode") == "outcome":
        for name in OF_STEPS:
            if name in flags:
                raise ValueError(f"{flag_of(name)} does nothing in --mode outcome, where the "
                                 "recall of the final answer is the only reward: leave it out")
        flags.setdefault("steps", 180)          # some six minutes of a core
        flags.setdefault("fill", 4)             # of 8 questions: waiting for all takes too long
        flags.setdefault("eps", 1e-6)           # rewards differ by whole answers
        if flags.get("credit", "state") == "state":
            flags.setdefault("balance", False)  # it would need gold routes


def follow_released(flags):
    """Adds what --recipe released stands for to the flags that were given, {name: value}."""
    if "encoder" not in flags:
        raise ValueError("--recipe released measures similarity with BGE-M3: name its directory "
                         "with --encoder")
    settings = {**TRAINING, **AGREED}
    if flags.get("lora_rank"):                  # the release has no rate for an adapter
        del settings["learning_rate"]
        flags.setdefault("learning_rate", LORA_RATE)
    follow(settings, flags)
