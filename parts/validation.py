"""Validations between updates: what the best checkpoint is chosen by.

    questions -> the router, greedy -> F1-Recall, routing, costs
    steps of a file -> greedy outputs -> their rewards
"""
import sys

import torch

from parts.evaluate import cell, evaluate
from parts.groups import groups_of, mean_parts
from plumbing.ranks import tell


def on_questions(router_of_model, rows):
    """validate(model, number of the update) -> scores of the router on these questions, of which
    "f1_recall" is to choose by; "died_out" says that it hardly searches any more."""
    searches = []                               # a question, of each validation so far

    def validate(model, number):
        scores = evaluate(router_of_model(model).run(rows))
        searches.append(scores["retrievals"])
        scores["died_out"] = scores["retrievals"] < 0.1 * max(searches)
        tell(f"validation after step {number}: F1-Recall {cell(scores['f1_recall'])}, routing "
             f"{cell(scores['route_accuracy'])}, retrievals {cell(scores['retrievals'], '.2f')} "
             f"(gold {cell(scores['gold_retrievals'], '.2f')}), malformed "
             f"{cell(scores['malformed'])}", sys.stdout)
        if scores["died_out"]:
            tell(f"retrieval has died out: {scores['retrievals']:.2f} searches a question, once "
                 f"{max(searches):.2f}. Right answers are too rare to pay for a search: start from "
                 "a better model, or mix in easier questions", sys.stdout)
        return scores

    return validate


def on_steps(router_of_model, steps, rewards_of):
    """validate(model, number of the update) -> means of the rewards of greedy outputs for steps of
    a file, of which "reward" is to choose by; a prompt that is too long earns 0.

    rewards_of: as parts.groups.groups_of takes it.
    """
    def validate(model, number):
        router = router_of_model(model)
        generator = torch.Generator(next(model.parameters()).device)    # greedy: nothing is random
        size = router.options.batch_size            # pictures of so many prompts at a time
        outputs = []
        for start in range(0, len(steps), size):
            conversations = [step.conversation() for step in steps[start:start + size]]
            outputs += router.sample(conversations, generator)
        groups = groups_of(steps, outputs, rewards_of)
        parts = [group.parts[0] for group in groups if group is not None]
        scores = mean_parts(parts)
        scores["reward"] = sum(part.total for part in parts) / len(steps)
        shown = "  ".join(f"{name} {cell(value)}" for name, value in scores.items())
        too_long = len(steps) - len(parts)
        tell(f"validation after step {number}: {shown}, {too_long} too long", sys.stdout)
        return {**scores, "too_long": too_long}

    return validate
