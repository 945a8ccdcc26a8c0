"""Step-GRPO in pure functions: step rewards, group advantages, the clipped loss, the KL term.

What flows through this file:
    output of a step -> Reward (Eq. 1, 2) -> advantage inside its group (Eq. 3)
    final answer of a trajectory          -> advantage of each step among those of its state (Eq. 7)
    advantages -> ratio, clipped loss (Eq. 4, 5) and KL term (Eq. 6)

Legend of shapes
    N sampled outputs   T tokens of the longest   M tokens under the mask
    a group: the G outputs that were sampled from one step prompt

Sources: R1-Router (arXiv 2505.22095, section 3.3), GRPO (DeepSeekMath, 2402.03300), the k3
estimator (Schulman, "Approximating KL divergence", 2020), advantages without division (Dr. GRPO,
2503.20783), asymmetric clip (DAPO, 2503.14476).

Two ways to judge an output
    published   the default of RewardOptions: the released rule, number for number. Tags are found
                anywhere; sub-questions are compared whatever they say, "none" and "" too; several
                known bases earn the similarity alone, an unknown one nothing
    strict      the default of training (--form): parse_step must accept the whole output, so text
                outside the tags, or tags out of order, earn nothing; none in one place means none
                in both, and is similar to none alone; a negative cosine pays 0

Deviations from the paper and from the released code, with the reason
    * The KL term enters the loss where its coefficient is above 0; the released code leaves it out.
    * The parts of a reward are kept apart, so that a log shows which of them moves: a wrong base
      still earns its similarity, and guessing earns recall.
    * Similarities are rounded to six digits (see similarity_table).
    * eps of Eq. 3 is what the caller gives: train.py takes 0.2 for step rewards (--eps), the
      release 1e-6.
    * Credit by state is the step term of GiGPO (2505.10978) alone, without discount and without its
      trajectory term: one idea, and it is enough in the embedded world.
"""
import re
from dataclasses import dataclass

import torch

from parts.score import answer_scores
from parts.steps import BASE_OF, AnswerStep, RouteStep, gold_route, parse_step

# ---------------------------------------------------------------------------------------- rewards


@dataclass(frozen=True)
class Reward:
    """What a step earned, part by part. Parts that do not apply to its kind are None."""
    total: float
    form: float                         # 1 where the output can be read as its kind of step
    similarity: float | None = None     # of the sub-question to the gold one, 0 to 1
    route: float | None = None          # 1 where the base is the gold one
    answer: float | None = None         # by the rule of the options
    price: float = 0.0                  # paid for a retrieval


@dataclass(frozen=True)
class RewardOptions:
    """How the parts make a total. The defaults are the published rule."""
    form: str = "published"             # or "strict": how an output is read
    similarity_weight: float = 0.5      # Eq. 1
    route_weight: float = 0.5           # Eq. 1
    answer: str = "published"           # Eq. 2; or "recall", "f1", "exact"
    price: float = 0.0                  # taken off for each retrieval that a step asks for

    def __post_init__(self):
        if self.form not in ("published", "strict"):
            raise ValueError(f"form is {self.form!r}: give published or strict")
        if self.answer not in ("published", "recall", "f1", "exact"):
            raise ValueError(f"answer is {self.answer!r}: give published, recall, f1 or exact")


def tag(name, output):
    """The text in the first <name>...</name> of an output in lower case, or None."""
    match = re.search(f"<{name}>(.*?)</{name}>", output.lower(), re.DOTALL)
    return match.group(1).strip() if match else None


def read_route(output, form="published"):
    """The (sub-question, base) of a routing step: ("who is it?", "text retriever"), in lower case;
    None where the output is malformed. Published: several bases are joined by commas, and ("none",
    "text retriever") stays as it is."""
    if form == "strict":
        step = parse_step(output)
        if not isinstance(step, RouteStep):
            return None
        return step.query.lower(), step.route.lower()
    query, bases = tag("sub-question", output), tag("ret", output)
    if tag("think", output) is None or query is None or bases is None:
        return None
    names = [name.strip() for name in bases.split(",")]
    if names != ["none"] and not set(names) <= set(BASE_OF):
        return None
    return query, ",".join(names)


def gold_of(step, form="published"):
    """The gold (sub-question, base) of a routing step of a file; published: as they stand there."""
    if form == "strict":
        return gold_route(step["answer"])
    return step["answer"]["query"], step["answer"]["retriever"][0]


def read_answer(output, form="published"):
    """The answer of an answering step, or None where the output is malformed."""
    if form == "strict":
        step = parse_step(output)
        return step.answer if isinstance(step, AnswerStep) else None
    if tag("think", output) is None:
        return None
    return tag("answer", output)


def answer_reward(answer, gold, rule="published"):
    """Eq. 2: how right an answer is, 0 to 1. gold: one accepted answer, or a list of them.

    The published rule pays recall where there is one gold answer of more than five words. Otherwise
    it is all or nothing: 1 where recall is 1. Exact wants the same tokens, in any order.
    """
    golds = gold if isinstance(gold, list) else [gold]
    precision, recall, f1 = answer_scores(answer, golds)
    if rule == "recall":
        return recall
    if rule == "f1":
        return f1
    if rule == "exact":
        return float(precision == 1 and recall == 1)
    if len(golds) == 1 and isinstance(golds[0], str) and len(golds[0].split(" ")) > 5:
        return recall
    return float(recall == 1)


def step_reward(output, step, similarity, options=RewardOptions()):
    """The Reward of one sampled output; a malformed one has total 0.

    step: a step of a published file, {"step_type": "ret" | "ans", "answer": ...}
    similarity(query, gold query) -> float, 1 for equal ones. The published form takes it of all
    readable outputs, strict only where both ask for something.

        Eq. 1   r_ret = 0.5 * sim(query, gold query) + 0.5 * [base = gold base]
                strict: "none" is similar to "none" and to nothing else, and nothing is below 0
        Eq. 2   r_ans = recall, or [recall = 1] for short golds
    """
    if step["step_type"] == "ans":
        answer = read_answer(output, options.form)
        if answer is None:
            return Reward(total=0.0, form=0.0, answer=0.0)
        earned = answer_reward(answer, step["answer"], options.answer)              # Eq. 2
        return Reward(total=earned, form=1.0, answer=earned)

    routing = read_route(output, options.form)
    if routing is None:
        return Reward(total=0.0, form=0.0, similarity=0.0, route=0.0)
    query, base = routing
    gold_query, gold_base = gold_of(step, options.form)
    route = float(base == gold_base)
    if options.form == "published":
        sim = float(similarity(query, gold_query))
    elif "none" in (base, gold_base):
        sim = route                                         # 1 where both are none
    else:
        sim = max(0.0, float(similarity(query, gold_query)))
    price = 0.0 if base == "none" else options.price
    total = options.similarity_weight * sim + options.route_weight * route - price  # Eq. 1
    if options.form == "strict" or price > 0:
        total = max(0.0, total)
    return Reward(total, form=1.0, similarity=sim, route=route, price=price)


def similarity_table(outputs, steps, encode, form="published"):
    """One call of the encoder for many outputs -> similarity(query, gold query), which looks the
    cosine up. outputs[i] answers steps[i].

    encode: list of texts -> (texts, dim) rows of length 1, as the retriever encodes its queries.
    """
    queries = set()
    for output, step in zip(outputs, steps):
        if step["step_type"] != "ret":
            continue
        routing = read_route(output, form)
        if routing is not None:
            query, _ = routing
            gold_query, _ = gold_of(step, form)
            queries |= {query, gold_query}
    vector_of = {}
    if queries:
        texts = sorted(queries)
        vectors = torch.as_tensor(encode(texts))                                    # (texts, dim)
        vector_of = dict(zip(texts, vectors))

    def similarity(query, gold_query):
        """The cosine. Rounded: its last bit depends on the order of the words, and equal rewards of
        a group would seem to differ."""
        return round(float(vector_of[query] @ vector_of[gold_query]), 6)

    return similarity


# ---------------------------------------------------------------------------- advantages and loss


def group_advantages(rewards, groups, scale=True, eps=1e-6):
    """How much better than its group an output was.

        Eq. 3   A_i = (r_i - mean(r)) / (std(r) + eps), over the outputs of its group

    rewards (N,), groups (N,) any numbers, equal inside a group -> (N,). std divides by n - 1;
    scale=False leaves the division out. A group of one, or one in which all rewards are equal,
    gives 0: it says nothing about what was better.
    """
    rewards, groups = torch.as_tensor(rewards), torch.as_tensor(groups)
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for group in groups.unique():
        members = groups == group                                                   # (N,) bool
        r = rewards[members].double()                                               # (G,)
        if r.max() > r.min():
            spread = r.std() + eps if scale else 1.0
            advantages[members] = (r - r.mean()) / spread
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def state_advantages(rewards, states, scale=True, eps=1e-6):
    """Credit by state: which step of a trajectory was good, from final answers alone.

    Trajectories of one question begin alike, and part where they sample differently. The steps that
    answered the same state, which is the same prompt, are a group of Step-GRPO's kind: one
    situation, several continuations, each judged by how its trajectory ended (the anchor-state
    groups of GiGPO, 2505.10978).

        Eq. 7   A_(i,t) = (R_i - mean(R_j)) / (std(R_j) + eps),   over all steps (j, u) whose state
                                                                  is that of (i, t)

    rewards (n,): R of each of the n trajectories of a question; states: for each trajectory the
    states of its steps, anything that can be a key -> for each trajectory the advantages of its
    steps, (steps,). A state that one step alone has seen, or behind which all ended alike, gives 0.
    """
    number_of = {}                                          # state -> number of its group
    step_rewards, groups = [], []
    for reward, own_states in zip(rewards, states):
        for state in own_states:
            step_rewards.append(reward)
            groups.append(number_of.setdefault(state, len(number_of)))
    advantages = group_advantages(torch.tensor(step_rewards), groups, scale, eps)   # Eq. 7
    return advantages.split([len(own_states) for own_states in states])


def grpo_loss(logp, old_logp, advantages, mask, *, ref_logp=None, clip=0.2, clip_high=None,
              kl_coef=0.0, level="token", normalizer=None):
    """The clipped policy-gradient loss with its KL term -> (loss, metrics).

    logp (with gradient), old_logp, ref_logp, mask (N, T); advantages (N,), the same for all tokens
    of an output.

        Eq. 4   ratio = exp(logp - old_logp)
        Eq. 5   l = -min(ratio * A, clamp(ratio, 1 - clip, 1 + clip_high) * A)
                clip_high = clip unless it is given
        Eq. 6   k3 = exp(ref - logp) - (ref - logp) - 1,     loss = mean(l + kl_coef * k3)

    level "token": the mean over all tokens under the mask; "sequence": the mean over outputs of
    each output's mean. normalizer: the number of tokens (or outputs) of the whole batch where this
    call sees only a part of it. Raises ValueError for a KL term without reference.
    """
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef is {kl_coef}, but there is no ref_logp to measure from")
    mask = mask.bool()
    weight = token_weights(mask, level, normalizer, logp.dtype)                     # (M,)
    A = advantages[:, None].expand_as(logp)[mask]                                   # (M,)

    ratio = (logp[mask] - old_logp[mask]).exp()                                     # Eq. 4, (M,)
    upper = 1 + (clip if clip_high is None else clip_high)
    clipped = ratio.clamp(1 - clip, upper)
    loss = (weight * -torch.min(ratio * A, clipped * A)).sum()                      # Eq. 5
    metrics = ratio_metrics(ratio.detach(), clipped.detach())
    if ref_logp is not None:
        d = ref_logp[mask] - logp[mask]
        kl = (weight * (d.exp() - d - 1)).sum()                                     # Eq. 6
        metrics["kl"] = kl.item()
        if kl_coef:
            loss = loss + kl_coef * kl
    return loss, metrics


def token_weights(mask, level="token", normalizer=None, dtype=torch.float32):
    """The weight of each token under the mask (N, T) in a mean over a batch -> (M,), sum 1 over it;
    level and normalizer as in grpo_loss."""
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}: give token or sequence")
    lengths = mask.sum(dim=1, keepdim=True)                                         # (N, 1)
    if level == "token":
        weight = torch.ones(int(lengths.sum()), dtype=dtype, device=mask.device)    # (M,)
        count = int(lengths.sum())
    else:
        weight = 1.0 / lengths.expand_as(mask)[mask].to(dtype)                      # (M,)
        count = int((lengths > 0).sum())
    return weight / (normalizer or count)


def ratio_metrics(ratio, clipped):
    """Which share of the tokens was clipped, and how far the policy moved. ratio, clipped (M,)."""
    if not len(ratio):
        return {"clip_fraction": 0.0, "ratio_min": 1.0, "ratio_max": 1.0}
    changed = ratio != clipped
    return {"clip_fraction": changed.float().mean().item(),
            "ratio_min": ratio.min().item(), "ratio_max": ratio.max().item()}
