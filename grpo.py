"""Step-GRPO in pure functions: the reward of a step, the advantage inside its group, the clipped loss, the KL term.

What flows through this file:
    output of a step -> Reward (Eq. 1, 2) -> advantages inside its group (Eq. 3)
                     -> ratio, clipped loss (Eq. 4, 5) and KL (Eq. 6)

Legend of shapes
    N sampled outputs   T tokens of the longest   M tokens under the mask
    a group is the G outputs that were sampled from one step prompt

Sources: R1-Router (arXiv 2505.22095, section 3.3), GRPO (DeepSeekMath, 2402.03300), the k3 estimator (Schulman,
"Approximating KL divergence", 2020), division by the deviation as an option (Dr. GRPO, 2503.20783), asymmetric clip
(DAPO, 2503.14476).

Deviations from the paper and from the released code, with the reason
    * The KL term enters the loss where its coefficient is above 0. The released code computes it and leaves it out.
    * The parts of a reward are kept apart, so that a log shows which of them moves: similarity alone pays a wrong base,
      recall pays guessing.
    * `form="strict"` pays nothing for text outside the tags or tags out of order; the released rule ("published", the
      default) searches for tags anywhere, and text around them is free.
"""
import re
from dataclasses import dataclass

import torch

from parts.score import answer_scores
from parts.steps import RouteStep, parse_step

# -------------------------------------------------------------------------------------------------------------- rewards


@dataclass(frozen=True)
class Reward:
    """What a step earned, part by part. Parts that do not apply to its kind are None."""
    total: float
    form: float                       # 1 where the output can be read as its kind of step
    similarity: float | None = None   # of the sub-question to the gold one, 0 to 1
    route: float | None = None        # 1 where the base is the gold one
    answer: float | None = None       # by the rule of the options
    price: float = 0.0                # paid for a retrieval


@dataclass(frozen=True)
class RewardOptions:
    """How the parts make a total. The defaults are the published rule."""
    form: str = "published"           # "published" searches for tags; "strict": parse_step must accept the whole output
    similarity_weight: float = 0.5    # Eq. 1
    route_weight: float = 0.5         # Eq. 1
    answer: str = "published"         # Eq. 2; or "recall", "f1", "exact"
    price: float = 0.0                # taken off for each retrieval that a step asks for

    def __post_init__(self):
        if self.form not in ("published", "strict") or self.answer not in ("published", "recall", "f1", "exact"):
            raise ValueError(f"RewardOptions: form {self.form!r} is published or strict, answer {self.answer!r} is "
                             "published, recall, f1 or exact")


def tag(name, output):
    """The text in the first <name> ... </name> of an output, lower-cased as the released reward reads it, or None."""
    found = re.search(f"<{name}>(.*?)</{name}>", output.lower(), re.DOTALL)
    return found and found.group(1).strip()


def read_route(output, form="published"):
    """(sub-question, base) of a routing step in lower case, "none" in both where nothing is asked for; None where it is
    malformed."""
    if form == "strict":
        step = parse_step(output)
        return (step.query.lower(), step.route.lower()) if isinstance(step, RouteStep) else None
    query, route = tag("sub-question", output), tag("ret", output)
    if tag("think", output) is None or not query or not route:
        return None
    return ("none", "none") if "none" in (query, route) else (query, route)


def read_answer(output, form="published"):
    """The answer of an answering step, or None where it is malformed."""
    if form == "strict":
        return getattr(parse_step(output), "answer", None)
    return tag("answer", output) if tag("think", output) is not None else None


def answer_reward(answer, gold, rule="published"):
    """Eq. 2: how right an answer is, 0 to 1. gold: one text or a list of accepted ones.

    The published rule is recall where there is one gold answer of more than five words, otherwise all or nothing: 1
    where recall is 1.
    """
    golds = gold if isinstance(gold, list) else [gold]
    precision, recall, f1 = answer_scores(answer, golds)
    if rule == "published":
        long = len(golds) == 1 and isinstance(golds[0], str) and len(golds[0].split()) > 5
        return recall if long else float(recall == 1)
    if rule == "exact":
        return float(precision == recall == 1)
    return {"recall": recall, "f1": f1}[rule]


def step_reward(output, step, similarity, options=RewardOptions()):
    """The reward of one sampled output.

    step: a step of a published file, {"step_type": "ret" | "ans", "answer": ...}; similarity(query, gold) -> float is
    asked only where both are sub-questions. Returns a Reward; a malformed output has total 0.

        Eq. 1   r_ret = 0.5 * sim(query, gold query) + 0.5 * [base = gold base]
                "none" is similar to "none" and to nothing else; a price comes off, down to 0
        Eq. 2   r_ans = recall, or [recall = 1] for short golds
    """
    if step["step_type"] == "ans":
        answer = read_answer(output, options.form)
        if answer is None:
            return Reward(0.0, 0.0, answer=0.0)
        r = answer_reward(answer, step["answer"], options.answer)
        return Reward(r, 1.0, answer=r)
    asked = read_route(output, options.form)
    if asked is None:
        return Reward(0.0, 0.0, similarity=0.0, route=0.0)
    query, base = asked
    gold_query, gold_base = step["answer"]["query"].strip().lower(), step["answer"]["retriever"][0].strip().lower()
    if gold_query == "none":                                            # said of either, it is meant of both
        gold_base = "none"
    nothing, gold_nothing = base == "none", gold_base == "none"
    sim = float(nothing == gold_nothing) if nothing or gold_nothing else float(similarity(query, gold_query))
    route = float(base == gold_base)
    price = 0.0 if nothing else options.price
    total = max(0.0, options.similarity_weight * sim + options.route_weight * route - price)
    return Reward(total, 1.0, similarity=sim, route=route, price=price)


def similarity_table(outputs, steps, encode, form="published"):
    """One batched call of the encoder for many outputs -> similarity(query, gold) that looks the result up.

    encode: list of texts -> (texts, dim) normalised rows, as the retriever's encoder gives them for queries.
    """
    pairs = [(read_route(o, form), s) for o, s in zip(outputs, steps) if s["step_type"] == "ret"]
    texts = sorted({t for asked, s in pairs if asked for t in (asked[0], s["answer"]["query"].strip().lower())})
    if not texts:
        return lambda query, gold: 0.0
    vectors = dict(zip(texts, torch.as_tensor(encode(texts))))
    # a cosine below 0 pays 0; rounded, since texts of the same words in another order would differ in the last bit, and
    # a group is mixed where rewards differ at all
    return lambda query, gold: max(0.0, round(float(vectors[query] @ vectors[gold]), 6))


# -------------------------------------------------------------------------------------------------- advantages and loss


def group_advantages(rewards, groups, scale=True, eps=1e-6):
    """How much better than its group an output was.

        Eq. 3   A_i = (r_i - mean(r)) / (std(r) + eps), over the outputs of its group

    rewards (N,), groups (N,) any numbers, equal inside a group -> (N,). std divides by n - 1; scale=False leaves the
    division out. A group of one, or one in which all rewards are equal, gives 0: it says nothing about what was better.
    """
    given, groups = torch.as_tensor(rewards), torch.as_tensor(groups)
    rewards = given.double()
    advantages = torch.zeros_like(rewards)
    for g in groups.unique():
        here = groups == g
        r = rewards[here]
        if len(r) > 1 and r.max() > r.min():
            advantages[here] = (r - r.mean()) / (r.std() + eps if scale else 1.0)
    return advantages.to(given.dtype if given.is_floating_point() else torch.float32)


def grpo_loss(logp, old_logp, advantages, mask, *, ref_logp=None, clip=0.2, clip_high=None, kl_coef=0.0,
              level="token", normalizer=None):
    """The clipped policy-gradient loss with its KL term -> (loss, metrics).

    logp (with gradient), old_logp, ref_logp, mask (N, T); advantages (N,), the same for all tokens of an output.

        Eq. 4   ratio = exp(logp - old_logp)
        Eq. 5   l = -min(ratio * A, clamp(ratio, 1 - clip, 1 + clip_high) * A)      clip_high = clip unless it is given
        Eq. 6   k3 = exp(ref - logp) - (ref - logp) - 1,     loss = mean(l + kl_coef * k3)

    level "token": the mean over all tokens under the mask; "sequence": the mean over outputs of each output's mean.
    normalizer: the number of tokens (or outputs) of the whole batch where this call sees only a part of it. Raises
    ValueError for a KL term without reference.
    """
    if kl_coef and ref_logp is None:
        raise ValueError(f"grpo_loss: kl_coef is {kl_coef}, but there is no ref_logp to measure from")
    if level not in ("token", "sequence"):
        raise ValueError(f"grpo_loss: level is {level!r}, expected 'token' or 'sequence'")
    mask = mask.bool()
    lengths = mask.sum(1, keepdim=True)                                             # (N, 1)
    weight = 1.0 if level == "token" else 1.0 / lengths.clamp(min=1).to(logp.dtype)
    count = normalizer or (int(mask.sum()) if level == "token" else int((lengths > 0).sum())) or 1
    weight = (weight * torch.ones_like(logp))[mask] / count                         # (M,), sum 1 over the whole batch
    A = advantages[:, None].expand_as(logp)[mask]                                   # (M,)
    log_ratio = logp[mask] - old_logp[mask]
    ratio = log_ratio.exp()                                                         # Eq. 4
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = (weight * -torch.min(ratio * A, clipped * A)).sum()                      # Eq. 5
    r = ratio.detach() if len(ratio) else torch.ones(1)
    metrics = {"clip_fraction": (r != clipped.detach()).float().mean().item() if len(ratio) else 0.0,
               "ratio_min": r.min().item(), "ratio_max": r.max().item()}
    if ref_logp is not None:
        d = ref_logp[mask] - logp[mask]
        k3 = d.exp() - d - 1                                                        # Eq. 6
        metrics["kl"] = (weight * k3).sum().item() if len(k3) else 0.0
        if kl_coef:
            loss = loss + kl_coef * (weight * k3).sum()
    return loss, metrics
