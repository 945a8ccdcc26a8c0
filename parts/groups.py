"""A group of candidates for one step, which prompts get one, and what a log says of them."""
from dataclasses import asdict, dataclass

import torch

from parts.steps import RouteStep


@dataclass
class Group:
    """G outputs of one prompt, what each earned, and where they belong. In outcome mode: those outputs of a question's
    G trajectories that answered the same prompt, each with the reward and advantage of its trajectory."""
    conversation: list
    prompt_ids: tuple
    candidates: tuple
    rewards: list                       # of floats
    parts: list                         # of grpo.Reward, for the log
    label: str                          # gold route, "answer" or "outcome": what the log and the balance go by
    golds: list                         # what would be right: answers, {"query", "retriever"} of routing steps
    advantages: torch.Tensor | None = None

    @property
    def mixed(self):
        """Whether the outputs earned different rewards: only then the group says what was better."""
        return max(self.rewards) > min(self.rewards)

    @property
    def solved(self):
        """Whether every output was right in all its parts."""
        return all(v > 0.999 for p in self.parts for v in (p.similarity, p.route, p.answer) if v is not None)

    @property
    def teaches(self):
        """Whether an update can learn from it: where all advantages are 0, the gradient of Eq. 5 is, too. Other groups
        are left out of the update, with their KL and entropy terms."""
        return bool(self.advantages.any())

    @property
    def size(self):
        return len(self.prompt_ids) + sum(len(c.token_ids) for c in self.candidates)

    @property
    def picture(self):
        return any(not isinstance(message["content"], str) for message in self.conversation)

    def as_row(self):
        """For samples.jsonl: what was asked, what is right, what each output said and earned."""
        content = self.conversation[-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        known = [{k: v for k, v in asdict(p).items() if v is not None} for p in self.parts]
        known = known or [{}] * len(self.candidates)                        # no parts in outcome mode
        return {"label": self.label, "prompt": "".join(p["text"] for p in parts if p["type"] == "text"),
                "image": next((str(p["image"]) for p in parts if p["type"] == "image"), None), "gold": self.golds,
                "outputs": [{"text": c.text, "reward": r, "advantage": round(a, 4), "parts": p}
                            for c, r, a, p in zip(self.candidates, self.rewards, self.advantages.tolist(), known)]}


class Interest:
    """How often the groups of a kind of prompt were not solved lately. Prompts that are always solved teach nothing, so
    they are drawn less often."""

    def __init__(self, rest, state):
        self.rest, self.unsolved = rest, state

    def weight(self, key):
        return 1 - self.rest * (1 - self.unsolved.get(key, 1.0))

    def learn(self, key, solved):
        self.unsolved[key] = 0.9 * self.unsolved.get(key, 1.0) + 0.1 * (not solved)

    def choose(self, items, count, key, rng):
        """Draw without replacement, by weight (Efraimidis and Spirakis: the largest u ** (1 / w))."""
        return sorted(items, key=lambda x: rng.random() ** (1 / max(1e-6, self.weight(key(x)))), reverse=True)[:count]


def quotas(o, labels, rng):
    """How many prompts of each label an update gets: the routes evenly, the rest of the division to some of them,
    answers their share. labels: those present."""
    routes = sorted(x for x in labels if x != "answer")
    answers = round(o.prompts * o.answer_share) if "answer" in labels else 0
    each, rest = divmod(o.prompts - answers, max(1, len(routes)))
    rng.shuffle(routes)
    return {"answer": answers, **{r: each + (i < rest) for i, r in enumerate(routes)}}


def balanced(o, items, label, key, interest, rng):
    """Draw o.prompts of the items: evenly over their gold routes, or as they come.

    Why evenly: inside a group the right route always wins, but the update is a sum over groups. Where one route is rare
    among the prompts, the push towards the other routes everywhere is stronger than the push towards it on its own
    prompts; it is sampled less and less, and a route that is never sampled has no advantage to learn
    from. With even shares nothing is gained by liking a route.
    """
    if not o.balance:
        return interest.choose(items, o.prompts, key, rng)
    by = {}
    for x in items:
        by.setdefault(label(x), []).append(x)
    chosen = [x for name, count in quotas(o, by, rng).items()
              for x in interest.choose(by.get(name, []), count, key, rng)]
    taken = set(map(id, chosen))
    return chosen + interest.choose([x for x in items if id(x) not in taken], o.prompts - len(chosen), key, rng)


def reward_metrics(groups):
    """Means of the rewards and of their parts, the share of groups that the update leaves out, and by gold route X: the
    share of right outputs (route:X), of X among all that routing steps ask for (asked:X), of the routing prompts
    (prompts:X), and of the groups that are mixed (mixed:X)."""
    parts = [p for g in groups for p in g.parts]
    mean = lambda values: sum(values) / len(values) if values else None
    named = {name: mean([getattr(p, name) for p in parts if getattr(p, name) is not None])
             for name in ("form", "similarity", "route", "answer")}
    out = {"reward": mean([p.total for p in parts]), **named, "flat_groups": mean([not g.teaches for g in groups])}
    routing = [g for g in groups if g.label not in ("answer", "outcome")]
    asked = [c.parsed.route.lower() for g in routing for c in g.candidates if isinstance(c.parsed, RouteStep)]
    for label in sorted({g.label for g in routing}):
        here, name = [g for g in routing if g.label == label], label.removesuffix(" retriever")
        out |= {f"route:{name}": mean([p.route for g in here for p in g.parts]),
                f"asked:{name}": asked.count(label) / max(1, len(asked)),
                f"prompts:{name}": len(here) / len(routing), f"mixed:{name}": mean([g.mixed for g in here])}
    return out
