"""The released recipe as data: every setting in which the released code differs from our defaults.

    --recipe released -> follow(TRAINING or ANSWERING, the flags that were given) -> all flags

The released training is a handful of files that replace those of EasyR1, by hiyouga on GitHub.
Which commit of it is not said: they differ least from 2a0f95d of 28 February 2025, and as little
from the one before. A source that begins with EasyR1 is a file of that commit; all others are files
of github.com/OpenBMB/R1-Router.

docs/recipe.md compares it with our defaults, and says what cannot be had.
"""
from typing import NamedTuple

from plumbing.options import flag_of

EXAMPLE = "EasyR1 examples/grpo_example.yaml"       # which the released script starts from
ACTOR = "EasyR1 verl/workers/actor/config.py"
WORKERS = "EasyR1 verl/workers/fsdp_workers.py"
TRAINER = "Easy-R1/verl/trainer/ray_trainer.py"
ANSWERS = "src/answer_generation.py"


class Setting(NamedTuple):
    """What the released code has, and where it says so."""
    value: object
    source: str


ROUTING = {                 # of the router, in training as in answering
    "k": Setting(5, ANSWERS),
    "max_steps": Setting(3, "src/evaluation.sh"),
    "lower_case": Setting(True, ANSWERS),
    "several": Setting(True, ANSWERS),
}
TRAINING = {
    "mode": Setting("offline", "Easy-R1/verl/utils/rl_dataset.py"),
    "learning_rate": Setting(1e-6, EXAMPLE),
    "warmup": Setting(0, ACTOR),
    "decay": Setting(0.0, WORKERS),
    "beta2": Setting(0.999, ACTOR),
    "prompts": Setting(128, EXAMPLE),               # at most: see docs/recipe.md
    "group": Setting(5, EXAMPLE),
    "max_new_tokens": Setting(1024, EXAMPLE),
    "balance": Setting(False, TRAINER),
    "rest": Setting(0.0, TRAINER),
    "tries": Setting(1, TRAINER),
    "form": Setting("published", "Easy-R1/verl/utils/reward_score/step.py"),
    "eps": Setting(1e-6, "EasyR1 verl/trainer/core_algos.py"),
    "level": Setting("sequence", EXAMPLE),          # micro-batches of one output, each a mean
    "entropy_coef": Setting(1e-3, ACTOR),
    "entropy_on": Setting("all", "Easy-R1/verl/workers/actor/dp_actor.py"),
    **ROUTING,
}
AGREED = {                  # in which the released code and our defaults agree
    "temperature": Setting(1.0, EXAMPLE),
    "beta1": Setting(0.9, ACTOR),
    "weight_decay": Setting(0.01, EXAMPLE),
    "clip_norm": Setting(1.0, EXAMPLE),
    "clip": Setting(0.2, ACTOR),
    "clip_high": Setting(0.0, ACTOR),           # as far up as down
    "kl_coef": Setting(0.0, "Easy-R1/verl/workers/actor/dp_actor.py"),   # computed and left out
    "scale": Setting(True, "EasyR1 verl/trainer/core_algos.py"),
    "answer_rule": Setting("published", "Easy-R1/verl/utils/reward_score/step.py"),
    "similarity_weight": Setting(0.5, "Easy-R1/verl/utils/reward_score/step.py"),
    "route_weight": Setting(0.5, "Easy-R1/verl/utils/reward_score/step.py"),
    "price": Setting(0.0, "Easy-R1/verl/utils/reward_score/step.py"),
    "updates": Setting(1, ACTOR),
}
# Ours, since the release trains no adapter: ten times the rate of all weights, as adapters take it.
LORA_RATE = 1e-5
ANSWERING = {
    "max_new_tokens": Setting(2048, ANSWERS),
    "top_k": Setting(20, ANSWERS),                  # beside --temperature 1; greedy is ours
    **ROUTING,
}


def follow(settings, flags):
    """Adds the settings of a recipe to the flags that were given, {name: value}. ValueError for a
    flag that contradicts it."""
    for name, (value, source) in settings.items():
        if flags.get(name, value) != value:
            raise ValueError(f"{flag_of(name)} is {flags[name]}, but --recipe released has {value} "
                             f"({source}): leave out one of them")
        flags[name] = value
