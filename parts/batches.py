"""What a pass of training is given: which examples together, and as padded tensors.

    step examples -> Mixture: batches that keep a budget of tokens
                  -> make_batch: rows of prompt and target, and which tokens are targets
    groups        -> pack: prompts, the outputs of each, and what belongs to each output or token

Legend of shapes
    B examples of a batch   T tokens of the longest
    N groups   n outputs of the largest group   L tokens of the longest output
"""
import random

import torch

from parts.stepfiles import step_output


def in_budget(items, size, budget):
    """Items sorted by size and cut into batches: rows x the longest row keeps the budget. An item
    that is larger than the budget stands alone."""
    batches = []
    for item in sorted(items, key=size):            # so the last one of a batch is its longest
        if not batches or (len(batches[-1]) + 1) * size(item) > budget:
            batches.append([])
        batches[-1].append(item)
    return batches


class Mixture:
    """Endless batches from several files, each file drawn in proportion to its share and without
    repetition within an epoch.

    Batch (pool, i) depends on the seed and on the names of the files alone, so a run continues at
    the same place. The examples of a pool are sorted by length before they are cut into batches, so
    that little is padded; the order of the batches is shuffled again.
    """
    POOL = 1024

    def __init__(self, sources, length, tokens, seed):
        """sources: list of (name, trajectories, share); length(example): its tokens; tokens: the
        budget of a batch."""
        total = sum(share for _, _, share in sources)
        self.sources = []
        for name, trajectories, share in sources:
            examples = []
            for steps in trajectories:
                examples += steps
            count = max(1, round(self.POOL * share / total))        # of a pool
            self.sources.append((name, examples, count))
        self.length, self.tokens, self.seed = length, tokens, seed
        self.orders = {}                                    # name -> (epoch, its permutation)

    def draw(self, name, examples, i):
        """The i-th example drawn from a file: every epoch is another permutation."""
        epoch, place = divmod(i, len(examples))
        if self.orders.get(name, (None, None))[0] != epoch:
            order = list(range(len(examples)))
            random.Random(f"{self.seed} {name} {epoch}").shuffle(order)
            self.orders[name] = epoch, order
        _, order = self.orders[name]
        return examples[order[place]]

    def batches(self, pool):
        """The batches of a pool, each a list of StepExample."""
        examples = []
        for name, source, count in self.sources:
            examples += [self.draw(name, source, pool * count + i) for i in range(count)]
        batches = in_budget(examples, self.length, self.tokens)
        random.Random(f"{self.seed} pool {pool}").shuffle(batches)
        return batches


def encoded(processor, example):
    """An example -> its prompt, (ids, patches, grids), and the ids of its target, the end of turn
    included."""
    prompt = processor.prompt(example.conversation())
    return prompt, processor.encode(step_output(example)) + [processor.end]


def count_tokens(processor, example):
    """Tokens of an example, prompt and target."""
    (ids, _, _), target = encoded(processor, example)
    return len(ids) + len(target)


def make_batch(processor, examples, longest, device):
    """Examples -> the model's inputs, the mask (B, T) of the target tokens, and how many examples
    had more than `longest` tokens: they are left out, for to cut one would lose its question."""
    rows, lengths, too_long = [], [], 0
    for example in examples:
        (ids, patches, grids), target = encoded(processor, example)
        if len(ids) + len(target) > longest:
            too_long += 1
            continue
        rows.append((ids + target, patches, grids))
        lengths.append(len(target))
    if not rows:                            # a rank without examples: a row without targets
        rows, lengths = [([processor.pad_id] * 2, [], [])], [0]
    batch = to_device(processor.batch(rows), device)
    T = batch["input_ids"].shape[1]
    starts = T - torch.tensor(lengths)[:, None]                                     # (B, 1)
    mask = torch.arange(T) >= starts        # (B, T): rows end together, targets are last
    return batch, mask.to(device), too_long


def to_device(batch, device):
    """A batch of the processor on the device; pictures are None where there are none."""
    moved = {}
    for name, tensor in batch.items():
        moved[name] = None if tensor is None else tensor.to(device)
    return moved


def pack(processor, groups, device, entropy_on=None):
    """Groups -> the inputs of model.group_log_probs, the old log-probabilities (N n, L), the
    advantages (N n,), and which tokens (N n, L) get a bonus for entropy: "route" or "all", or none.

    Groups of different sizes (outcome mode) are filled up with empty responses, which the mask
    keeps out.
    """
    N = len(groups)
    n = max(len(group.candidates) for group in groups)
    lengths = []
    for group in groups:
        lengths += [len(candidate.token_ids) for candidate in group.candidates]
    L = max(lengths)
    tokens = torch.zeros(N, n, L, dtype=torch.long)
    mask = torch.zeros(N, n, L, dtype=torch.bool)
    bonus = torch.zeros(N, n, L, dtype=torch.bool)
    old = torch.zeros(N, n, L)
    advantages = torch.zeros(N, n)
    for i, group in enumerate(groups):
        advantages[i, :len(group.candidates)] = group.advantages
        for j, candidate in enumerate(group.candidates):
            own = slice(len(candidate.token_ids))
            tokens[i, j, own] = torch.tensor(candidate.token_ids)
            mask[i, j, own] = True
            old[i, j, own] = torch.tensor(candidate.logps)
            if entropy_on == "route":
                bonus[i, j, own] = torch.tensor(route_tokens(processor, candidate))
            elif entropy_on == "all":
                bonus[i, j, own] = True
    inputs = processor([group.conversation for group in groups])
    inputs["tokens"] = tokens.flatten(0, 1)                                         # (N n, L)
    inputs["mask"] = mask.flatten(0, 1)
    old, advantages, bonus = old.flatten(0, 1), advantages.flatten(), bonus.flatten(0, 1)
    return to_device(inputs, device), old.to(device), advantages.to(device), bonus.to(device)


def route_tokens(processor, candidate):
    """True at the tokens between <ret> and </ret>: where the route is chosen."""
    pieces = [processor.decode([token]) for token in candidate.token_ids]
    text = "".join(pieces)
    start, end = text.find("<ret>"), text.find("</ret>")
    inside, place = [], 0
    for piece in pieces:
        inside.append(0 <= start and start + len("<ret>") <= place < end)
        place += len(piece)
    return inside
