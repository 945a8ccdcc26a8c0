"""Which examples a pass of training is given, by hand and over whole epochs."""
from parts.batches import Mixture, in_budget
from parts.stepfiles import StepExample


def test_batches_keep_the_budget():
    # by hand: 3 + 3 rows of width 3 are 6, a third of width 4 would make 12
    assert in_budget([9, 4, 3, 3], int, 8) == [[3, 3], [4], [9]]
    assert in_budget([2, 2, 2], int, 4) == [[2, 2], [2]] and in_budget([], int, 4) == []


def examples(name, count):
    return [[StepExample("ans", "s", f"{name}{i}", "a")] for i in range(count)]


def ten_a_letter(example):
    """Stands for the number of tokens: 20 to 50."""
    return 10 * len(example.problem)


def test_a_mixture_draws_by_share_and_repeats_nothing_within_an_epoch():
    sources = [("a", examples("a", 5000), 3.0), ("b", examples("b", 100), 1.0)]
    mixture = Mixture(sources, ten_a_letter, 1280, 0)
    drawn = {"a": [], "b": []}
    for pool in range(4):
        for batch in mixture.batches(pool):
            for example in batch:
                drawn[example.problem[0]].append(example.problem)
    a, b = drawn["a"], drawn["b"]
    assert len(a) == 4 * 768 and len(b) == 4 * 256 and len(set(a)) == len(a)
    counts = [b.count(problem) for problem in set(b)]           # ten epochs of 100
    assert len(counts) == 100 and max(counts) - min(counts) <= 1
    batches = mixture.batches(3)
    sizes = [len(batch) * max(map(ten_a_letter, batch)) for batch in batches]
    assert max(sizes) <= 1280                                   # the budget is kept, and well used
    assert sum(size > 1100 for size in sizes) > 0.8 * len(batches)
    again = Mixture(sources, ten_a_letter, 1280, 0)             # whatever was drawn before
    assert again.batches(2) == mixture.batches(2)
    assert Mixture(sources, ten_a_letter, 1280, 1).batches(2) != mixture.batches(2)


def test_a_source_of_hardly_any_share_is_drawn_once_a_pool():
    sources = [("a", examples("a", 50), 1e6), ("b", examples("b", 2), 1.0)]
    mixture = Mixture(sources, ten_a_letter, 10 ** 9, 0)
    drawn = []
    for pool in range(4):
        [batch] = mixture.batches(pool)
        drawn += [example.problem for example in batch if example.problem[0] == "b"]
    assert len(drawn) == 4 and sorted(drawn[:2]) == sorted(drawn[2:]) == ["b0", "b1"]
