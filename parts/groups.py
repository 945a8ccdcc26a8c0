"""Groups: the outputs that were sampled from one prompt, and what each of them earned.

What flows through this file:
    prompts -> balanced: which of them get a group -> (sampling) -> outputs
            -> groups_of: each output is judged    -> Group -> (advantages, update)
                                                            -> reward_metrics, samples.jsonl

A prompt is anything with conversation(), golds() and label(): a step of a file, or a live question.
golds() are the steps that would be right, as a step file has them. There can be several, since open
hops may be asked for in any order.
"""
import math
from dataclasses import asdict, dataclass

import torch

from parts.questions import golds_of
from parts.score import answer_scores
from parts.steps import RouteStep


PARTS = ("form", "similarity", "route", "answer")       # of a grpo.Reward


@dataclass
class Group:
    """G outputs of one prompt, what each earned, and where they belong.

    In outcome mode: those outputs of a question's G trajectories that answered the same prompt,
    each with the reward of its trajectory.
    """
    conversation: list
    prompt_ids: tuple
    candidates: tuple
    rewards: list                       # of floats
    parts: list                         # of grpo.Reward, for the log; none in outcome mode
    label: str                          # gold route, "answer" or "outcome"
    golds: list                         # what would be right: answers, or {"query", "retriever"}
    advantages: torch.Tensor | None = None

    @property
    def mixed(self):
        """Whether the outputs earned different rewards: only then it says what was better."""
        return max(self.rewards) > min(self.rewards)

    @property
    def solved(self):
        """Whether every output was right in all its parts."""
        for part in self.parts:
            for value in (part.similarity, part.route, part.answer):
                if value is not None and value <= 0.999:
                    return False
        return True

    @property
    def teaches(self):
        """Whether an update can learn from it: where all advantages are 0, the gradient of Eq. 5 is
        0, too. Other groups are left out of the update, with their KL and entropy terms."""
        return bool(self.advantages.any())

    @property
    def finite(self):
        """Whether the policy's probabilities were numbers."""
        logps = [logp for candidate in self.candidates for logp in candidate.logps]
        return all(map(math.isfinite, logps))

    def output_tokens(self):
        return sum(len(candidate.token_ids) for candidate in self.candidates)

    def size(self):
        """Tokens of the prompt and of all outputs."""
        return len(self.prompt_ids) + self.output_tokens()

    def has_picture(self):
        return any(not isinstance(message["content"], str) for message in self.conversation)

    def as_row(self):
        """For samples.jsonl: the prompt, what is right, what each output was and earned."""
        content = self.conversation[-1]["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        texts = [part["text"] for part in content if part["type"] == "text"]
        images = [str(part["image"]) for part in content if part["type"] == "image"]
        outputs = []
        for i, candidate in enumerate(self.candidates):
            parts = asdict(self.parts[i]) if self.parts else {}
            parts = {name: value for name, value in parts.items() if value is not None}
            outputs.append({"text": candidate.text, "reward": self.rewards[i],
                            "advantage": round(self.advantages[i].item(), 4), "parts": parts})
        return {"label": self.label, "prompt": "".join(texts),
                "image": images[0] if images else None, "gold": self.golds, "outputs": outputs}

    def lines(self):
        """A line of text for each output: what it (in outcome mode its trajectory, R) earned, and
        what it says."""
        lines = []
        for i, candidate in enumerate(self.candidates):
            earned = f"{'r' if self.parts else 'R'} {self.rewards[i]:.3f}"
            words = [earned, f"A {self.advantages[i]:+.3f}",
                     f"{len(candidate.token_ids):2d} tokens"]
            if self.parts:
                words += parts_in_words(self.parts[i])
            lines.append("  ".join([*words, candidate.text]))
        return lines


def parts_in_words(reward):
    """["form 1.00", "route 0.00", ...]: the parts that a Reward has."""
    words = []
    for name in PARTS:
        value = getattr(reward, name)
        if value is not None:
            words.append(f"{name} {value:.2f}")
    return words


def nearness(reward):
    """What makes an output nearest to a gold step: the similarity of its sub-question, then the
    total."""
    return reward.similarity or 0.0, reward.total


def groups_of(prompts, outputs, rewards_of):
    """Sampled outputs -> a Group for each prompt, None where the prompt was too long to be asked.

    outputs: what Router.sample returned for the prompts, (prompt ids, candidates) each.
    rewards_of([(output, golds)]) -> their Rewards; it is called once, so one call of the encoder
    measures all of them.
    """
    to_judge = []
    for prompt, (_, candidates) in zip(prompts, outputs):
        golds = prompt.golds()
        for candidate in candidates:
            to_judge.append((candidate.text, golds))
    rewards = iter(rewards_of(to_judge))
    groups = []
    for prompt, (prompt_ids, candidates) in zip(prompts, outputs):
        group = None
        if candidates:
            parts = [next(rewards) for _ in candidates]
            totals = [part.total for part in parts]
            answers = [gold["answer"] for gold in prompt.golds()]
            group = Group(prompt.conversation(), prompt_ids, candidates, totals, parts,
                          prompt.label(), answers)
        groups.append(group)
    return groups


def outcome_reward(trajectory):
    """The recall of the final answer, 0 where a step was malformed."""
    if trajectory.malformed:
        return 0.0
    _, recall, _ = answer_scores(trajectory.answer, golds_of(trajectory.row))
    return recall


def states_of(trajectories):
    """For each trajectory of a question the states of its steps: what the policy read. (The picture
    is that of the question, the same for all.)"""
    return [[step.prompt_ids for step in trajectory.steps] for trajectory in trajectories]


def groups_by_prompt(trajectories, rewards, advantages):
    """The steps of a question's trajectories as groups to update: those that answered the same
    prompt together. advantages: for each trajectory those of its steps."""
    members_of = {}                             # state -> [(step, reward, advantage)]
    for i, states in enumerate(states_of(trajectories)):
        for state, step, advantage in zip(states, trajectories[i].steps, advantages[i].tolist()):
            if step.candidates:                 # else its prompt was too long to be asked
                members_of.setdefault(state, []).append((step, rewards[i], advantage))
    groups = []
    golds = golds_of(trajectories[0].row)
    for prompt_ids, members in members_of.items():
        steps, rewards_of_steps, own_advantages = zip(*members)
        candidates = tuple(step.candidates[0] for step in steps)
        groups.append(Group(steps[0].conversation, prompt_ids, candidates, list(rewards_of_steps),
                            [], "outcome", golds, torch.tensor(own_advantages)))
    return groups


# ------------------------------------------------------------------------ which prompts get a group

class Interest:
    """How often the groups of a kind of prompt were not solved lately. Prompts that are always
    solved teach nothing, so they are drawn less often."""

    def __init__(self, rest, unsolved):
        """rest: how much less often solved prompts are drawn, 0 to 1; unsolved: {key: share}, which
        is kept with the state of the run."""
        self.rest, self.unsolved = rest, unsolved

    def weight(self, key):
        return 1 - self.rest * (1 - self.unsolved.get(key, 1.0))

    def learn(self, key, solved):
        """A group of this kind was solved or not: a moving average over some ten groups."""
        self.unsolved[key] = 0.9 * self.unsolved.get(key, 1.0) + 0.1 * (not solved)

    def choose(self, items, count, key, rng):
        """Draws without replacement, by weight (Efraimidis and Spirakis 2006: the items with the
        largest u ** (1 / weight)). key(item): its kind."""
        draws = []
        for item in items:
            weight = max(1e-6, self.weight(key(item)))
            draws.append(rng.random() ** (1 / weight))
        order = sorted(range(len(draws)), key=draws.__getitem__, reverse=True)
        return [items[place] for place in order[:count]]


def quotas(o, labels, rng):
    """{label: how many prompts of it an update gets}, of the labels that are present: the routes
    evenly, the rest of the division to some of them; answers their share."""
    routes = sorted(label for label in labels if label != "answer")
    answers = round(o.prompts * o.answer_share) if "answer" in labels else 0
    each, rest = divmod(o.prompts - answers, max(1, len(routes)))
    rng.shuffle(routes)
    counts = {"answer": answers}
    for i, route in enumerate(routes):
        counts[route] = each + 1 if i < rest else each
    return counts


def balanced(o, prompts, key, interest, rng):
    """Draws o.prompts of the prompts: evenly over their gold routes, or as they come.

    Why evenly: inside a group the right route always wins, but the update is a sum over groups.
    Where one route is rare among the prompts, the push towards the other routes everywhere is
    stronger than the push towards it on its own prompts; it is sampled less and less, and a route
    that is never sampled has no advantage to learn from. With even shares nothing is gained by
    liking a route.
    """
    if not o.balance:
        return interest.choose(prompts, o.prompts, key, rng)
    by_label = {}
    for prompt in prompts:
        by_label.setdefault(prompt.label(), []).append(prompt)
    chosen = []
    for label, count in quotas(o, by_label, rng).items():
        chosen += interest.choose(by_label.get(label, []), count, key, rng)
    chosen_ids = {id(prompt) for prompt in chosen}          # equal prompts may stand there twice
    others = [prompt for prompt in prompts if id(prompt) not in chosen_ids]
    return chosen + interest.choose(others, o.prompts - len(chosen), key, rng)


# -------------------------------------------------------------------------- what a log says of them

def mean(values):
    return sum(values) / len(values) if values else None


def mean_of(rows):
    """The mean of each metric over some rows of them; {} of no row."""
    means = {}
    for name in rows[0] if rows else ():
        means[name] = mean([row[name] for row in rows])
    return means


def mean_parts(parts):
    """The means of some Rewards and of their parts, over those that have them."""
    metrics = {"reward": mean([part.total for part in parts])}
    for name in PARTS:
        values = [getattr(part, name) for part in parts]
        metrics[name] = mean([value for value in values if value is not None])
    return metrics


def reward_metrics(groups):
    """Means of the rewards and of their parts, and the share of groups that the update leaves out.

    By gold route X: the share of right outputs (route:X), of X among all that routing steps ask for
    (asked:X), of the routing prompts (prompts:X), and of the groups that are mixed (mixed:X).
    """
    parts = []
    for group in groups:
        parts += group.parts
    metrics = mean_parts(parts)
    metrics["flat_groups"] = mean([not group.teaches for group in groups])

    routing = [group for group in groups if group.label not in ("answer", "outcome")]
    routes = []                                                 # that the outputs ask for
    for group in routing:
        for candidate in group.candidates:
            if isinstance(candidate.parsed, RouteStep):
                routes.append(candidate.parsed.route.lower())
    for label in sorted({group.label for group in routing}):
        name = label.removesuffix(" retriever")
        same = [group for group in routing if group.label == label]
        right = []
        for group in same:
            right += [part.route for part in group.parts]
        metrics[f"route:{name}"] = mean(right)
        metrics[f"asked:{name}"] = routes.count(label) / max(1, len(routes))
        metrics[f"prompts:{name}"] = len(same) / len(routing)
        metrics[f"mixed:{name}"] = mean([group.mixed for group in same])
    return metrics
